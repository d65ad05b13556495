"""A recipe is found by its name from any folder; a file in the current folder comes first."""

from pathlib import Path

import pytest
from places import ROOT

from runtime.packaged import find_file, packaged_folder
from sharding.annotations.config import load_corpus
from train.config.settings import load_settings
from train.deepspeed.engine import find_deepspeed_config


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, text: str) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)
    return name


@pytest.mark.parametrize(
    "name", ["configs/small/pretrain.yaml", "./configs/qa/../base.yaml", "deepspeed_configs/cpu.json"]
)
def test_a_recipe_is_found_by_its_name(name: str) -> None:
    assert find_file(name) == (ROOT / name).resolve()


@pytest.mark.parametrize(
    "name", ["", ".", "configs", "setup.cfg", "sharding/build.py", "configs/../setup.cfg", "base.yaml"]
)
def test_only_recipes_are_found_by_their_name(name: str) -> None:
    assert find_file(name) is None


def test_a_file_in_the_current_folder_comes_first() -> None:
    own = write("configs/demo/pretrain.yaml", "log_every: 7\n")
    write("configs/corpora/coco.yaml", "size: 77\n")
    write("deepspeed_configs/cpu.json", "{}")
    assert load_settings(own).config.log_every == 7
    assert load_corpus("configs/corpora/coco.yaml").size == 77
    assert find_deepspeed_config("deepspeed_configs/cpu.json") == Path("deepspeed_configs/cpu.json")


@pytest.mark.parametrize(
    ("copy", "base"),
    [
        ("mine.yaml", "configs/small/pretrain.yaml"),  # the packaged recipe, from any folder
        ("some/where/mine.yaml", "configs/small/pretrain.yaml"),
        ("configs/small/mine.yaml", "pretrain.yaml"),  # a changed copy of a recipe
        ("configs/mine.yaml", "small/pretrain.yaml"),
    ],
)
def test_a_base_may_be_a_recipe(copy: str, base: str) -> None:
    config = load_settings(write(copy, f"base: {base}\nlog_every: 7\n")).config
    assert (config.log_every, config.batch_size.video) == (7, 42)


def test_a_base_in_the_same_folder_comes_first() -> None:
    write("configs/base.yaml", "log_every: 5\n")
    assert load_settings(write("configs/mine.yaml", "base: base.yaml\n")).config.log_every == 5


RECIPES = f"{ROOT}/configs/"


def test_messages_name_the_folder_that_holds_the_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Path(packaged_folder("configs")) == ROOT / "configs"
    with pytest.raises(FileNotFoundError, match=f"--corpus a.yaml does not exist; {RECIPES}corpora/ has the included"):
        load_corpus("a.yaml")
    with pytest.raises(FileNotFoundError, match=f"configuration a.yaml does not exist; {RECIPES} has the included"):
        load_settings("a.yaml")
    with pytest.raises(FileNotFoundError, match=r"the configuration a.yaml, the base of b.yaml, does not exist"):
        load_settings(write("b.yaml", "base: a.yaml\n"))
    monkeypatch.chdir(ROOT)
    assert packaged_folder("configs") == "configs/"
