"""The schema of a packed corpus: columns of a shard's index, content of `corpus.json`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import fsspec
import pyarrow as pa
from braceexpand import braceexpand

from runtime.errors import MissingError, UserError
from sharding.annotations.items import MEDIA_TYPES
from sharding.shards.foreign_texts import CAPTION_KEYS
from storage.parquet import read_schema, read_table
from storage.policy import check_bucket, retry
from storage.urls import join_url

FORMAT = "singularity-shards"
VERSION = 1
UNITS = ("samples", "frames", "captions", "questions", "choices", "bytes")  # that corpus.json counts
KEYS = {"format", "version", "name", "media_type", *UNITS, "tars", "settings", "files", "shards", "sha256"}
CHECKSUM = ',\n "sha256": "'  # begins the last line of corpus.json: of all text before it
UNREADABLE = (OSError, ValueError, pa.ArrowException)  # what reading a damaged parquet file may raise

QUESTION = pa.struct(
    [
        ("question_id", pa.string()),
        ("question", pa.string()),
        ("answers", pa.list_(pa.string())),  # distinct answers, most frequent first
        ("weights", pa.list_(pa.float32())),  # share of the annotators behind each answer, sums to 1
        ("question_type", pa.string()),
        ("answer_type", pa.string()),
    ]
)
CHOICE = pa.struct(
    [
        ("question_id", pa.string()),
        ("options", pa.list_(pa.string())),
        ("answer", pa.int32()),  # index into options, -1 when unknown
    ]
)

# One row a sample. Offsets are absolute byte positions of the frame's JPEG bytes in the tar.
INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("offsets", pa.list_(pa.int64())),
        ("sizes", pa.list_(pa.int32())),
        ("crc32s", pa.list_(pa.uint32())),
        ("width", pa.int32()),  # of the stored frames, pixels
        ("height", pa.int32()),
        ("fps", pa.float64()),  # rate of the stored frames; null for images
        ("duration", pa.float64()),  # seconds of the source clip; null for images
        ("frame_times", pa.list_(pa.float64())),  # seconds from the clip's start; empty for images
        ("source", pa.string()),  # the media's name in the annotation
        ("captions", pa.list_(pa.string())),
        ("questions", pa.list_(QUESTION)),
        ("choices", pa.list_(CHOICE)),
    ]
)
TYPES = {"float": pa.float64(), "int": pa.int64(), "bool": pa.bool_(), "str": pa.string()}  # of extra columns
SHOWN = ("shard", "frame", "command")  # what `inspect --json` shows of a sample beside the columns of its row


@dataclass(frozen=True)
class ShardInfo:
    """One shard's line in `corpus.json`; names are relative to the corpus."""

    name: str  # "corpus-000123.tar"; its index is "corpus-000123.parquet"
    samples: int
    frames: int
    captions: int
    questions: int
    choices: int
    bytes: int
    sha256: str
    index_bytes: int
    index_sha256: str
    index: str = ""  # the index's file name where it is not the usual one, because that was taken

    @property
    def index_name(self) -> str:
        """File name of the shard's parquet index."""
        return self.index or self.name.removesuffix(".tar") + ".parquet"


@dataclass(frozen=True)
class Corpus:
    """A packed corpus as a reader sees it before it opens any shard; memory grows with shards only."""

    url: str
    name: str
    media_type: str
    shards: tuple[ShardInfo, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)  # SHA-256 of other files beside corpus.json
    tars: str = ""  # folder of the tars, where it is not that of the indices
    more: dict[str, Any] = field(default_factory=dict)  # keys of corpus.json that others wrote, such as a licence

    def tar_url(self, shard: int) -> str:
        """URL of a shard's tar."""
        return join_url(self.tars or self.url, self.shards[shard].name)

    def index_url(self, shard: int) -> str:
        """URL of a shard's index."""
        return join_url(self.url, self.shards[shard].index_name)

    @property
    def samples(self) -> int:
        """Number of images or videos."""
        return sum(self.counts())

    def counts(self, unit: str = "samples") -> list[int]:
        """Number of a unit (see UNITS) in each shard."""
        return [getattr(shard, unit) for shard in self.shards]

    def to_json(self) -> str:
        """The text of `corpus.json`; the same corpus always gives the same bytes. It ends with its own SHA-256."""
        totals = {unit: sum(self.counts(unit)) for unit in UNITS}
        head = {"format": FORMAT, "version": VERSION, "name": self.name, "media_type": self.media_type}
        shards = [{key: value for key, value in asdict(shard).items() if value != ""} for shard in self.shards]
        elsewhere = {"tars": self.tars} if self.tars else {}
        body = {"settings": self.settings, "files": self.files, "shards": shards}
        text = json.dumps({**head, **totals, **elsewhere, **self.more, **body}, indent=1, sort_keys=False).removesuffix(
            "\n}"
        )
        return f'{text}{CHECKSUM}{hashlib.sha256(text.encode()).hexdigest()}"\n}}\n'


