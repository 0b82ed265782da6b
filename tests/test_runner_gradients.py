"""Gradients: what is kept, what backward hooks see and replace, against autograd through raw PyTorch hooks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hooked_mm.architectures import FAMILIES
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.runner import Hook
from hooked_mm.testing.miniatures import miniature, miniature_inputs
from tests.families import DISTINCT, Function, Place, close, factor_of, places, raw_hook, raw_hooks, representatives

Case = tuple[str, HookedMM, dict[str, Tensor]]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    """A family's miniature whose parameters need no gradient, and a batch of two padded on the left."""
    model = miniature(request.param)
    return request.param, HookedMM(model, check=False), miniature_inputs(model, 2)


@pytest.fixture(scope="module", params=DISTINCT)
def distinct(request: pytest.FixtureRequest) -> Case:
    """The same; families built like another one wait for the slow suite."""
    model = miniature(request.param)
    return request.param, HookedMM(model, check=False), miniature_inputs(model, 2)


def loss_of(logits: Tensor | None) -> Tensor:
    """A loss that depends on the last positions of all samples."""
    assert logits is not None
    return logits[:, -2:].float().square().sum()


def raw_gradient(model: HookedMM, inputs: dict[str, Tensor], place: Place, replace: bool = False) -> Tensor:
    """Autograd's gradient of the loss by the value at a place; with `replace`, of the tower's input instead.

    The value becomes a leaf (or a node that keeps its gradient) and goes on as it is.
    """
    kept: list[Tensor] = []

    def track(value: Tensor) -> Tensor:
        node = value.clone() if value.requires_grad else value.detach().clone().requires_grad_()
        node.retain_grad()
        if replace:
            node.register_hook(lambda grad: grad * 0 + 2)
        kept.append(node)
        return node.clone()

    with raw_hook(model.hf_model, place, track):
        loss_of(model.hf_model(**inputs).logits).backward()  # type: ignore[no-untyped-call]
    return kept[0].grad if kept[0].grad is not None else torch.zeros_like(kept[0])


def test_gradients_at_every_kind_of_point_are_autograds(case: Case) -> None:
    """All points kept in one pass, as nodes that raw hooks put into one pass: the same gradients; scaled additions by
    what counts; parameters get none."""
    family, model, inputs = case
    table = places(family)
    # Two names of one tensor would be nodes in another order; what is written in place is tested next.
    spots = {
        (table[name].path, table[name].side, table[name].view): name for name in representatives(model.hf_model, family)
    }
    names = [name for name in spots.values() if not table[name].in_place]
    nodes: dict[str, Tensor] = {}

    def keep(name: str) -> Function:
        def function(value: Tensor) -> Tensor:
            node = nodes[name] = value.clone() if value.requires_grad else value.detach().clone().requires_grad_()
            node.retain_grad()
            return node.clone()

        return function

    with raw_hooks(model.hf_model, [(table[name], keep(name)) for name in names]):
        loss_of(model.hf_model(**inputs).logits).backward()  # type: ignore[no-untyped-call]
    logits, cache = model.run_with_cache(inputs, names, grad=True)
    loss_of(logits).backward()  # type: ignore[no-untyped-call]
    for name in names:
        expected = nodes[name].grad
        assert expected is not None, name
        assert expected.abs().max() > 0, name
        assert close(cache.grad(name), expected.reshape(cache[name].shape)) < 2e-5, name
    assert all(parameter.grad is None for parameter in model.hf_model.parameters())


def test_the_stream_between_attention_and_mlp(case: Case) -> None:
    """resid_mid, which is written in place: its gradient is that of the whole stream there, the sum over the norm's way
    and the way past it; where blocks normalise before the sum it is the gradient of anything that is only added."""
    family, model, inputs = case
    if family == "florence2":
        names = ["blocks.1.hook_resid_mid", "blocks.1.lnx.hook_out"]
    else:
        added = "hook_xattn_out" if family == "mllama" else "hook_attn_out"
        names = [f"blocks.1.{added}", "blocks.1.hook_resid_mid"]
    _, both = model.run_with_cache(inputs, names)
    logits, cache = model.run_with_cache(inputs, names[1], grad=True)
    loss_of(logits).backward()  # type: ignore[no-untyped-call]
    expected = raw_gradient(model, inputs, places(family)[names[0]])
    assert close(cache.grad(names[1]), expected) < 2e-5
    assert torch.equal(cache[names[1]].detach(), both[names[1]])


