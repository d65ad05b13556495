"""From a record to a row: which columns hold the media, the texts, the question and its answers."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from runtime.errors import UserError
from sharding.annotations.extra import extra_value
from sharding.annotations.items import Row, identifier, plain, question_of, segment_suffix
from sharding.reasons import kind_of

if TYPE_CHECKING:
    from sharding.annotations.files import Record

ABSENT: Any = object()  # the value of a column that a record does not have; null is a value
QUOTED = re.compile(r'("[^"]*")')  # a column's name in a reason
Finder = Callable[[Mapping[str, Any]], Any]


class RowError(UserError):
    """A record that is not a row; the message names file, record and `reason`, which has the remedy."""

    def __init__(self, record: Record, reason: str) -> None:
        self.reason = " ".join(reason.split())  # names of columns may have line breaks
        super().__init__(f"{record.location}: {self.reason}; --skip-bad-rows skips and counts such records")

    @property
    def kind(self) -> str:
        """The reason without its remedy and particulars; names of columns, in double quotes, stay."""
        parts = QUOTED.split(self.reason.partition(";")[0])
        return "".join(part if position % 2 else kind_of(part) for position, part in enumerate(parts))[:200]


@dataclass
class Columns:
    """The columns of an annotation file. The defaults are those of Singularity's own JSON.

    Each is a column's name, or a template of several such as "{page_dir}/{videoid}.mp4", or a list of such of which
    the first that a record has counts; "sentences.raw" reaches into objects, and into each object of a list.
    Empty: there is none.
    """

    media: Any = field(default_factory=lambda: ["image", "video"])  # path below --media-root, or URL
    caption: Any = "caption"  # a text or a list of texts
    question: Any = "question"
    answer: Any = "answer"  # a text or a list of texts; of a choice: the number of the right option, from 0
    options: Any = ""  # list of texts to choose from; Singularity's own JSON has them as its caption
    question_id: Any = "question_id"
    question_type: Any = "question_type"
    answer_type: Any = "answer_type"
    start: Any = "start"  # seconds; a number applies to all records
    end: Any = "end"


class RowMaker:
    """Makes rows of records.

    keep: a column -> the values that rows must have to be kept. extra: a column whose value rows carry -> its type.
    """

    def __init__(self, columns: Columns, keep: Mapping[str, Any], extra: Mapping[str, str]) -> None:
        self.columns = columns
        self.extra = [(name, finder(name), kind) for name, kind in extra.items()]
        self.find = {each.name: finder(getattr(columns, each.name)) for each in fields(columns)}
        self.keep = [
            (column, finder(column), {str(value) for value in (values if isinstance(values, list) else [values])})
            for column, values in keep.items()
        ]

    def row(self, record: Record) -> Row:
        """The row of a record; filtered if it has no media or text, or `keep` excludes it.

        Raises RowError: the record lacks a column, or holds what cannot be understood.
        """
        if record.fault:
            raise RowError(record, record.fault)
        if record.filtered:
            return Row(filtered=record.filtered)
        for column, find, values in self.keep:
            value = find(record.fields)
            if value is ABSENT:
                raise self.missing(record, column, f"--keep {column}=VALUE")
            if plain(value) not in values:
                return Row(filtered=f"{column} is not {' or '.join(sorted(values))}")
        try:
            media = self.find["media"](record.fields)
        except (TypeError, ValueError) as error:
            raise RowError(record, f'"{self.columns.media}" cannot be filled in ({error}): check --columns') from None
        if media is ABSENT:
            raise self.missing(record, self.columns.media, "--columns media=NAME")
        try:
            name = media_name(media)
        except ValueError as error:
            raise RowError(record, f"media must be {error}") from None
        if not name:
            return Row(filtered="no media path")
        row = self.with_texts(name + self.segment(record), record)
        return replace(row, extra=self.extra_values(record)) if self.extra else row

    def extra_values(self, record: Record) -> dict[str, Any]:
        """The values of the extra columns; raises RowError: the record lacks one, or it is of another type."""
        values = {}
        for name, find, kind in self.extra:
            value = find(record.fields)
            if value is ABSENT:
                raise self.missing(record, name, f"--extra-columns NAME={kind}; write null where it has no value")
            try:
                values[name] = extra_value(value, kind)
            except ValueError as error:
                raise RowError(record, f'"{name}" must be {error}') from None
        return values

    def matches(self, record: Record) -> bool:
        """Whether the record has media or texts in these columns, which are not those of Singularity's own JSON."""
        usual = Columns()
        if self.columns.media == usual.media and self.columns.caption == usual.caption:
            return False
        others = {name: value for name, value in record.fields.items() if name not in usual.media}
        if self.find["media"](others) is not ABSENT:
            return True
        text = ABSENT if self.columns.caption == usual.caption else self.find["caption"](record.fields)
        return text is not ABSENT and self.find["media"](record.fields) is not ABSENT

    def with_texts(self, source: str, record: Record) -> Row:
        """The row about `source` with the record's question, choice or captions."""
        question = self.find["question"](record.fields)
        if question is not ABSENT:
            if question is None or not str(question).strip():
                return Row(filtered="no question")
            return Row(source, question=question_of(self.question_record(record), ""))
        options, answer = self.find["options"](record.fields), self.find["answer"](record.fields)
        texts = self.find["caption"](record.fields)
        if options is ABSENT and isinstance(answer, int | float) and isinstance(texts, list):
            options = texts
        if options is not ABSENT:
            return Row(source, choice=self.choice(record, options, answer))
        return self.with_captions(source, record, texts)

    def with_captions(self, source: str, record: Record, texts: Any) -> Row:
        """The row about `source` with a text or a list of texts."""
        if texts is ABSENT:
            if self.columns.caption:
                raise self.missing(record, self.columns.caption, "--columns caption=NAME (or caption= for none)")
            return Row(source)
        if texts is None or texts == []:
            return Row(filtered="no caption")
        captions = [texts] if isinstance(texts, str) else texts
        if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
            raise RowError(record, f'"caption" must be a text or a list of texts, not {shortened(texts)}')
        kept = tuple(text.strip() for text in captions if text.strip())
        return Row(source, kept) if kept else Row(filtered="no caption")

    def question_record(self, record: Record) -> dict[str, Any]:
        """The parts of a question under their own names; raises RowError where one is not a text."""
        names = ("question", "answer", "question_id", "question_type", "answer_type")
        found = {name: self.find[name](record.fields) for name in names}
        for name, value in found.items():
            for each in value if isinstance(value, list) and name == "answer" else [value]:
                if isinstance(each, bytes | list | Mapping):
                    raise RowError(record, f'"{name}" must be a text, not {shortened(each)}')
        return {name: value for name, value in found.items() if value is not ABSENT and value is not None}

    def choice(self, record: Record, options: Any, answer: Any) -> dict[str, Any]:
        """A multiple choice; raises RowError when the answer is not the number of an option."""
        number = self.find["question_id"](record.fields)
        try:
            right = -1 if answer is ABSENT or answer is None else int(identifier(answer))
        except ValueError:
            right = -2
        texts = isinstance(options, list) and not any(isinstance(each, bytes | list | Mapping) for each in options)
        if not texts or not options or not -1 <= right < len(options):
            raise RowError(
                record,
                f"options {shortened(options)} with answer {shortened(answer)}: must be a list of "
                "texts and the right one's number, from 0",
            )
        name = "" if number is ABSENT or number is None else identifier(number)
        return {"question_id": name, "options": [str(option) for option in options], "answer": right}

    def segment(self, record: Record) -> str:
        """`#t=START,END` (seconds) of a record with a start or an end; else nothing."""
        start, end = self.find["start"](record.fields), self.find["end"](record.fields)
        no_start, no_end = start is ABSENT or start is None, end is ABSENT or end is None
        if no_start and no_end:
            return ""
        try:
            first, last = 0.0 if no_start else float(start), math.inf if no_end else float(end)
        except (TypeError, ValueError):
            first, last = 0.0, -1.0
        if not 0 <= first < last:
            raise RowError(
                record,
                f'"start" {None if no_start else start!r} and "end" {None if no_end else end!r} '
                "must be seconds, start first",
            )
        return segment_suffix(first, last)

    def missing(self, record: Record, wanted: Any, remedy: str) -> RowError:
        """The error for a record without a column."""
        names = " or ".join(f'"{name}"' for name in (wanted if isinstance(wanted, list) else [wanted]))
        return RowError(record, f"no {names}; its columns are {record.names}; name it with {remedy}")


