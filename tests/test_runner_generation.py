"""Generation with interventions in every family: token for token what raw PyTorch hooks give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hooked_mm.architectures import FAMILIES
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.interventions import Add, ProjectOut, Scale
from hooked_mm.knockout import KnockOut
from hooked_mm.positions import GENERATED, Positions
from hooked_mm.runner import Hook
from hooked_mm.testing.miniatures import miniature, miniature_inputs
from tests.families import DISTINCT, Function, places, raw_hook, raw_hooks

Case = tuple[str, HookedMM, dict[str, Tensor]]
NEW = 5
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 0, "temperature": 1.5},
    "beams": {"num_beams": 3},
}


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    """A family's miniature, wrapped, and prompts of different lengths padded on the left, without a decoder's start."""
    model = miniature(request.param)
    inputs = miniature_inputs(model)
    inputs.pop("decoder_input_ids", None)
    return request.param, HookedMM(model, check=False), inputs


@pytest.fixture(scope="module", params=DISTINCT)
def distinct(request: pytest.FixtureRequest) -> Case:
    """The same; families built like another one wait for the slow suite."""
    model = miniature(request.param)
    inputs = miniature_inputs(model)
    inputs.pop("decoder_input_ids", None)
    return request.param, HookedMM(model, check=False), inputs


def raw_generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """New tokens of transformers' own generate, with a seed."""
    torch.manual_seed(1)
    settings = {"max_new_tokens": NEW, "do_sample": False, **options}
    sequences: Tensor = model.generate(**inputs, **settings)
    given = inputs["input_ids"].shape[1]
    if model.config.is_encoder_decoder:
        given = inputs["decoder_input_ids"].shape[1] if "decoder_input_ids" in inputs else 1
    return sequences[:, given:]


