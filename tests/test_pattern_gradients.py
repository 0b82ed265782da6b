"""Gradients of attention patterns, target by target: against finite differences and PyTorch alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from analyses.pattern_gradients import PatternGradients, places_by_round, weighted_attention
from analyses.targets import Targets, answer_targets
from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM

POINTS = ["blocks.1.attn.hook_pattern", "blocks.3.attn.hook_pattern"]


@pytest.fixture(scope="module")
def answered(llava: HookedMM, images: list[Image.Image]) -> Batch:
    texts = ["what place is this ?", "what colour is the object at the top left ?", "describe the scene ."]
    return llava.prepare(images[:3], texts, answers=["city", "red", "a big red star"])


def test_the_mean_over_heads_is_of_what_is_positive() -> None:
    """relu before the mean: heads of opposite sign do not cancel."""
    pattern, gradient = torch.full((2, 1, 2), 0.5), torch.tensor([[[2.0, -4.0]], [[-2.0, 6.0]]])
    assert weighted_attention(pattern, gradient).tolist() == [[0.5, 1.5]]
    assert weighted_attention(pattern.bfloat16(), gradient.bfloat16()).dtype == torch.float32


def test_a_round_has_one_target_of_each_sample() -> None:
    targets = Targets(torch.tensor([2, 0, 0, 2, 2]), torch.arange(5), torch.arange(5))
    assert [places.tolist() for places in places_by_round(targets)] == [[0, 1], [2, 3], [4]]


def test_each_target_has_its_own_gradient_although_a_batch_shares_a_backward_pass(
    llava: HookedMM, answered: Batch
) -> None:
    """Against one run per target, whose graph is fresh, through plain `backward()`."""
    targets = answer_targets(answered)
    found = PatternGradients(llava, answered, targets, POINTS)
    told: list[tuple[int, int]] = []
    rounds = list(found.rounds(lambda done, total: told.append((done, total))))
    assert len(rounds) == 4
    assert told == [(0, 4), (1, 4), (2, 4), (3, 4)]
    for one in rounds:
        for number, place in enumerate(one.places.tolist()):
            sample, row, token = (int(getattr(targets, name)[place]) for name in ("sample", "row", "token"))
            logits, cache = llava.run_with_cache(answered, POINTS, grad=True)
            assert logits is not None
            logits[sample, row, token].backward()
            assert int(one.targets.token[number]) == token
            for point in POINTS:
                expected = (cache[point] * cache.grad(point)).relu().mean(1)[sample]
                value = one.weighted[point]
                assert value is not None
                torch.testing.assert_close(value[sample], expected, rtol=1e-4, atol=1e-9)
            torch.testing.assert_close(found.scores[place], logits[sample, row, token].detach())


def test_one_forward_pass_serves_all_targets_and_one_backward_pass_a_round(
    llava: HookedMM, answered: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four tokens at most of an answer: four rounds, whatever the number of samples."""
    passes = {"forward": 0, "backward": 0}
    forward, backward = HookedMM.run_with_cache, torch.autograd.grad

    def run(*args: Any, **options: Any) -> Any:
        passes["forward"] += 1
        return forward(*args, **options)

    def differentiate(*args: Any, **options: Any) -> Any:
        passes["backward"] += 1
        return backward(*args, **options)

    monkeypatch.setattr(HookedMM, "run_with_cache", run)
    monkeypatch.setattr(torch.autograd, "grad", differentiate)
    targets = answer_targets(answered)
    assert len(targets) == 6
    assert len(list(PatternGradients(llava, answered, targets, POINTS).rounds())) == 4
    assert passes == {"forward": 1, "backward": 4}


def exact_norm(norm: Any, value: torch.Tensor) -> torch.Tensor:
    """transformers' own rounds to float32, which differences show."""
    return norm.weight * value * torch.rsqrt(value.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)


def test_gradients_are_those_of_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    """d score / d A in float64, by moving single entries of the pattern."""
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)
    model = HookedMM.small("llava", dtype="float64", check=False)
    batch = model.prepare(Image.new("RGB", (64, 64), "red"), "what colour is the star ?", answers=["red"])
    targets, point = answer_targets(batch), POINTS[0]
    found = PatternGradients(model, batch, targets, [point], "log_prob")
    (one,) = found.rounds()
    row, token, step = int(targets.row[0]), int(targets.token[0]), 1e-4

    def score(head: int, query: int, key: int, by: float) -> float:
        def move(value: torch.Tensor, hook: object) -> torch.Tensor:
            value = value.clone()
            value[0, head, query, key] += by
            return value

        logits = model.run_with_hooks(batch, [(point, move)])
        assert logits is not None
        return float(logits[0, row].log_softmax(-1)[token])

    pattern = found.patterns[point][0].detach()
    query = row - 2
    key = int(pattern[:, query].mean(0)[:-4].argmax())
    moved = [(score(head, query, key, step) - score(head, query, key, -step)) / (2 * step) for head in range(4)]
    expected = sum(max(gradient * float(pattern[head, query, key]), 0) for head, gradient in enumerate(moved)) / 4
    value = one.weighted[point]
    assert value is not None
    assert expected > 1e-6
    assert float(value[0, query, key]) == pytest.approx(expected, rel=1e-6)


def test_runs_keep_no_second_copy_of_gradients(llava: HookedMM, answered: Batch) -> None:
    found = PatternGradients(llava, answered, answer_targets(answered, "first"), POINTS)
    list(found.rounds())
    assert all(value.grad is None for value in found.patterns.values())


def test_a_layer_that_no_target_depends_on_is_told_apart_from_zeros(llava: HookedMM, images: list[Image.Image]) -> None:
    """The tower's last layer is not what features are taken from."""
    batch = llava.prepare(images[0], "what place is this ?", answers=["city"])
    last = llava.cfg.vision.n_layers - 1 if llava.cfg.vision else 0
    names = [f"vision.blocks.{last}.attn.hook_pattern", f"vision.blocks.{last - 1}.attn.hook_pattern"]
    used = llava.hf_model.config.vision_feature_layer
    (one,) = PatternGradients(llava, batch, answer_targets(batch), names).rounds()
    assert (one.weighted[names[0]] is None) == (used == -2)
    assert one.weighted[names[1]] is not None


def test_nothing_to_explain_is_refused(llava: HookedMM, answered: Batch) -> None:
    with pytest.raises(BadInputError, match="0 targets and 2 patterns"):
        PatternGradients(llava, answered, answer_targets(answered).take([]), POINTS)
