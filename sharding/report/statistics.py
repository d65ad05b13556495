"""Distributions over a corpus (words, pixels, frames, seconds, bytes), from the indices, a shard at a time."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from runtime.errors import UserError
from runtime.progress import Progress
from sharding.shards.schema import UNITS, UNREADABLE, Corpus
from storage.parquet import read_table
from storage.policy import retry
from storage.urls import join_url

THREADS = 16  # that read indices
DIGITS = 3  # significant ones of a value that are kept: memory stays small, however many samples there are
BINS = 12  # of a histogram, about
COLUMNS = ("captions", "questions", "choices", "width", "height", "sizes", "duration")

Value = TypeVar("Value")


@dataclass
class Distribution:
    """Numbers by how often they occur; `low`, `high` and the mean are exact, the rest is to DIGITS digits."""

    name: str
    counts: Counter[float] = field(default_factory=Counter)
    total: float = 0.0
    low: float = math.inf
    high: float = -math.inf

    @property
    def count(self) -> int:
        """The number of values."""
        return self.counts.total()

    @property
    def mean(self) -> float:
        """Their mean."""
        return self.total / self.count

    def add(self, values: np.ndarray) -> None:
        """Count more numbers."""
        values = values[np.isfinite(values)]
        if not len(values):
            return
        self.total += float(values.sum())
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
        kinds, times = np.unique(values, return_counts=True)
        for kind, number in zip(rounded(kinds).tolist(), times.tolist()):
            self.counts[kind] += number

    def percentile(self, share: float) -> float:
        """The value below which this share of the values lies."""
        seen = 0
        for value in sorted(self.counts):
            seen += self.counts[value]
            if seen >= share * self.count:
                return min(max(value, self.low), self.high)
        return self.high

    def bins(self) -> list[tuple[float, float, int]]:
        """(from, to, how many) of a histogram with round limits, from the 1 % to the 99 %.

        Values beyond are counted in two more bins, from -inf and to inf, so that the ends are not peaks.
        """
        low, high = self.percentile(0.01), self.percentile(0.99)
        whole = all(value == int(value) for value in self.counts)
        step = round_step((high - low) / BINS, whole)
        first, last = math.floor(low / step), math.floor(high / step)
        heights = [0] * (last - first + 3)  # with those beyond
        for value, number in self.counts.items():
            heights[min(max(math.floor(value / step + 1e-9), first - 1), last + 1) - first + 1] += number
        limits = [-math.inf, *(number * step for number in range(first, last + 2)), math.inf]
        found = list(zip(limits, limits[1:], heights, strict=False))
        return found[0 if heights[0] else 1 : None if heights[-1] else -1]

    def to_json(self) -> dict[str, Any]:
        """The same as a dictionary of plain values."""
        percentiles = {f"p{share}": self.percentile(share / 100) for share in (5, 25, 50, 75, 95)}
        ends = {-math.inf: self.low, math.inf: self.high}
        bins = [
            {"from": ends.get(low, low), "to": ends.get(high, high), "count": count} for low, high, count in self.bins()
        ]
        head = {"count": self.count, "mean": self.mean, "min": self.low, "max": self.high}
        return {**head, **percentiles, "histogram": bins}


@dataclass
class Statistics:
    """The statistics of `shards` of a corpus, from their indices."""

    shards: int
    samples: int = 0
    without_text: int = 0
    empty_captions: int = 0
    distributions: list[Distribution] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The same as a dictionary of plain values."""
        head = {"shards": self.shards, "samples": self.samples}
        head |= {"samples_without_text": self.without_text, "empty_captions": self.empty_captions}
        return {**head, "distributions": {each.name: each.to_json() for each in self.distributions}}


MEASURES: dict[str, Callable[[pa.Table], pa.Array]] = {
    "captions per sample": lambda table: pc.list_value_length(table["captions"]),
    "words per caption": lambda table: words(pc.list_flatten(table["captions"])),
    "questions per sample": lambda table: pc.list_value_length(table["questions"]),
    "words per question": lambda table: words(pc.struct_field(pc.list_flatten(table["questions"]), "question")),
    "answers per question": lambda table: pc.list_value_length(
        pc.struct_field(pc.list_flatten(table["questions"]), "answers")
    ),
    "options per choice": lambda table: pc.list_value_length(
        pc.struct_field(pc.list_flatten(table["choices"]), "options")
    ),
    "width in pixels": lambda table: table["width"],
    "height in pixels": lambda table: table["height"],
    "frames per clip": lambda table: pc.list_value_length(table["sizes"]),
    "seconds per clip": lambda table: table["duration"].drop_null(),
    "bytes per frame": lambda table: pc.list_flatten(table["sizes"]),
}
OF_CLIPS = ("frames per clip", "seconds per clip")


