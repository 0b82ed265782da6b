"""Residual streams decomposed and attributed: exact sums, and every formula by hand from the weights in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from transformers import (
    GemmaConfig,
    StableLmConfig,
    Starcoder2Config,
)

from hooked_mm.cache import ActivationCache
from hooked_mm.errors import BadInputError, UnknownHookError
from hooked_mm.hooked import HookedMM
from tests.decoders import INPUTS, close, miniature, run
from tests.versions import IN_CLIP

QUESTIONS = ["what", "what place is this ?", "is there a red square ?"]
DECODERS = {"stablelm": StableLmConfig, "starcoder2": Starcoder2Config, "gemma": GemmaConfig}


@pytest.fixture(scope="module")
def ran(llava: HookedMM, images: list[Image.Image]) -> tuple[Tensor, ActivationCache]:
    """Three samples on the small LLaVA: one image, two images, none."""
    return run(llava, llava.prepare([images[0], images[1:3], None], QUESTIONS, ["red", None, None]))


@pytest.fixture(scope="module")
def cache(ran: tuple[Tensor, ActivationCache]) -> ActivationCache:
    """Its cache."""
    return ran[1]


@pytest.fixture(scope="module")
def weights(llava: HookedMM) -> dict[str, Tensor]:
    """The small LLaVA's weights in float64."""
    return {name: value.double() for name, value in llava.hf_model.state_dict().items()}


@pytest.mark.parametrize("stack", ["", "vision."])
def test_components_add_up_to_the_stream_everywhere(cache: ActivationCache, stack: str) -> None:
    """At the input of every layer, of every MLP and of the final norm, in the language model and in the tower."""
    layers = 6 if stack == "" else 4
    for layer in range(layers):
        pre, mid = (cache[f"{stack}blocks.{layer}.hook_resid_{place}"] for place in ("pre", "mid"))
        assert close(cache.decompose_resid(layer, stack=stack).sum(0), pre)
        assert close(cache.decompose_resid(layer, True, stack=stack).sum(0), mid)
    parts, labels = cache.decompose_resid(return_labels=True, stack=stack)
    assert close(parts.sum(0), cache[f"{stack}blocks.{layers - 1}.hook_resid_post"])
    assert torch.equal(parts, cache.decompose_resid(stack=stack, modality=None, positions=None))
    expected = ["embed"] + [f"{layer}_{part}_out" for layer in range(layers) for part in ("attn", "mlp")]
    assert labels == expected
    for part, label in zip(parts, labels, strict=True):
        at, _, point = label.partition("_")
        name = f"{stack}hook_embed" if label == "embed" else f"{stack}blocks.{at}.hook_{point}"
        assert torch.equal(part, cache[name])


@settings(max_examples=6)
@given(
    counts=st.lists(st.integers(0, 2), min_size=1, max_size=3),
    padding_side=st.sampled_from(["left", "right"]),
    layer=st.integers(0, 6),
    modality=st.sampled_from([None, "text"]),
    positions=st.sampled_from([None, -1, [0, -2]]),
)
def test_sums_and_logits_hold_for_any_batch_and_selection(
    llava: HookedMM,
    images: list[Image.Image],
    counts: list[int],
    padding_side: str,
    layer: int,
    modality: str | None,
    positions: Any,
) -> None:
    """Selected components are the components selected; they add up; their logits are the model's."""
    batch = llava.prepare([images[:count] for count in counts], QUESTIONS[: len(counts)], padding_side=padding_side)
    logits, cache = run(llava, batch)
    where = {"modality": modality, "positions": positions}
    name = f"blocks.{layer}.hook_resid_pre" if layer < 6 else "blocks.5.hook_resid_post"
    chosen = cache.select(name, **where)
    parts = cache.decompose_resid(layer, **where)
    if modality is None and positions is None:
        assert close(parts.sum(0), cache[name])
    else:
        assert close(parts.sum(0), chosen.values)
    tokens = torch.arange(len(counts)) + 20
    shares = cache.logit_attrs(cache.decompose_resid(**where), tokens, 5, with_bias=True, **where)
    true = logits.gather(-1, tokens[:, None, None].expand(-1, logits.shape[1], 1))[..., 0] - logits[..., 5]
    if modality is not None or positions is not None:
        true = true[chosen.sample, chosen.position]
    assert close(shares.sum(0), true)


