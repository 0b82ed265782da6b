"""What is found without running is the same on a model without weights as on one with them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hooked_mm.checkpoint_keys import on_meta
from hooked_mm.errors import BadInputError
from hooked_mm.resolve import resolve
from hooked_mm.skeleton import LeftOut, final_norm, readout, skeleton
from tests.miniature_checks import shared


@pytest.mark.parametrize("family", ["llava", "blip-2", "florence2", "mllama", "glm5_next", "blip", "fuyu"])
def test_a_model_without_weights_has_the_same_ends(family: str) -> None:
    """And the same tower and projector."""
    model = shared(family)
    bare = on_meta(model.config)
    assert readout(bare, skeleton(bare)) == resolve(model).readout
    for name in ("tower", "projector", "decoder", "encoder", "norm", "embed", "unembed", "collapse"):
        one, other = (
            next((path for path, part in m.named_modules() if part is getattr(skeleton(m), name)), None)
            for m in (model, bare)
        )
        assert one == other, name


class Unnamed(nn.Module):
    """A decoder whose norm goes by no known name."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.queer = nn.LayerNorm(4)
        self.other = nn.RMSNorm(4, eps=1e-6)


def test_a_norm_without_weights_is_told_by_what_it_does() -> None:
    """A copy of it is run; of two none is chosen."""
    with torch.device("meta"):
        one, two = Unnamed(), Unnamed()
    del one.queer
    assert final_norm(one) is one.other
    assert one.other.weight.is_meta
    assert final_norm(two) is None


def test_what_was_left_out_says_so() -> None:
    """When it is called."""
    with pytest.raises(BadInputError, match=r"loaded without its 'model\.tower', which pictures need"):
        LeftOut("model.tower")(torch.ones(1))
