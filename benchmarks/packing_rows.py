"""Measures memory for annotation rows: reading them, and packing 10,000 Shapes images with few and many rows.

    python benchmarks/packing_rows.py                       rows: 10,000, 100,000, 1,000,000; packing: 10,000 images
    python benchmarks/packing_rows.py --rows 20000000 --no-packing

Reading: a file of N rows, two for each image, by our reader with sorting on disk, and by a plain script with
`json.load` (or its equivalent) and a dictionary that merges the rows, alternating. Packing: `python -m sharding.build`
on the same images with one row and with a hundred rows each. Memory is the peak resident set of the process, seconds
are CPU time; the floor is a process that has only imported what packing needs.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pyarrow as pa
import pyarrow.parquet as pq

import sharding.build
from sharding.annotations.config import Reading
from sharding.annotations.reading import read_rows
from sharding.annotations.staging import stage
from storage.parquet import read_table

REPEATS = 3
CAPTION = "a photo with the number {} of a dog that runs along the beach in the evening"


def records(count: int) -> Iterator[dict[str, str]]:
    """Rows as in annotation files, two for each image, far apart."""
    for number in range(count):
        yield {
            "image": f"{number * 7919 % (count // 2) % 1000:04d}/{number % (count // 2)}.jpg",
            "caption": CAPTION.format(number),
        }


def write_rows(folder: Path, count: int, form: str) -> Path:
    """A file of `count` rows."""
    path = folder / f"{count}.{form}"
    if form == "json":
        with path.open("w") as file:
            for number, record in enumerate(records(count)):
                file.write((",\n" if number else "[") + json.dumps(record))
            file.write("]")
    elif form == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["image", "caption"])
            writer.writeheader()
            writer.writerows(records(count))
    else:
        pq.write_table(pa.Table.from_pylist(list(records(count))), path)
    return path


def ours(path: Path) -> int:
    """Media in a file, by our reader with sorting on disk."""
    with tempfile.TemporaryDirectory() as folder:
        return stage(read_rows([str(path)], Reading()), Path(folder) / "rows.sqlite", Path(folder)).items


def plain(path: Path) -> int:
    """Media in a file, the whole file in memory."""
    if path.suffix == ".json":
        rows = json.loads(path.read_text())
    elif path.suffix == ".csv":
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    else:
        rows = read_table(path).to_pylist()
    media: dict[str, list[str]] = {}
    for row in rows:
        media.setdefault(row["image"], []).append(row["caption"])
    return len(media)


SIDES = {"ours": ours, "plain": plain, "floor": lambda path: 0}


def child(side: str, path: Path) -> None:
    """Run one variant and print its time and memory."""
    start = time.process_time()
    items = SIDES[side](path)
    used = {"items": items, "seconds": time.process_time() - start}
    used["mb"] = peak_mb(os.getpid())  # ru_maxrss would begin with the parent's
    print(json.dumps(used))


def in_child(side: str, path: Path) -> dict[str, float]:
    """Time and memory of a variant in a separate process."""
    command = [sys.executable, __file__, "--child", side, str(path)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_reading(folder: Path, counts: list[int], forms: list[str], repeats: int) -> None:
    """Print the table of memory and rows/s."""
    print("| rows | format | ours, MB | plain, MB | ours, rows/s | plain, rows/s |\n|---|---|---|---|---|---|")
    for form in forms:
        for count in counts:
            path = write_rows(folder, count, form)
            results: dict[str, list[dict[str, float]]] = {"ours": [], "plain": []}
            for _ in range(repeats):
                for side, found in results.items():
                    found.append(in_child(side, path))
            if len({result["items"] for found in results.values() for result in found}) != 1:
                raise RuntimeError(f"both sides must find the same media: {results}")
            memory = [max(result["mb"] for result in results[side]) for side in results]
            rates = [count / median(result["seconds"] for result in results[side]) for side in results]
            print(
                f"| {count:,} | {form} | {memory[0]:.0f} | {memory[1]:.0f} | {rates[0]:,.0f} | {rates[1]:,.0f} |",
                flush=True,
            )
            path.unlink()


def measure_packing(folder: Path, pictures: int, workers: int) -> None:
    """Print the parent's memory while packing, with one row and with a hundred rows for each image."""
    shapes = folder / "shapes"
    command = [sys.executable, "-m", "sharding.shapes", "--output", str(shapes), "--images", str(pictures)]
    subprocess.run([*command, "--clips", "1", "--test-items", "8", "--size", "64"], check=True, capture_output=True)
    records = json.loads((shapes / "images_train.json").read_text())
    print("| images | rows | parent, MB | seconds |\n|---|---|---|---|")
    for times in (1, 100):
        path = folder / f"{times}.json"
        with path.open("w") as file:
            for number in range(times):
                file.write(",\n" if number else "[")
                file.write(",\n".join(json.dumps({**each, "caption": f"{number} {texts(each)}"}) for each in records))
            file.write("]")
        command = [sys.executable, "-m", "sharding.build", "--annotations", str(path), "--media-type", "image"]
        command += ["--media-root", str(shapes / "media"), "--output", str(folder / f"out{times}")]
        start = time.monotonic()
        process = subprocess.Popen([*command, "--workers", str(workers)], stderr=subprocess.DEVNULL)
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, peak_mb(process.pid))
            time.sleep(0.02)
        if process.returncode:
            raise RuntimeError(f"packing failed with exit code {process.returncode}")
        print(
            f"| {len(records):,} | {len(records) * times:,} | {peak:.0f} | {time.monotonic() - start:.0f} |", flush=True
        )


def texts(record: dict[str, Any]) -> str:
    """The captions of a record as one text."""
    return record["caption"] if isinstance(record["caption"], str) else " ".join(record["caption"])


def peak_mb(pid: int) -> float:
    """Peak resident set of a running process; 0 after its end."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--forms", nargs="+", default=["json", "csv", "parquet"])
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--no-packing", action="store_true")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], Path(options.child[1]))
        return
    with tempfile.TemporaryDirectory() as name:
        print(f"floor: {in_child('floor', Path(name))['mb']:.0f} MB ({sharding.build.__name__} imported)\n")
        measure_reading(Path(name), options.rows, options.forms, options.repeats)
        if not options.no_packing:
            print()
            measure_packing(Path(name), options.pictures, options.workers)


if __name__ == "__main__":
    main()
