"""The rows that graphs are learned from, against whole patterns."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from analyses.attention_graphs import head_rows, node_masks
from analyses.causal_explanation import tiers_of
from analyses.targets import Targets, answer_targets
from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError, UnsupportedModelError
from hooked_mm.hooked import HookedMM
from hooked_mm.testing.miniatures import miniature, miniature_inputs

QUESTIONS = ["what colour is the star ?", "how many objects are there ?", "star ?"]


@pytest.fixture(scope="module")
def answered(llava: HookedMM, images: list[Image.Image]) -> Batch:
    """Three questions of different lengths with answers of two words."""
    return llava.prepare(images[:3], QUESTIONS, answers=["red star", "two", "blue"])


@pytest.mark.parametrize("layer", [None, 2, -4])
def test_rows_are_those_of_the_whole_pattern(llava: HookedMM, answered: Batch, layer: int | None) -> None:
    """Of the rows that predict, not of the tokens themselves; all keys; heads by their mass on the picture."""
    targets = answer_targets(answered)
    number = 5 if layer is None else layer % 6
    _, cache = llava.run_with_cache(answered, f"blocks.{number}.attn.hook_pattern")
    pattern = cache[f"blocks.{number}.attn.hook_pattern"].double()
    found = head_rows(llava, answered, targets, layer, 3)
    assert [one.target for one in found] == [place for place in range(len(targets)) for _ in range(3)]
    image = answered.mask(modality="image")
    for one in found:
        sample, row = int(targets.sample[one.target]), int(targets.row[one.target])
        whole = pattern[sample, one.head]
        assert one.layer == number
        assert one.nodes.positions[-1] == row
        torch.testing.assert_close(one.rows, whole[list(one.nodes.positions)], atol=1e-5, rtol=0)
        torch.testing.assert_close(
            torch.tensor(one.nodes.weights).double(), whole[row, list(one.nodes.positions)], atol=1e-5, rtol=0
        )
        assert one.image_mass == pytest.approx(float(whole[row, image[sample]].sum()), abs=1e-5)
        for place in one.nodes.positions[:-1]:
            assert whole[row, place] > 0.005
        assert tiers_of(one.rows[:, list(one.nodes.positions)]) == list(range(len(one.nodes)))
    masses = pattern[targets.sample, :, targets.row].mul(image[targets.sample][:, None]).sum(2)
    best = masses.topk(3, dim=1).indices
    assert [[one.head for one in found if one.target == place] for place in range(len(targets))] == best.tolist()


def test_text_in_front_of_the_picture_is_no_node(llava: HookedMM, answered: Batch) -> None:
    """Image tokens, and what stands behind the first of them."""
    images, text = node_masks(answered)
    for sample in range(3):
        first = int(answered.mask(modality="image")[sample].nonzero()[0])
        assert not bool(text[sample, : first + 1].any())
        assert not bool((text[sample] & images[sample]).any())
        behind = answered.mask(modality="text")[sample]
        behind[:first] = False
        assert torch.equal(text[sample], behind)


def test_neither_padding_nor_company_matters(llava: HookedMM, images: list[Image.Image]) -> None:
    """The same nodes, counted from the sample's first token, and the same rows without padding."""
    told = []
    for batch in (
        llava.prepare(images[:1], QUESTIONS[:1], answers=["red"]),
        llava.prepare(images[:2], QUESTIONS[:2], answers=["red", "two"]),
        llava.prepare(images[:2], QUESTIONS[:2], answers=["red", "two"], padding_side="right"),
    ):
        one = head_rows(llava, batch, answer_targets(batch, "first"), None, [1])[0]
        real = batch.inputs["attention_mask"][0].bool()
        start = int(real.nonzero()[0])
        told.append(([place - start for place in one.nodes.positions], one.rows[:, real]))
    for places, rows in told[1:]:
        assert places == told[0][0]
        torch.testing.assert_close(rows, told[0][1], atol=1e-5, rtol=0)


def test_heads_and_thresholds_are_those_asked(llava: HookedMM, answered: Batch) -> None:
    """By number, in their order; the threshold decides on nodes."""
    targets = answer_targets(answered, "first")
    found = head_rows(llava, answered, targets, None, [3, 0], threshold=0.05, most_images=4)
    assert [one.head for one in found] == [3, 0] * 3
    assert all(sum(one.nodes.image) <= 4 for one in found)
    assert all(weight > 0.05 for one in found for weight in one.nodes.weights[:-1])
    for heads in ([], [4], 0, 5, [-1]):
        with pytest.raises(BadInputError, match="heads="):
            head_rows(llava, answered, targets, None, heads)
    with pytest.raises(BadInputError, match="layer=6"):
        head_rows(llava, answered, targets, 6)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("family", ["gemma3", "qwen2_vl", "molmo"])
def test_other_families(family: str) -> None:
    """Image tokens that see each other are of one tier, all others follow each other."""
    made = miniature(family)
    model, inputs = HookedMM(made), miniature_inputs(made, family=family)
    batch = model._batch(inputs)
    rows = torch.tensor([int(own.nonzero()[-1]) for own in batch.mask()])
    targets = Targets(torch.arange(len(batch)), rows, torch.zeros(len(batch), dtype=torch.long))
    for one in head_rows(model, batch, targets, None, 1, threshold=1e-6):
        tiers = tiers_of(one.rows[:, list(one.nodes.positions)])
        images = [tier for tier, image in zip(tiers, one.nodes.image, strict=True) if image]
        assert len(images) > 1
        texts = [tier for tier, image in zip(tiers, one.nodes.image, strict=True) if not image]
        assert len(set(texts)) == len(texts)
        assert (len(set(images)) == 1) == (family == "gemma3")


@pytest.mark.usefixtures("unchecked")
def test_families_whose_rows_do_not_hold_both() -> None:
    """Encoder-decoders, and text that reads pictures by cross-attention."""
    for family, why in (("florence2", "encoder-decoder"), ("mllama", "cross-attention")):
        made = miniature(family)
        model = HookedMM(made)
        batch = model._batch(miniature_inputs(made, family=family))
        targets = Targets(*(torch.tensor([value]) for value in (0, 1, 0)))
        with pytest.raises(UnsupportedModelError, match=why):
            head_rows(model, batch, targets)
