"""Writes, stops and generation against raw PyTorch hooks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError, UnknownHookError
from hooked_mm.hooked import HookedMM
from hooked_mm.runner import Hook, match_names
from tests.raw import TABLE, raw_hook

PROMPTS = ["what colour is the circle ?", "describe the scene .", "is there a red square ?", "what place is this ?"]


@pytest.fixture(scope="module")
def batch(llava: HookedMM, images: list[Image.Image]) -> Batch:
    """Four prompts of different lengths, padded on the left."""
    return llava.prepare(images[:4], PROMPTS)


def shift(value: Tensor, hook: Hook | None = None) -> Tensor:
    """A change that keeps values of a sensible size."""
    return value * 0.5 + 0.1


def test_a_write_at_any_point_equals_a_raw_hook(llava: HookedMM, images: list[Image.Image]) -> None:
    """Every listed point can be written; the logits are those of the same change by a PyTorch hook, and not the old."""
    batch = llava.prepare(images[:2], PROMPTS[:2])
    with torch.no_grad():
        plain = llava.hf_model(**batch.inputs).logits
        for name, (_, side, _) in TABLE.items():
            # A raw hook can't write the stream at the input of its second norm, except in place.
            in_place = name.endswith("hook_resid_mid")

            def change(value: Tensor, in_place: bool = in_place) -> Tensor | None:
                if in_place:
                    value.copy_(shift(value))
                    return None
                return shift(value)

            with raw_hook(llava.hf_model, name, change):
                expected = llava.hf_model(**batch.inputs).logits
            got = llava.run_with_hooks(batch, [(name, shift)])
            assert got is not None
            assert torch.equal(got, expected), (name, side)
            assert not torch.equal(got, plain), name


def test_writing_resid_mid_moves_the_stream_and_not_only_the_mlp(llava: HookedMM, batch: Batch) -> None:
    """resid_post is what was written at resid_mid plus the MLP's output of it."""
    new = torch.randn(4, batch.input_ids.shape[1], 128, generator=torch.Generator().manual_seed(0))
    with llava.hooks([("blocks.2.hook_resid_mid", lambda value, hook: new)]):
        _, cache = llava.run_with_cache(batch, "blocks.2.*")
    assert torch.equal(cache["blocks.2.hook_resid_mid"], new)
    assert torch.equal(cache["blocks.2.hook_resid_post"], new + cache["blocks.2.hook_mlp_out"])


@given(
    layer=st.integers(0, 5), sample=st.integers(0, 3), point=st.sampled_from(["resid_pre", "resid_mid", "resid_post"])
)
def test_a_write_at_image_positions_changes_nothing_before_them(
    llava: HookedMM, batch: Batch, layer: int, sample: int, point: str
) -> None:
    """Causality: activations and logits of earlier positions, and of other samples, stay bit-equal."""
    image = batch.mask(modality="image", sample=sample)
    first = int(image[sample].nonzero()[0])

    def change(value: Tensor, hook: Hook) -> Tensor:
        return torch.where(image[..., None], value + 3, value)

    plain, before = llava.run_with_cache(batch, "blocks.*.hook_resid_post")
    with llava.hooks([(f"blocks.{layer}.hook_{point}", change)]):
        logits, after = llava.run_with_cache(batch, "blocks.*.hook_resid_post")
    assert plain is not None
    assert logits is not None
    others = [row for row in range(4) if row != sample]
    for old, new in [*((before[name], after[name]) for name in before), (plain, logits)]:
        assert torch.equal(old[sample, :first], new[sample, :first])
        assert torch.equal(old[others], new[others])
    if layer < 5:
        assert not torch.equal(plain[sample, -1], logits[sample, -1])


def test_hooks_run_in_order_and_see_each_others_writes(llava: HookedMM, batch: Batch) -> None:
    """Two functions at one point: the second gets what the first returned; the cache holds the last."""
    seen: list[Tensor] = []

    def look(value: Tensor, hook: Hook) -> None:
        seen.append(value.clone())

    name = "blocks.1.hook_resid_post"
    _, plain = llava.run_with_cache(batch, name)
    with llava.hooks([(name, shift), (name, look), (name, shift)]):
        _, cache = llava.run_with_cache(batch, [name, "blocks.2.hook_resid_pre"])
    assert torch.equal(seen[0], shift(plain[name]))
    assert torch.equal(cache[name], shift(shift(plain[name])))
    assert torch.equal(cache["blocks.2.hook_resid_pre"], cache[name])


