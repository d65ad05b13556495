"""Reasons of failures by kind: without the numbers, names and URLs that differ from case to case."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Iterator

KINDS = 1000  # kinds that are counted; reasons of free text must not fill the memory

STATUS = re.compile(r"(?:^|(?<=HTTP )|(?<=status )|(?<=errno )|(?<=code ))\d+", re.IGNORECASE)
PARTICULARS = (  # details that differ between failures of one kind, and their replacement
    (re.compile(r"\b\w+://\S+"), "URL"),
    (re.compile(r"'[^']*'|\"[^\"]*\""), "'…'"),
    (re.compile(r"(?<![\w.])/\S+"), "PATH"),
    (re.compile(r"0x[0-9a-fA-F]+"), "N"),
    (re.compile(r"(?<![\w])[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?"), "N"),
)


@functools.lru_cache(2**16)
def kind_of(reason: str) -> str:
    """A reason without its particulars (numbers, names, URLs), the same for all failures of one kind.

    Numbers that are the reason stay: `HTTP 404`, `errno 5`.
    """
    parts = []
    end = 0
    for match in STATUS.finditer(reason):
        parts += [general(reason[end : match.start()]), match[0]]
        end = match.end()
    return "".join([*parts, general(reason[end:])])[:200]


def general(text: str) -> str:
    """A text with its particulars replaced."""
    for pattern, stand_in in PARTICULARS:
        text = pattern.sub(stand_in, text)
    return text


def count_kinds(kinds: Counter[str], reasons: Iterable[str]) -> None:
    """Add reasons to the counts by kind; beyond KINDS kinds the rest is one."""
    for reason in reasons:
        kind = kind_of(reason)
        kinds[kind if kind in kinds or len(kinds) < KINDS else "other reasons"] += 1


def summary(kinds: Counter[str], most: int = 10) -> Iterator[str]:
    """Lines `count x kind`, most frequent first."""
    for kind, count in kinds.most_common(most):
        yield f"  {count:6d} x {kind}"
    if len(kinds) > most:
        yield f"  and {len(kinds) - most} more kinds of reasons, all in failures.parquet"
