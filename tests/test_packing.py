"""A packed text sees exactly what it would see alone: shown by every family's own forward pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hooked_mm.scenes.captions import STYLES, caption, right_captions
from hooked_mm.scenes.questions import QUESTION_TYPES
from hooked_mm.scenes.world import CANVASES, HELD_OUT, HELD_OUT_SHAPE, Scene, scene
from hooked_mm.small.families import FAMILIES
from hooked_mm.small.labels import IGNORE
from hooked_mm.small.packing import Packed, Packer
from hooked_mm.small.train import packed_logits
from tests.test_families import NAMES, asked, made, on, picture


def pack(name: str, scenes: list[Scene], seed: int = 0, styled: int = 1) -> Packed:
    """Scenes of one canvas behind the prefix that the family's processor writes for its picture."""
    model, processor = made(name)
    blank = [{"role": "user", "content": [{"type": "image"}]}]
    prompt = processor(text=[processor.apply_chat_template(blank)], images=[[picture(scenes[0])]], return_tensors="pt")
    packer = Packer(processor.tokenizer, FAMILIES[name].image_token(model), 3.0, styled)
    positions = FAMILIES[name].positions(model, prompt)
    return packer(scenes, prompt["input_ids"][0], positions, np.random.default_rng(seed))


def words(name: str, ids: torch.Tensor) -> list[str]:
    """Tokens as words."""
    return made(name)[1].tokenizer.convert_ids_to_tokens(ids.tolist())


def texts(name: str, packed: Packed, row: int) -> list[tuple[int, list[str], list[str]]]:
    """(start, prompt, answer) of each text behind the image: a text ends at `</s>`, its prompt at `assistant :`."""
    found = []
    start = int(packed.image.max()) + 1
    tokens = words(name, packed.ids[row])
    # Molmo's pictures stand before the user.
    while tokens[start] in ("<fake_token_around_image>", "<|vision_end|>", "<im_col>", "<im_end>", "user", ":"):
        start += 1
    while "</s>" in tokens[start:]:
        stop = tokens.index("</s>", start) + 1
        whole = tokens[start:stop]
        cut = whole.index("assistant") + 2
        found.append((start, whole[:cut], whole[cut:]))
        start = stop
    return found


@pytest.mark.parametrize("name", NAMES)
def test_packed_logits_are_those_of_every_text_alone(name: str) -> None:
    """For each text of each canvas: the ordinary forward through processor and chat template gives the same logits."""
    model, processor = made(name)
    family = FAMILIES[name]
    for canvas in CANVASES[1:6:2]:
        item = on(canvas)
        packed = pack(name, [item, item], seed=canvas[0])
        if name == "molmo":
            cut = processor.image_processor.cut(picture(item))
            pixels = {"pixel_values": torch.stack([cut.pixels] * 2), "masks": cut.masks, "order": cut.order}
        else:
            pixels = processor.image_processor(images=[picture(item)], return_tensors="pt")
        if name == "molmo":
            values = pixels
        elif name == "qwen2_vl":
            values = {
                "pixel_values": pixels["pixel_values"].repeat(2, 1),
                "image_grid_thw": pixels["image_grid_thw"].repeat(2, 1),
            }
        else:
            values = {"pixel_values": torch.cat([pixels["pixel_values"]] * 2)}
        with torch.no_grad():
            got, labels, _ = packed_logits(family, model, packed, values)
        # Rows one after the other, positions in order.
        banned = packed.banned[packed.labels != IGNORE]
        seen = 0
        for row in range(2):
            for number, (_, prompt, answer) in enumerate(texts(name, packed, row)):
                count = len(answer)
                if row == 0 or number % 4 == 0:
                    inputs = asked(processor, [picture(item)], " ".join(prompt[:-2]))
                    extra = processor.tokenizer.convert_tokens_to_ids(answer)
                    start = inputs["input_ids"].shape[1]
                    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([extra])], 1)
                    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
                    if "mm_token_type_ids" in inputs:
                        kinds = inputs["mm_token_type_ids"]
                        inputs["mm_token_type_ids"] = torch.cat([kinds, kinds.new_zeros(1, count)], 1)
                    with torch.no_grad():
                        alone = model(**inputs).logits[0, start - 1 : start - 1 + count]
                    for step in range(count):
                        keep = torch.ones(alone.shape[-1], dtype=torch.bool)
                        if banned[seen + step] != IGNORE:
                            keep[banned[seen + step]] = False
                            assert got[seen + step, ~keep] < -1e30
                        torch.testing.assert_close(got[seen + step, keep], alone[step, keep], rtol=0, atol=1e-4)
                    assert labels[seen : seen + count].tolist() == extra
                seen += count
        assert seen == len(labels)


