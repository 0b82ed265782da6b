"""Gates: they open for samples that have the concept and leave the others token for token as they are."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from concept_dict.kmeans import KMeans
from concept_dict.pca import PCA
from hooked_mm.conditions import Above, Below
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.positions import LAST_PROMPT
from hooked_mm.runner import Hook
from hooked_mm.scenes.dataset import SceneDataset
from hooked_mm.steering_vector import SteeringVector, load_vectors, save_vectors
from steering.gate import ConceptAbove, Gate, gates_of, learn_concept_gate, learn_gate
from steering.setting import Setting
from steering.steered_answers import SteeredAnswers

POINT = "blocks.2.hook_resid_post"


def two_sets(seed: int, apart: float, count: int = 200) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two clouds with unequal spread along axes, `apart` from each other along a known direction."""
    chance = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0.2, 3.0, 16)
    direction = torch.nn.functional.normalize(torch.randn(16, generator=chance), dim=0)
    clouds = [torch.randn(count, 16, generator=chance) * spread for _ in range(2)]
    return clouds[0] + apart * direction, clouds[1], direction


@given(seed=st.integers(0, 50), leak=st.sampled_from([0.0, 0.01, 0.05]))
def test_no_more_than_the_leak_passes(seed: int, leak: float) -> None:
    """Of sets that overlap, at most this share of the rows outside; `opens` says what passes."""
    inside, outside, _ = two_sets(seed, 2.0)
    gate = learn_gate(inside, outside, POINT, "g", leak=leak)
    passed = ((outside @ gate.condition.direction) > gate.condition.threshold).double().mean()
    assert passed <= leak
    assert gate.made_from["opens"][1] == pytest.approx(float(passed), abs=0.006)
    # It is no gate that is always shut.
    assert gate.made_from["opens"][0] > leak


def test_sets_that_lie_apart_are_told_apart_on_rows_never_seen() -> None:
    """With room on both sides of the threshold."""
    inside, outside, direction = two_sets(3, 30.0)
    gate = learn_gate(inside[:100], outside[:100], POINT, "g")
    assert gate.made_from["opens"] == [1.0, 0.0]
    along = [
        float((rows[100:] @ gate.condition.direction > gate.condition.threshold).double().mean())
        for rows in (inside, outside)
    ]
    assert along == [1.0, 0.0]
    assert float(gate.condition.direction @ direction) > 0


def test_a_gate_is_saved_as_a_vector(tmp_path: Path) -> None:
    """And judges as before when it is loaded."""
    inside, outside, _ = two_sets(1, 4.0)
    gate = learn_gate(inside, outside, POINT, "warm", made_from={"store": "s"})
    save_vectors([gate.vector()], tmp_path)
    (again,) = gates_of(load_vectors(tmp_path))
    assert again.name == "warm"
    assert again.made_from["store"] == "s"
    assert again.condition.threshold == gate.condition.threshold
    assert torch.allclose(again.condition.direction, gate.condition.direction)
    assert repr(again.condition) == repr(gate.condition)


def test_a_concepts_gate_is_its_activation(llava: HookedMM, images: list[Any]) -> None:
    """Against the dictionary's own `transform`, for centred rows too, and for both ends of a signed one."""
    batch = llava.prepare(images[:8], ["what place is this ?"] * 8)
    _, cache = llava.run_with_cache(batch, POINT)
    rows = cache[POINT][:, -1]
    for fitted, ends in ((KMeans(3, random_state=0).fit(rows), 1), (PCA(3).fit(rows), 2)):
        active = fitted.transform(rows)
        active = torch.cat([active.clamp_min(0), (-active).clamp_min(0)], dim=1) if ends == 2 else active
        for concept in range(3 * ends):
            middle = float(active[:, concept].median())
            condition = ConceptAbove(fitted=fitted, concept=concept, threshold=middle, over="mean", at=LAST_PROMPT)
            found = condition.judge(cache[POINT], Hook(POINT, 2, 0, batch))
            assert found.tolist() == (active[:, concept] > middle).tolist()
    with pytest.raises(BadInputError, match="concept=3"):
        ConceptAbove(fitted=KMeans(3, random_state=0).fit(rows), concept=3, threshold=0.0)


