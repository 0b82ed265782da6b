"""Relevancy through connector and tower against Chefer's rules by hand, with attention that PyTorch alone gives."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText

from analyses.relevancy import relevancies
from analyses.targets import Targets, answer_targets
from analyses.tower_relevancy import end_to_end, spread
from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.small import small_model_path
from hooked_mm.testing.miniatures import known, miniature, miniature_inputs
from tests.chefer_by_hand import Attentions, EagerCalls, mixed, normalise, self_attended

ASKED, SAID = ["what place is this ?", "what colour is the object at the top left ?"], ["city", "red"]
MODELING = "transformers.models.qwen2_vl.modeling_qwen2_vl.eager_attention_forward"


@cache
def wide(name: str) -> HookedMM:
    return HookedMM.small(name, dtype="float64", check=False)


@cache
def eager(name: str) -> Any:
    """The same weights as transformers loads them, with attention that gives its weights back."""
    return AutoModelForImageTextToText.from_pretrained(
        small_model_path(name), dtype=torch.float64, attn_implementation="eager"
    ).eval()


def two(name: str, images: list[Image.Image]) -> Batch:
    """A sample with padding, and one without."""
    return wide(name).prepare(images[:2], ASKED, answers=SAID)


def of_second(name: str, images: list[Image.Image]) -> tuple[dict[str, Tensor], int, int]:
    """The second sample by itself, with row and token of its target: of padding transformers makes NaN in float64."""
    alone = wide(name).prepare(images[1], ASKED[1], answers=SAID[1:])
    targets = answer_targets(alone)
    return alone.inputs, int(targets.row[0]), int(targets.token[0])


def text_row(layers: list[Any], row: int) -> Tensor:
    found = double(normalise(self_attended(layers))[row])
    found[row] -= 1
    return found


def double(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def paths(stem: str, count: int) -> list[str]:
    return [f"{stem}.{number}.self_attn" for number in range(count)]


@pytest.mark.parametrize("used", [-2, pytest.param(-1, marks=pytest.mark.slow)])
def test_a_tower_of_crops_with_class_tokens(
    used: int, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """LLaVA: R_llm[t, img] R^_vit, tokens and patches one to one; layers behind the features' have no part."""
    model = eager("llava")
    for config in (model.config, wide("llava").hf_model.config):
        monkeypatch.setattr(config, "vision_feature_layer", used)
    batch = two("llava", images)
    inputs, row, token = of_second("llava", images)
    text = paths("model.language_model.layers", 6)
    tower = [path for path, _ in model.named_modules() if "vision_tower" in path and path.endswith("self_attn")]
    with Attentions(model, [*text, *tower]) as attentions:
        model(**inputs).logits[0, row, token].backward()
        assert (attentions.kept[tower[-1]].grad is None) == (used == -2)
        own = text_row([attentions.weighed(path, 0) for path in text], row)
        layers = [attentions.weighed(path, 0) for path in tower]
    through = double(normalise(self_attended(layers[: 5 + used])))
    tokens = own[(inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]]
    expected = torch.cat([double([0]), tokens]) @ through
    found = end_to_end(wide("llava"), batch, answer_targets(batch))
    torch.testing.assert_close(found.sheets[0, 1], expected[1:], rtol=1e-5, atol=1e-10)
    # The tower alone: what goes into all of its tokens, each counting as much; the text's relevancy stays what it is.
    even = end_to_end(wide("llava"), batch, answer_targets(batch), start="even")
    torch.testing.assert_close(even.sheets[0, 1], through[1:, 1:].mean(0), rtol=1e-5, atol=1e-10)
    assert torch.equal(even.text.positions, found.text.positions)
    # On the left, where it does not belong, the tower gives other numbers.
    other = through @ torch.cat([double([0]), tokens])
    assert (other - expected).abs().sum() > 0.1 * expected.sum()


