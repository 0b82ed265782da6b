"""`hooked-mm learn`: options and YAML make the run they describe."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from concept_dict.dictionary import ConceptDictionary
from concept_dict.learn_command import build_parser, main
from hooked_mm.store import ActivationStore


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    """A store of forty rows, and what every run needs."""
    rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    samples = [{"sample": f"s{n}", "sample_number": n, "place": ("sea", "snow")[n % 2]} for n in range(40)]
    ActivationStore.from_arrays(tmp_path / "s", {"h": rows}, [{"sample": f"s{n}"} for n in range(40)], samples, {})
    return ["--store", str(tmp_path / "s"), "--hook", "h", "--output", str(tmp_path / "d"), "--trainer.accelerator=cpu"]


def test_options(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Several k and seeds of a method with settings, on part of the rows; a table; scalars; then nothing is left."""
    chosen = ["--method", "KMeans", "--method.n_init", "2", "--k", "[2, 3]", "--seeds", "[0, 1]"]
    main([*options, *chosen, "--where", "{place: sea}"])
    printed = capsys.readouterr().out
    assert "KMeans-k2-seed1" in printed
    made = ConceptDictionary.load(tmp_path / "d" / "KMeans-k3-seed1").decomposition
    assert (made.n_components, made.get_params()["n_init"], made.get_params()["random_state"]) == (3, 2, 1)
    rows = ActivationStore.open(tmp_path / "s").activations("h")[::2]
    torch.testing.assert_close(made.mean_, rows.mean(0))
    assert len(list((tmp_path / "d" / "log").glob("*/events*"))) == 4
    main([*options, *chosen])
    assert "already" in capsys.readouterr().out


def test_a_start(options: list[str], tmp_path: Path) -> None:
    """As many concepts as the start has, unless told."""
    main([*options, "--method", "SemiNMF", "--method.max_iter", "5", "--k", "[3]"])
    start = tmp_path / "d" / "SemiNMF-k3-seed0"
    main([*options[:4], "--output", str(tmp_path / "again"), "--method", "SemiNMF", "--start", str(start), options[-1]])
    assert ConceptDictionary.load(tmp_path / "again" / "SemiNMF-k3-seed0").made_by["start"] == str(start)


def test_rows_of_several_selectors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is said that they are mixed, and how not to."""
    values, samples = torch.randn(8, 4), [{"sample": f"s{n}", "sample_number": n} for n in range(4)]
    rows = [{"sample": f"s{n // 2}", "selector": ("last", "word")[n % 2]} for n in range(8)]
    ActivationStore.from_arrays(tmp_path / "s", {"h": values}, rows, samples, {})
    made = ["--store", str(tmp_path / "s"), "--hook", "h", "--trainer.accelerator=cpu", "--method", "PCA", "--k", "[2]"]
    main([*made, "--output", str(tmp_path / "mixed")])
    assert "rows: all (of the selectors last, word); one selector's alone" in capsys.readouterr().out
    main([*made, "--output", str(tmp_path / "one"), "--where", "{selector: word}"])
    assert "selectors" not in capsys.readouterr().out
    found = ConceptDictionary.load(tmp_path / "one" / "PCA-k2")
    torch.testing.assert_close(found.decomposition.mean_, values[1::2].mean(0))
    assert found.made_by["where"] == {"selector": "word"}


def test_yaml(options: list[str], tmp_path: Path) -> None:
    """A file says the same."""
    (tmp_path / "learn.yaml").write_text("method: {class_path: PCA, init_args: {center: false}}\nk: [2]\n")
    main(["-c", str(tmp_path / "learn.yaml"), *options])
    assert not ConceptDictionary.load(tmp_path / "d" / "PCA-k2").decomposition.mean_.any()


@pytest.mark.parametrize("activation", ["one_hot", "inverse_distance", "cosine"])
def test_xl_vlms_fault_one_activation_of_k_means(options: list[str], tmp_path: Path, activation: str) -> None:
    """1 / (1 + distance) is one choice of three, and kept with the dictionary."""
    main([*options, "--method", "KMeans", "--method.activation", activation, "--k", "[2]"])
    made = ConceptDictionary.load(tmp_path / "d" / "KMeans-k2-seed0")
    found = made.transform(ActivationStore.open(tmp_path / "s").activations("h"))
    kinds = {"one_hot": bool((found == 0).any()), "cosine": bool((found < 0).any())}
    assert made.decomposition.get_params()["activation"] == activation
    assert kinds == {"one_hot": activation == "one_hot", "cosine": activation == "cosine"}


def test_every_method_is_offered(options: list[str]) -> None:
    """By its name."""
    for name in ("SemiNMF", "NonNegativeDictionary", "KMeans", "PCA", "TopNorm", "TopKSAE"):
        assert build_parser().parse_args([*options, "--method", name]).method.class_path.endswith(name)
