"""How a corpus is read, as its YAML in configs/corpora and the flags of `python -m sharding.build` say it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from runtime.errors import MissingError, UserError
from runtime.packaged import find_file, packaged_folder
from sharding.annotations.columns import Columns


@dataclass
class Reading:
    """What decides which rows annotation files give, besides their contents."""

    format: str = "auto"  # a name in reading.READERS; auto: by the ending of each file's name
    records: str = ""  # JSON: where the list of records is, such as "images"; "*": the entries of an object
    header: list[str] = field(default_factory=list)  # names of the columns of a CSV or TSV that has no header line
    delimiter: str = ""  # of a CSV's columns; empty: as its first line looks
    encoding: str = "utf-8"  # of a CSV, TSV or text file
    columns: Columns = field(default_factory=Columns)
    keep: dict[str, Any] = field(default_factory=dict)  # column -> the value, or the list of values, of rows to keep
    limit: int = 0  # at most so many media; 0: all
    skip_bad_rows: bool = False  # count rows that cannot be understood as filtered, instead of an error
    unanswered: bool = False  # questions may be without answers, as those of a test server are


@dataclass
class CorpusConfig(Reading):
    """A corpus' YAML: how to read it, and the settings of the build that differ from the usual ones."""

    media_type: str | None = None
    size: int | None = None
    fps: float | None = None
    max_frames: int | None = None


def load_corpus(path: str) -> CorpusConfig:
    """Read a corpus' YAML.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no YAML, or a key is unknown (the nearest are named) or has a wrong type.
    """
    found = find_file(path)
    if found is None:
        raise MissingError(
            f"--corpus {path} does not exist; {packaged_folder('configs/corpora')} holds those that come along"
        )
    try:
        given = OmegaConf.load(found)
        if not isinstance(given, DictConfig):
            raise UserError(f"{path} is no configuration: it must hold `key: value` lines")
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(CorpusConfig), given))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}:" if mark else ""
        raise UserError(f"{path} is no valid YAML:{where} {getattr(error, 'problem', error)}") from None
    except ConfigKeyError as error:
        raise UserError(f"{path}: {unknown(error.full_key or str(error.key))}") from None
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {error.full_key}: {str(error).splitlines()[0]}") from None
    assert isinstance(config, CorpusConfig)
    return config


def unknown(key: str) -> str:
    """What to say about a key that does not exist."""
    known = list(all_keys(CorpusConfig))
    near = get_close_matches(key, known, n=3) or get_close_matches(key.rpartition(".")[2], known, n=3)
    return f"unknown key {key!r}: " + ("nearest are " if near else "there are ") + ", ".join(near or known)


def all_keys(kind: Any, prefix: str = "") -> Iterator[str]:
    """Every dotted key that a corpus' YAML may hold."""
    for each in fields(kind):
        yield prefix + each.name
        if each.name == "columns":
            yield from all_keys(Columns, f"{prefix}columns.")


def parse_pairs(flag: str, pairs: list[str]) -> dict[str, str]:
    """`name=value` arguments of a flag; raises ValueError naming one that is none."""
    for pair in pairs:
        if "=" not in pair.lstrip("="):
            raise UserError(f"{flag} {pair}: must be NAME=VALUE")
    return dict(pair.split("=", 1) for pair in pairs)


def with_columns(columns: Columns, pairs: dict[str, str]) -> Columns:
    """`columns` with some replaced by those of the command line; `a|b` stands for a list of which one is taken."""
    known = [each.name for each in fields(columns)]
    for name in pairs:
        if name not in known:
            near = get_close_matches(name, known, n=3) or known
            raise UserError(f"--columns {name}=...: there is no {name!r}, nearest are {', '.join(near)}")
    values: dict[str, Any] = {each.name: getattr(columns, each.name) for each in fields(columns)}
    for name, value in pairs.items():
        number = name in ("start", "end") and value.replace(".", "", 1).isdigit()
        values[name] = float(value) if number else (value.split("|") if "|" in value else value)
    return Columns(**values)
