"""All data modules alike: by options of a command, and through an extraction."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser
from PIL import Image

from hooked_mm import datasets
from hooked_mm.data import SampleDataModule
from hooked_mm.datasets import (
    TEMPLATES,
    ArrowFolder,
    Coco,
    ImageFolder,
    Mmvp,
    Selection,
    Slake,
    TableDataModule,
    VqaRad,
    VqaV2,
)
from hooked_mm.errors import StoreError
from hooked_mm.extraction import Extractor
from hooked_mm.extraction_job import extract
from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.captions import right_captions
from hooked_mm.scenes.dataset import ScenesDataModule
from hooked_mm.scenes.world import COLOURS, Scene
from hooked_mm.selectors import LastPrompt, TokenOfInterest
from hooked_mm.store_writer import StoreWriter
from tests.official import (
    MMVP,
    arrow_rows,
    coco_official,
    dump,
    jsonl,
    save_to_disk,
    slake,
    vqa_annotations,
    vqa_questions,
    vqa_rad,
)
from tests.test_house import imported


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """One data set of each kind."""
    dump(tmp_path / "captions.json", coco_official())
    dump(tmp_path / "questions.json", vqa_questions())
    dump(tmp_path / "answers.json", vqa_annotations())
    (tmp_path / "Questions.csv").write_text(MMVP)
    dump(tmp_path / "rad.json", vqa_rad())
    dump(tmp_path / "slake.json", slake())
    jsonl(tmp_path / "own.jsonl")
    save_to_disk(tmp_path / "set", arrow_rows())
    return tmp_path


def parsed(arguments: list[str]) -> SampleDataModule:
    """The data module that a command's arguments make."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(SampleDataModule, "data")
    return parser.instantiate(parser.parse_args(arguments)).data


CASES: dict[type[TableDataModule], tuple[list[str], dict[str, Any], list[str]]] = {
    Coco: (
        ["annotations=captions.json", "images=val2014", "per=caption", "template=llava-caption"],
        {"words": ["woman", "chef's knife"], "limit": 2},
        ["coco-522418-771337", "coco-522418-771338"],
    ),
    VqaV2: (
        ["questions=questions.json", "images=val2014", "annotations=answers.json", "template=llava-short"],
        {"equal": {"answer_type": ["yes/no", "number"]}, "words": ["cat"], "within": "question"},
        ["vqav2-393225001"],
    ),
    Mmvp: (["folder=."], {"equal": {"pair": 2}}, ["mmvp-3", "mmvp-4"]),
    VqaRad: (["annotations=rad.json", "images=x", "split=test"], {"ids": ["vqa-rad-3"]}, ["vqa-rad-3"]),
    Slake: (["annotations=slake.json", "images=x", "language=en"], {"equal": {"qid": 2}}, ["slake-2"]),
    ImageFolder: (
        ["images=x", "file=own.jsonl", "text=ask", "answer=say", "id=key", "columns=[score]"],
        {"ids": "ids.txt"},
        ["c"],
    ),
    ArrowFolder: (["path=set", "text=question", "answer=answer"], {"limit": 2, "seed": 3}, []),
}


def test_every_data_module_is_tried() -> None:
    """What the package exports."""
    exported = {value for value in vars(datasets).values() if isinstance(value, type)}
    assert {kind for kind in exported if issubclass(kind, TableDataModule)} - {TableDataModule} == set(CASES)


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("short", [False, True])
def test_options_of_a_command(
    files: Path, monkeypatch: pytest.MonkeyPatch, kind: type[TableDataModule], short: bool
) -> None:
    """Arguments and YAML make what Python makes, selection included."""
    monkeypatch.chdir(files)
    (files / "ids.txt").write_text("c\n")
    options, where, expected = CASES[kind]
    name = kind.__name__ if short else f"hooked_mm.datasets.{kind.__name__}"
    arguments = [f"--data={name}", *(f"--data.{option}" for option in options), "--data.batch_size=5"]
    arguments += [f"--data.where.{key}={value}" for key, value in where.items()]
    data = parsed(arguments)
    assert isinstance(data, kind)
    assert data.batch_size == 5
    assert data.ids() == expected or not expected
    settings = {key: yaml.safe_load(value) for key, value in (option.split("=") for option in options)}
    assert data.describe() == kind(**settings, where=Selection(**where)).describe()
    written = {"data": {"class_path": name, "init_args": {**settings, "where": where, "batch_size": 5}}}
    (files / "run.yaml").write_text(yaml.safe_dump(written))
    assert parsed(["--config=run.yaml"]).describe() == data.describe()


def test_importing_the_data_sets_needs_nothing_optional() -> None:
    """Neither Hugging Face's own library nor data frames, wherever in a module."""
    needed = {"PIL", "hooked_mm", "numpy", "pyarrow", "torch"}
    modules = sorted(Path(datasets.__file__).parent.glob("*.py"))
    assert len(modules) > 10
    assert set().union(*(imported(path.read_text()) for path in modules)) <= needed | sys.stdlib_module_names


def saved(images: list[Image.Image], folder: Path, numbers: range) -> None:
    """Pictures under COCO's names, without loss."""
    folder.mkdir()
    for number in numbers:
        images[number].save(folder / f"COCO_val2014_{number:012d}.jpg", format="PNG")


