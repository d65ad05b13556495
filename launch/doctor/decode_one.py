"""Decodes one picture for the doctor, on the CPU and with DALI on the GPU; started by launch/doctor/probe.py."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

if not __package__:  # started by its path, not by `python -m`
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import numpy as np
import simplejpeg
import torch

from loaders.decode.choice import make_decoder
from loaders.decode.cpu import CpuDecoder
from loaders.decode.decoder import Decoder
from loaders.samples import Clip, Window

SHOWN = 224
HEIGHT, WIDTH = 320, 448  # of the picture; its window is cut to a square of 224


def picture() -> np.ndarray:
    """Smooth colours (HEIGHT, WIDTH, 3) uint8, which every JPEG decoder must reproduce closely."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    waves = [np.sin(rows / 40), np.cos(columns / 50), np.sin((rows + columns) / 60)]
    return np.stack([128 + 100 * wave for wave in waves], -1).astype(np.uint8)


def main() -> None:
    """Print {"backend", "levels", "fallback"}.

    levels: mean difference, in grey levels, of DALI's pixels from the CPU decoder's, or of those from the picture where
    DALI is not used; fallback: why DALI is not used on a GPU.
    """
    pixels = picture()
    window = Window((HEIGHT - SHOWN) // 2, (WIDTH - SHOWN) // 2, SHOWN, SHOWN, False)
    clip = Clip([simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=95)], HEIGHT, WIDTH, window)
    rows, columns = (slice(start, start + SHOWN) for start in window[:2])
    backend, fallback = "cpu", ""
    levels = _difference(decoded(CpuDecoder(SHOWN, 1), clip), pixels[rows, columns])
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        try:
            dali = make_decoder("dali", SHOWN, 1, False, torch.device("cuda", 0))
        except ValueError as error:
            fallback = " ".join(str(error).split())
        else:
            backend = "dali"
            levels = _difference(decoded(dali, clip), decoded(CpuDecoder(SHOWN, 1), clip))
    sys.stdout.write(json.dumps({"backend": backend, "levels": levels, "fallback": fallback}) + "\n")
    sys.stdout.flush()
    os._exit(0)


def decoded(decoder: Decoder, clip: Clip) -> np.ndarray:
    """The clip's only frame (S, S, 3) uint8. Raises ValueError when it does not decode."""
    frames, bad = decoder.decode([clip])
    decoder.close()
    if bad:
        raise ValueError(f"an intact image cannot be decoded: {bad[0]}")
    return frames[0, 0].cpu().numpy().copy()


def _difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(np.int16) - other.astype(np.int16)).mean())


if __name__ == "__main__":
    main()
