"""`hooked-mm ground`: options make the files they describe; what is wrong is said in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from concept_dict.dictionary import ConceptDictionary
from concept_dict.ground_command import build_parser, main
from concept_dict.semi_nmf import SemiNMF
from hooked_mm.errors import BadInputError
from hooked_mm.extraction import Extractor
from hooked_mm.extraction_job import extract
from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.dataset import ScenesDataModule
from hooked_mm.scenes.world import COLOURS
from hooked_mm.selectors import TokenOfInterest

HOOK = "blocks.4.hook_resid_post"


@pytest.fixture(scope="module")
def made(llava: HookedMM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stores and a dictionary."""
    folder = tmp_path_factory.mktemp("ground")
    extractor = Extractor(llava, HOOK, TokenOfInterest(tuple(COLOURS)), answer="given")
    fit = extract(extractor, ScenesDataModule(30, style="full"), folder / "fit")
    extract(extractor, ScenesDataModule(30, seed=1, style="full"), folder / "held")
    fitted = SemiNMF(3, max_iter=10, random_state=0).fit(fit.activations(HOOK))
    ConceptDictionary(fitted, HOOK, fit.made_by).save(folder / "dictionary")
    return folder


def _options(made: Path, output: Path, *more: str) -> list[str]:
    return [
        *("--dictionary", str(made / "dictionary"), "--store", str(made / "fit"), "--model.id", "small:llava"),
        *("--output", str(output), "--count", "2", *more),
    ]


def test_options_make_files(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """TensorBoard, page and JSON; facts scored on the held-out store; stopwords of one's own; then it is refused."""
    (tmp_path / "mine.txt").write_text("red\nBlue green")
    options = _options(
        made, tmp_path / "out", "--held_out", str(made / "held"), "--stopwords", str(tmp_path / "mine.txt")
    )
    main(options)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"tensorboard", "report.html", "report.json"}
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(content["concepts"]) == 3
    assert all(len(card["samples"]) == 2 and card["fact"] for card in content["concepts"])
    words = {word["text"] for card in content["concepts"] for word in card["words"]}
    assert not {"red", "blue", "green"} & words
    printed = capsys.readouterr().out
    assert printed.count("concept ") >= 3
    assert "held-out AUROC: " in printed
    tags = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload().Tags()
    assert "metrics/held-out AUROC" in tags["scalars"]
    with pytest.raises(BadInputError, match=r"already holds tensorboard, report.html, report.json"):
        main(options)


def test_metrics_are_asked_of_evaluation(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `evaluate` returns for the names asked for stands in every file."""
    asked: dict[str, Any] = {}

    def evaluate(dictionary: ConceptDictionary, store: Any, held_out: Any, **options: Any) -> dict[str, float]:
        asked.update(options, k=len(dictionary.concepts), held=held_out)
        return {"overlap": 0.25}

    monkeypatch.setitem(sys.modules, "concept_dict.evaluation", SimpleNamespace(evaluate=evaluate))
    main(_options(made, tmp_path / "out", "--where", "none", "--metrics", "[overlap]"))
    assert (asked["metrics"], asked["k"], asked["held"]) == (["overlap"], 3, None)
    assert isinstance(asked["model"], HookedMM)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["metrics"] == {"overlap": 0.25}
    assert "overlap" in (tmp_path / "out" / "report.html").read_text()


def test_yaml(made: Path, tmp_path: Path) -> None:
    """A file says the same as options."""
    (tmp_path / "ground.yaml").write_text("count: 4\nwhere: positions\nmodel: {id: small:llava}\n")
    chosen = build_parser().parse_args(["-c", str(tmp_path / "ground.yaml"), *_options(made, tmp_path / "o")[:-2]])
    assert (chosen.count, chosen.where, chosen.model.id) == (4, "positions", "small:llava")


def test_what_is_wrong_is_told_before_a_model_is_loaded(made: Path, tmp_path: Path) -> None:
    """No dictionary, no list of words; nothing is written."""
    with pytest.raises(BadInputError, match="holds no concept dictionary"):
        main(["--dictionary", str(made), *_options(made, tmp_path / "out")[2:]])
    with pytest.raises(BadInputError, match="no list of stopwords"):
        main(_options(made, tmp_path / "out", "--stopwords", "gone.txt"))
    with pytest.raises(SystemExit):
        main(_options(made, tmp_path / "out", "--where", "everywhere"))
    assert not (tmp_path / "out").exists()
