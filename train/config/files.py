"""Reads a run's YAML with its bases and `key=value` overrides into a checked RunConfig, and writes it back."""

from __future__ import annotations

import re
import typing
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from eval.config import name_splits
from runtime.errors import MissingError, UserError
from runtime.packaged import find_file, packaged_folder
from train.config.settings import RunConfig

# Keys of the official YAMLs that have another name here (docs/migrating.md has the whole table).
RENAMED = {
    "train_file": "train_corpus",
    "test_file": "test_corpus",
    "test_types": "splits",
    "is_paragraph_retrieval": "paragraph",
    "has_multi_vision_gt": "nothing: it is found in the data",
    "caption_type": "nothing: a recipe each, configs/retrieval/ssv2_label.yaml and ssv2_template.yaml",
    "dataset_name": "benchmark",
    "text_decoder": "answer_decoder.num_layers",
    "eos": "nothing: answers end in [SEP]",
    "device": "nothing: what the launcher says",
    "dist_url": "nothing: what the launcher says",
    "distributed": "nothing: what the launcher says",
    "debug": "max_steps",
    "vit_type": "vision_encoder.type",
    "vit_name_or_pretrained_path": "vision_encoder.pretrained",
    "vit_zoo": "vision_encoder.pretrained",
    "bert_config": "text_encoder.*",
    "fp16": "precision",
    "log_freq": "log_every",
    "num_workers": "threads",
    "evaluate": "`deepspeed launch/evaluate.py`",
    "optimizer.opt": "nothing: the optimiser is AdamW",
    "scheduler.sched": "nothing: the schedule is cosine",
    "video_input.reader": "decode",
    "anno_root_pt": "data_root",
    "anno_root_downstream": "data_root",
}
TEST_CORPUS = "test_corpus"
REPLACED = frozenset({TEST_CORPUS, "corpus_weights", "storage"})  # `name: value` lines that stand for one choice
NOTHING = ("null", "None", "none", "~")
QUOTED = '; inside [ ] a text with { } needs quotes of its own: ["FOLDER/x-{000..009}.tar"]'
_ANYTHING = "anything"
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


@dataclass(frozen=True)
class Settings:
    """A checked configuration, and which of its dotted keys the user has set (others have their defaults)."""

    config: RunConfig
    explicit: frozenset[str]


def load_settings(path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Read `path`, the files it names as `base:`, and `key=value` overrides, later ones winning.

    A path that does not exist may be the name of a packaged recipe, such as configs/pretrain.yaml; so may a base.

    Raises FileNotFoundError for a missing file; ValueError for an unknown key (naming the nearest), a wrong type
    (naming key, value and what is expected), a rule broken, or a file that is no YAML.
    """
    found = find_file(path)
    if found is None:
        raise MissingError(_missing(path))
    merged = _read_with_bases(found, ())
    for key, override in _parse_overrides(overrides):
        merged = _without(merged, key) if override is None else _over(merged, override, replaced={key})
    given = without_none_strings(OmegaConf.to_container(merged, resolve=False))
    schema = OmegaConf.structured(RunConfig)
    explicit = []
    for key, value in _leaves(given, RunConfig):
        _assign(schema, key, value)
        explicit.append(key)
    try:
        config = OmegaConf.to_object(schema)
    except OmegaConfBaseException as error:
        raise UserError(f"{_key_of(error)}{_first_line(error)}") from None
    assert isinstance(config, RunConfig)
    return Settings(config, frozenset(explicit))


def to_yaml(config: RunConfig) -> str:
    """The whole configuration as YAML, which `load_settings` reads back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def flatten(config: RunConfig) -> dict[str, Any]:
    """Dotted key -> plain value, for comparisons and for trackers."""
    return dict(_plain_leaves(asdict(config)))


def _read_with_bases(path: Path, chain: tuple[Path, ...]) -> DictConfig:
    if path.resolve() in [earlier.resolve() for earlier in chain]:
        raise UserError(f"{path} is its own base, by way of {chain[-1]}: remove one `base:` line")
    try:
        own = OmegaConf.load(path)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}:" if mark else ""
        raise UserError(f"{path} is no valid YAML:{where} {getattr(error, 'problem', error)}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not in UTF-8 ({error}): save it as UTF-8") from None
    if not isinstance(own, DictConfig):
        raise UserError(f"{path} is no configuration: it must hold `key: value` lines")
    base = own.pop("base", None)
    own = _splits_named(own)
    if base is None:
        return own
    earlier = _read_base(base, path, chain)
    for key in list(_taken_back(OmegaConf.to_container(own, resolve=False))):
        earlier, own = _without(earlier, key), _without(own, key)
    return _over(earlier, own)