@pytest.mark.slow
def test_derived_points_have_gradients(distinct: Case) -> None:
    """Patterns, results, divisors and quotients: a step along the gradient changes the loss by its square, as a number
    that finite differences give."""
    family, model, inputs = distinct
    suffixes = ("hook_pattern", "hook_result", "hook_scale", "hook_normalized", "hook_rot_q", "insert_out")
    names = [n for n in model.hook_names if n.startswith(("blocks.1.", "vision.blocks.0.")) and n.endswith(suffixes)]
    logits, cache = model.run_with_cache(inputs, names, grad=True)
    loss = loss_of(logits)
    loss.backward()  # type: ignore[no-untyped-call]
    for name in names:
        gradient = cache.grad(name)
        assert gradient.abs().max() > 0, name
        step = 0.02 * float(cache[name].detach().norm() / gradient.norm()) * 0.1
        losses = []
        for sign in (1, -1):

            def move(value: Tensor, hook: Hook, by: Tensor = sign * step * gradient) -> Tensor:
                return value + by

            losses.append(float(loss_of(model.run_with_hooks(inputs, [(name, move)]))))
        expected = step * float(gradient.double().square().sum())
        assert abs((losses[0] - losses[1]) / 2 - expected) < 0.05 * expected + 2e-6 * float(loss), (family, name)


def test_backward_hooks_see_and_replace(case: Case) -> None:
    """A backward hook gets the gradient; what it returns flows on to the tower, as with a raw tensor hook."""
    family, model, inputs = case
    name, early = "blocks.1.hook_resid_post", "blocks.0.hook_resid_pre"
    place, before = places(family)[name], places(family)[early]
    seen: list[Tensor] = []
    told: list[Hook] = []

    def look(grad: Tensor, hook: Hook) -> None:
        seen.append(grad.clone())
        told.append(hook)

    loss_of(model.run_with_hooks(inputs, bwd_hooks=[(name, look)])).backward()  # type: ignore[no-untyped-call]
    assert close(seen[0], raw_gradient(model, inputs, place)) < 2e-5
    assert (told[0].name, told[0].layer) == (name, 1)

    first: list[Tensor] = []

    def start(value: Tensor) -> Tensor:
        first.append(value.detach().clone().requires_grad_())
        return first[0].clone()

    with raw_hook(model.hf_model, before, start):
        raw_gradient(model, inputs, place, replace=True)
    with model.hooks(bwd_hooks=[(name, lambda grad, hook: grad * 0 + 2)]):
        logits, cache = model.run_with_cache(inputs, early, grad=True)
        loss_of(logits).backward()  # type: ignore[no-untyped-call]
    assert first[0].grad is not None
    assert close(cache.grad(early), first[0].grad) < 2e-5


def test_gradients_are_those_behind_forward_hooks(case: Case) -> None:
    """With a write at the same point, the kept value and its gradient are those of what was written."""
    family, model, inputs = case
    name = "blocks.1.hook_mlp_out" if family != "mllama" else "blocks.2.hook_mlp_out"
    place = places(family)[name]
    kept: list[Tensor] = []

    def write(value: Tensor) -> Tensor:
        kept.append((value.detach() * 0.5).requires_grad_())
        return kept[0].clone()

    with raw_hook(model.hf_model, place, write):
        loss_of(model.hf_model(**inputs).logits).backward()  # type: ignore[no-untyped-call]
    with model.hooks([(name, lambda value, hook: value * 0.5)]):
        logits, cache = model.run_with_cache(inputs, name, grad=True)
    loss_of(logits).backward()  # type: ignore[no-untyped-call]
    assert kept[0].grad is not None
    assert close(cache.grad(name), kept[0].grad.reshape(cache[name].shape)) < 2e-5
    assert factor_of(model.hf_model, place) is None


def test_tracking_changes_no_logit_and_needs_gradients(case: Case) -> None:
    """Logits stay bit for bit with everything tracked but patterns; under no_grad it is refused."""
    _, model, inputs = case
    plain = model.run_with_hooks(inputs)
    logits, _ = model.run_with_cache(inputs, grad=True)
    assert plain is not None
    assert logits is not None
    assert close(logits.detach(), plain) < 1e-5
    with torch.no_grad(), pytest.raises(BadInputError, match="no_grad"):
        model.run_with_cache(inputs, "hook_embed", grad=True)
    with torch.inference_mode(), pytest.raises(BadInputError, match="no_grad"):
        model.run_with_hooks(inputs, bwd_hooks=[("hook_embed", lambda grad, hook: None)])
