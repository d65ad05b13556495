"""Image files to pixels as every viewer shows them: packing, indexing, verifying and the loader all decode by this."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from sharding.media.frames import MediaError
from sharding.media.jpeg import SIDEWAYS, START_OF_IMAGE, UPRIGHT, has_end, known_orientation, orientation_of

# Smallest size at which a JPEG is decoded, as a multiple of the stored size; HALVED: at half of its own size.
DETAIL, HALVED = 2.0, 1.5
BLOCK_PIXELS = 64  # of a JPEG that take one bit at least
MOST_PIXELS = 2 * 89_478_485  # that are decoded: Pillow's own limit, kept for all decoders

# libjpeg's warnings that pixels are missing or wrong. It shows something all the same, and so does Pillow. The other
# warnings ("extraneous bytes before marker", "Invalid SOS parameters", "Unknown Adobe color transform code") leave
# every pixel as it was written; phones, ImageNet and COCO have such files.
DAMAGES = ("premature end", "bad huffman code", "bad arithmetic code", "found marker")
TRUNCATED = "truncated JPEG: its picture has no end-of-image marker"
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF
POSTSCRIPT = (b"%!PS", b"\xc5\xd0\xd3\xc6")  # how files begin that Pillow gives to Ghostscript to run
# What Pillow does not read itself: EPS is run by Ghostscript, IPTC opens whatever file is inside, the others are left
# to programs of the system.
NOT_PICTURES = {"EPS", "IPTC", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}


class JpegHeader(NamedTuple):
    """The header of a JPEG by libjpeg-turbo: pixels as stored, before EXIF rotation."""

    width: int
    height: int
    is_colour: bool
    orientation: int

    @property
    def is_plain(self) -> bool:
        """Whether every decoder shows it right, whatever it makes of EXIF: an upright one in colour."""
        return self.is_colour and self.orientation == UPRIGHT

    @property
    def upright_size(self) -> tuple[int, int]:
        """(width, height) as it is shown."""
        return (self.height, self.width) if self.orientation in SIDEWAYS else (self.width, self.height)


class Picture(NamedTuple):
    """An upright picture."""

    pixels: np.ndarray  # RGB (H, W, 3) uint8, of a JPEG perhaps at a fraction of its size
    width: int  # of the whole picture
    height: int
    is_plain: bool  # its file can be stored as it is
    orientation: int  # as EXIF has it: how the file's pixels were turned


def decode_picture(data: bytes, size: int = 0) -> Picture:
    """Any image libjpeg-turbo or Pillow reads: upright, first frame, transparency over white, 16 bits to 8.

    size: its shorter side is to have so many pixels, at most; a JPEG is then decoded at a fraction where no detail is
    lost. 0: in full.

    Raises MediaError: the bytes are not a complete image, or its range of brightness is not known.
    """
    if not data:
        raise MediaError("empty file")
    header = read_jpeg_header(data)
    pixels = None if header is None else decode_jpeg(data, header, size)
    if header is None or pixels is None:
        return decode_by_pillow(data)
    return Picture(turned(pixels, header.orientation), *header.upright_size, header.is_plain, header.orientation)


def picture_size(data: bytes) -> tuple[int, int]:
    """(width, height) of an upright picture, by its header; damage behind that shows only in decoding.

    Raises MediaError: the bytes are not an image.
    """
    if not data:
        raise MediaError("empty file")
    header = read_jpeg_header(data)
    if header is not None:
        check_pixels(header.width, header.height)
        return header.upright_size
    with media_errors(), open_by_pillow(data) as image:
        return (image.height, image.width) if exif_orientation(image, data) in SIDEWAYS else image.size


def is_upright_jpeg(data: bytes) -> bool:
    """Whether it is a JPEG that any decoder shows as `decode_picture` does, by its header."""
    header = read_jpeg_header(data)
    return header is not None and header.orientation == UPRIGHT


def read_jpeg_header(data: bytes) -> JpegHeader | None:
    """The header of a JPEG; None for anything but a JPEG that libjpeg-turbo decodes to RGB."""
    if data[:2] != START_OF_IMAGE:
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except (ValueError, KeyError):  # an odd chroma subsampling, a warning; Pillow says whether there is a picture
        return None
    if colours not in ("YCbCr", "RGB", "Gray"):
        return None
    return JpegHeader(width, height, colours != "Gray", orientation_of(data))


def decode_jpeg(data: bytes, header: JpegHeader, size: int) -> np.ndarray | None:
    """RGB pixels (H, W, 3) of a JPEG as they are stored; None where libjpeg-turbo warns of what Pillow shows rightly.

    They are scaled down in the DCT to a half or less where that loses nothing at `size`; fractions above a half cost
    more than the whole.
    """
    shorter = min(header.width, header.height)
    least = 0
    if size:  # what is kept as it is, is decoded only to see whether it is damaged
        least = 1 if header.is_plain and shorter <= size else least_decoded(shorter, size)
    if header.width * header.height > MOST_PIXELS:
        check_enormous(header, least, len(data))
    try:
        return simplejpeg.decode_jpeg(data, "RGB", min_height=least, min_width=least, min_factor=2, fastdct=False)
    except ValueError as error:
        check_damage(data, str(error))
        return None


def check_damage(jpeg: bytes, warning: str) -> None:
    """Raise a MediaError if a JPEG is cut, or libjpeg's warning says that pixels are wrong."""
    if not has_end(jpeg):
        raise MediaError(TRUNCATED)
    if any(damage in warning.lower() for damage in DAMAGES):
        raise MediaError(f"broken JPEG: {warning}")


