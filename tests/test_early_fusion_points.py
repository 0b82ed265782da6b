"""Kinds of early fusion and its makers' other models: rescaled streams, third parts, pictures as words, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_mm.batch import batch_from_inputs
from hooked_mm.errors import BadInputError, UnsupportedModelError
from hooked_mm.hooked import HookedMM
from hooked_mm.images import ImageChecks
from hooked_mm.passes import Passes
from hooked_mm.testing.miniatures import miniature, miniature_inputs
from hooked_mm.views import Fused, Pass
from hooked_mm.vocabulary import never_said
from tests.families import close


def built(family: str) -> tuple[Any, HookedMM, dict[str, Tensor]]:
    """A miniature, the same wrapped, and a batch."""
    raw = miniature(family)
    return raw, HookedMM(raw, check=False), miniature_inputs(raw, family=family)


def test_without_its_change_a_rescaled_stream_is_the_sum() -> None:
    """Zero in place of what the factor changes is a factor of one; the value is post minus post / factor."""
    raw, model, inputs = built("gemma4_unified")
    name, block = "blocks.2.hook_rescale_out", raw.model.language_model.layers[2]
    _, cache = model.run_with_cache(inputs, [name, "blocks.2.hook_resid_mid", "blocks.2.hook_mlp_out"])
    total = cache["blocks.2.hook_resid_mid"] + cache["blocks.2.hook_mlp_out"]
    assert close(cache[name], total * (block.layer_scalar - 1)) < 1e-5
    got = model.run_with_hooks(inputs, [(name, lambda value, hook: 0 * value)])
    block.layer_scalar.fill_(1.0)
    with torch.no_grad():
        assert close(got, raw(**inputs).logits) < 1e-5


def test_a_third_part_is_one_of_the_streams_components() -> None:
    """Embedding, attention, MLP, per-layer embeddings and factors add up to the last stream; without the third part
    the logits are those of a model whose third norm gives nothing.
    """
    raw, model, inputs = built("gemma4")
    _, cache = model.run_with_cache(inputs, "*hook_*")
    parts, labels = cache.decompose_resid(return_labels=True)
    assert labels[:5] == ["embed", "0_attn_out", "0_mlp_out", "0_extra_out", "0_rescale_out"]
    assert close(parts.sum(dim=0), cache["blocks.5.hook_resid_post"]) < 1e-5
    got = model.run_with_hooks(inputs, [("blocks.1.hook_extra_out", lambda value, hook: 0 * value)])
    raw.model.language_model.layers[1].post_per_layer_input_norm.weight.data.zero_()
    with torch.no_grad():
        assert close(got, raw(**inputs).logits) < 1e-4


def test_a_stream_joined_by_gates_is_not_taken_apart() -> None:
    """Muse Spark weighs the stream itself, so nothing is a sum; that is said."""
    _, model, inputs = built("muse_spark")
    assert "blocks.0.hook_attn_out" not in model.hook_names
    _, cache = model.run_with_cache(inputs, "*hook_*")
    with pytest.raises(BadInputError, match="no sum of points"):
        cache.decompose_resid()


def test_image_positions_hold_words() -> None:
    """Each holds the embedding of a word; a vector that is none, or the placeholder's own, is noticed."""
    raw, model, inputs = built("emu3")
    batch = batch_from_inputs(inputs, model.structure, raw.config)
    checks = ImageChecks(Passes(model, batch, full=False, copies=1))
    _, cache = model.run_with_cache(inputs, ["hook_embed"])
    held = cache["hook_embed"][batch.mask("image")]
    assert checks._are_words(held)
    assert not checks._are_words(held + 1e-3)
    placeholder = raw.get_input_embeddings()(torch.tensor([150]))
    assert not checks._are_words(torch.cat([held, placeholder]))
    words = torch.cdist(held, raw.get_input_embeddings().weight).argmin(dim=1)
    # Codes are words 160 to 191, an end of line is word 159; rows of four codes, or of three in the tall picture.
    assert set(words.tolist()) <= {159, *range(160, 192)}
    assert (words == 159).nonzero()[:, 0].tolist()[:4] == [4, 9, 14, 19]


def test_words_that_are_never_said() -> None:
    """Those at the least number everywhere; the lens says what the model says of all others."""
    least = torch.finfo(torch.float32).min
    logits = torch.zeros(2, 3, 4)
    logits[..., 1] = least
    logits[0, :, 2] = least
    assert never_said(logits).tolist() == [False, True, False, False]
    _, model, inputs = built("chameleon")
    given, cache = model.run_with_cache(inputs, ["blocks.3.hook_resid_post"])
    silent = never_said(given)
    assert silent.nonzero()[:, 0].tolist() == list(range(160, 192))
    lens = model.to_logits(cache["blocks.3.hook_resid_post"])
    assert close(lens[..., ~silent], given[..., ~silent]) < 1e-5


def test_an_unembedding_may_be_wider_than_the_vocabulary() -> None:
    """Inkling's has eight outputs more than words, and its logits are divided by a number of the configuration."""
    raw, model, inputs = built("inkling_mm_model")
    assert model.cfg.d_vocab == 200
    assert raw.lm_head.out_features == 208
    logits, cache = model.run_with_cache(inputs, ["blocks.3.hook_resid_post"])
    assert close(model.to_logits(cache["blocks.3.hook_resid_post"]), logits) < 1e-5


def test_a_projection_fused_by_head() -> None:
    """Each head's query, key and value stand behind each other; a write to one leaves the others."""
    whole = torch.arange(2 * 3 * 2 * 3 * 4.0).view(2, 3, 24)
    run = Pass(lambda path: None, 3)
    for index in range(3):
        view = Fused(index, 2, 2, by_head=True)
        shown = view.show(whole, run)
        assert torch.equal(shown, whole.view(2, 3, 2, 3, 4)[..., index, :])
        assert torch.equal(view.back(shown, whole), whole)
        changed = view.back(-shown, whole)
        assert torch.equal(view.show(changed, run), -shown)
        assert torch.equal(
            Fused((index + 1) % 3, 2, 2, by_head=True).show(changed, run),
            whole.view(2, 3, 2, 3, 4)[..., (index + 1) % 3, :],
        )


@pytest.mark.parametrize(("family", "why"), [("pi0", "no vocabulary"), ("inkling2", "no residual stream")])
def test_what_has_no_logits_or_no_stream_is_refused(family: str, why: str) -> None:
    """With the reason."""
    with pytest.raises(UnsupportedModelError, match=why):
        HookedMM(miniature(family))
