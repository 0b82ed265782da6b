"""The pictures of a store's samples: read from where the store says they lie, or made again if they are scenes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from PIL import Image

from hooked_mm.prepare import load_images
from hooked_mm.scenes.dataset import ScenesDataModule, picture
from hooked_mm.scenes.world import scene
from hooked_mm.store import ActivationStore

Pictures = Callable[[int], list[Image.Image]]
"""Index of a sample in the store's table -> its pictures."""


def store_pictures(store: ActivationStore) -> tuple[Pictures | None, str]:
    """How to get the pictures of a store's samples.

    Returns:
        A function, or None where they can't be had; and a sentence that says where they come from, or why there are
        none. The function raises `BadInputError` for a file that is missing or broken.
    """
    names = store.samples.column_names
    paths: list[Any] = store.samples.column("image").to_pylist() if "image" in names else []
    if any(paths):
        return lambda index: load_images(paths[index]), "read from the paths that the store names"
    data = store.made_by.get("data")
    if isinstance(data, dict) and data.get("name") == ScenesDataModule.__name__:
        numbers = store.samples.column("sample_number").to_pylist()

        def made(index: int) -> list[Image.Image]:
            return [picture(scene(data["split"], numbers[index], data["seed"], count=data["count"]))]

        return made, "scenes, made again"
    return None, "none: the store names no files, and its data are not scenes that can be made again"