def media_name(value: Any) -> str:
    """The path or URL that a value is; "" where it is empty.

    Raises ValueError: it is something else; the message names what it must be.
    """
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, list) and len(value) == 1:
        return media_name(value[0])
    if value is None or value == []:
        return ""
    if isinstance(value, list):
        raise ValueError(f"one path or URL, not {len(value)} ({shortened(value)}): write one record for each")
    if isinstance(value, Mapping) and value.get("bytes") is not None:
        raise ValueError(
            "a path or URL, not the file's bytes in the table, as Hugging Face's datasets stores them: write each to a "
            "file, and put the file's name into the column"
        )
    if isinstance(value, Mapping) and isinstance(value.get("path"), str):
        return value["path"].strip()
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise ValueError(f"a text, not {shortened(value)}: name the column of paths or URLs with --columns media=NAME")
    return plain(value)


def used_names(columns: Columns, *others: Mapping[str, Any]) -> set[str]:
    """The names of all columns that rows may be made of; others: `keep` and `extra`."""
    return {name for each in fields(columns) for name in names_in(getattr(columns, each.name))}.union(
        *(names_in(column) for names in others for column in names)
    )


def names_in(spec: Any) -> Iterator[str]:
    """The columns that a value of `Columns` looks into."""
    if isinstance(spec, list):
        for each in spec:
            yield from names_in(each)
    elif isinstance(spec, str) and spec:
        for name in [name for _, name, _, _ in string.Formatter().parse(spec) if name] if "{" in spec else [spec]:
            yield from {name, name.split(".")[0]}