def test_modes_leave_out_the_other_kind(cache: ActivationCache) -> None:
    """As in TransformerLens: the embedding stays unless it is left out by name."""
    assert cache.decompose_resid(2, mode="attn", return_labels=True)[1] == ["embed", "0_attn_out", "1_attn_out"]
    assert cache.decompose_resid(2, mode="mlp", incl_embeds=False, return_labels=True)[1] == ["0_mlp_out", "1_mlp_out"]
    assert cache.decompose_resid(1, True, mode="attn", return_labels=True)[1][-1] == "1_attn_out"
    with pytest.raises(BadInputError, match="no mlp component lies before layer 0"):
        cache.decompose_resid(0, mode="mlp", incl_embeds=False)


def test_accumulated_streams_are_those_cached(cache: ActivationCache) -> None:
    """Label by label; with middles; up to a layer; selected."""
    streams, labels = cache.accumulated_resid(incl_mid=True, return_labels=True)
    assert labels == [f"{layer}_{place}" for layer in range(6) for place in ("pre", "mid")] + ["final_post"]
    for stream, label in zip(streams, labels, strict=True):
        at, place = ("5", "post") if label == "final_post" else label.split("_")
        assert torch.equal(stream, cache[f"blocks.{at}.hook_resid_{place}"])
    chosen, labels = cache.accumulated_resid(1, mlp_input=True, return_labels=True, role="answer")
    assert labels == ["0_pre", "1_pre", "1_mid"]
    assert torch.equal(chosen[2], cache.select("blocks.1.hook_resid_mid", role="answer").values)
    assert torch.equal(cache.accumulated_resid(stack="vision.")[-1], cache["vision.blocks.3.hook_resid_post"])


