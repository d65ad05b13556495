"""The training loader: exactly once, the same batches whatever the ranks, bad samples replaced whole."""

import json
import re
import threading
from pathlib import Path

import psutil
import pytest
import torch

from loaders.batch import Batch
from loaders.config import LoaderConfig, PerMedia, VideoInput
from loaders.text import Tokenizer, clean_text
from loaders.train import TrainLoader
from sharding.build import build_corpus
from sharding.shards.schema import read_corpus, read_index


def config(**settings) -> LoaderConfig:
    options = {"batch_size": PerMedia(12, 6), "image_res": 32, "decode": "cpu", "threads": 1, "stripes": 8}
    return LoaderConfig(**options | {"video_input": VideoInput(num_frames=2)} | settings)


def corpora(shapes) -> list[str]:
    return [shapes.url("images_train"), shapes.url("clips_train")]


def texts_by_key(url: str) -> dict[str, list[str]]:
    corpus = read_corpus(url)
    rows = [row for shard in range(len(corpus.shards)) for row in read_index(corpus, shard).to_pylist()]
    return {f"{corpus.name}/{row['key']}": [clean_text(text) for text in row["captions"]] for row in rows}


def test_an_epoch_holds_every_sample_once_in_batches_of_one_medium(shapes, tokenizer: Tokenizer) -> None:
    loader = TrainLoader(corpora(shapes), tokenizer, config())
    assert loader.media_steps == {"image": 12, "video": 6}
    batches = list(loader)
    assert [batch.step for batch in batches] == list(range(18))
    keys = [key for batch in batches for key in batch.keys]
    assert len(keys) == len(set(keys)) == 12 * 12 + 6 * 6
    for batch in batches:
        frames = 1 if batch.media_type == "image" else 2
        assert batch.frames.shape == (12 if frames == 1 else 6, frames, 32, 32, 3)
        assert len({key.split("/")[0] for key in batch.keys}) == 1
        assert len(set(batch.idx.tolist())) == len(batch.keys)
    assert loader.state_dict() == {"epoch": 1, "step": 0}
    second = [key for batch in loader for key in batch.keys]
    assert keys != second
    loader.close()


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_same_global_batches(shapes, tokenizer: Tokenizer, world_size: int) -> None:
    whole = list(TrainLoader(corpora(shapes), tokenizer, config()))
    parts = [list(TrainLoader(corpora(shapes), tokenizer, config(), rank, world_size)) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        for rank in range(world_size):
            part = parts[rank][step]
            assert part.keys == batch.keys[rank::world_size]
            assert torch.equal(part.frames, batch.frames[rank::world_size])
            assert torch.equal(part.input_ids, batch.input_ids[rank::world_size])
            assert torch.equal(part.idx, batch.idx[rank::world_size])


def test_resuming_gives_the_remaining_batches_to_the_bit(shapes, tokenizer: Tokenizer) -> None:
    whole = list(TrainLoader(corpora(shapes), tokenizer, config()))
    loader = TrainLoader(corpora(shapes), tokenizer, config())
    steps = iter(loader)
    for _ in range(7):
        next(steps)
    state = loader.state_dict()
    assert state == {"epoch": 0, "step": 7}
    again = TrainLoader(corpora(shapes), tokenizer, config(prefetch=1))
    again.load_state_dict(state)
    rest = list(again)
    assert len(rest) == len(whole) - 7
    for one, other in zip(rest, whole[7:], strict=True):
        assert one.keys == other.keys
        assert torch.equal(one.frames, other.frames)
        assert torch.equal(one.input_ids, other.input_ids)


def test_captions_are_the_samples_own_and_change_between_epochs(shapes, tokenizer: Tokenizer) -> None:
    own = texts_by_key(shapes.url("images_train"))
    loader = TrainLoader([shapes.url("images_train")], tokenizer, config())
    drawn: dict[str, set[str]] = {}
    for _ in range(4):
        for batch in loader:
            for key, ids in zip(batch.keys, batch.input_ids, strict=True):
                text = tokenizer.decode(ids.tolist())
                assert text in own[key]
                drawn.setdefault(key, set()).add(text)
    assert max(len(texts) for texts in drawn.values()) >= 2


def test_each_caption_or_question_can_be_an_item_of_its_own(shapes, tokenizer: Tokenizer) -> None:
    loader = TrainLoader([shapes.url("images_train")], tokenizer, config(epoch_unit="captions"))
    assert sum(loader.mixtures["image"].counts) == 450
    pairs = [pair for batch in loader for pair in zip(batch.keys, map(tuple, batch.input_ids.tolist()), strict=True)]
    assert len(pairs) == 450 // 12 * 12
    questions = TrainLoader([shapes.url("qa_train")], tokenizer, config(epoch_unit="questions"))
    batch = next(iter(questions))
    assert batch.answers is not None
    assert batch.answers.per_question.tolist() == [1] * 6
    assert batch.answers.weights.tolist() == [1.0] * 6
    assert tokenizer.sep_id in batch.answers.input_ids[0]


def test_questions_come_with_all_their_answers_and_the_annotators_shares(
    shapes, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """As the official VQA training has it: each distinct answer once, weighted by how many gave it."""
    pictures = json.loads((shapes.folder / "images_train.json").read_text())[:6]
    given = ["Red"] * 7 + ["blue"] * 2 + ["a large green star of many words"]
    rows = [{"image": row["image"], "question": "What colour IS it?", "answer": given} for row in pictures]
    rows += [{"image": row["image"], "question": "is it red", "answer": "yes"} for row in pictures]
    (tmp_path / "qa.json").write_text(json.dumps(rows))
    build_corpus([str(tmp_path / "qa.json")], str(shapes.folder / "media"), "image", str(tmp_path / "qa"), size=48)
    loader = TrainLoader([str(tmp_path / "qa")], tokenizer, config(epoch_unit="questions"))
    (batch,) = list(loader)
    loader.close()
    assert batch.answers is not None
    assert batch.input_ids.shape == (12, 25)
    assert len(set(batch.idx.tolist())) == 6  # both questions about a photo know that they share it
    first = 0
    for ids, count in zip(batch.input_ids.tolist(), batch.answers.per_question.tolist(), strict=True):
        mine = slice(first, first + count)
        texts = [tokenizer.decode(row) for row in batch.answers.input_ids[mine].tolist()]
        weights = [round(weight, 4) for weight in batch.answers.weights[mine].tolist()]
        if tokenizer.decode(ids) == "what colour is it":
            assert list(zip(texts[:2], weights, strict=False)) == [("red", 0.7), ("blue", 0.2)]
            assert weights[2] == 0.1
            assert batch.answers.attention_mask[mine][2].sum() == 6  # cut to the official length
        else:
            assert (texts, weights) == (["yes"], [1.0])
        assert tokenizer.sep_id in batch.answers.input_ids[first]
        first += count
    assert first == len(batch.answers.weights)


def test_a_corpus_of_weight_two_is_seen_twice_each_time_differently(shapes, tokenizer: Tokenizer) -> None:
    settings = config(corpus_weights={"clips_train": 2.0, "images_train": 0.5})
    loader = TrainLoader(corpora(shapes), tokenizer, settings)
    assert loader.media_steps == {"image": 75 // 12, "video": 80 // 6}
    shown: dict[str, list[torch.Tensor]] = {}
    images: list[str] = []
    for _ in range(2):
        for batch in loader:
            images += batch.keys if batch.media_type == "image" else ()
            for key, frames in zip(batch.keys, batch.frames, strict=True):
                shown.setdefault(key, []).append(frames)
    loader.close()
    assert len(images) == len(set(images)) == 2 * 6 * 12
    clips = [views for key, views in shown.items() if key.startswith("clips")]
    assert {len(views) for views in clips} <= {3, 4}  # the last batch of an epoch is left out
    different = [not torch.equal(views[0], views[1]) for views in clips]
    assert sum(different) > 0.9 * len(different)


def test_a_weight_for_no_corpus_is_told(shapes, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="corpus_weights names 'cc3m', the corpora are clips_train, images_train"):
        TrainLoader(corpora(shapes), tokenizer, config(corpus_weights={"cc3m": 2.0}))
    with pytest.raises(ValueError, match=r"corpus_weights.clips_train is -1.0, must be above 0"):
        TrainLoader(corpora(shapes), tokenizer, config(corpus_weights={"clips_train": -1.0}))


def test_the_loop_on_the_page_works_as_written(shapes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "streaming.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "data").mkdir()
    for name, corpus in (("photos", "images_train"), ("clips", "clips_train")):
        (tmp_path / "data" / name).symlink_to(shapes.url(corpus))
    (tmp_path / "data" / "vocab.txt").symlink_to(shapes.vocab)
    monkeypatch.chdir(tmp_path)
    example = example.replace("image=128, video=32", "image=12, video=6").replace("range(10)", "range(2)")
    trained: list[Batch] = []
    exec(compile(example, "streaming.md", "exec"), {"train_step": trained.append, "device": "cpu"})
    assert len(trained) == 2 * (12 + 6)
    assert {batch.epoch for batch in trained} == {0, 1}


def test_answers_are_trained_as_they_are_ranked_with_their_punctuation(shapes, tokenizer: Tokenizer, tmp_path) -> None:
    rows = json.loads((shapes.folder / "qa_train.json").read_text())[:6]
    (tmp_path / "qa.json").write_text(json.dumps([{**row, "answer": "left/right"} for row in rows]))
    media, target = str(shapes.folder / "media"), str(tmp_path / "qa")
    build_corpus([str(tmp_path / "qa.json")], media, "video", target, size=32, fps=4, workers=1)
    (batch,) = TrainLoader([target], tokenizer, config(epoch_unit="questions"))
    expected, _ = tokenizer.encode(["left/right [SEP]"], batch.answers.input_ids.shape[1])
    assert torch.equal(batch.answers.input_ids, expected.expand(6, -1))
    assert not torch.equal(expected, tokenizer.encode(["left right [SEP]"], expected.shape[1])[0])


def test_threads_end_with_the_iteration(shapes, tokenizer: Tokenizer) -> None:
    before = threading.active_count()
    loader = TrainLoader(corpora(shapes), tokenizer, config())
    steps = iter(loader)
    next(steps)
    steps.close()
    loader.close()
    assert threading.active_count() <= before


def test_what_does_not_fit_is_told_at_once(shapes, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"batch_size\.image=12 cannot be shared equally by 5 processes"):
        TrainLoader(corpora(shapes), tokenizer, config(), 0, 5)
    with pytest.raises(ValueError, match="is more than the 40 samples"):
        TrainLoader(corpora(shapes), tokenizer, config(batch_size=PerMedia(12, 64)))
    with pytest.raises(ValueError, match="has no captions"):
        TrainLoader([shapes.url("qa_train")], tokenizer, config())
    with pytest.raises(FileNotFoundError, match="is not a packed corpus"):
        TrainLoader(["/nowhere"], tokenizer, config())
    with pytest.raises(ValueError, match="train_corpus is empty"):
        TrainLoader([], tokenizer, config())


def test_a_loader_closed_in_mid_epoch_leaves_no_thread_process_and_file(shapes, tokenizer: Tokenizer) -> None:
    processes = set(psutil.Process().children())
    threads, files = threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))
    loader = TrainLoader(corpora(shapes), tokenizer, config(prefetch=1))
    steps = iter(loader)
    next(steps)
    loader.close()
    assert list(steps) == []
    assert set(psutil.Process().children()) <= processes
    assert threading.active_count() <= threads
    assert len(list(Path("/proc/self/fd").iterdir())) <= files


def test_batches_in_use_are_not_written_over(shapes, tokenizer: Tokenizer) -> None:
    loader = TrainLoader(corpora(shapes), tokenizer, config(prefetch=1))
    held, copies = [], []
    for number, batch in enumerate(loader):
        if number % 3:
            held.append(batch.frames[0])  # a view keeps the memory
            copies.append(batch.frames[0].clone())
    assert all(torch.equal(view, copy) for view, copy in zip(held, copies, strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_res": 0}, "image_res is 0: must be at least 1"),
        ({"stripes": 0}, "stripes is 0: must be at least 1"),
        ({"video_input": VideoInput(num_frames=0)}, "video_input.num_frames is 0: must be at least 1"),
        ({"video_input": VideoInput(sample_type="center")}, "sample_type is 'center', must be rand, middle or fps"),
        ({"decode": "gpu"}, "decode is 'gpu': must be one of auto, dali, cpu"),
        ({"epoch_unit": "words"}, "epoch_unit is 'words': must be one of samples, captions, questions"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_that_cannot_work_are_told_at_once(shapes, tokenizer: Tokenizer, settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainLoader(corpora(shapes), tokenizer, config(**settings))
