"""The demo: what it prints is measured, what it writes is there, and concepts are better than chance."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from concept_dict.demo import load, main
from concept_dict.dictionary import ConceptDictionary
from concept_dict.metrics import pool_samples
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.language import DESCRIBED, WORD_CLASSES
from hooked_mm.small import small_model_path
from hooked_mm.store import ActivationStore


@pytest.fixture(scope="module")
def loaded(llava: HookedMM) -> Iterator[None]:
    """The shipped LLaVA, which is not loaded and checked again; other names are looked up as ever."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("concept_dict.demo.load", lambda name: llava if name == "llava" else load(name))
        yield


@pytest.fixture(scope="module")
def made(loaded: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo on few scenes."""
    folder = tmp_path_factory.mktemp("demo")
    main(["--output", str(folder), "--samples", "90", "--held_out", "60", "--n_components", "14"])
    return folder


def test_the_scores_are_those_of_scikit_learn_on_the_held_out_scenes(made: Path) -> None:
    """Recomputed from the files alone: dictionary, held-out store, and the facts in its table."""
    report = json.loads((made / "report.json").read_text())
    dictionary = ConceptDictionary.load(made / "dictionary")
    held = ActivationStore.open(made / "held_out")
    activations = dictionary.transform(held.activations(dictionary.hook))
    facts = held.samples.column("facts").to_pylist()
    pooled = pool_samples(activations, held.row_samples(), len(facts))
    for card in report["concepts"]:
        truth = [card["fact"] in found for found in facts]
        expected = roc_auc_score(truth, pooled[:, card["concept"]])
        assert card["held_out_auroc"] == pytest.approx(expected, abs=1e-9)


def test_concepts_match_the_truth_and_chance_does_not(made: Path) -> None:
    """On average far above the shuffled labels, and most attributes are found."""
    concepts = json.loads((made / "report.json").read_text())["concepts"]
    assert np.mean([card["held_out_auroc"] for card in concepts]) > 0.85
    assert abs(np.mean([card["shuffled_auroc"] for card in concepts]) - 0.5) < 0.05
    assert len({card["fact"] for card in concepts}) >= 12
    # A concept that ranks nineteen of twenty pairs right is one fact's own, and so its first word is that fact's;
    # below, concepts stand for two facts at once, and either's word may come first.
    sure = [card for card in concepts if card["held_out_auroc"] > 0.95]
    named = [card for card in sure if card["fact"].split("=")[0] in ("colour", "shape")]
    assert len(named) >= 5
    assert np.mean([card["words"][0]["text"] == card["fact"].split("=")[1] for card in named]) > 0.8


def test_everything_is_written(made: Path) -> None:
    """Stores, dictionary, TensorBoard, page and JSON, and nothing else."""
    assert {path.name for path in made.iterdir()} == {
        "activations",
        "held_out",
        "dictionary",
        "tensorboard",
        "report.html",
        "report.json",
    }
    assert ActivationStore.open(made / "activations").samples.num_rows == 90
    page = (made / "report.html").read_text()
    assert page.count("<section") == 14
    assert page.count("data:image/png") > 100


@pytest.mark.usefixtures("loaded")
def test_the_table_and_where_to_look(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """One line per concept with its words, fact and two scores; a second run replaces the first; the end says where."""
    (tmp_path / "mine.txt").write_text("keep me")
    sizes = ["--samples", "24", "--held_out", "20", "--n_components", "3"]
    arguments = ["--output", str(tmp_path), *sizes, "--layer", "4"]
    main(arguments)
    main(arguments)
    text = capsys.readouterr().out
    lines = re.findall(r"^ +(\d+)  .*\w+=[\w ]+? +(\d\.\d{3}) +(\d\.\d{3})$", text, re.MULTILINE)
    assert [int(line[0]) for line in lines] == [*range(3), *range(3)]
    assert lines[:3] == lines[3:], "the same seed gives the same table"
    assert "blocks.4.hook_resid_post" in text
    assert f"tensorboard --logdir {tmp_path / 'tensorboard'}" in text
    assert (tmp_path / "mine.txt").read_text() == "keep me"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--layer", "6"], "layer=6 is outside this model's 6 layers"),
        (["--model", "lava"], "no small model 'lava'; nearest: llava"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: list[str], reason: str) -> None:
    """Refused before anything is written."""
    with pytest.raises(BadInputError, match=reason):
        main(["--output", str(tmp_path / "new"), *arguments])
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("model", ["idefics2", pytest.param("qwen2_vl", marks=pytest.mark.slow)])
def test_every_small_model(model: str, tmp_path: Path) -> None:
    """Nothing is LLaVA's own: attribute words are found in the other models' captions, and concepts in them."""
    main(["--model", model, "--output", str(tmp_path), "--samples", "40", "--held_out", "30", "--n_components", "6"])
    store = ActivationStore.open(tmp_path / "activations")
    # Full captions of two objects on average name four attributes each, and the place.
    assert len(store) > 40 * 6
    concepts = json.loads((tmp_path / "report.json").read_text())["concepts"]
    assert np.mean([card["held_out_auroc"] for card in concepts]) > 0.6


def test_attributes_stand_behind_the_noun(made: Path) -> None:
    """Where an attribute is predicted no earlier word gives it away: "a ring that is big and red at the top left"."""
    store = ActivationStore.open(made / "activations")
    texts = store.samples.column("text").to_pylist()
    assert np.mean(["that is" in text for text in texts]) > 0.95
    words = {word for name in DESCRIBED for word in WORD_CLASSES[name]}
    assert set(store.rows.column("word").to_pylist()) == words


def test_a_folder_is_taken_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A path is loaded as it is; a folder that happens to have a shipped model's name does not hide that."""
    asked: list[str] = []
    monkeypatch.setattr(HookedMM, "from_pretrained", lambda folder, **options: asked.append(str(folder)))
    load(str(tmp_path))
    (tmp_path / "llava").mkdir()
    monkeypatch.chdir(tmp_path)
    load("llava")
    assert asked == [str(tmp_path), str(small_model_path("llava"))]
