"""Attention that is looked into: by hand in float64, against PyTorch's SDPA and transformers' own eager attention."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hooked_mm import attention
from hooked_mm.architectures import FAMILIES
from hooked_mm.attention import AttentionSite, AttentionTaps, configurations, tapped
from hooked_mm.hooked import HookedMM
from hooked_mm.pattern import eager_attention
from hooked_mm.testing.miniatures import miniature, miniature_inputs

Named = dict[str, Tensor]


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Seeded normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def allowed(b: int, q: int, k: int, seed: int) -> Tensor:
    """(b, 1, q, k) boolean; every query may see some key."""
    found = rand(b, 1, q, k, seed=seed) > 0
    found[..., 0] = True
    return found


def by_hand(
    query: Tensor, key: Tensor, may: Tensor | None, bias: Tensor | None, scaling: float, cap: Any, sinks: Any
) -> Tensor:
    """softmax over the keys that may be seen, one row after the other with Python's numbers."""
    b, heads, length, _ = query.shape
    out = torch.zeros(b, heads, length, key.shape[2], dtype=torch.float64)
    for at in torch.cartesian_prod(*map(torch.arange, (b, heads, length))).tolist():
        sample, head, row = at
        scores: list[float] = []
        for column in range(key.shape[2]):
            score = math.fsum((query[sample, head, row] * key[sample, head, column]).tolist()) * scaling
            score = cap * math.tanh(score / cap) if cap else score
            score += 0.0 if bias is None else float(bias[sample, 0, row, column])
            hidden = may is not None and not bool(may[sample, 0, row, column])
            scores.append(-math.inf if hidden else score)
        extra = [] if sinks is None else [float(sinks[head])]
        top = max([*scores, *extra])
        parts = [math.exp(score - top) for score in scores]
        total = math.fsum([*parts, *(math.exp(item - top) for item in extra)])
        out[sample, head, row] = torch.tensor([part / total for part in parts])
    return out