def _read_base(base: Any, path: Path, chain: tuple[Path, ...]) -> DictConfig:
    """The configuration that the YAML at `path` names as its base."""
    if not isinstance(base, str):
        raise UserError(f"{path}: base is {base!r}, must be the path of a YAML, relative to this one")
    found = find_file(path.parent / base) or find_file(base)
    if found is None:
        raise MissingError(_missing(f"{path.parent / base}, the base of {path},"))
    return _read_with_bases(found, (*chain, path))


def _taken_back(given: Any, section: str = "") -> Iterator[str]:
    """Keys that a layer sets to null although they must have a value: what an earlier layer says is taken back."""
    for name, value in given.items():
        key = f"{section}{name}"
        if isinstance(value, dict):
            yield from _taken_back(value, f"{key}.")
        elif (value is None or value in NOTHING) and not _may_be_null(key):
            yield key


def _over(earlier: DictConfig, later: DictConfig, replaced: Collection[str] = REPLACED) -> DictConfig:
    """`later` over `earlier`, key by key; of the mappings in REPLACED those in `replaced` as a whole."""
    for key in REPLACED & set(replaced) & set(later):
        earlier.pop(key, None)
    merged = OmegaConf.merge(earlier, later)
    assert isinstance(merged, DictConfig)
    return merged


def _without(merged: DictConfig, key: str) -> DictConfig:
    """The configuration as if nobody had set `key`."""
    section: Any = merged
    *sections, name = key.split(".")
    for each in sections:
        section = section[each] if isinstance(section, DictConfig) and each in section else None
    if isinstance(section, DictConfig):
        section.pop(name, None)
    return merged


def _splits_named(layer: DictConfig) -> DictConfig:
    """A layer whose test corpora have names, where they are given by their URLs alone."""
    given = OmegaConf.to_container(layer, resolve=False)
    assert isinstance(given, dict)
    if isinstance(given.get(TEST_CORPUS), str | list):
        layer[TEST_CORPUS] = name_splits(given[TEST_CORPUS])
    return layer


def _missing(what: str | Path) -> str:
    return f"the configuration {what} does not exist; {packaged_folder('configs')} holds those that come along"


def _parse_overrides(overrides: Sequence[str]) -> list[tuple[str, DictConfig | None]]:
    """Key and layer of each setting; no layer where `null` takes back what a file sets, as that must have a value."""
    for text in overrides:
        key, sign, _ = text.partition("=")
        if not sign or not key or key.startswith("-"):
            raise UserError(f"{text!r} is no setting: write key=value, for example optimizer.lr=1e-5")
    tars = Counter(text.partition("=")[0] for text in overrides if text.endswith((".tar", ".tar]")))
    for key, times in tars.items():
        if times > 1:
            raise UserError(
                f"{key} names a tar {times} times, and only the last would count: quote a list in braces for the "
                f"shell, '{key}=FOLDER/x-{{000..009}}.tar'"
            )
    return [_parse_override(text) for text in overrides]


def _parse_override(text: str) -> tuple[str, DictConfig | None]:
    key, _, value = text.partition("=")
    if value.strip() in NOTHING and not _may_be_null(key):
        return key, None
    try:
        return key, _splits_named(OmegaConf.from_dotlist([text]))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        remedy = QUOTED if "[" in text and "{" in text else ""
        raise UserError(f"the setting {text} cannot be read: {_first_line(error)}{remedy}") from None


