"""Batches: masks by modality and role, extension by generated tokens, raw inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from hooked_mm.batch import Batch, Modality, Role, batch_from_inputs, count_positions, parse_role
from hooked_mm.errors import BadInputError
from tests.processors import FAMILIES
from tests.tiny import batch_of, picture, structure, tiny

IMAGE = 9
KNOWN = replace(structure("llava"), image_token_id=IMAGE)
CONFIG = LlavaConfig(vision_config=CLIPVisionConfig(image_size=16, patch_size=8), text_config=LlamaConfig())


def make(rows: list[list[int]], pad: int = 0) -> Batch:
    """A batch from raw ids; 0 is padding, 9 the image token."""
    ids = torch.tensor(rows)
    return batch_from_inputs({"input_ids": ids, "attention_mask": (ids != pad).long()}, KNOWN, CONFIG)


def test_raw_inputs_know_modality_but_not_roles() -> None:
    """Image token and attention mask tell image, text and padding; roles are unknown and asking is refused."""
    batch = make([[0, 5, 9, 9, 6], [5, 6, 7, 8, 5]])
    assert batch.modality.tolist() == [[0, 1, 2, 2, 1], [1, 1, 1, 1, 1]]
    assert batch.mask().sum() == 9
    assert batch.mask(modality="image").nonzero().tolist() == [[0, 2], [0, 3]]
    assert batch.mask(modality="text", sample=1).sum() == 5
    with pytest.raises(BadInputError, match="made from raw tensors, so roles are unknown"):
        batch.mask(role="answer")


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ({}, "needs 'input_ids' of shape"),
        ({"input_ids": torch.zeros(3, dtype=torch.long)}, r"got \(3,\)"),
        ({"input_ids": [[1, 2]]}, "got None among"),
    ],
)
def test_inputs_that_are_none_are_refused(inputs: dict, reason: str) -> None:
    """The error says what was given and what to give instead."""
    with pytest.raises(BadInputError, match=reason):
        batch_from_inputs(inputs, KNOWN, CONFIG)


def test_image_positions_must_fit_the_images() -> None:
    """Five image positions can't be two images of four patches, nor two images the positions of one."""
    pixels = torch.zeros(2, 3, 16, 16)
    ids = torch.tensor([[5, 9, 9, 9, 9, 6], [9, 9, 9, 9, 5, 6]])
    batch = batch_from_inputs({"input_ids": ids, "pixel_values": pixels}, KNOWN, CONFIG)
    assert batch.image_sample.tolist() == [0, 1]
    assert batch.image_index.tolist() == [[-1, 0, 0, 0, 0, -1], [1, 1, 1, 1, -1, -1]]
    assert batch.layout.images[1].grid.tolist() == [[0, 1], [2, 3]]
    ids[1, 4] = 9
    with pytest.raises(BadInputError, match="9 image positions can't be shared equally by 2 crops"):
        batch_from_inputs({"input_ids": ids, "pixel_values": pixels}, KNOWN, CONFIG)
    ids[0, 5] = ids[0, 0] = 9
    ids[1] = torch.tensor([9, 9, 5, 5, 5, 5])
    with pytest.raises(BadInputError, match=r"sample 0: has 6 image positions, but its 2 images take 8 \(\[4, 4\]\)"):
        batch_from_inputs({"input_ids": ids, "pixel_values": pixels}, KNOWN, CONFIG)


def test_unknown_modality_role_and_sample_are_refused() -> None:
    """The known names are listed, the nearest offered."""
    batch = make([[5, 6]])
    with pytest.raises(BadInputError, match="unknown modality 'imge'; nearest: image; known: pad, text, image"):
        batch.mask(modality="imge")
    with pytest.raises(BadInputError, match="unknown role 'reply'"):
        parse_role("reply")
    with pytest.raises(BadInputError, match="sample 1 asked of a batch of 1"):
        batch.mask(sample=1)
    assert parse_role(Role.ANSWER) is Role.ANSWER


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.booleans())
def test_positions_do_not_count_padding(lengths: list[int], left: bool) -> None:
    """Whatever the side of padding, the real tokens are numbered 0, 1, 2, ..."""
    width = max(lengths)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, width - length :] = 1 if left else 0
        if not left:
            mask[row, :length] = 1
    positions = count_positions(mask)
    for row, length in enumerate(lengths):
        assert positions[row][mask[row].bool()].tolist() == list(range(length))


