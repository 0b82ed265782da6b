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

from concept_dict.decomposition import Decomposition
from concept_dict.dictionary import ConceptDictionary
from concept_dict.kmeans import KMeans
from concept_dict.learning import learn, table, variants
from concept_dict.non_negative_dictionary import NonNegativeDictionary
from concept_dict.pca import PCA
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


@pytest.mark.parametrize("method", [NonNegativeDictionary(), KMeans(), PCA(), TopKSAE(max_iter=3, active=2)])
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
