"""Attention of answers, against what transformers returns while it generates; LVLM-Interpret's faults."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import Tensor

from analyses.attention_views import (
    AnswerAttention,
    answer_attention,
    choose_heads,
    clicked_columns,
    column_mean,
    column_share,
    head_maps,
    rows_by_sample,
    seen_through,
    strongest,
)
from analyses.targets import Targets, answer_targets
from hooked_mm import attention
from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError, UnknownHookError
from hooked_mm.hooked import HookedMM
from hooked_mm.small import small_model_path
from tests.processors import processor
from tests.tiny import tiny

QUESTIONS = ["what colour is the star ?", "what shape is left of the red circle ?", "star ?"]


@pytest.fixture(scope="module")
def answered(llava: HookedMM, images: list[Image.Image]) -> Batch:
    """Three questions of different lengths with their answers."""
    batch = llava.generate(llava.prepare(images[:3], QUESTIONS), 4).batch
    assert batch is not None
    return batch


@pytest.fixture(scope="module")
def seen(llava: HookedMM, answered: Batch) -> AnswerAttention:
    """Their attention, all layers and heads."""
    return answer_attention(llava, answered)


@pytest.fixture(scope="module")
def told(llava: HookedMM, images: list[Image.Image]) -> list[list[Tensor]]:
    """Step by step, layer by layer: the newest row that transformers' own generation returns, (b, heads, keys)."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(
        small_model_path("llava"), attn_implementation="eager", dtype=torch.float32
    )
    inputs = llava.prepare(images[:3], QUESTIONS).inputs
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_attentions": True}
    found = model.generate(**inputs, **options).attentions
    return [[layer[:, :, -1] for layer in step] for step in found]


def test_the_row_is_the_one_that_predicts_the_token_and_not_the_tokens_own(
    llava: HookedMM, answered: Batch, seen: AnswerAttention, told: list[list[Tensor]]
) -> None:
    """LVLM-Interpret's fault. Token number s is said by step s of a generation, whose newest row that is; the row of
    the token itself is another one, and is not taken.
    """
    prompt = answered.length - len(told)
    number: dict[int, int] = {}
    compared = 0
    for place, sample in enumerate(seen.targets.sample.tolist()):
        step = number.get(sample, 0)
        number[sample] = step + 1
        assert int(seen.targets.row[place]) == prompt + step - 1
        for layer, pattern in seen.patterns.items():
            expected = told[step][layer][sample]
            assert torch.allclose(pattern[place, :, : expected.shape[1]], expected, atol=1e-5)
            assert float(pattern[place, :, expected.shape[1] :].sum()) == 0
            compared += 1
            # The tokens's own row is that of the next step; only a fault would give it.
            if step + 1 < len(told):
                later = told[step + 1][layer][sample]
                assert (pattern[place, :, : expected.shape[1]] - later[:, : expected.shape[1]]).abs().max() > 1e-4
    assert compared >= 3 * llava.cfg.n_layers


