"""Patchscopes: into itself nothing changes, at layer 0 it is the token itself, else it is a raw hook's edit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from analyses.logit_lens import lens_points
from analyses.patchscope import IDENTITY, Source, Target, injection, patchscope, read, word_target
from hooked_mm.errors import BadInputError, UnknownWordError
from hooked_mm.hooked import HookedMM

TEXT = "what colour is the object ?"


def place_of(target: Target, back: int = 0) -> int:
    """The column of a target's position in its batch."""
    return int(target.batch.mask()[0].nonzero()[target.position - back, 0])


def logits_with(model: HookedMM, target: Target, resid: Tensor, layer: int) -> Tensor:
    found = model.run_with_hooks(target.batch, [injection(model, resid, target.position, layer)])
    assert found is not None
    return found


def test_a_position_put_into_itself_changes_nothing(llava: HookedMM, images: list[Image.Image]) -> None:
    """At every layer, to the bit."""
    target = word_target(llava, TEXT, "object", images[0])
    points = lens_points(llava.hook_names)
    clean, cache = llava.run_with_cache(target.batch, list(points.values()))
    assert clean is not None
    for layer, point in points.items():
        own = cache[point][:, place_of(target)]
        assert torch.equal(logits_with(llava, target, own, layer), clean)


def test_at_layer_zero_a_token_is_as_if_it_had_been_written(llava: HookedMM, images: list[Image.Image]) -> None:
    """Every logit of "what colour is the star ?", though "object" stands there."""
    written = word_target(llava, TEXT.replace("object", "star"), "star", images[0])
    expected, cache = llava.run_with_cache(written.batch, "blocks.0.hook_resid_pre")
    assert expected is not None
    target = word_target(llava, TEXT, "object", images[0])
    star = cache["blocks.0.hook_resid_pre"][:, place_of(written)]
    torch.testing.assert_close(logits_with(llava, target, star, 0), expected, rtol=0, atol=1e-5)
    clean = llava.run_with_hooks(target.batch)
    assert clean is not None
    assert (clean - expected).abs().max() > 0.1


@pytest.mark.parametrize("layer", [1, 4])
def test_it_is_the_edit_of_a_raw_hook(llava: HookedMM, images: list[Image.Image], layer: int) -> None:
    """What a block leaves is overwritten at one position."""
    target = word_target(llava, TEXT, "object", images[1])
    resid = torch.randn(1, 128, generator=torch.Generator().manual_seed(0))

    def edit(module: Any, args: Any, value: Any) -> Any:
        hidden = (value[0] if isinstance(value, tuple) else value).clone()
        hidden[:, place_of(target)] = resid
        return (hidden, *value[1:]) if isinstance(value, tuple) else hidden

    handle = llava.hf_model.model.language_model.layers[layer - 1].register_forward_hook(edit)
    try:
        with torch.no_grad():
            expected = llava.hf_model(**target.batch.inputs).logits
    finally:
        handle.remove()
    torch.testing.assert_close(logits_with(llava, target, resid, layer), expected, rtol=0, atol=1e-5)


def test_many_together_are_read_as_each_alone(llava: HookedMM, images: list[Image.Image]) -> None:
    """Of several layers, samples and positions, into their own layer or one for all, in their order."""
    batch = llava.prepare(images[:3], "what place is this ?")
    points = lens_points(llava.hook_names)
    _, cache = llava.run_with_cache(batch, list(points.values()))
    own = batch.mask("image")[0].nonzero()[:, 0].tolist()
    sources = [Source(n % 3, own[7 * n], (0, 3, 5)[n % 2]) for n in range(8)]
    target = word_target(llava, TEXT, "object")
    for layer in (None, 2):
        together = patchscope(llava, cache, sources, target, layer, size=3)
        for source, said in zip(sources, together, strict=True):
            row = cache[points[source.layer]][source.sample, source.position][None]
            at = source.layer if layer is None else layer
            assert read(llava, row, target, at) == [said]
    assert len(set(patchscope(llava, cache, sources, target))) > 1


def test_targets_are_of_the_models_language(llava: HookedMM) -> None:
    """The paper's prompt is not of the small model's; a word that the text lacks, or a position, is refused."""
    with pytest.raises(UnknownWordError):
        word_target(llava, IDENTITY, "?")
    with pytest.raises(BadInputError, match="has no token 'circle'; its tokens are"):
        word_target(llava, TEXT, "circle")
    target = word_target(llava, TEXT, "object")
    assert target.batch.tokens[0][place_of(target)] == "object"
    with pytest.raises(BadInputError, match="token 99 of"):
        Target(target.batch, 99)
    with pytest.raises(BadInputError, match="got 2 prompts"):
        Target(target.batch.take([0, 0]), 0)
    with pytest.raises(BadInputError, match="layer 9 was asked for"):
        read(llava, torch.zeros(1, 128), target, 9)
