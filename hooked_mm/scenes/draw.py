"""From a scene to pixels and object masks, in numpy alone, so that a seed gives the same picture everywhere."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, UInt8

from hooked_mm.scenes.world import COLOURS, Scene, SceneObject

SUPERSAMPLE = 4

Grid = Float[np.ndarray, "h w"]
Paint = Callable[[Grid, Grid, np.random.Generator], Grid]


def _polygon(x: Grid, y: Grid, corners: np.ndarray) -> Bool[np.ndarray, "h w"]:
    """Even-odd rule: a point is inside when a ray to the right crosses the outline an odd number of times."""
    inside = np.zeros(x.shape, bool)
    for (x1, y1), (x2, y2) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        if y1 != y2:
            crosses = (y1 > y) != (y2 > y)
            inside ^= crosses & (x < (x2 - x1) * (y - y1) / (y2 - y1) + x1)
    return inside


def _on_circle(angles: np.ndarray, radii: np.ndarray | float) -> np.ndarray:
    return np.stack([np.sin(angles) * radii, -np.cos(angles) * radii], axis=1)


_STAR = _on_circle(np.arange(10) * np.pi / 5, np.where(np.arange(10) % 2, 0.45, 1.1))
_TRIANGLE = _on_circle(np.arange(3) * 2 * np.pi / 3, 1.15)

# Every outline in a frame where the object's radius is 1, y pointing down.
OUTLINES: dict[str, Callable[[Grid, Grid], Bool[np.ndarray, "h w"]]] = {
    "circle": lambda x, y: x**2 + y**2 < 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) < 0.88,
    "triangle": lambda x, y: _polygon(x, y - 0.2, _TRIANGLE),
    "star": lambda x, y: _polygon(x, y, _STAR),
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) < 0.3) & (np.maximum(abs(x), abs(y)) < 1),
    "ring": lambda x, y: (x**2 + y**2 < 1) & (x**2 + y**2 > 0.3),
}

# place -> (base colour, brightness pattern in about -1..1 over pixel coordinates). Backgrounds are muted and of middle
# brightness, so that every object colour stands out in every place.
PLACE_PAINT: dict[str, tuple[tuple[int, int, int], Paint]] = {
    "beach": (
        (176, 160, 128),
        lambda x, y, r: np.where(y > 0.55 * y.max() + 2 * np.sin(x / 4 + r.uniform(0, 6)), 0.7, -0.7),
    ),
    "city": (
        (128, 122, 122),
        lambda x, y, r: np.where((y % 6 < 1) | ((x + 5 * (y // 6 % 2) + r.integers(9)) % 10 < 1), 1, -0.2),
    ),
    "desert": ((172, 144, 104), lambda x, y, r: np.sin((x + y) / 2.2 + 1.2 * np.sin(x / 7) + r.uniform(0, 6))),
    "forest": ((88, 112, 84), lambda x, y, r: np.sin(x * 1.3 + r.uniform(0, 6)) + 0.4 * np.sin(y / 3)),
    "sea": ((92, 124, 150), lambda x, y, r: np.sin(y * 1.1 + 0.8 * np.sin(x / 3 + r.uniform(0, 6)))),
    "snow": ((172, 182, 192), lambda x, y, r: np.where(r.random(x.shape) < 0.12, 2.0, -0.2)),
}


def mask(item: SceneObject, width: int, height: int) -> Float[np.ndarray, "h w"]:
    """How much of each pixel the object covers, 0 to 1."""
    radius = item.radius * min(width, height)
    centre_x, centre_y = item.x * width, item.y * height
    reach = 1.5 * radius  # no outline reaches further; outside this box nothing needs computing
    left, right = max(0, int(centre_x - reach)), min(width, int(centre_x + reach) + 1)
    top, bottom = max(0, int(centre_y - reach)), min(height, int(centre_y + reach) + 1)
    fine_x = np.arange(left + 0.5 / SUPERSAMPLE, right, 1 / SUPERSAMPLE)
    fine_y = np.arange(top + 0.5 / SUPERSAMPLE, bottom, 1 / SUPERSAMPLE)
    x, y = np.meshgrid((fine_x - centre_x) / radius, (fine_y - centre_y) / radius)
    inside = OUTLINES[item.shape](x, y)
    cover = np.zeros((height, width))
    cover[top:bottom, left:right] = inside.reshape(bottom - top, SUPERSAMPLE, right - left, SUPERSAMPLE).mean((1, 3))
    return cover


def background(scene: Scene) -> Float[np.ndarray, "h w 3"]:
    """The place's textured background, values 0 to 255."""
    rng = np.random.default_rng(scene.texture_seed)
    base, paint = PLACE_PAINT[scene.place]
    x, y = np.meshgrid(np.arange(scene.width, dtype=float), np.arange(scene.height, dtype=float))
    pattern = 14 * paint(x, y, rng) + rng.normal(0, 3, x.shape)
    return np.asarray(base, float) * rng.uniform(0.94, 1.06) + pattern[..., None]


def render(scene: Scene) -> tuple[UInt8[np.ndarray, "h w 3"], Float[np.ndarray, "objects h w"]]:
    """Pixels and, per object in `scene.objects`' order, the share of each pixel that it covers."""
    canvas = background(scene)
    masks = np.stack([mask(item, scene.width, scene.height) for item in scene.objects])
    for item, cover in zip(scene.objects, masks, strict=True):
        canvas = canvas * (1 - cover[..., None]) + np.asarray(COLOURS[item.colour], float) * cover[..., None]
    return canvas.round().clip(0, 255).astype(np.uint8), masks