def test_two_names_of_one_place_see_each_others_writes(llava: HookedMM, batch: Batch) -> None:
    """hook_embed and the first block's resid_pre are one value: the second write starts from the first, both count."""
    names = ["hook_embed", "blocks.0.hook_resid_pre", "blocks.0.hook_attn_out", "blocks.0.hook_resid_mid"]
    _, plain = llava.run_with_cache(batch, "hook_embed")
    with llava.hooks([(names[0], lambda value, hook: value + 1), (names[1], lambda value, hook: value * 2)]):
        _, cache = llava.run_with_cache(batch, names)
    assert torch.equal(cache[names[0]], plain["hook_embed"] + 1)
    assert torch.equal(cache[names[1]], (plain["hook_embed"] + 1) * 2)
    assert torch.equal(cache[names[3]], cache[names[1]] + cache[names[2]])


def test_a_later_write_in_place_does_not_reach_saved_values(llava: HookedMM, batch: Batch) -> None:
    """resid_post[1] and resid_pre[2] are one tensor; writing into the second leaves the first as it was read."""
    _, plain = llava.run_with_cache(batch, "blocks.1.hook_resid_post")

    def destroy(value: Tensor, hook: Hook) -> None:
        value.zero_()

    with llava.hooks([("blocks.2.hook_resid_pre", destroy)]):
        _, cache = llava.run_with_cache(batch, ["blocks.1.hook_resid_post", "blocks.2.hook_resid_pre"])
    assert torch.equal(cache["blocks.1.hook_resid_post"], plain["blocks.1.hook_resid_post"])
    assert not cache["blocks.2.hook_resid_pre"].any()


def test_a_hook_is_told_where_it_is(llava: HookedMM, batch: Batch) -> None:
    """Name, layer, step and batch reach the function."""
    told: list[Hook] = []
    llava.run_with_hooks(batch, [("blocks.[13].hook_mlp_out", lambda value, hook: told.append(hook))])
    assert [(hook.name, hook.layer, hook.step) for hook in told] == [
        ("blocks.1.hook_mlp_out", 1, 0),
        ("blocks.3.hook_mlp_out", 3, 0),
    ]
    assert told[0].batch is batch


def test_a_wrong_shape_is_refused_and_leaves_nothing_behind(llava: HookedMM, batch: Batch) -> None:
    """The error names the point and both shapes; the next run is as before."""
    plain = llava.run_with_hooks(batch)
    with pytest.raises(BadInputError, match=r"blocks\.0\.hook_resid_post.*returned \(1, 2\).*shape \(4, \d+, 128\)"):
        llava.run_with_hooks(batch, [("blocks.0.hook_resid_post", lambda value, hook: torch.zeros(1, 2))])
    with pytest.raises(ZeroDivisionError), llava.hooks([("blocks.0.hook_mlp_out", lambda value, hook: 1 / 0)]):
        llava.generate(batch, 3)
    again = llava.run_with_hooks(batch)
    assert plain is not None
    assert again is not None
    assert torch.equal(plain, again)


@pytest.mark.parametrize("layer", [0, 1, 3, 5, 6, -1, -6])
def test_stop_at_layer_runs_nothing_after_it(llava: HookedMM, batch: Batch, layer: int) -> None:
    """Blocks from the stop on do not run; what was read before is bit-equal to a full run; logits are None."""
    ran: list[int] = []
    handles = [
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
        for index, block in enumerate(llava.hf_model.model.language_model.layers)
    ]
    try:
        logits, cache = llava.run_with_cache(batch, stop_at_layer=layer)
    finally:
        for handle in handles:
            handle.remove()
    stop = layer % 6 if layer < 0 else layer
    assert logits is None
    assert ran == list(range(stop))
    _, full = llava.run_with_cache(batch)
    expected = [name for name in full if name.startswith(("vision.", "projector.", "hook_embed"))]
    expected += [name for name in full if name.startswith("blocks.") and int(name.split(".")[1]) < stop]
    assert set(cache) == set(expected)
    assert all(torch.equal(cache[name], full[name]) for name in cache)


def test_what_lies_behind_the_stop_is_refused(llava: HookedMM, batch: Batch) -> None:
    """A name asked for that will not be reached is an error, as is a layer that does not exist."""
    with pytest.raises(BadInputError, match=r"blocks\.3\.hook_resid_post.*not reached"):
        llava.run_with_cache(batch, ["blocks.1.hook_resid_post", "blocks.3.hook_resid_post"], stop_at_layer=2)
    with pytest.raises(BadInputError, match="stop_at_layer=9 is outside this model's 6 layers"):
        llava.run_with_cache(batch, stop_at_layer=9)


