"""Loading a processor, also where torchvision (needed for video alone) is missing; how processors cut pictures."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import extract_tb
from typing import Any

import transformers
from transformers import AutoConfig, AutoProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.processing_utils import ProcessorMixin
from transformers.utils import is_torchvision_available

from hooked_mm.errors import BadInputError, UnsupportedModelError
from hooked_mm.layout import Tiles


def load_processor(model_id: str | os.PathLike, **options: Any) -> Any:
    """The processor of a model, from the hub or from a folder as `save_pretrained` writes it.

    Transformers is asked first. Where it refuses because a *video* processor needs a package that is missing, the same
    processor class is built without its video part, with the PIL image processor: pictures and text are processed
    exactly as before, videos are refused.

    What happens in transformers 5.23 without torchvision (and num2words):

    | family | `AutoProcessor` | here |
    |---|---|---|
    | llava, llava_next, idefics2, idefics3, gemma3, mllama, blip-2, florence2 | loads, with PIL images | the same |
    | llava_onevision, qwen2_vl, qwen2_5_vl, qwen3_vl, internvl | refuses: no video processor | without video |
    | smolvlm | refuses: no video processor, no num2words (spells the numbers of a video's prompt) | without video |

    In 5.0 it is the same, but SmolVLM needs torchvision here too.

    Args:
        model_id: Hub id or folder.
        options: Passed on to transformers' `from_pretrained` (`revision`, `local_files_only`, ...).

    Raises:
        UnsupportedModelError: If a package is missing that pictures need too; it says which.
    """
    name = os.fspath(model_id)
    try:
        return AutoProcessor.from_pretrained(name, **options)
    except (ImportError, ValueError, OSError, TypeError) as error:
        # Refusals come as any of these; a folder written without a video part lacks its file. All else is not ours.
        if not _missing(error) and not _of_video(error) and not _hidden(error):
            raise
        refused = error
    try:
        found = _processor_class(name, options)
        if found is None or "video_processor" not in found.get_attributes():
            raise UnsupportedModelError(_remedy(name, refused)) from refused
        with _video_words(found):
            return without_video(found).from_pretrained(name, **options)
    except (ImportError, ValueError) as error:
        if not _missing(error):
            raise
        raise UnsupportedModelError(_remedy(name, error)) from error


def _missing(error: BaseException | None) -> list[str]:
    """The packages that a refusal names, or what it was raised from."""
    said = ""
    while error is not None:
        said, error = f"{said} {error}".lower(), error.__cause__
    return [package for package in ("torchvision", "num2words", "Pillow") if package.lower() in said]


def _of_video(error: Exception) -> bool:
    """Whether it was the loading of a video part that failed, for whatever reason (5.0 looks into a list it lacks)."""
    return any(Path(frame.filename).stem == "video_processing_auto" for frame in extract_tb(error.__traceback__))


def _hidden(error: Exception) -> bool:
    """Whether it may be for torchvision that an image processor is not known; older versions do not say so."""
    return "Unrecognized image processor" in str(error) and not is_torchvision_available()


def _remedy(name: str, error: Exception) -> str:
    advice = f"pip install {' '.join(_missing(error) or ['torchvision'])}"
    return f"the processor of {name!r} can't be loaded: {str(error).strip()} Remedy: {advice}"


def _processor_class(name: str, options: dict[str, Any]) -> type[ProcessorMixin] | None:
    """As its own file names it; else the class of the model's configuration."""
    written, _ = ProcessorMixin.get_processor_dict(name, **options)
    if written.get("processor_class"):
        return getattr(transformers, written["processor_class"], None)
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        return None
    return PROCESSOR_MAPPING.get(type(AutoConfig.from_pretrained(name, **options)), None)


def image_processor_class(kind: str) -> Any:
    """The image processor of a kind ("Llava") that works with PIL: in transformers 5.0 the one without suffix."""
    return getattr(transformers, f"{kind}ImageProcessorPil", None) or getattr(transformers, f"{kind}ImageProcessor")


class _NoVideo:
    """In the place of a video processor: its settings are None, and videos are refused."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __call__(self, *videos: Any, **options: Any) -> None:
        raise BadInputError(
            "videos can't be processed: this processor was loaded without its video part; pip install "
            "torchvision num2words and load it again"
        )


def without_video(kind: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """The same class with image processor and tokenizer as its only parts."""
    parts = kind.get_attributes()

    class WithoutVideo(kind):
        video_processor = _NoVideo()

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [part for part in parts if part != "video_processor"]

        @classmethod
        def _get_arguments_from_pretrained(cls, *args: Any, **kwargs: Any) -> list[Any]:
            loaded = super()._get_arguments_from_pretrained(*args, **kwargs)
            by_name = dict(zip(cls.get_attributes(), loaded, strict=True))
            # The constructor still takes a video processor in its place.
            return [by_name.get(part) for part in parts]

    # Saved files name the class.
    WithoutVideo.__name__ = WithoutVideo.__qualname__ = kind.__name__
    WithoutVideo.__module__ = kind.__module__
    return WithoutVideo


@contextmanager
def _video_words(kind: type[ProcessorMixin]) -> Iterator[None]:
    """SmolVLM's constructor asks for num2words, which only the prompt of a video uses: videos are refused instead."""
    module: Any = sys.modules[kind.__module__]
    if not hasattr(module, "num2words"):
        yield
        return
    before = module.num2words

    def refuse(number: int) -> str:
        raise ImportError("videos need num2words; pip install num2words torchvision")

    module.num2words = before or refuse
    try:
        yield
    finally:
        module.num2words = before


Rule = Callable[[int, int, int], Tiles]
"""(height, width, crops) of a picture -> how its crops are arranged."""


def arrangement(processor: Any) -> Rule | None:
    """How a processor cuts a picture where neither tensors nor ids tell; None for all others.

    Raises (the rule itself):
        BadInputError: If the processor made another number of crops than the rule says.
    """
    images = processor.image_processor
    rule = RULES.get(type(images).__name__.removesuffix("Pil").removesuffix("Fast"))
    if rule is None:
        return None

    def checked(height: int, width: int, crops: int) -> Tiles:
        tiles = Tiles() if crops == 1 else rule(processor, height, width, crops)
        if tiles.rows * tiles.cols + bool(tiles.overview) != crops:
            raise BadInputError(
                f"a picture of {height} x {width} pixels was cut into {crops} crops, but by the rule of "
                f"{type(images).__name__} these would be {tiles}"
            )
        return tiles

    return checked


def _pan_and_scan(processor: Any, height: int, width: int, crops: int) -> Tiles:
    """Gemma 3: the whole, then crops along the longer side."""
    return Tiles(1, crops - 1, "first") if width >= height else Tiles(crops - 1, 1, "first")


def _canvas(processor: Any, height: int, width: int, crops: int) -> Tiles:
    """InternVL: the canvas of tiles nearest in shape, then a thumbnail."""
    images = processor.image_processor
    side = (images.size["height"], images.size["width"])
    # The function beside the class, wherever this version and backend of transformers keep it.
    canvas: Any = sys.modules[type(images).__module__]
    cols, rows = canvas.get_optimal_tiled_canvas((height, width), side, images.min_patches, images.max_patches)
    return Tiles(rows, cols, "last")


def _quadrants(processor: Any, height: int, width: int, crops: int) -> Tiles:
    """Idefics2 with image splitting: quarters, then the whole."""
    return Tiles(2, 2, "last")


RULES: dict[str, Callable[[Any, int, int, int], Tiles]] = {
    "Gemma3ImageProcessor": _pan_and_scan,
    "GotOcr2ImageProcessor": _canvas,
    "Idefics2ImageProcessor": _quadrants,
}
"""By the name of the image processor's class, without its backend."""
