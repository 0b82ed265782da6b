"""What a scene is: one to three objects anywhere in a place, every attribute known.

A scene is data, not a picture: `scene` draws one from a random generator, `draw.render` turns it into pixels and
masks, `captions` and `questions` into words. Positions are continuous (in fractions of the canvas); the *words* for
positions and relations follow from the geometry, and scenes in which a word would be doubtful are not made.

What is held out from training:

| split | descriptions | shape and colour pairs |
|---|---|---|
| `train` | eight in ten | all but `HELD_OUT` |
| `validation`, `test` | one in ten each, never in another split | all but `HELD_OUT` |
| `unseen` | any | every scene shows a pair of `HELD_OUT` |
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Float

from hooked_mm.errors import BadInputError, unknown

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (215, 40, 40),
    "green": (35, 165, 60),
    "blue": (45, 75, 220),
    "yellow": (240, 220, 50),
    "purple": (150, 50, 190),
    "orange": (245, 135, 25),
    "white": (248, 248, 248),
    "black": (18, 18, 18),
}
SIZES = {"big": (0.19, 0.22), "small": (0.12, 0.14)}
"""Size word -> smallest and largest radius as fractions of the canvas' shorter side."""
POSITIONS = ("top left", "top right", "bottom left", "bottom right")
PLACES = ("beach", "city", "desert", "forest", "sea", "snow")
COUNTS = ("one", "two", "three")
RELATIONS = ("left", "right", "above", "below")

HELD_OUT = {"circle": "black", "square": "purple", "triangle": "orange", "cross": "white", "ring": "green"}
"""Shape -> the colour in which it is never shown or named in training."""
HELD_OUT_SHAPE = {colour: shape for shape, colour in HELD_OUT.items()}

CANVASES = ((48, 48), (56, 56), (64, 48), (48, 64), (72, 48), (48, 72))
"""(width, height) in pixels, all equally likely."""

COUNT_SHARES = (0.2, 0.4, 0.4)
"""The shares of scenes with one, two and three objects."""

MIDLINE = 0.05
"""No centre lies nearer to either midline of the canvas (as a fraction of its width or height)."""
SIDE_BY_SIDE = 0.08
"""Objects in the same half (top or bottom) differ in x by at least this fraction of the width."""
RELATED = 0.12
"""One object is left of (above) another if it is so by at least this fraction of the width (height)."""
REACH = 1.15
"""No outline reaches further from its centre than this many radii."""

Split = Literal["train", "validation", "test", "unseen"]
SPLITS: tuple[str, ...] = get_args(Split)


