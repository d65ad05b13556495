"""Decoding: both back ends show the same picture, and one bad image harms no other."""

import io
import itertools

import cv2
import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from loaders.decode.choice import make_decoder
from loaders.decode.cpu import CpuDecoder
from loaders.decode.dali import DaliDecoder, header_faults
from loaders.decode.pixels import Scratch, decode_clip, jpeg_fraction
from loaders.samples import BadSampleError, Clip, Window

SIZE = 32
CPU = torch.device("cpu")


def picture(seed: int, height: int = 60, width: int = 80) -> bytes:
    small = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), np.uint8)
    pixels = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
    return simplejpeg.encode_jpeg(pixels, quality=92, colorspace="RGB", colorsubsampling="420")


def clips(count: int = 6, frames: int = 2) -> list[Clip]:
    windows = [Window(0, 0, 60, 80), Window(5, 9, 40, 44), Window(5, 9, 40, 44, flip=True), Window(20, 30, 32, 32)]
    return [
        Clip([picture(10 * number + frame) for frame in range(frames)], 60, 80, windows[number % 4])
        for number in range(count)
    ]


@pytest.fixture(params=["cpu", "dali"])
def decoder(request: pytest.FixtureRequest):
    decoder = make_decoder(request.param, SIZE, 2, antialias=False, device=CPU)
    yield decoder
    decoder.close()


@pytest.mark.parametrize("size", [SIZE, 96])
@pytest.mark.parametrize(
    ("backend", "antialias", "largest", "mean"),
    [
        ("cpu", False, 1, 0.05),  # OpenCV's kernel is PyTorch's
        ("cpu", True, 2, 0.3),  # Pillow also rounds between its two passes
        ("dali", False, 24, 1.0),  # DALI's kernel is Catmull-Rom's, the official one is sharper
        ("dali", True, 3, 0.3),  # which is PyTorch's with antialiasing
    ],
)
def test_bicubic_agrees_with_pytorch(backend: str, antialias: bool, largest: int, mean: float, size: int) -> None:
    """Differences in grey levels of 255 from the official transform, which resizes tensors of bytes."""
    batch = clips(4)
    decoder = CpuDecoder(size, 1, antialias) if backend == "cpu" else DaliDecoder(size, 1, antialias, None)
    frames, bad = decoder.decode(batch)
    decoder.close()
    assert not bad
    assert frames.shape == (4, 2, size, size, 3)
    for clip, number in itertools.product(range(4), range(2)):
        (top, left, height, width, flip), frame = batch[clip].window, frames[clip, number]
        crop = simplejpeg.decode_jpeg(batch[clip].jpegs[number], "RGB")[top : top + height, left : left + width]
        pixels = torch.from_numpy(crop.copy()).permute(2, 0, 1)[None].float()
        official = torch.nn.functional.interpolate(pixels, (size, size), mode="bicubic", antialias=antialias)
        official = official.flip(-1) if flip else official
        difference = (frame.float() - official.round().clamp(0, 255)[0].permute(1, 2, 0)).abs()
        assert difference.max() <= largest
        assert difference.mean() < mean


def test_a_picture_of_the_right_size_is_shown_as_it_is() -> None:
    decoder = CpuDecoder(60, 1)
    data = picture(1, 60, 60)
    whole, moved = Window(0, 0, 60, 60), Window(0, 0, 60, 60, flip=True)
    frames, bad = decoder.decode([Clip([data], 60, 60, whole), Clip([data], 60, 60, moved)])
    expected = simplejpeg.decode_jpeg(data, "RGB")
    assert not bad
    assert np.array_equal(frames[0, 0].numpy(), expected)
    assert np.array_equal(frames[1, 0].numpy(), expected[:, ::-1])


