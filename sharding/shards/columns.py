"""Adds an extra column to the index of a corpus that exists."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from runtime.errors import UserError
from sharding.annotations.extra import extra_value
from sharding.shards.output import open_output, write_text
from sharding.shards.schema import TYPES, Corpus, ShardInfo, check_columns, read_corpus, read_index
from sharding.shards.writing import publish, write_table
from storage.urls import join_url, local_form

Values = Callable[[pa.Table], Iterable[Any]]


def add_column(url: str, name: str, kind: str, values: Values) -> Corpus:
    """Add a column to the index of every shard of a packed or indexed corpus, or replace an added one; returns it.

    url: folder or URL that can be written. kind: float, int, bool or str.
    values: called with the index of each shard, returns a value for each row, None where there is none.
    Run again after an interruption. No run may read the corpus meanwhile.
    Raises UserError: the name is taken, also by a packed column; there is another number of values than rows; one is
    not of that type.
    """
    check_columns({name: kind})
    corpus = read_corpus(local_form(url))
    if name in corpus.settings.get("extra_columns", {}) and not corpus.settings.get("indexed"):
        raise UserError(f"{corpus.url}: {name} was packed, its values are in the tars too: choose another name")
    with open_output(corpus.url, among_others=True) as scratch:
        infos = [_with_column(corpus, shard, name, kind, values, scratch) for shard in range(len(corpus.shards))]
        for info in infos:
            publish(scratch / info.index_name, join_url(corpus.url, info.index_name))
        corpus = replace(corpus, shards=tuple(infos))
        write_text(join_url(corpus.url, "corpus.json"), corpus.to_json(), scratch)
    return corpus


def _with_column(corpus: Corpus, shard: int, name: str, kind: str, values: Values, scratch: Path) -> ShardInfo:
    """Write a shard's index with the column into `scratch`; returns the shard's new line of corpus.json."""
    table, url = read_index(corpus, shard), corpus.index_url(shard)
    try:
        column = [extra_value(value, kind) for value in values(table)]
    except ValueError as error:
        raise UserError(f"{url}: a value of {name} must be {error}") from None
    if len(column) != table.num_rows:
        raise UserError(f"{url}: {len(column)} values of {name} for {table.num_rows} rows")
    table = table.drop_columns([name]) if name in table.column_names else table
    path = scratch / corpus.shards[shard].index_name
    write_table(table.append_column(name, pa.array(column, TYPES[kind])), path)
    data = path.read_bytes()
    return replace(corpus.shards[shard], index_bytes=len(data), index_sha256=hashlib.sha256(data).hexdigest())
