"""Segmentation by the logit lens: the lens written out in float64, thresholds by brute force, masks that are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from analyses.patch_maps import covers
from analyses.segmentation import (
    Case,
    Setting,
    Threshold,
    best_setting,
    centre_box,
    first_tokens,
    otsu,
    over_layers,
    patch_shares,
    scored,
    word_maps,
    word_probabilities,
)
from hooked_mm.errors import BadInputError, UnknownWordError
from hooked_mm.frames import frame
from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.dataset import picture
from hooked_mm.scenes.draw import render
from hooked_mm.scenes.world import COLOURS, Scene
from hooked_mm.small.probes import untrained_copy

WORDS = tuple(COLOURS)


def by_hand(model: HookedMM, resid: Tensor, ids: Tensor) -> Tensor:
    """softmax(W_U (gain * h / rms(h))), float64."""
    state = model.hf_model.state_dict()
    gain, unembed = state["model.language_model.norm.weight"].double(), state["lm_head.weight"].double()
    wide = resid.double()
    eps = model.hf_model.config.text_config.rms_norm_eps
    return (gain * wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() @ unembed.T).softmax(-1)[..., ids]


def test_probabilities_are_the_lens_written_out(llava: HookedMM) -> None:
    """However many rows are taken at once."""
    resid = 3 * torch.randn(7, 128, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([18, 70, 4])
    expected = by_hand(llava, resid, ids)
    for budget in (1, 200, 10**6):
        found = word_probabilities(llava, resid, ids, budget=budget)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-7)


def test_maps_hold_every_layer_in_the_order_of_the_picture(llava: HookedMM, images: list[Image.Image]) -> None:
    """From the stream that enters the first block to the last, which is normed once and gives the model's own words."""
    ids, _ = first_tokens(llava.tokenizer, WORDS)
    batch = llava.prepare(images[:3], ["what place is this ?", "what colour is the object at the top left ?", "what"])
    found = word_maps(llava, batch, ids)
    assert found.layers == [0, 1, 2, 3, 4, 5, 6]
    logits, cache = llava.run_with_cache(batch, ["blocks.0.hook_resid_pre", "blocks.*.hook_resid_post"])
    assert logits is not None
    image = batch.mask("image")
    torch.testing.assert_close(found.values[image][:, 6], logits[image].softmax(-1)[:, ids], rtol=1e-4, atol=1e-7)
    assert found.values[~image].isnan().all()
    for layer, name in [(0, "blocks.0.hook_resid_pre"), (3, "blocks.2.hook_resid_post")]:
        (grid,) = found.grids(1)
        expected = by_hand(llava, cache[name][1][image[1]], ids).reshape(8, 8, len(ids))
        torch.testing.assert_close(grid[:, :, layer].double(), expected, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found.confidence()[2], found.values[2][image[2]].amax((0, 1)))
    torch.testing.assert_close(found.confidence(3)[2], found.values[2][image[2]][:, 3].amax(0))


def test_several_pictures_and_none(llava: HookedMM, images: list[Image.Image]) -> None:
    """A grid for each; nothing is known of a sample without; a batch without any is refused."""
    ids = torch.tensor([18, 70])
    batch = llava.prepare(
        [[images[0], images[1]], None], ["<image><image> what place is this ?", "what place is this ?"]
    )
    found = word_maps(llava, batch, ids, layers=[2])
    first, second = found.grids(0)
    alone = word_maps(llava, llava.prepare(images[0], "what"), ids, layers=[2])
    torch.testing.assert_close(first, alone.grids(0)[0], rtol=1e-3, atol=1e-6)
    assert first.shape == second.shape == (8, 8, 1, 2)
    assert not torch.allclose(first, second)
    assert found.grids(1) == []
    assert found.confidence()[1].isnan().all()
    with pytest.raises(BadInputError, match="no position of this batch shows an image"):
        word_maps(llava, llava.prepare(None, "what place is this ?"), ids)
    with pytest.raises(BadInputError, match="sample 2 asked"):
        found.grids(2)


