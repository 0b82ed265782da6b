"""`hooked-mm ground`: options make the files they describe; what is wrong is said in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from concept_dict.dictionary import ConceptDictionary
from concept_dict.ground_command import build_parser, main
from concept_dict.grounding import top_words
from concept_dict.learn_command import main as learn
from concept_dict.metrics import pool_samples
from concept_dict.semi_nmf import SemiNMF
from hooked_mm.errors import BadInputError
from hooked_mm.extraction import Extractor
from hooked_mm.extraction_job import extract
from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.dataset import SceneDataset, ScenesDataModule
from hooked_mm.scenes.world import COLOURS
from hooked_mm.selectors import LastPrompt, TokenOfInterest
from hooked_mm.store import ActivationStore
from tests.pages import broken_links, run_page

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


@pytest.mark.usefixtures("loaded")
def test_metrics_are_asked_of_evaluation(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets the dictionary, the held-out samples and those that choose, words; its single numbers stand in
    every file, its tables do not.
    """
    asked: dict[str, Any] = {}

    def evaluate(dictionary: ConceptDictionary, evidence: Any, metrics: list[str]) -> dict[str, Any]:
        asked.update(vars(evidence), k=len(dictionary.concepts), metrics=metrics)
        return {"overlap/samples": 0.25, "overlap/all": np.zeros(3)}

    def samples(store: ActivationStore, hook: str, images: Any = None) -> tuple[Path, str]:
        return store.path, hook

    def evidence(held_out: Any, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(held_out=held_out, **options)

    fakes = {
        "evaluation": SimpleNamespace(evaluate=evaluate),
        "evidence": SimpleNamespace(Evidence=evidence, Samples=SimpleNamespace(of=samples)),
        "answer_rows": SimpleNamespace(),
    }
    for name, module in fakes.items():
        monkeypatch.setitem(sys.modules, f"concept_dict.{name}", module)
    more = ("--held_out", str(made / "held"), "--in_pictures", "none", "--metrics", "[overlap]", "--clip", "my/clip")
    main(_options(made, tmp_path / "out", *more))
    assert (asked["metrics"], asked["k"], asked["clip"]) == (["overlap"], 3, Path("my/clip"))
    assert (asked["held_out"], asked["fitted"]) == ((made / "held", HOOK), (made / "fit", HOOK))
    assert [len(words) for words in asked["words"]] == [5, 5, 5]
    assert asked["model"] is None
    metrics = json.loads((tmp_path / "out" / "report.json").read_text())["metrics"]
    assert metrics["overlap/samples"] == 0.25
    assert set(metrics) == {"overlap/samples", "held-out AUROC", "its chance"}
    assert "overlap/samples" in (tmp_path / "out" / "report.html").read_text()


def test_words_alone_need_two_shards_of_a_checkpoint(
    made: Path, llava: HookedMM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All other shards are rubbish; the words are the whole model's, and the report says how many bytes were read."""
    folder = tmp_path / "model"
    llava.hf_model.save_pretrained(folder, max_shard_size="400KB")
    llava.tokenizer.save_pretrained(folder)
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {weight_map[name] for name in weight_map if name.endswith(("lm_head.weight", "model.norm.weight"))}
    for shard in set(weight_map.values()) - needed:
        (folder / shard).write_bytes(b"rubbish")
    monkeypatch.setattr(HookedMM, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    main([*_options(made, tmp_path / "out", "--in_pictures", "none"), "--model.id", str(folder)])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    dictionary = ConceptDictionary.load(made / "dictionary")
    expected = top_words(llava, dictionary.concepts, 5)
    told = [[(word["text"], word["probability"]) for word in card["words"]] for card in report["concepts"]]
    assert told == [[(word.text, word.probability) for word in words] for words in expected]
    bytes_read = (1 + llava.cfg.d_vocab) * llava.cfg.d_model * 4
    assert f"read {bytes_read:,} of" in json.dumps(report)
    assert 1 <= len(needed) < len(set(weight_map.values())) / 4


@pytest.fixture(scope="module")
def mixed(llava: HookedMM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the rows of two selectors, and a dictionary of those of one."""
    folder = tmp_path_factory.mktemp("mixed")
    selectors = {"colour": TokenOfInterest(tuple(COLOURS)), "last": LastPrompt()}
    extract(Extractor(llava, HOOK, selectors, answer="given"), ScenesDataModule(16, style="full"), folder / "fit")
    options = ["--store", str(folder / "fit"), "--hook", HOOK, "--method", "SemiNMF", "--k", "[2]"]
    learn([*options, "--where", "{selector: colour}", "--output", str(folder), "--trainer.accelerator=cpu"])
    (folder / "SemiNMF-k2-seed0").rename(folder / "dictionary")
    return folder


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize(
    ("more", "chosen", "said"),
    [
        ((), {"selector": "colour"}, "those whose selector is colour"),
        (("--where", "{selector: last}"), {"selector": "last"}, "those whose selector is last"),
        (("--where", "{}"), {}, "all (of the selectors colour, last)"),
    ],
)
def test_rows_are_those_of_the_dictionary(
    mixed: Path, tmp_path: Path, more: tuple[str, ...], chosen: dict[str, Any], said: str
) -> None:
    """A store of several selectors is shown by the rows that the dictionary was learnt from, unless others are asked
    for; the report says which.
    """
    main(_options(mixed, tmp_path / "out", "--in_pictures", "none", *more))
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    store = ActivationStore.open(mixed / "fit").where(**chosen)
    assert content["facts"]["rows"] == said
    assert content["settings"]["rows"] == len(store) > 0
    made = ConceptDictionary.load(mixed / "dictionary")
    for card in content["concepts"]:
        pooled = pool_samples(made.transform(store.activations(HOOK)), store.row_samples(), 16)[:, card["concept"]]
        best = np.sort(pooled)[::-1][:2]
        np.testing.assert_allclose([sample["activation"] for sample in card["samples"]], best[best > 0], rtol=1e-5)


def test_explain_looks_where_the_dictionary_does(mixed: Path, llava: HookedMM) -> None:
    """At the positions of its own selector, not of all that wrote into the store."""
    found = ConceptDictionary.load(mixed / "dictionary").explain(llava, *_sample(), how="none")
    assert "TokenOfInterest" in found.selector
    assert "LastPrompt" not in found.selector


def _sample() -> tuple[Any, str, str]:
    sample = SceneDataset(3, style="full")[1]
    assert isinstance(sample.answer, str)
    return sample.images, sample.text, sample.answer


@pytest.mark.usefixtures("loaded")
def test_faithfulness_is_bounded(mixed: Path, tmp_path: Path) -> None:
    """One position of as many samples as asked for; deleting the main concepts hurts, and the figures are shown."""
    output = tmp_path / "out"
    more = ("--in_pictures", "none", "--metrics", "[faithfulness]", "--faithfulness_samples", "6")
    main(_options(mixed, output, *more))
    content = json.loads((output / "report.json").read_text())
    assert content["metrics"]["faithfulness/positions"] == 6
    assert content["metrics"]["faithfulness/delete"] < content["metrics"]["faithfulness/delete_random_dictionary"]
    assert "faithfulness/positions" in (output / "report.html").read_text()
    with pytest.raises(BadInputError, match="faithfulness_samples=0"):
        main(_options(mixed, tmp_path / "none", "--metrics", "[faithfulness]", "--faithfulness_samples", "0"))


def test_xl_vlms_fault_saving_into_a_directory_nobody_made(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a folder can't be made that is said before a model is loaded."""
    (tmp_path / "file").write_text("here")
    monkeypatch.setattr(HookedMM, "small", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(BadInputError, match=r"output folder .* can't be made"):
        main(_options(made, tmp_path / "file" / "out"))


def test_yaml(made: Path, tmp_path: Path) -> None:
    """A file says the same as options."""
    (tmp_path / "ground.yaml").write_text("count: 4\nin_pictures: positions\nmodel: {id: small:llava}\n")
    chosen = build_parser().parse_args(["-c", str(tmp_path / "ground.yaml"), *_options(made, tmp_path / "o")[:-2]])
    assert (chosen.count, chosen.in_pictures, chosen.model.id) == (4, "positions", "small:llava")


def test_what_is_wrong_is_told_before_a_model_is_loaded(made: Path, tmp_path: Path) -> None:
    """No dictionary, no list of words; nothing is written."""
    with pytest.raises(BadInputError, match="holds no concept dictionary"):
        main(["--dictionary", str(made), *_options(made, tmp_path / "out")[2:]])
    with pytest.raises(BadInputError, match="no list of words"):
        main(_options(made, tmp_path / "out", "--stopwords", "gone.txt"))
    with pytest.raises(SystemExit):
        main(_options(made, tmp_path / "out", "--in_pictures", "everywhere"))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("loaded")
def test_the_page_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Python and its command in their order; shapes in comments are the real ones; its links lead somewhere."""
    monkeypatch.chdir(tmp_path)
    names = run_page("concepts.md", ground=main)
    assert {"report.html", "report.json", "tensorboard"} == {path.name for path in Path("runs/grounded").iterdir()}
    assert names["strongest"].where[0].values.shape == (8, 8)
    assert names["activations"].shape == (len(names["held_out"]), 12)
    assert Path("runs/explained.png").is_file()
    assert not broken_links("concepts.md")