def check_columns(columns: Mapping[str, str], packed: bool = False) -> None:
    """Raise UserError for an extra column with the name of another one, or of no known type.

    packed: the columns are written into the JSON of the samples too, where `verify --repair` reads the texts.
    """
    for name, kind in columns.items():
        if name in INDEX_SCHEMA.names:
            raise UserError(f"extra column {name!r}: the index has a column of this name, choose another")
        if name in SHOWN or (packed and name in (*CAPTION_KEYS, "question")):
            use = "`inspect` shows" if name in SHOWN else "the JSON in the tars has"
            raise UserError(f"extra column {name!r}: {use} something else under this name, rename the column")
        if kind not in TYPES:
            raise UserError(f"extra column {name}={kind}: the type must be one of {', '.join(TYPES)}")


def is_index_schema(schema: pa.Schema) -> bool:
    """Whether a table has the columns of an index; others, of users and later versions, may stand beside them."""
    numbers = [schema.get_field_index(name) for name in INDEX_SCHEMA.names]  # -1: absent, or several of the name
    return min(numbers) >= 0 and pa.schema([schema.field(number) for number in numbers]).equals(INDEX_SCHEMA)


def named_shards(url: str) -> tuple[str, list[str]]:
    """(folder, names of tars in it) of a URL that names tars, as webdataset's users write them; of a folder, no names.

    One tar (`folder/x.tar`), a brace list (`folder/x-{000..009}.tar`), or several of them with `::` between.
    Raises ValueError: the braces do not fit, or list something else than the tars of one folder.
    """
    if not (url.endswith(".tar") or "{" in url) or ("://" not in url and os.path.isdir(url)):
        return url, []
    lists = url.split("::")
    try:
        whole = all(part.endswith(".tar") for part in lists)
        found = [each for part in (lists if whole else [url]) for each in brace_list(part)]
    except ValueError:
        raise UserError(f"{url} has a brace without its counterpart: write x-{{000..009}}.tar") from None
    tars = list(dict.fromkeys(found))
    if not all(tar.endswith(".tar") for tar in tars):
        if len(tars) == 1:
            return url, []
        raise UserError(f"{url} lists {tars[0]}: a list in braces must name .tar files, such as x-{{000..009}}.tar")
    if pattern := next((tar for tar in tars if "*" in tar.rpartition("/")[2]), None):
        raise UserError(f"{pattern} is a pattern: give the tars' folder, or a list in braces as x-{{000..009}}.tar")
    folders = list(dict.fromkeys(tar.rpartition("/")[0] if "/" in tar else "." for tar in tars))
    if len(folders) > 1:
        raise UserError(f"{url} lists tars of several folders ({folders[0]}, {folders[1]}): give one list a folder")
    return folders[0], [tar.rpartition("/")[2] for tar in tars]


def brace_list(url: str) -> list[str]:
    """The names of a brace list; braces in the name of a local folder are literal."""
    folder, _, name = url.rpartition("/")
    if folder and "://" not in url and os.path.isdir(folder):
        return [f"{folder}/{each}" for each in braceexpand(name)]
    return list(braceexpand(url))


def read_corpus(url: str, storage_options: dict[str, Any] | None = None) -> Corpus:
    """Read `corpus.json` of the folder `url`; where that names tars (see `named_shards`), the corpus has only those.

    Raises FileNotFoundError: there is no `corpus.json`. ValueError: the file is not a corpus description or of another
    version, or does not list a tar that `url` names.
    """
    try:
        data = retry(read_file, description_url(url), storage_options)
    except FileNotFoundError:
        raise no_corpus(url, storage_options) from None
    return corpus_at(url, data)


def description_url(url: str) -> str:
    """URL of the `corpus.json` that describes a folder, or tars."""
    return join_url(named_shards(url)[0], "corpus.json")


def corpus_at(url: str, data: bytes) -> Corpus:
    """The corpus that `url` means, from the bytes of its `corpus.json`; raises ValueError as `read_corpus`."""
    folder, names = named_shards(url)
    corpus = parse_corpus(data, folder)
    return with_shards(corpus, names) if names else corpus


def with_shards(corpus: Corpus, names: Sequence[str]) -> Corpus:
    """A corpus of some of its shards, in its order; raises ValueError for a name that it does not have."""
    missing = sorted(set(names) - {shard.name for shard in corpus.shards})
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"{join_url(corpus.url, 'corpus.json')} does not list {missing[0]}{more}: "
            f"index it with `python -m sharding.index {join_url(corpus.tars or corpus.url, missing[0])}`"
        )
    return replace(corpus, shards=tuple(shard for shard in corpus.shards if shard.name in set(names)))


