"""Extraction gives the representations that plain PyTorch hooks see, whatever else is in the data set."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import hooked_mm.extraction_job as module
from hooked_mm.data import Sample, SampleDataModule
from hooked_mm.errors import StoreError
from hooked_mm.extraction import Extractor
from hooked_mm.extraction_job import extract
from hooked_mm.hooked import HookedMM
from hooked_mm.loading import Prepared
from hooked_mm.reader import Extracted
from hooked_mm.scenes.captions import CAPTION_PROMPT, caption
from hooked_mm.scenes.world import Scene
from hooked_mm.selectors import LastPrompt, TokenOfInterest
from hooked_mm.store import ActivationStore
from hooked_mm.store_writer import StoreWriter

HOOKS = ["blocks.1.hook_resid_post", "blocks.4.hook_mlp_out"]
WORDS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black", "top left", "snow", "sea")


@pytest.fixture(scope="module")
def good(scenes: list[Scene], images: list[Image.Image]) -> list[Sample]:
    """Eight scenes with their captions."""
    return [
        Sample(f"s{n}", images[n], CAPTION_PROMPT, caption(scenes[n]), {"place": scenes[n].place}) for n in range(8)
    ]


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory, good: list[Sample]) -> dict[str, Sample]:
    """Samples that can't be used; the key is what the reason must contain."""
    folder = tmp_path_factory.mktemp("pictures")
    image = good[0].images
    assert isinstance(image, Image.Image)
    image.resize((200, 200)).save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:2000])
    (folder / "note.jpg").write_text("no picture")
    return {
        "does not exist": Sample("missing", folder / "none.jpg", "what place is this ?", "sea"),
        "broken": Sample("cut", folder / "cut.jpg", "what place is this ?", "sea"),
        "not an image": Sample("note", str(folder / "note.jpg"), "what place is this ?", "sea"),
        "prompt is empty": Sample("mute", image, "  ", "sea"),
        "2 image tokens": Sample("doubled", image, "<image> <image> what place is this ?", "sea"),
        "no answer": Sample("silent", image, "what place is this ?"),
        "answer is empty": Sample("blank", image, "what place is this ?", " "),
    }


def run(model: HookedMM, samples: list[Sample], path: Path, *, batch_size: int = 3, **options: Any) -> ActivationStore:
    """An extraction of the words of interest from given answers, unless options say otherwise."""
    settings = {"hooks": HOOKS, "selector": TokenOfInterest(WORDS), "answer": "given", **options}
    again = {"resume": settings.pop("resume", False)}
    return extract(Extractor(model, **settings), SampleDataModule(samples, batch_size), path, **again)


def by_row(store: ActivationStore, hook: str) -> dict[tuple, Tensor]:
    """Representations by sample, word and how often that word has come before in the sample."""
    seen: Counter[tuple] = Counter()
    found = {}
    for row, value in zip(store.rows.to_pylist(), store.activations(hook), strict=True):
        key = (row["sample"], row["word"])
        found[(*key, seen[key])] = value
        seen[key] += 1
    return found


def assert_same(store: ActivationStore, other: ActivationStore) -> None:
    """The same rows with the same values, up to 1e-5 of their scale, in any order."""
    for hook in HOOKS:
        one, two = by_row(store, hook), by_row(other, hook)
        assert one.keys() == two.keys()
        scale = max(value.abs().max() for value in two.values())
        assert all((value - two[key]).abs().max() <= 1e-5 * scale for key, value in one.items())