def _may_be_null(key: str) -> bool:
    """Whether a setting can hold null itself; also what is unknown, which is told later."""
    kind: Any = RunConfig
    for name in key.split("."):
        if typing.get_origin(kind) is dict:
            return False
        if not is_dataclass(kind) or name not in (hints := typing.get_type_hints(kind)):
            return True
        kind = hints[name]
    return kind is Any or type(None) in typing.get_args(kind)


def without_none_strings(value: Any) -> Any:
    """Official YAMLs write None for nothing; YAML itself knows null. Lists keep the word, as there."""
    if isinstance(value, dict):
        return {key: without_none_strings(item) for key, item in value.items()}
    return None if value in ("None", "none") else value


def _leaves(given: Any, kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything set below a section of dataclass `kind`; raises for unknown keys."""
    hints = typing.get_type_hints(kind)
    known = {item.name for item in fields(kind)}
    for name, value in given.items():
        key = f"{prefix}{name}"
        if name not in known:
            raise UserError(_unknown(key))
        if not is_dataclass(hints[name]):
            yield key, value
        elif isinstance(value, dict):
            yield from _leaves(value, hints[name], f"{key}.")
        else:
            inner = ", ".join(f"{key}.{item.name}" for item in fields(hints[name]))
            raise UserError(f"{key} is {value!r}, but it is a section: set {inner}")


def _unknown(key: str) -> str:
    if key in RENAMED:
        return f"unknown key {key!r}: here it is {RENAMED[key]}"
    known = list(all_keys(RunConfig))
    known += sorted({name.rpartition(".")[0] for name in known} - {""})
    last = {name.rpartition(".")[2]: name for name in reversed(known)}
    section, _, name = key.rpartition(".")
    near = get_close_matches(key, known, n=3, cutoff=0.7) + [last[name] for name in get_close_matches(name, last, n=3)]
    near = list(dict.fromkeys(near))[:3] or [
        other for other in known if section and other.rpartition(".")[0] == section
    ]
    if not near:
        return f"unknown key {key!r}: docs/training.md lists all keys"
    return f"unknown key {key!r}: nearest are {', '.join(near)}"


def all_keys(kind: type = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted key that a configuration may hold."""
    hints = typing.get_type_hints(kind)
    for item in fields(kind):
        if is_dataclass(hints[item.name]):
            yield from all_keys(hints[item.name], f"{prefix}{item.name}.")
        else:
            yield prefix + item.name


def _assign(schema: DictConfig, key: str, value: Any) -> None:
    expected = _expected(key)
    got = "null" if value is None else f"{value!r} ({type(value).__name__})"
    wrong = f"{key} is {got}, must be {expected}"
    # YAML has told numbers and truth values apart; OmegaConf would take one for the other.
    mixed_up = isinstance(value, bool | int | float) and isinstance(value, bool) != (expected == _KINDS[bool])
    if mixed_up and expected != _ANYTHING:
        raise UserError(wrong)
    try:
        OmegaConf.update(schema, key, value)
    except OmegaConfBaseException:
        raise UserError(wrong) from None


def _expected(key: str) -> str:
    kind: Any = RunConfig
    for name in key.split("."):
        kind = typing.get_type_hints(kind)[name]
    return _describe(kind)


def _describe(kind: Any) -> str:
    if kind is Any:
        return _ANYTHING
    options = typing.get_args(kind)
    origin = typing.get_origin(kind)
    if type(None) in options:
        return " or ".join(_describe(option) for option in options if option is not type(None)) + " or null"
    if origin is list:
        return f"a list, each item {_describe(options[0])}"
    if origin is dict:
        return f"`name: value` lines, each value {_describe(options[1])}"
    return _KINDS.get(kind, str(kind))


def _plain_leaves(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, item in value.items():
        if isinstance(item, dict) and item:
            yield from _plain_leaves(item, f"{prefix}{name}.")
        else:
            yield prefix + str(name), item


def _key_of(error: OmegaConfBaseException) -> str:
    return f"{error.full_key}: " if error.full_key else ""


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()[0]
    variable = re.search(r"Environment variable '(\w+)' not found", text)
    return f"the environment variable {variable[1]} is not set" if variable else text
