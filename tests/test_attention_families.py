"""Patterns, and queries and keys as they are compared, in every family, against the model's own eager attention."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hooked_mm import attention
from hooked_mm.architectures import FAMILIES
from hooked_mm.hooked import HookedMM
from hooked_mm.runner import Hook
from hooked_mm.testing.miniatures import miniature, miniature_inputs
from tests.families import DISTINCT, close, places, representatives

pytestmark = pytest.mark.oldest

Case = tuple[str, HookedMM, dict[str, Tensor]]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    """A family's miniature as loaded by default (SDPA), and a batch padded on the left."""
    model = miniature(request.param)
    return request.param, HookedMM(model, check=False), miniature_inputs(model)


@pytest.fixture(scope="module", params=DISTINCT)
def distinct(request: pytest.FixtureRequest) -> Case:
    """The same; families built like another one wait for the slow suite."""
    model = miniature(request.param)
    return request.param, HookedMM(model, check=False), miniature_inputs(model)


def eager(family: str) -> Any:
    """The same weights with transformers' eager attention."""
    model = miniature(family)
    model.set_attn_implementation("eager")
    return model


def attention_paths(family: str) -> dict[str, str]:
    """Name of the attention's points -> path of its module, from the table by hand."""
    rows = ((name, place) for name, place in places(family).items() if name.endswith("hook_z"))
    return {name.removesuffix(".hook_z"): place.path.rpartition(".")[0] for name, place in rows}