def test_a_packed_tower_whose_patches_are_merged_by_four(
    images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen2-VL: patches 4 i to 4 i + 3 make token i of their image."""
    batch = two("qwen2_vl", images)
    inputs, row, token = of_second("qwen2_vl", images)
    model = eager("qwen2_vl")
    calls = EagerCalls(monkeypatch, MODELING)
    model(**inputs).logits[0, row, token].backward()
    text = [calls.weighed(layer.self_attn).tolist() for layer in model.model.language_model.layers]
    through = mixed([calls.weighed(block.attn) for block in model.model.visual.blocks])
    own = text_row(text, row)
    tokens = own[(inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]]
    expected = tokens.repeat_interleave(4) / 4 @ through
    found = end_to_end(wide("qwen2_vl"), batch, answer_targets(batch))
    torch.testing.assert_close(found.sheets[0, 0, -len(expected) :], expected, rtol=1e-5, atol=1e-10)
    even = end_to_end(wide("qwen2_vl"), batch, answer_targets(batch), start="even").sheets[0, 0, -len(expected) :]
    torch.testing.assert_close(even, through.mean(0), rtol=1e-5, atol=1e-10)


def test_a_resampler_by_the_rules_on_its_own_attention(images: list[Image.Image]) -> None:
    """Idefics2: latents read patches and latents; R <- R + Abar_patches + Abar_latents R, rows made shares."""
    batch = two("idefics2", images)
    inputs, row, token = of_second("idefics2", images)
    model = eager("idefics2")
    text, tower = paths("model.text_model.layers", 6), paths("model.vision_model.encoder.layers", 4)
    perceiver = paths(
        "model.connector.perceiver_resampler.layers", len(model.model.connector.perceiver_resampler.layers)
    )
    with Attentions(model, [*text, *tower, *perceiver]) as attentions:
        model(**inputs).logits[0, row, token].backward()
        own = text_row([attentions.weighed(path, 0) for path in text], row)
        through = double(normalise(self_attended([attentions.weighed(path, 0) for path in tower])))
        steps = [attentions.weighed(path, 0) for path in perceiver]
    patches, latents = len(through), len(steps[0])
    read = [[0.0] * patches for _ in range(latents)]
    for step in steps:
        read = [
            [
                read[i][p] + step[i][p] + sum(step[i][patches + j] * read[j][p] for j in range(latents))
                for p in range(patches)
            ]
            for i in range(latents)
        ]
    connector = double([[value / sum(line) for value in line] for line in read])
    tokens = own[(inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]]
    expected = tokens @ connector @ through
    found = end_to_end(wide("idefics2"), batch, answer_targets(batch))
    (over,) = found.maps(wide("idefics2"), batch, 1, images[1:2])
    torch.testing.assert_close(over.values.flatten(), expected, rtol=1e-5, atol=1e-10)
    torch.testing.assert_close(found.sheets[0, 1].sum(), expected.sum())


def test_a_tower_that_text_reads_by_cross_attention(unchecked: None) -> None:
    """Mllama: keys are the tower's places, class tokens among them, without what fills its tiles up."""
    plain = miniature("mllama").double()
    model = HookedMM(plain, check=False)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in miniature_inputs(plain).items()}
    batch = model._batch(inputs)
    last = batch.modality.shape[1] - 1
    targets = Targets(torch.tensor([2]), torch.tensor([last]), torch.tensor([7]))
    found = end_to_end(model, batch, targets)
    plain.set_attn_implementation("eager")
    plain.requires_grad_(True)
    tower = [path for path, _ in plain.named_modules() if "vision" in path and path.endswith(".self_attn")]
    with Attentions(plain, tower) as attentions:
        plain(**inputs).logits[2, last, 7].backward()
        through = mixed([double(attentions.weighed(path, 2)) for path in tower])
    assert found.text.keys is not None
    tiles = found.text.keys[0].reshape(4, 17)
    row = torch.zeros(4, 24, dtype=torch.float64)
    row[:, :17] = tiles
    expected = (row.flatten() @ through).reshape(4, 24)[:, 1:17].flatten()
    torch.testing.assert_close(found.sheets[0, 2], expected, rtol=1e-5, atol=1e-14)


