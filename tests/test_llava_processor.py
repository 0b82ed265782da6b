"""Pictures, prompts and tokens are those of the original code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlamaTokenizer, MistralConfig

from hooked_mm.errors import BadInputError
from hooked_mm.llava_processor import make_processor
from hooked_mm.processors import image_processor_class
from tests.llava_folders import tokenizer

VISION = CLIPVisionConfig(image_size=24, patch_size=8)
CONFIGS = {"llama": LlamaConfig(), "mistral": MistralConfig()}


def made(folder: Path, decoder: str = "mistral", pictures: dict | None = None, tok: Any = None, **settings: Any) -> Any:
    tok = tok or tokenizer()
    tok.save_pretrained(folder)
    written = {"vocab_size": len(tok), "image_aspect_ratio": "pad", **settings}
    return make_processor(folder, written, CONFIGS[decoder], VISION, pictures)


def squared(picture: Image.Image) -> Image.Image:
    """By hand: bars in CLIP's mean colour on both sides of the shorter edge, the smaller one first."""
    mean = (122, 116, 104)
    side = max(picture.size)
    made = Image.new("RGB", (side, side), mean)
    made.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return made


@pytest.mark.parametrize("size", [(40, 25), (25, 41), (30, 30), (24, 24), (7, 90)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_a_picture_is_made_square_as_by_hand(tmp_path: Path, size: tuple[int, int], mode: str) -> None:
    """With 'pad', CLIP's own processor sees the square that was made by hand; without, the picture itself."""
    data = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    data[..., 3] = 255
    picture = Image.fromarray(data).convert(mode)
    clip = image_processor_class("CLIP")(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    ours = made(tmp_path).image_processor(picture, return_tensors="pt")["pixel_values"]
    by_hand = clip(squared(picture.convert("RGB")), return_tensors="pt")["pixel_values"]
    assert torch.equal(ours, by_hand)
    for aspect in ("square", None):
        plain = made(tmp_path, image_aspect_ratio=aspect).image_processor(picture, return_tensors="pt")["pixel_values"]
        assert torch.equal(plain, clip(picture, return_tensors="pt")["pixel_values"])
        assert torch.equal(plain, by_hand) == (size[0] == size[1])


def test_a_towers_own_settings_come_before_clips(tmp_path: Path) -> None:
    """Sizes as numbers, as CLIP's first files have them, and another mean, which is the bars' colour too."""
    said = {"size": 24, "crop_size": 24, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "feature_extractor_type": "x"}
    white = Image.new("RGB", (40, 20), (255, 255, 255))
    pixels = made(tmp_path, pictures=said).image_processor(white, return_tensors="pt")["pixel_values"][0]
    assert pixels.shape == (3, 24, 24)
    assert torch.allclose(pixels[:, 0], torch.tensor(int(0.5 * 255) / 255 * 2 - 1), atol=1e-6)
    assert torch.allclose(pixels[:, 12], torch.tensor(1.0), atol=1e-6)


SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. "
)
TURNS = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
    {"role": "user", "content": "sure?"},
]


@pytest.mark.parametrize(
    ("decoder", "marked", "first", "all_turns"),
    [
        (
            "llama",
            False,
            SYSTEM + "USER: <image>\nwhat is it? ASSISTANT:",
            SYSTEM + "USER: <image>\nwhat is it? ASSISTANT: a cat</s>USER: sure? ASSISTANT:",
        ),
        (
            "mistral",
            False,
            "[INST] <image>\nwhat is it? [/INST]",
            "[INST] <image>\nwhat is it? [/INST] a cat </s>[INST] sure? [/INST]",
        ),
        (
            "mistral",
            True,
            "[INST] <im_start><image><im_end>\nwhat is it? [/INST]",
            "[INST] <im_start><image><im_end>\nwhat is it? [/INST] a cat </s>[INST] sure? [/INST]",
        ),
    ],
)
def test_prompts_are_those_of_the_original_conversations(
    tmp_path: Path, decoder: str, marked: bool, first: str, all_turns: str
) -> None:
    """`vicuna_v1` and `mistral_instruct`, letter by letter, for one turn and for several."""
    tok = tokenizer()
    tok.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
    processor = made(tmp_path, decoder, tok=tok, mm_use_im_start_end=marked)
    assert processor.apply_chat_template(TURNS[:1], add_generation_prompt=True, tokenize=False) == first
    assert processor.apply_chat_template(TURNS, add_generation_prompt=True, tokenize=False) == all_turns


def llama_tokenizer(legacy: bool) -> LlamaTokenizer:
    """A vocabulary of characters and bytes, as sentencepiece's, with the space that it puts before a text."""
    letters = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnop[]/INST?"]
    vocabulary = {letter: row for row, letter in enumerate(letters)}
    return LlamaTokenizer(vocab=vocabulary, merges=[], legacy=legacy)


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("begins", [None, True, False])
def test_texts_around_a_picture_are_tokenized_as_texts_of_their_own(
    tmp_path: Path, legacy: bool, begins: bool | None
) -> None:
    """As the original splits a prompt at `<image>`: each piece begins with sentencepiece's space. The text begins with
    `<s>` unless tokenizer_config.json says that it does not."""
    plain = llama_tokenizer(legacy)
    pieces = ["[INST] ", "\nac dc? [/INST]"]
    ids = [plain(piece, add_special_tokens=False).input_ids for piece in pieces]
    assert {piece[0] for piece in ids} == {plain.convert_tokens_to_ids("▁")}
    image = len(plain)
    made(tmp_path, tok=plain)
    said = json.loads((tmp_path / "tokenizer_config.json").read_text())
    told = {} if begins is None else {"add_bos_token": begins}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**said, **told}))
    processor = make_processor(tmp_path, {"vocab_size": len(plain)}, CONFIGS["mistral"], VISION, None)
    expected = [*([] if begins is False else [plain.bos_token_id]), *ids[0], *[image] * 9, *ids[1]]
    assert processor.image_token_id == image
    prompt = "<image>".join(pieces)
    seen = processor(images=Image.new("RGB", (24, 24)), text=prompt, return_tensors="pt")
    assert seen["input_ids"][0].tolist() == expected
    assert processor.tokenizer.pad_token == "<pad>"
    assert processor.tokenizer.pad_token_id == image + 1


def test_a_tokenizer_keeps_what_it_has(tmp_path: Path) -> None:
    """Its padding token, and an `<image>` of its own."""
    processor = made(tmp_path / "a")
    assert (processor.tokenizer.pad_token, len(processor.tokenizer)) == ("<unk>", len(tokenizer()) + 1)
    tok = tokenizer()
    tok.add_tokens(["<image>"], special_tokens=True)
    assert len(made(tmp_path / "b", tok=tok).tokenizer) == len(tok)


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    """With what to do."""
    with pytest.raises(BadInputError, match=r"tokenizer in .* can't be loaded.*put the tokenizer's files there"):
        make_processor(tmp_path, {"vocab_size": 9}, CONFIGS["llama"], VISION, None)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0e")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    with pytest.raises(BadInputError, match="pip install sentencepiece protobuf"):
        make_processor(tmp_path, {"vocab_size": 9}, CONFIGS["llama"], VISION, None)