def test_foreign_pictures_are_shown_where_pillow_reads_them() -> None:
    pixels = simplejpeg.decode_jpeg(picture(2), "RGB")
    written = {}
    for form in ("PNG", "WEBP", "GIF", "BMP"):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, form, **({"lossless": True} if form == "WEBP" else {}))
        written[form] = file.getvalue()
    frames, bad = CpuDecoder(60, 2).decode([Clip([data], 60, 80, Window(0, 10, 60, 60)) for data in written.values()])
    assert not bad
    for number, form in enumerate(written):
        if form != "GIF":  # has 256 colours
            assert np.array_equal(frames[number, 0].numpy(), pixels[:, 10:70])


@pytest.mark.parametrize(
    "data",
    [b"", b"<html>", picture(3)[:200], picture(3)[:-500], picture(3, 40, 40)],
    ids=["empty", "html", "header", "cut", "other-size"],
)
def test_a_bad_frame_is_reported_and_the_others_are_shown(decoder, data: bytes) -> None:
    batch = clips()
    good, _ = decoder.decode(batch)
    batch[2] = Clip([batch[2].jpegs[0], data], 60, 80, batch[2].window)
    frames, bad = decoder.decode(batch)
    assert set(bad) == {2}
    others = [number for number in range(6) if number != 2]
    assert torch.equal(frames[others], good[others])
    again, bad = decoder.decode(clips())
    assert not bad
    assert torch.equal(again, good)


def test_repeated_frames_are_the_same_picture(decoder) -> None:
    data = picture(1)
    frames, _ = decoder.decode([Clip([data, data, data], 60, 80, Window(0, 0, 60, 80))])
    assert torch.equal(frames[0, 0], frames[0, 2])


def jpeg_kinds() -> dict[str, bytes]:
    """A picture as JPEGs of several makes."""
    image = Image.fromarray(simplejpeg.decode_jpeg(picture(2), "RGB"))
    thumbnail = io.BytesIO()
    image.resize((16, 12)).save(thumbnail, "JPEG")
    makes = {
        "baseline": {},
        "progressive": {"progressive": True},
        "restart markers": {"restart_marker_blocks": 3},
        "4:4:4": {"subsampling": 0},
        "with a thumbnail": {"exif": b"Exif\0\0" + thumbnail.getvalue()},
        "grey": {},
    }
    found = {}
    for name, options in makes.items():
        file = io.BytesIO()
        (image.convert("L") if name == "grey" else image).save(file, "JPEG", quality=90, **options)
        found[name] = file.getvalue()
    return found


@pytest.mark.parametrize("make", list(jpeg_kinds()))
def test_cut_jpegs_are_refused_and_trailing_bytes_are_not(decoder, make: str) -> None:
    """The same by both decoders, at a glance before DALI, by libjpeg-turbo on the CPU path."""
    whole = jpeg_kinds()[make]
    shown = Window(0, 0, 60, 80)
    fill = whole[:-2] + b"\xff\xff\xff\xd9"
    sound = [whole, whole + b"\0" * 40, whole + b"\xff", whole + b"trailing \xff\xd8", whole + whole, fill]
    frames, bad = decoder.decode([Clip([data], 60, 80, shown) for data in sound])
    assert not bad
    assert all(torch.equal(frame, frames[0]) for frame in frames)
    begin = whole.rfind(b"\xff\xda")
    lengths = [
        2,
        20,
        begin // 2,
        begin,
        begin + 14,
        *range(begin + 20, len(whole), 97),
        *range(len(whole) - 9, len(whole)),
    ]
    cut = [whole[:length] for length in lengths]
    cut += [whole[:-30] + b"\0" * 30, whole[:-30] + b"\xff" * 30]
    batch = [Clip([data], 60, 80, shown) for data in [*cut, whole]]
    assert set(header_faults(batch)) == set(range(len(cut)))  # nvJPEG never gets them
    for part in (batch, batch[:-1]):  # with one sound picture, and with none
        assert set(decoder.decode(part)[1]) == set(range(len(cut)))


