"""Dictionaries from a store by a Trainer: what a plain fit gives, on one process or two, in parts or at once."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from concept_dict.decomposition import Decomposition
from concept_dict.dictionary import ConceptDictionary
from concept_dict.kmeans import KMeans
from concept_dict.learning import learn, table, variants
from concept_dict.non_negative_dictionary import NonNegativeDictionary
from concept_dict.pca import PCA
from concept_dict.semi_nmf import SemiNMF
from concept_dict.top_k_sae import TopKSAE
from hooked_mm.errors import BadInputError
from hooked_mm.store import ActivationStore

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """Rows of planted codes, two words in turn."""
    rng = np.random.default_rng(0)
    codes = rng.exponential(size=(200, 5)) * (rng.random((200, 5)) < 0.4)
    rows = codes @ rng.standard_normal((5, 12)) + 0.1 * rng.standard_normal((200, 12))
    samples = [{"sample": f"s{n}", "sample_number": n} for n in range(200)]
    table = [{"sample": f"s{n}", "word": ("red", "blue")[n % 2]} for n in range(200)]
    path = tmp_path_factory.mktemp("learning") / "s"
    return ActivationStore.from_arrays(path, {"h": torch.as_tensor(rows).half()}, table, samples, {"model": "none"})


@pytest.mark.parametrize(
    "method", [NonNegativeDictionary(max_iter=20), KMeans(n_init=2), PCA(), TopKSAE(max_iter=3, active=2)]
)
def test_learns_what_a_fit_gives(store: ActivationStore, tmp_path: Path, method: Decomposition) -> None:
    """For every k and seed, saved with where the rows came from; figures are those of the rows."""
    learnt = learn(store, "h", method, tmp_path, k=[3, 5], seeds=[0, 1])
    chance = "random_state" in method.get_params()
    assert [(one.k, one.seed) for one in learnt] == [(k, s) for k in (3, 5) for s in ([0, 1] if chance else [None])]
    rows = store.activations("h")
    for one in learnt:
        got = ConceptDictionary.load(one.folder)
        assert (got.hook, got.made_by["model"]) == ("h", "none")
        settings = {"n_components": one.k, **({"random_state": one.seed} if chance else {})}
        plain = type(method)(**{**method.get_params(), **settings}).fit(rows)
        assert torch.equal(got.concepts, plain.components_)
        active = got.transform(rows)
        rest = (rows.double() - got.decomposition.mean_ - active.double() @ got.concepts.double()).norm()
        if not isinstance(method, KMeans):
            size = (rows.double() - rows.double().mean(0)).norm()
            assert one.relative_error == pytest.approx(float(rest / size), rel=1e-3)
        assert one.active == pytest.approx(float((active != 0).sum(1).double().mean()))
        assert one.name in table(learnt)


def test_a_run_that_was_cut_off_goes_on(store: ActivationStore, tmp_path: Path) -> None:
    """What is there is left as it is; only what is missing is learnt."""
    learn(store, "h", PCA(), tmp_path, k=[2])
    before = (tmp_path / "PCA-k2" / "dictionary.json").stat().st_mtime_ns
    assert [one.k for one in learn(store, "h", PCA(), tmp_path, k=[2, 3])] == [3]
    assert (tmp_path / "PCA-k2" / "dictionary.json").stat().st_mtime_ns == before
    assert learn(store, "h", PCA(), tmp_path, k=[2, 3]) == []


def test_part_of_a_store(store: ActivationStore, tmp_path: Path) -> None:
    """Rows of one word."""
    part = store.where(word="red")
    learn(part, "h", PCA(), tmp_path, k=[2])
    expected = PCA(2).fit(store.activations("h")[::2]).components_
    torch.testing.assert_close(ConceptDictionary.load(tmp_path / "PCA-k2").concepts, expected)


@pytest.mark.parametrize("method", [SemiNMF(), NonNegativeDictionary(tol=1e-4)])
def test_a_start_saves_steps(store: ActivationStore, tmp_path: Path, method: Decomposition) -> None:
    """From the concepts of an earlier run, by folder or at hand, the end is as good or better after fewer steps."""
    (cold,) = learn(store, "h", method, tmp_path / "cold", k=[4])
    for start in (cold.folder, ConceptDictionary.load(cold.folder)):
        (warm,) = learn(store, "h", method, tmp_path / f"warm-{type(start).__name__}", start=start)
        assert (warm.k, warm.name) == (4, cold.name)
        assert warm.steps < cold.steps
        histories = [
            ConceptDictionary.load(one.folder).decomposition.objective_history_  # type: ignore[attr-defined]
            for one in (cold, warm)
        ]
        assert histories[1][-1] <= histories[0][-1] * (1 + 1e-9)
        assert "start" in ConceptDictionary.load(warm.folder).made_by


def test_a_start_that_can_not_be(store: ActivationStore, tmp_path: Path) -> None:
    """Another hook, another width, another k, a method that takes none; nothing is learnt."""
    fitted = SemiNMF(4).fit(store.activations("h"))
    narrow = SemiNMF(4).fit(store.activations("h")[:, :7])
    for start, method, k, said in [
        (ConceptDictionary(fitted, "g"), SemiNMF(), [4], "concepts of 'g', not of 'h'"),
        (ConceptDictionary(narrow, "h"), SemiNMF(), [4], "width 7, the rows 12"),
        (ConceptDictionary(fitted, "h"), SemiNMF(), [4, 5], r"has 4 concepts, but k=\[4, 5\]; give k=\[4\]"),
        (ConceptDictionary(fitted, "h"), PCA(), [4], "PCA can't start from concepts at hand"),
    ]:
        with pytest.raises(BadInputError, match=said):
            learn(store, "h", method, tmp_path / "new", k=k, start=start)
    assert not (tmp_path / "new").exists()


def test_conditions_are_kept(store: ActivationStore, tmp_path: Path) -> None:
    """A dictionary tells which rows it is of."""
    learn(store, "h", PCA(), tmp_path, k=[2], where={"word": "red"})
    made = ConceptDictionary.load(tmp_path / "PCA-k2")
    assert made.made_by["where"] == {"word": "red"}
    torch.testing.assert_close(made.concepts, PCA(2).fit(store.activations("h")[::2]).components_)


def test_curves_lie_over_each_other(store: ActivationStore, tmp_path: Path) -> None:
    """Every dictionary is a run with the same names: the objective step by step, and what came of its settings."""
    learnt = learn(store, "h", SemiNMF(max_iter=5), tmp_path, k=[2, 3])
    # As if the first had been cut off and begun anew.
    (learnt[0].folder / "dictionary.json").unlink()
    learn(store, "h", SemiNMF(max_iter=5), tmp_path, k=[2, 3])
    assert {path.name for path in (tmp_path / "log").iterdir()} == {one.name for one in learnt}
    for one in learnt:
        events = EventAccumulator(str(tmp_path / "log" / one.name)).Reload()
        objective = events.Scalars("objective")
        assert [event.step for event in objective] == list(range(1, one.steps + 1))
        made = ConceptDictionary.load(one.folder).decomposition
        expected = made.objective_history_[1:-1]  # type: ignore[attr-defined]
        np.testing.assert_allclose([event.value for event in objective], expected, rtol=1e-6)
        (error,) = events.Scalars("result/relative error")
        assert (error.step, error.value) == (one.k, pytest.approx(one.relative_error))
        assert "_hparams_/session_start_info" in events.summary_metadata


def test_refusals(store: ActivationStore, tmp_path: Path) -> None:
    """No k, more concepts than rows."""
    with pytest.raises(BadInputError, match="at least one of each"):
        list(variants(PCA(), [], [0]))
    with pytest.raises(BadInputError, match="number of rows, 200"):
        learn(store, "h", KMeans(), tmp_path, k=[201])


SCRIPT = """
    import sys
    sys.path.insert(0, {root!r})
    from concept_dict.learning import learn
    from concept_dict.non_negative_dictionary import NonNegativeDictionary
    from hooked_mm.store import ActivationStore
    store = ActivationStore.open(sys.argv[1])
    learn(store, "h", NonNegativeDictionary(), sys.argv[2], k=[5], devices=2, strategy="ddp")
"""


@pytest.mark.slow
def test_two_processes_learn_the_same(store: ActivationStore, tmp_path: Path) -> None:
    """By the Trainer's own ddp."""
    (tmp_path / "run.py").write_text(textwrap.dedent(SCRIPT.format(root=str(ROOT))))
    done = subprocess.run(
        [sys.executable, tmp_path / "run.py", store.path, tmp_path / "two"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    learn(store, "h", NonNegativeDictionary(), tmp_path / "one", k=[5])
    name = "NonNegativeDictionary-k5-seed0"
    one, two = (ConceptDictionary.load(tmp_path / part / name) for part in ("one", "two"))
    assert (one.concepts - two.concepts).abs().max() <= 1e-4
    assert one.decomposition.reconstruction_err_ == pytest.approx(two.decomposition.reconstruction_err_, rel=1e-6)
