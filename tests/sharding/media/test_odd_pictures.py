"""Pictures are packed as every viewer shows them; what is cut, or tells no range, is refused by name."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from pictures import TURNS, photo, saved
from PIL import Image

from sharding.media.frames import MediaError
from sharding.media.image import pack_image
from sharding.media.jpeg import has_end, orientation_of
from sharding.media.picture import decode_picture
from sharding.shards.checks import undecodable
from sharding.shards.foreign import picture_of


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body


def with_segment(jpeg: bytes, marker: int, body: bytes) -> bytes:
    return jpeg[:2] + segment(marker, body) + jpeg[2:]


def exif(*tags: tuple[int, int, int, bytes], begin: bytes = b"II*\0\x08\0\0\0") -> bytes:
    """A block of (tag, type, count, four bytes of value or offset)."""
    entries = b"".join(struct.pack("<HHI", tag, kind, count) + value for tag, kind, count, value in tags)
    return b"Exif\0\0" + begin + struct.pack("<H", len(tags)) + entries + bytes(4)


def sampled(luma: int, chroma: int = 0x11) -> bytes:
    """A grey scale of three channels with these sampling factors: one MCU of zero coefficients after another."""
    data = bytearray(saved(Image.new("RGB", (96, 96), (128, 128, 128)), subsampling=0))
    frame = data.index(b"\xff\xc0")
    scan = data.index(b"\xff\xda")
    table = b"\0" + bytes([1] + [0] * 15) + b"\0"  # code 0 is symbol 0: no difference, end of block
    data[frame + 11], data[frame + 14], data[frame + 17] = luma, chroma, chroma
    tables = segment(0xC4, table) + segment(0xC4, b"\x10" + table[1:])
    header = segment(0xDA, bytes([3, 1, 0, 2, 0, 3, 0, 0, 63, 0]))
    body = bytes(data[2 : data.index(b"\xff\xc4")])
    assert scan > frame
    return b"\xff\xd8" + body + tables + header + b"\0" * 2000 + b"\xff\xd9"


def stored(data: bytes, size: int = 4096) -> np.ndarray:
    return simplejpeg.decode_jpeg(pack_image(data, size, 98).jpegs[0], "RGB").astype(int)


def assert_shown(data: bytes, expected: np.ndarray, tolerance: float = 3) -> None:
    assert np.abs(stored(data) - expected.astype(int)).mean() <= tolerance
    height, width = expected.shape[:2]
    assert undecodable(data, width, height) == ""
    place = picture_of(data, 0)
    assert (place.width, place.height, place.broken) == (width, height, "")
    assert min(pack_image(data, 40, 90).width, pack_image(data, 40, 90).height) == min(40, width, height)


PLAIN, PROGRESSIVE = saved(photo(96, 128)), saved(photo(96, 128), progressive=True)
THUMBNAIL = exif() + saved(photo(12, 16))
SCAN = PLAIN.index(b"\xff\xda")


SHOWN = {
    "tail": PLAIN + bytes(range(256)) * 100,
    "zeros": PLAIN + bytes(10_000),
    "motion photo": PLAIN + b"\0\0\0\x18ftypmp42" + b"\xff\xd8\xff\xd9" * 2000 + b"clip" * 5000,
    "two JPEGs": PLAIN + PROGRESSIVE,
    "progressive": PROGRESSIVE + b"\n" * 9000,
    "thumbnail": with_segment(PLAIN, 0xE1, THUMBNAIL) + bytes(5000),
    "fill": PLAIN[:-2] + b"\xff\xff\xff\xd9" + b"fill" * 2000,
    "restarts": saved(photo(96, 128), restart_marker_blocks=3) + b"x" * 9000,
    "extraneous": PLAIN[:-2] + b"\x12\x34" + PLAIN[-2:],
    "3000 extraneous": PLAIN[:-2] + b"\x12" * 3000 + PLAIN[-2:],
    "extraneous before DQT": PLAIN[: SCAN - 2].replace(b"\xff\xdb", b"\x01\x02\xff\xdb", 1) + PLAIN[SCAN - 2 :],
    "bad SOS": PLAIN[: SCAN + 11] + b"\0\0\0" + PLAIN[SCAN + 14 :],
    "Adobe 5": with_segment(PLAIN, 0xEE, b"Adobe\0\x64\0\0\0\0\x05"),
    "JFIF 7": with_segment(PLAIN, 0xE0, b"JFIF\0\x07\x01\0\0\x01\0\x01\0\0"),
    "animated": saved(Image.linear_gradient("L"), "GIF", save_all=True, append_images=[Image.new("L", (256, 256))]),
}


@pytest.mark.parametrize("kind", SHOWN)
def test_what_viewers_show_without_a_wrong_pixel_is_packed(kind: str) -> None:
    with Image.open(io.BytesIO(SHOWN[kind])) as image:
        assert_shown(SHOWN[kind], np.asarray(image.convert("RGB")))


CUT = {
    "no EOI": PLAIN[:-2],
    "half": PLAIN[: len(PLAIN) // 2],
    "half and zeros": PLAIN[: len(PLAIN) // 2] + bytes(9000),
    "before another": PLAIN[: len(PLAIN) // 2] + PLAIN,
    "progressive before another": PROGRESSIVE[: len(PROGRESSIVE) // 2] + PLAIN,
    "progressive": PROGRESSIVE[: -len(PROGRESSIVE) // 3],
    "thumbnail": with_segment(PLAIN, 0xE1, THUMBNAIL)[:-400],
    "grey": saved(photo(96, 128).convert("L"))[:-300],
    "grey and zeros": saved(photo(96, 128).convert("L"))[:-300] + bytes(9000),
    "CMYK": saved(photo(96, 128).convert("CMYK"))[:-300],
    "turned, before another": with_segment(PLAIN, 0xE1, exif((0x112, 3, 1, b"\6\0\0\0")))[:-300] + PLAIN,
}


@pytest.mark.parametrize("kind", CUT)
def test_a_jpeg_that_is_cut_is_refused_by_name(kind: str) -> None:
    with pytest.raises(MediaError, match=r"truncated JPEG|premature end"):
        pack_image(CUT[kind], 4096, 90)
    assert undecodable(CUT[kind], 128, 96)


@pytest.mark.parametrize("data", [b"", b"<html>404</html>", b"\xff\xd8\xff\xe0", saved(photo(), "PNG")[:-60]])
def test_what_is_no_picture_is_refused_by_name(data: bytes) -> None:
    with pytest.raises(MediaError, match=r"empty file|unreadable image"):
        pack_image(data, 40, 90)


def test_the_end_that_counts_is_the_pictures_own() -> None:
    assert has_end(PLAIN + PROGRESSIVE)
    assert not has_end(PLAIN[: len(PLAIN) // 2] + PROGRESSIVE)
    assert not has_end(PLAIN[:SCAN])
    assert not has_end(b"")


@pytest.mark.parametrize(
    ("luma", "chroma"), [(0x14, 0x11), (0x31, 0x11), (0x41, 0x11), (0x42, 0x11), (0x11, 0x21), (0x22, 0x12)]
)
def test_any_chroma_subsampling_is_shown(luma: int, chroma: int) -> None:
    data = sampled(luma, chroma)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert("RGB"))
    assert_shown(data, expected)
    assert simplejpeg.decode_jpeg_header(pack_image(data, 4096, 90).jpegs[0])  # what is stored is a plain JPEG


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_pictures_are_turned_as_their_exif_says(form: str, orientation: int) -> None:
    block = Image.Exif()
    block[0x0112] = orientation
    data = saved(photo(96, 128), form, exif=block)
    image = photo(96, 128).transpose(TURNS[orientation]) if orientation > 1 else photo(96, 128)
    assert_shown(data, np.asarray(image), 8)


ON_ITS_SIDE = (0x112, 3, 1, b"\6\0\0\0")


@pytest.mark.parametrize(
    ("block", "orientation"),
    [
        (exif(ON_ITS_SIDE), 6),
        (exif(ON_ITS_SIDE, (0x11A, 2, 4, b"72\0\0"), (0x128, 2, 2, b"in\0\0")), 6),
        (exif(ON_ITS_SIDE, (0x11A, 5, 1, b"\xff\xff\xff\x7f")), 6),
        (exif(ON_ITS_SIDE, (0x8769, 4, 1, b"\x08\0\0\0")), 6),
        (exif(ON_ITS_SIDE, (0x8825, 4, 1, b"\xf0\xff\xff\xff")), 6),
        (exif((0x112, 1, 1, b"\6\0\0\0")), 1),
        (exif((0x112, 4, 1, b"\6\0\0\0")), 6),
        (exif((0x112, 2, 2, b"6\0\0\0")), 1),
        (exif((0x112, 3, 2, b"\6\0\6\0")), 6),
        (exif((0x112, 3, 1, b"\x09\0\0\0")), 1),
        (exif((0x112, 3, 1, b"\0\0\0\0")), 1),
        (exif((0x112, 7, 4, b"abcd")), 1),
        (exif(ON_ITS_SIDE, begin=b"II*\0\xff\xff\xff\xff"), 1),
        (exif(ON_ITS_SIDE, begin=b"XX*\0\x08\0\0\0"), 1),
        (exif(ON_ITS_SIDE)[:20], 1),
        (b"Exif\0\0", 1),
        (b"Exif\0\0" + bytes(40), 1),
    ],
)
def test_a_malformed_exif_block_costs_no_picture(block: bytes, orientation: int) -> None:
    for image in (photo(96, 128), photo(96, 128).convert("L")):
        data = with_segment(saved(image), 0xE1, block)
        assert orientation_of(data) == orientation
        turned = image.transpose(Image.Transpose.ROTATE_270) if orientation == 6 else image
        assert_shown(data, np.asarray(turned.convert("RGB")))


def test_only_exif_turns_a_picture() -> None:
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    for data in (
        saved(photo(96, 128), xmp=xmp),
        with_segment(saved(photo(96, 128), xmp=xmp), 0xE1, exif((0x128, 3, 1, b"\2\0\0\0"))),
        saved(photo(96, 128), "WEBP", xmp=xmp),
    ):
        assert stored(data).shape == (96, 128, 3)


def png(values: np.ndarray, depth: int, colours: int, transparent: bytes) -> bytes:
    """A PNG of any depth with one transparent colour."""
    rows = []
    for row in values.reshape(len(values), -1):
        bits = "".join(format(int(value), f"0{depth}b") for value in row)
        rows.append(b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big"))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", values.shape[1], len(values), depth, colours, 0, 0, 0))]
    chunks += [(b"tRNS", transparent), (b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b"")]
    made = [
        struct.pack(">I", len(body)) + name + body + zlib.crc32(name + body).to_bytes(4, "big") for name, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(made)


def test_a_transparent_value_is_compared_with_all_its_bits() -> None:
    grey = np.full((16, 16), 1000)
    grey[:, 8:] = 1001  # the same as 1000 in 8 bits
    shown = decode_picture(png(grey, 16, 0, struct.pack(">H", 1001))).pixels
    assert (shown[:, :8] == 3).all()
    assert (shown[:, 8:] == 255).all()
    colour = np.stack([grey, grey * 2, grey * 3], axis=2)
    shown = decode_picture(png(colour, 16, 2, struct.pack(">HHH", 1001, 2002, 3003))).pixels
    assert (shown[:, :8] == (3, 7, 11)).all()
    assert (shown[:, 8:] == 255).all()
    few = np.full((16, 16), 1)
    few[:, 8:] = 2
    shown = decode_picture(png(few, 2, 0, struct.pack(">H", 1))).pixels
    assert (shown[:, :8] == 255).all()
    assert (shown[:, 8:] == 170).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "RGBX"])
def test_every_colour_mode_is_shown_over_white(mode: str) -> None:
    image = photo(96, 128).quantize(4) if mode == "P" else photo(96, 128).convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    over = (
        Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")) if "A" in mode else image
    )
    form = "PNG" if mode in ("1", "L", "LA", "P", "RGB", "RGBA") else "TIFF"
    data = saved(image, form)
    if mode == "LAB":
        assert stored(data).shape == (96, 128, 3)
    else:
        assert_shown(data, np.asarray(over.convert("RGB")), 8)


def test_sixteen_bits_become_eight_whatever_the_file() -> None:
    values = np.arange(96 * 128, dtype=np.uint16).reshape(96, 128) * 5
    expected = np.repeat((values >> 8)[..., None], 3, axis=2)
    image = Image.fromarray(values)
    for data in (saved(image, "PNG"), saved(image, "TIFF"), saved(image, "TIFF", compression="tiff_lzw")):
        assert_shown(data, expected)
    assert_shown(saved(image, "TIFF", tiffinfo={262: 0}), 255 - expected)  # white is zero
    portable = b"P5 128 96 65535\n" + values.astype(">u2").tobytes()
    assert_shown(portable, expected)


@pytest.mark.parametrize(
    "values",
    [
        np.full((8, 8), 200 << 24, np.int64).astype(np.int32),
        np.full((8, 8), 70_000, np.int32),
        np.full((8, 8), -5, np.int32),
        np.full((8, 8), 0.5, np.float32),
        np.full((8, 8), 300.0, np.float32),
        np.full((8, 8), np.nan, np.float32),
    ],
)
def test_numbers_without_a_range_are_refused_by_name(values: np.ndarray) -> None:
    with pytest.raises(MediaError, match="without a stated range: convert it to 8 or 16 bits"):
        pack_image(saved(Image.fromarray(values), "TIFF"), 40, 90)


@pytest.mark.parametrize(("kind", "bits"), [(np.int32, 8), (np.int32, 16), (np.float32, 8)])
def test_wide_numbers_are_shown_where_they_fit_in_fewer_bits(kind: type, bits: int) -> None:
    values = np.arange(96 * 128).reshape(96, 128) * (2**bits - 1) // (96 * 128)
    expected = np.repeat((values >> (bits - 8))[..., None], 3, axis=2)
    for form in ("TIFF", "IM"):
        assert_shown(saved(Image.fromarray(values.astype(kind)), form), expected)


def postscript() -> bytes:
    return saved(photo(96, 128), "EPS")


def dos_postscript() -> bytes:
    return struct.pack("<7IH", 0xC6D3D0C5, 30, len(postscript()), 0, 0, 0, 0, 0xFFFF) + postscript()


@pytest.mark.parametrize("made", [postscript, dos_postscript])
def test_a_picture_starts_no_program(
    made: Callable[[], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # it has not looked for it yet
    with pytest.raises(MediaError, match="a PostScript program, which is not executed"):
        pack_image(made(), 40, 90)
    assert "a PostScript program" in picture_of(made(), 0).broken
    assert not (tmp_path / "started").exists()


def test_files_for_other_programs_are_no_pictures() -> None:
    """IPTC holds any file that Pillow reads, PostScript too, and opens it."""
    fields = [(3, 60, b"\1\0"), (3, 20, b"\0\x40"), (3, 30, b"\0\x40"), (3, 120, b"\5")]
    block = b"".join(bytes([0x1C, *tag]) + struct.pack(">H", len(body)) + body for *tag, body in fields)
    with pytest.raises(MediaError, match="cannot identify image file"):
        pack_image(block, 40, 90)


def test_a_header_of_enormous_pixels_is_refused_by_name() -> None:
    frame = PLAIN.index(b"\xff\xc0")
    huge = PLAIN[: frame + 5] + struct.pack(">HH", 60_000, 60_000) + PLAIN[frame + 9 :]
    for data in (
        huge,
        saved(photo(96, 128).convert("L")).replace(struct.pack(">HH", 96, 128), struct.pack(">HH", 60_000, 60_000)),
    ):
        for size in (224, 50_000):
            with pytest.raises(MediaError, match="60000x60000 pixels need more than"):
                pack_image(data, size, 90)
        with pytest.raises(MediaError, match="60000x60000 pixels are more than"):
            pack_image(data + bytes(8_000_000), 50_000, 90)
        assert "pixels are more than" in picture_of(data, 0).broken
    image = bytearray(saved(photo(96, 128), "PNG"))
    image[16:24] = struct.pack(">II", 60_000, 60_000)
    image[29:33] = zlib.crc32(image[12:29]).to_bytes(4, "big")
    with pytest.raises(MediaError, match="exceeds limit"):
        pack_image(bytes(image), 224, 90)


def test_twelve_bits_are_refused_by_name() -> None:
    frame = PLAIN.index(b"\xff\xc0")
    with pytest.raises(MediaError, match=r"unreadable image|broken JPEG"):
        pack_image(PLAIN[: frame + 1] + b"\xc1" + PLAIN[frame + 2 : frame + 4] + b"\x0c" + PLAIN[frame + 5 :], 40, 90)
