"""Molmo's tower and connector against the reference, each by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_mm.molmo.configuration_molmo import MolmoConfig
from hooked_mm.molmo.vision_molmo import MolmoVisionBackbone
from tests.molmo_examples import SIZES
from tests.molmo_published import narrowed, published_config, published_state
from tests.molmo_reference import Weights, image_features, tower

PREFIX = "model.vision_backbone."


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return published_state(SIZES)


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def backbone(request: pytest.FixtureRequest, state: dict[str, Tensor]) -> Any:
    """In float64."""
    config = MolmoConfig(**published_config(SIZES), **narrowed(SIZES))
    config.vision_config._attn_implementation = request.param
    made = MolmoVisionBackbone(config).double().eval()
    made.load_state_dict({name.removeprefix(PREFIX): value for name, value in state.items() if PREFIX in name})
    return made


@pytest.fixture(scope="module")
def crops() -> Tensor:
    """Three crops, (3, patches, pixels)."""
    return torch.randn(
        3, SIZES.across**2, 3 * SIZES.patch**2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


def test_the_outputs_of_all_blocks(backbone: Any, state: dict[str, Tensor], crops: Tensor) -> None:
    """Class token first, the embeddings not among them."""
    with torch.no_grad():
        got = backbone.image_vit(crops)
    want = tower(Weights(state).below("vision_backbone.image_vit"), crops, SIZES)
    assert len(got) == len(want) == SIZES.tower_blocks
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=0)


def test_image_tokens_of_pictures_padding_and_crops_of_which_nothing_is_told(
    backbone: Any, state: dict[str, Tensor], crops: Tensor
) -> None:
    """Masks of 0, of 1, between and of -1, mixed within what is pooled."""
    masks = torch.tensor([0.0, 1.0, 0.25, -1.0, 1.0 - 2**-20])[torch.arange(3 * SIZES.across**2) * 7 % 5].view(3, -1)
    with torch.no_grad():
        got = backbone(crops, masks)
    torch.testing.assert_close(got, image_features(state, crops, masks, SIZES), atol=1e-11, rtol=0)


def test_neighbours_are_pooled_and_no_others(backbone: Any, state: dict[str, Tensor], crops: Tensor) -> None:
    """A patch that is called padding changes the one token that it is part of."""
    whole = torch.ones(3, SIZES.across**2)
    row, col = 5, 2
    padded = whole.clone()
    padded[1, row * SIZES.across + col] = 0
    with torch.no_grad():
        changed = (backbone(crops, padded) != backbone(crops, whole)).any(-1)
    assert changed.nonzero().tolist() == [[1, row // 2 * SIZES.cells + col // 2]]
