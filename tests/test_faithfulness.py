"""Deleting and inserting concepts: plain PyTorch hooks, exact dictionaries, and concepts that the model does use."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from concept_dict.answer_rows import AnswerRows, stored_rows
from concept_dict.faithfulness import Curve, curve, faithfulness, first_terms, random_order, strongest_first
from concept_dict.non_negative_dictionary import NonNegativeDictionary
from hooked_mm.errors import BadInputError, UnknownHookError
from hooked_mm.extraction import Extractor
from hooked_mm.extraction_job import extract
from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.captions import STYLES, right_captions
from hooked_mm.scenes.dataset import SceneDataset, ScenesDataModule
from hooked_mm.scenes.language import DESCRIBED, WORD_CLASSES
from hooked_mm.scenes.world import Scene
from hooked_mm.selectors import TokenOfInterest
from hooked_mm.store import ActivationStore
from tests.raw import raw_hook

HOOK = "blocks.4.hook_resid_post"


@pytest.fixture(scope="module")
def rows(llava: HookedMM, images: list[Image.Image], scenes: list[Scene]) -> AnswerRows:
    """Five rows of three samples of different lengths, padded on the left; two samples have two rows."""
    answers = [right_captions(scene, "full")[0] for scene in scenes[:3]]
    batch = llava.prepare(images[:3], STYLES["full"].prompt, answers)
    lengths = batch.inputs["attention_mask"].sum(dim=1)
    assert len(set(lengths.tolist())) > 1, "the samples have to be padded"
    ends = lengths.numpy()
    return AnswerRows(batch, np.array([0, 2, 0, 1, 2]), np.array([ends[0] - 3, ends[2] - 2, ends[0] - 6, 70, 75]))


def _column(rows: AnswerRows, row: int) -> tuple[int, int]:
    """Sample and column of a row, by walking through the mask."""
    sample, mask = int(rows.sample[row]), rows.batch.inputs["attention_mask"][int(rows.sample[row])].tolist()
    real = [column for column, kept in enumerate(mask) if kept]
    return sample, real[int(rows.position[row])]


def _by_hand(model: HookedMM, rows: AnswerRows, row: int, change: Any) -> float:
    """The log-probability of a row's token, float64, while a plain PyTorch hook changes its vector."""
    sample, column = _column(rows, row)

    def write(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        value[sample, column] = change(value[sample, column])
        return value

    with torch.no_grad(), raw_hook(model.hf_model, HOOK, write):
        logits = model.hf_model(**rows.batch.inputs).logits[sample, column].double()
    return float(logits.log_softmax(dim=0)[rows.batch.input_ids[sample, column + 1]])


def _dictionary(k: int, seed: int = 0) -> Any:
    drawn = torch.Generator().manual_seed(seed)
    return SimpleNamespace(components_=torch.randn(k, 128, generator=drawn), mean_=torch.randn(128, generator=drawn))


@pytest.mark.parametrize("mode", ["delete", "insert"])
def test_curves_equal_plain_hooks(llava: HookedMM, rows: AnswerRows, mode: Any) -> None:
    """Every row and number of concepts, by hooks and sums written out, one row at a time."""
    made, a = _dictionary(4), torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    order = torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(seed)) for seed in range(5)])
    found = curve(llava, HOOK, rows, a, made, order, [0, 1, 3], mode)
    assert found.shape == (5, 3)
    for row in range(5):
        for place, m in enumerate([0, 1, 3]):
            total = torch.zeros(128)
            for concept in order[row, :m].tolist():
                total = total + a[row, concept] * made.components_[concept]

            def change(z: torch.Tensor, total: torch.Tensor = total) -> torch.Tensor:
                return z - total if mode == "delete" else made.mean_ + total

            assert found[row, place] == pytest.approx(_by_hand(llava, rows, row, change), abs=2e-4)


