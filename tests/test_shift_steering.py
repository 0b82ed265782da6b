"""Shifts put into a model: each position by its own concept, checked against a loop over positions in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from concept_dict.dictionary import ConceptDictionary
from concept_dict.kmeans import KMeans
from concept_dict.non_negative_dictionary import NonNegativeDictionary
from concept_dict.pca import PCA
from concept_dict.shift import main_concept, movements, shift_vectors
from concept_dict.shift_steering import ShiftConcepts
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.interventions import Add
from hooked_mm.pair_extraction import extract_pair
from hooked_mm.reader import ModelSource
from hooked_mm.scenes.captions import CAPTION_PROMPT
from hooked_mm.scenes.dataset import ScenesDataModule
from hooked_mm.scenes.world import scene
from hooked_mm.selectors import LastPrompt
from hooked_mm.small.adapter_scores import captions
from hooked_mm.small.changes import CHANGES
from hooked_mm.steering_vector import SteeringVector, save_vectors

HOOK = "blocks.2.hook_resid_post"


@pytest.fixture(scope="module")
def rows(llava: HookedMM, images: list[Image.Image]) -> torch.Tensor:
    """The residual stream of the prompts' text."""
    _, cache = llava.run_with_cache(_batch(llava, images), [HOOK])
    return cache.select(HOOK, modality="text").values


def _batch(model: HookedMM, images: list[Image.Image]):
    return model.prepare(images=[[image] for image in images[:4]], text=["describe the scene ."] * 4)


def test_every_position_by_its_own_concept(llava: HookedMM, images: list[Image.Image], rows: torch.Tensor) -> None:
    """The nearest centre's vector is added, at the chosen positions alone."""
    fitted = KMeans(5, random_state=0).fit(rows)
    vectors = torch.randn(5, rows.shape[1], generator=torch.Generator().manual_seed(1))
    batch = _batch(llava, images)
    _, before = llava.run_with_cache(batch, [HOOK])
    with llava.hooks([ShiftConcepts(HOOK, fitted, vectors, alpha=0.5, at="text")]):
        _, after = llava.run_with_cache(batch, [HOOK])
    x, y = before[HOOK].double().numpy(), after[HOOK].double().numpy()
    centres = fitted.cluster_centers_.double().numpy()
    chosen = batch.mask("text").numpy()
    used = set()
    for index in np.ndindex(*chosen.shape):
        nearest = int(((centres - x[index]) ** 2).sum(axis=1).argmin())
        expected = x[index] + 0.5 * vectors[nearest].double().numpy() * chosen[index]
        np.testing.assert_allclose(y[index], expected, rtol=0, atol=1e-4)
        used |= {nearest} if chosen[index] else set()
    assert len(used) > 1


def test_it_steers_generation(llava: HookedMM, images: list[Image.Image], rows: torch.Tensor) -> None:
    """Shifts of nothing leave every word; large ones change what is said from the first generated token on."""
    batch, fitted = _batch(llava, images), KMeans(3, random_state=0).fit(rows)
    plain = llava.generate(batch, 6)
    zero = torch.zeros(3, rows.shape[1])
    with llava.hooks([ShiftConcepts(HOOK, fitted, zero)]):
        assert llava.generate(batch, 6).text == plain.text
    large = 50 * torch.randn(zero.shape, generator=torch.Generator().manual_seed(0))
    with llava.hooks([ShiftConcepts(HOOK, fitted, large, at="generated")]):
        steered = llava.generate(batch, 6)
    assert (steered.tokens[:, 0] == plain.tokens[:, 0]).all()
    assert (steered.tokens[:, 1:] != plain.tokens[:, 1:]).any(dim=1).all()


def test_both_ends_of_signed_concepts() -> None:
    """Rows on the negative side are moved by the vectors behind the first k."""
    fitted = PCA(1).fit(torch.tensor([[-2.0, 0.0], [-1.0, 0.1], [1.0, -0.1], [2.0, 0.0]]))
    sign = 1 if fitted.components_[0, 0] > 0 else -1
    vectors = torch.tensor([[0.0, 1.0], [0.0, 2.0]])
    moved = _change(ShiftConcepts(HOOK, fitted, vectors), torch.tensor([[[3.0 * sign, 0.0], [-3.0 * sign, 0.0]]]))
    torch.testing.assert_close(moved[0, :, 1], torch.tensor([1.0, 2.0]))


