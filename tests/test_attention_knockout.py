"""Knockout against a hand-written forward pass and against what must follow when nothing gets through any more."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from analyses.attention_knockout import Cut, Scores, knocked_out, knockout, known_cuts, scores, windows
from analyses.image_pairs import scene_pairs
from analyses.pair_batches import PairBatch, PairBatches, pair_groups
from analyses.position_groups import Groups
from analyses.targets import Targets
from hooked_mm.batch import Modality
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM

ALL_LAYERS = [range(6)]


@pytest.fixture(scope="module")
def colours(llava: HookedMM) -> tuple[PairBatch, Groups]:
    """Three pairs of scenes in which one object has another colour."""
    (made,) = PairBatches(llava, scene_pairs("colour", 3))
    return made, pair_groups(llava, made)


def each_by_itself(model: HookedMM, stream: torch.Tensor) -> torch.Tensor:
    """Logits if every position reads only itself, so that attention adds W_O W_V norm(x); by hand, in float64."""
    state = {name: value.double() for name, value in model.hf_model.state_dict().items()}
    prefix = next(name for name in state if name.endswith("layers.0.input_layernorm.weight")).split("layers.0")[0]
    eps = model.hf_model.config.text_config.rms_norm_eps

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * state[name]

    x = stream.double()
    for layer in range(6):
        own = f"{prefix}layers.{layer}."
        read = norm(x, f"{own}input_layernorm.weight")
        x = x + read @ state[f"{own}self_attn.v_proj.weight"].T @ state[f"{own}self_attn.o_proj.weight"].T
        read = norm(x, f"{own}post_attention_layernorm.weight")
        gate = functional.silu(read @ state[f"{own}mlp.gate_proj.weight"].T)
        x = x + gate * (read @ state[f"{own}mlp.up_proj.weight"].T) @ state[f"{own}mlp.down_proj.weight"].T
    return norm(x, f"{prefix}norm.weight") @ state["lm_head.weight"].T


@pytest.mark.parametrize("side", ["left", "right"])
def test_everything_but_self_cut_equals_the_closed_form(
    llava: HookedMM, colours: tuple[PairBatch, Groups], side: str
) -> None:
    """In all layers: every position then adds W_O W_V of itself, and nothing of any other."""
    pairs = colours[0]
    batch = llava.prepare(
        [one for one, _ in pairs.pictures], [pair.question for pair in pairs.pairs], padding_side=side
    )
    real = batch.modality != Modality.PAD
    _, cache = llava.run_with_cache(batch, "blocks.0.hook_resid_pre")
    with torch.no_grad():
        logits = llava.run_with_hooks(batch, [knockout(batch, real, real, range(6))])
    assert logits is not None
    expected = each_by_itself(llava, cache["blocks.0.hook_resid_pre"])
    torch.testing.assert_close(logits[real].double(), expected[real], rtol=0, atol=2e-4)


def test_a_cut_is_no_mask_that_silently_does_nothing(llava: HookedMM, colours: tuple[PairBatch, Groups]) -> None:
    """With no text allowed to read the picture, no picture makes a difference; with all but one layer cut, it does."""
    pairs, groups = colours
    image = groups["object"] | groups["other patches"]
    cut = [knockout(pairs.clean, ~image, image, range(6))]
    with torch.no_grad():
        one, other = (llava.run_with_hooks(batch, cut) for batch in (pairs.clean, pairs.corrupt))
        some = [knockout(pairs.clean, ~image, image, [0, 1, 3, 4, 5])]
        seen = [llava.run_with_hooks(batch, some) for batch in (pairs.clean, pairs.corrupt)]
    behind = (pairs.clean.modality == Modality.TEXT)[..., None]
    assert one is not None
    assert other is not None
    assert ((one - other) * behind).abs().max() < 1e-4
    assert ((seen[0] - seen[1]) * behind).abs().max() > 0.1  # type: ignore[operator]


def test_cutting_nothing_changes_nothing(llava: HookedMM, colours: tuple[PairBatch, Groups]) -> None:
    """Positions that are empty, that no query sees, or that are only the query itself."""
    pairs, groups = colours
    base = scores(llava, pairs.clean, pairs.targets)
    none = torch.zeros_like(groups["last"])
    for queries, keys in ((none, groups["object"]), (groups["object"], groups["last"]), (groups["last"],) * 2):
        found = scores(llava, pairs.clean, pairs.targets, [knockout(pairs.clean, queries, keys, range(6))])
        torch.testing.assert_close(found.difference, base.difference, rtol=0, atol=1e-4)
    torch.testing.assert_close(base.difference.float(), pairs.clean_scores, rtol=0, atol=1e-4)


def test_the_answer_needs_the_object_and_nothing_else(llava: HookedMM, colours: tuple[PairBatch, Groups]) -> None:
    """The last row without its patches mostly loses the answer; the rest of the picture may go."""
    pairs, groups = colours
    base = scores(llava, pairs.clean, pairs.targets)
    cuts = [Cut("last", "object"), Cut("last", "other patches")]
    found = knocked_out(llava, pairs.clean, pairs.targets, groups, cuts, ALL_LAYERS)
    lost = found.change(base)[0].mean(1)
    assert lost[0] < -0.5
    assert lost[1].abs() < 0.2
    change = found.change(base, "difference")
    torch.testing.assert_close(change, found.difference - base.difference)
    logits = llava.run_with_hooks(pairs.clean)
    assert logits is not None
    row = logits[torch.arange(3), pairs.targets.row].double().softmax(-1)
    torch.testing.assert_close(base.probability, row.gather(1, pairs.targets.token[:, None])[:, 0], rtol=0, atol=1e-6)


def test_a_samples_change_does_not_depend_on_its_companions(llava: HookedMM, colours: tuple[PairBatch, Groups]) -> None:
    """And one without a group has no number."""
    pairs, groups = colours
    cuts, layers = [Cut("last", "object")], [range(2, 4)]
    whole = knocked_out(llava, pairs.clean, pairs.targets, groups, cuts, layers)
    (alone,) = PairBatches(llava, pairs.pairs[1:2])
    own = knocked_out(llava, alone.clean, alone.targets, pair_groups(llava, alone), cuts, layers)
    torch.testing.assert_close(own.difference[..., 0], whole.difference[..., 1], rtol=0, atol=1e-3)
    none = {**groups, "object": groups["object"].clone()}
    none["object"][0] = False
    found = knocked_out(llava, pairs.clean, pairs.targets, none, cuts, layers)
    assert found.difference.isnan()[0, 0].tolist() == found.probability.isnan()[0, 0].tolist() == [True, False, False]


def test_windows_lie_around_their_layer_and_are_cut_off_at_the_ends() -> None:
    """An odd number around it, an even one with one more before it; as Geva et al. slide them."""
    assert [list(one) for one in windows(4, 3)] == [[0, 1], [0, 1, 2], [1, 2, 3], [2, 3]]
    assert [list(one) for one in windows(3, 2)] == [[0], [0, 1], [1, 2]]
    assert [list(one) for one in windows(6)] == [[layer] for layer in range(6)]
    assert [len(one) for one in windows(48)][10:14] == [10] * 4
    with pytest.raises(BadInputError, match="windows of 7 layers of 6"):
        windows(6, 7)


def test_groups_and_kinds_that_are_not_there_are_refused(llava: HookedMM, colours: tuple[PairBatch, Groups]) -> None:
    """By their names; what is offered is left to what a batch has."""
    pairs, groups = colours
    with pytest.raises(BadInputError, match="there is no group 'image'"):
        knocked_out(llava, pairs.clean, pairs.targets, groups, [Cut("last", "image")], ALL_LAYERS)
    assert "last -> image" not in map(str, known_cuts(groups))
    assert "last -> object" in map(str, known_cuts(groups))
    one = torch.ones(1, dtype=torch.float64)
    with pytest.raises(BadInputError, match="kind='logit'"):
        Scores(one, one).change(Scores(one, one), "logit")  # type: ignore[arg-type]


def test_without_foils_the_difference_is_the_logit(llava: HookedMM, colours: tuple[PairBatch, Groups]) -> None:
    """Of the targets' own tokens."""
    pairs = colours[0]
    own = Targets(pairs.targets.sample, pairs.targets.row, pairs.targets.token)
    logits = llava.run_with_hooks(pairs.clean)
    assert logits is not None
    rows = logits[torch.arange(3), own.row].gather(1, own.token[:, None])[:, 0]
    torch.testing.assert_close(scores(llava, pairs.clean, own).difference.float(), rows, rtol=0, atol=1e-4)
