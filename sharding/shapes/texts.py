"""The texts of Shapes: captions in several wordings, questions, multiple choice, in the official annotation forms."""

from __future__ import annotations

from typing import Any

import numpy as np

from sharding.shapes.scenes import COLOURS, MOTIONS, SHAPES, Clip, Motion, Scene, Thing, generator, pick

TEXTS = 3  # what a generator is for; part of its key
NUMBERS = {2: "two", 3: "three", 4: "four"}
POSITIONS = {
    (False, False): "in the top left corner",
    (True, False): "in the top right corner",
    (False, True): "in the bottom left corner",
    (True, True): "in the bottom right corner",
}
SLIDES = {
    "right": ("moves from left to right", "slides to the right"),
    "left": ("moves from right to left", "slides to the left"),
    "down": ("moves from top to bottom", "falls down"),
    "up": ("moves from bottom to top", "rises up"),
}
WAYS = {"right": "to the right", "left": "to the left", "down": "down", "up": "up"}
SHORT = {"right": "moves to the right", "left": "moves to the left", "down": "moves down", "up": "moves up"}
CHANGES = {
    "appears": ("suddenly appears", "is hidden at first and then appears"),
    "disappears": ("suddenly disappears", "is there at first and then disappears"),
    "grows": ("grows from small to large", "gets larger"),
    "shrinks": ("shrinks from large to small", "gets smaller"),
}


def name(thing: Thing, article: bool = True, size: bool = True) -> str:
    """A thing's name, such as "a large red star"."""
    words = f"{thing.size + ' ' if size else ''}{thing.colour} {thing.shape}"
    if not article:
        return words
    return ("an " if words[0] in "aeiou" else "a ") + words


def plural(thing: Thing) -> str:
    """Several of a thing, such as "red stars"."""
    return f"{thing.colour} {thing.shape}{'es' if thing.shape == 'cross' else 's'}"


def relation(first: Thing, second: Thing) -> str:
    """The position of the first thing relative to the second."""
    if abs(first.x - second.x) > abs(first.y - second.y):
        return "to the left of" if first.x < second.x else "to the right of"
    return "above" if first.y < second.y else "below"


def position(thing: Thing) -> str:
    """The position of a thing in the picture."""
    if abs(thing.x - 0.5) < 0.1 and abs(thing.y - 0.5) < 0.1:
        return "in the middle"
    return POSITIONS[(thing.x > 0.5, thing.y > 0.5)]


def image_caption(scene: Scene) -> str:
    """The caption that names everything; two pictures with the same one look alike."""
    first = scene.things[0]
    if len(scene.things) == 1:
        return f"{name(first)} {position(first)} on a {scene.background} background"
    second = scene.things[1]
    if first.shape == second.shape:
        return f"{NUMBERS[len(scene.things)]} small {plural(first)} on a {scene.background} background"
    return f"{name(first)} {relation(first, second)} {name(second)} on a {scene.background} background"


def image_captions(scene: Scene, rng: np.random.Generator, count: int = 3) -> list[str]:
    """Different wordings, from everything named to one thing only."""
    first, last = scene.things[0], scene.things[-1]
    wordings = [image_caption(scene)]
    if len(scene.things) == 1:
        wordings += [
            f"there is {name(first)} {position(first)}",
            f"a {scene.background} picture with {name(first)}",
            f"{name(first, size=False)} {position(first)} of the {scene.background} picture",
        ]
    elif first.shape == last.shape:
        number = NUMBERS[len(scene.things)]
        wordings += [
            f"there are {number} {plural(first)}",
            f"{number} {plural(first)} before a {scene.background} wall",
            f"a picture of {number} {plural(first)} on {scene.background}",
        ]
    else:
        wordings += [
            f"{name(last)} is {relation(last, first)} {name(first)}",
            f"there is {name(first)} and {name(last)}",
            f"{name(first, size=False)} and {name(last, size=False)} before a {scene.background} wall",
            f"a {scene.background} picture with {name(last)} {relation(last, first)} {name(first)}",
        ]
    chosen = rng.permutation(len(wordings) - 1)[: count - 1] + 1
    return [wordings[0], *(wordings[number] for number in chosen)]


def motion_words(motion: Motion, wording: int = 0) -> str:
    """The motion, without the thing that moves."""
    if motion.kind == "slide":
        return SLIDES[motion.direction][wording]
    if motion.kind == "corner":
        first, second = motion.direction.split()
        if wording:
            return f"first {SHORT[first]} and then {SHORT[second]}"
        return f"moves {WAYS[first]} and then {WAYS[second]}"
    return CHANGES[motion.direction][wording]


def motion_caption(clip: Clip, wording: int = 0) -> str:
    """The thing and its motion, which one frame does not show."""
    mover = clip.scene.things[0]
    return f"{name(mover, size=clip.motion.kind != 'size')} {motion_words(clip.motion, wording)}"


def appearance_caption(clip: Clip, wording: int = 0) -> str:
    """The content of a single frame."""
    mover, still = clip.scene.things
    sized = clip.motion.kind != "size"
    if wording:
        return f"{name(mover, size=sized)} and {name(still)} before a {clip.scene.background} wall"
    return f"{name(mover, size=sized)} with {name(still)} {position(still)} on a {clip.scene.background} background"


def clip_captions(clip: Clip, rng: np.random.Generator) -> list[str]:
    """Training captions: how it moves, what it looks like, and both at once."""
    background = clip.scene.background
    both = f"{motion_caption(clip, int(rng.integers(2)))} on a {background} background"
    return [
        motion_caption(clip, int(rng.integers(2))),
        appearance_caption(clip, int(rng.integers(2))),
        pick(rng, (both, f"there is {name(clip.scene.things[1])} while {motion_caption(clip)}")),
    ]


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
