"""Extra columns of the index, from the table of a shard to the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import torch

from runtime.errors import UserError
from sharding.shards.schema import INDEX_SCHEMA

Column = torch.Tensor | tuple[str, ...]  # B values: float32, int64, bool, or texts


class ExtraColumns:
    """The extra columns that a loader's batches carry; each has one type in all shards of all corpora."""

    def __init__(self, names: Sequence[str]) -> None:
        for name in names:
            if name in INDEX_SCHEMA.names:
                raise UserError(f"extra_columns names {name!r}, a column that every index has: name one of your own")
        self.names = tuple(names)
        self._types: dict[str, tuple[str, str]] = {}  # name -> its type, and the first index that had it

    def of(self, table: pa.Table, url: str) -> dict[str, pa.Array]:
        """The values (rows,) of each column in the index at `url`: missing numbers are NaN, missing texts empty.

        Raises UserError: there is no such column, or it has another type than in other indices or one that batches
        cannot carry, or whole numbers, true or false are missing.
        """
        return {name: self._values(table, name, url) for name in self.names}

    def _values(self, table: pa.Table, name: str, url: str) -> pa.Array:
        number = table.schema.get_field_index(name)
        if number < 0:
            others = ", ".join(each for each in table.column_names if each not in INDEX_SCHEMA.names) or "none"
            raise UserError(
                f"extra_columns={name}: {url} has no such column, its extra ones are: {others}; pack the corpus with "
                f"--extra-columns {name}=TYPE, or add it with sharding.shards.columns.add_column"
            )
        values = table.column(number).combine_chunks()
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        kind = kind_of(values.type)
        if not kind:
            raise UserError(f"extra_columns={name}: {url} has {values.type}, must be numbers, true or false, or texts")
        known, first = self._types.setdefault(name, (kind, url))
        if kind != known:
            raise UserError(f"extra_columns={name}: {url} has {kind}, {first} has {known}: give both the same type")
        if values.null_count and kind in ("int", "bool"):
            raise UserError(
                f"extra_columns={name}: {values.null_count} of {len(values)} values are missing in {url}: fill them, "
                "or store the column as float, where missing values are NaN"
            )
        if kind == "int":
            try:
                values = values.cast(pa.int64())
            except pa.ArrowInvalid:
                raise UserError(
                    f"extra_columns={name}: {url} has numbers of 2**63 or more: store them as str"
                ) from None
        return values.fill_null(math.nan if kind == "float" else "") if values.null_count else values


def kind_of(type: pa.DataType) -> str:
    """float, int, bool or str; empty for other types."""
    kinds = {
        "float": pa.types.is_floating,
        "int": pa.types.is_integer,
        "bool": pa.types.is_boolean,
        "str": lambda each: pa.types.is_string(each) or pa.types.is_large_string(each),
    }
    return next((kind for kind, matches in kinds.items() if matches(type)), "")


def collated(values: Sequence[Any]) -> Column:
    """B values of one column as a batch has them."""
    return tuple(values) if isinstance(values[0], str) else torch.tensor(values)
