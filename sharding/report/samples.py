"""Samples of a corpus, read in part: one by its key, or many from all over with their frames."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
import pyarrow.compute as pc
from fsspec.implementations.local import LocalFileSystem
from PIL import Image

from runtime.errors import UserError
from runtime.progress import Progress
from sharding.report.contact_sheet import Cell, contact_sheet, read_picture
from sharding.report.statistics import columns_of, in_threads, spread
from sharding.shards.schema import INDEX_SCHEMA, Corpus

FRAMES = 8  # of a clip that are shown, at most
TILE = 160  # pixels of a picture's side on the contact sheet
SHEET_WIDTH = 8  # pictures a row


@dataclass(frozen=True)
class Picked:
    """A sample: its shard, its row of the index, and JPEG bytes of the frames that are shown (None: unreadable)."""

    shard: int
    row: dict[str, Any]
    frames: list[bytes | None]


def pick(corpus: Corpus, count: int, shards: int, frames: int = FRAMES) -> list[Picked]:
    """`count` samples evenly spread over `shards` shards, each with up to `frames` of its frames.

    Raises OSError, ValueError: an index cannot be read. Frames that cannot be read are None.
    """
    filled = [shard for shard, info in enumerate(corpus.shards) if info.samples]
    chosen = [filled[index] for index in spread(len(filled), min(shards, count))]
    sizes = [corpus.shards[shard].samples for shard in chosen]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    positions = np.array(spread(int(starts[-1]), count))
    wanted = {
        shard: positions[(positions >= first) & (positions < last)] - first
        for shard, first, last in zip(chosen, starts[:-1], starts[1:])
    }

    def rows(shard: int) -> list[tuple[int, dict[str, Any]]]:
        table = columns_of(corpus, shard, INDEX_SCHEMA.names)
        return [(shard, row) for row in table.take(wanted[shard]).to_pylist()]

    found = [pair for pairs in in_threads(rows, chosen) for pair in pairs]
    return with_frames(corpus, found, frames)


def with_frames(corpus: Corpus, rows: Sequence[tuple[int, dict[str, Any]]], frames: int = FRAMES) -> list[Picked]:
    """Samples with up to `frames` of their frames, evenly spread; all of them are fetched side by side."""
    shown = [spread(len(row["offsets"]), frames) for _, row in rows]
    spans = [
        (corpus.tar_url(shard), row["offsets"][frame], row["sizes"][frame])
        for (shard, row), numbers in zip(rows, shown)
        for frame in numbers
    ]
    data = iter(ranges(spans))
    return [Picked(shard, row, [next(data) for _ in numbers]) for (shard, row), numbers in zip(rows, shown)]


def ranges(spans: Sequence[tuple[str, int, int]]) -> list[bytes | None]:
    """The bytes at (url, offset, size) of files in one store; None where they cannot be read."""
    if not spans:
        return []
    filesystem, _ = fsspec.url_to_fs(spans[0][0])
    paths = [fsspec.url_to_fs(url)[1] for url, _, _ in spans]
    starts, ends = [offset for _, offset, _ in spans], [offset + size for _, offset, size in spans]
    found = filesystem.cat_ranges(paths, starts, ends, on_error="return")
    return [data if isinstance(data, bytes) and data else None for data in found]


def sample_sheet(corpus: Corpus, count: int, shards: int) -> Image.Image:
    """A contact sheet of `count` samples from all over the corpus with their first text; of a clip four frames."""
    frames = 1 if corpus.media_type == "image" else 4
    cells = []
    for sample in pick(corpus, count, shards, frames):
        text = first_text(sample.row)
        name = "" if text else sample.row["source"]
        cells.append(Cell([read_picture(data) for data in sample.frames], text=text, name=name))
    return contact_sheet(cells, SHEET_WIDTH // frames, TILE)


def first_text(row: dict[str, Any]) -> str:
    """The first text of a sample, in one line; empty if it has none."""
    texts = [*row["captions"], *(question["question"] for question in row["questions"])]
    texts += [" / ".join(choice["options"]) for choice in row["choices"]]
    return " ".join(texts[0].split()) if texts else ""


def locate(corpus: Corpus, number: int) -> tuple[int, dict[str, Any]]:
    """(shard, index row) of the corpus' sample `number`. Raises ValueError when there is no such sample."""
    rest = number
    for shard, info in enumerate(corpus.shards):
        if 0 <= rest < info.samples:
            return shard, columns_of(corpus, shard).slice(rest, 1).to_pylist()[0]
        rest -= info.samples
    raise UserError(f"--sample {number}: {corpus.url} has samples 0 to {corpus.samples - 1}")


def find(corpus: Corpus, name: str, shown: bool = False) -> tuple[int, dict[str, Any]]:
    """(shard, index row) of a sample by its number, else its key, else its source, the first that has it.

    Raises ValueError: there is none.
    """
    if name.isdecimal() and str(int(name)) == name and (int(name) < corpus.samples or len(name) < 9):
        return locate(corpus, int(name))
    shards = list(range(len(corpus.shards)))
    if name[:6].isdecimal():  # our keys begin with the number of their shard
        shards.sort(key=lambda shard: not corpus.shards[shard].name.endswith(f"-{name[:6]}.tar"))
    with Progress(len(shards), "searching", shown, "shard", "searched") as progress:
        for shard, table in zip(shards, in_threads(lambda n: columns_of(corpus, n, ("key", "source")), shards)):
            same = pc.or_(pc.equal(table["key"], name), pc.equal(table["source"], name))
            index = pc.index(same, True).as_py()
            progress.advance(1, 0, 0)
            if index >= 0:
                return shard, columns_of(corpus, shard).slice(index, 1).to_pylist()[0]
    raise UserError(f"--sample {name}: no sample of {corpus.url} has this key, source or number")


def fetch_command(url: str, offset: int, size: int, target: str) -> str:
    """The shell command that fetches `size` bytes at `offset` of a file into `target`.

    dd for a local file, curl for one on the web, else Python with fsspec, which finds the user's credentials.
    """
    filesystem, path = fsspec.url_to_fs(url)
    if isinstance(filesystem, LocalFileSystem):
        flags = "iflag=skip_bytes,count_bytes bs=1M status=none"
        return f"dd if={shlex.quote(path)} {flags} skip={offset} count={size} of={shlex.quote(target)}"
    if url.startswith(("http://", "https://")):
        return f"curl -sS -r {offset}-{offset + size - 1} {shlex.quote(url)} -o {shlex.quote(target)}"
    program = f"import fsspec; fs, path = fsspec.url_to_fs({url!r}); "
    program += f"open({target!r}, 'wb').write(fs.cat_file(path, start={offset}, end={offset + size}))"
    return f"python -c {shlex.quote(program)}"
