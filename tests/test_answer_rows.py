"""AnswerRows of a store as positions of batches: the token that each predicts is the first of its word."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from concept_dict.answer_rows import AnswerRows, asked, stored_rows
from hooked_mm.errors import BadInputError
from hooked_mm.extraction import Extractor
from hooked_mm.extraction_job import extract
from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.dataset import SceneDataset, ScenesDataModule
from hooked_mm.scenes.world import COLOURS
from hooked_mm.selectors import LastPrompt, MeanOver, Selector, TokenOfInterest
from hooked_mm.store import ActivationStore

HOOK = "blocks.2.hook_resid_post"
DATA = SceneDataset(7, style="full")


def _store(model: HookedMM, path: Path, selector: Selector, answer: Any, **options: Any) -> ActivationStore:
    extractor = Extractor(model, HOOK, selector, answer=answer, **options)
    return extract(extractor, ScenesDataModule(7, style="full", batch_size=3), path)


def _images(number: int) -> Any:
    return DATA[number].images


@pytest.mark.parametrize(("answer", "prefix"), [("given", None), ("generated", None), ("generated", "a")])
def test_the_rows_of_a_store_are_found_again(llava: HookedMM, tmp_path: Path, answer: Any, prefix: str | None) -> None:
    """All rows: they predict the word that the store says, and hold the representation that the store holds."""
    store = _store(llava, tmp_path / "s", TokenOfInterest(tuple(COLOURS)), answer, answer_prefix=prefix)
    words, values = store.rows.column("word").to_pylist(), store.activations(HOOK)
    seen = 0
    for rows in stored_rows(llava, store, _images, per_sample=100, batch_size=3):
        places = asked(rows)
        _, cache = llava.run_with_cache(places.batch, HOOK)
        count = len(rows.sample)
        found = cache[HOOK][places.sample, places.column]
        torch.testing.assert_close(found, values[seen : seen + count], atol=2e-4, rtol=0)
        assert [llava.tokenizer.decode([token]).strip() for token in places.token] == words[seen : seen + count]
        seen += count
    assert seen == len(store) > 7


def test_few_rows_of_few_samples(llava: HookedMM, tmp_path: Path) -> None:
    """At most so many of each sample, drawn by the seed; samples in batches."""
    store = _store(llava, tmp_path / "s", TokenOfInterest(tuple(COLOURS)), "given")

    def drawn(**options: Any) -> list[list[tuple[int, int]]]:
        made = stored_rows(llava, store, _images, **options)
        return [list(zip(rows.sample.tolist(), rows.position.tolist(), strict=True)) for rows in made]

    found = drawn(samples=5, batch_size=2)
    assert [len(rows) for rows in found] == [2, 2, 1]
    assert [[sample for sample, _ in rows] for rows in found] == [[0, 1], [0, 1], [0]]
    assert drawn(samples=5, batch_size=2) == found
    assert any(drawn(samples=5, batch_size=2, seed=seed) != found for seed in range(1, 6))
    whole = drawn(per_sample=2, batch_size=7)[0]
    assert sorted(set(whole)) == whole
    assert max(np.bincount([sample for sample, _ in whole])) == 2


def test_last_prompt_positions_predict_the_given_answer(llava: HookedMM, tmp_path: Path) -> None:
    """Of prompts alone the first token of the answer that the samples give is asked for."""
    store = _store(llava, tmp_path / "s", LastPrompt(), "none")
    places = asked(next(stored_rows(llava, store, _images)))
    first = [DATA[number].answer.split()[0] for number in range(7)]  # type: ignore[union-attr]
    assert [llava.tokenizer.decode([token]).strip() for token in places.token] == first
    assert places.column.tolist() == places.batch.last_prompt().tolist()


def test_what_has_no_token_is_refused(llava: HookedMM, tmp_path: Path) -> None:
    """Means over positions, the last position, one beyond it, and samples without answers."""
    means = _store(llava, tmp_path / "means", MeanOver(modality="image"), "none")
    with pytest.raises(BadInputError, match=r"means over several positions.*store\.where\(selector"):
        next(stored_rows(llava, means, _images))
    store = _store(llava, tmp_path / "s", LastPrompt(), "none")
    rows = next(stored_rows(llava, store, _images))
    length = int(rows.batch.inputs["attention_mask"][3].sum())
    for position in (length - 1, length + 4, -1):
        wrong = AnswerRows(rows.batch, np.array([3]), np.array([position]))
        with pytest.raises(BadInputError, match=f"sample 3: position {position} predicts nothing: there are {length}"):
            asked(wrong)
    asked(replace(rows, sample=np.array([3]), position=np.array([length - 2])))
    index = store.samples.column_names.index("answer")
    empty = store.samples.column("answer").to_pylist()
    store.samples = store.samples.set_column(index, "answer", [[None] * len(empty)])
    with pytest.raises(BadInputError, match="holds no answers"):
        next(stored_rows(llava, store, _images))
