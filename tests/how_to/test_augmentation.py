"""docs/how-to/augmentation.md, word for word: its module and YAML in a folder of one's own."""

from pathlib import Path

import pytest
import torch
from blocks import blocks

from loaders import AUGMENTATIONS, Batch, TrainLoader
from loaders.augment import NUMBERS
from loaders.evaluation import VisualSet
from loaders.preview import main as preview
from runtime.errors import UserError
from train.config.settings import RunConfig, load_settings

SMALL = ["decode=cpu", "threads=1", "image_res=32", "batch_size.video=8", "batch_size.image=30", "stripes=8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's folder, with the files of the page; one for all tests, because a process imports a module once."""
    folder = tmp_path_factory.mktemp("own")
    for name, content in blocks("augmentation").items():
        (folder / name).write_text(content)
    return folder


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, shapes) -> RunConfig:
    """The settings of my_run.yaml."""
    monkeypatch.chdir(folder)
    where = [f"data_root={shapes.shards}", f"tokenizer={shapes.vocab}"]
    return load_settings("my_run.yaml", [*where, *SMALL]).config


def batches(run: RunConfig, tokenizer, *place: int, state: dict[str, int] | None = None) -> list[Batch]:
    with TrainLoader(run.train_urls(), tokenizer, run, *place) as loader:
        loader.load_state_dict(state or {"epoch": 0, "step": 0})
        return list(loader)


def by_key(batches: list[Batch]) -> dict[str, torch.Tensor]:
    return {key: frames for batch in batches for key, frames in zip(batch.keys, batch.frames)}


def test_frames_are_changed_as_the_page_says(run: RunConfig, tokenizer) -> None:
    assert run.augmentations == ["colour", "grey"]
    whole = batches(run, tokenizer)
    shown = by_key(whole)
    run.augmentations = []
    plain = by_key(batches(run, tokenizer))
    assert shown.keys() == plain.keys()
    assert sum(torch.equal(frames, shown[key]) for key, frames in plain.items()) < 4
    greys = [bool((frames == frames[..., :1]).all()) for frames in shown.values()]
    assert 0.1 < sum(greys) / len(greys) < 0.35
    run.augmentations = ["colour", "grey"]
    first, second = (batches(run, tokenizer, rank, 2) for rank in range(2))
    assert all(torch.equal(frames, shown[key]) for key, frames in by_key(first + second).items())
    resumed = batches(run, tokenizer, state={"epoch": 0, "step": 3})
    assert all(torch.equal(one.frames, other.frames) for one, other in zip(resumed, whole[3:], strict=True))
    again = by_key(batches(run, tokenizer, state={"epoch": 1, "step": 0}))
    assert sum(torch.equal(frames, shown[key]) for key, frames in again.items() if key in shown) < 4


def test_evaluation_shows_plain_frames_and_the_preview_changed_ones(run: RunConfig, shapes) -> None:
    shown = [batch.frames for batch in VisualSet(shapes.url("images_test"), run).batches(1, 8)]
    run.augmentations = []
    plain = [batch.frames for batch in VisualSet(shapes.url("images_test"), run).batches(1, 8)]
    assert all(map(torch.equal, shown, plain))
    words = [shapes.url("images_train"), "--tokenizer", str(shapes.vocab), "--size", "48"]
    assert preview([*words, "--output", "plain.png"]) == 0
    chosen = ["--plugins", "my_augmentations", "--augmentations", "colour", "grey"]
    assert preview([*words, *chosen, "--output", "colours.png"]) == 0
    assert Path("plain.png").read_bytes() != Path("colours.png").read_bytes()


@pytest.mark.parametrize("wrong", [lambda f, n: f[:, :, ::2], lambda f, n: f.float(), lambda f, n: None])
def test_wrong_frames_are_one_clear_error(run: RunConfig, tokenizer, wrong) -> None:
    name = f"wrong{len(list(AUGMENTATIONS))}"
    AUGMENTATIONS(name)(wrong)
    run.augmentations = [name]
    with pytest.raises(
        UserError, match=rf"augmentations: {name} returned .*, must return torch.uint8 \(\d+, 1, 32, 32, 3"
    ):
        batches(run, tokenizer)
    run.augmentations = ["colour", "grey", "colour"]
    with pytest.raises(UserError, match="augmentations names colour twice: its random numbers would be the same"):
        batches(run, tokenizer)
    run.augmentations = ["color"]
    with pytest.raises(UserError, match="augmentations is 'color', must be one of colour"):
        batches(run, tokenizer)


def test_numbers_of_a_sample_are_evenly_spread(run: RunConfig, tokenizer) -> None:
    seen = []
    AUGMENTATIONS("seen")(lambda frames, numbers: seen.append(numbers) or frames)
    run.augmentations, run.train_corpus = ["seen"], [run.train_urls()[0]]
    batches(run, tokenizer)
    numbers = torch.cat(seen)
    assert numbers.dtype == torch.float32
    assert numbers.shape[1] == NUMBERS
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert abs(float(numbers.mean()) - 0.5) < 0.02
    assert len(numbers.flatten().unique()) == numbers.numel()
