"""What a check looks at: which points, where a write must be seen, what goes into the projector."""

from __future__ import annotations

import pytest
import torch

from hooked_mm.architectures import FAMILIES
from hooked_mm.hooked import HookedMM
from hooked_mm.passes import Passes
from hooked_mm.testing.miniatures import miniature, miniature_inputs


def passes(family: str, *, full: bool = True) -> Passes:
    """Of a miniature."""
    model = HookedMM(miniature(family), check=False)
    return Passes(model, model._batch(miniature_inputs(model.hf_model)), full=full, copies=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_write_is_looked_for_behind_it(family: str) -> None:
    """Every point's follower lies behind it in the list, in the same block or at the next place; none is missing."""
    made = passes(family)
    order = {name: index for index, name in enumerate(made.points)}
    lost = []
    for name, point in made.points.items():
        follower = made.follower(name)
        if follower is None:
            lost.append(point.layer)
            continue
        assert order[follower] > order[name] or name == "hook_logits", name
        if point.layer is not None and not name.endswith(("resid_post", "insert_out")):
            assert follower == f"{name.split('blocks.')[0]}blocks.{point.layer}.hook_resid_post"
    # Only what lies behind the tower's block that the projector reads is followed by nothing.
    reads_before_last = made.model.hf_model.config.to_dict().get("vision_feature_layer", -1) == -2
    last = made.structure.stacks["vision"].n_layers - 1
    assert set(lost) == ({last} if reads_before_last else set())


def test_all_points_of_the_blocks_looked_at() -> None:
    """The fast form leaves out blocks between the first and last of a kind, the full form none."""
    fast, full = passes("llava", full=False), passes("llava")
    assert set(full.names()) == set(full.points)
    left_out = set(full.names()) - set(fast.names())
    assert {full.points[name].layer for name in left_out} == {1, 2}
    full.dead.add("blocks.0.attn.hook_z")
    assert "blocks.0.attn.hook_z" not in full.names()


def test_padding_is_left_out_where_the_text_has_it() -> None:
    """Real positions of text and encoder; a tower and an encoder-decoder's decoder have no such mask."""
    made = passes("llava")
    keep = made.keep("text")
    assert keep is not None
    assert torch.equal(keep, made.batch.inputs["attention_mask"].bool())
    assert made.keep("vision") is None
    florence = passes("florence2")
    assert florence.keep("text") is None
    assert florence.keep("encoder") is not None


def test_what_goes_into_the_projector_is_seen_by_a_raw_hook() -> None:
    """Without our own code; the hook is gone afterwards."""
    made = passes("llava")
    module = made.model.hf_model.model.multi_modal_projector
    logits, entering = made.bare()
    assert entering[0].shape == (3, 16, 32)
    assert not module._forward_pre_hooks
    assert torch.equal(logits, made.model.hf_model(**made.batch.inputs).logits)
