"""`python -m sharding.index`: indexes webdataset shards that other tools wrote, in place, without repacking them."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from sharding.annotations import question_of
from sharding.output import local_form, write_text
from sharding.schema import INDEX_SCHEMA, Corpus, ShardInfo, join_url, read_corpus
from sharding.writing import counts, publish, sha256, write_index

PICTURES = ("jpg", "jpeg", "png", "webp")
CAPTION_KEYS = ("captions", "caption", "text", "TEXT")


def index_shards(url: str, fps: float = 0.0, progress: bool = False) -> Corpus:
    """Write an index beside every tar in `url` and `corpus.json`; returns the corpus.

    Samples are KEY.jpg (.png, .webp), or KEY.000.jpg, KEY.001.jpg ... for the frames of a clip, with KEY.txt or
    KEY.json for their texts (img2dataset's, video2dataset's and our own forms). fps: rate of clips' frames where
    their JSON does not say it.

    Raises:
        FileNotFoundError: no tars at `url`.
        ValueError: a tar is compressed or damaged, holds no pictures, or pictures and clips are mixed.
    """
    url = local_form(url)
    filesystem, root = fsspec.url_to_fs(url)
    names = sorted(path.rsplit("/", 1)[-1] for path in filesystem.glob(join_url(root, "*.tar")))
    if not names:
        raise FileNotFoundError(f"{url} holds no .tar files: nothing to index")
    shards, kinds = [], set()
    for name in tqdm(names, unit="shard", desc="indexing", disable=not progress):
        info, kind = index_shard(url, name, fps)
        shards.append(info)
        kinds.add(kind)
    if len(kinds) > 1:
        raise ValueError(f"{url} holds pictures and clips: a corpus has one kind, put them into folders of their own")
    known = known_corpus(url)
    name, settings = (known.name, known.settings) if known else (url.rstrip("/").rsplit("/", 1)[-1], {"indexed": True})
    corpus = Corpus(url, name, kinds.pop(), tuple(shards), settings)
    with scratch_for(url) as scratch:
        write_text(join_url(url, "corpus.json"), corpus.to_json(), scratch)
    return corpus


def known_corpus(url: str) -> Corpus | None:
    """What `corpus.json` says, where there is one already."""
    try:
        return read_corpus(url)
    except (FileNotFoundError, ValueError):
        return None


@contextmanager
def scratch_for(url: str) -> Iterator[Path]:
    """A folder for unfinished files, inside `url` where that is local, so that they can be renamed into place."""
    with tempfile.TemporaryDirectory(dir=None if "://" in url else url, prefix=".index-") as folder:
        yield Path(folder)


def index_shard(url: str, name: str, fps: float) -> tuple[ShardInfo, str]:
    """Index one tar; returns its line of corpus.json and whether it holds images or video."""
    with fsspec.open(join_url(url, name), "rb") as source:
        data = source.read()
    rows = list(sample_rows(data, name, fps))
    if not rows:
        raise ValueError(f"{join_url(url, name)} holds no pictures that could be indexed")
    index_name = name.removesuffix(".tar") + ".parquet"
    if is_foreign(join_url(url, index_name)):
        index_name = name.removesuffix(".tar") + ".index.parquet"
    with scratch_for(url) as scratch:
        index = scratch / index_name
        write_index(index, rows)
        info = ShardInfo(
            name,
            **counts(rows),
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            index_bytes=index.stat().st_size,
            index_sha256=sha256(index),
            index=index_name if index_name.endswith(".index.parquet") else "",
        )
        publish(index, join_url(url, index_name))
    return info, "image" if rows[0]["fps"] is None else "video"


def is_foreign(url: str) -> bool:
    """Whether another tool's file has this name, as the metadata that img2dataset writes beside each tar."""
    try:
        with fsspec.open(url, "rb") as file:
            return not pq.read_schema(file).equals(INDEX_SCHEMA)
    except FileNotFoundError:
        return False
    except pa.ArrowInvalid:
        return False  # damaged, whoever wrote it


def sample_rows(data: bytes, name: str, fps: float) -> Iterator[dict[str, Any]]:
    """Index rows of a tar's samples, in order."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            members = [member for member in tar if member.isfile()]
    except tarfile.TarError as error:
        raise ValueError(f"{name} is no plain tar ({error}); compressed shards cannot be read in part") from None
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in members:
        folder, _, file = member.name.rpartition("/")
        key, _, ending = file.partition(".")
        samples.setdefault(f"{folder}/{key}" if folder else key, {})[ending.lower()] = member
    for key, parts in samples.items():
        pictures = sorted((ending for ending in parts if ending.rsplit(".", 1)[-1] in PICTURES), key=frame_number)
        if pictures:
            yield sample_row(key, [parts[ending] for ending in pictures], texts_of(data, parts), data, fps)


def frame_number(ending: str) -> tuple[int, str]:
    """Order of a clip's frames: 999.jpg before 1000.jpg."""
    number = ending.split(".")[0]
    return int(number) if number.isdecimal() else -1, ending


def texts_of(data: bytes, parts: dict[str, tarfile.TarInfo]) -> dict[str, Any]:
    """What KEY.json and KEY.txt say; the JSON's captions count first."""
    found: dict[str, Any] = {}
    if "json" in parts:
        found = json.loads(content(data, parts["json"]))
    given = next((found[key] for key in CAPTION_KEYS if found.get(key)), None)
    if given is None and "txt" in parts:
        given = content(data, parts["txt"]).decode("utf-8", "replace").strip()
    found["captions"] = [given] if isinstance(given, str) else list(given or [])
    return found


def sample_row(
    key: str, frames: list[tarfile.TarInfo], found: dict[str, Any], data: bytes, fps: float
) -> dict[str, Any]:
    """One row of the index."""
    pictures = [content(data, frame) for frame in frames]
    with Image.open(io.BytesIO(pictures[0])) as image:
        width, height = image.size
    still = len(frames) == 1 and not found.get("fps") and not fps
    rate = None if still else float(found.get("fps") or fps or 1.0)
    times = [] if rate is None else found.get("frame_times") or [number / rate for number in range(len(frames))]
    questions = found.get("questions") or ([question_of(found, key)] if "question" in found else [])
    return {
        "key": key.replace(".", "_"),
        "offsets": [frame.offset_data for frame in frames],
        "sizes": [frame.size for frame in frames],
        "crc32s": [zlib.crc32(picture) for picture in pictures],
        "width": width,
        "height": height,
        "fps": rate,
        "duration": None if rate is None else found.get("duration") or len(frames) / rate,
        "frame_times": times,
        "source": str(found.get("source") or found.get("url") or key),
        "captions": found["captions"],
        "questions": questions,
        "choices": found.get("choices") or [],
    }


def content(data: bytes, member: tarfile.TarInfo) -> bytes:
    """A member's bytes."""
    return data[member.offset_data : member.offset_data + member.size]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        "python -m sharding.index", description="Index existing webdataset shards, local or remote, in place."
    )
    parser.add_argument("url", metavar="URL", help="folder or URL that holds the .tar files")
    parser.add_argument("--fps", type=float, default=0.0, help="rate of clips' frames where the shards do not say it")
    options = parser.parse_args(arguments)
    try:
        corpus = index_shards(options.url, options.fps, progress=True)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{options.url}: {len(corpus.shards)} shards, {corpus.samples} samples\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
