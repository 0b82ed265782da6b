"""The part between tower and text: by name, by configuration, by what is left over; whether it runs in a loop."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from hooked_mm.architectures import Oddity
from hooked_mm.errors import UnknownHookError
from hooked_mm.hooked import HookedMM
from hooked_mm.projectors import find_projector, layered, runs_in_a_loop
from hooked_mm.testing.miniatures import miniature, miniature_inputs


class Core(nn.Module):
    """A tower, a text and something between them."""

    def __init__(self, between: nn.Module, name: str = "bridge") -> None:
        super().__init__()
        self.tower, self.text = nn.Linear(2, 2), nn.Linear(2, 2)
        setattr(self, name, between)


class Once(nn.Module):
    """Calls its part in one go, and another one in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.other = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, pictures: Tensor) -> Tensor:
        for picture in pictures:
            self.other(picture)
        return self.part(pictures)


class Listed(Once):
    """Calls its part for every picture."""

    def forward(self, pictures: Tensor) -> Tensor:
        return torch.stack([self.part(picture) for picture in pictures])


def test_a_loop_is_seen() -> None:
    """In a loop or a comprehension; a loop around something else does not count."""
    assert not runs_in_a_loop(Once(), "part")
    assert runs_in_a_loop(Once(), "other")
    assert runs_in_a_loop(Listed(), "part")


def test_what_is_left_over_is_it() -> None:
    """One part that nothing else claims; two are none."""
    core = Core(nn.Linear(2, 2))
    assert find_projector(core, [core.tower, core.text], SimpleNamespace(), Oddity()) is core.bridge
    assert find_projector(core, [core.tower], SimpleNamespace(), Oddity()) is None
    named = Core(nn.Linear(2, 2), "multi_modal_projector")
    assert find_projector(named, [], SimpleNamespace(), Oddity()) is named.multi_modal_projector


def test_of_several_it_is_that_of_the_first_text_layer() -> None:
    """The configuration names (tower layer, text layer) of each."""
    config = SimpleNamespace(deepstack_layer_map=[[-2, 1], [-1, 0]])
    core = Core(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), "layerwise_projectors")
    assert layered(config) == ((-2, 1), (-1, 0))
    assert layered(SimpleNamespace()) == ()
    assert find_projector(core, [], config, Oddity()) is core.layerwise_projectors[1]


def test_one_that_runs_once_per_image_has_no_points_and_is_checked_all_the_same() -> None:
    """LFM2-VL: asking says why; its outputs, one behind the other, are the features at image positions."""
    model = HookedMM(miniature("lfm2_vl"))
    inputs = miniature_inputs(model.hf_model)
    with pytest.raises(UnknownHookError, match="once per image"):
        model.run_with_cache(inputs, "projector.hook_out")
    assert model.conformance is not None
    found = [check for check in model.conformance.checks if check.what == "image features stand at image positions"]
    assert [(check.point, check.verdict) for check in found] == [("hook_embed", "holds")]