@pytest.mark.parametrize("name", ["llava", "idefics2", "qwen2_vl", "molmo"])
def test_neither_companions_nor_padding_change_what_reaches_the_patches(name: str, images: list[Image.Image]) -> None:
    """Every kind of connector, two pictures of different shapes; of several targets each has its own."""
    model = wide(name)
    asked, said = [ASKED[1], ASKED[0], ASKED[0]], ["a red star", "city", "city"]
    batch = model.prepare(images[:3], asked, answers=said, padding_side="right" if name == "llava" else "left")
    targets = answer_targets(batch)
    together = end_to_end(model, batch, targets)
    assert together.round_of.tolist() == [0, 1, 2, 0, 0]
    for sample in (0, 1) if name in ("llava", "idefics2") else (0,):
        alone = model.prepare(images[sample], asked[sample], answers=[said[sample]])
        found = end_to_end(model, alone, answer_targets(alone))
        own = (targets.sample == sample).nonzero()[:, 0].tolist()
        for here, there in enumerate(own):
            mine = together.maps(model, batch, there, [images[sample]])
            for one, other in zip(mine, found.maps(model, alone, here, [images[sample]]), strict=True):
                torch.testing.assert_close(one.values, other.values, rtol=1e-6, atol=1e-10, equal_nan=True)
                assert one.box == other.box
                assert float(one.values.nan_to_num().sum()) > 0
    if name == "qwen2_vl":
        text = relevancies(model, batch, targets)
        torch.testing.assert_close(together.text.positions, text.positions, rtol=1e-7, atol=1e-12)
    if name == "llava":
        whole = end_to_end(model, batch, targets, normalise=False)
        assert not torch.allclose(whole.sheets, together.sheets)


def test_several_pictures_of_a_sample_have_a_map_each_on_their_own_patches(images: list[Image.Image]) -> None:
    """Beside a sample of one; what a picture's tokens are given stays within its own rows of the tower."""
    model = wide("llava")
    batch = model.prepare([images[:2], images[2:3]], [f"<image> <image> {ASKED[0]}", ASKED[0]], answers=SAID)
    targets = answer_targets(batch)
    found = end_to_end(model, batch, targets)
    first, second = found.maps(model, batch, 0, images[:2])
    assert (first.picture, second.picture) == (0, 1)
    tokens = [found.text.positions[0, batch.image_index[0] == image].sum() for image in range(2)]
    rows = found.sheets[0].sum(1)
    for own, row, given in zip((first, second), rows, tokens, strict=False):
        torch.testing.assert_close(own.values.double().sum(), row.double())
        # A row of R^ sums to 2, of which class tokens have their part.
        assert given < row <= 2 * given + 1e-9
    (third,) = found.maps(model, batch, 1, images[2:3])
    torch.testing.assert_close(third.values.double().sum(), rows[2].double())


def test_values_are_spread_over_places_of_the_same_patches() -> None:
    here, there = torch.tensor([-1, 0, 1, -1, 2, 3]), torch.tensor([-1, 0, 1, -2, -1, 2, 3, -2])
    sheet = torch.tensor([[5.0, 1, 2, 6, 3, 4]])
    assert spread(sheet, here, there).tolist() == [[5, 1, 2, 0, 6, 3, 4, 0]]
    assert spread(spread(sheet, here, there), there, torch.arange(4)).tolist() == [[1, 2, 3, 4]]
    assert spread(torch.tensor([[1.0, 2]]), torch.tensor([1, 0]), torch.arange(2)).tolist() == [[2, 1]]


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("got_ocr2", "attends within 12 groups of 25 places"),
        ("molmo2", "is not known: how this model's image positions lie"),
        ("florence2", "mixes them without attention"),
        ("chameleon", "this model has no tower"),
    ],
)
def test_towers_without_a_rule_are_refused(family: str, why: str, unchecked: None) -> None:
    if family not in known((family,)):
        pytest.skip(f"this version of transformers has no {family}")
    plain = miniature(family)
    model = HookedMM(plain, check=False)
    batch = model._batch(miniature_inputs(plain))
    with pytest.raises(BadInputError, match=why):
        end_to_end(model, batch, Targets(torch.tensor([0]), torch.tensor([1]), torch.tensor([3])))


def test_a_batch_without_images_is_refused(llava: HookedMM, images: list[Image.Image]) -> None:
    bare = llava.prepare(None, ASKED, answers=SAID)
    with pytest.raises(BadInputError, match="no images"):
        end_to_end(llava, bare, answer_targets(bare))
    batch = llava.prepare(images[:2], ASKED, answers=SAID)
    found = end_to_end(llava, batch, answer_targets(batch))
    with pytest.raises(BadInputError, match="2 pictures were given for a sample of 1"):
        found.maps(llava, batch, 0, images[:2])