def test_captions_through_an_extraction(
    llava: HookedMM, scenes: list[Scene], images: list[Image.Image], tmp_path: Path
) -> None:
    """Given captions of COCO's format: the rows are those of the colours that the captions name; the rest is listed."""
    saved(images, tmp_path / "val2014", range(5))
    captions = {number: [right_captions(scenes[number])[0]] * 5 for number in range(6)}
    path = dump(tmp_path / "captions.json", coco_official(captions))
    data = Coco(path, tmp_path / "val2014", template="describe the scene .", batch_size=4)
    words = TokenOfInterest(tuple(COLOURS))
    store = extract(Extractor(llava, "blocks.2.hook_resid_post", words, answer="given"), data, tmp_path / "store")
    found = [(row["sample"], row["word"]) for row in store.rows.to_pylist()]
    said = [(f"coco-{n}", w) for n in range(5) for w in captions[n][0].split() if w in COLOURS]
    assert sorted(found) == sorted(said)
    assert store.skipped.column("sample").to_pylist() == ["coco-5"]
    table = {row["sample"]: row for row in store.samples.to_pylist()}
    assert table["coco-3"]["captions"] == captions[3]
    assert table["coco-3"]["image"] == str(tmp_path / "val2014" / "COCO_val2014_000000000003.jpg")
    assert store.made_by["data"] == data.describe()


def test_questions_through_an_extraction(llava: HookedMM, images: list[Image.Image], tmp_path: Path) -> None:
    """Questions of VQA's format: each row is what the model holds at the end of the prompt."""
    saved(images, tmp_path / "val2014", range(1, 4))
    asked = ["what place is this ?", "how many objects are there ?", "is there a star ?"]
    items = [(number + 1, 0, words, "snow", "what", "other") for number, words in enumerate(asked)]
    questions = dump(tmp_path / "questions.json", vqa_questions(items))
    answers = dump(tmp_path / "answers.json", vqa_annotations(items))
    hook = "blocks.3.hook_resid_post"
    extractor = Extractor(llava, hook, LastPrompt(), answer="none")

    def data(**options: Any) -> VqaV2:
        return VqaV2(questions, tmp_path / "val2014", answers, template="{text} describe the scene .", **options)

    store = extract(extractor, data(batch_size=2), tmp_path / "store")
    assert store.rows.column("sample").to_pylist() == ["vqav2-1000", "vqav2-2000", "vqav2-3000"]
    for number, value in enumerate(store.activations(hook)):
        batch = llava.prepare([images[number + 1]], [f"{asked[number]} describe the scene ."])
        _, cache = llava.run_with_cache(batch, hook)
        expected = cache[hook][0, -1]
        assert (value - expected).abs().max() <= 1e-5 * expected.abs().max()
    sample = store.samples.to_pylist()[1]
    assert (sample["question"], sample["prompt"]) == (asked[1], f"{asked[1]} describe the scene .")
    assert sample["answers"] == ["snow"] * 7 + ["table"] * 3
    StoreWriter(tmp_path / "cut", {**extractor.made_by(), "data": data().describe()})
    with pytest.raises(StoreError, match=r"made otherwise \(data differ\)"):
        extract(extractor, data(where=Selection(limit=2)), tmp_path / "cut", resume=True)
    assert len(extract(extractor, data(), tmp_path / "cut", resume=True)) == 3


DOCS = (Path(__file__).parent.parent / "docs" / "data.md").read_text()


def blocks(language: str) -> list[str]:
    """The page's code blocks in a language."""
    return re.findall(rf"```{language}\n(.*?)```", DOCS, re.DOTALL)


def test_the_page_about_data_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Python, options and YAML, on files of the formats it names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "annotations").mkdir()
    captions = {n: [f"A {word} {n}."] * 5 for n, word in enumerate(["dog", "traffic light", "cat"])}
    dump(tmp_path / "annotations" / "captions_val2017.json", coco_official(captions, "val2017"))
    dump(tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json", vqa_questions())
    dump(tmp_path / "v2_mscoco_val2014_annotations.json", vqa_annotations())
    (tmp_path / "photos.jsonl").write_text("".join(blocks("json")))
    (tmp_path / "chosen.txt").write_text("a\n")
    first, own = blocks("python")
    names: dict[str, Any] = {}
    exec(first, names)
    assert names["data"].ids() == ["coco-0", "coco-1"]
    exec(own, names)
    assert names["data"].ids() == ["photo-0", "photo-1", "photo-2"]
    (options,) = blocks("bash")
    assert parsed(shlex.split(options.replace("\\\n", " "))).ids() == ["vqav2-393225000"]
    (tmp_path / "run.yaml").write_text("".join(blocks("yaml")))
    assert parsed(["--config=run.yaml"]).ids() == ["a"]


@pytest.mark.parametrize("kind", [*CASES, ScenesDataModule])
def test_the_page_about_data_lists_every_option(kind: type[SampleDataModule]) -> None:
    """A row per class, with all its own options."""
    (row,) = [line for line in DOCS.splitlines() if line.startswith("|") and f"| `{kind.__name__}` |" in line]
    shared = {"where", "template", "batch_size", "num_workers"}
    own = [name for name in inspect.signature(kind).parameters if name not in shared]
    assert re.findall(r"`(\w+)`", row.split("|")[4]) == own


def test_the_page_about_data_lists_every_template_and_condition() -> None:
    """By name."""
    assert set(re.findall(r"`([a-z0-9]+(?:-[a-z0-9]+)+)`", DOCS.split("## What is asked")[1])) == set(TEMPLATES)
    table = DOCS.split("## What is asked")[0].split("| option |")[1]
    listed = {
        name for line in table.splitlines() if line.startswith("| `") for name in line.split("|")[1].split("`")[1::2]
    }
    assert listed == {field.name for field in dataclasses.fields(Selection)}
