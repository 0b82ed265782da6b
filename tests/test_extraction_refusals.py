"""What extraction refuses, before or instead of writing a store that says something else than it seems to."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hooked_mm.data import Sample, SampleDataModule
from hooked_mm.errors import BadInputError, HookedMMError, StoreError, UnknownHookError, UnknownWordError
from hooked_mm.extraction import Extractor
from hooked_mm.extraction_job import extract
from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.captions import CAPTION_PROMPT
from hooked_mm.selectors import LastPrompt, MeanOver, TokenOfInterest
from hooked_mm.store import ActivationStore
from hooked_mm.store_writer import StoreWriter

HOOKS = ["blocks.1.hook_resid_post", "blocks.4.hook_mlp_out"]


@pytest.fixture(scope="module")
def samples(images: list[Image.Image]) -> list[Sample]:
    """Five pictures with an answer."""
    return [Sample(f"s{n}", images[n], CAPTION_PROMPT, "a red star in the snow .") for n in range(5)]


@pytest.mark.parametrize(
    "hook",
    [
        "vision.blocks.1.hook_resid_post",
        "projector.hook_out",
        "blocks.1.attn.hook_q",
        "blocks.1.attn.hook_z",
        "*hook_resid_post",
    ],
)
def test_points_outside_the_text_stream_are_refused(llava: HookedMM, hook: str) -> None:
    """Patches have no words, and heads no (batch, pos, d): the first such point is named."""
    named = hook if "*" not in hook else "vision.blocks.0.hook_resid_post"
    with pytest.raises(BadInputError, match=named.replace(".", r"\.")):
        Extractor(llava, [HOOKS[0], hook], LastPrompt())


def test_unknown_points_are_refused(llava: HookedMM) -> None:
    """The nearest are offered."""
    with pytest.raises(UnknownHookError, match=r"nearest: .*blocks\.1\.hook_resid_post"):
        Extractor(llava, "blocks.1.hook_resid_pots", LastPrompt())


def test_unknown_answer_sources_are_refused(llava: HookedMM) -> None:
    """The known ones are named."""
    with pytest.raises(BadInputError, match="'generated', 'given', 'none' or 'stored'"):
        Extractor(llava, HOOKS, LastPrompt(), "gold")  # type: ignore[arg-type]


def test_repeated_ids_are_refused(llava: HookedMM, samples: list[Sample], tmp_path: Path) -> None:
    """Rows of two samples of one id could not be told apart; the id is named and no complete store is left."""
    data = SampleDataModule([*samples, samples[2]])
    with pytest.raises(BadInputError, match="'s2'"):
        extract(Extractor(llava, HOOKS, LastPrompt(), "none"), data, tmp_path / "s")
    with pytest.raises(StoreError):
        ActivationStore.open(tmp_path / "s")
    # Nor is anything in the way of the next attempt, with the ids put right.
    got = extract(Extractor(llava, HOOKS, LastPrompt(), "none"), SampleDataModule(samples), tmp_path / "s")
    assert len(got) == 5


def test_words_the_model_can_not_say_are_refused(llava: HookedMM, samples: list[Sample], tmp_path: Path) -> None:
    """The word is named, and no complete store is left."""
    extractor = Extractor(llava, HOOKS, TokenOfInterest(("red", "elephant")), "given")
    with pytest.raises(UnknownWordError, match="elephant"):
        extract(extractor, SampleDataModule(samples), tmp_path / "s")
    with pytest.raises(StoreError):
        ActivationStore.open(tmp_path / "s")


def test_finished_stores_are_not_written_over(llava: HookedMM, samples: list[Sample], tmp_path: Path) -> None:
    """A second run into the same folder is refused and leaves it as it is."""
    extractor = Extractor(llava, HOOKS, LastPrompt(), "none")
    extract(extractor, SampleDataModule(samples[:3]), tmp_path / "s")
    for resume in (False, True):
        with pytest.raises(StoreError, match="already holds a store, which is complete"):
            extract(extractor, SampleDataModule(samples), tmp_path / "s", resume=resume)
    assert len(ActivationStore.open(tmp_path / "s")) == 3


@pytest.mark.parametrize("name", ["sample", "image", "prompt", "text", "answer"])
def test_columns_of_the_data_set_are_not_lost(
    llava: HookedMM, samples: list[Sample], tmp_path: Path, name: str
) -> None:
    """A column called like one of the store's own is kept or refused, never overwritten in silence."""
    clashing = [Sample("x", samples[0].images, CAPTION_PROMPT, "a red star .", {name: "the data set's own"})]
    with suppress(HookedMMError):
        got = extract(Extractor(llava, HOOKS, LastPrompt(), "none"), SampleDataModule(clashing), tmp_path / "s")
        (row,) = got.samples.to_pylist()
        assert "the data set's own" in row.values()
        assert row["sample"] == "x"


def test_a_run_told_to_stop_early_is_not_complete(llava: HookedMM, samples: list[Sample], tmp_path: Path) -> None:
    """A store that calls itself complete accounts for every sample, whatever the trainer was told."""
    extractor = Extractor(llava, HOOKS, TokenOfInterest(("red",)), "given")
    with suppress(HookedMMError):
        extract(extractor, SampleDataModule(samples, 2), tmp_path / "s", limit_predict_batches=1)
    got = ActivationStore.open(tmp_path / "s", partial=True)
    complete = json.loads((tmp_path / "s" / "manifest.json").read_text())["complete"]
    assert not complete or got.samples.num_rows + got.skipped.num_rows == len(samples)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"selector": MeanOver("image")}, "selectors"),
        ({"hooks": HOOKS[:1]}, "hooks"),
        ({"answer": "given"}, "answer"),
        ({"max_new_tokens": 3}, "max_new_tokens"),
    ],
)
def test_other_settings_are_not_mixed_into_a_store(
    llava: HookedMM, samples: list[Sample], tmp_path: Path, settings: dict[str, Any], named: str
) -> None:
    """Another selector, other hooks or other answers do not continue a store; what differs is named."""
    first: dict[str, Any] = {"hooks": HOOKS, "selector": LastPrompt(), "answer": "none"}
    data = SampleDataModule(samples)
    StoreWriter(tmp_path / "s", {**Extractor(llava, **first).made_by(), "data": data.describe()})
    with pytest.raises(StoreError, match=named):
        extract(Extractor(llava, **{**first, **settings}), SampleDataModule(samples), tmp_path / "s", resume=True)
    assert len(extract(Extractor(llava, **first), SampleDataModule(samples), tmp_path / "s", resume=True)) == 5


def test_another_data_set_does_not_continue_a_store(llava: HookedMM, samples: list[Sample], tmp_path: Path) -> None:
    """Samples of another data set of the same size are not mixed into a store that was cut off."""
    extractor = Extractor(llava, HOOKS, LastPrompt(), "none")
    with pytest.raises(StoreError, match="3 of 5"):
        extract(extractor, SampleDataModule(samples, 2), tmp_path / "s", limit_predict_batches=1)
    others = [Sample(f"t{n}", sample.images, sample.text) for n, sample in enumerate(samples)]
    with pytest.raises(StoreError):
        extract(extractor, SampleDataModule(others, 2), tmp_path / "s", resume=True)
    partial = ActivationStore.open(tmp_path / "s", partial=True)
    assert partial.samples.column("sample").to_pylist() == ["s0", "s1"]
    assert len(extract(extractor, SampleDataModule(samples, 2), tmp_path / "s", resume=True)) == 5
