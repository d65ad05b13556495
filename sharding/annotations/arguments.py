"""The flags of `python -m sharding.build` that say how annotations are read, over those of a corpus' YAML."""

from __future__ import annotations

import argparse
import re
from dataclasses import fields, replace
from typing import Any

from runtime.errors import UserError
from sharding.annotations.config import CorpusConfig, Reading, load_corpus, parse_pairs, with_columns
from sharding.shards.schema import named_shards

SETTINGS = ("media_type", "size", "fps", "max_frames")  # of the build, that a corpus' YAML may set


def positive(text: str) -> int:
    """A whole number from 1 on, of the command line."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


def folder_of_shards(text: str) -> str:
    """The URL of a corpus, or of tars in it, of the command line; another file's URL is a mistake worth naming."""
    try:
        named_shards(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if re.search(r"\.(parquet|json)$", text):
        folder = text.rpartition("/")[0] or "."
        raise argparse.ArgumentTypeError(f"{text} is a file: give the folder that holds the shards, such as {folder}")
    return text


def add_annotation_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags; each is None where it is not given."""
    group = parser.add_argument_group("annotations")
    add = group.add_argument
    add(
        "--annotations",
        nargs="+",
        metavar="FILE",
        help='files or patterns; by default JSON lists of {"image" or "video": path, "caption": ...}',
    )
    add("--corpus", metavar="YAML", help="how a data set's files are read, see configs/corpora/; flags go before it")
    add("--format", help="auto, json, jsonl, csv, tsv, parquet, or a data set's own (default: auto)")
    add(
        "--columns",
        nargs="+",
        metavar="NAME=COLUMN",
        help="where records hold media, caption, question, answer ...: a column, a template such as "
        '"{folder}/{id:06d}.mp4", or several with | between them',
    )
    add("--keep", nargs="+", metavar="COLUMN=VALUES", help="only rows with one of these values, such as split=val,test")
    add("--limit", type=int, metavar="N", help="only the first N images or clips, for a trial (default: all)")
    add("--records", metavar="KEY", help='JSON: where the list of records is; "*": the entries of an object')
    add("--header", metavar="NAMES", help="names of the columns, with commas, of a table without a header line")
    add("--delimiter", help="of a CSV (default: as its first line looks)")
    add("--encoding", help="of tables and text files (default: utf-8)")
    add("--skip-bad-rows", action="store_true", default=None, help="count rows that cannot be understood as filtered")


def read_options(options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `build_corpus`: flags, where they are not given what `--corpus` says, as one `reading`.

    Raises:
        FileNotFoundError: the YAML does not exist.
        ValueError: it is wrong, a flag is, or something that has no default is missing.
    """
    corpus = options.pop("corpus")
    config = load_corpus(corpus) if corpus else CorpusConfig()
    for name in SETTINGS:
        given = options[name] if options[name] is not None else getattr(config, name)
        if given is None:
            del options[name]  # the default of build_corpus
        else:
            options[name] = given
    for name in ("annotations", "media_type"):
        if not options.get(name):
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} is missing" + ("" if corpus else ": give it, or a --corpus that says it"))
    options["reading"] = read_reading(options, config)
    return options


def read_reading(options: dict[str, Any], config: CorpusConfig) -> Reading:
    """How annotations are read; takes its flags out of `options`."""
    reading = Reading(**{each.name: getattr(config, each.name) for each in fields(Reading)})
    columns = with_columns(config.columns, parse_pairs("--columns", options.pop("columns") or []))
    keep = parse_pairs("--keep", options.pop("keep") or [])
    header = options.pop("header")
    given: dict[str, Any] = {"columns": columns}
    given["keep"] = {**config.keep, **{column: values.split(",") for column, values in keep.items()}}
    given["header"] = [name.strip() for name in header.split(",")] if header else config.header
    for name in ("format", "limit", "records", "delimiter", "encoding", "skip_bad_rows"):
        value = options.pop(name)
        if value is not None:
            given[name] = value.replace("\\t", "\t") if name == "delimiter" else value
    if given.get("limit", 0) < 0:
        raise UserError(f"--limit is {given['limit']}, must be 1 or more")
    return replace(reading, **given)
