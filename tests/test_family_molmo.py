"""The small Molmo: its prompt and tokens word by word, and labels that stand with the crops' patches and tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.draw import render
from hooked_mm.scenes.language import WORD_CLASSES
from hooked_mm.scenes.world import CANVASES
from hooked_mm.small.families import FAMILIES
from hooked_mm.small.labels import IGNORE
from tests.test_families import asked, made, on, picture

MOLMO = FAMILIES["molmo"]
# Canvas (width, height) -> (scale of the picture, rows and columns of crops of 48 px that move by 32), by hand.
CUTS = {
    (48, 48): (1, 1, 1),
    (56, 56): (80 / 56, 2, 2),
    (64, 48): (1, 1, 2),
    (48, 64): (1, 2, 1),
    (72, 48): (1, 1, 2),
    (48, 72): (1, 2, 1),
}


def test_prompt() -> None:
    """Pictures stand before the user; nothing between words but what people would write."""
    content = [{"type": "image"}, {"type": "text", "text": "what place is this ?"}]
    prompt = made("molmo")[1].apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert prompt == "<|image|> User: what place is this ? Assistant:"


@pytest.mark.parametrize("canvas", CANVASES, ids=str)
def test_crops_and_tokens(canvas: tuple[int, int]) -> None:
    """As many crops as by hand; a token per 8 x 8 pixels of what the crops cover, and 36 of the whole."""
    model, processor = made("molmo")
    inputs = asked(processor, [picture(on(canvas))])
    _, down, across = CUTS[canvas]
    assert inputs["images"].shape == (1, 1 + down * across, 144, 48)
    rows, cols = 4 * down + 2, 4 * across + 2
    assert MOLMO.token_grid(*canvas) == (rows, cols)
    ids = inputs["input_ids"][0]
    assert int((ids == model.config.image_patch_id).sum()) == 36 + rows * cols
    words = processor.tokenizer.convert_ids_to_tokens(ids)
    lines = [*["<im_patch>"] * 6, "<im_col>"] * 6, [*["<im_patch>"] * cols, "<im_col>"] * rows
    begun = ["<s>", "<im_start>", *lines[0], "<im_end>", "<im_start>", *lines[1], "<im_end>", "user", ":"]
    assert words[: len(begun)] == begun


@pytest.mark.parametrize("canvas", CANVASES, ids=str)
def test_labels_stand_with_their_patches(canvas: tuple[int, int]) -> None:
    """Where one object covers all of a patch, in the whole or in a crop, its label is that object's; so for tokens."""
    item = on(canvas)
    masks = render(item)[1]
    patches, tokens = MOLMO.labels(made("molmo")[1], item, masks)
    scale, down, across = CUTS[canvas]
    width, height = canvas
    views = [(48 / max(canvas), 0.0, 0.0, (48 - 48 * width / max(canvas)) / 2, (48 - 48 * height / max(canvas)) / 2)]
    left = (32 * across + 16 - int(width * scale + 1e-6)) // 2
    top = (32 * down + 16 - int(height * scale + 1e-6)) // 2
    views += [(scale, 32.0 * j, 32.0 * i, left, top) for i in range(down) for j in range(across)]
    sure = 0
    for number, (factor, x0, y0, dx, dy) in enumerate(views):
        for cell in range(144):
            row, col = divmod(cell, 12)
            ends = [
                ((place + start - shift) / factor)
                for start, shift, place in (
                    (x0, dx, 4 * col),
                    (x0, dx, 4 * col + 4),
                    (y0, dy, 4 * row),
                    (y0, dy, 4 * row + 4),
                )
            ]
            xs, xe, ys, ye = ends
            if xs < 1 or ys < 1 or xe > width - 1 or ye > height - 1:
                continue
            # With a pixel around it, since scaling blurs.
            part = masks[:, int(ys) - 1 : int(np.ceil(ye)) + 1, int(xs) - 1 : int(np.ceil(xe)) + 1]
            shown = part.reshape(len(masks), -1)
            label = {name: int(values[number * 144 + cell]) for name, values in patches.items()}
            full = [one for one in range(len(masks)) if shown[one].min() == 1]
            if full:
                owner = item.objects[full[0]]
                assert label["colours"] == WORD_CLASSES["colours"].index(owner.colour)
                assert label["shapes"] == WORD_CLASSES["shapes"].index(owner.shape)
                assert label["places"] == IGNORE
                sure += 1
            elif shown.max() == 0:
                assert label["object"] == 0
                assert label["places"] == WORD_CLASSES["places"].index(item.place)
                sure += 1
    assert sure > 60
    # Tokens: of the whole first, then of the stitched crops row by row; most show what their four patches show.
    whole = patches["object"][:144].view(6, 2, 6, 2).float().mean((1, 3)).flatten()
    assert (tokens["object"][:36][whole == 1] == 1).all()
    assert (tokens["object"][:36][whole == 0] == 0).all()
    stitched = tokens["object"][36:].view(4 * down + 2, 4 * across + 2)
    for i in range(down):
        for j in range(across):
            crop = patches["object"][144 * (1 + i * across + j) :][:144].view(6, 2, 6, 2).float().mean((1, 3))
            # A crop's inner tokens are always its own.
            inner = slice(1, 5)
            mine = stitched[4 * i : 4 * i + 6, 4 * j : 4 * j + 6]
            assert (mine[inner, inner][crop[inner, inner] == 1] == 1).all()
            assert (mine[inner, inner][crop[inner, inner] == 0] == 0).all()


