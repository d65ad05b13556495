"""Writes the Shapes corpus: media files and annotation files, in parallel, the same bytes for the same seed."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from runtime.errors import UserError
from sharding.shapes.draw import jpeg, mp4
from sharding.shapes.scenes import CLIPS, IMAGES, clip_of, image_scene
from sharding.shapes.texts import answer_list, clip_records, image_records, text_generator

SPLITS = ("train", "test")
CHUNK = 64  # items a worker makes at a time


def write_shapes(
    folder: str | Path,
    images: int = 2000,
    clips: int = 500,
    test_items: int = 256,
    size: int = 96,
    seed: int = 0,
    workers: int = 1,
    progress: bool = False,
) -> Path:
    """Write a Shapes corpus and return its folder.

    images, clips: numbers to train on; test_items: of each to test on; size: pixels of the square frames, even.

    Raises ValueError: a number that cannot be. UserError: the folder holds files already.
    """
    if size < 32 or size % 2 or min(images, clips, test_items) < 0:
        raise UserError("--size must be even and at least 32, --images, --clips and --test-items 0 or more")
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: choose another --output or delete it")
    (folder / "media").mkdir(parents=True, exist_ok=True)
    jobs = [
        (medium, split, count)
        for medium, of_split in ((IMAGES, (images, test_items)), (CLIPS, (clips, test_items)))
        for split, count in enumerate(of_split)
    ]
    with tqdm(total=sum(job[2] for job in jobs), unit="item", desc="drawing Shapes", disable=not progress) as bar:
        context = multiprocessing.get_context("forkserver")
        with ProcessPoolExecutor(workers, context) if workers > 1 else nullcontext() as pool:
            for medium, split, count in jobs:
                make = partial(make_item, folder, medium, split, seed, size)
                items = pool.map(make, range(count), chunksize=CHUNK) if pool else map(make, range(count))
                write_annotations(folder, SPLITS[split], items, bar)
    (folder / "answer_list.json").write_text(json.dumps(answer_list()) + "\n")
    return folder


def make_item(folder: Path, medium: int, split: int, seed: int, size: int, number: int) -> dict[str, Any]:
    """Write one picture or clip; returns its records by annotation file."""
    kind, ending = ("images", "jpg") if medium == IMAGES else ("clips", "mp4")
    path = f"{kind}/{SPLITS[split]}/{number // 1000:04d}/{number:07d}.{ending}"
    rng = text_generator(seed, medium, split, number)
    test = SPLITS[split] == "test"
    if medium == IMAGES:
        scene = image_scene(seed, split, number)
        data, records = jpeg(scene, size), image_records(path, scene, rng, test)
    else:
        clip = clip_of(seed, split, number, groups=test)
        data, records = mp4(clip, size), clip_records(path, clip, rng, number, test)
    target = folder / "media" / path
    os.makedirs(target.parent, exist_ok=True)
    target.write_bytes(data)
    return records


def write_annotations(folder: Path, split: str, items: Iterator[dict[str, Any]], bar: tqdm) -> None:
    """Append records to their files, each a JSON list."""
    with ExitStack() as stack:
        files: dict[str, TextIO] = {}
        for records in items:
            for name, record in records.items():
                if name not in files:
                    files[name] = stack.enter_context(open(folder / file_name(name, split), "w"))
                files[name].write(("[\n " if not files[name].tell() else ",\n ") + json.dumps(record))
            bar.update()
        for file in files.values():
            file.write("\n]\n")


def file_name(name: str, split: str) -> str:
    """`clips_motion` of test is `clips_test_motion.json`."""
    first, _, rest = name.partition("_")
    return f"{first}_{split}{'_' + rest if rest else ''}.json"
