"""A packed text sees exactly what it would see alone: shown by the shipped model's logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.draw import render
from hooked_mm.scenes.language import CAPTION_PROMPT, WORD_CLASSES, caption
from hooked_mm.scenes.world import SHAPES, Scene
from hooked_mm.small.packing import IGNORE, Packed, Packer, ScenePool, make_pool
from hooked_mm.small.train import packed_logits
from tests.test_language import truth

SEED = 77


@pytest.fixture(scope="module")
def pool() -> ScenePool:
    """Eight scenes of both kinds, in patches of 8 pixels."""
    return make_pool(SEED, range(8), 8, two_objects=0.6)


@pytest.fixture(scope="module")
def packer(llava: HookedMM) -> Packer:
    """A packer for the shipped model."""
    return Packer(llava.tokenizer, 36, question_weight=3.0)


def segments(packed: Packed, row: int) -> list[tuple[int, int]]:
    """Where each text of a row lies: it begins where positions fall back to the prefix's end."""
    end = packed.image_slice.stop
    starts = [p for p in range(end, packed.ids.shape[1]) if packed.positions[row, p] == end]
    stops = [*starts[1:], int((packed.positions[row] > 0).nonzero().max()) + 1]
    return list(zip(starts, stops, strict=True))


def words(model: HookedMM, ids: Tensor) -> str:
    """Tokens as text."""
    return " ".join(model.tokenizer.convert_ids_to_tokens(ids))


def test_packed_logits_are_those_of_every_text_alone(llava: HookedMM, pool: ScenePool, packer: Packer) -> None:
    """For each text of each image: the ordinary forward pass, through the real processor, gives the same logits."""
    rows = np.arange(6)
    packed = packer([pool.scenes[row] for row in rows], np.random.default_rng(0))
    with torch.no_grad():
        got, labels, _ = packed_logits(llava.hf_model, packed, pool.images(rows))
    kept = packed.labels != IGNORE
    where = {(int(r), int(p)): n for n, (r, p) in enumerate(kept.nonzero())}
    checked = 0
    for row in rows:
        picture = Image.fromarray(render(pool.scenes[row])[0])
        for start, stop in segments(packed, row):
            text = f"<s>user : <image> {words(llava, packed.ids[row, start:stop])}"
            inputs = llava.processor(text=text, images=picture, return_tensors="pt", add_special_tokens=False)
            with torch.no_grad():
                alone = llava.hf_model(**inputs).logits[0]
            # Token `start + i` of the packed sequence is token `prefix + i` of the text alone.
            shift = packed.image_slice.stop - start
            for position in range(start, stop):
                if kept[row, position]:
                    index = where[int(row), position]
                    difference = (got[index] - alone[position + shift]).abs().max()
                    assert difference < 1e-4, (text, position, float(difference))
                    assert labels[index] == inputs["input_ids"][0, position + shift + 1]
                    checked += 1
    assert checked == len(labels) > 6 * 11 * 2


def test_pictures_are_those_of_the_image_processor(llava: HookedMM, pool: ScenePool) -> None:
    """What training sees is what the real processor makes of the same pictures."""
    pictures = [Image.fromarray(render(item)[0]) for item in pool.scenes]
    expected = llava.processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pool.images(np.arange(8)), expected, rtol=0, atol=1e-6)


def test_every_text_is_true_and_complete(llava: HookedMM, pool: ScenePool, packer: Packer) -> None:
    """Behind each image stand its caption and ten questions with right answers, prompts as the template writes them."""
    packed = packer(pool.scenes, np.random.default_rng(5))
    dropped = 0
    for row, item in enumerate(pool.scenes):
        texts = [words(llava, packed.ids[row, a:b]) for a, b in segments(packed, row)]
        assert len(texts) == 11
        pairs = [text.removesuffix(" </s>").split(" assistant : ") for text in texts]
        assert all(text.endswith(" </s>") for text in texts)
        assert pairs[0] in ([CAPTION_PROMPT, caption(item)], [CAPTION_PROMPT.rstrip(" ."), caption(item)])
        for question, answer in pairs[1:]:
            assert truth(item, f"{question.removesuffix(' ?')} ?") == answer
        dropped += sum(not question.endswith(("?", ".")) for question, _ in pairs)
        assert words(llava, packed.ids[row, : packed.image_slice.stop]) == " ".join(["<s> user :", *["<image>"] * 36])
    assert 0.03 < dropped / (11 * 8) < 0.35


