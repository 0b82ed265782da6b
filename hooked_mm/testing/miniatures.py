"""Miniature models: every architecture built from its own transformers configuration, with random weights.

A miniature has all that is peculiar to its architecture (tiles, windows, gates, deepstack, cross-attention, ...) at a
size that runs in milliseconds. `hooked-mm models` checks these, and so do the tests; nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from hooked_mm.errors import BadInputError, unknown
from hooked_mm.testing import (
    early_fusion,
    early_fusion_more,
    encoders_and_cross,
    image_encoders,
    mixed_tower,
    mixed_tower_ocr,
    packed_tower,
    packed_tower_moe,
    packed_tower_more,
    ported,
    single_tower,
    single_tower_more,
)
from hooked_mm.testing.recipe import Inputs, Recipe

PORTED = tuple(ported.RECIPES)
"""Those that transformers lacks."""
RECIPES: dict[str, Recipe] = {
    **single_tower.RECIPES,
    **single_tower_more.RECIPES,
    **packed_tower.RECIPES,
    **packed_tower_more.RECIPES,
    **packed_tower_moe.RECIPES,
    **encoders_and_cross.RECIPES,
    **image_encoders.RECIPES,
    **early_fusion.RECIPES,
    **early_fusion_more.RECIPES,
    **mixed_tower.RECIPES,
    **mixed_tower_ocr.RECIPES,
    **ported.RECIPES,
}
"""`config.model_type` -> how it is built small."""


def _model_types(config: Mapping[str, Any]) -> Iterator[str]:
    """Of the parts of a configuration."""
    for name, value in config.items():
        if name == "model_type":
            yield value
        elif isinstance(value, Mapping):
            yield from _model_types(value)


def lacking(family: str) -> list[str]:
    """The model types of an architecture, its own and its parts', that the installed transformers does not know."""
    own = [] if family in (*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, *PORTED) else [family]
    return own + [name for name in _model_types(RECIPES[family].config) if name not in CONFIG_MAPPING_NAMES]


def known(families: Iterable[str] = tuple(RECIPES)) -> tuple[str, ...]:
    """Those of these architectures that the installed transformers knows: newer ones are of newer versions."""
    return tuple(family for family in families if not lacking(family))


def recipe(family: str) -> Recipe:
    """The recipe of an architecture that can be built here.

    Raises:
        BadInputError: For an unknown one, one that the installed transformers does not know, one that has no miniature,
            or one whose packages are not installed.
    """
    if family not in RECIPES:
        raise unknown("miniature of", family, RECIPES)
    found = RECIPES[family]
    if new := lacking(family):
        part = "" if new[0] == family else f", a part of {family!r}"
        raise BadInputError(
            f"this transformers ({transformers.__version__}) does not know {new[0]!r}{part}; it needs a newer one"
        )
    if found.why_not:
        raise BadInputError(f"there is no miniature of {family!r}: {found.why_not}")
    missing = [package for package in found.needs if importlib.util.find_spec(package) is None]
    if missing:
        raise BadInputError(
            f"{family!r} needs {' and '.join(missing)}, which transformers imports for it; install with "
            f"pip install {' '.join(missing)}"
        )
    return found


def miniature(family: str, *, seed: int = 0) -> Any:
    """A transformers model of a family with random weights, float32, in evaluation mode.

    Every parameter is random, also those which transformers starts at zero or one (gates, layer scales, biases,
    norm gains): what they multiply would otherwise escape any check.

    Raises:
        BadInputError: As in `recipe`.
    """
    found = recipe(family)
    torch_state = torch.get_rng_state()
    try:
        torch.manual_seed(seed)
        model = found.build(family, found.config)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            _randomise(parameter, generator)
    finally:
        torch.set_rng_state(torch_state)
    model.requires_grad_(False)
    return model.eval()


@torch.no_grad()
def _randomise(parameter: Tensor, generator: torch.Generator) -> None:
    noise = torch.randn(parameter.shape, generator=generator)
    if parameter.ndim < 2 or 1 in parameter.shape:
        # Gains stay near their start, gates and biases leave zero.
        parameter.add_(0.3 * noise)
    else:
        # Experts lie behind each other: a matrix each.
        fan_in = max(parameter.shape[1:]) if parameter.ndim == 3 else parameter[0].numel()
        parameter.copy_(noise / fan_in**0.5)


def miniature_inputs(
    model: Any, samples: int = 3, *, padding_side: str = "left", seed: int = 0, family: str | None = None
) -> Inputs:
    """Forward tensors of a batch with one image per sample, prompts of different lengths, padded.

    Args:
        model: From `miniature`.
        samples: How many.
        padding_side: `"left"` or `"right"`.
        seed: Of pictures and prompts.
        family: Whose recipe, where the model's own type is another's (`glmga` calls itself `glm46v`).
    """
    found = recipe(family or model.config.model_type)
    generator = torch.Generator().manual_seed(seed)
    pictures = found.pictures(model.config, samples, generator)
    # A decoder of its own begins with a token of its own.
    start = getattr(model.generation_config, "decoder_start_token_id", None) if found.prefix else None
    rows = []
    for index, count in enumerate(found.counts(model, pictures)):
        before, after = (torch.randint(3, 140, (2 + index,), generator=generator).tolist() for _ in range(2))
        rows.append([1 if start is None else start, *before, *found.ids(count), *after])
    width = max(map(len, rows))
    ids = torch.zeros(samples, width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if padding_side == "left" else slice(0, len(row))
        ids[index, place], mask[index, place] = torch.tensor(row), 1
    inputs = {f"{found.prefix}input_ids": ids, f"{found.prefix}attention_mask": mask, **pictures}
    extra = found.extra(model.config, inputs)
    # Older versions tell the kinds of tokens by the ids alone.
    module: Any = inspect.getmodule(type(model))
    source = inspect.getsource(module)
    return inputs | {name: value for name, value in extra.items() if "token_type" not in name or name in source}