def ours(model: HookedMM, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """New tokens of ours, with the same seed."""
    torch.manual_seed(1)
    return model.generate(inputs, NEW, **options).tokens


def push(value: Tensor, hook: Hook | None = None) -> Tensor:
    """A change strong enough to change tokens."""
    return value.flip(-1) * 0.8 + 0.2


def chosen_points(family: str) -> list[str]:
    """Points of every kind: tower and projector, which run in the prefill, and text, which runs in every step."""
    table = places(family)
    wanted = ["vision.blocks.1.hook_resid_mid", "vision.blocks.0.attn.hook_z", "projector.hook_out"]
    wanted += ["encoder.blocks.1.mlp.hook_post", "encoder.ln_embed.hook_out"]
    wanted += ["hook_embed", "blocks.0.hook_resid_mid", "blocks.0.attn.hook_v", "blocks.1.xattn.hook_v"]
    wanted += ["blocks.1.xattn.hook_z", "blocks.1.hook_xattn_out", "blocks.2.mlp.hook_post", "blocks.2.hook_resid_post"]
    return [name for name in wanted if name in table]


@pytest.mark.parametrize("mode", MODES)
def test_writes_at_many_points_give_the_tokens_of_raw_hooks(case: Case, mode: str) -> None:
    """Tower, projector, encoder, cross-attention and text written at once, left padding and key-value cache."""
    family, model, inputs = case
    table, names = places(family), chosen_points(family)
    with raw_hooks(model.hf_model, [(table[name], push) for name in names]):
        expected = raw_generate(model.hf_model, inputs, **MODES[mode])
    with model.hooks([(names, push)]):
        got = ours(model, inputs, **MODES[mode])
    assert torch.equal(got, expected)
    if mode == "greedy":
        plain = raw_generate(model.hf_model, inputs)
        assert not torch.equal(plain, expected)
        assert torch.equal(ours(model, inputs), plain)


@pytest.mark.slow
def test_each_of_these_points_alone(case: Case) -> None:
    """The same, one point at a time."""
    family, model, inputs = case
    for name in chosen_points(family):
        with raw_hook(model.hf_model, places(family)[name], push):
            expected = raw_generate(model.hf_model, inputs)
        with model.hooks([(name, push)]):
            assert torch.equal(ours(model, inputs), expected), name


def test_every_point_fires_in_the_steps_it_should(case: Case) -> None:
    """Step 0 sees all points; later ones all of the text but keys and values of cross-attention, with one position."""
    family, model, inputs = case
    steps: dict[str, list[tuple[int, int]]] = {}

    def look(value: Tensor, hook: Hook) -> None:
        size = value.shape[2] if hook.name.endswith("hook_pattern") else value.shape[1] if value.ndim > 2 else 0
        steps.setdefault(hook.name, []).append((hook.step, size))

    with model.hooks([("*", look)]):
        tokens = ours(model, inputs, eos_token_id=-1)
    assert tokens.shape == (3, NEW)
    assert list(steps) == [name for name in model.hook_names if name in steps]
    assert set(model.hook_names) - set(steps) == set()
    given = 1 if family == "florence2" else inputs["input_ids"].shape[1]
    later = [(step, 1) for step in range(1, NEW)]
    for name, got in steps.items():
        once = name.startswith(("vision.", "projector.", "encoder.")) or name.endswith(("xattn.hook_k", "xattn.hook_v"))
        if once:
            assert [step for step, _ in got] == [0], name
        elif name.endswith("hook_rot_k") or name == "hook_logits":
            assert [step for step, _ in got] == list(range(NEW)), name
        else:
            assert got == [(0, given), *later], name


def test_an_encoder_decoder_started_by_hand() -> None:
    """florence2 with decoder_input_ids of several tokens: the tokens behind them, with writes as raw hooks'."""
    model = HookedMM(miniature("florence2"), check=False)
    inputs = miniature_inputs(model.hf_model)
    table, names = places("florence2"), chosen_points("florence2")
    for mode in MODES.values():
        with raw_hooks(model.hf_model, [(table[name], push) for name in names]):
            expected = raw_generate(model.hf_model, inputs, **mode)
        with model.hooks([(names, push)]):
            assert torch.equal(ours(model, inputs, **mode), expected)


@pytest.mark.parametrize("mode", MODES)
def test_interventions_give_the_tokens_of_formulas_in_raw_hooks(distinct: Case, mode: str) -> None:
    """Add to one sample's text, ProjectOut everywhere, Scale of the projector, each written out by hand; samples keep
    theirs through beams."""
    family, model, inputs = distinct
    generator = torch.Generator().manual_seed(3)
    vectors = torch.randn(3, 64, generator=generator) * 3
    away = torch.randn(2, 64, generator=generator)
    basis = torch.linalg.qr(away.T.double()).Q.T.float()
    rows = 3 if mode == "beams" else 1
    own = inputs["attention_mask"].bool().repeat_interleave(rows, dim=0)

    def add(value: Tensor) -> Tensor:
        shifted = value + vectors.repeat_interleave(rows, dim=0)[:, None]
        # Padding is left alone; generated positions, and a decoder's own, are none.
        padded = family != "florence2" and value.shape[1] > 1
        return torch.where(own[:, :, None], shifted, value) if padded else shifted

    def project(value: Tensor) -> Tensor:
        less = value - (value @ basis.T) @ basis
        padded = family != "florence2" and value.shape[1] > 1
        return torch.where(own[:, :, None], less, value) if padded else less

    table = places(family)
    names = ("blocks.2.hook_resid_post", "blocks.0.hook_resid_pre", "projector.hook_out")
    functions: list[Function] = [add, project, lambda value: value * 0.3]
    pairs = [(table[name], function) for name, function in zip(names, functions, strict=True)]
    with raw_hooks(model.hf_model, pairs):
        expected = raw_generate(model.hf_model, inputs, **MODES[mode])
    made = Add(names[0], vectors) + ProjectOut(names[1], away) + Scale(names[2], 0.3)
    with model.hooks([made]):
        got = ours(model, inputs, **MODES[mode])
    assert torch.equal(got, expected)
    assert mode != "greedy" or not torch.equal(raw_generate(model.hf_model, inputs), expected)


@contextmanager
def masked(model: nn.Module, paths: list[str], change: Callable[[Tensor, int], Tensor]) -> Iterator[None]:
    """In eager attention modules, `change(pattern, length of what was seen so far)` after torch's own softmax.

    The count of positions is kept per module: what it was given so far.
    """
    softmax = nn.functional.softmax
    with ExitStack() as stack:
        for path in paths:
            seen = [0]

            def enter(_: nn.Module, args: tuple, kwargs: dict, seen: list[int] = seen) -> None:
                hidden = args[0] if args else kwargs["hidden_states"]
                seen[0] += hidden.shape[1]

                def changed(*inner: Any, **options: Any) -> Tensor:
                    return change(softmax(*inner, **options), seen[0])

                nn.functional.softmax = changed  # type: ignore[assignment]

            def leave(*_: Any) -> None:
                nn.functional.softmax = softmax

            module = model.get_submodule(path)
            for handle in (
                module.register_forward_pre_hook(enter, with_kwargs=True),
                module.register_forward_hook(leave, always_call=True),
            ):
                stack.callback(handle.remove)
        stack.callback(leave)
        yield


def without(pattern: Tensor, removed: Tensor) -> Tensor:
    """Softmax with those entries at -inf, by dividing through what remains."""
    kept = pattern.double() * ~removed
    return (kept / kept.sum(dim=-1, keepdim=True)).nan_to_num().to(pattern.dtype)


@pytest.mark.parametrize("mode", ["greedy", pytest.param("beams", marks=pytest.mark.slow)])
def test_knocking_out_image_keys_in_every_step(distinct: Case, mode: str) -> None:
    """What is generated may not read the image: raw eager attention with those keys at zero, in each layer; where a
    sliding window holds only the last keys, the same positions go."""
    family, model, inputs = distinct
    # Without image tokens that self-attention could read, or a prompt of the decoder's own, other positions go.
    prompt = {"mllama": inputs["attention_mask"].bool(), "florence2": torch.ones(3, 1, dtype=torch.bool)}
    removed = prompt.get(family, inputs["input_ids"] == 150)
    keys = Positions(generated=False) if family in prompt else Positions(modality="image")
    # Long enough to leave Gemma's window.
    count = 12 if family == "gemma3" else NEW
    raw = miniature(family)
    raw.set_attn_implementation("eager")
    rows = {name: place.path for name, place in places(family).items() if name.startswith("blocks.")}
    paths = [path.rpartition(".")[0] for name, path in rows.items() if ".attn.hook_z" in name]

    def change(pattern: Tensor, length: int) -> Tensor:
        if length <= removed.shape[1]:
            return pattern
        everything = torch.zeros(3, length, dtype=torch.bool)
        everything[:, : removed.shape[1]] = removed
        last = everything.repeat_interleave(pattern.shape[0] // 3, dim=0)[:, -pattern.shape[-1] :]
        return without(pattern, last[:, None, None, :])

    with masked(raw, paths, change):
        expected = raw_generate(raw, inputs, max_new_tokens=count, **MODES[mode])
    with model.hooks([KnockOut(queries=GENERATED, keys=keys)]):
        torch.manual_seed(1)
        got = model.generate(inputs, count, **MODES[mode]).tokens
    assert torch.equal(got, expected)


def test_what_a_sliding_window_shows() -> None:
    """Gemma 3's sliding layers: the pattern's last key is the newest position, its first the window's oldest; cutting
    one position by number hits the same column in both kinds of layers for as long as the window holds it."""
    model = HookedMM(miniature("gemma3"), check=False)
    inputs = miniature_inputs(model.hf_model)
    width = inputs["input_ids"].shape[1]
    sizes: dict[str, list[int]] = {}
    cut: list[tuple[int, str, list[int]]] = []

    def look(value: Tensor, hook: Hook) -> None:
        sizes.setdefault(hook.name, []).append(value.shape[3])
        if hook.step:
            cut.append((hook.step, hook.name, (value[2, 0, 0] == 0).nonzero().flatten().tolist()))

    names = ["blocks.0.attn.hook_pattern", "blocks.1.attn.hook_pattern"]
    last = int(inputs["attention_mask"][2].sum()) - 1
    knock = KnockOut(layers=[0, 1], queries=GENERATED, keys=Positions(index=last, sample=2))
    with model.hooks([knock, (names, look)]):
        model.generate(inputs, 12, eos_token_id=-1)
    assert sizes[names[1]] == [width + step for step in range(12)]
    assert sizes[names[0]][0] >= width or sizes[names[0]][0] == 8
    assert set(sizes[names[0]][1:]) == {8}
    for step, name, columns in cut:
        place = width - 1 if name == names[1] else 8 - 1 - step
        assert columns == ([place] if place >= 0 else []), (step, name)


def test_generation_leaves_later_runs_alone(distinct: Case) -> None:
    """After a generation that wrote and looked inside, plain generation and forward are as before."""
    _, model, inputs = distinct
    before, plain = model.run_with_hooks(inputs), ours(model, inputs)
    with model.hooks([("blocks.*.hook_resid_post", push), ("*.hook_pattern", lambda value, hook: value)]):
        ours(model, inputs)
    after = model.run_with_hooks(inputs)
    assert before is not None
    assert after is not None
    assert torch.equal(before, after)
    assert torch.equal(ours(model, inputs), plain)


def test_right_padding_and_backward_hooks_are_refused(case: Case) -> None:
    """Generation from prompts padded on the right, or with backward hooks active, says what to do instead."""
    _, model, inputs = case
    right = miniature_inputs(model.hf_model, padding_side="right")
    if not model.structure.encoder:
        # Behind an encoder's padding nothing is written: its decoder has prompts of its own.
        with pytest.raises(BadInputError, match="padding_side='left'"):
            model.generate(right, 2)
    with (
        model.hooks(bwd_hooks=[("blocks.0.hook_resid_post", lambda grad, hook: None)]),
        pytest.raises(BadInputError, match="no gradients"),
    ):
        model.generate(inputs, 2)
