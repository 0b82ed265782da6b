"""The public interface: loading, running, generating, tracing; independence of padding and companions."""

from __future__ import annotations

from pathlib import Path

import nnsight
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from hooked_mm import HookedMM
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import GenerationOutput
from hooked_mm.scenes.captions import CAPTION_PROMPT, caption
from hooked_mm.scenes.world import Scene
from hooked_mm.small import small_model_path

QUESTIONS = ["what", "what place is this ?", CAPTION_PROMPT, "is there a red square ? or is there a blue circle ?"]

one_sample = st.tuples(st.lists(st.integers(0, 23), max_size=3), st.sampled_from(QUESTIONS))


@settings(max_examples=10)
@given(samples=st.lists(one_sample, min_size=1, max_size=4), padding_side=st.sampled_from(["left", "right"]))
def test_a_sample_does_not_depend_on_its_batch(
    llava: HookedMM, images: list[Image.Image], samples: list[tuple[list[int], str]], padding_side: str
) -> None:
    """Alone or in a padded batch, with 0 to 3 images, left or right: residual streams and logits within 1e-5.

    Measured against the size of the values (at most about 50 in this model): float32 resolves no more.
    """
    pictures = [[images[index] for index in chosen] for chosen, _ in samples]
    text = [question for _, question in samples]
    logits, together = llava.run_with_cache(
        llava.prepare(pictures, text, padding_side=padding_side), "blocks.*.hook_resid_post"
    )
    assert logits is not None
    for row, (own, question) in enumerate(zip(pictures, text, strict=True)):
        own_logits, alone = llava.run_with_cache(llava.prepare([own], [question]), "blocks.*.hook_resid_post")
        assert own_logits is not None
        there, here = together.stack("resid_post", sample=row), alone.stack("resid_post")
        assert there.shape == here.shape
        assert (there - here).abs().max() <= 1e-5 * max(1.0, float(here.abs().max()))
        kept = logits[row][together.batch.mask(sample=row)[row]]
        assert (kept - own_logits[0]).abs().max() <= 1e-5 * max(1.0, float(own_logits.abs().max()))


def test_the_same_sample_alone_and_padded_within_1e_5_absolute(llava: HookedMM, images: list[Image.Image]) -> None:
    """The plain statement, for ordinary questions about one picture each, on either side."""
    text = ["what colour is the circle ?", "what place is this ?", CAPTION_PROMPT, "where is the star ?"]
    for side in ("left", "right"):
        _, together = llava.run_with_cache(
            llava.prepare(images[:4], text, padding_side=side), "blocks.*.hook_resid_post"
        )
        for row in range(4):
            _, alone = llava.run_with_cache(llava.prepare([images[row]], [text[row]]), "blocks.*.hook_resid_post")
            difference = together.stack("resid_post", sample=row) - alone.stack("resid_post")
            assert difference.abs().max() <= 1e-5


def test_plain_tensors_are_taken_wherever_a_batch_is(llava: HookedMM, images: list[Image.Image]) -> None:
    """Without a processor: modality from the image token, the same logits, generation without text."""
    bare = HookedMM(llava.hf_model, check=False)
    prepared = llava.prepare(images[:2], ["what place is this ?", "what place is this ?"])
    logits, cache = bare.run_with_cache(prepared.inputs)
    assert torch.equal(logits, llava.run_with_cache(prepared)[0])
    assert torch.equal(cache.batch.modality, prepared.modality)
    assert torch.equal(cache.batch.image_sample, prepared.image_sample)
    out = bare.generate(prepared.inputs, 4)
    assert torch.equal(out.tokens, llava.generate(prepared, 4).tokens)
    assert out.text == []
    with pytest.raises(BadInputError, match=r"without a processor; give one: HookedMM\(hf_model, processor\)"):
        bare.prepare(images[:1], ["what place is this ?"])


def test_generation_is_that_of_transformers(llava: HookedMM, images: list[Image.Image], scenes: list[Scene]) -> None:
    """The same tokens as the bare model's generate, text without special tokens, and right about the scenes."""
    batch = llava.prepare(images[:6], CAPTION_PROMPT)
    out = llava.generate(batch, 48, return_logits=True)
    inputs = {key: value for key, value in batch.inputs.items() if key != "position_ids"}
    raw = llava.hf_model.generate(**inputs, max_new_tokens=48, do_sample=False)
    assert torch.equal(out.tokens, raw[:, batch.input_ids.shape[1] :])
    assert [line == caption(item) for line, item in zip(out.text, scenes, strict=False)].count(True) >= 5
    assert out.logits is not None
    assert out.logits.shape == (*out.tokens.shape, len(llava.tokenizer))
    first_steps = out.logits[:, :5].argmax(-1)
    assert torch.equal(first_steps, out.tokens[:, :5])


def check_extended(llava: HookedMM, out: GenerationOutput) -> None:
    """Every generated token is the argmax at the position before it, in one teacher-forced pass."""
    assert out.batch is not None
    logits, _ = llava.run_with_cache(out.batch, "hook_logits")
    assert logits is not None
    answer = out.batch.mask(role="answer")
    rows, positions = answer.nonzero(as_tuple=True)
    assert len(rows) > 0
    assert torch.equal(logits[rows, positions - 1].argmax(-1), out.batch.input_ids[rows, positions])


