"""Caption data sets whose files are not plain lists: COCO, Flickr, SBU, Something-Something."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from typing import Any

import ijson

from runtime.errors import UserError
from sharding.annotations.config import Reading
from sharding.annotations.files import AnnotationFile, Record, file_names
from sharding.annotations.formats.json_files import json_records, parsed
from sharding.annotations.formats.lookup import Lookup
from sharding.annotations.formats.tables import text_lines


def coco_records(file: AnnotationFile, reading: Reading) -> Iterator[Record]:
    """COCO's captions_*.json: each of "annotations" with the fields of its image, among them file_name."""
    images = Lookup(json_records(file, "images"), "id")
    for record in json_records(file, "annotations"):
        image = images.get(record.fields.get("image_id"))
        fault = "" if image else f'its image_id {record.fields.get("image_id")!r} is not among the "images"'
        yield replace(record, fields={**(image or {}), **record.fields}, fault=fault)


def flickr_records(file: AnnotationFile, reading: Reading) -> Iterator[Record]:
    """Flickr8k and Flickr30k: "FILE#N<tab>caption" lines, or a JSON object {file: [captions]}; image and caption.

    In the JSON the last of an image's texts may be the path of its file, which is not a caption.
    """
    if ".json" in file.name.lower():
        for record in json_records(file, "*"):
            image, texts = record.fields["key"], record.fields.get("value")
            if isinstance(texts, list):
                texts = [text for text in texts if not str(text).endswith(f"/{image}") and text != image]
            yield replace(record, fields={"image": image, "caption": texts})
        return
    for number, line in enumerate(text_lines(file, reading), 1):
        name, tab, caption = line.partition("\t")
        fault = "" if tab else "must be FILE#NUMBER, a tab, the caption"
        yield Record(file.name, number, {"image": name.rpartition("#")[0] or name, "caption": caption}, fault=fault)


def something_records(file: AnnotationFile, reading: Reading) -> Iterator[Record]:
    """Something-Something v2's lists; the brackets around a template's placeholders are taken out."""
    for record in json_records(file):
        if isinstance(record.fields.get("template"), str):
            record.fields["template"] = record.fields["template"].replace("[", "").replace("]", "")
        yield record


def sbu_records(files: Sequence[AnnotationFile], reading: Reading) -> Iterator[Record]:
    """SBU: a JSON object of the lists image_urls and captions, or a *_urls.txt and a *_captions.txt; url and caption.

    Raises:
        ValueError: one of two lists is longer, or a file has no partner.
    """
    texts = [file for file in files if ".json" not in file.name.lower()]
    captions = [file for file in texts if "caption" in file.name.rsplit("/", 1)[-1].replace("captioned", "")]
    urls = [file for file in texts if file not in captions]
    if len(urls) != len(captions):
        raise UserError(
            f"{file_names(texts)}: each list of URLs (..._urls.txt) needs its list of captions (..._captions.txt)"
        )
    for file in files:
        if file not in texts:
            yield from paired(file, parallel_lists(file, "image_urls", "captions"))
    for left, right in zip(urls, captions, strict=True):
        yield from paired(left, zip_longest(text_lines(left, reading), text_lines(right, reading)))


def paired(file: AnnotationFile, pairs: Iterator[tuple[Any, Any]]) -> Iterator[Record]:
    """Records of (url, caption) pairs; raises ValueError where one side ends early."""
    for number, (url, caption) in enumerate(pairs, 1):
        if url is None or caption is None:
            raise UserError(
                f"{file.name}, record {number}: it has {'an address' if caption is None else 'a caption'} but no "
                f"{'caption' if caption is None else 'address'}: the two lists must be equally long"
            )
        yield Record(file.name, number, {"url": url, "caption": caption})


def parallel_lists(file: AnnotationFile, *keys: str) -> Iterator[tuple[Any, ...]]:
    """Elements of several lists of a JSON object side by side, None where one is shorter."""
    return zip_longest(*(parsed(file, partial(ijson.items, prefix=f"{key}.item", use_float=True)) for key in keys))