@given(
    sizes=st.tuples(*(st.integers(1, high) for high in (2, 3, 4, 5, 6))),
    mask=st.sampled_from(["none", "boolean", "additive", "longer"]),
    cap=st.sampled_from([None, 0.5, 30.0]),
    sinks=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_the_pattern_against_sums_by_hand(
    sizes: tuple[int, int, int, int, int], mask: str, cap: Any, sinks: bool, dtype: torch.dtype, seed: int
) -> None:
    """Masks of every kind (also one made for more keys), soft-cap and sinks: the pattern of a plain loop in float64."""
    b, heads, q, k, d = sizes
    query, key = rand(b, heads, q, d, seed=seed, dtype=dtype), rand(b, heads, k, d, seed=seed + 100, dtype=dtype)
    may = None if mask == "none" else allowed(b, q, k, seed)
    bias = rand(b, 1, q, k, seed=seed + 200, dtype=dtype) if mask == "additive" else None
    given_mask: Tensor | None = may
    if mask == "longer":
        given_mask = torch.cat([allowed(b, q, k, seed), torch.ones(b, 1, q, 2, dtype=torch.bool)], dim=-1)
    if may is not None and bias is not None:
        given_mask = bias.masked_fill(~may, torch.finfo(dtype).min)
    extra = rand(heads, seed=seed + 300, dtype=dtype) if sinks else None
    got = eager_attention(query, key, given_mask, d**-0.5, cap, extra)
    assert got.dtype == dtype
    wide = [None if item is None else item.double() for item in (query, key, bias, extra)]
    assert wide[0] is not None
    assert wide[1] is not None
    expected = by_hand(wide[0], wide[1], may, wide[2], d**-0.5, cap, wide[3])
    assert (got.double() - expected).abs().max() <= {torch.float64: 1e-12, torch.float32: 2e-6}.get(dtype, 3e-2)
    if dtype == torch.float64:
        assert bool((got.sum(dim=-1) < 1 - 1e-6).all()) == sinks


@given(
    sizes=st.tuples(*(st.integers(1, high) for high in (2, 2, 5, 6, 5))),
    repeats=st.integers(1, 3),
    mask=st.sampled_from(["none", "boolean", "additive"]),
    causal=st.sampled_from([None, True, False]),
    own=st.booleans(),
    scaling=st.sampled_from([None, 0.3]),
    seed=st.integers(0, 99),
)
def test_our_eager_function_against_sdpa(
    sizes: tuple[int, int, int, int, int], repeats: int, mask: str, causal: Any, own: bool, scaling: Any, seed: int
) -> None:
    """What a block computes instead of SDPA is SDPA: grouped heads, masks, and causality of the module or the call
    where there is no mask (not for a single query).
    """
    b, kv, q, k, d = sizes
    k = q if mask == "none" and q > 1 else k
    query, key, value = (
        rand(b, kv * r, n, d, seed=seed + i) for i, (r, n) in enumerate(((repeats, q), (1, k), (1, k)))
    )
    given_mask = None if mask == "none" else allowed(b, q, k, seed)
    if given_mask is not None and mask == "additive":
        given_mask = rand(b, 1, q, k, seed=seed).masked_fill(~given_mask, -torch.inf)
    module = SimpleNamespace(is_causal=own)
    options = {"is_causal": causal, "scaling": scaling}
    got, pattern = attention._plain_eager(module, query, key, value, given_mask, **options)
    is_causal = given_mask is None and q > 1 and (own if causal is None else causal)
    expected = scaled_dot_product_attention(
        query, key, value, given_mask, is_causal=is_causal, scale=scaling, enable_gqa=True
    )
    assert torch.allclose(got, expected.transpose(1, 2), atol=1e-12)
    if is_causal:
        assert not pattern.triu(1).any()


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_packed_images_attend_to_themselves(sizes: list[int], seed: int) -> None:
    """With bounds, as image by image through SDPA, 0 between images; also for functions that know no bounds."""
    bounds = torch.tensor([0, *sizes]).cumsum(dim=0)
    query, key, value = (rand(1, 2, sum(sizes), 4, seed=seed + i) for i in range(3))
    module: Any = SimpleNamespace(is_causal=False)
    parts = zip(*(item.split(sizes, dim=2) for item in (query, key, value)), strict=True)
    expected = torch.cat([scaled_dot_product_attention(*part) for part in parts], dim=2).transpose(1, 2)
    got, pattern = attention._eager(None, module, query, key, value, None, bounds, {})
    assert torch.allclose(got, expected, atol=1e-12)
    image = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    assert torch.equal(pattern > 0, (image[:, None] == image).expand_as(pattern))
    apart, _ = attention._per_image(attention._plain_eager, bounds, module, [query, key, value], {})
    assert torch.allclose(apart, expected, atol=1e-12)


@functools.cache
def models(family: str) -> tuple[HookedMM, Any]:
    """A wrapped miniature with transformers' default attention, and the same weights with its own eager attention."""
    other = miniature(family)
    other.set_attn_implementation("eager")
    return HookedMM(miniature(family), check=False), other


def weights_of(model: Any, hooked: HookedMM, inputs: Named) -> tuple[Tensor, Named]:
    """Logits, and the attention weights that transformers' own eager modules return, by our names."""
    found: Named = {}
    paths = {f"projector.attn.{i}.hook_pattern": own.path for i, own in enumerate(hooked.structure.connector)}
    for stream, stack in hooked.structure.stacks.items():
        prefix = {"text": "", "encoder": "encoder.", "vision": "vision."}[stream]
        for layer, block in enumerate(stack.blocks):
            for role in {"attn", "xattn"} & set(block.parts):
                paths[f"{prefix}blocks.{layer}.{role}.hook_pattern"] = f"{block.path}.{block.parts[role]}"
    handles = []
    for name, path in paths.items():

        def keep(module: Any, args: Any, output: Any, name: str = name) -> None:
            if isinstance(output, tuple) and isinstance(output[1], Tensor):
                found[name] = output[1].clone()

        handles.append(model.get_submodule(path).register_forward_hook(keep))
    try:
        with torch.no_grad():
            return model(**inputs).logits, found
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stand_in_against_transformers_eager_attention(family: str) -> None:
    """Patterns of every block, and logits while they are computed, are those of the model loaded as eager."""
    hooked, eager = models(family)
    inputs = miniature_inputs(eager)
    expected, weights = weights_of(eager, hooked, inputs)
    logits, cache = hooked.run_with_cache(inputs, "*hook_pattern")
    assert logits is not None
    real = inputs["attention_mask"].bool() if family != "florence2" else torch.ones(3, 5, dtype=torch.bool)
    assert (logits - expected)[real].abs().max() <= 2e-5 * expected.abs().max()
    packed = bool(hooked.structure.vision and hooked.structure.vision.packed)
    for name, pattern in cache.items():
        if name not in weights:
            # Only modules of packed towers and of DaViT return no weights.
            assert name.startswith("vision.")
            assert packed or family == "florence2"
            continue
        text = name.startswith("blocks") and family != "florence2"
        rows = real[:, None, :, None] if text else torch.ones(1, dtype=torch.bool)
        assert ((pattern - weights[name]) * rows).abs().max() <= 1e-5, name
    assert any(name.startswith("blocks") for name in weights)


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_5_vl", "mllama", "florence2"])
def test_a_model_loaded_as_eager(family: str) -> None:
    """Its patterns are its own, its logits stay within rounding; queries and keys are read without a bit's change."""
    _, eager = models(family)
    inputs = miniature_inputs(eager)
    hooked = HookedMM(eager, check=False)
    expected, weights = weights_of(eager, hooked, inputs)
    logits, cache = hooked.run_with_cache(inputs, "*blocks.*hook_pattern")
    assert logits is not None
    assert (logits - expected).abs().max() <= 2e-5 * expected.abs().max()
    for name in set(weights) & set(cache):
        assert (cache[name] - weights[name]).abs().max() <= 1e-5, name
    taps = [name for name in hooked.hook_names if name.endswith(("rot_q", "rot_k"))]
    if taps:
        logits, _ = hooked.run_with_cache(inputs, taps)
        assert logits is not None
        assert torch.equal(logits, expected)


def settings(model: Any) -> list[tuple[int, Any]]:
    """What every configuration of a model says of attention."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    return [(key, str(config._attn_implementation_internal)) for key, config in configs.items()]


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "mllama", "florence2", "blip-2"])
def test_everything_is_as_before_after_an_exception(family: str) -> None:
    """In a hook, and in the block itself: configurations are restored, nothing is left, the next pass is bit-equal."""
    hooked, _ = models(family)
    inputs = miniature_inputs(hooked.hf_model)
    before, plain = settings(hooked.hf_model), hooked.run_with_hooks(inputs)
    with pytest.raises(ZeroDivisionError):
        hooked.run_with_hooks(inputs, [("*blocks.1.*hook_pattern", lambda value, hook: 1 / 0)])
    assert settings(hooked.hf_model) == before
    during: list[tuple[int, Any]] = []

    def broken() -> None:
        with tapped([(site(hooked, 1), frozenset({"q", "pattern"}))]):
            during.extend(settings(hooked.hf_model))
            raise KeyError

    with pytest.raises(KeyError):
        broken()
    assert during != before
    assert settings(hooked.hf_model) == before
    assert not attention._ACTIVE
    assert not attention._ORIGINAL
    again = hooked.run_with_hooks(inputs)
    assert plain is not None
    assert again is not None
    assert torch.equal(plain, again)


def site(hooked: HookedMM, layer: int) -> AttentionSite:
    """A text block's attention with fresh taps."""
    stack = hooked.structure.text
    modules = [hooked.hf_model.get_submodule(block.path) for block in stack.blocks]
    configs = configurations(hooked.hf_model.get_submodule(stack.owner), modules)
    module: nn.Module = hooked.hf_model.get_submodule(stack.blocks[layer].mixing)
    return AttentionSite(module, AttentionTaps(), configs, stack.packed)


def test_two_models_at_once() -> None:
    """Taps of one see nothing of the other, also of one that shares its configuration; leaving in any order restores
    both.
    """
    first, second = HookedMM(miniature("llava"), check=False), HookedMM(miniature("llava", seed=1), check=False)
    config = first.hf_model.config
    third = type(first.hf_model)(config).eval()
    inputs = miniature_inputs(first.hf_model)
    found: list[list[Tensor]] = [[], []]
    sites = [site(first, 1), site(second, 2)]
    for kept, one in zip(found, sites, strict=True):
        one.taps.pattern.register_forward_hook(lambda m, a, out, kept=kept: kept.append(out.clone()))
    names = [[f"blocks.{layer}.attn.hook_pattern"] for layer in (1, 2)]
    expected = [model.run_with_cache(inputs, name) for model, name in zip((first, second), names, strict=True)]
    with torch.no_grad():
        alone = third(**inputs).logits
        with tapped([(sites[0], frozenset({"pattern"}))]), tapped([(sites[1], frozenset({"pattern"}))]):
            logits = [model(**inputs).logits for model in (first.hf_model, second.hf_model, third)]
    for index, (kept, (own, cache)) in enumerate(zip(found, expected, strict=True)):
        assert len(kept) == 1
        assert torch.equal(kept[0], cache[names[index][0]])
        assert own is not None
        assert torch.equal(logits[index], own)
    real = inputs["attention_mask"].bool()
    assert (logits[2] - alone)[real].abs().max() <= 1e-5 * alone.abs().max()
    assert not attention._ACTIVE
    with torch.no_grad():
        assert torch.equal(third(**inputs).logits, alone)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "mllama"])
