"""What a generation gives back, by hand on made-up tokens, and on an encoder-decoder."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hooked_mm.errors import BadInputError
from hooked_mm.generation import until_end
from hooked_mm.hooked import HookedMM
from hooked_mm.testing.miniatures import miniature, miniature_inputs


@given(rows=st.lists(st.lists(st.integers(0, 4), min_size=5, max_size=5), min_size=1, max_size=4))
def test_tokens_count_up_to_and_with_the_first_end(rows: list[list[int]]) -> None:
    """Against a loop, with two end tokens; None means that nothing ends."""
    tokens = torch.tensor(rows)
    expected = []
    for row in rows:
        ends = [place for place, token in enumerate(row) if token in (2, 3)]
        expected.append([place <= (ends[0] if ends else len(row)) for place in range(len(row))])
    assert until_end(tokens, [2, 3]).tolist() == expected
    assert until_end(tokens, None).all()


def test_the_extended_batch_runs_to_the_generated_logits(llava: HookedMM, images: list[Image.Image]) -> None:
    """One pass over prompts and answers gives the logits that generation had step by step."""
    batch = llava.prepare(images[:2], ["what colour is the circle ?", "describe the scene ."])
    out = llava.generate(batch, 6, return_logits=True)
    assert out.batch is not None
    assert out.logits is not None
    again = llava.run_with_hooks(out.batch)
    assert again is not None
    kept = until_end(out.tokens, llava.hf_model.generation_config.eos_token_id)
    at = batch.length - 1 + torch.arange(out.tokens.shape[1])
    assert torch.allclose(again[:, at][kept], out.logits[kept], atol=1e-4)


def test_an_encoder_decoders_answer_begins_behind_what_its_decoder_was_given() -> None:
    """With and without tokens for the decoder: what transformers gives, without those."""
    model = HookedMM(miniature("florence2"), check=False)
    model.hf_model.generation_config.eos_token_id = None
    inputs = miniature_inputs(model.hf_model)
    given_tokens = inputs["decoder_input_ids"].shape[1]
    whole = model.hf_model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(inputs, 4).tokens, whole[:, given_tokens:])
    del inputs["decoder_input_ids"]
    whole = model.hf_model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(inputs, 4).tokens, whole[:, 1:])


def test_prompts_padded_on_the_right_are_refused() -> None:
    """The sample is named; an encoder may be padded on either side."""
    model = HookedMM(miniature("llava"), check=False)
    with pytest.raises(BadInputError, match="sample 0: is padded on the right"):
        model.generate(miniature_inputs(model.hf_model, padding_side="right"), 2)
    florence = HookedMM(miniature("florence2"), check=False)
    inputs = miniature_inputs(florence.hf_model, padding_side="right")
    assert florence.generate(inputs, 2).tokens.shape == (3, 2)


def test_several_answers_per_prompt(llava: HookedMM, images: list[Image.Image]) -> None:
    """Two answers per sample: twice the text, and no batch, in which they would have no place."""
    batch = llava.prepare(images[:2], ["what colour is the circle ?", "describe the scene ."])
    out = llava.generate(batch, 3, num_beams=2, num_return_sequences=2)
    assert len(out.text) == 4
    assert out.batch is None


def test_a_decoder_that_does_not_begin_with_its_start_token_is_refused() -> None:
    """transformers would put it in front, and every position would be another; with it the prompt is gone on with."""
    hf_model = miniature("pp_formulanet")
    inputs = miniature_inputs(hf_model, family="pp_formulanet")
    start = hf_model.generation_config.decoder_start_token_id
    model = HookedMM(hf_model, check=False)
    assert model.generate(inputs, 2).tokens.shape == (3, 2)
    ids = inputs["decoder_input_ids"].masked_fill(inputs["decoder_input_ids"] == start, start + 1)
    ids[:, 0] = start + 1
    with pytest.raises(BadInputError, match=rf"begins with token {start + 1}, .* start token is {start}"):
        model.generate({**inputs, "decoder_input_ids": ids}, 2)
