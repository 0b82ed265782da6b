"""Pairs of pictures as batches: the same words, positions that correspond, every pair that is left out counted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from analyses.image_pairs import ImagePair, own_pair, scene_pairs
from analyses.pair_batches import PairBatches, pair_groups
from analyses.targets import Targets
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM


def test_both_runs_have_the_same_words_and_the_target_is_the_first_token_that_differs(llava: HookedMM) -> None:
    """Scores are those of the logits at the row before it; padding of longer questions beside them."""
    pairs = scene_pairs("colour", 5)
    (made,) = PairBatches(llava, pairs)
    assert [pair.id for pair in made.pairs] == [pair.id for pair in pairs]
    assert torch.equal(made.clean.input_ids, made.corrupt.input_ids)
    tokens = llava.tokenizer.convert_ids_to_tokens(made.targets.token.tolist())
    foils = llava.tokenizer.convert_ids_to_tokens(made.targets.foil.tolist())
    assert list(zip(tokens, foils, strict=True)) == [pair.answers for pair in pairs]
    for number, pair in enumerate(pairs):
        for side, score in ((pair.clean, made.clean_scores), (pair.corrupt, made.corrupt_scores)):
            batch = llava.prepare([side], [pair.question])
            logits = llava.run_with_hooks(batch)[0, -1]
            ids = llava.tokenizer.convert_tokens_to_ids(list(pair.answers))
            assert float(score[number]) == pytest.approx(float(logits[ids[0]] - logits[ids[1]]), abs=1e-3)
    assert bool((made.clean_scores > 0).all())
    assert bool((made.corrupt_scores < 0).all())
    groups = pair_groups(llava, made)
    assert list(groups) == ["object", "other patches", "subject", "question", "template", "last"]
    assert torch.equal(groups["last"].nonzero()[:, 1], made.targets.row)


def test_of_an_encoder_decoder_the_decoders_positions_are_grouped(llava: HookedMM) -> None:
    """Its question and picture are the encoder's."""
    (made,) = PairBatches(llava, scene_pairs("colour", 2))
    decoder = llava.prepare(None, ["what ?", "what place ?"], ["red", "blue"])
    row = decoder.last_prompt()
    targets = Targets(torch.arange(2), row, made.targets.token, made.targets.foil)
    apart = replace(made, clean=replace(made.clean, decoder=decoder), targets=targets)
    groups = pair_groups(llava, apart)
    assert list(groups) == ["question", "template", "last"]
    assert groups["last"].shape == decoder.modality.shape


def test_answers_that_begin_alike_are_compared_where_they_differ(llava: HookedMM) -> None:
    """`top left` and `top right`: at the position of `top`, which stands in both prompts."""
    first = scene_pairs("position", 1)[0]
    pair = own_pair(first.clean, first.corrupt, first.question, ("top left", "top right"))
    (made,) = PairBatches(llava, [pair], right="any")
    row = int(made.targets.row)
    assert made.clean.tokens[0][row] == made.corrupt.tokens[0][row] == "top"
    assert llava.tokenizer.convert_ids_to_tokens([int(made.targets.token), int(made.targets.foil)]) == ["left", "right"]
    assert "answer" not in pair_groups(llava, made)
    assert pair.mask is not None
    assert pair.mask.any()


def test_pairs_that_the_model_does_not_answer_right_are_counted(llava: HookedMM) -> None:
    """As are those whose answers no token tells apart; what is left is what would be made of it alone."""
    good = scene_pairs("colour", 3)
    wrong = ImagePair("swapped", good[0].corrupt, good[0].clean, good[0].question, good[0].answers)
    half = ImagePair("half", good[0].clean, good[0].clean, good[0].question, good[0].answers)
    same = ImagePair("same", good[0].clean, good[0].corrupt, good[0].question, ("red", "red"))
    begun = ImagePair("begun", good[0].clean, good[0].corrupt, good[0].question, ("top", "top left"))
    lost = ImagePair("lost", "nowhere.png", good[0].corrupt, good[0].question, good[0].answers)
    batches = PairBatches(llava, [good[0], wrong, lost, good[1], same, begun, half, good[2]])
    (made,) = list(batches)
    assert [pair.id for pair in made.pairs] == [pair.id for pair in good]
    assert batches.left_out == {
        "a picture can't be read": ["lost"],
        "both answers are the same": ["same"],
        "one answer is the beginning of the other": ["begun"],
        "the model does not answer the clean picture right": ["swapped"],
        "the model does not answer the corrupt picture right": ["half"],
    }
    assert len(batches.notes()) == 5
    assert "1 pairs were left out: both answers are the same (same)" in batches.notes()
    (alone,) = PairBatches(llava, good)
    torch.testing.assert_close(made.clean_scores, alone.clean_scores, rtol=0, atol=1e-3)
    (preferred,) = PairBatches(llava, [*good, wrong], right="preferred")
    assert len(preferred) == 3
    assert not list(PairBatches(llava, [wrong]))
    assert not list(PairBatches(llava, [lost]))


@pytest.mark.usefixtures("unchecked")
def test_pictures_that_are_cut_into_other_patches_are_left_out() -> None:
    """A tower that keeps the picture's shape has other patches, though the text has as many positions."""
    model = HookedMM.small("idefics2")
    good = scene_pairs("colour", 1)[0]
    turned = Image.fromarray(np.asarray(good.corrupt)[: good.corrupt.height * 2 // 3])
    pair = own_pair(good.clean, turned, good.question, good.answers)
    assert pair.mask is None
    batches = PairBatches(model, [pair, good])
    (made,) = batches
    assert batches.left_out == {"the pictures are cut into other patches": ["own"]}
    groups = pair_groups(model, made)
    assert list(groups)[:2] == ["object", "other patches"]
    assert 0 < int(groups["object"].sum()) < int(groups["other patches"].sum())


def test_which_pairs_are_kept_is_one_of_three(llava: HookedMM) -> None:
    """With the value."""
    with pytest.raises(BadInputError, match="right='maybe'"):
        PairBatches(llava, [], right="maybe")  # type: ignore[arg-type]
