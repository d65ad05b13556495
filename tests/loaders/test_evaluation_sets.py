"""Test sets: every visual once over all ranks, with its texts."""

import pytest

from loaders.config import LoaderConfig
from loaders.evaluation import ChoiceSet, QASet, RetrievalSet, VisualSet
from sharding.build import build_corpus

CONFIG = LoaderConfig(image_res=32, decode="cpu", threads=1)


@pytest.mark.parametrize("world_size", [1, 2, 5, 16, 25])  # the last: more ranks than visuals
@pytest.mark.parametrize("name", ["images_test", "clips_test_motion"])
def test_every_visual_exactly_once(shapes, name: str, world_size: int) -> None:
    dataset = RetrievalSet(shapes.url(name), CONFIG)
    frames = 1 if dataset.media_type == "image" else 3
    seen = []
    for rank in range(world_size):
        for batch in dataset.batches(3, 7, rank, world_size):
            assert batch.frames.shape == (len(batch.keys), frames, 32, 32, 3)
            seen += batch.indices.tolist()
    assert sorted(seen) == list(range(24))
    assert not dataset.missing
    assert len(dataset.thumbnail(3, 2)) == min(frames, 2)


def test_texts_and_visuals_refer_to_each_other(shapes) -> None:
    dataset = RetrievalSet(shapes.url("images_test"), CONFIG)
    assert len(set(dataset.texts)) == len(dataset.texts)
    for text, visuals in enumerate(dataset.visuals_of_text):
        assert visuals
        assert all(text in dataset.texts_of_visual[visual] for visual in visuals)


def test_captions_shared_by_clips_are_one_text(shapes, tmp_path) -> None:
    target = str(tmp_path / "x")
    build_corpus([str(shapes.folder / "ssv2_test.json")], str(shapes.folder / "media"), "video", target, size=48, fps=2)
    dataset = RetrievalSet(target, CONFIG)
    assert len(dataset.texts) < 24
    assert sum(len(visuals) for visuals in dataset.visuals_of_text) == 24


def test_paragraphs_join_a_visuals_captions(shapes) -> None:
    apart = RetrievalSet(shapes.url("clips_train"), CONFIG)
    joined = RetrievalSet(shapes.url("clips_train"), CONFIG, paragraph=True)
    assert len(joined.texts) <= joined.num_visuals < len(apart.texts)


def test_questions_and_options(shapes) -> None:
    questions = QASet(shapes.url("qa_test"), CONFIG)
    assert len(questions.questions) == 24
    assert questions.questions[0].answers
    assert "?" not in questions.questions[0].question
    choices = ChoiceSet(shapes.url("mc_test"), CONFIG)
    assert {len(item.options) for item in choices.choices} == {5}
    with pytest.raises(ValueError, match="has no questions"):
        QASet(shapes.url("images_test"), CONFIG)
    with pytest.raises(ValueError, match="has no captions"):
        RetrievalSet(shapes.url("qa_test"), CONFIG)


@pytest.mark.parametrize(
    ("variables", "processes"),
    [
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, 4),  # two nodes, by torchrun or deepspeed
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_SIZE": "1"}, 16),
        ({}, 2),  # no launcher says: all eight are here
    ],
)
def test_a_rank_decodes_with_its_share_of_the_cores(shapes, monkeypatch, variables, processes):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    asked = []

    def decoder(backend, size, threads, *_, **__):
        asked.append(threads)
        raise RuntimeError("far enough")

    monkeypatch.setattr("loaders.evaluation.make_decoder", decoder)
    dataset = VisualSet(shapes.url("images_test"), LoaderConfig())
    with pytest.raises(RuntimeError, match="far enough"):
        next(dataset.batches(1, 4, rank=1, world_size=int(variables.get("WORLD_SIZE", 8))))
    assert asked == [processes]
    dataset.close()