def test_deleting_nothing_changes_nothing(llava: HookedMM, rows: AnswerRows) -> None:
    """m = 0 is the model's own log-probability, by a forward pass without any hook."""
    with torch.no_grad():
        logits = llava.hf_model(**rows.batch.inputs).logits.double().log_softmax(dim=-1)
    made = SimpleNamespace(**vars(_dictionary(3)), transform=lambda z: torch.ones(len(z), 3))
    found = faithfulness(llava, HOOK, made, [rows], steps=[0, 2])
    for row in range(5):
        sample, column = _column(rows, row)
        own = float(logits[sample, column, rows.batch.input_ids[sample, column + 1]])
        for name in ("delete", "delete_random_order", "delete_random_dictionary"):
            assert found[name].values[row, 0] == pytest.approx(own, abs=1e-5)
            assert found[name].own[row] == pytest.approx(own, abs=1e-5)
    # And with m = 2 something did change.
    assert np.abs(found["delete"].values[:, 1] - found["delete"].own).max() > 1e-3


def test_inserting_all_of_an_exact_dictionary_gives_the_model_back(llava: HookedMM, rows: AnswerRows) -> None:
    """With an orthonormal basis as concepts nothing is left over; deleting all of it leaves the mean."""
    drawn = torch.Generator().manual_seed(2)
    basis, mean = torch.linalg.qr(torch.randn(128, 128, generator=drawn))[0], torch.randn(128, generator=drawn)
    made = SimpleNamespace(components_=basis, mean_=mean, transform=lambda z: (z - mean) @ basis.T)
    found = faithfulness(llava, HOOK, made, [rows], steps=[0, 128], signed=True)
    assert set(found) == {m + n for m in ("delete", "insert") for n in ("", "_random_order", "_random_dictionary")}
    for name in ("insert", "insert_random_order"):
        np.testing.assert_allclose(found[name].values[:, -1], found[name].own, atol=2e-4)
        assert np.abs(found[name].values[:, 0] - found[name].own).min() > 1e-3
    for name in ("delete", "delete_random_order"):
        np.testing.assert_allclose(found[name].values[:, -1], found["insert"].values[:, 0], atol=2e-4)


def test_a_row_does_not_depend_on_its_companions(llava: HookedMM, rows: AnswerRows) -> None:
    """AnswerRows one by one, and their random orders with them, give what they give together."""
    made = SimpleNamespace(**vars(_dictionary(5)))
    made.transform = lambda z: (z @ made.components_.T / 128).relu()
    together = faithfulness(llava, HOOK, made, [rows], steps=[1])
    first, rest = slice(0, 1), slice(1, 5)
    nothing = AnswerRows(rows.batch, rows.sample[:0], rows.position[:0])
    parts = [AnswerRows(rows.batch, rows.sample[part], rows.position[part]) for part in (first, rest)]
    alone = faithfulness(llava, HOOK, made, [parts[0], nothing, parts[1]], steps=[1])
    for name, found in together.items():
        np.testing.assert_allclose(alone[name].values, found.values, atol=1e-5)
    other = faithfulness(llava, HOOK, made, [parts[1]], steps=[1], seed=1)
    np.testing.assert_allclose(other["delete"].values, together["delete"].values[1:], atol=1e-5)
    assert not np.allclose(other["delete_random_order"].values, together["delete_random_order"].values[1:])


def test_curve_areas() -> None:
    """Trapezoids of the change, by hand; uneven steps count by their width."""
    made = Curve(np.array([0, 1, 3]), np.array([[-1.0, -2.0, -4.0], [-1.0, -1.0, -1.0]]), np.array([-1.0, -0.5]))
    np.testing.assert_allclose(made.areas, [(0.5 * 1 + 2 * 2) / 3, 0.5] * np.array([-1, -1]))
    assert made.area == pytest.approx(-1.0)
    np.testing.assert_allclose(made.mean, [-1.0, -1.5, -2.5])
    assert Curve(np.array([2]), np.array([[-3.0]]), np.array([-1.0])).area == -2.0


