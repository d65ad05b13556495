"""Photos of noise and their annotations, packed in this process or by the command."""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from sharding.build import build_corpus
from sharding.shards.schema import Corpus


def write_photos(root: Path, count: int, grain: tuple[int, int], size: tuple[int, int] | None = None) -> Path:
    """`count` photos of `grain` pixels, enlarged to `size`, in `root`/photos, and photos.json; returns their folder."""
    folder = root / "photos"
    folder.mkdir()
    for number in range(count):
        photo = Image.fromarray(np.random.default_rng(number).integers(0, 255, (*grain[::-1], 3), np.uint8))
        (photo.resize(size) if size else photo).save(folder / f"{number}.jpg", quality=85)
    records = [{"image": f"{number}.jpg", "caption": [f"photo {number}", "noise"]} for number in range(count)]
    (root / "photos.json").write_text(json.dumps(records))
    return folder


def pack(photos: Path, output: Path | str, **settings) -> Corpus:
    """The corpus of `write_photos`, of 48 pixels."""
    options = {"media_root": str(photos), "size": 48, "workers": 1, "name": "x"} | settings
    return build_corpus([str(photos.parent / "photos.json")], media_type="image", output=str(output), **options)


def build_command(photos: Path, output: Path | str, *flags: str, root: str = "") -> list[str]:
    """The command that packs the same corpus, with one process per core."""
    words = [sys.executable, "-m", "sharding.build", "--annotations", str(photos.parent / "photos.json")]
    words += ["--media-root", root or str(photos), "--media-type", "image", "--output", str(output)]
    return [*words, "--size", "48", *flags]


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