def check_enormous(header: JpegHeader, least: int, size: int) -> None:
    """Raise a MediaError for a JPEG with too few bytes for its pixels, or with too many pixels at `least`."""
    width, height = header.width, header.height
    if width * height > BLOCK_PIXELS * 8 * size:
        raise MediaError(f"truncated JPEG: {width}x{height} pixels need more than {size} bytes")
    fraction = max(n for n in (1, 2, 4, 8) if n == 1 or (least and min(width, height) >= n * least))
    check_pixels(width // fraction, height // fraction)


def check_pixels(width: int, height: int) -> None:
    """Raise a MediaError if there are too many: a header of a few bytes must not take all memory."""
    if width * height > MOST_PIXELS:
        raise MediaError(f"{width}x{height} pixels are more than the {MOST_PIXELS} that are decoded")


def least_decoded(shorter: int, size: int) -> int:
    """Pixels of the shorter side that are decoded at least, so that no detail of the stored size is lost.

    Decoding at a half is sharper, for its size, and cheaper than at the fractions below it.
    """
    return round((HALVED if shorter < 2 * DETAIL * size else DETAIL) * size)


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels (H, W, 3) as EXIF's orientation says; (W, H, 3) for those on their side."""
    if orientation in (2, 3):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4):
        pixels = pixels[::-1]
    if orientation in SIDEWAYS:
        pixels = pixels.transpose(1, 0, 2)
        pixels = pixels[:, ::-1] if orientation in (6, 7) else pixels
        pixels = pixels[::-1] if orientation in (7, 8) else pixels
    return pixels if orientation == UPRIGHT else np.ascontiguousarray(pixels)


def open_by_pillow(data: bytes) -> Image.Image:
    """An image whose pixels Pillow itself can decode; no other program is started and no other file opened."""
    if data.startswith(POSTSCRIPT):
        raise MediaError("a PostScript program, which is not executed: convert it to PNG")
    Image.preinit()
    Image.init()
    return Image.open(io.BytesIO(data), formats=[name for name in Image.ID if name not in NOT_PICTURES])


def decode_by_pillow(data: bytes) -> Picture:
    """Any image Pillow reads, in full."""
    with media_errors(), open_by_pillow(data) as image:
        if data[:2] == START_OF_IMAGE:
            check_jpeg(data)
        image.load()
        orientation = exif_orientation(image, data)
        pixels = turned(rgb_pixels(image, data), orientation)
        return Picture(pixels, pixels.shape[1], pixels.shape[0], False, orientation)