def scenes_of(canvas: tuple[int, int], split: str, count: int) -> list[Scene]:
    """The first scenes of a split on a canvas."""
    found = (item for item in (scene(split, i) for i in range(400)) if (item.width, item.height) == canvas)
    return [next(found) for _ in range(count)]


@pytest.mark.parametrize("split", ["train", "unseen"])
def test_texts_labels_weights_and_banned_words(split: str) -> None:
    """Labels spell the answers; captions weigh 1, questions 3; a held-out partner is banned, but never the answer."""
    items = scenes_of((56, 56), split, 12)
    packed = pack("llava", items, seed=3, styled=2)
    vocabulary = made("llava")[1].tokenizer.get_vocab()
    banned_words = 0
    for row, item in enumerate(items):
        seen = torch.zeros(packed.ids.shape[1], dtype=torch.bool)
        found = texts("llava", packed, row)
        assert 3 < len(found) <= 3 + len(QUESTION_TYPES)
        for number, (start, prompt, answer) in enumerate(found):
            stop = start + len(prompt) + len(answer)
            span = slice(stop - len(answer) - 1, stop - 1)
            assert words("llava", packed.labels[row, span]) == answer
            assert set(packed.weights[row, span].tolist()) == {1.0 if number < 3 else 3.0}
            seen[span] = True
            said = " ".join(answer[:-1])
            if number == 0:
                assert said in right_captions(item)
            elif number < 3:
                assert said in {caption(item, style) for style in STYLES if style != "any"}
            for word, ban in zip(answer, packed.banned[row, span].tolist(), strict=True):
                if ban == IGNORE:
                    continue
                banned_words += 1
                # With the object's other word, the banned one would make a held-out pair.
                assert any(
                    (word == one.shape and vocabulary.get(HELD_OUT_SHAPE.get(one.colour, "")) == ban)
                    or (word == one.colour and vocabulary.get(HELD_OUT.get(one.shape, "")) == ban)
                    for one in item.objects
                )
        assert (packed.labels[row][~seen] == IGNORE).all()
        assert (packed.weights[row][~seen] == 0).all()
        assert (packed.banned[row][~seen] == IGNORE).all()
    assert banned_words > 12


def test_full_captions_ban_the_partner_of_what_is_named() -> None:
    """By hand: in "a ring that is big and red" green is left out at "red", and the circle's partner at its colour."""
    item = next(i for i in (scene("train", n) for n in range(200)) if i.objects[0].shape == "ring")
    packer = Packer(made("llava")[1].tokenizer, 4, styled=6)
    ids = made("llava")[1].tokenizer.get_vocab()
    first = item.objects[0]
    for text in packer.texts(item, np.random.default_rng(0)):
        answer = words("llava", torch.tensor(text.answer))
        if answer[:6] == ["a", "ring", "that", "is", first.size, "and"]:
            assert text.banned[6] == ids["green"]
            shape = HELD_OUT_SHAPE.get(first.colour)
            assert text.banned[1] == (ids[shape] if shape else IGNORE)
            assert text.banned[0] == text.banned[2] == text.banned[-1] == IGNORE
            return
    pytest.fail("no caption in full")


def test_the_generator_decides() -> None:
    """The same seed packs the same batch, another seed another."""
    items = scenes_of((48, 48), "train", 3)
    one, two, other = (pack("llava", items, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.ids, two.ids)
    assert one.ids.shape != other.ids.shape or not torch.equal(one.ids, other.ids)
