"""The index of a shard in memory: where the bytes of each frame are, and the texts, as flat arrays."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sharding.shards.schema import INDEX_SCHEMA

UNITS = ("samples", "captions", "questions", "choices")


class Record(NamedTuple):
    """Where a sample is, and its shape; arrays (F,) over its frames."""

    shard: int
    row: int
    key: str
    offsets: np.ndarray
    sizes: np.ndarray
    crc32s: np.ndarray
    width: int
    height: int
    fps: float  # 1 for images

    @property
    def reason(self) -> str:
        """The reason why the sample cannot be decoded; empty for a valid record."""
        if len(self.sizes) and min(self.height, self.width) > 0:
            return ""
        return f"{len(self.sizes)} frames of {self.width}x{self.height} pixels in the index"


class ShardIndex:
    """The rows of a shard's index; frame columns are flat arrays with an offset for each row."""

    def __init__(self, table: pa.Table, shard: int, extra: Mapping[str, pa.Array] = MappingProxyType({})) -> None:
        """extra: values (rows,) of extra columns."""
        column = {name: table[name].combine_chunks() for name in INDEX_SCHEMA.names}
        self._shard = shard
        self._keys = column["key"]
        frames = column["offsets"]
        self._first = frames.offsets.to_numpy()  # (rows + 1,)
        self._offsets, self._sizes, self._crc32s = (
            column[name].values.to_numpy(zero_copy_only=False) for name in ("offsets", "sizes", "crc32s")
        )
        self.widths, self.heights = (column[name].to_numpy() for name in ("width", "height"))  # (rows,)
        self._fps = np.nan_to_num(column["fps"].to_numpy(zero_copy_only=False), nan=1.0)
        self._texts = {name: column[name] for name in UNITS[1:]}
        self._text_values = {name: texts.flatten() for name, texts in self._texts.items()}
        self._sources = column["source"]
        self._extra = extra
        # (rows + 1,) number of each row's first text among the shard's
        self._text_first = {
            name: np.concatenate([[0], np.cumsum(pc.list_value_length(texts).fill_null(0).to_numpy())])
            for name, texts in self._texts.items()
        }

    def __len__(self) -> int:
        return len(self._keys)

    def record(self, row: int) -> Record:
        """Where a sample's frames are."""
        span = slice(self._first[row], self._first[row + 1])
        return Record(
            shard=self._shard,
            row=row,
            key=self._keys[row].as_py(),
            offsets=self._offsets[span],
            sizes=self._sizes[span],
            crc32s=self._crc32s[span],
            width=int(self.widths[row]),
            height=int(self.heights[row]),
            fps=float(self._fps[row]),
        )

    def locate(self, unit: str, number: int) -> tuple[int, int]:
        """(row, number of the text in it) of a shard's unit `number`; of samples: (number, 0)."""
        if unit == "samples":
            return number, 0
        first = self._text_first[unit]
        row = int(np.searchsorted(first, number, side="right")) - 1
        return row, number - int(first[row])

    def texts(self, name: str, row: int) -> list[Any]:
        """A sample's captions (str), questions or choices (dict, as in the schema)."""
        return self._texts[name][row].as_py() or []

    def text_count(self, name: str, row: int) -> int:
        """Number of captions, questions or choices of a sample."""
        return int(self._text_first[name][row + 1] - self._text_first[name][row])

    def text(self, name: str, row: int, number: int) -> Any:
        """One of a sample's captions, questions or choices."""
        return self._text_values[name][int(self._text_first[name][row]) + number].as_py()

    def extra(self, row: int) -> dict[str, Any]:
        """A sample's values of the extra columns."""
        return {name: values[row].as_py() for name, values in self._extra.items()}

    def source(self, row: int) -> str:
        """The media's name in the annotations."""
        return self._sources[row].as_py()
