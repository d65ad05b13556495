"""MSR-VTT: videodatainfo JSON with its sentences, tables of test captions, lists of a split's videos."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

from sharding.annotations.config import Reading
from sharding.annotations.files import AnnotationFile, Record, file_names
from sharding.annotations.formats.json_files import json_records
from sharding.annotations.formats.lookup import Lookup
from sharding.annotations.formats.tables import csv_records
from sharding.annotations.items import identifier

log = logging.getLogger("sharding")


def msrvtt_records(files: Sequence[AnnotationFile], reading: Reading) -> Iterator[Record]:
    """Sentences with the fields of their video, among them split.

    files: JSON files with "videos" and "sentences"; tables with video_id and sentence, which are rows themselves
    (1k-A); tables with video_id alone, which say which videos of the JSON files are kept (7k, 9k).
    """
    tables = [file for file in files if ".json" not in file.name.lower()]
    lists = [file for file in tables if is_list(file, reading)]
    for file in tables:
        if file not in lists:
            yield from csv_records(file, reading)
    listed = {identifier(record.fields.get("video_id")) for file in lists for record in csv_records(file, reading)}
    found = set()
    for file in files:
        if file in tables:
            continue
        videos = Lookup(json_records(file, "videos"), "video_id")
        for record in json_records(file, "sentences"):
            video = identifier(record.fields.get("video_id"))
            found.add(video)
            left_out = f"video not in {', '.join(file.name.rsplit('/', 1)[-1] for file in lists)}"
            filtered = left_out if lists and video not in listed else ""
            yield replace(record, fields={**(videos.get(video) or {}), **record.fields}, filtered=filtered)
    if listed - found:
        missing = len(listed - found)
        log.warning("%d videos of %s have no sentences in the files given", missing, file_names(lists))


def is_list(file: AnnotationFile, reading: Reading) -> bool:
    """Whether a table has only the names of videos."""
    first = next(csv_records(file, reading), None)
    return first is not None and "sentence" not in first.fields
