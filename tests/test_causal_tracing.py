"""Activation patching against raw hooks, closed forms and scenes in which it is known what differs and where."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from analyses.causal_tracing import (
    control,
    joined,
    over_pairs,
    partners,
    patched_scores,
    point_names,
    recovery,
    stretched,
    traced,
)
from analyses.image_pairs import scene_pairs
from analyses.pair_batches import PairBatch, PairBatches, pair_groups, pair_patches
from analyses.position_groups import Groups
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM

LAST = "blocks.5.hook_resid_post"


@pytest.fixture(scope="module")
def colours(llava: HookedMM) -> tuple[PairBatch, Groups]:
    """Six pairs of scenes in which one object has another colour."""
    (made,) = PairBatches(llava, scene_pairs("colour", 6))
    return made, pair_groups(llava, made)


def test_recovery_is_the_share_of_the_difference() -> None:
    """Denoising counts from the corrupt run, noising from the clean one; no difference has no share."""
    clean, corrupt = torch.tensor([4.0, 2.0, 1.0]), torch.tensor([-4.0, 0.0, 1.0])
    patched = torch.tensor([[0.0, 2.0, 1.0], [-4.0, 0.5, 3.0]])
    found = recovery(patched, clean, corrupt)
    torch.testing.assert_close(found[:, :2], torch.tensor([[0.5, 1.0], [0.0, 0.25]], dtype=torch.float64))
    assert found[:, 2].isnan().all()
    torch.testing.assert_close(recovery(patched, clean, corrupt, "noise")[:, :2], 1 - found[:, :2])
    with pytest.raises(BadInputError, match="no direction 'denose'"):
        recovery(patched, clean, corrupt, "denose")  # type: ignore[arg-type]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=4), st.integers(0, 99))
def test_groups_of_several_sizes_are_aligned_end_to_end(sizes: list[tuple[int, int]], seed: int) -> None:
    """Every position gets a value of the other's group, in order, the first the first; nothing else is touched."""
    generator = torch.Generator().manual_seed(seed)
    count, width = len(sizes), 12
    mask = torch.zeros(count, width, dtype=torch.bool)
    for row, (size, _) in enumerate(sizes):
        mask[row, torch.randperm(width, generator=generator)[:size]] = True
    values = torch.arange(count * width, dtype=torch.float64).reshape(count, width, 1)
    order = [(row + 1) % count for row in range(count)]
    found = stretched(values, mask, order)
    assert torch.equal(found[~mask], values[~mask])
    for row, other in enumerate(order):
        got, offered = found[row, mask[row], 0].tolist(), values[other, mask[other], 0].tolist()
        if not got or not offered:
            assert torch.equal(found[row], values[row])
            continue
        assert got == [offered[place * len(offered) // len(got)] for place in range(len(got))]
        assert got[0] == offered[0]
        if len(got) == len(offered):
            assert got == offered


def by_raw_hooks(model: HookedMM, pairs: PairBatch, module: Any, mask: torch.Tensor, source: Any, run: Any) -> Any:
    """LD with a module's output replaced at a mask, without anything of ours."""
    kept: list[torch.Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        kept.append((output[0] if isinstance(output, tuple) else output).clone())

    def put(_: Any, __: Any, output: Any) -> Any:
        whole = output[0] if isinstance(output, tuple) else output
        new = torch.where(mask[..., None], kept[0], whole)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    with torch.no_grad():
        for function, batch in ((keep, source), (put, run)):
            handle = module.register_forward_hook(function)
            logits = model.hf_model(**batch.inputs).logits
            handle.remove()
    rows = torch.arange(len(pairs))
    own = logits[rows, pairs.targets.row]
    return own[rows, pairs.targets.token] - own[rows, pairs.targets.foil]


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_patched_runs_equal_those_by_raw_hooks(
    llava: HookedMM, colours: tuple[PairBatch, Groups], direction: Any
) -> None:
    """The stream, attention's and the MLP's output, at two groups."""
    pairs, groups = colours
    some = {name: groups[name] for name in ("object", "last")}
    layer = llava.hf_model.get_submodule("model.language_model.layers.3")
    sides = (pairs.clean, pairs.corrupt)
    source, run = sides if direction == "denoise" else sides[::-1]
    modules = {"attn_out": layer.self_attn, "mlp_out": layer.mlp, "resid_post": layer}
    if direction == "noise":
        del modules["attn_out"], some["last"]
    found = patched_scores(llava, pairs, [f"blocks.3.hook_{name}" for name in modules], some, direction)
    for place, module in enumerate(modules.values()):
        for number, mask in enumerate(some.values()):
            expected = by_raw_hooks(llava, pairs, module, mask, source, run)
            torch.testing.assert_close(found[place, number], expected, rtol=0, atol=2e-4)


def test_all_of_the_stream_and_the_last_row_of_the_last_layer_bring_everything_back(
    llava: HookedMM, colours: tuple[PairBatch, Groups]
) -> None:
    """Exactly, in both directions; what comes before the picture brings nothing."""
    pairs, groups = colours
    everywhere = torch.stack(list(groups.values())).any(0)
    before = groups["template"] & (torch.arange(everywhere.shape[1]) < groups["object"].int().argmax(1)[:, None])
    some = {"everywhere": everywhere, "last": groups["last"], "before": before}
    for direction in ("denoise", "noise"):
        found = traced(llava, pairs, ["blocks.2.hook_resid_post", LAST], some, direction)  # type: ignore[arg-type]
        torch.testing.assert_close(found[:, 0], torch.ones(2, 6).double(), rtol=0, atol=1e-4)
        torch.testing.assert_close(found[1, 1], torch.ones(6).double(), rtol=0, atol=1e-4)
        assert found[:, 2].abs().max() < 1e-4


def test_recovery_is_at_the_objects_patches_early_and_at_the_last_row_late(
    llava: HookedMM, colours: tuple[PairBatch, Groups]
) -> None:
    """And another pair's runs bring nothing back, wherever they are put."""
    pairs, groups = colours
    points = list(point_names(llava, ["resid_post"], [0, 5]))
    some = {name: mask for name, mask in groups.items() if name not in ("subject", "template")}
    found = traced(llava, pairs, points, some)
    other = control(llava, pairs, points, {name: groups[name] for name in ("object", "last")})
    means = {name: found[:, place].mean(1).tolist() for place, name in enumerate(some)}
    assert means["object"][0] > 0.9
    assert means["object"][1] < 0.05
    assert means["last"][0] < 0.05
    assert means["last"][1] > 0.99
    assert all(abs(value) < 0.1 for name in ("other patches", "question") for value in means[name])
    assert other.mean(2).abs().max() < 0.1


def test_another_pairs_clean_values_alone_would_be_no_control(
    llava: HookedMM, colours: tuple[PairBatch, Groups]
) -> None:
    """A run that is made to say a third colour prefers neither, which looks like half a recovery."""
    pairs, groups = colours
    order = partners(pairs)
    assert all(not set(pairs.pairs[n].answers) & set(pairs.pairs[o].answers) for n, o in enumerate(order))
    _, cache = llava.run_with_cache(pairs.clean, LAST)
    hooks = [(LAST, lambda value, hook: stretched(cache[LAST], groups["last"], order))]
    alone = recovery(pairs.targets.scores(llava.run_with_hooks(pairs.corrupt, hooks)), *_both(pairs))  # type: ignore[arg-type]
    assert alone.mean() > 0.3
    assert control(llava, pairs, [LAST], {"last": groups["last"]}).mean().abs() < 0.1


def _both(pairs: PairBatch) -> tuple[torch.Tensor, torch.Tensor]:
    return pairs.clean_scores, pairs.corrupt_scores


def test_with_its_own_runs_the_control_is_the_recovery(llava: HookedMM, colours: tuple[PairBatch, Groups]) -> None:
    """Its corrupt values change nothing in the corrupt run."""
    pairs, groups = colours
    some = {"object": groups["object"]}
    own = control(llava, pairs, ["blocks.1.hook_resid_post"], some, range(len(pairs)))
    torch.testing.assert_close(own, traced(llava, pairs, ["blocks.1.hook_resid_post"], some), rtol=0, atol=1e-4)


def test_a_pairs_recovery_does_not_depend_on_its_companions(llava: HookedMM, colours: tuple[PairBatch, Groups]) -> None:
    """Nor on the padding that longer questions bring; a pair without a group has no number there."""
    pairs, groups = colours
    points = ["blocks.2.hook_resid_post"]
    whole = traced(llava, pairs, points, groups)
    (alone,) = PairBatches(llava, [pairs.pairs[2]])
    found = traced(llava, alone, points, pair_groups(llava, alone))
    torch.testing.assert_close(found[..., 0], whole[..., 2], rtol=0, atol=1e-3)
    none = {"object": groups["object"].clone()}
    none["object"][1] = False
    found = traced(llava, pairs, points, none)
    assert found[0, 0].isnan().tolist() == [False, True, False, False, False, False]


def test_in_the_tower_the_objects_patches_carry_the_difference(
    llava: HookedMM, colours: tuple[PairBatch, Groups]
) -> None:
    """What its first block makes of them, all of it; other pairs' patches have no counterpart there."""
    pairs, _ = colours
    (point,) = point_names(llava, ["resid_pre"], [0], tower=True)
    groups = pair_patches(llava, pairs)
    assert list(groups) == ["object", "other patches"]
    found = traced(llava, pairs, [point], groups)[0]
    assert found[0].mean() > 0.9
    assert found[1].abs().mean() < 0.15
    everything = {"all": groups["object"] | groups["other patches"], "none of the second": groups["object"].clone()}
    everything["none of the second"][1] = False
    found = traced(llava, pairs, [point.replace("0.hook_resid_pre", "2.hook_resid_post")], everything)[0]
    torch.testing.assert_close(found[0], torch.ones(6).double(), rtol=0, atol=1e-4)
    assert found[1].isnan().tolist() == [False, True, False, False, False, False]
    with pytest.raises(BadInputError, match="hook_resid_pre' lies in the tower"):
        control(llava, pairs, [point], groups)


def test_batches_are_joined_by_group_and_averaged_over_pairs() -> None:
    """Where a batch has no such group its pairs do not count."""
    one = {"a": torch.tensor([[1.0, 3.0]], dtype=torch.float64)}
    two = {"a": torch.tensor([[2.0]], dtype=torch.float64), "b": torch.tensor([[5.0]], dtype=torch.float64)}
    made = joined([one, two])
    assert made["a"].tolist() == [[1.0, 3.0, 2.0]]
    assert over_pairs(made["b"], 20).estimate.tolist() == [5.0]
    band = over_pairs(made["a"], 200)
    assert float(band.estimate) == 2.0
    assert 1 <= float(band.low) < 2 < float(band.high) <= 3


def test_points_that_do_not_exist_are_refused(llava: HookedMM) -> None:
    """With those that do; a component of heads is taken by its whole name."""
    assert list(point_names(llava, ["attn_out", "attn.hook_z"], [1])) == [
        "blocks.1.hook_attn_out",
        "blocks.1.attn.hook_z",
    ]
    with pytest.raises(BadInputError, match="layer 6 was asked for; this model has the layers 0 to 5"):
        point_names(llava, ["resid_post"], [6])
    with pytest.raises(BadInputError, match="has a component 'xattn_out'"):
        point_names(llava, ["xattn_out"])


def test_a_pair_without_another_answer_beside_it_has_no_control(llava: HookedMM) -> None:
    """It says so."""
    (made,) = PairBatches(llava, scene_pairs("size", 3), right="any")
    with pytest.raises(BadInputError, match="shares an answer with each of the 2 others"):
        partners(made)
