"""Declarations of settings: changes on resume, rules, earlier names; settings recorded by earlier versions."""

from dataclasses import dataclass, fields
from typing import ClassVar

import pytest
from places import ROOT

from runtime.settings import EVALUATION, FIXED, FREE, build, change_on_resume, declarations, flatten, nearest, setting
from train.config.page import page
from train.config.settings import RunConfig, load_settings, to_yaml


def test_every_setting_declares_its_help_and_whether_a_resumed_run_may_change_it():
    for key, declared in declarations(RunConfig).items():
        assert declared.help, key
        assert declared.resumed in (FIXED, EVALUATION, FREE), key
    assert change_on_resume(RunConfig, "test_corpus.some_split") == EVALUATION
    assert change_on_resume(RunConfig, "unheard_of") is None


def test_the_page_of_settings_is_up_to_date():
    assert (ROOT / "docs/settings.md").read_text() == page(), "python -m train.config.page > docs/settings.md"


def test_mappings_and_dataclasses_are_flattened_to_dotted_keys():
    assert flatten({"a": {"b": {"c": 1}, "d": []}, "e": {}}) == {"a.b.c": 1, "a.d": [], "e": {}}
    assert {key for key in flatten(RunConfig()) if "." not in key} <= {item.name for item in fields(RunConfig)}


@pytest.mark.parametrize(
    ("name", "found"), [("optimizer.lrate", "optimizer.lr"), ("lr", "optimizer.lr"), ("xyzzy", "")]
)
def test_the_nearest_key_is_found_by_the_whole_or_its_last_part(name, found):
    assert nearest(name, ["optimizer.lr", "seed", "stop_key"])[:1] == ([found] if found else [])


RENAMED = {"unit": "epoch_unit", "lanes": "stripes", "patience": "stall_timeout"}


@pytest.mark.parametrize("old", RENAMED)
def test_an_earlier_name_is_refused_with_the_new_one(tmp_path, old):
    path = tmp_path / "run.yaml"
    path.write_text(f"{old}: 1\n")
    for refused in (lambda: load_settings(path), lambda: load_settings(ROOT / "configs/base.yaml", [f"{old}=1"])):
        with pytest.raises(ValueError, match=f"{old} is renamed to {RENAMED[old]}"):
            refused()


def recorded_earlier(folder, **changes):
    """config.yaml of a run folder as the version before the renames wrote it."""
    text = to_yaml(RunConfig(stripes=8, stall_timeout=7.0, epoch_unit="captions"))
    for old, new in RENAMED.items():
        text = text.replace(f"{new}:", f"{old}:")
    text += "".join(f"{name}: {value}\n" for name, value in {"nvme_path": "null", **changes}.items())
    (folder / "config.yaml").write_text(text)
    (folder / "metrics.jsonl").touch()
    return folder / "config.yaml"


def test_settings_recorded_by_an_earlier_version_are_translated(tmp_path):
    config = load_settings(recorded_earlier(tmp_path)).config
    assert (config.stripes, config.stall_timeout, config.epoch_unit) == (8, 7.0, "captions")
    with pytest.raises(ValueError, match=r"nvme_path.*NVMe offload is no longer supported"):
        load_settings(recorded_earlier(tmp_path, nvme_path="/disk"))


@dataclass
class Inner:
    size: int = setting(1, "of something", least=1, renamed_from="length")


@dataclass
class Outer:
    explained: ClassVar[dict[str, str]] = {"gone": "gone is gone"}

    inner: Inner = setting(Inner)


def test_messages_name_a_setting_with_its_section(tmp_path):
    assert build(Outer, {"inner": {"size": 2}}).inner.size == 2
    with pytest.raises(ValueError, match=r"inner\.length is renamed to inner\.size"):
        build(Outer, {"inner": {"length": 2}})
    with pytest.raises(ValueError, match="gone is gone"):
        build(Outer, {"gone": 2})
