"""How annotation files are read: settings, their flags, and the YAMLs of configs/corpora."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, cast

from omegaconf import OmegaConf

from runtime.errors import MissingError, UserError
from runtime.flags import flag
from runtime.packaged import find_file, packaged_folder
from runtime.settings import build, listed_nearest, nearest, read_yaml
from sharding.annotations.columns import Columns


def split_names(text: str) -> list[str]:
    """Names with commas between them, of the command line."""
    return [name.strip() for name in text.split(",")] if text else []


def unescape(text: str) -> str:
    """A character of the command line, where a tab is \\t."""
    return text.replace("\\t", "\t")


@dataclass
class Reading:
    """Settings that decide which rows are read from annotation files."""

    format: str = flag("auto", "auto, json, jsonl, csv, tsv, parquet, or a data set's own (default: auto)")
    records: str = flag("", 'JSON: key of the list of records; "*": the entries of an object', metavar="KEY")
    header: list[str] = flag(
        list, "names of the columns, with commas, of a table without a header line", metavar="NAMES", type=split_names
    )
    delimiter: str = flag("", "delimiter of a CSV (default: detected)", type=unescape)
    encoding: str = flag("utf-8", "encoding of tables and text files (default: utf-8)")
    columns: Columns = flag(
        Columns,
        "columns of media, caption, question, answer ...: a name, a template such as "
        '"{folder}/{id:06d}.mp4", or alternatives separated by |',
        nargs="+",
        metavar="NAME=COLUMN",
    )
    keep: dict[str, Any] = flag(
        dict,  # column -> the value, or the list of values, of rows to keep
        "only rows with one of these values, such as split=val,test",
        nargs="+",
        metavar="COLUMN=VALUES",
    )
    extra_columns: dict[str, str] = flag(
        dict,  # column -> its type
        "annotation columns to keep in the index, with their type float, int, bool or str, such as score=float",
        nargs="+",
        metavar="COLUMN=TYPE",
    )
    limit: int = flag(0, "only the first N images or clips, for a trial (default: all)", metavar="N")
    skip_bad_rows: bool = flag(False, "count malformed rows as filtered")
    unanswered: bool = False  # questions may be without answers, as those of a test server are

    def recorded_columns(self) -> dict[str, Any]:
        """`extra_columns` as corpus.json and build.json record them; nothing where there are none."""
        return {"extra_columns": self.extra_columns} if self.extra_columns else {}


@dataclass
class CorpusConfig(Reading):
    """A corpus' YAML: how to read it, and the settings of the build that differ from the usual ones."""

    media_type: str | None = None
    size: int | None = None
    fps: float | None = None
    max_frames: int | None = None


def load_corpus(path: str) -> CorpusConfig:
    """Read a corpus' YAML.

    Raises FileNotFoundError: there is none. ValueError: it is not YAML, or a key is unknown (the nearest are named) or
    has a wrong type.
    """
    found = find_file(path)
    if found is None:
        raise MissingError(
            f"--corpus {path} does not exist; {packaged_folder('configs/corpora')} has the included ones"
        )
    given = OmegaConf.to_container(read_yaml(found), resolve=False)
    try:
        return build(CorpusConfig, cast(dict[str, Any], given))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def parse_pairs(flag: str, pairs: list[str]) -> dict[str, str]:
    """`name=value` arguments of a flag; raises ValueError with one that is invalid."""
    for pair in pairs:
        if "=" not in pair.lstrip("="):
            raise UserError(f"{flag} {pair}: must be NAME=VALUE")
    return dict(pair.split("=", 1) for pair in pairs)


def with_columns(columns: Columns, pairs: dict[str, str]) -> Columns:
    """`columns` with those of the command line instead; `a|b` is a list of alternatives."""
    known = [each.name for each in fields(columns)]
    for name in pairs:
        if name not in known:
            near = nearest(name, known) or known
            raise UserError(f"--columns {name}=...: there is no {name!r}, {listed_nearest(near)}")
    values: dict[str, Any] = {}
    for name, value in pairs.items():
        number = name in ("start", "end") and value.replace(".", "", 1).isdigit()
        values[name] = float(value) if number else (value.split("|") if "|" in value else value)
    return replace(columns, **values)
