"""Facts of a JPEG without decoding it: where its picture begins, whether it ends, its orientation."""

from __future__ import annotations

import re
import struct
import warnings
from contextlib import suppress
from typing import Any

from PIL import Image

START_OF_IMAGE = b"\xff\xd8"
UPRIGHT = 1
TURNED = {2, 3, 4, 5, 6, 7, 8}  # EXIF's orientations of pictures that are not
SIDEWAYS = {5, 6, 7, 8}  # width and height change places

_ORIENTATION = 0x0112
_START_OF_SCAN = 0xDA
_FRAMES = {0xC0, 0xC1, 0xC2, 0xC9, 0xCA}  # frame headers of the kinds that are decoded
_EXIF = 0xE1
_EXIF_NAME = b"Exif\x00\x00"
_NO_LENGTH = {0x00, 0x01, *range(0xD0, 0xDA), 0xFF}  # markers without a length
_SEGMENT = struct.Struct(">BBH").unpack_from  # 0xFF, marker, length
_NEXT_BORDER = re.compile(b"\xff[\xd8\xd9]")  # the next image's start, or this one's end


def has_end(jpeg: bytes) -> bool:
    """Whether a JPEG's picture has its end-of-image marker.

    In compressed data 0xFF is followed by a zero, a restart marker or another 0xFF, so the first such marker after the
    picture's begin is its end. Bytes after it are ignored: a phone's Motion Photo has its clip there. The start
    of another image before it means that the marker is the other image's, and this one is cut.
    """
    border = _NEXT_BORDER.search(jpeg, read_header(jpeg)[0])
    return border is not None and border[0] != START_OF_IMAGE


def is_plain_jpeg(data: bytes) -> bool:
    """Whether it is a JPEG of grey or of three colours that is shown as it is stored."""
    if not data.startswith(START_OF_IMAGE):
        return False
    _, channels, exif = read_header(data)
    return channels in (1, 3) and (not exif or parse_orientation(exif) == UPRIGHT)


def orientation_of(jpeg: bytes) -> int:
    """EXIF's orientation of a JPEG, 1 to 8; 1 where it has none or a malformed one."""
    exif = read_header(jpeg)[2]
    return parse_orientation(exif) if exif else UPRIGHT


def parse_orientation(exif: bytes) -> int:
    """The orientation in an EXIF block, 1 to 8; 1 where it has none or is malformed."""
    block = Image.Exif()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        with suppress(Exception):  # the parser raises many kinds; what it read until then counts
            block.load(exif)
        return known_orientation(block)


def known_orientation(exif: Image.Exif) -> int:
    """The orientation among EXIF's tags, 1 to 8; 1 where it has none, or a value of another type."""
    try:
        value: Any = exif.get(_ORIENTATION, UPRIGHT)
        return int(value) if value in TURNED else UPRIGHT
    except Exception:  # tags are parsed on access
        return UPRIGHT


def read_header(jpeg: bytes) -> tuple[int, int, bytes]:
    """(first byte of a JPEG's first scan, or the length without one; its channels; its EXIF block, empty without one).

    Segments are skipped by their length: a thumbnail in one has its own markers.
    """
    position, last, channels, exif = 2, len(jpeg) - 10, 0, b""
    while position <= last:
        mark, marker, length = _SEGMENT(jpeg, position)
        if mark != 0xFF:
            position = jpeg.find(b"\xff", position)
            if position < 0:
                break
        elif marker in _NO_LENGTH:
            position += 1 if marker == 0xFF else 2
        elif marker == _START_OF_SCAN:
            return position + 2 + length, channels, exif
        else:
            if marker == _EXIF and jpeg.startswith(_EXIF_NAME, position + 4):
                begin = position + 4 + (len(_EXIF_NAME) if exif else 0)  # a large block comes in several segments
                exif += jpeg[begin : position + 2 + length]
            elif marker in _FRAMES:
                channels = jpeg[position + 9]
            position += 2 + length
    return len(jpeg), channels, exif