def test_only_blocks_asked_for_are_eager(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pattern asked for is one pattern made, of its block's size; queries and keys alone make none; SDPA does all
    other blocks.
    """
    hooked, _ = models(family)
    inputs = miniature_inputs(hooked.hf_model)
    made: list[tuple[int, ...]] = []
    original, calls = attention.eager_attention, [0]

    def spy(*args: Any, **options: Any) -> Tensor:
        pattern = original(*args, **options)
        made.append(tuple(pattern.shape))
        return pattern

    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def count(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        return sdpa(*args, **options)

    monkeypatch.setattr(attention, "eager_attention", spy)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", count)
    hooked.run_with_cache(inputs, "hook_embed")
    every, calls[0] = calls[0], 0
    for name in ("blocks.2.attn.hook_pattern", "vision.blocks.1.attn.hook_pattern"):
        _, cache = hooked.run_with_cache(inputs, name)
        assert made == [tuple(cache[name].shape)], name
        # A packed tower is one call per image.
        blocks = 3 if family == "qwen2_5_vl" and name.startswith("vision") else 1
        assert calls[0] == every - blocks, name
        made.clear()
        calls[0] = 0
    hooked.run_with_cache(inputs, ["blocks.*.attn.hook_rot_q", "blocks.*.attn.hook_rot_k"])
    assert not made
    assert calls[0] == every


def test_reading_patterns_leaves_padding_as_it_is() -> None:
    """Rows that see nothing: SDPA adds zero there, and so do blocks that are looked into."""
    hooked, _ = models("llava")
    inputs = miniature_inputs(hooked.hf_model)
    _, plain = hooked.run_with_cache(inputs, "blocks.*.attn.hook_z")
    _, looked = hooked.run_with_cache(inputs, "blocks.*.attn.hook_*")
    for name, value in plain.items():
        torch.testing.assert_close(looked[name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["dots3_note", "minimax_m3_vl"])
def test_attention_to_some_keys_stays_so(family: str) -> None:
    """Models that choose keys only under a name they know: looked into, they attend to the same ones."""
    hooked = HookedMM(miniature(family), check=False)
    inputs = miniature_inputs(hooked.hf_model)
    plain = hooked.run_with_hooks(inputs)
    logits, cache = hooked.run_with_cache(inputs, ["blocks.*.attn.hook_pattern", "blocks.*.attn.hook_z"])
    keep = inputs["attention_mask"].bool()
    assert (logits - plain)[keep].abs().max() < 1e-5
    pattern = cache["blocks.1.attn.hook_pattern"] if family == "minimax_m3_vl" else cache["blocks.0.attn.hook_pattern"]
    seen = (pattern[0, 0, -1] > 0).sum()
    assert 0 < int(seen) < int(keep[0].sum())