def test_nothing_active_nothing_moved() -> None:
    """A row that activates no concept stays as it is; bfloat16 stays bfloat16."""
    data = torch.eye(3).repeat(4, 1) * torch.linspace(1, 2, 12)[:, None]
    fitted = NonNegativeDictionary(3, center=False, alpha=0.01, random_state=0).fit(data)
    value = torch.tensor([[[-1.0, -1.0, -1.0], [1.0, 0.0, 0.0]]])
    moved = _change(ShiftConcepts(HOOK, fitted, torch.ones(3, 3)), value)
    assert torch.equal(moved[0, 0], value[0, 0])
    assert torch.equal(moved[0, 1], value[0, 1] + 1)
    assert _change(ShiftConcepts(HOOK, fitted, torch.ones(3, 3)), value.bfloat16()).dtype == torch.bfloat16


def test_what_the_command_keeps(tmp_path: Path) -> None:
    """Vectors go to their own concepts, whichever have none; the dictionary lies beside them, or is given."""
    fitted = KMeans(3).fit(torch.randn(9, 2, generator=torch.Generator().manual_seed(0)))

    def vector(value: float, **made_from: int) -> SteeringVector:
        return SteeringVector(torch.full((2,), value), HOOK, "shift", made_from=made_from)

    numbered = [vector(float(number), number=number, concepts=3) for number in (2, 1)]
    save_vectors([vector(9.0), *numbered], tmp_path / "vectors")
    dictionary = ConceptDictionary(fitted, HOOK)
    given = ShiftConcepts.load(tmp_path, dictionary, alpha=0.5, at="text")
    dictionary.save(tmp_path / "dictionary")
    for made in (given, ShiftConcepts.load(tmp_path)):
        assert made.vectors.tolist() == [[0, 0], [1, 1], [2, 2]]
        assert made.point == HOOK
        assert torch.equal(made.fitted.components_, fitted.components_)
    assert given.alpha == 0.5
    save_vectors([vector(9.0)], tmp_path / "vectors")
    with pytest.raises(BadInputError, match="holds no shift vectors of concepts"):
        ShiftConcepts.load(tmp_path)


def test_refusals() -> None:
    """One vector per concept, or per end."""
    fitted = KMeans(2).fit(torch.randn(9, 3, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(BadInputError, match=r"vectors have shape \(3, 3\), the dictionary's concepts \(2, 3\)"):
        ShiftConcepts(HOOK, fitted, torch.zeros(3, 3))
    with pytest.raises(BadInputError, match="NaN"):
        ShiftConcepts(HOOK, fitted, torch.full((2, 3), torch.nan))


def _change(shift: ShiftConcepts, value: torch.Tensor) -> torch.Tensor:
    class Here:
        def __init__(self) -> None:
            self.value = value

    return shift.change(Here())  # type: ignore[arg-type]


@pytest.mark.usefixtures("loaded", "unchecked")
def test_the_original_speaks_like_the_fine_tuned_model(llava: HookedMM, tmp_path: Path) -> None:
    """Shifts of 60 scenes make it answer 16 other ones by the place alone, and rightly; as long a vector does not."""
    sources = ModelSource("small:llava"), ModelSource("small:llava", adapter="place")
    data = ScenesDataModule(60, seed=5)
    pair = extract_pair(*sources, data, HOOK, LastPrompt(), tmp_path / "pair", answer="none")
    before, after = (store.activations(HOOK) for store in pair)
    fitted = KMeans(3, random_state=0).fit(before)
    shifts = shift_vectors(movements(before, after), main_concept(fitted.transform(before)), 3)
    largest = shifts.vectors[int(shifts.counts.argmax())]
    random = torch.randn(largest.shape, generator=torch.Generator().manual_seed(0))
    steered = {
        "nothing": None,
        "one concept's": Add(HOOK, largest, at="last_prompt"),
        "each its own": ShiftConcepts(HOOK, fitted, shifts.vectors, at="last_prompt"),
        "random": Add(HOOK, random / random.norm() * largest.norm(), at="last_prompt"),
    }
    scenes = [scene("test", index, 77) for index in range(16)]
    right = {}
    for name, intervention in steered.items():
        with llava.hooks([intervention] if intervention is not None else []):
            texts = captions(llava, scenes, CAPTION_PROMPT)
        right[name] = sum(text in CHANGES["place"].right(item) for text, item in zip(texts, scenes, strict=True))
    assert right["nothing"] == right["random"] == 0
    assert right["one concept's"] >= 15
    assert right["each its own"] >= 15
