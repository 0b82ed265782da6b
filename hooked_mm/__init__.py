"""hooked-mm: any Hugging Face vision-language model as one hooked interface.

Names are imported when first used, so that the command line starts at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hooked_mm.batch import Batch, Modality, Role
    from hooked_mm.cache import ActivationCache, Selection
    from hooked_mm.data import Sample, SampleDataModule
    from hooked_mm.errors import BadInputError, HookedMMError, StoreError, UnknownHookError, UnsupportedModelError
    from hooked_mm.extraction import Extractor, extract
    from hooked_mm.hooked import GenerationOutput, HookedMM
    from hooked_mm.selectors import LastPrompt, MeanOver, TokenOfInterest
    from hooked_mm.store import ActivationStore, StoreWriter

_HOME = {
    "Batch": "batch",
    "Modality": "batch",
    "Role": "batch",
    "ActivationCache": "cache",
    "Selection": "cache",
    "Sample": "data",
    "SampleDataModule": "data",
    "BadInputError": "errors",
    "HookedMMError": "errors",
    "StoreError": "errors",
    "UnknownHookError": "errors",
    "UnsupportedModelError": "errors",
    "Extractor": "extraction",
    "extract": "extraction",
    "GenerationOutput": "hooked",
    "HookedMM": "hooked",
    "LastPrompt": "selectors",
    "MeanOver": "selectors",
    "TokenOfInterest": "selectors",
    "ActivationStore": "store",
    "StoreWriter": "store",
}

__all__ = [
    "ActivationCache",
    "ActivationStore",
    "BadInputError",
    "Batch",
    "Extractor",
    "GenerationOutput",
    "HookedMM",
    "HookedMMError",
    "LastPrompt",
    "MeanOver",
    "Modality",
    "Role",
    "Sample",
    "SampleDataModule",
    "Selection",
    "StoreError",
    "StoreWriter",
    "TokenOfInterest",
    "UnknownHookError",
    "UnsupportedModelError",
    "extract",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hooked_mm' has no attribute {name!r}")
    return getattr(import_module(f"hooked_mm.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