def test_no_number_of_patches_is_hard_coded(llava: HookedMM, images: list[Image.Image]) -> None:
    """LVLM-Interpret's fault: 576. Here 64 in a square, and a grid of the picture's own shape with nothing lost."""
    for name, picture in (("llava", images[0]), ("qwen2_vl", images[0].resize((96, 48)))):
        model = llava if name == "llava" else HookedMM.small(name, check=False)
        batch = model.prepare([picture], QUESTIONS[0], answers=["red"])
        # Qwen2-VL's processor says how many patches there are, of which the merger makes one of four.
        told = batch.inputs.get("image_grid_thw", torch.tensor([[1, 16, 16]]))
        shape = (int(told[0, 1]) // 2, int(told[0, 2]) // 2)
        found = answer_attention(model, batch, "first", [2])
        (maps,) = head_maps(model, batch, found, 0, [(2, 1)], [picture]).values()
        assert [tuple(one.values.shape) for one in maps] == [shape]
        assert int(found.groups["image"].sum()) == shape[0] * shape[1]
        mass = float(found.by_head("image", share=True)[0, 0, 1])
        assert float(maps[0].values.sum()) == pytest.approx(mass, rel=1e-5)


def test_heads_are_chosen_before_they_are_averaged(seen: AnswerAttention) -> None:
    """LVLM-Interpret's fault: a head mean of all, of which nothing can be chosen any more."""
    pattern = seen.patterns[3]
    chosen = choose_heads(pattern, [3, 1], mean=True)
    assert torch.allclose(chosen[:, 0], (pattern[:, 3] + pattern[:, 1]) / 2)
    assert (chosen[:, 0] - pattern.mean(1)).abs().max() > 1e-3
    assert torch.equal(choose_heads(pattern, [3, 1], mean=False), pattern[:, [3, 1]])
    for heads in ([], [4], [-1]):
        with pytest.raises(BadInputError, match="choose one at least"):
            choose_heads(pattern, heads, mean=True)


def test_no_attention_of_a_generation_is_held(
    llava: HookedMM, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """LVLM-Interpret's fault: all attention of all steps. Here no pattern is ever computed as a whole, and what is
    kept is tokens x heads x keys of the layers asked.
    """

    def refused(*_: object) -> None:
        raise AssertionError("a whole pattern was computed")

    monkeypatch.setattr(attention, "eager_attention", refused)
    batch = llava.generate(llava.prepare(images[:3], QUESTIONS), 4).batch
    assert batch is not None
    found = answer_attention(llava, batch, layers=[1, 4], heads=[0, 2])
    kept = sum(value.untyped_storage().nbytes() // 4 for value in found.patterns.values())
    assert kept == 2 * len(found) * 2 * batch.length
    assert list(found.patterns) == [1, 4]


def test_means_and_shares_of_columns(seen: AnswerAttention, answered: Batch) -> None:
    """Written out for one token; shares of all kinds of keys add up to one; no columns, no mean."""
    pattern, place = seen.patterns[2], 2
    sample = int(seen.targets.sample[place])
    columns = [c for c in range(answered.length) if int(answered.modality[sample, c]) == 2]
    by_hand = [sum(float(pattern[place, head, c]) for c in columns) for head in range(4)]
    assert seen.by_head("image", share=True)[place, 2].tolist() == pytest.approx(by_hand, rel=1e-9)
    assert seen.by_head("image")[place, 2].tolist() == pytest.approx([value / 64 for value in by_hand], rel=1e-9)
    total = sum(seen.by_head(name, share=True) for name in seen.groups)
    assert isinstance(total, Tensor)
    assert torch.allclose(total, torch.ones_like(total), atol=1e-5)
    none = torch.zeros(len(seen), answered.length, dtype=torch.bool)
    assert column_mean(pattern, none).isnan().all()
    assert not column_share(pattern, none).any()
    with pytest.raises(BadInputError, match="no columns 'picture'; known: image"):
        seen.by_head("picture")
    with pytest.raises(BadInputError, match="they are a mask of"):
        seen.by_head(none[:1])


@pytest.mark.parametrize("side", ["left", "right"])
def test_neither_padding_nor_companions_change_an_answers_attention(
    llava: HookedMM, images: list[Image.Image], side: str
) -> None:
    """Heads x layers of each token alone and in a batch."""
    answers = ["red star .", "blue", "green"]
    batch = llava.prepare(images[:3], QUESTIONS, answers=answers, padding_side=side)
    together = answer_attention(llava, batch)
    for sample in range(3):
        alone = llava.prepare(images[sample], QUESTIONS[sample], answers=[answers[sample]])
        single = answer_attention(llava, alone)
        own = together.targets.sample == sample
        for name in ("image", "question"):
            assert torch.allclose(together.by_head(name)[own], single.by_head(name), atol=1e-6)


def test_clicked_patches_and_the_answer_tokens_that_look_at_them(
    llava: HookedMM, images: list[Image.Image], answered: Batch, seen: AnswerAttention
) -> None:
    """The small LLaVA crops nothing and sees 8 x 8 patches in order; only the clicked sample's tokens have columns."""
    picture = images[1].resize((80, 80))
    batch = llava.generate(llava.prepare([images[0], picture], QUESTIONS[:2]), 3).batch
    assert batch is not None
    found = answer_attention(llava, batch)
    points = [(0, 35.0, 12.0), (0, 79.9, 79.9)]
    columns = clicked_columns(llava, batch, found, 1, points, [picture])
    start = int((batch.modality[1] == 2).nonzero()[0])
    own = found.targets.sample == 1
    assert columns[own].nonzero()[:, 1].unique().tolist() == [start + 8 * 1 + 3, start + 63]
    assert not columns[~own].any()
    values = found.by_head(columns)
    pattern = found.patterns[5]
    assert torch.allclose(values[own, 5], pattern[own][:, :, [start + 11, start + 63]].double().mean(-1))
    assert values[~own].isnan().all()
    with pytest.raises(BadInputError, match=r"no patch covers \(99.0, 3.0\) of picture 0"):
        clicked_columns(llava, batch, found, 1, [(0, 99.0, 3.0)], [picture])


def test_a_place_that_crops_and_overview_show_is_clicked_in_both_and_latents_have_none(
    images: list[Image.Image],
) -> None:
    """Molmo's picture has two columns; the latents of Idefics2 no place, but a map through their own attention."""
    molmo = HookedMM.small("molmo", check=False)
    batch = molmo.prepare(images[:1], QUESTIONS[0], answers=["red"])
    found = answer_attention(molmo, batch, "first")
    columns = clicked_columns(molmo, batch, found, 0, [(0, images[0].width / 2, images[0].height / 2)], images[:1])
    layout = batch.layout.images[0]
    assert layout.grid is not None
    assert layout.overview is not None
    (one, other) = columns[0].nonzero()[:, 0].tolist()
    assert len({one, other} & set(layout.grid.flatten().tolist())) == 1
    assert len({one, other} & set(layout.overview.flatten().tolist())) == 1
    idefics = HookedMM.small("idefics2", check=False)
    batch = idefics.prepare(images[:1], QUESTIONS[0], answers=["red"])
    found = answer_attention(idefics, batch, "first", [4])
    with pytest.raises(BadInputError, match="latents that belong to no place"):
        clicked_columns(idefics, batch, found, 0, [(0, 5, 5)], images[:1])
    (maps,) = head_maps(idefics, batch, found, 0, [(4, 0)], images[:1]).values()
    mass = float(found.by_head("image", share=True)[0, 0, 0])
    assert sum(float(one.values.nansum()) for one in maps) == pytest.approx(mass, rel=1e-4)


def test_the_mean_of_tokens_is_of_one_sample(
    llava: HookedMM, answered: Batch, seen: AnswerAttention, images: list[Image.Image]
) -> None:
    """Written out; of several samples it would mix pictures."""
    alone = answer_attention(llava, llava.prepare(images[:1], QUESTIONS[:1], answers=["a red star"]))
    batch = llava.prepare(images[:1], QUESTIONS[:1], answers=["a red star"])
    (mean,) = head_maps(llava, batch, alone, None, [(2, 1)], images[:1])[2, 1]
    each = [head_maps(llava, batch, alone, token, [(2, 1)], images[:1])[2, 1][0].values for token in range(3)]
    assert torch.allclose(mean.values.float(), sum(each) / 3, atol=1e-6)
    with pytest.raises(BadInputError, match="see different pictures"):
        head_maps(llava, answered, seen, None, [(2, 1)], images[:1])


def test_where_columns_are_read(llava: HookedMM, answered: Batch, images: list[Image.Image]) -> None:
    """One sequence; a picture by cross-attention; a picture and a prompt in an encoder."""
    kinds = ("image", "question", "template", "answer")
    assert {seen_through(llava, answered, kind) for kind in kinds} == {"attn"}
    expected = {"mllama": ["xattn", "attn", "attn", "attn"], "florence2": ["xattn", "xattn", "xattn", "attn"]}
    for family, parts in expected.items():
        model = HookedMM(tiny(family), processor(family), check=False)
        batch = model.prepare(images[:1], "what is this ?", answers=["red"])
        assert [seen_through(model, batch, kind) for kind in kinds] == parts


@pytest.mark.parametrize("family", ["mllama", "florence2"])
def test_cross_attention_is_what_sees_the_picture(family: str, images: list[Image.Image]) -> None:
    """Columns are the tower's or the encoder's; the map's amounts are those of the keys; own attention on request."""
    model = HookedMM(tiny(family), processor(family), check=False)
    batch = model.prepare(images[:2], "what is this ?", answers=["red", "a red star"])
    found = answer_attention(model, batch)
    assert found.part == "xattn"
    share = found.by_head("image", share=True)
    assert bool(((share > 0) & (share < 1 + 1e-5)).all())
    if family == "mllama":
        assert torch.allclose(share, torch.ones_like(share), atol=1e-5)
        (maps,) = head_maps(model, batch, found, 1, [(next(iter(found.patterns)), 2)], images[:1]).values()
        assert all(one.values.isfinite().any() for one in maps)
    own = answer_attention(model, batch, part="attn")
    assert not own.by_head("image", share=True).any()
    text = batch.decoder or batch
    assert own.groups["answer"].shape[1] == text.modality.shape[1]


def test_tables_of_rows_and_the_strongest_heads() -> None:
    """Targets in any order; NaN are no heads; ties in their order."""
    targets = Targets(torch.tensor([1, 0, 1, 1]), torch.tensor([5, 7, 6, 9]), torch.tensor([1, 2, 3, 4]))
    rows, slot = rows_by_sample(targets, 3)
    assert rows.tolist() == [[7, -1, -1], [5, 6, 9], [-1, -1, -1]]
    assert slot.tolist() == [0, 0, 1, 2]
    values = torch.tensor([[0.1, torch.nan], [0.5, 0.1]])
    assert strongest(values, [4, 6], [2, 9], 9) == [(6, 2), (4, 2), (6, 9)]


def test_what_is_not_there_is_refused(llava: HookedMM, images: list[Image.Image], answered: Batch) -> None:
    """No answers, no such layer, no such token or head."""
    with pytest.raises(BadInputError, match="no sample has an answer"):
        answer_attention(llava, llava.prepare(images[:1], QUESTIONS[0]))
    with pytest.raises(UnknownHookError):
        answer_attention(llava, answered, layers=[77])
    with pytest.raises(BadInputError, match="no layer was asked for"):
        answer_attention(llava, answered, layers=[])
    found = answer_attention(llava, answered, "first", [1], [2])
    for token, pair, wrong in ((9, (1, 2), "token 9 of 3"), (0, (1, 0), "layer 1, head 0 was not looked at")):
        with pytest.raises(BadInputError, match=wrong):
            head_maps(llava, answered, found, token, [pair], images[:1])
    assert len(answer_targets(answered, "first")) == 3
