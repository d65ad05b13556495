"""Damaged pictures: packed as Pillow shows them or refused by name, never a crash; the loader agrees with packing."""

import io
import json
import os
import subprocess
import sys
import warnings
import zlib
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from pictures import TURNS, photo, saved
from PIL import Image

from loaders.decode.pixels import Scratch, decode_clip
from loaders.samples import BadSampleError, Clip, Window
from sharding.media.frames import MediaError
from sharding.media.image import pack_image
from sharding.media.picture import decode_picture

NAMED = ("unreadable image: ", "truncated JPEG", "broken JPEG: ", "its pixels are ", "empty file")
DAMAGES = ("truncated JPEG", "broken JPEG: ")  # for which a picture is refused that Pillow shows


def exif_block(orientation: int = 6) -> bytes:
    """A block as cameras write them, with tags of all types and a second directory."""
    exif = Image.Exif()
    exif[0x010F], exif[0x0110], exif[0x0112], exif[0x011A], exif[0x0128] = "Maker", "Model 7", orientation, 72.0, 2
    exif.get_ifd(0x8769).update({0x829A: 0.01, 0x9003: "2026:01:01 00:00:00", 0xA002: 64})
    exif.get_ifd(0x8825).update({1: "N", 2: (1.0, 2.0, 3.0)})
    return exif.tobytes()


def sources() -> dict[str, bytes]:
    """A picture of each kind."""
    image, alpha = photo(), photo().convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(image.size))
    deep = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 256)
    return {
        "baseline": saved(image),
        "progressive": saved(image, progressive=True),
        "with EXIF": saved(image, exif=exif_block()),
        "grey": saved(image.convert("L")),
        "CMYK": saved(image.convert("CMYK")),
        "png": saved(image, "PNG"),
        "png of 16 bits": saved(deep, "PNG"),
        "palette": saved(image.quantize(32), "PNG", transparency=3),
        "alpha": saved(alpha, "PNG", exif=exif_block(3)),
    }


def mutated(data: bytes, random: np.random.Generator) -> bytes:
    """One to three bits turned, bytes left out or put in, or the end cut off."""
    changed = bytearray(data)
    for _ in range(int(random.integers(1, 4))):
        place = int(random.integers(len(changed)))
        kind = int(random.integers(8))
        if kind < 4:
            changed[place] ^= 1 << int(random.integers(8))
        elif kind == 4:
            changed[place] = int(random.integers(256))
        elif kind == 5:
            del changed[place : place + int(random.integers(1, 30))]
        elif kind == 6:
            changed[place:place] = random.bytes(int(random.integers(1, 30)))
        else:
            del changed[max(place, 1) :]
        if not changed:
            break
    return bytes(changed)


def with_checksums(png: bytes) -> bytes:
    """A PNG whose chunks have the CRC-32 of what they hold now: its damage goes deeper than the first check."""
    found, place = png[:8], 8
    while place + 8 <= len(png):
        body = png[place + 4 : place + 8 + int.from_bytes(png[place : place + 4], "big")]
        found += png[place : place + 4] + body + zlib.crc32(body).to_bytes(4, "big")
        place += 8 + len(body)
    return found


def mutants(kind: str, count: int) -> list[bytes]:
    """`count` damaged pictures of a kind, or of a rotated photo with damaged EXIF; the same ones on every run."""
    random = np.random.default_rng(len(kind))
    if kind != "EXIF":
        damaged = [mutated(sources()[kind], random) for _ in range(count)]
        return [with_checksums(data) if data[:4] == b"\x89PNG" and n % 4 else data for n, data in enumerate(damaged)]
    bare, found = sources()["baseline"], []
    for _ in range(count):
        block = mutated(exif_block(int(random.integers(1, 10))), random)[:60000]
        found.append(bare[:2] + b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block + bare[2:])
    return found


def shown_by_pillow(data: bytes) -> np.ndarray | None:
    """RGB pixels (H, W, 3), turned by EXIF, 16 bits to 8, over white; None where Pillow refuses it."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            try:
                orientation = image.getexif().get(0x0112, 1)
            except Exception:  # an EXIF block that Pillow does not read
                orientation = image.getexif().get(0x0112, 1)
            if isinstance(orientation, int | float) and orientation in TURNS:
                image = image.transpose(TURNS[int(orientation)])
            if image.mode.startswith("I"):
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if "transparency" in image.info or "A" in image.mode:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.asarray(image.convert("RGB"))
    except Exception:
        return None


def loaded(data: bytes, height: int, width: int) -> np.ndarray | None:
    """What the loader shows (32, 32, 3); None where it refuses it."""
    out = np.empty((1, 32, 32, 3), np.uint8)
    try:
        decode_clip(Clip([data], height, width, Window(0, 0, height, width)), out, False, Scratch())
    except BadSampleError:
        return None
    return out[0]


def judged(data: bytes) -> tuple[str, str]:
    """(what became of a picture; what is wrong with that, or nothing)."""
    theirs = shown_by_pillow(data)
    try:
        ours = decode_picture(data).pixels
        packed = pack_image(data, 4096, 90)
    except MediaError as error:
        reason = str(error)
        if not reason.startswith(NAMED):
            return "refused", f"no reason: {reason}"
        if theirs is not None and loaded(data, *theirs.shape[:2]) is not None:
            return "refused", "the loader shows it"
        if theirs is not None and not reason.startswith(DAMAGES):
            return "refused", f"Pillow shows it: {reason}"
        return "refused", ""
    if theirs is None:
        return "shown, not by Pillow", ""
    if theirs.shape != ours.shape or np.abs(theirs.astype(int) - ours).max() > 2:
        return "shown", "other pixels than Pillow's"
    if (packed.height, packed.width) != ours.shape[:2]:
        return "shown", "packed at another size"
    seen = loaded(data, *ours.shape[:2])
    if seen is None or np.abs(seen.astype(int) - cv2.resize(ours, (32, 32), interpolation=cv2.INTER_CUBIC)).max() > 2:
        return "shown", "the loader shows something else"
    return "shown", ""


def judge(kind: str, count: int) -> dict[str, dict[str, int]]:
    """How many came to what, and what was wrong with the first of a kind."""
    warnings.simplefilter("ignore")
    outcomes: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    for number, data in enumerate(mutants(kind, count)):
        try:
            outcome, fault = judged(data)
        except Exception as error:
            outcome, fault = "raised", f"number {number}: {type(error).__name__}: {error}"
        outcomes[outcome] += 1
        faults += Counter([fault] if fault else [])
    return {"outcomes": dict(outcomes), "faults": dict(faults)}


def run(kind: str, count: int) -> dict[str, dict[str, int]]:
    """`judge` in a process of its own: an abort or a hang is that process's."""
    command = [sys.executable, str(Path(__file__)), kind, str(count)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", ["EXIF", *sources()])
@pytest.mark.parametrize("count", [40, pytest.param(300, marks=pytest.mark.slow)])
def test_damaged_pictures(kind: str, count: int) -> None:
    count *= 10 if kind == "EXIF" and count > 40 else 1
    found = run(kind, count)
    assert not found["faults"], found
    assert sum(found["outcomes"].values()) == count
    assert kind != "EXIF" or "refused" not in found["outcomes"]  # its pixels are sound


if __name__ == "__main__":
    json.dump(judge(sys.argv[1], int(sys.argv[2])), sys.stdout)
