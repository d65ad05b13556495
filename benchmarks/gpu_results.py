"""Collects the results of benchmarks/gpu.sh from its folder: summary.txt, results.tgz, lines of JSON.

    python benchmarks/gpu_results.py FOLDER

FOLDER/parts.tsv has one line for each part: name, status, seconds, title, command. Prints one line of JSON for each,
short enough for the end of a log, and writes them to results.jsonl. Exit code 1 unless all parts are ok.
"""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

LONGEST = 11_000  # characters of all lines together
LONGEST_ERROR = 300
LARGEST_MB = 8  # of a file in the archive
LEFT_OUT = {"corpora", "shapes", "checkpoints", "results.tgz"}


class Part(NamedTuple):
    """A line of parts.tsv."""

    name: str
    status: str
    seconds: str
    title: str
    command: str


def text_of(path: Path) -> str:
    """Content of a file; empty if it does not exist."""
    return path.read_text(errors="replace") if path.exists() else ""


def figures(output: str) -> Any:
    """JSON that a part printed: an object or several; otherwise its lines."""
    found = []
    for line in output.splitlines():
        if line.startswith("{"):
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:  # it was ended within the line
                continue
    return found[0] if len(found) == 1 else found or output.splitlines()


def result(folder: Path, part: Part) -> dict[str, Any]:
    """A part's line of JSON, with the last line of its log after a failure."""
    entry: dict[str, Any] = {"part": part.name, "status": part.status, "seconds": int(part.seconds or 0)}
    found = figures(text_of(folder / f"{part.name}.txt"))
    if found:
        entry["figures"] = found
    log = text_of(folder / f"{part.name}.log").splitlines()
    logged = [line.strip() for line in log if line.strip()]
    if part.status in ("failed", "timeout") and logged:
        entry["error"] = logged[-1][-LONGEST_ERROR:]
    return entry


def fitted(results: list[dict[str, Any]], longest: int = LONGEST) -> list[str]:
    """The results as lines; if they are too long, the longest ones stay in the archive."""
    lines = [json.dumps(entry) for entry in results]
    while sum(map(len, lines)) > longest:
        number = max(range(len(lines)), key=lambda index: len(lines[index]))
        shorter = json.dumps(results[number] | {"figures": f"in results.tgz, {results[number]['part']}.txt"})
        if len(shorter) >= len(lines[number]):
            break
        lines[number] = shorter
    return lines


def summary(folder: Path, parts: list[Part]) -> str:
    """The parts for people: title, command, status, whole output."""
    return "\n".join(
        f"{part.title}\n$ {part.command}\n{part.status}, {part.seconds} s\n{text_of(folder / f'{part.name}.txt')}"
        for part in parts
    )


def wanted(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Whether a file belongs in the archive."""
    if LEFT_OUT & set(Path(entry.name).parts) or entry.size > LARGEST_MB * 2**20:
        return None
    return entry


def main() -> int:
    folder = Path(sys.argv[1])
    parts = [Part(*line.split("\t", 4)) for line in (folder / "parts.tsv").read_text().splitlines()]
    results = fitted([result(folder, part) for part in parts])
    (folder / "summary.txt").write_text(summary(folder, parts))
    (folder / "results.jsonl").write_text("\n".join([*results, ""]))
    with tarfile.open(folder / "results.tgz", "w:gz") as archive:
        archive.add(folder, "gpu", filter=wanted)
    print("\n".join(results))
    return int(any(part.status != "ok" for part in parts))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main())
