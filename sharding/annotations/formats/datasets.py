"""Data sets whose annotations are not plain lists, or are spread over several files: each file's records."""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, zip_longest
from typing import Any

import ijson

from runtime.errors import UserError
from sharding.annotations.config import Reading
from sharding.annotations.files import AnnotationFile, Record, file_names, record_of
from sharding.annotations.formats.json_files import json_keys, json_records, json_value, parsed
from sharding.annotations.formats.tables import csv_records, text_lines
from sharding.annotations.items import identifier

CACHE_KB = 16 * 1024
KINDS = ("questions", "annotations")  # of VQA's files, by the key of their list

log = logging.getLogger("sharding")


class Lookup:
    """The fields of records by the value of one of them; a later record replaces an earlier one.

    They lie in a temporary file that goes with this object.
    """

    def __init__(self, records: Iterable[Record], key: str) -> None:
        self.database = sqlite3.connect("")  # SQLite's name for a file that is deleted when it is closed
        self.database.execute(f"PRAGMA cache_size = -{CACHE_KB}")
        self.database.execute("CREATE TABLE record (key TEXT PRIMARY KEY, fields TEXT) WITHOUT ROWID")
        with self.database:
            self.database.executemany(
                "INSERT OR REPLACE INTO record VALUES (?, ?)",
                ((identifier(record.value(key)), json.dumps(record.fields, ensure_ascii=False)) for record in records),
            )

    def get(self, key: Any) -> dict[str, Any] | None:
        """The fields of the record with that key; None when there is none."""
        found = self.database.execute("SELECT fields FROM record WHERE key = ?", (identifier(key),)).fetchone()
        return json.loads(found[0]) if found else None


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

    Raises ValueError: one of two lists is longer, or a file has no partner.
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
                record = record_of(file, number, part)
                if not record.fault:
                    identity = part.get("image_id", part.get("image", image.fields.get("id")))
                    record.fields.update(image_id=identity, path=path_of(identity, images, about))
                yield record


def path_of(identity: Any, images: Lookup, about: list[AnnotationFile]) -> str:
    """An image's path in the parent folder of VG_100K and VG_100K_2; "" if image_data.json lacks it."""
    if not about:
        return f"{identifier(identity)}.jpg"
    image = images.get(identity) or {}
    return "/".join(str(image.get("url", "")).split("/")[-2:])


def vqa_records(files: Sequence[AnnotationFile], reading: Reading) -> Iterator[Record]:
    """VQA v2's questions with the fields of their annotation (ten answers under "answers") and data_subtype.

    files: v2_OpenEnded_*_questions.json and v2_*_annotations.json, in any order.
    """
    kinds = {file: next((key for key in json_keys(file) if key in KINDS), "") for file in files}
    for file in (file for file in files if not kinds[file]):
        raise UserError(f'annotation file {file.name} has neither "questions" nor "annotations": check --corpus')
    questions = (vqa_questions(file) for file in files if kinds[file] == "questions")
    answers = [file for file in files if kinds[file] == "annotations"]
    lookup = Lookup(chain.from_iterable(json_records(file, "annotations") for file in answers), "question_id")
    yield from answered(files, chain.from_iterable(questions), lookup, answers, reading)


def vqa_questions(file: AnnotationFile) -> Iterator[Record]:
    """A file's questions, each with the folder of its images: train2014, val2014 or test2015."""
    subtype = str(json_value(file, "data_subtype") or "").replace("test-dev", "test")
    for record in json_records(file, "questions"):
        yield replace(record, fields={**record.fields, **({"data_subtype": subtype} if subtype else {})})


def activitynet_qa_records(files: Sequence[AnnotationFile], reading: Reading) -> Iterator[Record]:
    """ActivityNet-QA's questions (*_q.json) with the answer and type of their answer (*_a.json)."""
    asking = [file for file in files if "question" in json_keys(file)]
    answers = [file for file in files if file not in asking]
    lookup = Lookup(chain.from_iterable(map(json_records, answers)), "question_id")
    questions = chain.from_iterable(map(json_records, asking))
    yield from answered(files, questions, lookup, answers, reading)


def answered(
    files: Sequence[AnnotationFile],
    questions: Iterator[Record],
    lookup: Lookup,
    answers: Sequence[AnnotationFile],
    reading: Reading,
) -> Iterator[Record]:
    """Each question with its answer's fields.

    Raises ValueError: there are only questions, or only answers, among the files.
    """
    none = True
    for record in questions:
        none = False
        number = record.fields.get("question_id")
        answer = lookup.get(number)
        fault = ""
        if answer is None and not reading.unanswered:
            if not answers:
                raise UserError(
                    f"{record.file} holds questions, and no file with their answers is given: add it to --annotations"
                    " (for questions without answers set `unanswered: true` in the corpus' YAML)"
                )
            fault = f"question_id {number!r} has no answer in {file_names(answers)}: pass the answers of the same split"
        yield replace(record, fields={**(answer or {}), **record.fields}, fault=fault)
    if none and answers:
        raise UserError(f"{file_names(files)} holds answers, and no file with their questions is given: add it")