@contextmanager
def media_errors() -> Iterator[None]:
    """Within it Pillow does not warn, and what its parsers raise, of any kind, becomes a MediaError with the reason."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            yield
    except MediaError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MediaError(f"unreadable image: {str(error).split(' <')[0]}") from None
    except Exception as error:  # a parser of Pillow's that damaged bytes have led astray
        raise MediaError(f"unreadable image: damaged ({type(error).__name__}: {error})") from None


def check_jpeg(data: bytes) -> None:
    """Raise a MediaError for a cut or damaged JPEG, of which Pillow would show a part or something else."""
    if not has_end(data):
        raise MediaError(TRUNCATED)
    try:
        simplejpeg.decode_jpeg(data, "CMYK", min_height=1, min_width=1)
    except (ValueError, KeyError) as error:  # also that it has other colours; those were tried before
        check_damage(data, str(error))


def exif_orientation(image: Image.Image, data: bytes) -> int:
    """EXIF's orientation of an image, 1 to 8; XMP's, which Pillow falls back to, turns nothing in other viewers."""
    if image.format == "TIFF":  # Pillow turns it itself
        return UPRIGHT
    if image.format == "PNG" and b"eXIf" not in data and b"Raw profile type exif" not in data:
        return UPRIGHT  # else Pillow would look for it behind the pixels, and decode them
    for name in ("xmp", "XML:com.adobe.xmp"):
        image.info.pop(name, None)
    with suppress(Exception):  # a malformed block; the tags that were read until then count
        image.getexif()
    return known_orientation(image.getexif())


def rgb_pixels(image: Image.Image, data: bytes) -> np.ndarray:
    """RGB pixels (H, W, 3) uint8 of a loaded image: 16 bits to 8, transparency over white.

    Raises MediaError: its range of brightness is not known.
    """
    depth = data[24] if image.format == "PNG" else 8  # bits of a sample
    clear = image.info.get("transparency")
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return grey_of_16_bits(image, clear)
    if image.mode in ("I", "F"):
        return grey_of_wide_numbers(image)
    if depth == 16 and image.mode == "RGB" and clear is not None:
        return colours_of_16_bits(data)
    if depth < 8 and image.mode == "L" and isinstance(clear, int):
        image.info["transparency"] = clear * 255 // (2**depth - 1)  # Pillow has scaled the pixels only
    if clear is not None or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def grey_of_wide_numbers(image: Image.Image) -> np.ndarray:
    """RGB pixels (H, W, 3) uint8 of one channel of integers of 32 bits or floats, as programs write what fits in fewer.

    Raises MediaError: by its values, it is neither of 8 nor of 16 bits.
    """
    whole = image.mode == "I"
    least, most = np.asarray(image).min(), np.asarray(image).max()
    if least >= 0 and most <= 255 and (whole or most > 1):  # floats to 1 may be black in 8 bits or white
        grey = np.asarray(image.convert("L"))
    elif whole and least >= 0 and most <= 65535:
        grey = (np.asarray(image) >> 8).astype(np.uint8)
    else:
        kind = "integers of 32 bits, or with a sign" if whole else "floating-point numbers"
        raise MediaError(f"its pixels are {kind}, without a stated range: convert it to 8 or 16 bits")
    return np.repeat(grey[..., None], 3, axis=2)


def grey_of_16_bits(image: Image.Image, clear: int | None) -> np.ndarray:
    """RGB pixels (H, W, 3) uint8 of one channel of up to 16 bits; `clear`: the value that is transparent."""
    values: np.ndarray = np.asarray(image).astype(np.uint16)
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    bits = tags.get(BITS_PER_SAMPLE, (16,))[0]
    grey: np.ndarray = (values // 2 ** (bits - 8)).astype(np.uint8)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        grey = 255 - grey
    if clear is not None:
        grey[values == clear] = 255
    return np.repeat(grey[..., None], 3, axis=2)


def colours_of_16_bits(png: bytes) -> np.ndarray:
    """RGB pixels (H, W, 3) uint8 of a PNG with one transparent colour, of 16 bits, of which Pillow reads 8."""
    pixels = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)  # BGRA
    if pixels is None or pixels.dtype != np.uint16 or pixels.shape[2:] != (4,):
        raise MediaError("unreadable image: a damaged PNG of 16 bits")
    shown = (pixels[..., 2::-1] // 256).astype(np.uint8)
    shown[pixels[..., 3] == 0] = 255
    return shown