def test_grids_are_of_any_shape(images: list[Image.Image], unchecked: None) -> None:
    """Qwen2-VL's follow the picture's."""
    model = HookedMM.small("qwen2_vl")
    wide = next(image for image in images if image.width > image.height)
    found = word_maps(model, model.prepare(wide, "what"), first_tokens(model.tokenizer, WORDS)[0], layers=[-1])
    rows, cols, layers, words = found.grids(0)[0].shape
    assert (layers, words) == (1, len(WORDS))
    assert cols > rows > 1


def test_a_layer_that_was_not_read_is_refused() -> None:
    """With those that were."""
    values = torch.rand(5, 2, 3)
    assert torch.equal(over_layers(values, [0, 4], 4), values[:, 1])
    assert torch.equal(over_layers(values, [0, 4], "max"), values.amax(1))
    with pytest.raises(BadInputError, match=r"layer 1 was not read; there are \[0, 4\]"):
        over_layers(values, [0, 4], 1)


def test_words_are_their_first_tokens(llava: HookedMM) -> None:
    """Unknown ones are refused, as are two that the lens can't tell apart; what is several tokens is listed."""
    tokens = llava.tokenizer
    ids, several = first_tokens(tokens, ["red", "top left"])
    assert tokens.convert_ids_to_tokens(ids.tolist()) == ["red", "top"]
    assert several == ["top left"]
    with pytest.raises(UnknownWordError, match="zebra"):
        first_tokens(tokens, ["zebra"])
    with pytest.raises(BadInputError, match="both begin with the token 'top'"):
        first_tokens(tokens, ["top left", "top right"])


@given(st.integers(0, 10**6), st.integers(2, 30))
def test_otsus_threshold_is_the_best_of_all_cuts(seed: int, count: int) -> None:
    """Within-class variance, which it minimises, tried at every value; ties among values included."""
    values = np.round(np.random.default_rng(seed).standard_normal(count), 1)
    options = np.unique(values)
    if len(options) < 2:
        return

    def inside(cut: float) -> float:
        low, high = values[values <= cut], values[values > cut]
        return float(len(low) * low.var() + len(high) * high.var())

    assert inside(otsu(torch.tensor(values))) == pytest.approx(min(inside(cut) for cut in options[:-1]), abs=1e-9)


def test_thresholds_choose_what_lies_above_them() -> None:
    """Pixels without a value never; of equal ones none."""
    values = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.9, float("nan")]])
    assert Threshold("fixed", 0.3).choose(values).tolist() == [[False] * 3, [True, True, False]]
    assert Threshold("quantile", 0.75).choose(values).tolist() == [[False] * 3, [False, True, False]]
    assert Threshold("otsu").choose(values).tolist() == [[False] * 3, [False, True, False]]
    assert not Threshold("otsu").choose(torch.full((2, 2), 0.4)).any()
    assert not Threshold("otsu").choose(torch.full((2, 2), torch.nan)).any()
    assert [str(t) for t in (Threshold("otsu"), Threshold("quantile", 0.9))] == ["Otsu", "quantile 0.9"]
    with pytest.raises(BadInputError, match=r"no threshold 'quantile' 1\.5"):
        Threshold("quantile", 1.5)


def planted(count: int = 3) -> list[Case]:
    """Maps that know the truth at layer 4 alone, as 0.6 on the object and 0.4 elsewhere."""
    cases = []
    for number in range(count):
        mask = torch.zeros(8, 8, dtype=torch.bool)
        mask[2 * number : 2 * number + 2, 4:6] = True
        grid = torch.rand(8, 8, 2, generator=torch.Generator().manual_seed(number))
        grid[..., 1] = 0.4 + 0.2 * mask
        cases.append(Case(number, "red", grid, (0, 0, 8, 8), mask))
    return cases


