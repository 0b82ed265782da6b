"""Direct logit attribution: parts sum to the logit, heads split by position against weights multiplied by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import Gemma2Config, GraniteConfig, Starcoder2Config

from analyses.logit_attribution import LogitShares, logit_attribution
from analyses.targets import Targets, answer_targets, prompt_targets
from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.testing.miniatures import miniature as of_family
from hooked_mm.testing.miniatures import miniature_inputs
from tests.decoders import INPUTS, miniature

QUESTIONS = ("what colour is the star ?", "is there a big star above the small red circle ?", "what place is this ?")


@pytest.fixture(scope="module")
def asked(llava: HookedMM, images: list[Image.Image]) -> tuple[Batch, Targets, LogitShares]:
    """Three answers, each of their tokens a target; some of several tokens."""
    batch = llava.prepare(images[:3], list(QUESTIONS), ["red", "top left", "sea"])
    targets = answer_targets(batch)
    return batch, targets, logit_attribution(llava, batch, targets)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["llava", "idefics2", "qwen2_vl", "molmo"])
def test_parts_sum_to_the_logit_on_every_small_model(name: str, images: list[Image.Image]) -> None:
    """Within 1e-4, with foils and without; and what heads get from positions to what they put in."""
    model = HookedMM.small(name)
    batch = model.prepare(images[:2], list(QUESTIONS[:2]))
    red, blue, yes, no = model.tokenizer.convert_tokens_to_ids(["red", "blue", "yes", "no"])
    for targets in (prompt_targets(batch, [red, yes]), prompt_targets(batch, [red, yes], [blue, no])):
        found = logit_attribution(model, batch, targets)
        logits = model.run_with_hooks(batch)
        assert logits is not None
        torch.testing.assert_close(found.total(), targets.scores(logits), rtol=0, atol=1e-4)
        assert list(found.sources) == list(range(6))
        assert not found.unsplit
        for layer, parts in found.sources.items():
            heads = torch.stack([found.of(f"L{layer}H{head}") for head in range(4)], dim=1)
            torch.testing.assert_close(parts.sum(2), heads, rtol=0, atol=1e-5)


def test_heads_are_split_by_position_as_their_weights_say(
    llava: HookedMM, asked: tuple[Batch, Targets, LogitShares]
) -> None:
    """A[t, k] W_O[h] W_V[h] norm(x_k) . (gain * W_U) / s, weight by weight in float64."""
    batch, targets, found = asked
    layer, state = 4, {name: value.double() for name, value in llava.hf_model.state_dict().items()}
    own = next(name for name in state if name.endswith(f"layers.{layer}.input_layernorm.weight"))
    prefix = own.removesuffix("input_layernorm.weight")
    final = f"{prefix.split('layers.')[0]}norm.weight"
    names = [f"blocks.{layer}.hook_resid_pre", f"blocks.{layer}.attn.hook_pattern", "blocks.5.hook_resid_post"]
    _, cache = llava.run_with_cache(batch, names)
    stream, pattern, last = (cache[name].double() for name in names)
    eps = llava.hf_model.config.text_config.rms_norm_eps
    read = stream / (stream.square().mean(-1, keepdim=True) + eps).sqrt() * state[own]
    values = (read @ state[f"{prefix}self_attn.v_proj.weight"].T).unflatten(-1, (4, 32))
    out = state[f"{prefix}self_attn.o_proj.weight"].unflatten(1, (4, 32))
    for number in range(len(targets)):
        sample, row = int(targets.sample[number]), int(targets.row[number])
        x = last[sample, row]
        u = state[final] * state["lm_head.weight"][targets.token[number]] / (x.square().mean() + eps).sqrt()
        for head in range(4):
            written = (pattern[sample, head, row, :, None] * values[sample, :, head]) @ out[:, head].T
            parts = found.sources[layer][number, head].double()
            torch.testing.assert_close(parts, written @ u, rtol=0, atol=1e-5)
    behind = torch.arange(batch.modality.shape[1]) > targets.row[:, None]
    assert found.by_position()[behind].abs().max() == 0


def test_mlps_and_embedding_are_what_their_points_hold(
    llava: HookedMM, asked: tuple[Batch, Targets, LogitShares]
) -> None:
    """As the cache's own attribution of components tells them; kinds of parts are sums of them."""
    batch, targets, found = asked
    _, cache = llava.run_with_cache(batch)
    parts, labels = cache.decompose_resid(return_labels=True)
    ids = torch.zeros(batch.modality.shape, dtype=torch.long)
    ids[targets.sample, targets.row] = targets.token
    expected = cache.logit_attrs(parts, ids)[:, targets.sample, targets.row]
    for label in ("embed", "0_mlp_out", "5_mlp_out"):
        torch.testing.assert_close(found.of(label), expected[labels.index(label)], rtol=0, atol=1e-4)
    heads = sum(found.of(f"L2H{head}") for head in range(4)) + found.of("2_attn_bias")
    torch.testing.assert_close(heads, expected[labels.index("2_attn_out")], rtol=0, atol=1e-4)
    kinds = found.by_kind((batch.modality == 2)[targets.sample])
    assert list(kinds) == ["heads, image", "heads, text", "mlp", "embedding", "other"]
    torch.testing.assert_close(sum(kinds.values()), found.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(kinds["mlp"], sum(found.of(f"{layer}_mlp_out") for layer in range(6)))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("config", "options"),
    [(Starcoder2Config, {}), (Gemma2Config, {"head_dim": 8}), (GraniteConfig, {"residual_multiplier": 0.3})],
)
def test_grouped_heads_biases_norms_and_factors_behind_attention(config: type, options: dict[str, Any]) -> None:
    """Values of a group under several heads; LayerNorm's centring; Gemma 2's norm behind, Granite's factors."""
    model = miniature(config, **options)
    model.hf_model.double()
    inputs = {name: value[:1] for name, value in INPUTS.items()}
    inputs["pixel_values"] = inputs["pixel_values"].double()
    batch = model._batch(inputs)
    targets = Targets(
        torch.tensor([0] * 3), torch.tensor([19, 18, 5]), torch.tensor([11, 12, 13]), torch.tensor([3] * 3)
    )
    found = logit_attribution(model, batch, targets)
    with torch.no_grad():
        logits = model.hf_model(**inputs).logits
    # Transformers' RMSNorms compute in float32, whatever the model's dtype.
    near = 1e-9 if config is Starcoder2Config else 1e-6
    torch.testing.assert_close(found.total(), targets.scores(logits), rtol=0, atol=near)
    for layer, parts in found.sources.items():
        heads = torch.stack([found.of(f"L{layer}H{head}") for head in range(4)], dim=1)
        torch.testing.assert_close(parts.sum(2), heads, rtol=0, atol=near)
    assert len(found.sources) == 3
    assert (found.of("0_attn_bias").abs().max() > 1e-3) == (config is Starcoder2Config)


