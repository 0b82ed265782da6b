"""hooked-mm: any Hugging Face vision-language model as one hooked interface.

Names are imported when first used, so that the command line starts at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hooked_mm.batch import Batch, Modality, Role
    from hooked_mm.cache import ActivationCache, Selection
    from hooked_mm.conditions import Above, Below
    from hooked_mm.conformance import ConformanceReport
    from hooked_mm.data import Sample, SampleDataModule
    from hooked_mm.errors import (
        BadInputError,
        ConformanceError,
        HookedMMError,
        StoreError,
        UnknownHookError,
        UnsupportedModelError,
    )
    from hooked_mm.extraction import Extractor
    from hooked_mm.extraction_job import extract
    from hooked_mm.generation import GenerationOutput
    from hooked_mm.hooked import HookedMM
    from hooked_mm.interventions import Add, Compose, Intervention, ProjectOut, Replace, Rotate, Scale, SetComponent
    from hooked_mm.knockout import KnockOut
    from hooked_mm.patching import Patch
    from hooked_mm.positions import Positions
    from hooked_mm.prefix import SharedPrompts
    from hooked_mm.processors import load_processor
    from hooked_mm.prompts import Turn
    from hooked_mm.reader import ModelSource
    from hooked_mm.runner import Hook
    from hooked_mm.selectors import AtIndex, BeforeSpecial, EachOf, LastPrompt, MeanOver, Selector, TokenOfInterest
    from hooked_mm.steering_vector import SteeringVector
    from hooked_mm.store import ActivationStore
    from hooked_mm.store_writer import StoreWriter
    from hooked_mm.vector_hub import push_vectors, vectors_from_hub

_HOME = {
    "Batch": "batch",
    "Modality": "batch",
    "Role": "batch",
    "ActivationCache": "cache",
    "Selection": "cache",
    "Above": "conditions",
    "Below": "conditions",
    "ConformanceReport": "conformance",
    "Sample": "data",
    "SampleDataModule": "data",
    "BadInputError": "errors",
    "ConformanceError": "errors",
    "HookedMMError": "errors",
    "StoreError": "errors",
    "UnknownHookError": "errors",
    "UnsupportedModelError": "errors",
    "Extractor": "extraction",
    "ModelSource": "reader",
    "extract": "extraction_job",
    "GenerationOutput": "generation",
    "HookedMM": "hooked",
    "Add": "interventions",
    "Compose": "interventions",
    "Intervention": "interventions",
    "ProjectOut": "interventions",
    "Replace": "interventions",
    "Rotate": "interventions",
    "Scale": "interventions",
    "SetComponent": "interventions",
    "KnockOut": "knockout",
    "Patch": "patching",
    "Positions": "positions",
    "SharedPrompts": "prefix",
    "load_processor": "processors",
    "Hook": "runner",
    "AtIndex": "selectors",
    "BeforeSpecial": "selectors",
    "EachOf": "selectors",
    "LastPrompt": "selectors",
    "MeanOver": "selectors",
    "Selector": "selectors",
    "TokenOfInterest": "selectors",
    "SteeringVector": "steering_vector",
    "ActivationStore": "store",
    "StoreWriter": "store_writer",
    "Turn": "prompts",
    "push_vectors": "vector_hub",
    "vectors_from_hub": "vector_hub",
}

__all__ = [
    "Above",
    "ActivationCache",
    "ActivationStore",
    "Add",
    "AtIndex",
    "BadInputError",
    "Batch",
    "BeforeSpecial",
    "Below",
    "Compose",
    "ConformanceError",
    "ConformanceReport",
    "EachOf",
    "Extractor",
    "GenerationOutput",
    "Hook",
    "HookedMM",
    "HookedMMError",
    "Intervention",
    "KnockOut",
    "LastPrompt",
    "MeanOver",
    "Modality",
    "ModelSource",
    "Patch",
    "Positions",
    "ProjectOut",
    "Replace",
    "Role",
    "Rotate",
    "Sample",
    "SampleDataModule",
    "Scale",
    "Selection",
    "Selector",
    "SetComponent",
    "SharedPrompts",
    "SteeringVector",
    "StoreError",
    "StoreWriter",
    "TokenOfInterest",
    "Turn",
    "UnknownHookError",
    "UnsupportedModelError",
    "extract",
    "load_processor",
    "push_vectors",
    "vectors_from_hub",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hooked_mm' has no attribute {name!r}")
    return getattr(import_module(f"hooked_mm.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
