"""Pictures lose no detail when they shrink, and clips keep their timing."""

import io
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest
import simplejpeg
from pictures import photo, saved
from PIL import Image

from sharding.media.frames import MediaError, stored_size
from sharding.media.image import pack_image, shrink
from sharding.media.video import pack_video


def clip(times: list[float], size: tuple[int, int] = (64, 48), codec: str = "libx264", form: str = "mp4") -> bytes:
    """Frames shown from the given seconds on; frame i has brightness 20 + 10 i."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form) as container:
        stream = container.add_stream(codec, rate=25, options={"bf": "0"})
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for number, seconds in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), 20 + 10 * number, np.uint8), "rgb24")
            frame.pts, frame.time_base = round(seconds * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def numbers(data: bytes, fps: float, max_frames: int = 0) -> list[int]:
    """Which source frames were stored."""
    jpegs = pack_video(data, 48, 95, fps, max_frames).jpegs
    return [round((simplejpeg.decode_jpeg(jpeg, "RGB").mean() - 20) / 10) for jpeg in jpegs]


def test_frames_are_chosen_by_time() -> None:
    steady = clip([number / 10 for number in range(20)])
    assert numbers(steady, 10) == list(range(20))
    assert numbers(steady, 2) == [0, 5, 10, 15]
    assert numbers(steady, 2, max_frames=3) == [0, 5, 10]
    packed = pack_video(steady, 48, 90, 2, 0)
    assert packed.times == (0.0, 0.5, 1.0, 1.5)
    assert packed.duration == pytest.approx(2.0, abs=0.1)


def test_a_variable_rate_keeps_its_timing() -> None:
    uneven = clip([0.0, 0.1, 0.2, 1.2, 1.3, 2.9])
    assert numbers(uneven, 2) == [0, 2, 2, 4, 4, 4]  # the last one is over at 2.94
    assert numbers(uneven, 5)[-3:] == [4, 4, 4]


def test_a_late_start_and_a_single_frame() -> None:
    assert numbers(clip([5.0, 5.5, 6.0]), 2) == [0, 1, 2]
    assert numbers(clip([0.0]), 2) == [0]


@pytest.mark.parametrize("data", [b"", b"no video", clip([0.0, 0.5])[:300]], ids=["empty", "text", "header"])
def test_broken_clips_are_refused(data: bytes) -> None:
    with pytest.raises(MediaError):
        pack_video(data, 48, 90, 2, 0)


def natural(width: int, height: int) -> np.ndarray:
    """Noise with the spectrum of a photo (amplitude 1 / frequency) and a hard edge."""
    random = np.random.default_rng(4)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    spectrum = np.fft.rfft2(random.normal(size=(3, height, width))) / frequency
    pixels = np.fft.irfft2(spectrum, (height, width)).transpose(1, 2, 0)
    pixels = 128 + pixels / pixels.std() * 40
    pixels[:, : width // 3] += 60
    return np.clip(pixels, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("size", [290, 256, 241, 239, 200, 160, 150, 129, 117, 114, 90, 75, 40])
def test_shrinking_is_as_close_to_lanczos_as_the_area_filter(size: int) -> None:
    pixels = natural(400, 300)
    width, height = stored_size(400, 300, size)
    assert height == size
    shrunk = shrink(pixels, width, height)
    assert shrunk.shape == (height, width, 3)
    best = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)).astype(int)
    area = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    assert np.sqrt(((shrunk - best) ** 2).mean()) <= 1.02 * np.sqrt(((area - best) ** 2).mean())


def test_a_small_jpeg_keeps_its_bytes_and_a_large_one_shrinks() -> None:
    data = saved(photo(60, 80), quality=80)
    assert pack_image(data, 60, 90).jpegs == [data]
    assert pack_image(data, 30, 90).height == 30
    wide = pack_image(saved(photo(10, 2000)), 64, 90)
    assert (wide.width, wide.height) == (2000, 10)


def test_the_shape_is_that_of_the_whole_picture_also_where_a_fraction_is_decoded() -> None:
    packed = pack_image(saved(Image.fromarray(natural(383, 256))), 96, 90)
    assert (packed.width, packed.height) == (round(383 * 96 / 256), 96)


@pytest.mark.parametrize("size", [400, 300, 224, 180, 151, 149, 120, 113, 100, 80, 60, 40])
def test_a_fraction_that_is_decoded_keeps_the_detail_of_the_stored_size(size: int) -> None:
    data = saved(Image.fromarray(natural(600, 450)), "JPEG", quality=95)
    pixels = simplejpeg.decode_jpeg(data, "RGB")
    width, height = stored_size(600, 450, size)
    best = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)
    stored = Image.open(io.BytesIO(pack_image(data, size, 100).jpegs[0]))
    area = Image.fromarray(cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA))
    lanczos, ours, usual = (np.asarray(image.convert("L")).astype(int) for image in (best, stored, area))
    assert np.sqrt(((ours - lanczos) ** 2).mean()) <= 1.5 * np.sqrt(((usual - lanczos) ** 2).mean())
