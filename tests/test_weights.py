"""Weights that are elsewhere until their module runs: every value is the plain model's, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, GenerationConfig

from hooked_mm.hooked import HookedMM
from hooked_mm.interventions import Add
from hooked_mm.resolve import resolve
from hooked_mm.testing.miniatures import miniature, miniature_inputs
from hooked_mm.weights import device_of, dtype_of, float32_copy, offloads, placed, weight_of
from tests.families import places, raw_values
from tests.placing import How, alternating, placed_elsewhere

SLOW = pytest.mark.slow
CASES: list[Any] = [
    ("llava", "map"),
    ("idefics2", "memory"),
    pytest.param("qwen2_vl", "map", marks=SLOW),
    pytest.param("gemma3", "map", marks=SLOW),
    pytest.param("llava", "disk", marks=SLOW),
    pytest.param("idefics2", "map", marks=SLOW),
]
WRITTEN = (
    "vision.blocks.1.hook_resid_post",
    "blocks.1.ln1.hook_normalized",
    "blocks.1.ln2.hook_scale",
    "blocks.1.attn.hook_result",
    "blocks.1.attn.hook_pattern",
    "ln_final.hook_normalized",
)


def halved(value: Tensor, hook: Any) -> Tensor:
    return value.flip(-1) * 0.5


@pytest.mark.parametrize(("family", "how"), CASES)
def test_every_value_is_the_plain_models(family: str, how: How, tmp_path: Path) -> None:
    """Conformance, reads, writes, generation with hooks, the logit lens, attribution and gradients."""
    bare = miniature(family)
    inputs = miniature_inputs(bare)
    expected = raw_values(bare, inputs, places(family))
    plain = HookedMM(bare, check=False)
    model = HookedMM(placed_elsewhere(miniature(family), how, tmp_path))
    away = [name for name, weight in model.hf_model.named_parameters() if weight.is_meta]
    assert len(away) > 20
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    _, cheap = model.run_with_cache(inputs)
    assert model.conformance is not None
    assert model.conformance.ok
    assert (model.structure, model.cfg) == (plain.structure, plain.cfg)
    assert {name for name, value in expected.items() if not torch.equal(cheap[name], value)} == set()
    logits, cache = model.run_with_cache(inputs, "*")
    known, other = plain.run_with_cache(inputs, "*")
    assert torch.equal(logits, known)
    assert {name for name in other if not torch.equal(cache[name], other[name])} == set()
    assert list(cache) == list(other)
    for name in WRITTEN:
        got, wanted = (each.run_with_hooks(inputs, [(name, halved)]) for each in (model, plain))
        assert torch.equal(got, wanted), name
        assert not torch.equal(got, logits), name
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    assert torch.equal(model.to_logits(cache[last]), plain.to_logits(cache[last]))
    for stack, decomposed in ((c, c.decompose_resid(mlp_input=False)) for c in (cache, other)):
        shares = stack.logit_attrs(decomposed, 7, incorrect_tokens=9, with_bias=True)
        torch.testing.assert_close(shares.sum(0), (known[..., 7] - known[..., 9]), atol=1e-4, rtol=1e-3)
    gradients = []
    for each in (model, plain):
        out, kept = each.run_with_cache(inputs, "blocks.0.hook_resid_post", grad=True)
        out.square().mean().backward()
        gradients.append(kept.grad("blocks.0.hook_resid_post"))
    assert torch.equal(*gradients)
    for each in (model, plain):
        each.hf_model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=None)
    push = Add("blocks.1.hook_resid_post", torch.linspace(-1, 1, model.cfg.d_model), alpha=2.0)
    with model.hooks([push]), plain.hooks([push]):
        said, wanted = (each.generate(inputs, 4, return_logits=True) for each in (model, plain))
    assert torch.equal(said.tokens, wanted.tokens)
    # Weights in a file lie at other places of a cache line, by which products of single rows are rounded.
    torch.testing.assert_close(said.logits, wanted.logits, atol=1e-5, rtol=1e-5)
    assert [name for name, weight in model.hf_model.named_parameters() if weight.is_meta] == away


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_resolved_by_a_copy_with_its_weights(dtype: torch.dtype) -> None:
    """Blocks are run in float32 to see what flows in them: also those whose weights are elsewhere."""
    plain = miniature("llava").to(dtype)
    away = cpu_offload(miniature("llava").to(dtype), execution_device=torch.device("cpu"))
    assert resolve(away) == resolve(plain)
    assert dtype_of(away) == dtype
    block = away.model.language_model.layers[0]
    copied, whole = float32_copy(block), plain.model.language_model.layers[0]
    for name, weight in copied.named_parameters():
        assert torch.equal(weight, whole.get_parameter(name).float())
    assert not any(hasattr(module, "_hf_hook") for module in copied.modules())
    assert all(weight.is_meta for weight in block.parameters())


def test_a_weight_is_looked_at_where_it_is() -> None:
    """Offloaded, it has its numbers while `placed` is open, and what was taken keeps them; a plain one is itself."""
    plain, away = nn.LayerNorm(8), nn.LayerNorm(8)
    with torch.no_grad():
        for module in (plain, away):
            module.weight.copy_(torch.arange(8.0))
    cpu_offload(away, execution_device=torch.device("cpu"))
    assert away.weight.is_meta
    assert (offloads(plain), offloads(away)) == (False, True)
    there = []

    def interrupted() -> None:
        with placed(away):
            there.append(not away.weight.is_meta)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert there == [True]
    assert away.weight.is_meta
    found = weight_of(away)
    assert found is not None
    assert torch.equal(found, torch.arange(8.0))
    assert away.weight.is_meta
    assert weight_of(away, "gain") is None
    assert weight_of(nn.LayerNorm(8, elementwise_affine=False)) is None
    assert weight_of(plain).data_ptr() == plain.weight.data_ptr()  # type: ignore[union-attr]


def test_packed_weights_are_not_the_dtype() -> None:
    """Whole numbers are how weights are stored; a module without weights computes on the CPU, in float32."""
    packed = nn.Sequential(nn.Module(), nn.LayerNorm(4, dtype=torch.bfloat16))
    packed[0].weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    assert (dtype_of(packed), dtype_of(nn.Identity())) == (torch.bfloat16, torch.float32)
    assert device_of(nn.Identity()) == torch.device("cpu")
    # Of a weight that is nowhere and that nobody brings, nothing better is known.
    assert device_of(nn.Linear(2, 2, device="meta")) == torch.device("meta")


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_on_an_accelerator_beside_the_cpus_memory(family: str, tmp_path: Path) -> None:
    """Every other part waits in memory: checks hold, values are the CPU's but for rounding."""
    if not torch.cuda.is_available():
        pytest.skip("no accelerator")
    bare = miniature(family)
    inputs = miniature_inputs(bare)
    device_map = {path: {"cpu": 0, "disk": "cpu"}[place] for path, place in alternating(bare).items()}
    bare.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32, device_map=device_map)
    model, plain = HookedMM(loaded.requires_grad_(False).eval()), HookedMM(bare, check=False)
    _, cache = model.run_with_cache(inputs, "*")
    assert model.conformance is not None
    assert model.conformance.ok
    assert model.device.type == "cuda"
    _, known = plain.run_with_cache(inputs, "*")
    for name in known:
        torch.testing.assert_close(cache[name].cpu(), known[name], atol=1e-3, rtol=1e-3)
    assert cache.stack("resid_post").shape == known.stack("resid_post").shape
    assert len(cache.decompose_resid()) == len(known.decompose_resid())
