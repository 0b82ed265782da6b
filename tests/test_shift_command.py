"""`hooked-mm shift`: two models and data, or two stores and a dictionary, become tables, pages and vectors."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from concept_dict.dictionary import ConceptDictionary
from concept_dict.kmeans import KMeans
from concept_dict.shift_command import build_parser, main
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.small import small_model_path
from hooked_mm.steering_vector import load_vectors
from hooked_mm.store import ActivationStore
from tests.pages import DOCS, broken_links, run_page

HOOK = "blocks.2.hook_resid_post"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run from two models, of two numbers of concepts; and what it printed."""
    folder = tmp_path_factory.mktemp("shift") / "runs" / "not" / "there" / "yet"
    loads = []
    patch, capture = pytest.MonkeyPatch(), pytest.MonkeyPatch()
    real = HookedMM.from_pretrained.__func__  # type: ignore[attr-defined]

    def counted(cls: type, path: object, **options: object) -> HookedMM:
        loads.append(path)
        return real(cls, path, **options)

    lines: list[str] = []
    patch.setattr(HookedMM, "from_pretrained", classmethod(counted))
    # Whether a model is what it seems is tested elsewhere.
    patch.setattr(HookedMM, "_check_on", lambda *_: None)
    capture.setattr("builtins.print", lambda *values, **_: lines.append(" ".join(map(str, values))))
    try:
        main(
            [
                *("--original.id", "small:llava", "--tuned.id", "small:llava", "--tuned.adapter", "place"),
                *("--data", "ScenesDataModule", "--data.size", "60", "--hook", HOOK, "--selector", "TokenOfInterest"),
                *("--selector.words", "[red, blue, green, white, black, snow, sea, city]", "--answer", "given"),
                *("--k", "[2, 3]", "--enough", "5", "--count", "2", "--words", "4", "--output", str(folder)),
            ]
        )
    finally:
        patch.undo()
        capture.undo()
    assert len(loads) == 1
    return folder, "\n".join(lines)


