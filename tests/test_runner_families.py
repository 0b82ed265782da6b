"""Runs of every family: what fires, what stops, many hooks at once, training mode, half precision, adapters."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_mm.architectures import FAMILIES
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.runner import Hook
from hooked_mm.testing.miniatures import miniature, miniature_inputs
from tests.families import DISTINCT, TEXT, Place, close, places, raw_hooks, raw_values

pytestmark = pytest.mark.oldest

Case = tuple[str, HookedMM, dict[str, Tensor]]
PIXELS = ("pixel", "image", "aspect", "cross_attention", "batch_num")


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    """A family's miniature, wrapped, and a batch padded on the left."""
    model = miniature(request.param)
    return request.param, HookedMM(model, check=False), miniature_inputs(model)


@pytest.fixture(scope="module", params=DISTINCT)
def distinct(request: pytest.FixtureRequest) -> Case:
    """The same; families built like another one wait for the slow suite."""
    model = miniature(request.param)
    return request.param, HookedMM(model, check=False), miniature_inputs(model)


def without_images(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same samples as text only."""
    kept = {name: value.clone() for name, value in inputs.items() if not name.startswith(PIXELS)}
    kept["input_ids"][kept["input_ids"] == 150] = 7
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in kept:
            kept[name].zero_()
    return kept


def mild(value: Tensor, hook: Hook | None = None) -> Tensor:
    """A change that a hundred layers of it survive."""
    return value * 0.95 + 0.01


def test_every_listed_point_fires(case: Case) -> None:
    """ "*" reads all, each once and in order, patterns and results included; None leaves out only those two."""
    _, model, inputs = case
    seen: list[str] = []
    with model.hooks([("*", lambda value, hook: seen.append(hook.name))]):
        _, cache = model.run_with_cache(inputs, "*")
    assert seen == list(cache) == model.hook_names
    _, cheap = model.run_with_cache(inputs)
    costly = ("hook_pattern", "hook_result")
    assert list(cheap) == [name for name in model.hook_names if not name.endswith(costly)]
    for name, value in cache.items():
        assert bool(value.isfinite().all()), name
        assert value.abs().max() > 0, name


def test_without_an_image_exactly_the_rest_fires(case: Case) -> None:
    """Tower, projector, deepstack and mllama's cross-attention blocks are left out; all else equals raw hooks.

    BLIP-2's own forward takes no text alone."""
    family, model, inputs = case
    text = without_images(inputs)
    if family == "blip-2":
        with pytest.raises(TypeError, match="pixel_values"):
            model.hf_model(**text)
        return
    logits, cache = model.run_with_cache(text, "*")
    absent = set(model.hook_names) - set(cache)
    crossed = ("blocks.1.", "blocks.3.") if family == "mllama" else ()
    expected = {
        name
        for name in model.hook_names
        if name.startswith(("vision.", "projector.", *crossed)) or name.endswith("insert_out")
    }
    assert absent == expected
    table = {name: place for name, place in places(family).items() if name not in absent}
    raw = raw_values(model.hf_model, text, table)
    with torch.no_grad():
        plain = model.hf_model(**text).logits
    rows = None if family == "florence2" else text["attention_mask"].bool()
    assert logits is not None
    assert close(logits, plain, rows) < 1e-5
    _, cheap = model.run_with_cache(text)
    assert all(torch.equal(cheap[name], raw[name]) for name in table)
    with pytest.raises(BadInputError, match="no images"):
        model.run_with_cache(text, "projector.hook_out")


def test_writes_at_all_points_at_once_equal_raw_hooks(case: Case) -> None:
    """More than a hundred writes in one pass, in place and not, in the model's own order of execution."""
    family, model, inputs = case
    # Two names of one tensor are written once: the order of raw hooks at one place is not that of the names.
    chosen: dict[tuple[str, str, str], tuple[str, Place]] = {}
    for name, place in places(family).items():
        if "insert_out" not in name:
            chosen.setdefault((place.path, place.side, place.view), (name, place))
    with torch.no_grad(), raw_hooks(model.hf_model, [(place, mild) for _, place in chosen.values()]):
        expected = model.hf_model(**inputs).logits
    got = model.run_with_hooks(inputs, [([name for name, _ in chosen.values()], mild)])
    plain = model.run_with_hooks(inputs)
    assert got is not None
    assert plain is not None
    scaled = any(place.factor for _, place in chosen.values())
    assert close(got, expected) < 1e-5 if scaled else torch.equal(got, expected)
    assert close(got, plain) > 1e-3


def test_saved_values_are_those_of_their_moment(case: Case) -> None:
    """With everything written and everything kept, each value is what its own point's hook returned: no later write
    reaches it, not even those in place."""
    _, model, inputs = case
    told: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Hook) -> Tensor:
        told[hook.name] = mild(value).clone()
        return mild(value)

    with model.hooks([("*", keep)]):
        _, cache = model.run_with_cache(inputs, "*")
    for name, value in cache.items():
        assert torch.equal(value, told[name]), name
    names = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"]
    _, plain = model.run_with_cache(inputs, names[0])

    def destroy(value: Tensor, hook: Hook) -> None:
        value.zero_()

    with model.hooks([(names[1], destroy)]):
        _, after = model.run_with_cache(inputs, names)
    assert torch.equal(after[names[0]], plain[names[0]])
    assert not after[names[1]].any()