def scene(seed: int, height: int, width: int) -> np.ndarray:
    """Something like a photo: detail of every size, less of the finer, and edges. RGB (H, W, 3)."""
    random = np.random.default_rng(seed)
    total = np.full((height, width, 3), 128, np.float32)
    for level in range(1, 9):
        coarse = random.normal(size=(max(2, height >> (9 - level)), max(2, width >> (9 - level)), 3))
        total += cv2.resize(coarse.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC) * 90 / 1.8**level
    for _ in range(20):
        top, left = random.integers(height), random.integers(width)
        total[top : top + random.integers(9, height), left : left + random.integers(9, width)] += random.normal(
            0, 30, 3
        )
    return np.clip(total, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("subsampling", ["444", "420", "Gray"])
@pytest.mark.parametrize(("size", "fraction"), [(64, 2), (32, 4), (16, 8)])
def test_a_large_jpeg_is_decoded_at_a_fraction_within_tolerance(size: int, fraction: int, subsampling: str) -> None:
    """With antialiasing; tolerance against decoding it whole, in grey levels of 255: mean 1, largest 20."""
    height, width = 301, 403
    for seed, flip in ((1, False), (2, True)):
        pixels = scene(seed, height, width)
        colorspace = "GRAY" if subsampling == "Gray" else "RGB"
        pixels = pixels[..., :1].copy() if subsampling == "Gray" else pixels
        data = simplejpeg.encode_jpeg(pixels, 92, colorspace, subsampling)
        clip = Clip([data], height, width, Window(13, 31, 270, 345, flip))
        assert jpeg_fraction(data, clip, size) == fraction
        shown = np.empty((1, size, size, 3), np.uint8)
        decode_clip(clip, shown, antialias=True, scratch=Scratch())
        whole = simplejpeg.decode_jpeg(data, "RGB")[13 : 13 + 270, 31 : 31 + 345]
        expected = np.asarray(Image.fromarray(whole).resize((size, size), Image.Resampling.BICUBIC)).astype(int)
        difference = np.abs(shown[0].astype(int) - (expected[:, ::-1] if flip else expected))
        assert difference.mean() <= 1
        assert difference.max() <= 20


def test_what_is_shown_large_or_without_antialiasing_is_decoded_whole() -> None:
    clip = Clip([picture(1, 300, 400)], 300, 400, Window(0, 0, 255, 400))
    assert jpeg_fraction(clip.jpegs[0], clip, 63) == 2
    assert jpeg_fraction(clip.jpegs[0], clip, 64) == 1
    colours_reduced_one_way = simplejpeg.encode_jpeg(scene(1, 300, 400), 92, "RGB", "422")
    assert jpeg_fraction(colours_reduced_one_way, clip, 16) == 1
    frames = {}
    for antialias in (False, True):
        frames[antialias] = np.empty((1, 100, 100, 3), np.uint8)
        decode_clip(clip, frames[antialias], antialias, Scratch())
    crop = simplejpeg.decode_jpeg(clip.jpegs[0], "RGB")[:255]
    assert np.array_equal(frames[False][0], cv2.resize(crop, (100, 100), interpolation=cv2.INTER_CUBIC))
    assert np.array_equal(
        frames[True][0], np.asarray(Image.fromarray(crop).resize((100, 100), Image.Resampling.BICUBIC))
    )


def test_a_fraction_of_a_picture_of_another_size_is_refused() -> None:
    clip = Clip([picture(1, 299, 400)], 300, 400, Window(0, 0, 300, 400))
    with pytest.raises(BadSampleError, match="400x299 pixels, the index has 400x300"):
        decode_clip(clip, np.empty((1, 32, 32, 3), np.uint8), antialias=True, scratch=Scratch())
    png = io.BytesIO()
    Image.fromarray(scene(1, 300, 400)).save(png, "PNG")
    out = np.empty((1, 32, 32, 3), np.uint8)
    decode_clip(clip._replace(jpegs=[png.getvalue()]), out, antialias=True, scratch=Scratch())
    expected = Image.fromarray(scene(1, 300, 400)).resize((32, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(out[0], np.asarray(expected))