def measure(corpus: Corpus, shards: int = 0, progress: Progress | None = None) -> Statistics:
    """The distributions over a corpus, or over `shards` of its shards, evenly spread, without all-zero ones.

    Raises OSError, ValueError: an index cannot be read.
    """
    chosen = spread(len(corpus.shards), shards or len(corpus.shards))
    statistics = Statistics(len(chosen))
    found = {name: Distribution(name) for name in MEASURES if corpus.media_type == "video" or name not in OF_CLIPS}
    for table in in_threads(lambda shard: columns_of(corpus, shard, COLUMNS), chosen):
        statistics.samples += table.num_rows
        texts = [pc.list_value_length(table[column]).to_numpy() for column in ("captions", "questions", "choices")]
        statistics.without_text += int((sum(texts) == 0).sum())
        blank = pc.match_substring_regex(pc.list_flatten(table["captions"]), r"^\s*$")
        statistics.empty_captions += pc.sum(blank).as_py() or 0
        for name, distribution in found.items():
            distribution.add(MEASURES[name](table).to_numpy().astype(float))
        if progress:
            progress.advance(1, 0, table.nbytes)
    statistics.distributions = [each for each in found.values() if each.high > 0]
    return statistics


def columns_of(corpus: Corpus, shard: int, columns: Sequence[str] | None = None) -> pa.Table:
    """Columns of a shard's index, by default all; raises an error that names it."""
    url = corpus.index_url(shard)
    try:
        filesystem, path = fsspec.url_to_fs(url)
        return read_table(retry(filesystem.cat_file, path), columns)
    except FileNotFoundError:
        reason = "is missing"
    except UNREADABLE as error:
        reason = f"cannot be read ({error})"
    raise UserError(f"{url} {reason}: `python -m sharding.verify {corpus.url} --repair` rebuilds it")


def in_threads(function: Callable[[int], Value], numbers: Sequence[int]) -> Iterator[Value]:
    """`function` of each number, in order; a few are computed before they are used."""
    with ThreadPoolExecutor(THREADS) as pool:
        pending = deque(pool.submit(function, number) for number in numbers[: 2 * THREADS])
        rest = iter(numbers[2 * THREADS :])
        try:
            while pending:
                yield pending.popleft().result()
                pending.extend(pool.submit(function, number) for number in (next(rest, None),) if number is not None)
        finally:
            pool.shutdown(cancel_futures=True)


def spread(total: int, count: int) -> list[int]:
    """`count` of the numbers 0 to `total` - 1, evenly spread; all if there are fewer."""
    return np.unique(np.linspace(0, max(total - 1, 0), min(count, total)).round().astype(int)).tolist()


def words(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """The number of words of each text."""
    return pc.count_substring_regex(texts, r"\S+")


def rounded(values: np.ndarray) -> np.ndarray:
    """Values to DIGITS significant digits; whole numbers below 1,000 stay as they are."""
    size = 10.0 ** (np.floor(np.log10(np.maximum(np.abs(values), 1e-9))) - (DIGITS - 1))
    return np.round(np.round(values / size) * size, 9)


def round_step(step: float, whole: bool) -> float:
    """A round number (1, 2, 5 times a power of ten) not below `step`."""
    if whole and step <= 1:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(max(step, 1e-6)))
    return next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= step * 0.999)


def text_histogram(distribution: Distribution, width: int = 100) -> str:
    """A distribution as lines of text, `width` characters wide."""
    d = distribution
    if d.low == d.high:
        return f"{d.name}: {d.count:,}; always {short(d.low)}"
    head = f"{d.name}: {d.count:,}; mean {d.mean:,.4g}, median {short(d.percentile(0.5))}"
    lines = [head + f", 5-95 % {short(d.percentile(0.05))} to {short(d.percentile(0.95))}, max {short(d.high)}"]
    bins = d.bins()
    most = max(height for _, _, height in bins)
    names = bin_names(bins)
    label, number = max(map(len, names)), len(f"{most:,}")
    room = max(10, width - label - number - 6)
    for name, (_, _, height) in zip(names, bins):
        lines.append(f"  {name:>{label}}  {height:>{number},}  {bar(height / most * room)}".rstrip())
    return "\n".join(lines)


def bin_names(bins: Sequence[tuple[float, float, int]]) -> list[str]:
    """`5` for the bin of one whole number, else `5-10`: its limits, the second one outside; `<5` and `≥60` beyond."""
    inner = [(low, high) for low, high, _ in bins if math.isfinite(high - low)]
    one = all(low == int(low) and high - low == 1 for low, high in inner)
    names = {(low, high): short(low) if one else f"{short(low)}-{short(high)}" for low, high in inner}
    beyond = {low: f"<{short(high)}" if low == -math.inf else f"≥{short(low)}" for low, high, _ in bins}
    return [names.get((low, high), beyond[low]) for low, high, _ in bins]


def short(value: float) -> str:
    """A number without needless digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def bar(length: float) -> str:
    """A bar of `length` characters, in eighths."""
    eighths = round(length * 8)
    return "█" * (eighths // 8) + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[eighths % 8]


def summary(corpus: Corpus) -> dict[str, Any]:
    """The corpus in a few numbers."""
    counts = {unit: sum(corpus.counts(unit)) for unit in UNITS}
    head = {"url": corpus.url, "name": corpus.name, "media_type": corpus.media_type, "shards": len(corpus.shards)}
    return {**head, **counts, "settings": corpus.settings, "corpus_json": join_url(corpus.url, "corpus.json")}
