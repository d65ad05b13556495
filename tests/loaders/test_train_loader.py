"""The training loader: every sample once per epoch, with its texts, and errors for impossible settings."""

import json
import re
import threading
from pathlib import Path

import psutil
import pytest
import torch

from loaders.batch import Batch
from loaders.config import LoaderConfig, PerMedia, VideoInput
from loaders.train import TrainLoader
from preprocessing.text import Tokenizer, clean_text
from runtime.errors import UserError
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


def test_captions_belong_to_their_sample_and_change_between_epochs(shapes, tokenizer: Tokenizer) -> None:
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


def test_words_left_out_are_others_in_each_epoch(shapes, tokenizer: Tokenizer) -> None:
    own = texts_by_key(shapes.url("images_train"))
    loader = TrainLoader([shapes.url("images_train")], tokenizer, config(word_dropout=0.4))
    whole, seen = set[str]().union(*own.values()), []
    for _ in range(2):
        texts = [tokenizer.decode(ids.tolist()) for batch in loader for ids in batch.input_ids]
        assert all(texts)
        assert sum(text not in whole for text in texts) / len(texts) > 0.1
        seen.append(sorted(texts))
    assert seen[0] != seen[1]


def test_each_caption_can_be_a_separate_item(shapes, tokenizer: Tokenizer) -> None:
    loader = TrainLoader([shapes.url("images_train")], tokenizer, config(epoch_unit="captions"))
    assert sum(loader.mixtures["image"].counts) == 450
    pairs = [pair for batch in loader for pair in zip(batch.keys, map(tuple, batch.input_ids.tolist()), strict=True)]
    assert len(pairs) == 450 // 12 * 12


def test_questions_come_with_all_answers_and_their_weights(shapes, tokenizer, tmp_path):
    """As the official VQA training has it: each distinct answer once, weighted by how many gave it."""
    pictures = json.loads((shapes.folder / "images_train.json").read_text())[:6]
    given = ["Red"] * 7 + ["blue"] * 2 + ["a large green star of many words"]
    rows = [{"image": row["image"], "question": "What colour IS it?", "answer": given} for row in pictures]
    rows += [{"image": row["image"], "question": "on which side", "answer": "left/right"} for row in pictures]
    (tmp_path / "qa.json").write_text(json.dumps(rows))
    build_corpus([str(tmp_path / "qa.json")], str(shapes.folder / "media"), "image", str(tmp_path / "qa"), size=48)
    loader = TrainLoader([str(tmp_path / "qa")], tokenizer, config(epoch_unit="questions"))
    (batch,) = list(loader)
    loader.close()
    assert batch.answers is not None
    assert batch.input_ids.shape == (12, 25)
    assert len(set(batch.idx.tolist())) == 6  # both questions about a photo know that they share it
    expected, other = (tokenizer.encode([f"{text} [SEP]"], 6)[0][0] for text in ("left/right", "left right"))
    assert not torch.equal(expected, other)  # answers are trained with their punctuation, as they are ranked
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
            assert weights == [1.0]
            assert torch.equal(batch.answers.input_ids[first], expected)
        assert tokenizer.sep_id in batch.answers.input_ids[first]
        first += count
    assert first == len(batch.answers.weights)


def test_a_corpus_of_weight_two_is_seen_twice_with_other_crops(shapes, tokenizer: Tokenizer) -> None:
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


def test_a_weight_of_an_unknown_corpus_is_an_error(shapes, tokenizer: Tokenizer) -> None:
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


@pytest.mark.parametrize("leave_first", [False, True])
def test_a_loader_closed_in_mid_epoch_leaves_no_thread_process_and_file(shapes, tokenizer, leave_first):
    processes = set(psutil.Process().children())
    threads, files = threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))
    loader = TrainLoader(corpora(shapes), tokenizer, config(prefetch=1))
    steps = iter(loader)
    next(steps)
    if leave_first:
        steps.close()
    loader.close()
    assert list(steps) == []
    assert set(psutil.Process().children()) <= processes
    assert threading.active_count() <= threads
    assert len(list(Path("/proc/self/fd").iterdir())) <= files


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"video_input": VideoInput(num_frames=0)}, "video_input.num_frames is 0: must be at least 1"),
        ({"video_input": VideoInput(sample_type="center")}, "sample_type_test is 'center', must be one of .*fpsX, mid"),
        ({"crop_area": 0.0}, "crop_area is 0.0: must be more than 0 and at most 1"),
        ({"crop_area": 1.5}, "crop_area is 1.5: must be more than 0 and at most 1"),
        ({"word_dropout": 1.0}, "word_dropout is 1.0: must be at least 0 and below 1"),
        ({"word_dropout": float("nan")}, "word_dropout is nan: must be at least 0 and below 1"),
        ({"decode": "gpu"}, "decode is 'gpu': must be one of auto, dali, cpu"),
    ],
)
def test_impossible_settings_are_errors(shapes, tokenizer: Tokenizer, settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainLoader(corpora(shapes), tokenizer, config(**settings))


@pytest.mark.parametrize(
    ("names", "sizes", "world_size", "message"),
    [
        (["images_train"], PerMedia(12), 5, r"batch_size\.image=12 cannot be shared equally by 5 processes"),
        (["images_test"], PerMedia(64), 1, r"64 is more than the 24 samples of images_test: set batch_size\.image=24"),
        (["images_test"], PerMedia(64), 16, r"set batch_size\.image=16 or less"),
        (["images_test"], PerMedia(64), 32, "use at most 24 processes, or more data"),
        (["qa_train"], PerMedia(12, 6), 1, "has no captions"),
        (["../nowhere"], PerMedia(12), 1, "is not a packed corpus"),
        ([], PerMedia(12), 1, "train_corpus is empty"),
    ],
)
def test_corpora_that_do_not_fit_the_batch_size_are_errors(
    shapes, tokenizer: Tokenizer, names: list[str], sizes: PerMedia, world_size: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        TrainLoader([shapes.url(name) for name in names], tokenizer, config(batch_size=sizes), 0, world_size)