def _ran(ran: list[int], layer: int, *_: Any) -> None:
    ran.append(layer)


def test_stop_at_every_layer(distinct: Case) -> None:
    """Nothing behind the stop runs; what was read before equals the full run; no logits."""
    family, model, inputs = distinct
    modules = [model.hf_model.get_submodule(path) for path, _ in TEXT[family]]
    _, full = model.run_with_cache(inputs)
    for batch in (inputs, without_images(inputs)) if family == "mllama" else (inputs,):
        for stop in range(len(modules) + 1):
            ran: list[int] = []
            handles = [m.register_forward_hook(partial(_ran, ran, i)) for i, m in enumerate(modules)]
            try:
                logits, cache = model.run_with_cache(batch, stop_at_layer=stop)
            finally:
                for handle in handles:
                    handle.remove()
            skipped = {1, 3} if batch is not inputs else set()
            assert logits is None
            assert ran == [layer for layer in range(stop) if layer not in skipped]
            if batch is inputs:
                names = [n for n in full if not n.startswith(("hook_logits", "ln_final"))]
                before = [n for n in names if not n.startswith("blocks.") or int(n.split(".")[1]) < stop]
                assert list(cache) == before
                assert all(torch.equal(cache[name], full[name]) for name in before)


def test_training_mode_is_left_as_it_is(distinct: Case) -> None:
    """A model in training mode runs so, and a second wrapper of the same model changes nothing for the first."""
    family, _, inputs = distinct
    raw = miniature(family)
    raw.train()
    model = HookedMM(raw, check=False)
    torch.manual_seed(0)
    with torch.no_grad():
        expected = raw(**inputs).logits
    torch.manual_seed(0)
    got = model.run_with_hooks(inputs)
    assert got is not None
    assert torch.equal(got, expected)
    assert raw.training
    assert all(module.training for module in raw.modules())
    raw.eval()
    second = HookedMM(raw, check=False)
    name = "blocks.1.hook_resid_post"
    _, cache = model.run_with_cache(inputs, name)
    _, other = second.run_with_cache(inputs, name)
    with second.hooks([(name, mild)]):
        _, third = model.run_with_cache(inputs, [name, "blocks.2.attn.hook_z"])
        _, fourth = second.run_with_cache(inputs, name)
    assert torch.equal(cache[name], other[name])
    assert torch.equal(cache[name], third[name])
    assert torch.equal(fourth[name], mild(cache[name]))
    _, patterns = second.run_with_cache(inputs, "blocks.*.hook_pattern")
    _, again = model.run_with_cache(inputs, "blocks.*.hook_pattern")
    assert all(torch.equal(patterns[n], again[n]) for n in again)