def test_normalised_components_by_hand(cache: ActivationCache, weights: dict[str, Tensor]) -> None:
    """x_c / sqrt(mean(x²) + eps) with x the whole stream; their sum times the gain is what the norm gave."""
    for layer, mlp_input, norm, path in (
        (2, False, "blocks.2.ln1", "layers.2.input_layernorm"),
        (2, True, "blocks.2.ln2", "layers.2.post_attention_layernorm"),
        (None, False, "ln_final", "norm"),
    ):
        parts = cache.decompose_resid(layer, mlp_input)
        whole = parts.double().sum(0)
        expected = parts.double() / (whole.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        ours = cache.decompose_resid(layer, mlp_input, apply_ln=True)
        assert close(ours, expected)
        assert torch.equal(ours, cache.apply_ln_to_stack(parts, layer, mlp_input))
        gain = weights[f"model.language_model.{path}.weight"]
        assert close(ours.double().sum(0) * gain, cache[f"{norm}.hook_out"])
        few = cache.apply_ln_to_stack(parts, layer, mlp_input, role="question", sample=0)
        assert torch.equal(few, ours[:, 0][:, cache.batch.mask(role="question")[0]])


def test_normalised_components_of_the_tower_by_hand(cache: ActivationCache, weights: dict[str, Tensor]) -> None:
    """The tower's LayerNorm centres every component; gain and bias on the sum give the norm's output."""
    parts = cache.decompose_resid(2, stack="vision.").double()
    whole = parts.sum(0)
    expected = (parts - parts.mean(-1, keepdim=True)) / (whole.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    ours = cache.decompose_resid(2, stack="vision.", apply_ln=True)
    assert close(ours, expected)
    path = f"model.vision_tower.{IN_CLIP}encoder.layers.2.layer_norm1."
    assert close(ours.sum(0) * weights[path + "weight"] + weights[path + "bias"], cache["vision.blocks.2.ln1.hook_out"])
    own = cache.decompose_resid(2, stack="vision.", apply_ln=True, sample=1)
    assert torch.equal(own, ours[:, 1:].flatten(1, 2))


def test_streams_normalised_for_a_logit_lens(llava: HookedMM, cache: ActivationCache) -> None:
    """Into the final norm by each stream's own scale: times gain and unembedding it is the logit lens."""
    norm = llava.hf_model.model.language_model.norm
    lens = (cache.accumulated_resid(apply_ln=True) * norm.weight) @ llava.hf_model.lm_head.weight.T
    for layer in range(6):
        assert close(lens[layer], llava.to_logits(cache[f"blocks.{layer}.hook_resid_pre"]))
    inner = cache.accumulated_resid(2, apply_ln=True)
    scale = (cache["blocks.2.hook_resid_pre"].double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert close(inner, torch.stack([cache[f"blocks.{layer}.hook_resid_pre"] / scale for layer in range(3)]))


def test_the_scale_of_the_run_is_used_where_it_was_stored(llava: HookedMM, cache: ActivationCache) -> None:
    """A stored `hook_scale` goes before what the stream would give; without either it is said what to cache."""
    parts = cache.decompose_resid(1)
    stored = torch.full((*cache.batch.modality.shape, 1), 2.0)
    values = {name: value for name, value in cache.items() if "resid" not in name and "scale" not in name}
    with_scale = ActivationCache(
        {**values, "blocks.1.ln1.hook_scale": stored}, cache.batch, llava.hook_points, model=llava
    )
    assert torch.equal(with_scale.apply_ln_to_stack(parts, 1), parts / 2)
    without = ActivationCache(values, cache.batch, llava.hook_points, model=llava)
    with pytest.raises(UnknownHookError, match=r"'blocks\.1\.hook_resid_pre' was not cached"):
        without.apply_ln_to_stack(parts, 1)


def test_heads_by_hand(cache: ActivationCache, weights: dict[str, Tensor]) -> None:
    """W_O's columns of a head times its z, (heads, b, p, d), 24 of them; with the remainder they are the stream."""
    heads, labels = cache.stack_head_results(3, incl_remainder=True, return_labels=True)
    assert labels == [f"L{layer}H{head}" for layer in range(3) for head in range(4)] + ["remainder"]
    out = weights["model.language_model.layers.1.self_attn.o_proj.weight"]
    by_hand = cache["blocks.1.attn.hook_z"][..., 2, :].double() @ out[:, 64:96].T
    assert close(heads[labels.index("L1H2")], by_hand)
    assert close(heads[4:8].sum(0), cache["blocks.1.hook_attn_out"])
    assert close(heads.sum(0), cache["blocks.3.hook_resid_pre"])
    answers = cache.stack_head_results(3, incl_remainder=True, role="answer")
    assert close(answers, heads[:, 0][:, cache.batch.mask(role="answer")[0]])
    assert len(cache.stack_head_results()) == 24
    normed = cache.stack_head_results(incl_remainder=True, apply_ln=True)
    assert close(normed.sum(0), cache.decompose_resid(apply_ln=True).sum(0))
    with pytest.raises(BadInputError, match="no head lies before layer 0"):
        cache.stack_head_results(0)


def test_heads_of_the_tower_leave_the_bias_as_the_remainder(cache: ActivationCache, weights: dict[str, Tensor]) -> None:
    """CLIP's output projection has a bias, which no head has."""
    heads = cache.stack_head_results(1, stack="vision.")
    bias = weights[f"model.vision_tower.{IN_CLIP}encoder.layers.0.self_attn.out_proj.bias"]
    assert close(heads.sum(0) + bias, cache["vision.blocks.0.hook_attn_out"])
    rest = cache.stack_head_results(1, stack="vision.", incl_remainder=True)[-1]
    by_hand = bias + cache["vision.hook_embed"] + cache["vision.blocks.0.hook_mlp_out"]
    assert close(rest, by_hand)


def test_logits_by_hand(ran: tuple[Tensor, ActivationCache], weights: dict[str, Tensor], llava: HookedMM) -> None:
    """Component by component in float64; by word, by id, as a difference; all together the model's own logit."""
    logits, cache = ran
    red, blue = llava.tokenizer.convert_tokens_to_ids(["red", "blue"])
    parts = cache.decompose_resid()
    scale = (parts.double().sum(0).square().mean(-1, keepdim=True) + 1e-6).sqrt()
    gain, unembed = weights["model.language_model.norm.weight"], weights["lm_head.weight"]
    expected = (parts.double() / scale) @ (gain * unembed[red])
    ours = cache.logit_attrs(parts, "red")
    assert ours.shape == parts.shape[:-1]
    assert close(ours, expected)
    assert close(ours.sum(0), logits[..., red])
    assert torch.equal(ours, cache.logit_attrs(parts, red))
    difference = cache.logit_attrs(parts, "red", "blue")
    assert close(difference, (parts.double() / scale) @ (gain * (unembed[red] - unembed[blue])))
    each = cache.logit_attrs(parts, ["red", "blue", "blue"])
    assert close(each.sum(0), torch.stack([logits[0, :, red], logits[1, :, blue], logits[2, :, blue]]))
    ids = cache.batch.input_ids
    assert close(cache.logit_attrs(parts, ids).sum(0), logits.gather(-1, ids[..., None])[..., 0])
    last = cache.logit_attrs(parts, ids, positions=-1)
    assert close(last, torch.stack([cache.logit_attrs(parts, ids)[:, row, -1] for row in range(3)], dim=1))


def test_heads_and_remainder_explain_the_logit_too(ran: tuple[Tensor, ActivationCache]) -> None:
    """Any stack that adds up to the stream does."""
    logits, cache = ran
    heads = cache.stack_head_results(incl_remainder=True, positions=-1)
    shares = cache.logit_attrs(heads, "red", positions=-1)
    assert close(shares.sum(0), logits[:, -1, cache._weights().tokenizer.convert_tokens_to_ids("red")])


@pytest.mark.parametrize("decoder", sorted(DECODERS))
def test_other_decoders(decoder: str) -> None:
    """LayerNorms with biases, Gemma's 1 + weight, grouped heads: the same sums; the bias is a component of its own."""
    model = miniature(DECODERS[decoder], **({"head_dim": 8} if decoder == "gemma" else {}))
    logits, cache = run(model, INPUTS)
    parts = cache.decompose_resid()
    assert close(parts.sum(0), cache["blocks.2.hook_resid_post"])
    shares = cache.logit_attrs(parts, 11, 12, with_bias=True)
    assert close(shares.sum(0), logits[..., 11] - logits[..., 12], 3e-5)
    state = {name: value.double() for name, value in model.hf_model.state_dict().items()}
    u = state["lm_head.weight"][11] - state["lm_head.weight"][12]
    bias = state.get("model.language_model.norm.bias", torch.zeros(32).double()) @ u
    assert close(shares[-1], bias.expand(2, 20))
    assert bool(bias.abs() > 1e-3) == (decoder != "gemma")
    whole, eps = parts.double().sum(0), 1e-6 if decoder == "gemma" else 1e-5
    gain = state["model.language_model.norm.weight"] + (decoder == "gemma")
    centred = parts.double() - (0 if decoder == "gemma" else parts.double().mean(-1, keepdim=True))
    scale = (
        (whole.square().mean(-1, keepdim=True) if decoder == "gemma" else whole.var(-1, False, keepdim=True)) + eps
    ).sqrt()
    assert close(shares[:-1], (centred / scale) @ (gain * u), 3e-5)
    heads = cache.stack_head_results(3, incl_remainder=True)
    assert len(heads) == 13
    assert close(heads.sum(0), cache["blocks.2.hook_resid_post"])


def test_in_float64_everything_is_exact() -> None:
    """What float32 leaves open: the identities hold to 1e-11."""
    model = miniature(StableLmConfig)
    model.hf_model.double()
    inputs = {**INPUTS, "pixel_values": INPUTS["pixel_values"].double()}
    logits, cache = run(model, inputs)
    shares = cache.logit_attrs(cache.stack_head_results(incl_remainder=True), 11, with_bias=True)
    assert shares.dtype == torch.float64
    assert close(shares.sum(0), logits[..., 11], 1e-11)


def test_a_bfloat16_model_is_attributed_in_float32(llava: HookedMM, images: list[Image.Image]) -> None:
    """Components keep the model's dtype, shares are float32 and add up to the logit within bfloat16."""
    half = HookedMM(copy.deepcopy(llava.hf_model).to(torch.bfloat16), llava.processor)
    logits, cache = run(half, half.prepare(images[:2], QUESTIONS[:2]))
    parts = cache.decompose_resid()
    assert parts.dtype == torch.bfloat16
    shares = cache.logit_attrs(parts, "red")
    assert shares.dtype == torch.float32
    red = llava.tokenizer.convert_tokens_to_ids("red")
    assert close(shares.sum(0), logits[..., red].float(), 5e-2)


def test_an_adapter_is_part_of_the_heads() -> None:
    """LoRA on the output projection: heads still add up to what attention wrote."""
    peft = pytest.importorskip("peft")
    base = miniature(StableLmConfig).hf_model
    wrapped = peft.get_peft_model(base, peft.LoraConfig(target_modules=["o_proj", "lm_head"], init_lora_weights=False))
    logits, cache = run(HookedMM(wrapped.eval()), INPUTS)
    heads = cache.stack_head_results(incl_remainder=True)
    assert close(heads[:4].sum(0), cache["blocks.0.hook_attn_out"])
    assert close(cache.logit_attrs(heads, 11, with_bias=True).sum(0), logits[..., 11], 3e-5)