def test_what_is_there(run: tuple[Path, str]) -> None:
    """Tables of all studies; per study dictionaries, vectors, a page and a run of TensorBoard."""
    folder, printed = run
    names = {"extracted", "KMeans-k2", "KMeans-k3", "concepts.csv", "forms.csv", "comparisons.csv", "shift.json"}
    assert {path.name for path in folder.iterdir()} == names
    with (folder / "concepts.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["study"] for row in rows] == ["KMeans-k2"] * 2 + ["KMeans-k3"] * 3
    assert all(len(row["words"].split(", ")) == 4 for row in rows)
    assert [found["study"] for found in json.loads((folder / "shift.json").read_text())] == ["KMeans-k2", "KMeans-k3"]
    one = folder / "KMeans-k3"
    assert {path.name for path in one.iterdir()} == {
        *("dictionary", "tuned_dictionary", "vectors", "report.html", "tensorboard")
    }
    assert "data:image/png" in (one / "report.html").read_text()
    assert EventAccumulator(str(one / "tensorboard")).Reload().Tags()["scalars"]
    assert "pairs of rows by position" in printed
    assert printed.count("report.html") == 2


def test_vectors_by_hand(run: tuple[Path, str], llava: HookedMM) -> None:
    """The saved vectors are the mean movements of the samples that the saved dictionary groups."""
    folder, _ = run
    made = ConceptDictionary.load(folder / "KMeans-k2" / "dictionary")
    stores = [ActivationStore.open(folder / "extracted" / name) for name in ("original", "tuned")]
    a, b = (store.activations(HOOK).double() for store in stores)
    assert stores[0].made_by["adapter"] is None
    assert stores[1].made_by["adapter"] == "place"
    groups = made.transform(a.float()).argmax(1)
    everywhere = torch.stack([(b - a)[groups == k].mean(0) for k in range(2)])
    vectors = load_vectors(folder / "KMeans-k2" / "vectors")
    assert vectors[0].made_from["tuned"]["adapter"] == "place"
    rows = [vector.made_from["rows"] for vector in vectors]
    assert rows[0] == sum(rows[1:]) < len(a)
    for vector, mean in zip(vectors[1:], everywhere, strict=True):
        # Of three tenths of the samples, so near the mean of all, and not equal to it.
        assert torch.cosine_similarity(vector.values.double(), mean, dim=0) > 0.9
    assert vectors[1].intervention(model=llava).point == HOOK


def test_stores_and_a_dictionary(run: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without models words are left out; a dictionary of the same data is told of; rows are chosen as it was learnt."""
    folder, _ = run
    store = ActivationStore.open(folder / "extracted" / "original")
    fitted = KMeans(3, random_state=0).fit(store.where(word=["red", "blue", "green", "white"]).activations(HOOK))
    where = {"word": ["red", "blue", "green", "white"]}
    ConceptDictionary(fitted, HOOK, {**store.made_by, "where": where}).save(tmp_path / "colours")
    options = [
        *("--original_store", str(folder / "extracted" / "original"), "--enough", "5"),
        *("--tuned_store", str(folder / "extracted" / "tuned"), "--dictionary", f"[{tmp_path / 'colours'}]"),
    ]
    main([*options, "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "those whose word is red or blue or green or white" in printed
    assert "scores may be in sample" in printed
    found = json.loads((tmp_path / "out" / "shift.json").read_text())
    assert [one["study"] for one in found] == ["colours"]
    assert not (tmp_path / "out" / "colours" / "dictionary").exists()
    saved = ConceptDictionary.load(tmp_path / "out" / "colours" / "tuned_dictionary").decomposition
    assert len(saved.components_) == 3
    assert not np.isclose(saved.components_, fitted.components_).all()
    with pytest.raises(BadInputError, match=r"already holds concepts\.csv, forms\.csv, comparisons\.csv, shift\.json"):
        main([*options, "--output", str(tmp_path / "out")])
    before = (tmp_path / "out" / "shift.json").read_text()
    main([*options, "--output", str(tmp_path / "out"), "--resume"])
    assert (tmp_path / "out" / "shift.json").read_text() == before


REFUSED = {
    "nothing to compare": "--hook h",
    "only --original_store is given": "--hook h --original_store a",
    "only --tuned is given": "--hook h --original_store a --tuned_store b --tuned.id x",
    "--data is given beside two stores": "--hook h --original_store a --tuned_store b --data ScenesDataModule",
    "give --hook, or a --dictionary": "--original_store a --tuned_store b",
    "two dictionaries are called 'x'": "--original_store a --tuned_store b --dictionary [a/x,b/x]",
    r"shares=\[0.5, 0.5\]; there are 3 parts: learn, shift, measure": (
        "--hook h --original_store a --tuned_store b --shares [0.5,0.5]"
    ),
}


def test_xl_vlms_fault_saving_into_a_directory_nobody_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that can't be made is refused before anything is loaded (those that can are made, see `run`)."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(HookedMM, "from_pretrained", None)
    options = "--original.id small:llava --tuned.id small:llava --data ScenesDataModule --selector LastPrompt --hook h"
    with pytest.raises(BadInputError, match="can't be made"):
        main([*options.split(), "--output", str(tmp_path / "file" / "out")])


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals(reason: str, tmp_path: Path) -> None:
    """Before anything runs or is made."""
    with pytest.raises(BadInputError, match=reason):
        main([*REFUSED[reason].split(), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("unchecked")
def test_models_of_other_stores(run: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Words of another model than the stores' are told of."""
    folder, _ = run
    stores = [str(folder / "extracted" / name) for name in ("original", "tuned")]
    (tmp_path / "other").symlink_to(small_model_path("llava"))
    models = [f"--{name}.id={tmp_path / 'other'}" for name in ("original", "tuned")]
    options = ["--original_store", stores[0], "--tuned_store", stores[1], "--hook", HOOK, "--k", "[2]", *models]
    main([*options, "--output", str(tmp_path / "out")])
    assert re.search(
        r"words: decoded by '.*other', but the store names '.*llava' as its model", capsys.readouterr().out
    )


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """Both extract; one makes the tables, which are those of one process."""
    shared = [
        *("--original.id", "small:llava", "--tuned.id", "small:llava", "--tuned.adapter", "place", "--hook", HOOK),
        *("--data", "ScenesDataModule", "--data.size", "40", "--selector", "LastPrompt", "--answer", "none"),
        *("--k", "[2]", "--enough", "5", "--words", "4", "--count", "1"),
    ]
    program = Path(sys.executable).with_name("hooked-mm")
    printed = []
    for count in (1, 2):
        how = f"{{accelerator: cpu, devices: {count}{', strategy: ddp' if count > 1 else ''}}}"
        command = [str(program), "shift", *shared, "--trainer", how, "--output", str(tmp_path / str(count))]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    assert [text.count("report.html") for text in printed] == [1, 1]
    one, two = ([*csv.DictReader((tmp_path / str(n) / "forms.csv").open())] for n in (1, 2))
    for row, again in zip(one, two, strict=True):
        for name in ("cosine", "distance", "words", "samples"):
            assert float(row[name]) == pytest.approx(float(again[name]), rel=1e-3)


def test_settings_can_be_written_down(tmp_path: Path) -> None:
    """What `--print_config` writes is read again by `-c`."""
    options = ["--hook", "h", "--method", "PCA", "--average", "median", "--alpha", "2", "--output", str(tmp_path)]
    parser = build_parser()
    (tmp_path / "shift.yaml").write_text(parser.dump(parser.parse_args(options)))
    again = parser.instantiate(parser.parse_args(["-c", str(tmp_path / "shift.yaml")]))
    assert (again.average, again.alpha, type(again.method).__name__) == ("median", 2.0, "PCA")


@pytest.mark.usefixtures("loaded", "unchecked")
def test_the_page_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its command and its Python in their order; the steered model says the place alone; links lead somewhere."""
    monkeypatch.chdir(tmp_path)
    names = run_page("shift.md", shift=main)
    assert names["steered"] == names["by_concept"] == [f"in the {names['scene'].columns['place']} ."]
    assert names["gained"].low > 0
    for left in re.findall(
        r"^\| `(KMeans[^|]+|[^|]*csv[^|]+|extracted[^|]+)\|", (DOCS / "shift.md").read_text(), re.MULTILINE
    ):
        for place in re.findall(r"[\w./-]+", left):
            assert (tmp_path / "runs" / "shift" / place).exists(), place
    assert not broken_links("shift.md", web=True)