@given(k=st.integers(1, 8), seed=st.integers(0, 10_000))
def test_orders(k: int, seed: int) -> None:
    """The strongest first by size, whatever the sign; at random the active ones, and only then the others."""
    drawn = torch.Generator().manual_seed(seed)
    a = torch.randn(6, k, generator=drawn) * (torch.rand(6, k, generator=drawn) < 0.6)
    first = torch.gather(a.abs(), 1, strongest_first(a))
    assert bool((first[:, 1:] <= first[:, :-1]).all())
    order = random_order(a, np.random.default_rng(seed))
    assert (order.sort(dim=1).values == torch.arange(k)).all()
    active = torch.gather(a != 0, 1, order)
    assert bool((active[:, 1:] <= active[:, :-1]).all())
    concepts = torch.randn(k, 3, generator=drawn)
    torch.testing.assert_close(first_terms(a, concepts, order, k), a @ concepts)
    assert not first_terms(a, concepts, order, 0).any()


def test_random_orders_are_even() -> None:
    """Each of three active concepts comes first about a third of the time, the inactive one never."""
    order = random_order(torch.tensor([[1.0, 0.0, -2.0, 3.0]]).expand(3000, 4), np.random.default_rng(0))
    counts = torch.bincount(order[:, 0], minlength=4) / 3000
    torch.testing.assert_close(counts, torch.tensor([1 / 3, 0, 1 / 3, 1 / 3]), atol=0.03, rtol=0)


def test_what_can_not_be_measured(llava: HookedMM, rows: AnswerRows) -> None:
    """Modes, numbers of concepts and rows that there are not."""
    made, a = _dictionary(3), torch.ones(5, 3)
    order = strongest_first(a)
    with pytest.raises(BadInputError, match="mode='remove'"):
        curve(llava, HOOK, rows, a, made, order, [0], "remove")  # type: ignore[arg-type]
    with pytest.raises(BadInputError, match="a dictionary of 3 concepts; take numbers from 0 to 3"):
        curve(llava, HOOK, rows, a, made, order, [4], "delete")
    with pytest.raises(BadInputError, match="no rows to measure"):
        faithfulness(llava, HOOK, made, [])
    with pytest.raises(BadInputError, match="steps is empty"):
        faithfulness(llava, HOOK, made, [rows], steps=[])


def test_xl_vlms_fault_a_layer_that_matches_nothing(llava: HookedMM, rows: AnswerRows) -> None:
    """A hook point that the model does not have is refused, not silently left alone."""
    with pytest.raises(UnknownHookError, match=r"blocks\.9\.hook_resid_post.*nearest"):
        faithfulness(llava, "blocks.9.hook_resid_post", _dictionary(3), [rows])


@pytest.fixture(scope="module")
def store(llava: HookedMM, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """Where attribute words of given captions are predicted."""
    words = tuple(word for name in DESCRIBED for word in WORD_CLASSES[name])
    extractor = Extractor(llava, HOOK, TokenOfInterest(words), answer="given")
    return extract(extractor, ScenesDataModule(60, style="full", batch_size=30), tmp_path_factory.mktemp("s") / "store")


def test_concepts_carry_what_is_said(llava: HookedMM, store: ActivationStore) -> None:
    """Deleting the strongest concepts hurts more, and inserting them helps more, than either baseline."""
    fitted = NonNegativeDictionary(16, random_state=0).fit(store.activations(HOOK))
    data = SceneDataset(60, style="full")
    batches = stored_rows(llava, store, lambda number: data[number].images, samples=14, batch_size=14)
    found = faithfulness(llava, HOOK, fitted, batches, steps=[0, 1, 3])
    area = {name: made.area for name, made in found.items()}
    for baseline in ("random_order", "random_dictionary"):
        assert area["delete"] < area[f"delete_{baseline}"] - 0.1
        assert area["insert"] > area[f"insert_{baseline}"] + 0.1
    assert found["delete"].mean[0] == pytest.approx(found["delete"].own.mean(), abs=1e-5)