@pytest.fixture(scope="module")
def store(llava: HookedMM, good: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """The extraction of the good samples."""
    return run(llava, good, tmp_path_factory.mktemp("extraction") / "store")


def seen_by_hooks(model: HookedMM, item: Sample) -> dict[tuple, dict[str, Tensor]]:
    """Values at the positions that predict the words of the answer, by PyTorch hooks, one sample at a time."""
    core, values = model.hf_model, {}
    layers = core.model.language_model.layers
    places = {HOOKS[0]: layers[1], HOOKS[1]: layers[4].mlp}
    text = f"<s>user : <image> {item.text} assistant : {item.answer}"
    inputs = model.processor(text=text, images=item.images, return_tensors="pt", add_special_tokens=False)
    handles = [
        place.register_forward_hook(lambda _, __, out, name=name: values.__setitem__(name, out))
        for name, place in places.items()
    ]
    try:
        with torch.no_grad():
            core(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    tokens = model.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    seen: Counter[str] = Counter()
    found = {}
    for position in range(tokens.index("assistant") + 2, len(tokens)):
        for word in WORDS:
            parts = word.split()
            if tokens[position : position + len(parts)] == parts:
                found[item.id, word, seen[word]] = {name: values[name][0, position - 1] for name in HOOKS}
                seen[word] += 1
    return found


def test_values_are_those_that_plain_hooks_see(llava: HookedMM, good: list[Sample], store: ActivationStore) -> None:
    """Every row equals what a PyTorch hook reads at the position before the word, sample by sample."""
    expected = {key: value for item in good for key, value in seen_by_hooks(llava, item).items()}
    assert len(expected) > 12
    assert any(word == "top left" for _, word, _ in expected)
    for hook in HOOKS:
        got = by_row(store, hook)
        assert got.keys() == expected.keys()
        scale = max(value[hook].abs().max() for value in expected.values())
        for key, value in got.items():
            assert (value - expected[key][hook]).abs().max() <= 1e-5 * scale, key


def test_bad_samples_are_listed_and_change_nothing(
    llava: HookedMM,
    good: list[Sample],
    bad: dict[str, Sample],
    store: ActivationStore,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each bad sample is listed once with its reason, the count is printed, and the rest is as without them."""
    mixed = [*good]
    for place, sample in enumerate(bad.values()):
        mixed.insert(2 * place, sample)
    got = run(llava, mixed, tmp_path / "s", batch_size=4)
    reasons = {entry["sample"]: entry["reason"] for entry in got.skipped.to_pylist()}
    assert got.skipped.num_rows == len(bad)
    assert reasons.keys() == {sample.id for sample in bad.values()}
    for part, sample in bad.items():
        assert part in reasons[sample.id]
    assert_same(got, store)
    assert sorted(got.samples.column("sample").to_pylist()) == sorted(sample.id for sample in good)
    assert f"{len(bad)} of {len(good) + len(bad)} samples skipped" in capsys.readouterr().out


def test_nothing_is_printed_where_nothing_was_skipped(
    llava: HookedMM, good: list[Sample], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run without losses does not speak of any."""
    run(llava, good[:2], tmp_path / "s")
    assert "skipped" not in capsys.readouterr().out


def test_a_data_set_of_bad_samples_only(llava: HookedMM, bad: dict[str, Sample], tmp_path: Path) -> None:
    """A run in which every sample is bad still ends in a store that says so."""
    got = run(llava, list(bad.values()), tmp_path / "s")
    assert (len(got), got.skipped.num_rows) == (0, len(bad))


@pytest.mark.parametrize("batch_size", [1, 8])
def test_batch_size_does_not_matter(
    llava: HookedMM, good: list[Sample], store: ActivationStore, tmp_path: Path, batch_size: int
) -> None:
    """Rows and values are the same in batches of one, three and eight, prompts of other lengths beside them."""
    others = [Sample(f"q{n}", s.images, "how many objects are there ?", "two") for n, s in enumerate(good)]
    mixed = [sample for pair in zip(good, others, strict=True) for sample in pair]
    assert_same(run(llava, mixed, tmp_path / "s", batch_size=batch_size), store)


@pytest.mark.parametrize("selector", [TokenOfInterest(WORDS), TokenOfInterest(WORDS, "at"), LastPrompt()])
def test_generated_answers_that_equal_the_given_ones(
    llava: HookedMM, good: list[Sample], tmp_path: Path, selector: Any
) -> None:
    """Where the model says what was given, both ways of extraction store the same."""
    generated = run(llava, good, tmp_path / "generated", answer="generated", selector=selector)
    texts = dict(zip(*(generated.samples.column(name).to_pylist() for name in ("sample", "text")), strict=True))
    same = [sample for sample in good if texts[sample.id] == sample.answer]
    assert len(same) >= 6
    given = run(llava, same, tmp_path / "given", selector=selector)
    for hook in HOOKS:
        one, two = by_row(given, hook), by_row(generated, hook)
        assert one.keys() == {key for key in two if key[0] in {sample.id for sample in same}}
        scale = max(value.abs().max() for value in two.values())
        assert all((value - two[key]).abs().max() <= 1e-5 * scale for key, value in one.items())


def test_prompts_alone(llava: HookedMM, good: list[Sample], tmp_path: Path) -> None:
    """Without answers there is one row per sample for the last prompt token, and no word."""
    got = run(llava, good, tmp_path / "s", answer="none", selector=LastPrompt())
    assert got.rows.column("sample").to_pylist() == [sample.id for sample in good]
    assert set(got.rows.column("word").to_pylist()) == {None}
    assert set(got.rows.column("role").to_pylist()) == {"template"}
    no_words = run(llava, good, tmp_path / "t", answer="none")
    assert (len(no_words), no_words.samples.num_rows) == (0, len(good))


class Watched(list):
    """Samples that remember which of them were asked for."""

    def __init__(self, samples: list[Sample]) -> None:
        super().__init__(samples)
        self.asked: list[int] = []

    def __getitem__(self, index: Any) -> Any:
        self.asked.append(index)
        return super().__getitem__(index)

    def ids(self) -> list[str]:
        return [sample.id for sample in self]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stores written in parts of two rows; an interruption's signal settings are put back."""
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(module, "StoreWriter", lambda *a, **k: StoreWriter(*a, **{**k, "rows_per_shard": 2}))
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize("error", [RuntimeError("power cut"), KeyboardInterrupt()])
@pytest.mark.usefixtures("small_parts")
def test_interrupted_runs_are_resumed(
    llava: HookedMM,
    good: list[Sample],
    store: ActivationStore,
    tmp_path: Path,
    error: BaseException,
) -> None:
    """A run that dies leaves an unfinished store; resumed, it does what was left and equals an uninterrupted run."""
    extractor = Extractor(llava, HOOKS, TokenOfInterest(WORDS), "given")
    represent, calls = extractor.represent, []

    def until_the_third(prepared: Prepared) -> Extracted:
        calls.append(prepared)
        if len(calls) == 3:
            raise error
        return represent(prepared)

    extractor.represent = until_the_third  # type: ignore[method-assign]
    with pytest.raises((RuntimeError, SystemExit, KeyboardInterrupt)):
        extract(extractor, SampleDataModule(good, 2), tmp_path / "s")
    extractor.represent = represent  # type: ignore[method-assign]
    with pytest.raises(StoreError, match="unfinished"):
        ActivationStore.open(tmp_path / "s")
    kept = ActivationStore.open(tmp_path / "s", partial=True).samples.num_rows
    assert kept == 4
    left = Watched(good)
    there = set(ActivationStore.open(tmp_path / "s", partial=True).samples.column("sample").to_pylist())
    got = extract(extractor, SampleDataModule(left, 2), tmp_path / "s", resume=True)
    assert left.asked == [number for number in range(8) if f"s{number}" not in there]
    assert_same(got, store)
    assert sorted(got.samples.column("sample").to_pylist()) == sorted(sample.id for sample in good)


def test_the_tables_say_where_rows_come_from(store: ActivationStore, good: list[Sample]) -> None:
    """The samples table has prompt, text, answer and the data set's columns; rows have position, modality, role."""
    assert store.samples.select(["sample", "prompt", "text", "answer", "place", "image"]).to_pylist() == [
        {
            "sample": sample.id,
            "prompt": CAPTION_PROMPT,
            "text": sample.answer,
            "answer": sample.answer,
            "place": sample.columns["place"],
            "image": None,
        }
        for sample in good
    ]
    assert set(store.rows.column("modality").to_pylist()) == {"text"}
    assert set(store.rows.column("role").to_pylist()) == {"answer"}
    assert store.made_by["selectors"]["TokenOfInterest"]["where"] == "predicts"
    assert store.made_by["hooks"] == HOOKS
    assert np.all(np.diff(store.row_samples()) >= 0)


def test_positions_do_not_depend_on_the_batch(llava: HookedMM, good: list[Sample], tmp_path: Path) -> None:
    """A row's position counts the sample's own tokens, not the padding that longer companions bring."""
    prompts = ["what place is this ?", CAPTION_PROMPT, "is the star big or small ?"]
    mixed = [Sample(s.id, s.images, prompts[n % 3], s.answer) for n, s in enumerate(good[:4])]
    expected = []
    for item in mixed:
        text = f"<s>user : <image> {item.text} assistant : {item.answer}"
        ids = llava.processor(text=text, images=item.images, add_special_tokens=False)["input_ids"][0]
        tokens = llava.tokenizer.convert_ids_to_tokens(ids)
        place = str(item.answer).split()[-2]
        expected.append((item.id, len(tokens) - 1 - tokens[::-1].index(place)))
    for batch_size in (1, 4):
        selector = TokenOfInterest(("beach", "city", "desert", "forest", "sea", "snow"), where="at")
        got = run(llava, mixed, tmp_path / str(batch_size), batch_size=batch_size, selector=selector)
        assert [(row["sample"], row["position"]) for row in got.rows.to_pylist()] == expected