def test_names_filters(llava: HookedMM) -> None:
    """A name, a glob, a list and a callable; matches come in execution order; nothing matched is an error."""
    names = llava.hook_names
    assert match_names(None, names) == names
    assert match_names("blocks.3.hook_resid_post", names) == ["blocks.3.hook_resid_post"]
    assert match_names(["hook_logits", "blocks.*.hook_resid_mid"], names)[-1] == "hook_logits"
    assert len(match_names("blocks.*.hook_resid_mid", names)) == 6
    assert len(match_names("*blocks.*.hook_resid_mid", names)) == 10
    assert match_names(lambda name: name.startswith("projector"), names) == ["projector.hook_in", "projector.hook_out"]
    with pytest.raises(UnknownHookError, match=r"blocks\.3\.hook_resid_posts.*nearest: blocks\.3\.hook_resid_post"):
        match_names("blocks.3.hook_resid_posts", names)


def test_tower_points_need_images(llava: HookedMM) -> None:
    """Without a picture the tower does not run: its points are left out, or refused when asked for by name."""
    batch = llava.prepare(None, ["what place is this ?"])
    _, cache = llava.run_with_cache(batch)
    assert not any(name.startswith(("vision.", "projector.")) for name in cache)
    with pytest.raises(BadInputError, match=r"projector\.hook_out.*no images"):
        llava.run_with_cache(batch, "projector.hook_out")


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 0}])
@pytest.mark.parametrize("name", ["blocks.3.hook_resid_post", "blocks.2.attn.hook_z", "projector.hook_out"])
def test_generation_with_a_write_equals_raw_hooks(llava: HookedMM, batch: Batch, options: dict, name: str) -> None:
    """Token for token, batched with left padding and KV cache, in every step: greedy, beams, seeded sampling."""

    def push(value: Tensor, hook: Hook | None = None) -> Tensor:
        return -9 * value

    settings = {"max_new_tokens": 12, "do_sample": False, **options}
    inputs = {key: value for key, value in batch.inputs.items() if key != "position_ids"}
    torch.manual_seed(0)
    plain = llava.hf_model.generate(**inputs, **settings)
    torch.manual_seed(0)
    with raw_hook(llava.hf_model, name, push):
        expected = llava.hf_model.generate(**inputs, **settings)
    torch.manual_seed(0)
    with llava.hooks([(name, push)]):
        got = llava.generate(batch, **settings)
    assert torch.equal(got.tokens, expected[:, batch.input_ids.shape[1] :])
    assert not torch.equal(plain, expected)


def test_every_step_of_a_generation_is_seen(llava: HookedMM, batch: Batch) -> None:
    """Step 0 has all prompt positions, later ones a single one, until the longest answer ends; no step is lost."""
    steps: list[tuple[int, int]] = []
    tower: list[int] = []
    watch = [
        ("blocks.0.hook_resid_post", lambda value, hook: steps.append((hook.step, value.shape[1]))),
        ("projector.hook_out", lambda value, hook: tower.append(hook.step)),
    ]
    with llava.hooks(watch):
        out = llava.generate(batch, 40)
    assert steps == [(0, batch.input_ids.shape[1]), *[(step, 1) for step in range(1, out.tokens.shape[1])]]
    assert tower == [0]


def test_an_aborted_trace_leaves_gradients_and_weights_alone(llava: HookedMM, batch: Batch) -> None:
    """The wrapped model's weights are bit-equal after writes, stops and generations."""
    before = {name: value.clone() for name, value in llava.hf_model.state_dict().items()}
    llava.run_with_cache(batch, stop_at_layer=2)
    with llava.hooks([("*", lambda value, hook: value * 0)]):
        llava.generate(batch, 2)
    after = llava.hf_model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize(
    "point", ["attn.hook_pattern", "ln1.hook_normalized", "attn.hook_result", "attn.hook_rot_q", "hook_resid_mid"]
)
def test_a_value_changed_in_place_counts_as_written(llava: HookedMM, batch: Batch, point: str) -> None:
    """Also where what the function sees is made from the model's value: as if it had been returned."""

    def destroy(value: Tensor, hook: Hook) -> None:
        value.zero_()

    name = f"blocks.2.{point}"
    expected = llava.run_with_hooks(batch, [(name, lambda value, hook: torch.zeros_like(value))])
    got = llava.run_with_hooks(batch, [(name, destroy)])
    plain = llava.run_with_hooks(batch)
    assert got is not None
    assert expected is not None
    assert plain is not None
    assert torch.equal(got, expected)
    assert not torch.equal(got, plain)
