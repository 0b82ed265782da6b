"""Relevancy against Chefer's rules as plain loops: on numbers made by hand, and on models by PyTorch alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText

from analyses.pattern_gradients import PatternGradients
from analyses.relevancy import (
    beyond,
    cross_attention,
    normalised,
    relevancies,
    row_sums,
    self_attention,
    text_points,
    through,
    whole,
)
from analyses.targets import Targets, answer_targets
from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.small import small_model_path
from hooked_mm.testing.miniatures import known, miniature, miniature_inputs
from tests.chefer_by_hand import Attentions, Matrix, cross_attended, normalise, self_attended

ASKED = ["what place is this ?", "what colour is the object at the top left ?", "describe the scene ."]
SAID = ["city", "red", "big star"]
TEXT = [f"model.language_model.layers.{layer}.self_attn" for layer in range(6)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@cache
def wide() -> HookedMM:
    """The small LLaVA in float64."""
    return HookedMM.small("llava", dtype="float64", check=False)


@cache
def eager() -> Any:
    """The same weights as transformers loads them, with attention that gives its weights back."""
    return AutoModelForImageTextToText.from_pretrained(
        small_model_path("llava"), dtype=torch.float64, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def answered(images: list[Image.Image]) -> Batch:
    return wide().prepare(images[:3], ASKED, answers=SAID)


@pytest.fixture(scope="module")
def alone(images: list[Image.Image]) -> Batch:
    """The third sample by itself, without padding, which transformers' own attention makes NaN of in float64."""
    return wide().prepare(images[2], ASKED[2], answers=SAID[2:])


@pytest.fixture(scope="module")
def layers(alone: Batch) -> list[list[Matrix]]:
    """Per token of the third answer, Abar of every layer: one forward and one backward pass each, by PyTorch alone."""
    targets, found = answer_targets(alone), []
    for row, token in zip(targets.row.tolist(), targets.token.tolist(), strict=True):
        with Attentions(eager(), TEXT) as attentions:
            eager()(**alone.inputs).logits[0, row, token].backward()
            found.append([attentions.weighed(path, 0) for path in TEXT])
    return found


def of_third(batch: Batch) -> Targets:
    every = answer_targets(batch)
    return every.take((every.sample == 2).nonzero()[:, 0])


def own_of_third(batch: Batch) -> slice:
    """Its own positions, behind the padding."""
    return slice(int((batch.modality[2] == 0).sum()), None)


def row_of(relevancy: Matrix, row: int) -> Tensor:
    """Row t of normalised R - I."""
    found = torch.tensor(normalise(relevancy)[row], dtype=torch.float64)
    found[row] -= 1
    return found