def test_targets_are_the_answers_and_nothing_else(llava: HookedMM, pool: ScenePool, packer: Packer) -> None:
    """Labels spell answer and end, one position early; captions weigh 1, questions what was asked, the rest nothing."""
    packed = packer(pool.scenes, np.random.default_rng(6))
    for row in range(len(pool.scenes)):
        seen = torch.zeros(packed.ids.shape[1], dtype=torch.bool)
        for number, (start, stop) in enumerate(segments(packed, row)):
            answer = words(llava, packed.ids[row, start:stop]).split(" assistant : ")[1].split()
            span = slice(stop - len(answer) - 1, stop - 1)
            assert llava.tokenizer.convert_ids_to_tokens(packed.labels[row, span]) == answer
            assert set(packed.weights[row, span].tolist()) == {3.0 if number else 1.0}
            seen[span] = True
        assert (packed.labels[row][~seen] == IGNORE).all()
        assert (packed.weights[row][~seen] == 0).all()


def test_packing_depends_on_the_generator_alone(pool: ScenePool, packer: Packer) -> None:
    """The same seed packs the same batch, another seed another."""
    one, two, other = (packer(pool.scenes, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(one.ids, two.ids)
    assert torch.equal(one.mask, two.mask)
    assert one.ids.shape != other.ids.shape or not torch.equal(one.ids, other.ids)


def test_scenes_of_a_pool_are_the_numbered_ones() -> None:
    """A pool of a share of the numbers holds the same scenes as the pool of all."""
    whole, share = make_pool(3, range(6), 8, two_objects=0.8), make_pool(3, range(1, 6, 2), 8, two_objects=0.8)
    assert share.scenes == whole.scenes[1::2]
    assert torch.equal(share.pixels, whole.pixels[1::2])


def hand_labels(item: Scene, masks: np.ndarray, top: int, left: int) -> dict[str, int]:
    """What a patch of 8 x 8 pixels must be labelled with, from the coverage of each object, in plain loops."""
    cover = [float(np.mean([[one[y, x] for x in range(left, left + 8)] for y in range(top, top + 8)])) for one in masks]
    owner = item.objects[cover.index(max(cover))] if max(cover) > 0.15 else None
    return {
        "shapes": IGNORE if owner is None else SHAPES.index(owner.shape),
        "colours": IGNORE if owner is None else WORD_CLASSES["colours"].index(owner.colour),
        "sizes": IGNORE if owner is None else WORD_CLASSES["sizes"].index(owner.size),
        "positions": IGNORE if owner is None else WORD_CLASSES["positions"].index(owner.position),
        "places": WORD_CLASSES["places"].index(item.place) if max(cover) < 0.02 else IGNORE,
        "object": int(owner is not None),
    }


def test_patch_labels(pool: ScenePool) -> None:
    """Labels of every patch equal a direct recomputation; every kind of patch occurs."""
    kinds = set()
    for number, item in enumerate(pool.scenes):
        masks = render(item)[1]
        for patch in range(36):
            expected = hand_labels(item, masks, 8 * (patch // 6), 8 * (patch % 6))
            assert {name: int(values[number, patch]) for name, values in pool.labels.items()} == expected
            kinds.add((expected["object"], expected["places"] != IGNORE))
    assert kinds == {(0, True), (0, False), (1, False)}


def test_patches_are_in_the_towers_order(llava: HookedMM) -> None:
    """Patch number n of the labels is position n of the image: changing its pixels changes the tower's patch n most."""
    tower = llava.hf_model.model.vision_tower
    blank = torch.zeros(1, 3, 48, 48)
    with torch.no_grad():
        embedded = tower.embeddings(blank)[0, 1:]
        for patch in (1, 6, 35):
            changed = blank.clone()
            changed[:, :, 8 * (patch // 6) : 8 * (patch // 6) + 8, 8 * (patch % 6) : 8 * (patch % 6) + 8] = 1
            difference = (tower.embeddings(changed)[0, 1:] - embedded).norm(dim=1)
            assert difference.nonzero()[:, 0].tolist() == [patch]