@contextmanager
def raw_eager(
    model: nn.Module,
    path: str,
    pattern: Callable[[Tensor], Tensor] | None = None,
    scores: Callable[[Tensor, Tensor], None] | None = None,
) -> Iterator[None]:
    """While one attention module of an eager model runs, `pattern` replaces what torch's own softmax gives in it, and
    `scores` is told queries and keys as transformers' eager function gets them."""
    module = model.get_submodule(path)
    file: Any = sys.modules[type(module).__module__]
    softmax, forward = nn.functional.softmax, file.eager_attention_forward

    def changed(*args: Any, **kwargs: Any) -> Tensor:
        value = softmax(*args, **kwargs)
        return value if pattern is None else pattern(value)

    def told(owner: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        if scores is not None:
            scores(query, key)
        return forward(owner, query, key, *args, **kwargs)

    def enter(*_: Any) -> None:
        nn.functional.softmax, file.eager_attention_forward = changed, told  # type: ignore[assignment]

    def leave(*_: Any) -> None:
        nn.functional.softmax, file.eager_attention_forward = softmax, forward

    handles = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        leave()
        for handle in handles:
            handle.remove()


def joined(parts: list[Tensor]) -> Tensor:
    """Patterns of a packed tower, image by image, as one with zeros between images."""
    if len(parts) == 1:
        return parts[0]
    whole = parts[0].new_zeros(1, parts[0].shape[1], sum(p.shape[2] for p in parts), sum(p.shape[3] for p in parts))
    start = 0
    for part in parts:
        end = start + part.shape[2]
        whole[..., start:end, start:end] = part
        start = end
    return whole


def real(name: str, family: str, inputs: dict[str, Tensor]) -> Tensor | None:
    """Rows (sample, query) that are not padding; None where nothing is."""
    if name.startswith(("vision.", "projector.")) or (family == "florence2" and not name.startswith("encoder.")):
        return None
    return inputs["attention_mask"].bool()


def test_patterns_are_what_transformers_softmax_gives(case: Case) -> None:
    """Every attention of every stack, within 1e-5; `output_attentions` too; logits stay within 1e-5 while asking."""
    family, model, inputs = case
    other = eager(family)
    plain = model.run_with_hooks(inputs)
    logits, cache = model.run_with_cache(inputs, "*blocks.*hook_pattern")
    assert plain is not None
    assert logits is not None
    paths = attention_paths(family)
    assert {f"{name}.hook_pattern" for name in paths} == set(cache)
    for name, path in paths.items():
        seen: list[Tensor] = []

        def keep(value: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(value.clone())
            return value

        with torch.no_grad(), raw_eager(other, path, keep):
            out = other(**inputs, output_attentions=True)
        got = cache[f"{name}.hook_pattern"].transpose(1, 2)
        keep_rows = real(name, family, inputs)
        assert close(got, joined(seen).transpose(1, 2), keep_rows) < 1e-5, name
        assert (got.sum(dim=-1) - 1).abs().max() < 1e-5, name
    keep_rows = real("", family, inputs)
    assert close(logits, plain, keep_rows) < 1e-5
    recorded = out.language_model_outputs.attentions if family == "blip-2" else getattr(out, "attentions", None)
    recorded = out.decoder_attentions if family == "florence2" else recorded
    own = [value for name, value in cache.items() if name.startswith("blocks.") and ".attn." in name]
    assert recorded is not None
    if family == "mllama":
        # Its record mixes self- and cross-attention, which were compared above.
        return
    for expected, got in zip(recorded, own, strict=True):
        assert close(got.transpose(1, 2), expected.transpose(1, 2), keep_rows) < 1e-5


def test_rotated_queries_and_keys_are_what_transformers_compares(case: Case) -> None:
    """hook_rot_q and hook_rot_k equal the arguments of transformers' eager attention function."""
    family, model, inputs = case
    other = eager(family)
    names = [name for name in model.hook_names if name.endswith("hook_rot_q")]
    if not names:
        assert family in ("blip-2", "florence2")
        return
    _, cache = model.run_with_cache(inputs, ["*hook_rot_q", "*hook_rot_k"])
    assert len(cache) == 2 * len(names)
    for name in names:
        stem = name.removesuffix(".hook_rot_q")
        queries: list[Tensor] = []
        keys: list[Tensor] = []

        def keep(query: Tensor, key: Tensor, queries: list[Tensor] = queries, keys: list[Tensor] = keys) -> None:
            queries.append(query.transpose(1, 2))
            keys.append(key.transpose(1, 2))

        with torch.no_grad(), raw_eager(other, attention_paths(family)[stem], scores=keep):
            other(**inputs)
        rows = real(name, family, inputs)
        assert close(cache[name], torch.cat(queries, dim=1), rows) < 1e-5, name
        rows = None if ".xattn." in name else rows
        assert close(cache[f"{stem}.hook_rot_k"], torch.cat(keys, dim=1), rows) < 1e-5, name


def test_a_pattern_write_equals_the_same_change_of_transformers_softmax(distinct: Case) -> None:
    """Squared weights in one block of each class: the logits of the eager model whose softmax was changed by hand."""
    family, model, inputs = distinct
    other = eager(family)
    with torch.no_grad():
        plain = other(**inputs).logits
    rows = real("", family, inputs)
    names = [n.removesuffix(".hook_z") for n in representatives(model.hf_model, family) if n.endswith("hook_z")]
    for name in names:
        with torch.no_grad(), raw_eager(other, attention_paths(family)[name], torch.square):
            expected = other(**inputs).logits
        got = model.run_with_hooks(inputs, [(f"{name}.hook_pattern", lambda value, hook: value.square())])
        assert got is not None
        assert close(got, expected, rows) < 1e-5, name
        assert close(expected, plain, rows) > 1e-4, name


def test_writes_of_rotated_queries_and_keys(distinct: Case) -> None:
    """Doubled queries in text and tower are doubled scores: the pattern is the softmax of twice its logarithm."""
    family, model, inputs = distinct
    names = [name for name in model.hook_names if name.endswith("hook_rot_q") and ".1." in name]
    for name in [*names, *(name.replace("rot_q", "rot_k") for name in names)]:
        pattern = f"{name.rpartition('.')[0]}.hook_pattern"
        _, before = model.run_with_cache(inputs, pattern)
        with model.hooks([(name, lambda value, hook: value * 2)]):
            _, after = model.run_with_cache(inputs, pattern)
        squared = before[pattern].double().square()
        rows = real(name, family, inputs)
        expected = squared / squared.sum(dim=-1, keepdim=True)
        assert close(after[pattern].transpose(1, 2), expected.transpose(1, 2), rows) < 1e-5, name


def rotary(x: Tensor, angles: Tensor) -> Tensor:
    """x (..., heads, d) turned by angles (..., d / 2): pairs (i, i + d / 2), in float64."""
    first, second = x.double().chunk(2, dim=-1)
    cos, sin = angles.cos()[..., None, :], angles.sin()[..., None, :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def test_rotary_by_hand_in_llava() -> None:
    """rot_q and rot_k are q and k turned by position * 10000^(-2i/d), positions counted as the raw forward does."""
    model = HookedMM(miniature("llava"), check=False)
    inputs = miniature_inputs(model.hf_model)
    _, cache = model.run_with_cache(inputs, "blocks.*.attn.hook_*[qk]")
    rates = 10000.0 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    angles = torch.arange(inputs["input_ids"].shape[1])[None, :, None] * rates
    for layer in range(4):
        for part in "qk":
            value = cache[f"blocks.{layer}.attn.hook_{part}"]
            expected = rotary(value, angles.expand(*value.shape[:2], -1))
            assert close(cache[f"blocks.{layer}.attn.hook_rot_{part}"], expected) < 1e-5


def test_rotary_by_hand_in_qwen() -> None:
    """Qwen2.5-VL turns the first frequencies by time, the next by row, the last by column; text by its place."""
    model = HookedMM(miniature("qwen2_5_vl"), check=False)
    inputs = miniature_inputs(model.hf_model)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    places3 = torch.ones(3, *ids.shape, dtype=torch.float64)
    for row in range(3):
        own = mask[row].nonzero().flatten()
        _, rows, columns = (inputs["image_grid_thw"][row] // torch.tensor([1, 2, 2])).tolist()
        following, patch = 0, 0
        for column in own.tolist():
            if ids[row, column] != 150:
                places3[:, row, column], following = following, following + 1
                continue
            where = torch.tensor([0, patch // columns, patch % columns])
            places3[:, row, column], patch = following + where, patch + 1
            if patch == rows * columns:
                following += max(rows, columns)
    rates = 10000.0 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    axis = torch.tensor([0, 0, 1, 1, 2, 2, 2, 2])
    angles = places3[axis].permute(1, 2, 0) * rates
    _, cache = model.run_with_cache(inputs, "blocks.*.attn.hook_*[qk]")
    for layer in range(4):
        for part in "qk":
            got = cache[f"blocks.{layer}.attn.hook_rot_{part}"]
            expected = rotary(cache[f"blocks.{layer}.attn.hook_{part}"], angles)
            assert close(got, expected, mask.bool()) < 1e-5


@pytest.mark.parametrize("family", ["llava", "gemma3", "mllama"])
def test_only_layers_asked_for_are_eager(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A spy counts our eager function: once for each pattern asked for; the configuration is as before afterwards."""
    model = HookedMM(miniature(family), check=False)
    inputs = miniature_inputs(model.hf_model)
    calls: list[torch.Size] = []
    original = attention.eager_attention

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args[0].shape)
        return original(*args, **kwargs)

    monkeypatch.setattr(attention, "eager_attention", spy)
    model.run_with_cache(inputs)
    model.run_with_cache(inputs, "*hook_rot_q")
    assert calls == []
    names = ["blocks.0.attn.hook_pattern", "blocks.2.attn.hook_pattern", "vision.blocks.1.attn.hook_pattern"]
    _, cache = model.run_with_cache(inputs, names)
    assert len(calls) == len(cache) == 3
    configs = [m.config for m in model.hf_model.modules() if hasattr(m, "config")]
    assert {config._attn_implementation for config in configs} == {"sdpa"}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_configuration_survives_an_exception_in_a_hook(implementation: str) -> None:
    """Whatever happens inside, forward or generation, the model attends as it was loaded, and computes the same."""
    model = miniature("qwen2_vl")
    model.set_attn_implementation(implementation)
    hooked = HookedMM(model, check=False)
    inputs = miniature_inputs(model)
    with torch.no_grad():
        plain = model(**inputs).logits

    def fail(value: Tensor, hook: Hook) -> None:
        raise ZeroDivisionError

    bad = [("blocks.1.attn.hook_pattern", fail)]
    with pytest.raises(ZeroDivisionError):
        hooked.run_with_hooks(inputs, bad)
    with pytest.raises(ZeroDivisionError), hooked.hooks(bad):
        hooked.generate(inputs, 2)
    configs = [m.config for m in model.modules() if hasattr(m, "config")]
    assert {config._attn_implementation for config in configs} == {implementation}
    assert not attention._ACTIVE
    assert not attention._ORIGINAL
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, plain)


def test_a_model_loaded_eagerly_gives_the_same_points(distinct: Case) -> None:
    """attn_implementation="eager": patterns to read and write, and logits that asking leaves within 1e-6."""
    family, model, inputs = distinct
    other = HookedMM(eager(family), check=False)
    rows = real("", family, inputs)
    plain = other.run_with_hooks(inputs)
    logits, cache = other.run_with_cache(inputs, lambda name: name.endswith(("hook_pattern", "hook_rot_q")))
    _, expected = model.run_with_cache(inputs, list(cache))
    assert plain is not None
    assert logits is not None
    assert close(logits, plain, rows) < 2e-6
    assert list(cache) == list(expected)
    for name in cache:
        here = real(name, family, inputs)
        pattern = name.endswith("pattern")
        got, wanted = (value[name].transpose(1, 2) if pattern else value[name] for value in (cache, expected))
        assert close(got, wanted, here) < 1e-5, name