def test_a_target_does_not_depend_on_its_companions(
    llava: HookedMM, images: list[Image.Image], asked: tuple[Batch, Targets, LogitShares]
) -> None:
    """Nor on padding and its side; only the layers asked for are split."""
    batch, targets, found = asked
    alone = llava.prepare([images[2]], [QUESTIONS[2]], ["sea"], padding_side="right")
    own = logit_attribution(llava, alone, answer_targets(alone), layers=[1, 4])
    number = targets.sample.tolist().index(2)
    torch.testing.assert_close(own.shares[:, 0], found.shares[:, number], rtol=0, atol=1e-4)
    real = batch.modality[2] != 0
    torch.testing.assert_close(own.sources[4][0], found.sources[4][number][:, real], rtol=0, atol=1e-5)
    assert list(own.sources) == [1, 4]
    with pytest.raises(BadInputError, match="layer 0 was not split by position: it was not asked for"):
        own.by_position([0])
    with pytest.raises(BadInputError, match="no part '9_mlp_out'"):
        own.of("9_mlp_out")
    with pytest.raises(BadInputError, match="layer 6 can't be split by position: it has no attention heads"):
        logit_attribution(llava, alone, answer_targets(alone), layers=[6])
    with pytest.raises(BadInputError, match="no layer was split"):
        logit_attribution(llava, alone, answer_targets(alone), layers=[]).by_position()


def test_models_whose_parts_do_not_sum_are_refused_and_gates_are_told() -> None:
    """Blocks that normalise the sum have no shares; heads behind a gate have, but not by position."""
    for family, message in (("git", "does not sum to its final stream"), ("qwen3_5", "")):
        model = HookedMM(of_family(family), check=False)
        batch = model._batch(miniature_inputs(model.hf_model, family=family))
        targets = prompt_targets(batch, [5] * len(batch))
        if message:
            with pytest.raises(BadInputError, match=message):
                logit_attribution(model, batch, targets)
            continue
        found = logit_attribution(model, batch, targets)
        torch.testing.assert_close(found.total(), found.logits, rtol=0, atol=1e-4)
        assert not found.sources
        layer = next(layer for layer, why in found.unsplit.items() if "a gate or a norm lies between" in why)
        with pytest.raises(BadInputError, match=f"layer {layer} can't be split by position: what its heads mix"):
            logit_attribution(model, batch, targets, layers=[layer])


def test_a_hook_that_writes_into_the_stream_is_noticed(llava: HookedMM, images: list[Image.Image]) -> None:
    """Parts of a run that was changed in between are no parts of its logit; half precision is allowed its rounding."""
    batch = llava.prepare(images[:1], QUESTIONS[0])
    targets = prompt_targets(batch, [9])
    with (
        llava.hooks([("blocks.3.hook_resid_post", lambda value, hook: value + 1)]),
        pytest.raises(BadInputError, match="does not sum to its final stream"),
    ):
        logit_attribution(llava, batch, targets)
    half = HookedMM(copy.deepcopy(llava.hf_model).to(torch.bfloat16), llava.processor, check=False)
    found = logit_attribution(half, half.prepare(images[:1], QUESTIONS[0]), targets)
    torch.testing.assert_close(found.total(), found.logits.float(), rtol=0.02, atol=0.1)
