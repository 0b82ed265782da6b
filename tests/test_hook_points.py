"""Every point of the list against raw PyTorch hooks, and what each name means."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import Tensor

from hooked_mm.batch import Batch
from hooked_mm.hooked import HookedMM
from tests.raw import TABLE, raw_values


@pytest.fixture(scope="module")
def batch(llava: HookedMM, images: list[Image.Image]) -> Batch:
    """Three prompts of different lengths, one with two images, one without."""
    pictures = [images[0], images[1:3], None]
    return llava.prepare(pictures, ["what colour is the circle ?", "describe the scene .", "what place is this ?"])


@pytest.fixture(scope="module")
def ours(llava: HookedMM, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """All points read in one run."""
    logits, cache = llava.run_with_cache(batch)
    assert logits is not None
    return logits, dict(cache)


@pytest.fixture(scope="module")
def raw(llava: HookedMM, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The same by PyTorch's hooks."""
    return raw_values(llava.hf_model, batch.inputs)


DERIVED = ("hook_scale", "hook_normalized", "hook_rot_q", "hook_rot_k", "hook_pattern", "hook_result")


def test_every_listed_point_is_in_the_reference(llava: HookedMM) -> None:
    """The hand-written table names every point that is a module's own value; the derived are checked by formula."""
    assert {name for name in llava.hook_names if not name.endswith(DERIVED)} == set(TABLE)


def test_listed_points_fire_and_equal_raw_hooks_bit_for_bit(
    ours: tuple[Tensor, dict[str, Tensor]], raw: tuple[Tensor, dict[str, Tensor]]
) -> None:
    """Reading 142 points at once gives what a raw hook reads one at a time."""
    assert list(ours[1])
    assert set(ours[1]) >= set(raw[1])
    different = [name for name, value in raw[1].items() if not torch.equal(value, ours[1][name])]
    assert not different


def test_reading_changes_no_logit(
    ours: tuple[Tensor, dict[str, Tensor]], raw: tuple[Tensor, dict[str, Tensor]]
) -> None:
    """Logits with everything read are bit-equal to the bare model's."""
    assert torch.equal(ours[0], raw[0])


def test_names_are_in_execution_order(llava: HookedMM, batch: Batch) -> None:
    """The order of `hook_names` is the order in which PyTorch sees the modules run."""
    seen: list[str] = []
    handles = []
    for name, (path, side, _) in TABLE.items():
        module = llava.hf_model.get_submodule(path)

        def note(*_: object, name: str = name) -> None:
            seen.append(name)

        if side == "input":
            handles.append(module.register_forward_pre_hook(note))
        else:
            handles.append(module.register_forward_hook(note))
    try:
        with torch.no_grad():
            llava.hf_model(**batch.inputs)
    finally:
        for handle in handles:
            handle.remove()
    # hook_embed and the first block's resid_pre are one place, as are a tower's.
    once = [name for name in seen if name not in ("hook_embed", "vision.hook_embed")]
    listed = [name for name in llava.hook_names if name in TABLE and not name.endswith("hook_embed")]
    assert once == listed


@pytest.mark.parametrize(("prefix", "layers"), [("", 6), ("vision.", 4)])
def test_residual_stream_adds_up(ours: tuple[Tensor, dict[str, Tensor]], prefix: str, layers: int) -> None:
    """resid_pre + attn_out = resid_mid, resid_mid + mlp_out = resid_post, resid_post[l] = resid_pre[l+1]."""
    values = ours[1]
    for layer in range(layers):
        name = f"{prefix}blocks.{layer}.hook_"
        assert torch.equal(values[name + "resid_pre"] + values[name + "attn_out"], values[name + "resid_mid"])
        assert torch.equal(values[name + "resid_mid"] + values[name + "mlp_out"], values[name + "resid_post"])
        if layer:
            before = values[f"{prefix}blocks.{layer - 1}.hook_resid_post"]
            assert torch.equal(before, values[name + "resid_pre"])
    assert torch.equal(values[f"{prefix}hook_embed"], values[f"{prefix}blocks.0.hook_resid_pre"])


def test_unembedding_the_last_residual_gives_the_logits(
    llava: HookedMM, ours: tuple[Tensor, dict[str, Tensor]]
) -> None:
    """unembed(norm(resid_post[-1])) = logits, by a hand-written RMS norm in float64 too."""
    last = ours[1]["blocks.5.hook_resid_post"]
    assert torch.equal(llava.to_logits(last), ours[0])
    state = llava.hf_model.state_dict()
    wide = last.double()
    normed = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state["model.language_model.norm.weight"]
    by_hand = normed @ state["lm_head.weight"].double().T
    torch.testing.assert_close(ours[0].double(), by_hand, rtol=1e-5, atol=1e-4)


def test_image_positions_hold_the_projector_output(batch: Batch, ours: tuple[Tensor, dict[str, Tensor]]) -> None:
    """hook_embed at image positions is projector.hook_out, in order; elsewhere the tokens' embeddings."""
    image = batch.mask(modality="image")
    assert torch.equal(ours[1]["hook_embed"][image], ours[1]["projector.hook_out"].flatten(0, 1))


def test_tokens_keep_their_own_embeddings(
    llava: HookedMM, batch: Batch, ours: tuple[Tensor, dict[str, Tensor]]
) -> None:
    """hook_embed at text positions is the embedding of the token there."""
    text = batch.mask(modality="text")
    weight = llava.hf_model.get_input_embeddings().weight
    assert torch.equal(ours[1]["hook_embed"][text], weight[batch.input_ids[text]])


def test_changing_the_picture_changes_image_positions_only(llava: HookedMM, images: list[Image.Image]) -> None:
    """Other pixels change hook_embed at every position called image, and nowhere else."""
    one = llava.prepare([images[0]], ["what place is this ?"])
    two = llava.prepare([images[5]], ["what place is this ?"])
    values = [llava.run_with_cache(b, "hook_embed")[1]["hook_embed"] for b in (one, two)]
    changed = (values[0] != values[1]).any(-1)
    assert torch.equal(changed, one.mask(modality="image"))