def test_the_extended_batch_predicts_what_was_generated(llava: HookedMM, images: list[Image.Image]) -> None:
    """Answers of different lengths: padding behind the end, the end token last, predictions one position before."""
    batch = llava.prepare(images[:3], ["what place is this ?", CAPTION_PROMPT, "how many objects are there ?"])
    out = llava.generate(batch, 48)
    assert out.batch is not None
    check_extended(llava, out)
    for row in range(3):
        said = [out.batch.tokens[row][p] for p in out.batch.mask(role="answer")[row].nonzero()[:, 0]]
        assert " ".join(said) == f"{out.text[row]} </s>"


def test_generation_refuses_padding_on_the_right(llava: HookedMM, images: list[Image.Image]) -> None:
    """The sample is named, and what to do."""
    batch = llava.prepare(images[:2], ["what place is this ?", "what ?"], padding_side="right")
    with pytest.raises(BadInputError, match="sample 1: is padded on the right; prepare with padding_side='left'"):
        llava.generate(batch)


def test_hooks_end_with_their_block(llava: HookedMM, images: list[Image.Image]) -> None:
    """Nested blocks add up, an exception undoes them too."""
    batch = llava.prepare(images[:1], ["what place is this ?"])
    calls: list[str] = []

    def note(name: str) -> tuple:
        return ("blocks.0.hook_resid_post", lambda value, hook: calls.append(name))

    def nested() -> None:
        with llava.hooks([note("outer")]):
            with llava.hooks([note("inner")]):
                llava.run_with_hooks(batch, [note("here")])
            llava.run_with_cache(batch, "hook_embed")
            raise KeyError

    with pytest.raises(KeyError):
        nested()
    llava.generate(batch, 1)
    assert calls == ["outer", "inner", "here", "outer"]


def test_trace_is_plain_nnsight_with_our_aliases(llava: HookedMM, images: list[Image.Image]) -> None:
    """Blocks, tower blocks, projector, embedding, norm and unembedding are reached by our names."""
    batch = llava.prepare(images[:1], ["what place is this ?"])
    _, cache = llava.run_with_cache(batch)
    with llava.trace(batch):
        tower = nnsight.save(llava.vision_blocks[2].output)
        image = nnsight.save(llava.projector.output)
        middle = nnsight.save(llava.blocks[3].output)
        normed = nnsight.save(llava.ln_final.output)
        logits = nnsight.save(llava.unembed.output)
    assert torch.equal(tower, cache["vision.blocks.2.hook_resid_post"])
    assert torch.equal(image, cache["projector.hook_out"])
    assert torch.equal(middle, cache["blocks.3.hook_resid_post"])
    assert torch.equal(normed, cache["ln_final.hook_out"])
    assert torch.equal(logits, cache["hook_logits"])
    with pytest.raises(AttributeError, match="no attribute 'blokcs'"):
        _ = llava.blokcs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_loading_a_folder(dtype: str) -> None:
    """from_pretrained on the shipped folder, in any dtype; 'auto' is the checkpoint's; no weight wants a gradient."""
    # In float32 every test of it has it checked, and "auto" is bfloat16.
    hooked = HookedMM.from_pretrained(small_model_path("llava"), dtype=dtype, check=dtype == "bfloat16")
    assert hooked.dtype == (torch.float32 if dtype == "float32" else torch.bfloat16)
    assert not any(parameter.requires_grad for parameter in hooked.hf_model.parameters())
    batch = hooked.prepare([Image.new("RGB", (48, 48), "red")], ["what place is this ?"])
    assert batch.inputs["pixel_values"].dtype == hooked.dtype
    logits, cache = hooked.run_with_cache(batch)
    with torch.no_grad():
        assert torch.equal(logits, hooked.hf_model(**batch.inputs).logits)
    assert cache["blocks.5.hook_resid_post"].dtype == hooked.dtype


def test_wrapping_a_loaded_model_that_has_run_before(images: list[Image.Image]) -> None:
    """A model that transformers has already put hooks of its own on is wrapped all the same, and written everywhere."""
    folder = small_model_path("llava")
    hf_model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    hooked = HookedMM(hf_model, AutoProcessor.from_pretrained(folder), check=False)
    batch = hooked.prepare(images[:1], ["what place is this ?"])
    with torch.no_grad():
        plain = hf_model(**batch.inputs, output_hidden_states=True).logits
        again = HookedMM(hf_model, hooked.processor)
        for name in ("vision.blocks.3.hook_resid_post", "blocks.5.hook_resid_post"):
            written = again.run_with_hooks(batch, [(name, lambda value, hook: value * 0)])
            assert not torch.equal(written, plain)


def test_gradients_flow_through_what_was_read(images: list[Image.Image]) -> None:
    """A model whose weights want gradients keeps its graph: reading does not detach."""
    folder: Path = small_model_path("llava")
    hooked = HookedMM(
        AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32), AutoProcessor.from_pretrained(folder)
    )
    batch = hooked.prepare(images[:1], ["what place is this ?"])
    logits, cache = hooked.run_with_cache(batch, "blocks.2.hook_resid_post")
    assert logits is not None
    (gradient,) = torch.autograd.grad(logits[0, -1].max(), cache["blocks.2.hook_resid_post"])
    assert gradient[0, -1].abs().sum() > 0
