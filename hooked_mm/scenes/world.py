"""What a scene is: one or two objects in a place, every attribute known.

A scene is data, not a picture: `sample_scene` draws one from a random generator, `draw.render` turns it into
pixels and masks, `language` into words. Positions are continuous (in fractions of the canvas); the *word* for a
position follows from the geometry, so that freer placements need no new representation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

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
SIZES = {"big": 0.19, "small": 0.115}
"""Size word -> radius as a fraction of the canvas' shorter side."""
POSITIONS = {
    "top left": (0.27, 0.27),
    "top right": (0.73, 0.27),
    "bottom left": (0.27, 0.73),
    "bottom right": (0.73, 0.73),
}
"""Position words -> (x, y) centre of the slot, as fractions of width and height."""
PLACES = ("beach", "city", "desert", "forest", "sea", "snow")
COUNTS = ("one", "two")

JITTER = 0.03
"""Largest displacement of an object from its slot's centre, as a fraction of the canvas."""


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
        """The word for where the object is: the nearest slot."""
        return min(POSITIONS, key=lambda p: (POSITIONS[p][0] - self.x) ** 2 + (POSITIONS[p][1] - self.y) ** 2)


@dataclass(frozen=True)
class Scene:
    """A place with its objects in reading order (top to bottom, left to right); `texture_seed` fixes the background.

    `width` and `height` are in pixels.
    """

    place: str
    objects: tuple[SceneObject, ...]
    texture_seed: int
    width: int = 48
    height: int = 48

    def facts(self) -> frozenset[str]:
        """Everything true of the scene, as `attribute=value`, for instance `colour=red` or `position=top left`."""
        found = {f"place={self.place}", f"count={COUNTS[len(self.objects) - 1]}"}
        for item in self.objects:
            found |= {f"{name}={getattr(item, name)}" for name in ("shape", "colour", "size", "position")}
        return frozenset(found)


def all_facts() -> tuple[str, ...]:
    """Every fact a scene can have, in a fixed order."""
    values: dict[str, tuple[str, ...]] = {
        "shape": SHAPES,
        "colour": tuple(COLOURS),
        "size": tuple(SIZES),
        "position": tuple(POSITIONS),
        "place": PLACES,
        "count": COUNTS,
    }
    return tuple(f"{name}={value}" for name, options in values.items() for value in options)


def sample_scene(rng: np.random.Generator, *, two_objects: float = 0.7) -> Scene:
    """Draw a scene. With probability `two_objects` it has two, of different shapes, colours and positions."""
    count = 2 if rng.random() < two_objects else 1
    shapes = rng.permutation(len(SHAPES))[:count]
    colours = rng.permutation(len(COLOURS))[:count]
    slots = sorted(rng.permutation(len(POSITIONS))[:count])
    objects = []
    for shape, colour, slot in zip(shapes, colours, slots, strict=True):
        size = list(SIZES)[rng.integers(len(SIZES))]
        x, y = list(POSITIONS.values())[slot] + rng.uniform(-JITTER, JITTER, 2)
        radius = SIZES[size] * rng.uniform(0.94, 1.06)
        objects.append(SceneObject(SHAPES[shape], list(COLOURS)[colour], size, float(x), float(y), float(radius)))
    place = PLACES[rng.integers(len(PLACES))]
    return Scene(place, tuple(objects), int(rng.integers(2**31)))


def scene(seed: int, index: int, **options: float) -> Scene:
    """Scene number `index` of the endless data set `seed`: any scene can be made without making those before it."""
    return sample_scene(np.random.default_rng([seed, index]), **options)