def test_rules_of_self_attention_are_the_papers() -> None:
    layers = [random(5, 5, seed=seed) / 5 for seed in range(3)]
    relevancy = torch.eye(5, dtype=torch.float64)
    for layer in layers:
        relevancy = self_attention(relevancy, layer)
    expected = self_attended([layer.tolist() for layer in layers])
    torch.testing.assert_close(relevancy, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(normalised(relevancy).tolist(), normalise(expected), rtol=1e-12, atol=1e-15)


def test_rules_of_cross_attention_are_the_papers() -> None:
    """Self- and cross-attention by turns, with a source that has mixed its own positions."""
    kinds, texts, keys = ["self", "cross", "cross", "self", "cross"], 4, 6
    layers = [random(texts, texts if kind == "self" else keys, seed=n) / 4 for n, kind in enumerate(kinds)]
    source = self_attended([(random(keys, keys, seed=9) / 3).tolist()])
    own, read = torch.eye(texts, dtype=torch.float64), torch.zeros(texts, keys, dtype=torch.float64)
    mixed = torch.tensor(source, dtype=torch.float64)
    for kind, layer in zip(kinds, layers, strict=True):
        if kind == "self":
            own, read = self_attention(own, layer), self_attention(read, layer)
        else:
            own, read = cross_attention(own, read, layer, mixed)
    expected = cross_attended([(k, layer.tolist()) for k, layer in zip(kinds, layers, strict=True)], texts, source)
    torch.testing.assert_close([own.tolist(), read.tolist()], list(expected), rtol=1e-12, atol=0)
    # What the source has mixed may as well be multiplied on the right at the end.
    named = {
        f"{n}.{'x' if kind == 'cross' else ''}attn.": layer[None]
        for n, (kind, layer) in enumerate(zip(kinds, layers, strict=True))
    }
    plain_own, plain = whole(named, (1, texts, keys), torch.device("cpu"))
    torch.testing.assert_close(plain_own[0], own, rtol=1e-12, atol=0)
    torch.testing.assert_close(plain[0] @ normalised(mixed), read, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(
        through(plain[0], [torch.tensor(source, dtype=torch.float64) - torch.eye(keys, dtype=torch.float64)]),
        read,
        rtol=1e-12,
        atol=1e-15,
    )


def test_a_source_that_reads_the_text_gives_back_what_it_has_read() -> None:
    """R_ss += Abar R_qs, by loops."""
    weighted, back = random(3, 4), random(4, 3, seed=1)
    own, _ = cross_attention(
        torch.eye(3, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64), weighted, None, back
    )
    for i in range(3):
        for j in range(3):
            expected = (i == j) + sum(float(weighted[i, k] * back[k, j]) for k in range(4))
            assert float(own[i, j]) == pytest.approx(expected, rel=1e-12)


@given(seed=st.integers(0, 10_000), count=st.integers(1, 6), size=st.integers(1, 7), empty=st.integers(-1, 5))
def test_a_row_carried_back_is_that_of_the_whole_matrix(seed: int, count: int, size: int, empty: int) -> None:
    """Without any N x N product, with a layer that has no part."""
    layers = [random(2, size, size, seed=seed + n) * 10.0 ** (-n) for n in range(count)]
    relevancy = torch.eye(size, dtype=torch.float64).repeat(2, 1, 1)
    for number, layer in enumerate(layers):
        relevancy = relevancy if number == empty else self_attention(relevancy, layer)
    given_ = [None if number == empty else layer for number, layer in enumerate(layers)]
    row = random(2, size, seed=seed + 99)
    rest = relevancy - torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(beyond(row, given_), (row[:, None] @ rest)[:, 0], rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(row_sums(given_, row), rest.sum(-1), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(
        through(row, given_), (row[:, None] @ normalised(relevancy))[:, 0], rtol=1e-9, atol=1e-12
    )
    torch.testing.assert_close(
        through(row, given_, normalise=False), (row[:, None] @ relevancy)[:, 0], rtol=1e-10, atol=1e-14
    )


def test_gradients_far_smaller_than_one_are_not_lost_beside_the_identity() -> None:
    """In float32, where 1 + 1e-9 is 1."""
    layers = [random(4, 4, seed=n).float() * 1e-9 for n in range(3)]
    row = torch.tensor([0.0, 0, 1, 0])
    torch.testing.assert_close(beyond(row, layers), sum(layer[2] for layer in layers), rtol=1e-5, atol=0)


def test_a_models_relevancy_is_that_of_the_rules_by_hand(
    answered: Batch, alone: Batch, layers: list[list[Matrix]]
) -> None:
    """Float64, to 1e-5; both tokens of an answer, in a batch with padding."""
    targets, own = of_third(answered), own_of_third(answered)
    assert own.start > 0
    found = relevancies(wide(), answered, targets)
    raw = relevancies(wide(), answered, targets, normalise=False)
    for number, (abar, row) in enumerate(zip(layers, answer_targets(alone).row.tolist(), strict=True)):
        relevancy = self_attended(abar)
        torch.testing.assert_close(found.positions[number, own], row_of(relevancy, row), rtol=1e-5, atol=1e-9)
        expected = torch.tensor(relevancy[row], dtype=torch.float64)
        expected[row] -= 1
        torch.testing.assert_close(raw.positions[number, own], expected, rtol=1e-5, atol=1e-9)
    assert found.positions.sum(1).tolist() == pytest.approx([1] * 2)
    assert not found.positions[0, int(targets.row[0]) + 1 :].any(), "what comes later has no part"


def far(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().sum() / one.abs().sum())


def test_gradients_are_not_accumulated_over_the_tokens_of_an_answer(alone: Batch) -> None:
    """LVLM-Interpret never clears them: its second token is explained by the first one's gradient too."""
    targets, model = answer_targets(alone), eager()
    found = relevancies(wide(), alone, targets)
    with Attentions(model, TEXT) as attentions:
        logits = model(**alone.inputs).logits
        for number, (row, token) in enumerate(zip(targets.row.tolist(), targets.token.tolist(), strict=True)):
            logits[0, row, token].backward(retain_graph=True)
            theirs = row_of(self_attended([attentions.weighed(path, 0) for path in TEXT]), row)
            assert (far(found.positions[number], theirs) < 1e-4) == (number == 0)


def test_the_target_is_the_chosen_token_and_not_the_likeliest(answered: Batch) -> None:
    """LVLM-Interpret differentiates the largest logit, whatever token was chosen."""
    targets = of_third(answered)
    logits = wide().hf_model(**answered.inputs).logits[2, targets.row]
    unlikely = Targets(targets.sample, targets.row, logits.topk(2).indices[:, 1])
    likely = Targets(targets.sample, targets.row, logits.argmax(-1))
    ours, theirs = (relevancies(wide(), answered, chosen) for chosen in (unlikely, likely))
    torch.testing.assert_close(ours.scores, logits.topk(2).values[:, 1].detach())
    assert min(far(one, other) for one, other in zip(ours.positions, theirs.positions, strict=True)) > 0.05


def test_targets_of_several_samples_are_not_mixed(answered: Batch) -> None:
    """Rows of one result belong to the targets in their order, however samples are shuffled in it."""
    every = answer_targets(answered)
    order = torch.tensor([2, 3, 0, 1])
    found, shuffled = relevancies(wide(), answered, every), relevancies(wide(), answered, every.take(order))
    torch.testing.assert_close(shuffled.positions, found.positions[order], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(shuffled.scores, found.scores[order])
    assert shuffled.targets.token.tolist() == every.token[order].tolist()


def test_layers_are_composed_from_the_first_to_the_last(alone: Batch, layers: list[list[Matrix]]) -> None:
    """LVLM-Interpret composes them in reversed order, which gives other numbers."""
    targets = answer_targets(alone)
    found = relevancies(wide(), alone, targets)
    theirs = row_of(self_attended(layers[0][::-1]), int(targets.row[0]))
    assert far(found.positions[0], theirs) > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
def test_neither_companions_nor_padding_change_a_relevancy(
    images: list[Image.Image], answered: Batch, side: str
) -> None:
    model = wide()
    batch = model.prepare(images[:3], ASKED, answers=SAID, padding_side=side)
    together = relevancies(model, batch, answer_targets(batch))
    for sample in (0, 2):
        alone = model.prepare(images[sample], ASKED[sample], answers=[SAID[sample]])
        found = relevancies(model, alone, answer_targets(alone))
        own = (batch.modality[sample] != 0).nonzero()[:, 0]
        mine = together.positions[together.targets.sample == sample]
        torch.testing.assert_close(mine[:, own], found.positions, rtol=1e-6, atol=1e-10)
        assert mine.sum(1).tolist() == pytest.approx(mine[:, own].sum(1).tolist())


def read_by_hand(
    model: Any, inputs: Any, paths: Sequence[Sequence[str]], sample: int, row: int, token: int
) -> tuple[Tensor, Tensor]:
    """R_ss - I (shares) and R_sq of one row; `paths` of self-attention, cross-attention and the source's own."""
    own, cross, source = paths
    with Attentions(model, [*source, *own, *cross]) as attentions:
        model(**inputs).logits[sample, row, token].backward()
        order = [path for path in attentions.kept if path not in source]
        layers = [("cross" if path in cross else "self", attentions.weighed(path, sample)) for path in order]
        mixed = [attentions.weighed(path, sample) for path in source]
    keys = len(next(layer for kind, layer in layers if kind == "cross")[0])
    start = self_attended(mixed) if mixed else [[float(i == j) for j in range(keys)] for i in range(keys)]
    relevancy, read = cross_attended(layers, len(layers[0][1]), start)
    return row_of(relevancy, row), torch.tensor(read[row], dtype=torch.float64)


def cross_model(family: str) -> tuple[HookedMM, Batch, Any, Targets]:
    """A miniature in float64, and the same weights attending eagerly."""
    plain = miniature(family).double()
    model = HookedMM(plain, check=False)
    inputs = {
        name: value.double() if value.is_floating_point() else value for name, value in miniature_inputs(plain).items()
    }
    batch = model._batch(inputs)
    rows = (batch.decoder or batch).modality.shape[1] - 1
    # Of padding transformers makes NaN in float64; the last sample has none.
    return model, batch, inputs, Targets(torch.tensor([2, 2]), torch.tensor([rows, rows - 1]), torch.tensor([5, 7]))


@pytest.mark.parametrize(
    ("family", "own", "cross", "source"),
    [
        (
            "mllama",
            [f"model.language_model.layers.{n}.self_attn" for n in (0, 2, 4)],
            [f"model.language_model.layers.{n}.cross_attn" for n in (1, 3)],
            [],
        ),
        (
            "florence2",
            [f"model.language_model.decoder.layers.{n}.self_attn" for n in range(3)],
            [f"model.language_model.decoder.layers.{n}.encoder_attn" for n in range(3)],
            [f"model.language_model.encoder.layers.{n}.self_attn" for n in range(3)],
        ),
    ],
)
def test_relevancy_by_cross_attention_is_that_of_the_rules_by_hand(
    family: str, own: list[str], cross: list[str], source: list[str], unchecked: None
) -> None:
    """A decoder that reads the tower's patches, and one that reads an encoder."""
    model, batch, inputs, targets = cross_model(family)
    found = relevancies(model, batch, targets)
    plain = model.hf_model
    plain.set_attn_implementation("eager")
    plain.requires_grad_(True)
    for number in range(2):
        sample, row, token = (int(getattr(targets, name)[number]) for name in ("sample", "row", "token"))
        mine, read = read_by_hand(plain, inputs, (own, cross, source), sample, row, token)
        if family == "florence2":
            assert found.decoder is not None
            torch.testing.assert_close(found.decoder[number], mine, rtol=1e-5, atol=1e-9)
            torch.testing.assert_close(found.positions[number], read, rtol=1e-5, atol=1e-14)
        else:
            assert found.keys is not None
            torch.testing.assert_close(found.positions[number], mine, rtol=1e-5, atol=1e-9)
            torch.testing.assert_close(found.keys[number], read, rtol=1e-5, atol=1e-14)


@pytest.mark.parametrize(
    ("family", "why"),
    [("qwen3_5", "without attention"), ("lfm2_vl", "without attention"), ("t5gemma2", "5 queries and 20 keys")],
)
def test_models_without_a_rule_are_refused(family: str, why: str, unchecked: None) -> None:
    """Linear attention, convolutions, and one pattern over a decoder's and an encoder's positions."""
    if family not in known((family,)):
        pytest.skip(f"this version of transformers has no {family}")
    plain = miniature(family)
    model = HookedMM(plain, check=False)
    batch = model._batch(miniature_inputs(plain))
    with pytest.raises(BadInputError, match=why):
        relevancies(model, batch, Targets(torch.tensor([0]), torch.tensor([1]), torch.tensor([3])))


def test_only_the_language_models_patterns_are_computed(llava: HookedMM, answered: Batch) -> None:
    points = text_points(llava, answered)
    assert points == [f"blocks.{layer}.attn.hook_pattern" for layer in range(6)]
    found = PatternGradients(wide(), answered, of_third(answered), points[:2])
    assert list(found.patterns) == points[:2]
