"""Questions whose answers are in files of their own: VQA v2 and ActivityNet-QA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain

from runtime.errors import UserError
from sharding.annotations.config import Reading
from sharding.annotations.files import AnnotationFile, Record, file_names
from sharding.annotations.formats.json_files import json_keys, json_records, json_value
from sharding.annotations.formats.lookup import Lookup

KINDS = ("questions", "annotations")  # of VQA's files, by the key of their list


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

    Raises:
        ValueError: there are only questions, or only answers, among the files.
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