def half(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model in bfloat16, and its inputs."""
    model.to(torch.bfloat16)
    return {name: v.to(torch.bfloat16) if v.is_floating_point() else v for name, v in inputs.items()}


def test_bfloat16(distinct: Case) -> None:
    """Every point reads in half precision bit for bit as raw hooks do, and all can be written in it."""
    family, _, inputs = distinct
    raw = miniature(family)
    inputs = half(raw, inputs)
    model = HookedMM(raw, check=False)
    table = places(family)
    values = raw_values(raw, inputs, table)
    _, cache = model.run_with_cache(inputs)
    assert all(torch.equal(cache[name], values[name]) for name in table)
    assert {v.dtype for n, v in cache.items() if not n.endswith("hook_scale")} == {torch.bfloat16}
    _, written = model.run_with_cache(inputs, "*")
    got = model.run_with_hooks(inputs, [("*", mild)])
    assert got is not None
    assert got.dtype == torch.bfloat16
    assert bool(got.isfinite().all())
    assert {v.dtype for n, v in written.items() if not n.endswith("hook_scale")} == {torch.bfloat16}


def test_hooks_nest_and_a_raising_hook_leaves_nothing(distinct: Case) -> None:
    """Inner hooks run after outer ones and end with their block, whatever happens in it."""
    _, model, inputs = distinct
    name = "blocks.1.hook_mlp_out"
    _, plain = model.run_with_cache(inputs, name)

    def fail(value: Tensor, hook: Hook) -> Tensor:
        raise ZeroDivisionError

    with model.hooks([(name, lambda value, hook: value + 1)]):
        with model.hooks([(name, lambda value, hook: value * 2)]):
            _, both = model.run_with_cache(inputs, name)
        with pytest.raises(ZeroDivisionError), model.hooks([("blocks.0.hook_resid_mid", fail)]):
            model.run_with_cache(inputs, "*")
        _, one = model.run_with_cache(inputs, name)
    _, none = model.run_with_cache(inputs, name)
    assert torch.equal(both[name], (plain[name] + 1) * 2)
    assert torch.equal(one[name], plain[name] + 1)
    assert torch.equal(none[name], plain[name])


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3", "mllama", "blip-2", "florence2"])
def test_an_adapted_model_reads_and_writes_as_raw_hooks_do(family: str) -> None:
    """PEFT's wrapper around the model, LoRA in queries and values: the same points, the adapter's share included."""
    peft = pytest.importorskip("peft")
    plain = miniature(family)
    inputs = miniature_inputs(plain)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(plain, config).eval()
    model = HookedMM(adapted, check=False)
    inner = adapted.get_base_model()
    table = places(family)
    _, cache = model.run_with_cache(inputs, "*")
    values = raw_values(inner, inputs, table)
    rows = None if family == "florence2" else inputs["attention_mask"].bool()
    for name in table:
        whole = name.startswith(("vision.", "projector.", "encoder.")) or name.endswith(
            ("xattn.hook_k", "xattn.hook_v")
        )
        assert close(cache[name].detach(), values[name], None if whole or rows is None else rows) < 1e-5, name
    names = ["blocks.1.hook_resid_mid", "blocks.2.mlp.hook_post", "projector.hook_out"]
    with torch.no_grad(), raw_hooks(inner, [(table[name], mild) for name in names]):
        expected = inner(**inputs).logits
    got = model.run_with_hooks(inputs, [(names, mild)])
    assert got is not None
    assert torch.equal(got, expected)


def test_a_model_that_keeps_no_cache_of_keys(distinct: Case) -> None:
    """use_cache=False in the forward: the same logits and points."""
    _, model, inputs = distinct
    names = ["blocks.*.hook_z", "blocks.*.hook_resid_post"]
    logits, cache = model.run_with_cache(inputs, names)
    other, without = model.run_with_cache(inputs, names, use_cache=False)
    assert logits is not None
    assert other is not None
    assert torch.equal(logits, other)
    assert all(torch.equal(cache[name], without[name]) for name in cache)


def test_modules_keep_the_mode_they_were_in() -> None:
    """A model in evaluation mode of which one block trains, or the other way round, is left so."""
    model = miniature("llava")
    model.model.language_model.layers[1].train()
    modes = [module.training for module in model.modules()]
    HookedMM(model, check=False).run_with_cache(miniature_inputs(model), "hook_embed")
    assert [module.training for module in model.modules()] == modes
    model.train()
    model.model.vision_tower.eval()
    modes = [module.training for module in model.modules()]
    HookedMM(model, check=False)
    assert [module.training for module in model.modules()] == modes
