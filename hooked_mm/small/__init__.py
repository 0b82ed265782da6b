"""Small trained models that ship with the package, and the scripts that made them."""

from __future__ import annotations

from pathlib import Path

from hooked_mm.errors import BadInputError, nearest

SMALL_MODELS = ("llava",)


def small_model_path(name: str) -> Path:
    """The folder of a shipped model, as `save_pretrained` wrote it.

    Raises:
        BadInputError: For a name that does not exist.
    """
    if name not in SMALL_MODELS:
        raise BadInputError(
            f"no small model {name!r}{nearest(name, SMALL_MODELS)}; there are: {', '.join(SMALL_MODELS)}"
        )
    return Path(__file__).parent / name