def test_what_is_no_gate_is_refused() -> None:
    """Conditions that judge positions, gates that a vector can not hold, sets of one row."""
    direction = torch.eye(16)[0]
    with pytest.raises(BadInputError, match="whole samples"):
        Gate(Above(direction, 0.0), "g")
    for condition in (
        Below(direction, 0.0, POINT, "mean", LAST_PROMPT),
        Above(direction, 0.0, POINT, "any", LAST_PROMPT),
        Above(direction, 0.0, None, "mean", LAST_PROMPT),
        Above(direction, 0.0, POINT, "mean", "all"),
        Above(direction, 0.0, POINT, "mean", LAST_PROMPT, cosine=True),
    ):
        with pytest.raises(BadInputError, match="can be saved"):
            Gate(condition, "g").vector()
    with pytest.raises(BadInputError, match="at least two"):
        learn_gate(torch.ones(1, 16), torch.ones(5, 16), POINT, "g")
    with pytest.raises(BadInputError, match="leak=1"):
        learn_gate(torch.ones(3, 16), torch.zeros(5, 16), POINT, "g", leak=1)


def test_a_gate_learnt_of_questions_knows_new_ones(llava: HookedMM) -> None:
    """Questions after a place against all others: on scenes never seen at least 99 of 100 are told right."""

    def rows(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        data = SceneDataset(150, "question", seed=seed)
        samples = [data[index] for index in range(len(data))]
        batch = llava.prepare([sample.images for sample in samples], [sample.text for sample in samples])
        _, cache = llava.run_with_cache(batch, POINT, stop_at_layer=3)
        last = cache[POINT][:, -1]
        places = torch.tensor([sample.columns["question_type"] == "place" for sample in samples])
        return last[places], last[~places]

    gate = learn_gate(*rows(0), POINT, "places")
    shares = [float((part @ gate.condition.direction > gate.condition.threshold).double().mean()) for part in rows(1)]
    assert shares[0] >= 0.99
    assert shares[1] <= 0.01


def test_a_concepts_gate_takes_the_concept_that_knows() -> None:
    """Of planted clusters the one that the samples inside are in, whatever its number."""
    chance = torch.Generator().manual_seed(0)
    centres = 8 * torch.randn(5, 16, generator=chance)
    owner = torch.arange(5).repeat_interleave(60)
    rows = centres[owner] + torch.randn(300, 16, generator=chance)
    fitted = KMeans(5, random_state=0).fit(rows)
    for inside in range(5):
        gate = learn_concept_gate(fitted, rows[owner == inside], rows[owner != inside], POINT, "g", leak=0.0)
        assert isinstance(gate.condition, ConceptAbove)
        assert gate.condition.concept == int(fitted.transform(centres[inside][None]).argmax())
        assert gate.made_from["area"] == 1.0
        assert gate.made_from["opens"] == [1.0, 0.0]
    with pytest.raises(BadInputError, match="0 rows inside"):
        learn_concept_gate(fitted, rows[:0], rows, POINT, "g")


def test_another_models_gate_is_refused(llava: HookedMM) -> None:
    """As its vector would be; widths alone tell nothing."""
    rows = torch.randn(20, 128, generator=torch.Generator().manual_seed(0))
    vector = learn_gate(rows[:10], rows[10:], POINT, "g").vector()
    push = SteeringVector(rows[0], POINT)
    for owner, fits in ((llava.hf_model.config._name_or_path, True), ("somewhere/idefics2", False)):
        gate = Gate.of_vector(replace(vector, model=owner))
        with nullcontext() if fits else pytest.raises(BadInputError, match="idefics2"):
            SteeredAnswers(llava, [Setting(push, gate=gate)])