def finder(spec: Any) -> Finder:
    """A function that looks up a column of `Columns` in a record; it returns ABSENT if the record lacks it."""
    if isinstance(spec, list):
        return first_of([finder(each) for each in spec])
    if spec is None or spec == "":
        return lambda record: ABSENT
    if isinstance(spec, (int, float)):
        return lambda record: spec
    if "{" in spec:
        return template(spec)
    if "." in spec:
        return lambda record: value_at(record, spec, spec.split("."))
    return lambda record: record.get(spec, ABSENT)


def first_of(finders: list[Finder]) -> Finder:
    """The first of several that the record has."""

    def find(record: Mapping[str, Any]) -> Any:
        for each in finders:
            value = each(record)
            if value is not ABSENT:
                return value
        return ABSENT

    return find


def value_at(record: Mapping[str, Any], whole: str, path: list[str]) -> Any:
    """The value at a dotted path, through each object of a list; a column that has the dots in its name comes first."""
    if whole in record:
        return record[whole]
    value: Any = record
    for number, name in enumerate(path):
        if isinstance(value, list):
            found = [value_at(each, "", path[number:]) for each in value if isinstance(each, Mapping)]
            return [each for each in found if each is not ABSENT]
        if not isinstance(value, Mapping) or name not in value:
            return ABSENT
        value = value[name]
    return value


def template(spec: str) -> Finder:
    """Fills "{column}" and "{column:012d}" from the record; null where one of them is null or blank."""
    try:
        parts = [
            (literal, None if name is None else finder(name), form or "")
            for literal, name, form, _ in string.Formatter().parse(spec)
        ]
    except ValueError as error:
        raise UserError(f"template {spec!r}: {error}; write it as {{column}} or {{column:012d}}") from None

    def fill(record: Mapping[str, Any]) -> Any:
        result = []
        for literal, find, form in parts:
            result.append(literal)
            if find is None:
                continue
            value = find(record)
            if value is ABSENT or value is None or value == "":
                return ABSENT if value is ABSENT else None
            if form.endswith("d"):
                value = int(identifier(value))
            result.append(format(value, form) if form else plain(value))
        return "".join(result)

    return fill


def shortened(value: Any) -> str:
    """A value for a message."""
    text = "nothing" if value is ABSENT else repr(value).replace('"', "'")  # double quotes are for names of columns
    return text if len(text) <= 80 else text[:77] + "..."
