"""The small models' families: real classes, saved and loaded as such; what training assumes of each is what it does."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.draw import render
from hooked_mm.scenes.world import CANVASES, Scene, scene
from hooked_mm.small.families import FAMILIES, build, save_model, save_processor
from hooked_mm.small.packing import Packer
from hooked_mm.small.pool import Pool
from hooked_mm.small.train import LanguageStage

NAMES = tuple(FAMILIES)
# Molmo cuts its pictures into crops, and has tests of its own for that (`test_family_molmo`).
WHOLE = ("llava", "idefics2", "qwen2_vl")


@functools.cache
def made(name: str) -> tuple[Any, Any]:
    """A random model and its processor, the same every time (shared: leave them as they are)."""
    torch.manual_seed(0)
    model, processor = build(name)
    return model.eval().requires_grad_(False), processor


def on(canvas: tuple[int, int]) -> Scene:
    """A scene on this canvas."""
    return next(
        item for item in map(functools.partial(scene, "train"), range(99)) if (item.width, item.height) == canvas
    )


def picture(item: Scene) -> Image.Image:
    """The scene's picture."""
    return Image.fromarray(render(item)[0])


def asked(processor: Any, images: list[Image.Image], text: str = "what place is this ?") -> Any:
    """The forward tensors of one question about each picture."""
    content = [{"type": "image"}, {"type": "text", "text": text}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(text=[prompt] * len(images), images=[[image] for image in images], return_tensors="pt")


def shown(name: str, pixels: Tensor, width: int, height: int) -> Tensor:
    """The picture (3, height, width) that a processor's output for one picture shows, in -1 to 1."""
    if name == "qwen2_vl":
        # (block row, block col, row in block, col in block) (channel, frame, y, x): both frames show the picture.
        cells = pixels.view(height // 8, width // 8, 2, 2, 3, 2, 4, 4)[..., 0, :, :]
        return cells.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, height, width)
    return pixels.reshape(3, *pixels.shape[-2:])


def test_names() -> None:
    """A family is found by its name, which is the model type."""
    assert (*WHOLE, "molmo") == NAMES
    assert all(made(name)[0].config.model_type == name == FAMILIES[name].name for name in NAMES)


MARKS = {
    "llava": "<image>",
    "idefics2": "<image>",
    "qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>",
}


@pytest.mark.parametrize("name", WHOLE)
def test_prompt(name: str) -> None:
    """The chat template word by word."""
    content = [{"type": "image"}, {"type": "text", "text": "what place is this ?"}]
    prompt = made(name)[1].apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert prompt == f"<s>user : {MARKS[name]} what place is this ? assistant :"


@pytest.mark.parametrize("canvas", CANVASES, ids=str)
@pytest.mark.parametrize("name", WHOLE)
def test_pictures_are_not_cut(name: str, canvas: tuple[int, int]) -> None:
    """Idefics2 and Qwen2-VL get every pixel as it is; LLaVA the whole on a square, resized by PIL's bicubic filter."""
    pixels = render(on(canvas))[0]
    width, height = canvas
    out = made(name)[1].image_processor(images=[Image.fromarray(pixels)], return_tensors="pt")["pixel_values"]
    if name == "llava":
        side = max(canvas)
        square = np.zeros((side, side, 3), np.uint8)
        top, left = (side - height) // 2, (side - width) // 2
        # Padding has the colour of the middle of the processor's range.
        square[:] = np.array([int(0.5 * 255)] * 3)
        square[top : top + height, left : left + width] = pixels
        expected = np.array(Image.fromarray(square).resize((64, 64), Image.Resampling.BICUBIC))
        size = (64, 64)
    else:
        expected, size = pixels, canvas
    expected = torch.from_numpy(expected.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)
    torch.testing.assert_close(shown(name, out, *size), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("canvas", CANVASES, ids=str)
@pytest.mark.parametrize("name", WHOLE)
def test_image_tokens(name: str, canvas: tuple[int, int]) -> None:
    """As many image tokens as parts of the picture that tokens answer for: 64, 36, or one per 8 x 8 pixels."""
    model, processor = made(name)
    inputs = asked(processor, [picture(on(canvas))])
    expected = {"llava": 64, "idefics2": 36, "qwen2_vl": canvas[0] * canvas[1] // 64}[name]
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == expected
    rows, cols = FAMILIES[name].token_grid(*canvas)
    assert rows * cols == expected
    if name == "qwen2_vl":
        assert (rows, cols) == (canvas[1] // 8, canvas[0] // 8)


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    """At most 4.0 MB of weights in bfloat16; loaded again it proves its hook points, and says and sees the same."""
    torch.manual_seed(0)
    model, processor = build(name)
    for parameter in model.eval().parameters():
        parameter.data = parameter.data.bfloat16().float()
    save_model(name, copy.deepcopy(model), tmp_path)
    save_processor(processor, tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).dtype == getattr(torch, FAMILIES[name].dtype)
    weights = load_file(tmp_path / "model.safetensors")
    assert all(value.dtype == torch.bfloat16 for value in weights.values())
    assert (tmp_path / "model.safetensors").stat().st_size < 4.05e6
    assert sum(value.numel() * 2 for value in weights.values()) < 4.0e6
    loaded = HookedMM.from_pretrained(tmp_path, dtype="float32", check=name != "qwen2_vl")
    assert name == "qwen2_vl" or loaded.conformance.ok
    assert type(loaded.hf_model) is type(model)
    images = [picture(on(canvas)) for canvas in CANVASES[:2]]
    for image in images:
        one, two = asked(processor, [image]), asked(loaded.processor, [image])
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
        with torch.no_grad():
            torch.testing.assert_close(model(**one).logits, loaded.hf_model(**two).logits, rtol=0, atol=1e-5)
    batch = loaded.prepare(images, "what place is this ?")
    assert loaded.generate(batch, 2).tokens.shape[0] == 2
    ends = loaded.hf_model.generation_config
    assert (ends.pad_token_id, ends.bos_token_id, ends.eos_token_id) == (0, 2, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_hook_point_means_its_name(name: str, tmp_path: Path) -> None:
    """Every block of the loaded model is proven, not only the first and last."""
    model, processor = made(name)
    model.save_pretrained(tmp_path)
    save_processor(processor, tmp_path)
    assert HookedMM.from_pretrained(tmp_path, dtype="float32", check="full").conformance.ok


def test_the_video_part_is_named(tmp_path: Path) -> None:
    """Qwen2-VL's folder names its video processor, as checkpoints do, for where torchvision is; no other has one."""
    for name in WHOLE:
        save_processor(made(name)[1], tmp_path / name)
        settings = json.loads((tmp_path / name / "processor_config.json").read_text())
        assert settings["processor_class"] == type(made(name)[1]).__name__
        assert not settings["image_processor"]["image_processor_type"].endswith("Pil")
        expected = {"video_processor_type": "Qwen2VLVideoProcessor"} if name == "qwen2_vl" else None
        assert settings.get("video_processor") == expected


def features(name: str, inputs: Any) -> Tensor:
    """What the model's own forward puts at the image positions (Molmo: adds there), (image tokens, d)."""
    model, processor = made(name)
    hooked = HookedMM(model, processor, check=False)
    _, cache = hooked.run_with_cache(dict(inputs), names_filter="hook_embed")
    token = model.config.image_patch_id if name == "molmo" else model.config.image_token_id
    found = cache["hook_embed"][inputs["input_ids"] == token]
    return found - model.get_input_embeddings()(torch.tensor([token])) if name == "molmo" else found


@pytest.mark.parametrize("canvas", [CANVASES[1], CANVASES[4], CANVASES[5]], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_what_enters_the_decoder(name: str, canvas: tuple[int, int]) -> None:
    """Tokens from a pool's half precision pictures equal those of processor and forward, picture by picture."""
    model, processor = made(name)
    family = FAMILIES[name]
    indices = [i for i in range(60) if (scene("train", i).width, scene("train", i).height) == canvas][:2]
    pool = Pool(family, processor, [("train", 0, index) for index in indices])
    group = pool.groups[f"{canvas[0]} x {canvas[1]}"]
    with torch.no_grad():
        got = family.tokens(model, pool.pictures(group, np.array([1, 0]), some_grey=False))
    for tokens, index in zip(got, reversed(indices), strict=True):
        expected = features(name, asked(processor, [picture(scene("train", index))]))
        torch.testing.assert_close(tokens, expected, rtol=0, atol=2e-3 * float(expected.abs().max()))
    assert float((got[0] - got[1]).abs().max()) > 0.05 * float(got.abs().max())


@pytest.mark.parametrize("name", WHOLE)
def test_patches_are_what_the_connector_reads(name: str) -> None:
    """The input of the module that follows the tower is the patches, in their order."""
    model, processor = made(name)
    inputs = asked(processor, [picture(on((64, 48)))])
    after = {
        "llava": lambda: model.model.multi_modal_projector.linear_1,
        "idefics2": lambda: model.model.connector.modality_projection,
        "qwen2_vl": lambda: model.model.visual.merger.ln_q,
    }[name]()
    seen: list[Tensor] = []
    handle = after.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((*args, *kwargs.values())[0]), with_kwargs=True
    )
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        handle.remove()
    with torch.no_grad():
        patches = FAMILIES[name].patches(
            model, {k: v for k, v in inputs.items() if k in ("pixel_values", "image_grid_thw")}
        )
    rows, cols = FAMILIES[name].patch_grid(64, 48)
    assert patches.shape[:2] == (1, rows * cols)
    torch.testing.assert_close(patches.flatten(), seen[0].flatten(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", WHOLE)
def test_patch_order(name: str) -> None:
    """One bright cell of the grid changes one patch embedding: the one that the order says."""
    model, processor = made(name)
    family = FAMILIES[name]
    width, height = (64, 64) if name == "llava" else (64, 48)
    rows, cols = family.patch_grid(width, height)
    order = family.patch_order(rows, cols)
    assert sorted(order.tolist()) == list(range(rows * cols))
    embed = {
        "llava": lambda: model.model.vision_tower.embeddings.patch_embedding,
        "idefics2": lambda: model.model.vision_model.embeddings.patch_embedding,
        "qwen2_vl": lambda: model.model.visual.patch_embed,
    }[name]()

    def embedded(pixels: np.ndarray) -> Tensor:
        values = processor.image_processor(images=[Image.fromarray(pixels)], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            out = embed(values.flatten(0, 1) if values.ndim == 5 else values)
        return out.flatten(2)[0].T if out.ndim == 4 else out

    dark = np.zeros((height, width, 3), np.uint8)
    base = embedded(dark)
    for cell in (0, 1, cols, 2 * cols + 3, rows * cols - 1):
        bright = dark.copy()
        size = height // rows
        top, left = cell // cols * size, cell % cols * size
        bright[top : top + size, left : left + size] = 255
        changed = (embedded(bright) - base).abs().amax(1).nonzero().flatten().tolist()
        assert [int(order[index]) for index in changed] == [cell]


@pytest.mark.parametrize("name", WHOLE)
def test_grey(name: str) -> None:
    """Grey pixel values are those of the picture whose three channels are their mean."""
    item = on((48, 64))
    pixels = render(item)[0]
    # Multiples of three, so that the mean is a whole number.
    pixels -= pixels % 3
    flat = np.repeat((pixels.astype(int).sum(-1, keepdims=True) // 3).astype(np.uint8), 3, axis=-1)
    process = made(name)[1].image_processor
    coloured, expected = (
        process(images=[Image.fromarray(one)], return_tensors="pt")["pixel_values"] for one in (pixels, flat)
    )
    if name == "qwen2_vl":
        coloured, expected = coloured[None], expected[None]
    before = coloured.clone()
    torch.testing.assert_close(FAMILIES[name].grey(coloured), expected, rtol=0, atol=1e-5)
    assert torch.equal(coloured, before)
    assert not torch.allclose(coloured, expected, atol=0.1)


@pytest.mark.parametrize("canvas", CANVASES, ids=str)
def test_positions_of_qwen2_vl(canvas: tuple[int, int]) -> None:
    """By hand: text counts on all axes; the image has its time, row and column; text goes on after the largest."""
    model, processor = made("qwen2_vl")
    inputs = asked(processor, [picture(on(canvas))], "red")
    rows, cols = canvas[1] // 8, canvas[0] // 8
    start = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero()[0])
    expected = [[i] * 3 for i in range(start)]
    expected += [[start, start + row, start + col] for row in range(rows) for col in range(cols)]
    after = max(max(one) for one in expected) + 1
    rest = inputs["input_ids"].shape[1] - len(expected)
    expected += [[after + i] * 3 for i in range(rest)]
    assert FAMILIES["qwen2_vl"].positions(model, inputs).T.tolist() == expected


@pytest.mark.parametrize("name", ["llava", "idefics2", "molmo"])
def test_positions_count(name: str) -> None:
    """One axis, three times."""
    model, processor = made(name)
    inputs = asked(processor, [picture(on((48, 48)))])
    expected = list(range(inputs["input_ids"].shape[1]))
    assert FAMILIES[name].positions(model, inputs).tolist() == [expected] * 3


@pytest.mark.parametrize("name", NAMES)
def test_everything_else_is_trained(name: str) -> None:
    """The language loss has a gradient for every parameter but the untrained modules'."""
    torch.manual_seed(0)
    model, processor = build(name)
    family = FAMILIES[name]
    pool = Pool(family, processor, [("train", 0, index) for index in range(2)])
    stage = LanguageStage(family, model, pool, 1, Packer(processor.tokenizer, family.image_token(model)))
    stage.log_dict = lambda *_, **__: None
    for canvas in pool.groups:
        stage.loss((canvas, np.array([0]), [0])).backward()
    # LLaVA's projector reads the tower before its last norm.
    last = [model.model.vision_tower.post_layernorm] if name == "llava" else []
    idle = {id(p) for module in last for p in module.parameters()}
    for parameter_name, p in model.named_parameters():
        if id(p) in idle:
            assert p.grad is None
        else:
            assert p.grad is not None, parameter_name
            assert float(p.grad.abs().max()) > 0, parameter_name
            assert torch.isfinite(p.grad).all(), parameter_name