def no_corpus(url: str, storage_options: Mapping[str, Any] | None = None) -> MissingError:
    """The error where there is no corpus; raises BucketError where there is not even a bucket."""
    check_bucket(url, storage_options)
    named = f" '{url}'" if named_shards(url)[1] else ""
    return MissingError(
        f"{description_url(url)} does not exist: {named_shards(url)[0]} is not a packed corpus; pack it with "
        f"`python -m sharding.build`, or index existing webdataset shards with `python -m sharding.index{named}`"
    )


def checksum_matches(data: bytes) -> bool:
    """Whether the bytes of a `corpus.json` are as written; True if it has no checksum."""
    before, mark, after = data.rpartition(CHECKSUM.encode())
    return not mark or after.decode("utf-8", "replace") == hashlib.sha256(before).hexdigest() + '"\n}\n'


def parse_corpus(content: bytes, url: str, also_damaged: bool = False) -> Corpus:
    """`Corpus` from the bytes of a `corpus.json`.

    Raises ValueError naming `url` when it is not one, or, unless `also_damaged`, does not match its own checksum.
    """
    rebuild = f"`python -m sharding.verify {url} --repair` rebuilds it"
    try:
        data = json.loads(content.decode("utf-8", "replace"))
    except json.JSONDecodeError as error:
        raise UserError(f"{url}/corpus.json is not valid JSON ({error}): {rebuild}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UserError(f"{url}/corpus.json is not a {FORMAT} description; pack the corpus again")
    if data.get("version") != VERSION:
        raise UserError(
            f"{url} holds shards of version {data.get('version')}, this program reads version {VERSION}; "
            "pack the corpus again with `python -m sharding.build`"
        )
    if data.get("media_type") not in MEDIA_TYPES:
        raise UserError(f"{url}/corpus.json: media_type is {data.get('media_type')!r}, must be one of {MEDIA_TYPES}")
    if not also_damaged and not checksum_matches(content):
        raise UserError(f"{url}/corpus.json is damaged (it does not match its own checksum): {rebuild}")
    try:
        known = ShardInfo.__dataclass_fields__  # a later version may write more
        shards = tuple(
            ShardInfo(**{key: value for key, value in shard.items() if key in known}) for shard in data["shards"]
        )
        others = {key: value for key, value in data.items() if key not in KEYS}
        more = data.get("settings", {}), data.get("files", {}), data.get("tars", ""), others
        return Corpus(url, data["name"], data["media_type"], shards, *more)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{url}/corpus.json is damaged ({error}): {rebuild}") from None


def read_index(corpus: Corpus, shard: int, storage_options: dict[str, Any] | None = None) -> pa.Table:
    """The index of one shard, a table with the columns of INDEX_SCHEMA and
    `corpus.shards[shard].samples` rows; it may have more columns.

    Raises FileNotFoundError: the index file is missing. ValueError: it has another number of rows than `corpus.json`
    says, or lacks columns.
    """
    try:
        data = retry(read_file, corpus.index_url(shard), storage_options)
    except FileNotFoundError:
        raise no_index(corpus, shard) from None
    return parse_index(corpus, shard, data)


def files_at(url: str) -> dict[str, int | None]:
    """Names of the files in a folder and their bytes, where the store lists them; empty without a folder."""
    filesystem, root = fsspec.url_to_fs(url)
    try:
        entries = filesystem.ls(root, detail=True)  # glob would give meaning to characters of the folder's name
    except FileNotFoundError:
        return {}
    return {each["name"].rsplit("/", 1)[-1]: each.get("size") for each in entries if each["type"] != "directory"}


def is_index(url: str) -> bool | None:
    """Whether a Parquet file is a shard's index; None where it is missing or damaged."""
    try:
        with fsspec.open(url, "rb") as file:
            return is_index_schema(read_schema(file))
    except UNREADABLE:
        return None


def media_type_of(index: pa.Table) -> str:
    """The media type of a shard by its index: image or video; empty for an empty shard."""
    return ("image" if index.column("fps").null_count else "video") if index.num_rows else ""


def read_file(url: str, storage_options: dict[str, Any] | None = None) -> bytes:
    """A file's bytes."""
    with fsspec.open(url, "rb", **(storage_options or {})) as file:
        return file.read()


def no_index(corpus: Corpus, shard: int) -> MissingError:
    """The error where a shard's index is missing."""
    return MissingError(
        f"{corpus.index_url(shard)} is missing: rebuild it with `python -m sharding.verify {corpus.url} --repair`"
    )


def parse_index(corpus: Corpus, shard: int, data: bytes) -> pa.Table:
    """The index of one shard from its file's contents; raises ValueError as `read_index` does."""
    info, path = corpus.shards[shard], corpus.index_url(shard)
    try:
        table = read_table(data)
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}): rebuild it with `python -m sharding.verify {corpus.url} --repair`"
        ) from None
    if table.num_rows != info.samples or not is_index_schema(table.schema):
        raise UserError(
            f"{path} does not fit {corpus.url}/corpus.json ({table.num_rows} rows, {info.samples} expected): "
            f"check the corpus with `python -m sharding.verify {corpus.url}`"
        )
    return table