def test_the_layer_and_threshold_that_are_right_are_chosen() -> None:
    """Of equally good ones the first; and scored on other pictures."""
    cases = planted()
    setting, value = best_setting(cases, [0, 4], [Threshold("fixed", 0.3), Threshold("fixed", 0.5)])
    assert (setting, value) == (Setting(4, Threshold("fixed", 0.5)), 1.0)
    found = scored(planted(4)[3:], [0, 4], setting, share=4 / 64)
    assert found["IoU"].tolist() == [1.0]
    assert found["pixel AUROC"].tolist() == [1.0]
    # The box in the middle is rows and columns 3 and 4; the object lies in rows 6 and 7, columns 4 and 5.
    assert found["IoU of the centre box"].tolist() == [0.0]
    with pytest.raises(BadInputError, match="no picture with a mask"):
        best_setting([], [0])


def test_masks_in_patches_are_means_over_their_pixels() -> None:
    """A patch outside the picture has nothing; no map of such patches can be better than theirs is."""
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[:2, :3] = True
    case = Case(0, "red", torch.zeros(2, 4, 1), (-2, 0, 6, 4), mask)
    assert patch_shares(case).tolist() == [[0.0, 1.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]]
    found = scored([case], [0], Setting(0, Threshold("otsu")), 0.1)
    # Interpolated, the six pixels have .75, .875, .625 and three quarters of these; the last, .47, is lost.
    assert found["IoU of masks in patches"].tolist() == [pytest.approx(5 / 6)]


@pytest.mark.parametrize("size", [(64, 48), (48, 72), (56, 56)])
def test_the_centre_box_has_the_share_asked_for(size: tuple[int, int]) -> None:
    """In the middle, of the picture's shape; its graded form ranks the pixels by their distance from the middle."""
    box, near = centre_box(size, 0.25)
    width, height = size
    assert box.shape == near.shape == (height, width)
    assert box.double().mean() == pytest.approx(0.25, abs=0.01)
    assert torch.equal(box, box.flip(0))
    assert torch.equal(box, box.flip(1))
    assert near[box].min() > near[~box].max()


def scene_cases(model: HookedMM, scenes: list[Scene]) -> tuple[list[Case], list[int]]:
    """The colours of scenes, at every layer."""
    ids, _ = first_tokens(model.tokenizer, WORDS)
    pictures = [picture(item) for item in scenes]
    found = word_maps(model, model.prepare(pictures, "what"), ids)
    cases = []
    for number, item in enumerate(scenes):
        (grid,) = found.grids(number)
        masks = render(item)[1]
        for word in {thing.colour for thing in item.objects}:
            mask = masks[[thing.colour == word for thing in item.objects]].max(0)
            box = frame(model, pictures[number], (8, 8))
            cases.append(Case(number, word, grid[..., WORDS.index(word)], box, covers(mask)))
    return cases, found.layers


def test_colours_are_found_where_they_are(llava: HookedMM, scenes: list[Scene]) -> None:
    """Far better than a box in the middle; random weights find nothing."""
    trained, untrained = llava, untrained_copy(llava)
    tried = [Threshold("otsu"), Threshold("quantile", 0.9)]
    for model in (trained, untrained):
        cases, layers = scene_cases(model, scenes)
        known, held_out = [[c for c in cases if (c.picture < 8) == first] for first in (True, False)]
        setting, _ = best_setting(known, [layers[-1]], tried)
        found = {name: float(v.mean()) for name, v in scored(held_out, layers, setting, share=0.06).items()}
        if model is trained:
            assert found["IoU"] > 4 * found["IoU of the centre box"]
            assert found["pixel AUROC"] > 0.9 > found["pixel AUROC of the centre box"]
        else:
            assert found["IoU"] < 0.15
            assert abs(found["pixel AUROC"] - 0.5) < 0.15