@dataclass(frozen=True)
class SceneObject:
    """One object. `x`, `y`: centre as fractions of width and height; `radius`: fraction of the shorter side."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float

    @property
    def position(self) -> str:
        """The word for the quarter of the canvas in which the centre lies."""
        return f"{'top' if self.y < 0.5 else 'bottom'} {'left' if self.x < 0.5 else 'right'}"

    @property
    def held_out(self) -> bool:
        """Whether this pair of shape and colour is held out from training."""
        return HELD_OUT.get(self.shape) == self.colour


@dataclass(frozen=True)
class Scene:
    """A place with its objects in reading order (top half first, then from left to right).

    `texture_seed` fixes the background; `width` and `height` are in pixels.
    """

    place: str
    objects: tuple[SceneObject, ...]
    texture_seed: int
    width: int = 56
    height: int = 56

    def facts(self) -> frozenset[str]:
        """Everything true of the scene, as `attribute=value`, for instance `colour=red` or `position=top left`."""
        found = {f"place={self.place}", f"count={COUNTS[len(self.objects) - 1]}"}
        for item in self.objects:
            found |= {f"{name}={getattr(item, name)}" for name in ("shape", "colour", "size", "position")}
        return frozenset(found)

    def description(self) -> str:
        """All that a caption can say, in one line; scenes with equal descriptions belong to the same split."""
        items = [f"{item.size} {item.colour} {item.shape} {item.position}" for item in self.objects]
        return "; ".join([*items, self.place])

    @property
    def held_out(self) -> bool:
        """Whether an object shows a held-out pair of shape and colour."""
        return any(item.held_out for item in self.objects)


def all_facts() -> tuple[str, ...]:
    """Every fact a scene can have, in a fixed order."""
    values: dict[str, Sequence[str]] = {
        "shape": SHAPES,
        "colour": tuple(COLOURS),
        "size": tuple(SIZES),
        "position": POSITIONS,
        "place": PLACES,
        "count": COUNTS,
    }
    return tuple(f"{name}={value}" for name, options in values.items() for value in options)


def relations(one: SceneObject, other: SceneObject) -> tuple[str, ...]:
    """Where `one` is from `other`: at most one of left and right, and at most one of above and below."""
    found = []
    if abs(one.x - other.x) >= RELATED:
        found.append("left" if one.x < other.x else "right")
    if abs(one.y - other.y) >= RELATED:
        found.append("above" if one.y < other.y else "below")
    return tuple(found)


def reading_order(objects: Sequence[SceneObject]) -> tuple[SceneObject, ...]:
    """The top half first, each half from left to right."""
    return tuple(sorted(objects, key=lambda item: (item.y >= 0.5, item.x)))


def clear(
    centres: Float[np.ndarray, "tries objects 2"], radii: Float[np.ndarray, " objects"], width: int, height: int
) -> Bool[np.ndarray, " tries"]:
    """Whether objects lie inside the canvas and apart from each other, and every word for them is beyond doubt.

    Args:
        centres: x and y as fractions of width and height.
        radii: As fractions of the shorter side.
        width: Of the canvas, in pixels.
        height: Of the canvas, in pixels.
    """
    side = np.array([width, height]) / min(width, height)
    reach = REACH * radii[:, None] / side
    # One coordinate after the other on what is left, since in a crowded scene hardly a try passes the first few.
    left = np.arange(len(centres))
    for number, axis in np.ndindex(reach.shape):
        values, margin = centres[left, number, axis], reach[number, axis]
        left = left[(values >= margin) & (values <= 1 - margin) & (np.abs(values - 0.5) >= MIDLINE)]
    for number in range(1, len(radii)):
        for other in range(number):
            one, two = centres[left, number], centres[left, other]
            apart = np.hypot(*((one - two) * side).T) >= 1.1 * (radii[number] + radii[other])
            same_half = (one[:, 1] < 0.5) == (two[:, 1] < 0.5)
            left = left[apart & (~same_half | (np.abs(one[:, 0] - two[:, 0]) >= SIDE_BY_SIDE))]
    fine = np.zeros(len(centres), bool)
    fine[left] = True
    return fine


def _fitting(
    rng: np.random.Generator, radii: Float[np.ndarray, " objects"], width: int, height: int
) -> Float[np.ndarray, "objects 2"]:
    """Centres drawn at random until they are clear.

    Three big objects may fit a square canvas once in millions of tries, so more and more are drawn at once; the
    generator is left as if they had been drawn by the block of 128.
    """
    block, blocks = 128, 1
    while True:
        before = rng.bit_generator.state
        tries = rng.random((blocks * block, len(radii), 2))
        fine = clear(tries, radii, width, height)
        if fine.any():
            first = int(fine.argmax())
            rng.bit_generator.state = before
            rng.random(((first // block + 1) * block, len(radii), 2))
            return tries[first]
        blocks = min(2 * blocks, 128)


def sample_scene(rng: np.random.Generator, *, unseen: bool = False, count: int | None = None) -> Scene:
    """Draw a scene; with `unseen`, one of its objects shows a held-out pair, otherwise none does.

    Shapes, colours and sizes are drawn first, places on the canvas until they fit: crowded scenes are as frequent as
    others. Shapes and colours may repeat.
    """
    width, height = CANVASES[rng.integers(len(CANVASES))]
    number = count or int(rng.choice(len(COUNT_SHARES), p=COUNT_SHARES)) + 1
    pairs: list[tuple[str, str]] = []
    while len(pairs) < number:
        pair = (SHAPES[rng.integers(len(SHAPES))], list(COLOURS)[rng.integers(len(COLOURS))])
        if HELD_OUT.get(pair[0]) != pair[1]:
            pairs.append(pair)
    if unseen:
        pairs[rng.integers(number)] = list(HELD_OUT.items())[rng.integers(len(HELD_OUT))]
    looks = []
    for shape, colour in pairs:
        size = list(SIZES)[rng.integers(len(SIZES))]
        looks.append((shape, colour, size, float(rng.uniform(*SIZES[size]))))
    radii = np.array([radius for *_, radius in looks])
    centres = _fitting(rng, radii, width, height)
    objects = [
        SceneObject(shape, colour, size, float(x), float(y), radius)
        for (shape, colour, size, radius), (x, y) in zip(looks, centres, strict=True)
    ]
    place = PLACES[rng.integers(len(PLACES))]
    return Scene(place, reading_order(objects), int(rng.integers(2**31)), width, height)


def split_of(item: Scene) -> str:
    """The split a scene belongs to: by its held-out pairs, else by a checksum of its description."""
    if item.held_out:
        return "unseen"
    share = zlib.crc32(item.description().encode()) % 10
    return {0: "test", 1: "validation"}.get(share, "train")


def scene(split: str, index: int, seed: int = 0, *, count: int | None = None) -> Scene:
    """Scene number `index` of a split: any scene can be made without making those before it.

    Args:
        split: One of `SPLITS`.
        index: From 0 on.
        seed: Another seed gives other scenes of the same split.
        count: Only scenes with this many objects.

    Raises:
        BadInputError: For an unknown split, or a count that scenes do not have.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    if count is not None and not 1 <= count <= len(COUNTS):
        raise BadInputError(f"count={count}: scenes have 1 to {len(COUNTS)} objects")
    rng = np.random.default_rng([SPLITS.index(split), seed, index])
    while True:
        item = sample_scene(rng, unseen=split == "unseen", count=count)
        if split_of(item) == split:
            return item