def test_extending_puts_answers_behind_prompts() -> None:
    """Generated tokens get role answer, what comes after the end becomes padding; positions go on."""
    batch = make([[0, 5, 6], [5, 9, 7]])
    batch.inputs["position_ids"] = count_positions(batch.inputs["attention_mask"])
    kept = torch.tensor([[True, True], [True, False]])
    tokens = [["p", "a", "b"], ["a", "i", "c"]]
    with_names = replace(batch, tokens=tokens)
    longer = with_names.extend(torch.tensor([[7, 8], [8, 0]]), kept, [["x", "y"], ["z", "p"]])
    assert longer.input_ids.tolist() == [[0, 5, 6, 7, 8], [5, 9, 7, 8, 0]]
    assert longer.inputs["attention_mask"].tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert longer.inputs["position_ids"].tolist() == [[0, 0, 1, 2, 3], [0, 1, 2, 3, 3]]
    assert longer.modality[1].tolist() == [Modality.TEXT, Modality.IMAGE, Modality.TEXT, Modality.TEXT, Modality.PAD]
    assert (longer.role == Role.ANSWER).tolist() == [[False] * 3 + [True, True], [False] * 3 + [True, False]]
    assert longer.tokens[0] == ["p", "a", "b", "x", "y"]
    assert longer.image_index.shape == longer.separator.shape == (2, 5)
    assert not (longer.image_index[:, 3:] >= 0).any()
    assert with_names.input_ids.shape == (2, 3), "the shorter batch stays as it was"


def test_a_batch_padded_on_the_right_is_not_extended() -> None:
    """Prompt and answer would not be adjacent; the sample is named."""
    batch = make([[5, 6], [5, 0]])
    with pytest.raises(BadInputError, match="sample 1: is padded on the right"):
        batch.extend(torch.tensor([[7], [7]]), torch.ones(2, 1, dtype=torch.bool), [["x"], ["y"]])


@pytest.mark.parametrize("family", FAMILIES)
def test_an_extended_batch_runs_in_every_family(family: str) -> None:
    """Two more tokens: the model takes what the batch holds, images stay where they were, prompts see the same."""
    batch = batch_of(family, [[picture(24, 24)], [picture(40, 24)]])
    if family == "blip-2":
        # Its processor pads between image and text, never behind.
        assert (batch.modality[:, -1] == Modality.TEXT).all()
    new, kept = torch.tensor([[105, 106], [107, 0]]), torch.tensor([[True, True], [True, False]])
    longer = batch.extend(new, kept, [["x", "y"], ["z", "p"]])
    spoken = longer.decoder or longer
    assert (spoken.role == Role.ANSWER).sum(dim=1).tolist() == [2, 1]
    assert torch.equal(longer.mask(modality="image"), longer.image_index >= 0)
    with torch.no_grad():
        before, after = (tiny(family)(**of.inputs).logits for of in (batch, longer))
    torch.testing.assert_close(after[:, : before.shape[1]], before, atol=1e-5, rtol=0)
    assert after.shape[:2] == spoken.modality.shape


@pytest.mark.parametrize("family", FAMILIES)
def test_moving_a_batch_moves_everything(family: str) -> None:
    """No tensor is left behind, in grids neither."""
    moved = batch_of(family, [[picture(24, 24)]]).to("meta")
    for of in (moved, moved.decoder or moved):
        tensors = [*of.inputs.values(), of.modality, of.role]
        layout = vars(of.layout)
        tensors += [value for value in layout.values() if isinstance(value, torch.Tensor)]
        tensors += [grid for image in of.layout.images for grid in vars(image).values() if grid is not None]
        assert {value.device.type for value in tensors} == {"meta"}
