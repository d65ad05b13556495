"""Annotation records of Shapes in the official forms: captions, questions, multiple choice, shared labels."""

from __future__ import annotations

from typing import Any

import numpy as np

from sharding.shapes.captions import (
    NUMBERS,
    SHORT,
    appearance_caption,
    clip_captions,
    image_caption,
    image_captions,
    motion_caption,
    motion_words,
)
from sharding.shapes.scenes import COLOURS, MOTIONS, SHAPES, Clip, Scene, generator

TEXTS = 3  # what a generator is for; part of its key


def image_records(path: str, scene: Scene, rng: np.random.Generator, test: bool) -> dict[str, Any]:
    """A picture's caption record for each annotation file that contains it."""
    captions = [image_caption(scene)] if test else image_captions(scene, rng)
    return {"images": {"image": path, "caption": captions}}


def clip_records(path: str, clip: Clip, rng: np.random.Generator, number: int, test: bool) -> dict[str, Any]:
    """A clip's record for each annotation file that contains it, by the file's name without its split."""
    question, answer = question_about(clip, rng)
    records: dict[str, Any] = {
        "qa": {"question_id": number, "video": path, "question": question, "answer": answer},
        "ssv2": {"video": path, "caption": f"something {motion_words(clip.motion)}"},
    }
    if not test:
        return records | {"clips": {"video": path, "caption": clip_captions(clip, rng)}}
    options = [motion_caption(clip)]
    others = [clip.motion.reverse, *(MOTIONS[i] for i in rng.permutation(len(MOTIONS)))]
    for motion in others:
        option = motion_caption(Clip(clip.scene, motion, clip.crossing))
        if option not in options and len(options) < 5:
            options.append(option)
    order = rng.permutation(5)
    return records | {
        "clips_appearance": {"video": path, "caption": [appearance_caption(clip)]},
        "clips_motion": {"video": path, "caption": [motion_caption(clip)]},
        "mc": {"video": path, "caption": [options[i] for i in order], "answer": int(np.flatnonzero(order == 0)[0])},
    }


def question_about(clip: Clip, rng: np.random.Generator) -> tuple[str, str]:
    """A question that one frame answers, or one that needs several."""
    mover, still = clip.scene.things
    form = int(rng.integers(4 if clip.motion.kind == "slide" else 3))
    if form == 0:
        return f"what color is the {still.shape}?", still.colour
    if form == 1:
        return f"what shape is {still.colour}?", still.shape
    if form == 2:
        return f"what happens to the {mover.colour} {mover.shape}?", happening(clip)
    return f"which way does the {mover.colour} {mover.shape} move?", clip.motion.direction


def happening(clip: Clip) -> str:
    """A short answer: what the mover does."""
    if clip.motion.kind == "slide":
        return SHORT[clip.motion.direction]
    return "turns a corner" if clip.motion.kind == "corner" else clip.motion.direction


def answer_list() -> list[str]:
    """Every answer that a question can have."""
    changes = [motion.direction for motion in MOTIONS if motion.kind in ("appear", "size")]
    ways = ["right", "left", "down", "up"]
    return sorted({*COLOURS, *SHAPES, *SHORT.values(), *changes, *ways, "turns a corner", *NUMBERS.values()})


def text_generator(seed: int, medium: int, split: int, number: int) -> np.random.Generator:
    """The generator behind the wording of one item."""
    return generator(seed, TEXTS, medium, split, number)
