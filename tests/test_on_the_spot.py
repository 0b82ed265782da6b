"""Dictionaries learnt on the spot: rows are those of plain transformers, concepts of scenes are what scenes show."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from concept_dict import on_the_spot
from concept_dict.grounding import top_words
from concept_dict.on_the_spot import (
    KINDS,
    SELECTORS,
    SPLIT,
    STYLE,
    fitted,
    knows_scenes,
    learnt_here,
    learnt_on_scenes,
    scene_activations,
    scene_rows,
    strongest_scenes,
)
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.dataset import SceneDataset
from hooked_mm.scenes.language import DESCRIBED, WORD_CLASSES
from hooked_mm.scenes.world import COLOURS
from hooked_mm.selectors import EachOf

LAST = "blocks.5.hook_resid_post"
HOOK = "blocks.3.hook_resid_post"


def hidden(model: HookedMM, batch: Any) -> torch.Tensor:
    """The stream behind block 3 by transformers alone, of every sample."""
    with torch.no_grad():
        return model.hf_model(**batch.inputs, output_hidden_states=True).hidden_states[4].float()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_conversations_pictures(llava: HookedMM, images: list[Image.Image], kind: str) -> None:
    """The mean that is subtracted is that of a plain pass over image positions; over all without a picture."""
    shown, alone = llava.prepare([images[0]], "what place is this ?"), llava.prepare(None, ["what place is this ?"])
    for batch, places in ((shown, shown.mask("image")), (alone, alone.mask())):
        found = learnt_here(llava, batch, HOOK, kind, 5)
        rows = hidden(llava, batch)[places]
        torch.testing.assert_close(found.decomposition.mean_, rows.mean(dim=0), rtol=1e-4, atol=1e-4)
        assert (len(found.concepts), found.hook) == (5, HOOK)
        found.check_model(llava)
    # No more concepts than positions.
    assert len(learnt_here(llava, alone, HOOK, kind, 50).concepts) == int(alone.mask().sum())


@pytest.mark.parametrize("name", ["idefics2", "qwen2_vl", "molmo"])
def test_every_family_has_concepts_of_a_picture(
    small: Callable[[str], HookedMM], name: str, images: list[Image.Image]
) -> None:
    """Whatever stands where a picture does: latents, merged patches, crops and overview."""
    model = small(name)
    batch = model.prepare([images[:2]], "what place is this ?")
    found = learnt_here(model, batch, HOOK, "k-means", 4)
    assert len(found.concepts) == 4
    assert dict(found.made_by["selectors"]["0"]) == EachOf("image").describe()


def test_rows_of_scenes_are_those_where_words_are_predicted(llava: HookedMM) -> None:
    """Found by hand in the captions' tokens, read by plain transformers; one step is told before every batch."""
    told: list[tuple[int, int]] = []
    found = scene_rows(llava, HOOK, [SELECTORS["words"]], 18, lambda done, total: told.append((done, total)))
    assert told == [(0, 18), (16, 18)]
    words = {word for name in DESCRIBED for option in WORD_CLASSES[name] for word in option.split()}
    scenes = SceneDataset(18, "caption", SPLIT, style=STYLE)
    rows, owners = [], []
    for number in range(18):
        one = scenes[number]
        batch = llava.prepare([one.images], [one.text], [one.answer])
        stream = hidden(llava, batch)[0]
        said = batch.mask(role="answer")[0].nonzero()[:, 0].tolist()
        tokens = [llava.tokenizer.decode([int(batch.input_ids[0, at])]).strip() for at in said]
        for place, (at, token) in enumerate(zip(said, tokens, strict=True)):
            # "top left" is one phrase, which its first word begins.
            if token in words and not (token in ("left", "right") and tokens[place - 1] in ("top", "bottom")):
                rows.append(stream[at - 1])
                owners.append(number)
    torch.testing.assert_close(found.rows, torch.stack(rows), rtol=1e-3, atol=1e-3)
    assert found.sample.tolist() == owners


def test_many_rows_are_thinned_evenly(llava: HookedMM, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most so many, from the first scene to the last."""
    whole = scene_rows(llava, HOOK, [SELECTORS["image"]], 2)
    monkeypatch.setattr(on_the_spot, "MOST_ROWS", 50)
    part = scene_rows(llava, HOOK, [SELECTORS["image"]], 2)
    assert (len(whole.rows), len(part.rows)) == (128, 43)
    assert torch.equal(part.rows, whole.rows[::3])
    assert part.sample.tolist() == whole.sample[::3].tolist()


def test_concepts_of_scenes_are_shown_by_scenes_that_have_them(llava: HookedMM) -> None:
    """Planted truth: the scenes that a colour's concept fires for most have an object of this colour."""
    scenes = scene_rows(llava, LAST, [SELECTORS["words"]], 32)
    dictionary = learnt_on_scenes(llava, scenes, "sparse", 26)
    words = [found[0].text if found else "" for found in top_words(llava, dictionary.concepts, 1)]
    colours = [(k, word) for k, word in enumerate(words) if word in COLOURS]
    assert len(colours) >= 5
    pooled = scene_activations(dictionary, scenes)
    true = 0
    for k, colour in colours:
        found = strongest_scenes(pooled, k, 3)
        assert [one.activation for one in found] == sorted((one.activation for one in found), reverse=True)
        assert found[0].activation == pytest.approx(float(pooled[:, k].max()))
        true += sum(colour in one.text.split() for one in found)
        assert np.array_equal(
            np.asarray(found[0].image), np.asarray(SceneDataset(32, style=STYLE)[found[0].number].images)
        )
    assert true >= 0.9 * 3 * len(colours)


def test_who_knows_scenes(llava: HookedMM) -> None:
    """The shipped models, not one of the hub that is called the same."""
    assert knows_scenes(llava)
    for name in ("somebody/llava", "llava", ""):
        other = SimpleNamespace(hf_model=SimpleNamespace(config=SimpleNamespace(_name_or_path=name)))
        assert not knows_scenes(other)  # type: ignore[arg-type]


def test_what_can_not_be_learnt_is_refused(llava: HookedMM) -> None:
    """An unknown kind, no rows, no scenes, points without a vector per position."""
    rows = torch.zeros(3, 128)
    with pytest.raises(BadInputError, match="kind of dictionary 'PCA'"):
        fitted(llava, rows, HOOK, "PCA", 2, [])
    with pytest.raises(BadInputError, match="no positions to learn"):
        fitted(llava, rows[:0], HOOK, "k-means", 2, [])
    with pytest.raises(BadInputError, match="count=0"):
        scene_rows(llava, HOOK, [SELECTORS["image"]], 0)
    with pytest.raises(BadInputError, match="language model's stream"):
        learnt_here(llava, llava.prepare(None, ["what place is this ?"]), "blocks.1.attn.hook_q", "k-means", 2)
