"""Shapes scenes to pixels, JPEG and H.264."""

from __future__ import annotations

import io
import math
from fractions import Fraction
from typing import Any

import av
import cv2
import numpy as np
import simplejpeg

from sharding.shapes.scenes import BACKGROUNDS, COLOURS, Clip, Scene, Thing

FINER = 4  # drawn this many times larger, then averaged: smooth edges
QUALITY = 88
FRAMES, FPS = 12, 6


def paint(scene: Scene, size: int) -> np.ndarray:
    """RGB pixels (size, size, 3) uint8 of a scene."""
    canvas = np.empty((size * FINER, size * FINER, 3), np.uint8)
    canvas[:] = BACKGROUNDS[scene.background]
    for thing in scene.things:
        draw_thing(canvas, thing)
    return cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA)


def draw_thing(canvas: np.ndarray, thing: Thing) -> None:
    """Draw one shape onto a canvas (H, H, 3)."""
    scale = canvas.shape[0]
    centre = np.array([thing.x, thing.y]) * scale
    radius = thing.radius * scale
    colour = COLOURS[thing.colour]
    middle = (round(centre[0]), round(centre[1]))
    if thing.shape == "circle":
        cv2.circle(canvas, middle, round(radius), colour, -1)
    elif thing.shape == "ring":
        cv2.circle(canvas, middle, round(radius * 0.8), colour, round(radius * 0.42))
    elif thing.shape == "cross":
        for box in ((1.0, 0.36), (0.36, 1.0)):
            corner = np.array(box) * radius
            low, high = np.round(centre - corner).astype(int), np.round(centre + corner).astype(int)
            cv2.rectangle(canvas, low.tolist(), high.tolist(), colour, -1)
    else:
        points = np.round(centre + outline(thing.shape) * radius).astype(np.int32)
        cv2.fillPoly(canvas, [points], colour)


def outline(shape: str) -> np.ndarray:
    """Corners (N, 2) of a shape of half width 1 around the origin; y points down."""
    if shape == "square":
        return np.array([(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)])
    if shape == "diamond":
        return np.array([(0, -1.1), (0.75, 0), (0, 1.1), (-0.75, 0)])
    if shape == "triangle":
        return np.array([(0, -1.0), (1.0, 0.85), (-1.0, 0.85)])
    if shape == "star":
        angles = [math.pi * (number / 5 - 0.5) for number in range(10)]
        return np.array([(math.cos(a) * r, math.sin(a) * r) for a, r in zip(angles, (1.1, 0.45) * 5, strict=True)])
    t = np.linspace(0, 2 * math.pi, 48, endpoint=False)  # heart
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y], axis=1) / 16


def jpeg(scene: Scene, size: int) -> bytes:
    """A scene as JPEG."""
    return simplejpeg.encode_jpeg(paint(scene, size), quality=QUALITY, colorspace="RGB", colorsubsampling="444")


def mp4(clip: Clip, size: int) -> bytes:
    """A clip as H.264 MP4: FRAMES frames at FPS a second; `size` must be even."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        # Without threads and look-ahead: with either, x264 sometimes gives other bytes for the same frames.
        options = {"crf": "18", "preset": "veryfast", "x264-params": "threads=1:rc-lookahead=0:mbtree=0:bframes=0"}
        stream = container.add_stream("libx264", rate=Fraction(FPS), options=options)
        stream.codec_context.thread_count = 1
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for number in range(FRAMES):
            pixels = paint(clip.at(number / (FRAMES - 1)), size)
            planes: Any = cv2.cvtColor(pixels, cv2.COLOR_RGB2YUV_I420)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuv420p")))
        container.mux(stream.encode())
    return buffer.getvalue()
