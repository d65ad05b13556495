"""docs/how-to/frame-sampler.md, word for word: its module and YAML in a folder of one's own."""

from pathlib import Path

import numpy as np
import pytest
from blocks import blocks

from loaders import TrainLoader
from loaders.evaluation import VisualSet
from loaders.preview import main as preview
from preprocessing.frames import FRAME_SAMPLERS, choose_frames
from runtime.errors import UserError
from train.config.settings import RunConfig, load_settings

SMALL = ["decode=cpu", "threads=1", "image_res=32", "batch_size.video=8", "batch_size.image=8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's folder, with the files of the page; one for all tests, because a process imports a module once."""
    folder = tmp_path_factory.mktemp("own")
    for name, content in blocks("frame-sampler").items():
        (folder / name).write_text(content)
    return folder


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, shapes) -> RunConfig:
    """The settings of my_run.yaml."""
    monkeypatch.chdir(folder)
    where = [f"data_root={shapes.shards}", f"tokenizer={shapes.vocab}"]
    return load_settings("my_run.yaml", [*where, *SMALL]).config


def frames_shown(run: RunConfig, tokenizer, rank: int = 0, world_size: int = 1) -> dict[str, list[int]]:
    with TrainLoader(run.train_urls(), tokenizer, run, rank, world_size) as loader:
        steps = list(loader.read_steps(0, 0))
    return {sample.spec.name: sample.spec.frames.tolist() for _, samples in steps for sample in samples}


def test_training_reads_the_frames_of_the_sampler(run: RunConfig, tokenizer) -> None:
    shown = frames_shown(run, tokenizer)
    assert {tuple(np.diff(frames)) for frames in shown.values()} == {(1, 1, 1)}
    assert len({frames[0] for frames in shown.values()}) > 3
    ranks = frames_shown(run, tokenizer, 0, 2) | frames_shown(run, tokenizer, 1, 2)
    assert ranks == shown


def test_evaluation_reads_those_of_its_own(run: RunConfig) -> None:
    assert run.video_input.sample_type_test == "first1.5"
    (batch, *_) = VisualSet(next(iter(run.test_urls().values())), run).batches(4, 4)
    assert batch.frames.shape == (4, 4, 32, 32, 3)
    assert choose_frames("first1.5", 4, 16, 4.0).tolist() == [0, 2, 3, 5]  # 6 frames in 1.5 s
    assert choose_frames("burst", 4, 16, 4.0).tolist() == [6, 7, 8, 9]
    assert choose_frames("burst", 4, 2, 4.0).tolist() == [0, 1, 1, 1]


def test_the_preview_shows_them(run: RunConfig, shapes) -> None:
    words = ["--tokenizer", str(shapes.vocab), "--frames", "4", "--plugins", "my_frames", "--sample-type", "burst"]
    assert preview([shapes.url("clips_train"), *words, "--output", "burst.png", "--count", "4"]) == 0
    assert Path("burst.png").stat().st_size > 1000


@pytest.mark.parametrize("wrong", [[16], [-1], [0.5], [], [0, 1, 2], [[0]]])
def test_wrong_indices_are_one_clear_error(wrong: list) -> None:
    name = f"wrong-{wrong}"
    FRAME_SAMPLERS(name)(lambda num_frames, length, fps, numbers: np.array(wrong))
    with pytest.raises(
        UserError, match=r"frame sampler wrong.* returned .* for 2 of 16 frames: must return an array of"
    ):
        choose_frames(name, 2, 16, 4.0)
    with pytest.raises(UserError, match="sample_type_test is 'firstX': X stands for a number"):
        choose_frames("firstX", 2, 16, 4.0)
    with pytest.raises(UserError, match=r"is 'fps0', must be one of fpsX, .*rand.*, with a number above 0 for X, such"):
        choose_frames("fps0", 2, 16, 4.0)
