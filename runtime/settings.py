"""Settings: how a dataclass declares them, and how YAML files and `key=value` overrides become a checked one.

A setting states its default, its help, and what a resumed run, a fine-tuning or an earlier version makes of it.
"""

from __future__ import annotations

import operator
import re
import typing
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from functools import cache, partial, reduce
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from runtime.errors import MissingError, UserError
from runtime.packaged import find_file, packaged_folder

T = TypeVar("T")

# Whether a resumed run may change a setting.
FIXED = "fixed"  # no: it affects what is learned or which model is the best
EVALUATION = "evaluation"  # yes: it affects evaluations only
FREE = "free"  # yes: it affects no result
# Whether a setting of the model may differ from the checkpoint that a run starts from; by default it must not.
FINE_TUNING = "fine-tuning"  # in fine-tuning, not in evaluation
TRAINING = "training"  # in fine-tuning; evaluation ignores it
ANY = "any"  # in both
START = "start"  # it affects initial weights only and is ignored with a checkpoint
_KEY = "setting"
_NOTHING = ("null", "None", "none", "~")
_NESTED_BRACES = '; inside [ ], quote a text that contains { }: ["FOLDER/x-{000..009}.tar"]'
_ANYTHING = "anything"
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


@dataclass(frozen=True)
class Declaration:
    """The declaration of a setting, besides its name, type and default."""

    help: str = ""
    resumed: str | None = None  # FIXED, EVALUATION or FREE
    checkpoint: str | None = None  # FINE_TUNING, TRAINING, ANY or START
    choices: tuple[str, ...] = ()  # the values that it may have
    least: float | None = None  # the lowest value that it may have
    above: float | None = None  # what its value must exceed
    most: float | None = None  # the highest value that it may have
    below: float | None = None  # what its value must not reach
    renamed_from: str = ""  # its name in earlier versions
    replaced: bool = False  # a mapping of which a later layer replaces the whole, instead of adding to it
    convert: Callable[[Any], Any] | None = None  # applied to a text or a list given instead of a mapping


def setting(default: Any, help: str = "", **declared: Any) -> Any:
    """A dataclass field that is a setting; `default` may be a function or a class that makes the value.

    declared: see `Declaration`.
    """
    metadata = {_KEY: Declaration(help, **declared)}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


fixed = partial(setting, resumed=FIXED)
evaluation = partial(setting, resumed=EVALUATION)
free = partial(setting, resumed=FREE)


@cache
def declarations(kind: Any) -> dict[str, Declaration]:
    """Every dotted key of dataclass `kind` and its declaration; a section's `resumed` holds for all in it."""
    result: dict[str, Declaration] = {}
    for item in fields(kind):
        own = item.metadata.get(_KEY, Declaration())
        section = typing.get_type_hints(kind)[item.name]
        if is_dataclass(section):
            for key, inner in declarations(typing.cast(Any, section)).items():
                merged = replace(inner, resumed=own.resumed or inner.resumed, help=inner.help or own.help)
                result[f"{item.name}.{key}"] = merged
        else:
            result[item.name] = own
    return result


def check_declared(config: Any) -> None:
    """Raise UserError for a value that is none of its setting's `choices`, or outside its bounds."""
    for key, declaration in declarations(typing.cast(Any, type(config))).items():
        value = reduce(getattr, key.split("."), config)
        if declaration.choices and value not in declaration.choices:
            raise UserError(f"{key} is {value!r}: must be one of {', '.join(declaration.choices)}")
        bounds = {
            f"{words} {bound:g}": holds(value, bound)
            for words, bound, holds in (
                ("at least", declaration.least, operator.ge),
                ("more than", declaration.above, operator.gt),
                ("at most", declaration.most, operator.le),
                ("below", declaration.below, operator.lt),
            )
            if bound is not None
        }
        if not all(bounds.values()):
            raise UserError(f"{key} is {value!r}: must be {' and '.join(bounds)}")