def test_patches_are_what_the_connector_reads() -> None:
    """The values that the pooling attention takes, two by two, are the patches in their order."""
    model, processor = made("molmo")
    inputs = asked(processor, [picture(on((64, 48)))])
    seen: list[torch.Tensor] = []
    handle = model.model.vision_backbone.image_pooling_2d.register_forward_pre_hook(
        lambda _, args: seen.append(args[1])
    )
    try:
        with torch.no_grad():
            model(**inputs)
            patches = MOLMO.patches(model, {"pixel_values": inputs["images"]})
    finally:
        handle.remove()
    assert patches.shape == (1, 3 * 144, 160)
    # No vector for padding has been learnt yet, so that it adds nothing.
    groups = patches.view(3, 6, 2, 6, 2, 160).transpose(2, 3).reshape(3 * 36, 4, 160)
    torch.testing.assert_close(groups, seen[0], rtol=0, atol=1e-5)


def test_grey() -> None:
    """Grey pixel values are those of the picture whose three channels are their mean."""
    pixels = render(on((48, 64)))[0]
    pixels -= pixels % 3
    flat = np.repeat((pixels.astype(int).sum(-1, keepdims=True) // 3).astype(np.uint8), 3, axis=-1)
    cut = made("molmo")[1].image_processor.cut
    coloured, expected = (cut(Image.fromarray(one)).pixels for one in (pixels, flat))
    torch.testing.assert_close(MOLMO.grey(coloured), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(coloured, expected, atol=0.1)


def test_settling_shortens_image_tokens_and_changes_no_answer() -> None:
    """To a length between 128 and 256; the logits of a trained model are the same to rounding."""
    model = HookedMM.small("molmo", check=False)
    weight = model.hf_model.model.vision_backbone.image_projector.w2.weight
    batch = model.prepare([picture(on(canvas)) for canvas in CANVASES], "what place is this ?")
    cut = model.processor.image_processor.cut(picture(on((48, 48))))
    pixels = {"pixel_values": cut.pixels[None], "masks": cut.masks, "order": cut.order}
    before = model.run_with_hooks(batch)[:, -1]
    with torch.no_grad():
        weight *= 1000
        MOLMO.settle(model.hf_model, pixels)
        length = float(MOLMO.tokens(model.hf_model, pixels).norm(dim=-1).mean())
    assert 128 < length <= 256
    after = model.run_with_hooks(batch)[:, -1]
    assert torch.equal(after.argmax(-1), before.argmax(-1))
    assert float((after - before).abs().max()) < 0.15 * float(before.abs().max())
    kept = weight.clone()
    MOLMO.settle(model.hf_model, pixels)
    assert torch.equal(weight, kept)
