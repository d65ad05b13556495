"""Pictures and clips as a Python program has them to the pixels that a model reads, as packing and loading do it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from preprocessing.config import Preprocessing, TrainingCorpus
from preprocessing.frames import choose_frames
from preprocessing.resizing import resize
from runtime.errors import MissingError, UserError
from sharding.media.frames import MediaError, stored_size
from sharding.media.image import pack_image, shrink
from sharding.media.picture import decode_picture, picture_size
from sharding.media.video import pack_video

Picture = Image.Image | np.ndarray | str | Path  # an array (H, W, 3) uint8 of RGB, or an image file
Clip = np.ndarray | Sequence[Picture] | str | Path  # an array (T, H, W, 3) uint8, its frames, or a video file
IN_PNG = {"1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA"}  # modes of Pillow that it writes as they are


def image_pixels(picture: Picture, settings: Preprocessing, size: int) -> np.ndarray:
    """The pixels (1, S, S, 3) uint8 that a model reads of a picture; raises UserError if it is none."""
    pixels = _picture(picture, settings.packing("image", size))
    return _resized(pixels, size, settings.antialias)[None]


def clip_pixels(clip: Clip, settings: Preprocessing, size: int, num_frames: int) -> np.ndarray:
    """The pixels (num_frames, S, S, 3) uint8 of the frames that evaluation chooses; raises UserError if it is no clip.

    Of a video file the frames at the rate that training clips were stored at are chosen among.
    """
    packing = settings.packing("video", size)
    frames: Sequence[Picture]
    if isinstance(clip, str | Path):
        stored = pack_video(_bytes(clip), packing.size or size, packing.quality, packing.fps, packing.max_frames)
        frames = [decode_picture(jpeg).pixels for jpeg in _chosen(stored.jpegs, settings, num_frames, packing.fps)]
    elif isinstance(clip, np.ndarray | list | tuple):
        if isinstance(clip, np.ndarray) and clip.ndim != 4:
            raise UserError(f"is an array of shape {clip.shape}: a clip's is (T, H, W, 3)")
        if not len(clip):
            raise UserError("has no frames")
        frames = _chosen(list(clip), settings, num_frames, packing.fps)
    else:
        raise UserError(f"is of type {type(clip).__name__}: give an array (T, H, W, 3), a list of frames or a file")
    return np.stack([_resized(_picture(frame, packing), size, settings.antialias) for frame in frames])


def is_clip(visual: Picture | Clip) -> bool:
    """Whether it is a clip and no picture; a file is a clip if it is not an image."""
    if isinstance(visual, str | Path):
        try:
            picture_size(_bytes(visual))
        except MediaError:
            return True
        return False
    return isinstance(visual, list | tuple) or (isinstance(visual, np.ndarray) and visual.ndim == 4)


def _chosen(frames: list[Picture] | list[bytes], settings: Preprocessing, num_frames: int, fps: float) -> list:
    indices = choose_frames(settings.sample_type_test, num_frames, len(frames), fps)
    return [frames[index] for index in indices.tolist()]


def _picture(picture: Picture, packing: TrainingCorpus) -> np.ndarray:
    """RGB pixels (H, W, 3), shrunk as packing does; of a file also after its JPEG compression."""
    if isinstance(picture, str | Path):
        data = _bytes(picture)
        return decode_picture(pack_image(data, packing.size, packing.quality).jpegs[0] if packing.size else data).pixels
    if isinstance(picture, Image.Image):
        picture = _from_pillow(picture)
    if not isinstance(picture, np.ndarray):
        raise UserError(f"is of type {type(picture).__name__}: give a PIL image, an array (H, W, 3) or a file")
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
        raise UserError(f"is an array {picture.shape} of {picture.dtype}: must be (H, W, 3) of uint8, RGB")
    height, width = picture.shape[:2]
    return shrink(picture, *stored_size(width, height, packing.size)) if packing.size else picture


def _from_pillow(image: Image.Image) -> np.ndarray:
    """RGB pixels (H, W, 3): upright, 16 bits to 8, transparency over white, as of a file."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return np.asarray(image)
    if image.mode not in IN_PNG:
        image = image.convert("RGBA" if "a" in image.mode or "A" in image.mode else "RGB")
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=0)
    return decode_picture(file.getvalue()).pixels


def _resized(pixels: np.ndarray, size: int, antialias: bool) -> np.ndarray:
    return pixels if pixels.shape[:2] == (size, size) else resize(pixels, size, antialias)


def _bytes(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise MissingError(f"does not exist: {path}") from None
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror}): {path}") from None