def change_on_resume(kind: Any, key: str) -> str | None:
    """FIXED, EVALUATION or FREE for a dotted key, also of an entry of a mapping; None where nothing is declared."""
    for known, declaration in declarations(kind).items():
        if key == known or key.startswith(f"{known}."):
            return declaration.resumed
    return None


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Up to 3 of `known` that resemble `name`, by the whole dotted key or by its last part; empty where none does."""
    known = list(known)
    last = {key.rpartition(".")[2]: key for key in reversed(known)}
    near = get_close_matches(name, known, n=3, cutoff=0.7)
    near += [last[each] for each in get_close_matches(name.rpartition(".")[2], last, n=3)]
    return list(dict.fromkeys(near))[:3]


def listed_nearest(names: Sequence[str]) -> str:
    """The end of a message: "nearest is seed", "nearest are lr, seed"."""
    return f"nearest {'is' if len(names) == 1 else 'are'} {', '.join(names)}"


def flatten(value: Any, prefix: str = "", whole: Collection[str] = ()) -> dict[str, Any]:
    """A dataclass or a nested mapping, {"optimizer": {"lr": 1}}, by dotted keys: {"optimizer.lr": 1}.

    whole: dotted keys whose values stay mappings.
    """
    flat: dict[str, Any] = {}
    nested: Mapping[str, Any] = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    for name, item in nested.items():
        key = f"{prefix}{name}"
        nests = isinstance(item, dict) and item and key not in whole
        flat |= flatten(item, f"{key}.", whole) if nests else {key: item}
    return flat


def read_layers(kind: Any, path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The nested values of the YAML at `path`, the files it names as `base:`, and `key=value` overrides, later ones
    winning; references such as ${data_root} are kept.

    A path that does not exist may be the name of a packaged recipe, such as configs/pretrain.yaml; so may a base.
    Raises MissingError for a missing file, UserError for a file that is not YAML or an override that is not a setting.
    """
    found = find_file(path)
    if found is None:
        raise MissingError(_missing(path))
    merged = _read_with_bases(kind, found, ())
    for key, layer in _parse_overrides(kind, overrides):
        merged = _without(merged, key) if layer is None else _merge(kind, merged, layer, given=key)
    return typing.cast(dict[str, Any], _none_strings_to_none(OmegaConf.to_container(merged, resolve=False)))


def build(kind: type[T], given: Mapping[str, Any]) -> T:
    """Dataclass `kind` with the values of `read_layers`.

    Raises UserError for an unknown key (with the nearest, or `kind.explained`), a renamed one (with the new
    name), a wrong type (with key, value and what is expected), or a rule that the dataclass checks.
    """
    schema = OmegaConf.structured(kind)
    for key, value in explicit_values(kind, given):
        _assign(kind, schema, key, value)
    try:
        config = OmegaConf.to_object(schema)
    except OmegaConfBaseException as error:
        raise UserError(f"{f'{error.full_key}: ' if error.full_key else ''}{_first_line(error)}") from None
    assert isinstance(config, kind)
    return config


