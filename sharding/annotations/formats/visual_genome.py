"""Visual Genome: region descriptions and question-answer pairs, image by image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sharding.annotations.config import Reading
from sharding.annotations.files import AnnotationFile, Record
from sharding.annotations.formats.json_files import json_keys, json_records
from sharding.annotations.formats.lookup import Lookup
from sharding.annotations.items import identifier


def visual_genome_records(files: Sequence[AnnotationFile], reading: Reading) -> Iterator[Record]:
    """Each region or question, with image_id and the path of its image.

    files: region_descriptions.json or question_answers.json; with image_data.json among them the path has the folder
    that an image is distributed in (VG_100K/2.jpg, VG_100K_2/1.jpg), else it is just 2.jpg.
    """
    about = [file for file in files if "url" in json_keys(file)]
    images = Lookup((record for file in about for record in json_records(file)), "image_id")
    for file in files:
        number = 0
        for image in [] if file in about else json_records(file):
            parts = image.fields.get("regions", image.fields.get("qas", []))
            for part in parts if isinstance(parts, list) else [parts]:
                number += 1
                if not isinstance(part, dict):
                    yield Record(file.name, number, {}, fault=f"must be an object, not {str(part)[:60]!r}")
                    continue
                identity = part.get("image_id", part.get("image", image.fields.get("id")))
                yield Record(
                    file.name, number, {**part, "image_id": identity, "path": path_of(identity, images, about)}
                )


def path_of(identity: Any, images: Lookup, about: list[AnnotationFile]) -> str:
    """An image's path in the parent folder of VG_100K and VG_100K_2; "" if image_data.json lacks it."""
    if not about:
        return f"{identifier(identity)}.jpg"
    image = images.get(identity) or {}
    return "/".join(str(image.get("url", "")).split("/")[-2:])
