"""The content of a Shapes picture or clip as plain values, sampled from a seed; draw.py draws it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "heart")
COLOURS = {
    "red": (222, 38, 38),
    "green": (34, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (246, 214, 40),
    "orange": (245, 134, 20),
    "purple": (136, 52, 190),
    "pink": (250, 140, 190),
    "brown": (124, 76, 36),
    "cyan": (40, 205, 215),
}
BACKGROUNDS = {"white": (246, 246, 242), "gray": (150, 152, 156), "black": (22, 22, 26)}
SIZES = {"small": 0.14, "large": 0.23}  # half the width of a shape, in pictures' widths
IMAGES, CLIPS = 1, 2  # purpose of a random generator; part of its key


@dataclass(frozen=True)
class Thing:
    """One shape: centre (x, y) and half width in shares of the picture's width."""

    shape: str
    colour: str
    size: str
    x: float
    y: float

    @property
    def radius(self) -> float:
        """Half the shape's width, as a share of the picture's."""
        return SIZES[self.size]


@dataclass(frozen=True)
class Scene:
    """A background and the things before it, later ones in front."""

    background: str
    things: tuple[Thing, ...]


@dataclass(frozen=True)
class Motion:
    """The motion of a clip's first thing; `reverse` has the same frames in the opposite order."""

    kind: str  # slide | corner | appear | size
    direction: str  # slide: right/left/down/up; corner: two of them; appear: appears/disappears; size: grows/shrinks

    @property
    def reverse(self) -> Motion:
        """The motion that visits the same places backwards."""
        opposite = {"right": "left", "left": "right", "up": "down", "down": "up"}
        pairs = {"appears": "disappears", "disappears": "appears", "grows": "shrinks", "shrinks": "grows"}
        if self.kind in ("slide", "corner"):
            return Motion(self.kind, " ".join(opposite[way] for way in reversed(self.direction.split())))
        return Motion(self.kind, pairs[self.direction])


@dataclass(frozen=True)
class Clip:
    """A scene whose first thing moves; `crossing` is where it crosses the picture, 0 to 1."""

    scene: Scene
    motion: Motion
    crossing: float

    def at(self, share: float) -> Scene:
        """The scene when `share` (0 to 1) of the clip has passed."""
        mover, *rest = self.scene.things
        moved = move(mover, self.motion, self.crossing, share)
        return replace(self.scene, things=(*rest, *moved))


MOTIONS = (
    *(Motion("slide", way) for way in ("right", "left", "down", "up")),
    *(Motion("corner", ways) for ways in ("right down", "up left", "left down", "up right")),
    *(Motion("appear", way) for way in ("appears", "disappears")),
    *(Motion("size", way) for way in ("grows", "shrinks")),
)
STEPS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
NEAR, FAR = 0.2, 0.8  # where a path begins and ends


def move(thing: Thing, motion: Motion, crossing: float, share: float) -> list[Thing]:
    """The position of a thing as a list, empty while it is hidden."""
    if motion.kind == "appear":
        visible = (share >= 0.5) == (motion.direction == "appears")
        return [thing] if visible else []
    if motion.kind == "size":
        large = (share >= 0.5) == (motion.direction == "grows")
        return [replace(thing, size="large" if large else "small")]
    ways = [STEPS[way] for way in motion.direction.split()]
    across = NEAR + (FAR - NEAR) * crossing
    x, y = across, across
    for number, (dx, dy) in enumerate(ways):
        passed = min(1.0, max(0.0, share * len(ways) - number))
        position = NEAR + (FAR - NEAR) * passed
        if dx:
            x = position if dx > 0 else 1 - position
        if dy:
            y = position if dy > 0 else 1 - position
    return [replace(thing, x=x, y=y)]


def generator(seed: int, *counters: int) -> np.random.Generator:
    """A random generator that is a function of its arguments alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *counters])))


def pick(rng: np.random.Generator, values: tuple[str, ...] | list[str]) -> str:
    """A uniform random choice of one value."""
    return values[int(rng.integers(len(values)))]


def draw_kind(rng: np.random.Generator, others: tuple[Thing, ...] = ()) -> tuple[str, str]:
    """A (shape, colour) that differs from the others in both."""
    shapes = [shape for shape in SHAPES if all(shape != thing.shape for thing in others)]
    colours = [colour for colour in COLOURS if all(colour != thing.colour for thing in others)]
    return pick(rng, shapes), pick(rng, colours)


def image_scene(seed: int, split: int, number: int) -> Scene:
    """Picture `number` of a split: one thing at a place, several alike, or two in a relation."""
    rng = generator(seed, IMAGES, split, number)
    background = pick(rng, tuple(BACKGROUNDS))
    form = rng.random()
    shape, colour = draw_kind(rng)
    size = pick(rng, tuple(SIZES))
    if form < 0.3:
        centres = ((0.22, 0.22), (0.78, 0.22), (0.22, 0.78), (0.78, 0.78), (0.5, 0.5))
        x, y = centres[int(rng.integers(len(centres)))] + rng.uniform(-0.04, 0.04, 2)
        return Scene(background, (Thing(shape, colour, size, float(x), float(y)),))
    if form < 0.5:
        spots = np.array([(0.2, 0.25), (0.5, 0.25), (0.8, 0.25), (0.2, 0.72), (0.5, 0.72), (0.8, 0.72)])
        spots += rng.uniform(-0.03, 0.03, spots.shape)
        chosen = rng.permutation(len(spots))[: int(rng.integers(2, 5))]
        return Scene(background, tuple(Thing(shape, colour, "small", float(x), float(y)) for x, y in spots[chosen]))
    first = Thing(shape, colour, size, 0.0, 0.0)
    other_shape, other_colour = draw_kind(rng, (first,))
    second = Thing(other_shape, other_colour, pick(rng, tuple(SIZES)), 0.0, 0.0)
    low, high = rng.uniform(0.22, 0.3), rng.uniform(0.7, 0.78)
    level = rng.uniform(0.35, 0.65)
    if rng.random() < 0.5:
        return Scene(background, (replace(first, x=low, y=level), replace(second, x=high, y=level)))
    return Scene(background, (replace(first, x=level, y=low), replace(second, x=level, y=high)))


def clip_of(seed: int, split: int, number: int, groups: bool) -> Clip:
    """Clip `number` of a split.

    groups: clips come in fours that share the mover and differ in motion, two motions and their reverses, so that
    only motion tells them apart; the still thing beside it differs, so that their appearance captions differ too.
    """
    rng = generator(seed, CLIPS, split, number)
    shared = generator(seed, CLIPS, split, 1 << 40, number // 4) if groups else rng
    shape, colour = draw_kind(shared)
    mover = Thing(shape, colour, pick(shared, tuple(SIZES)), 0.5, 0.5)
    first, second = shared.permutation(len(MOTIONS) // 2)[:2]
    four = [MOTIONS[2 * first], MOTIONS[2 * first].reverse, MOTIONS[2 * second], MOTIONS[2 * second].reverse]
    motion = four[number % 4] if groups else MOTIONS[int(rng.integers(len(MOTIONS)))]
    still_shape, still_colour = draw_kind(rng, (mover,))
    x, y = ((0.2, 0.2), (0.8, 0.2), (0.2, 0.8), (0.8, 0.8))[int(rng.integers(4))]
    still = Thing(still_shape, still_colour, "small", x, y)
    return Clip(Scene(pick(rng, tuple(BACKGROUNDS)), (mover, still)), motion, float(rng.random()))