def explicit_values(kind: Any, given: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Dotted key and value of every setting in nested values; raises UserError for an unknown or renamed key."""
    return list(_values(kind, kind, given, ""))


def _values(root: Any, kind: Any, given: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    hints: dict[str, Any] = typing.get_type_hints(kind)
    names, renamed = [item.name for item in fields(kind)], _renamed(kind)
    for name, value in given.items():
        key = f"{prefix}{name}"
        if name in renamed:
            raise UserError(f"{key} is renamed to {prefix}{renamed[name]}: use the new name")
        if name not in names:
            raise UserError(_unknown(root, key))
        if not is_dataclass(hints[name]):
            yield key, value
        elif isinstance(value, Mapping):
            yield from _values(root, hints[name], value, f"{key}.")
        else:
            inner = ", ".join(f"{key}.{item.name}" for item in fields(hints[name]))
            raise UserError(f"{key} is {value!r}, but it is a section: set {inner}")


def _renamed(kind: Any) -> dict[str, str]:
    """Name in earlier versions -> name, of the settings of a section."""
    declared = {item.name: item.metadata.get(_KEY, Declaration()) for item in fields(kind)}
    return {each.renamed_from: name for name, each in declared.items() if each.renamed_from}


def _unknown(kind: Any, key: str) -> str:
    explained = getattr(kind, "explained", {})
    if key in explained:
        return explained[key]
    known = list(declarations(kind))
    sections = sorted({name.rpartition(".")[0] for name in known} - {""})
    near = nearest(key, known + sections) or [each for each in known if each.startswith(f"{key.rpartition('.')[0]}.")]
    return f"unknown key {key!r}: " + (listed_nearest(near) if near else "docs/settings.md lists all keys")


def _missing(what: str | Path) -> str:
    return f"the configuration {what} does not exist; {packaged_folder('configs')} has the included ones"


def read_yaml(path: Path) -> DictConfig:
    """A YAML of `key: value` lines. Raises UserError, with the file and the line, if it is not valid."""
    try:
        content = OmegaConf.load(path)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}:" if mark else ""
        raise UserError(f"{path} is not valid YAML:{where} {getattr(error, 'problem', error)}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not in UTF-8 ({error}): save it as UTF-8") from None
    if not isinstance(content, DictConfig):
        raise UserError(f"{path} is not a configuration: write `key: value` lines")
    return content


def _read_with_bases(kind: Any, path: Path, chain: tuple[Path, ...]) -> DictConfig:
    if path.resolve() in [earlier.resolve() for earlier in chain]:
        raise UserError(f"{path} is its own base, through {chain[-1]}: remove one `base:` line")
    own = read_yaml(path)
    if _is_record(path):
        own = OmegaConf.create(_with_new_names(kind, typing.cast(Any, OmegaConf.to_container(own, resolve=False))))
    base = own.pop("base", None)
    own = _converted(kind, own)
    if base is None:
        return own
    if not isinstance(base, str):
        raise UserError(f"{path}: base is {base!r}, must be the path of a YAML, relative to this one")
    found = find_file(path.parent / base) or find_file(base)
    if found is None:
        raise MissingError(_missing(f"{path.parent / base}, the base of {path},"))
    earlier = _read_with_bases(kind, found, (*chain, path))
    for key, value in flatten(OmegaConf.to_container(own, resolve=False)).items():
        # Null for a setting that must have a value removes what an earlier layer sets.
        if (value is None or value in _NOTHING) and not _may_be_null(kind, key):
            earlier, own = _without(earlier, key), _without(own, key)
    return _merge(kind, earlier, own)


def _is_record(path: Path) -> bool:
    """Whether a YAML is the recorded settings of a run, perhaps written by an earlier version."""
    return path.name == "config.yaml" and any((path.parent / name).exists() for name in (".lock", "metrics.jsonl"))


def _with_new_names(kind: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Recorded values by the names of this version, without settings that exist no more and were not set."""
    hints, renamed = typing.get_type_hints(kind), _renamed(kind)
    result = {}
    for name, value in given.items():
        name = renamed.get(name, name)
        if is_dataclass(hints.get(name)) and isinstance(value, Mapping):
            result[name] = _with_new_names(hints[name], value)
        elif value is not None or name not in getattr(kind, "explained", {}):
            result[name] = value
    return result


def _merge(kind: Any, earlier: DictConfig, later: DictConfig, given: str = "") -> DictConfig:
    """`later` over `earlier`, key by key; whole mappings if declared `replaced`, unless a key of theirs is `given`
    by its own name, as in corpus_weights.photos=2."""
    for key, declaration in declarations(kind).items():
        whole = declaration.replaced and not given.startswith(f"{key}.")
        if whole and OmegaConf.select(later, key) is not None:
            earlier = _without(earlier, key)
    return typing.cast(DictConfig, OmegaConf.merge(earlier, later))


def _without(merged: DictConfig, key: str) -> DictConfig:
    """The configuration without `key`."""
    section: Any = merged
    *sections, name = key.split(".")
    for each in sections:
        section = section[each] if isinstance(section, DictConfig) and each in section else None
    if isinstance(section, DictConfig):
        section.pop(name, None)
    return merged


def _converted(kind: Any, layer: DictConfig) -> DictConfig:
    """A layer in which texts and lists have become the mappings that their settings' `convert` makes of them."""
    given = typing.cast(dict[str, Any], OmegaConf.to_container(layer, resolve=False))
    for key, declaration in declarations(kind).items():
        if declaration.convert is not None and isinstance(given.get(key), str | list):
            layer[key] = declaration.convert(given[key])
    return layer


def _parse_overrides(kind: Any, overrides: Sequence[str]) -> list[tuple[str, DictConfig | None]]:
    """Key and layer of each override; None for `null` where a value is required: it removes what a file sets."""
    for text in overrides:
        key, sign, _ = text.partition("=")
        if not sign or not key or key.startswith("-"):
            raise UserError(f"{text!r} is not a setting: write key=value, for example optimizer.lr=1e-5")
    tars = Counter(text.partition("=")[0] for text in overrides if text.endswith((".tar", ".tar]")))
    for key, times in tars.items():
        if times > 1:
            raise UserError(
                f"{key} gives {times} tars, and only the last one would be used: quote a list in braces for the "
                f"shell, '{key}=FOLDER/x-{{000..009}}.tar'"
            )
    return [_parse_override(kind, text) for text in overrides]


def _parse_override(kind: Any, text: str) -> tuple[str, DictConfig | None]:
    key, _, value = text.partition("=")
    if value.strip() in _NOTHING and not _may_be_null(kind, key):
        return key, None
    try:
        return key, _converted(kind, OmegaConf.from_dotlist([text]))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        remedy = _NESTED_BRACES if "[" in text and "{" in text else ""
        raise UserError(f"cannot parse the setting {text}: {_first_line(error)}{remedy}") from None


def _may_be_null(kind: Any, key: str) -> bool:
    """Whether a setting can hold null itself; true also of an unknown key, which is an error later."""
    for name in key.split("."):
        if typing.get_origin(kind) is dict:
            return False
        if not is_dataclass(kind) or name not in (hints := typing.get_type_hints(kind)):
            return True
        kind = hints[name]
    return kind is Any or type(None) in typing.get_args(kind)


def _none_strings_to_none(value: Any) -> Any:
    """Official YAMLs write None instead of YAML's null. Lists keep the string, as in the official code."""
    if isinstance(value, dict):
        return {key: _none_strings_to_none(item) for key, item in value.items()}
    return None if value in ("None", "none") else value


def _assign(kind: Any, schema: DictConfig, key: str, value: Any) -> None:
    for name in key.split("."):
        kind = typing.get_type_hints(kind)[name]
    expected = _describe(kind)
    got = "null" if value is None else f"{value!r} ({type(value).__name__})"
    wrong = f"{key} is {got}, must be {expected}"
    # YAML distinguishes numbers and truth values; OmegaConf would take one for the other.
    mixed_up = isinstance(value, bool | int | float) and isinstance(value, bool) != (expected == _KINDS[bool])
    if mixed_up and expected != _ANYTHING:
        raise UserError(wrong)
    try:
        OmegaConf.update(schema, key, value)
    except OmegaConfBaseException:
        raise UserError(wrong) from None


def _describe(kind: Any) -> str:
    """Description of the values of a type, for messages."""
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


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()[0]
    variable = re.search(r"Environment variable '(\w+)' not found", text)
    return f"the environment variable {variable[1]} is not set" if variable else text
