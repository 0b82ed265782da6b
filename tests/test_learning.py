"""Dictionaries from a store by a Trainer: what a plain fit gives, on one process or two, in parts or at once."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

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
from concept_dict.top_norm import TopNorm
from hooked_mm.errors import BadInputError, UnknownHookError
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


@pytest.mark.parametrize("whiten", [0.0, 0.5])
def test_kmeans_goes_on_from_centres(store: ActivationStore, tmp_path: Path, whiten: float) -> None:
    """From the centres that a fit ended at there is nothing left to do, wherever the rows lie."""
    method = KMeans(whiten=whiten)
    (cold,) = learn(store, "h", method, tmp_path / "cold", k=[4])
    (warm,) = learn(store, "h", method, tmp_path / "warm", start=cold.folder)
    first, again = (ConceptDictionary.load(one.folder).decomposition for one in (cold, warm))
    assert warm.steps <= 2
    torch.testing.assert_close(again.components_, first.components_, rtol=1e-4, atol=1e-4)
    assert warm.relative_error == pytest.approx(cold.relative_error, rel=1e-4)


def test_a_start_that_can_not_be(store: ActivationStore, tmp_path: Path) -> None:
    """Another hook, another width, another k, a method that takes none; nothing is learnt."""
    fitted = SemiNMF(4).fit(store.activations("h"))
    narrow = SemiNMF(4).fit(store.activations("h")[:, :7])
    for start, method, k, said in [
        (ConceptDictionary(fitted, "g"), SemiNMF(), [4], "concepts of 'g', not of 'h'"),
        (ConceptDictionary(narrow, "h"), SemiNMF(), [4], "width 7, the rows 12"),
        (ConceptDictionary(fitted, "h"), SemiNMF(), [4, 5], r"has 4 concepts, but k=\[4, 5\]; give k=\[4\]"),
        (ConceptDictionary(fitted, "h"), PCA(), [4], "PCA can't start from what another fit found"),
        (ConceptDictionary(fitted, "h"), KMeans(), [4], "KMeans starts from centres, and SemiNMF has none"),
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


def test_xl_vlms_fault_unseeded_k_means(store: ActivationStore, tmp_path: Path) -> None:
    """The same seed gives the same centres in another run; the seed stands in the file."""
    runs = [learn(store, "h", KMeans(n_init=1), tmp_path / str(n), k=[5], seeds=[7])[0] for n in range(2)]
    one, two = (ConceptDictionary.load(run.folder) for run in runs)
    assert torch.equal(one.concepts, two.concepts)
    assert one.decomposition.get_params()["random_state"] == 7


def test_xl_vlms_fault_alpha_that_ignores_the_scale(store: ActivationStore, tmp_path: Path) -> None:
    """The same rows in another unit give the same concepts, and activations in that unit."""
    rows, samples = store.activations("h").float(), store.samples.to_pylist()
    table = [{"sample": f"s{n}"} for n in range(200)]
    found = {}
    for unit in (1.0, 1024.0):
        scaled = ActivationStore.from_arrays(tmp_path / f"s{unit}", {"h": rows * unit}, table, samples, {})
        (one,) = learn(scaled, "h", NonNegativeDictionary(alpha=0.1, max_iter=20), tmp_path / f"d{unit}", k=[4])
        made = ConceptDictionary.load(one.folder)
        found[unit] = made.concepts, made.transform(rows * unit) / unit
    torch.testing.assert_close(found[1.0][0], found[1024.0][0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[1.0][1], found[1024.0][1], atol=1e-3, rtol=1e-3)
    assert bool((found[1.0][1] == 0).any())


@pytest.mark.parametrize("method", [NonNegativeDictionary(max_iter=3), KMeans(n_init=1), PCA(), TopNorm()])
def test_xl_vlms_fault_the_whole_matrix_in_memory(
    store: ActivationStore, tmp_path: Path, method: Decomposition, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rows that are not to be held, never more than a chunk is read at a time; concepts are the same."""
    (whole,) = learn(store, "h", method, tmp_path / "whole", k=[3])
    monkeypatch.setattr("concept_dict.rows.HELD_BYTES", 0)
    monkeypatch.setattr("concept_dict.rows.CHUNK", 32)
    read, plain = [], ActivationStore.activations

    def counted(self: ActivationStore, hook: str, rows: Any = slice(None)) -> torch.Tensor:
        found = plain(self, hook, rows)
        read.append(len(found))
        return found

    monkeypatch.setattr(ActivationStore, "activations", counted)
    (parts,) = learn(store, "h", method, tmp_path / "parts", k=[3])
    assert max(read) <= 32
    one, two = (ConceptDictionary.load(run.folder).concepts for run in (whole, parts))
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


def test_xl_vlms_fault_a_layer_that_matches_nothing(store: ActivationStore, tmp_path: Path) -> None:
    """A hook that the store does not hold is refused, and nothing is made."""
    with pytest.raises(UnknownHookError, match="does not hold 'g'"):
        learn(store, "g", PCA(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_xl_vlms_fault_half_precision_arithmetic(store: ActivationStore, tmp_path: Path) -> None:
    """Rows in float16 whose squares float16 can't hold have the concepts of the same rows in float32."""
    rows, samples = (store.activations("h").float() * 200).half(), store.samples.to_pylist()
    assert bool(rows.square().sum(0).isinf().any())
    table, found = [{"sample": f"s{n}"} for n in range(200)], []
    for kind in (torch.float16, torch.float32):
        made = ActivationStore.from_arrays(tmp_path / f"{kind}", {"h": rows.to(kind)}, table, samples, {})
        (one,) = learn(made, "h", PCA(), tmp_path / f"d{kind}", k=[3])
        found.append(ConceptDictionary.load(one.folder).concepts)
    assert found[0].dtype == torch.float32
    assert torch.equal(*found)


def test_xl_vlms_fault_saving_into_a_directory_nobody_made(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders are made; where one can't be that is said before anything is learnt."""
    (one,) = learn(store, "h", PCA(), tmp_path / "not" / "there" / "yet", k=[2])
    assert (one.folder / "dictionary.safetensors").is_file()
    (tmp_path / "file").write_text("here")
    monkeypatch.setattr(PCA, "begin", lambda *_: pytest.fail("the run has begun"))
    with pytest.raises(BadInputError, match=r"output folder .* can't be made"):
        learn(store, "h", PCA(), tmp_path / "file" / "d", k=[2])


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
