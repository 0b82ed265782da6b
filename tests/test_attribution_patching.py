"""Attribution patching against exact patching: equal where it is linear, its derivative everywhere else."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from analyses.attribution_patching import attributed, by_group, first_order
from analyses.causal_tracing import patched_scores, point_names, traced
from analyses.image_pairs import scene_pairs
from analyses.pair_batches import PairBatch, PairBatches, pair_groups
from analyses.position_groups import Groups, Masked
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.patching import Patch
from tests.processors import processor
from tests.tiny import tiny


@pytest.fixture(scope="module")
def colours(llava: HookedMM) -> tuple[PairBatch, Groups]:
    """Four pairs of scenes in which one object has another colour."""
    (made,) = PairBatches(llava, scene_pairs("colour", 4))
    return made, pair_groups(llava, made)


def test_of_a_linear_target_it_is_patching() -> None:
    """Two linear layers with mixing between positions: what a patched position brings, exactly, in float64."""
    torch.manual_seed(0)
    first, second, mix = nn.Linear(5, 7).double(), nn.Linear(7, 3).double(), torch.randn(4, 4).double()
    inputs = torch.randn(2, 4, 5).double()

    def target(hidden: torch.Tensor) -> torch.Tensor:
        return second(mix @ hidden)[-1, 1] - second(mix @ hidden)[-1, 0]

    clean, corrupt = (first(one).detach() for one in inputs)
    at = corrupt.clone().requires_grad_()
    target(at).backward()
    assert at.grad is not None
    found = first_order(clean, corrupt, at.grad)
    for position in range(4):
        patched = corrupt.clone()
        patched[position] = clean[position]
        gained = float((target(patched) - target(corrupt)).detach())
        assert float(found[position]) == pytest.approx(gained, abs=1e-12)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_it_is_the_derivative_of_patching(llava: HookedMM, colours: tuple[PairBatch, Groups], direction: Any) -> None:
    """Of a patch that goes a small way from one run's values to the other's, both ways, at a group's positions."""
    pairs, groups = colours
    run, source = (pairs.corrupt, pairs.clean) if direction == "denoise" else (pairs.clean, pairs.corrupt)
    points = ["blocks.1.hook_resid_post", "blocks.2.hook_attn_out", "blocks.4.hook_mlp_out"]
    found = attributed(llava, pairs, points, direction)
    _, mine = llava.run_with_cache(run, points)
    _, theirs = llava.run_with_cache(source, points)
    step = 0.02
    for place, point in enumerate(points[: 3 if direction == "denoise" else 1]):
        mask = groups["object" if place != 2 else "last"]
        sides = []
        for share in (step, -step):
            given = torch.lerp(mine[point], theirs[point], share)
            patch = Patch(point, given, Masked.of_positions(run, mask), batch=run)
            with torch.no_grad():
                sides.append(pairs.targets.scores(llava.run_with_hooks(run, [patch])).double())  # type: ignore[arg-type]
        expected = (sides[0] - sides[1]) / (2 * step)
        own = (found[place].double() * mask).sum(1)
        torch.testing.assert_close(own, expected, rtol=0.01, atol=0.01)


def test_it_goes_with_exact_patching(llava: HookedMM, colours: tuple[PairBatch, Groups]) -> None:
    """Over layers and groups, and closer when the gradient is averaged between the runs."""
    pairs, groups = colours
    points = list(point_names(llava, ["resid_post"], [1, 4]))
    exact = traced(llava, pairs, points, groups).mean(2).flatten()
    plain, averaged = (
        by_group(attributed(llava, pairs, points, steps=steps), groups, pairs).mean(2).flatten() for steps in (0, 3)
    )
    assert torch.corrcoef(torch.stack([plain, exact]))[0, 1] > 0.7
    assert torch.corrcoef(torch.stack([averaged, exact]))[0, 1] > 0.95
    assert (averaged - exact).abs().mean() < (plain - exact).abs().mean()


def test_averaged_over_many_runs_all_of_the_embedding_gives_the_whole_difference(
    llava: HookedMM, colours: tuple[PairBatch, Groups]
) -> None:
    """The completeness of integrated gradients (Sundararajan et al. 2017)."""
    pairs, _ = colours
    found = attributed(llava, pairs, ["hook_embed"], steps=8)[0].sum(1)
    torch.testing.assert_close(found, pairs.clean_scores - pairs.corrupt_scores, rtol=0.03, atol=0.03)


@pytest.mark.parametrize(
    ("family", "entry", "point"),
    [
        ("mllama", "model.multi_modal_projector", "blocks.1.hook_xattn_out"),
        ("florence2", "model.language_model.encoder.layernorm_embedding", "blocks.0.hook_xattn_out"),
    ],
)
def test_the_way_between_two_runs_is_that_of_pictures_wherever_they_enter(
    family: str, entry: str, point: str, unchecked: None
) -> None:
    """Read by cross-attention, embeddings of the text are the same in both runs: a way between those goes nowhere."""
    large = deepcopy(tiny(family))
    for weight in large.parameters():
        # Large enough for the way to be no straight line; gates are single numbers.
        weight.copy_(torch.ones_like(weight) if weight.numel() == 1 else weight * (4 if weight.ndim > 1 else 1))
    model = HookedMM(large, processor(family), check=False)
    (pairs,) = PairBatches(model, scene_pairs("colour", 2), right="any")
    inner, kept = model.hf_model.get_submodule(entry), []
    for batch in (pairs.corrupt, pairs.clean):
        handle = inner.register_forward_hook(lambda _, __, output: kept.append(output.detach()))
        model.run_with_hooks(batch)
        handle.remove()
    _, theirs = model.run_with_cache(pairs.clean, point)
    _, mine = model.run_with_cache(pairs.corrupt, point)
    mean = torch.zeros_like(mine[point])
    for share in (0.25, 0.75):
        between = torch.lerp(*kept, share)
        handle = inner.register_forward_hook(lambda *_, given=between: given.clone())
        with torch.enable_grad():
            logits, cache = model.run_with_cache(pairs.corrupt, point, grad=True)
            pairs.targets.scores(logits).sum().backward()
        handle.remove()
        mean += cache.grad(point) / 2
    expected = ((theirs[point] - mine[point]) * mean).sum(-1)
    (found,), (plain,) = (attributed(model, pairs, [point], steps=steps) for steps in (2, 0))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert float((plain - expected).abs().max()) > 0.02 * float(expected.abs().max())


def test_heads_are_summed_and_companions_have_no_part_in_it(llava: HookedMM, colours: tuple[PairBatch, Groups]) -> None:
    """A pair alone gives what it gives among others; a point without positions is refused."""
    pairs, groups = colours
    points = ["blocks.2.attn.hook_z"]
    whole = by_group(attributed(llava, pairs, points), groups, pairs)
    (alone,) = PairBatches(llava, pairs.pairs[:1])
    own = by_group(attributed(llava, alone, points), pair_groups(llava, alone), alone)
    torch.testing.assert_close(own[..., 0], whole[..., 0], rtol=0, atol=1e-3)
    exact = patched_scores(llava, pairs, points, {"last": groups["last"]})
    assert exact.shape == (1, 1, 4)
    with pytest.raises(BadInputError, match="steps=-1"):
        attributed(llava, pairs, points, steps=-1)
    with pytest.raises(BadInputError, match="none per position"):
        attributed(llava, pairs, ["vision.blocks.1.hook_resid_post"])
