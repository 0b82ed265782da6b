"""Whose patches a tower's value holds, in real miniatures: against pixels that change, raw hooks and counts by hand."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_mm.batch import Modality
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.interventions import Add, Scale
from hooked_mm.patching import Patch
from hooked_mm.runner import Hook
from hooked_mm.testing.miniatures import miniature, miniature_inputs
from hooked_mm.value_layout import Layout, has_heads, layout
from tests.tiny import batch_of, picture, run

EMBED, BLOCK, OUT = "vision.hook_embed", "vision.blocks.1.hook_resid_post", "projector.hook_out"
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
TILES = ("llava_next", "llava_onevision", "idefics3", "internvl", "mllama", "florence2", "idefics2", "gemma3", "blip-2")


@functools.cache
def hooked(family: str) -> HookedMM:
    """A miniature (shared: leave it as it is)."""
    return HookedMM(miniature(family), check=False)


@functools.cache
def inputs(family: str, samples: int = 3) -> dict[str, Tensor]:
    """One image per sample, of different sizes or tilings where the family has any."""
    return miniature_inputs(hooked(family).hf_model, samples)


def raw_value(model: HookedMM, name: str, given: dict[str, Tensor]) -> Tensor:
    """What a point's module returns, read by a raw hook."""
    found: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        found.append((output[0] if isinstance(output, tuple) else output).clone())

    handle = model.hf_model.get_submodule(model.hook_points[name].module).register_forward_hook(keep, prepend=True)
    try:
        with torch.no_grad():
            model.hf_model(**given)
    finally:
        handle.remove()
    return found[0]


def plan_of(model: HookedMM, name: str, shape: tuple[int, ...], given: dict[str, Tensor]) -> Layout:
    """Our layout of a value."""
    return layout(Hook(name, None, 0, model._batch(given)), shape)


def real_places(plan: Layout, sample: int) -> Tensor:
    """The patches of a sample, padding left out."""
    return (plan.need("sample", "") == sample).expand(plan.shape) & (plan.modality == Modality.IMAGE)


def redrawn(given: dict[str, Tensor], sample: int, rows: Tensor) -> dict[str, Tensor]:
    """Another picture for a sample, whose rows of `pixel_values` are given; what is zero is padding and stays so."""
    pixels = given["pixel_values"].clone()
    pixels[rows] = torch.where(pixels[rows] == 0, 0.0, pixels[rows] * 2 - 1)
    return {**given, "pixel_values": pixels}


def pixel_rows(family: str, sample: int) -> Tensor:
    """By hand: the rows of the miniatures' `pixel_values` that show a sample's image."""
    return torch.arange(*[(0, 24), (24, 48), (48, 64)][sample]) if family in QWEN else torch.tensor([sample])


@pytest.mark.parametrize("family", [*TILES, *QWEN])
def test_patches_of_a_sample_are_those_that_its_pixels_change(family: str) -> None:
    """Another picture in one sample, in raw tensors: exactly the places said to be its own change in block and
    projector (padding may), and nothing of another sample.
    """
    model, given = hooked(family), inputs(family)
    # Qwen2.5's projector gives windows; its tower's last step puts them back.
    for name in (BLOCK,) if family == "qwen2_5_vl" else (BLOCK, OUT):
        before = raw_value(model, name, given)
        for sample in range(3):
            after = raw_value(model, name, redrawn(given, sample, pixel_rows(family, sample)))
            point = before.flatten(2).mT if family == "florence2" and name == BLOCK else before
            plan = plan_of(model, name, tuple(point.shape), given)
            changed = before != after
            changed = changed.any(dim=1).flatten(1) if point is not before else changed.any(dim=-1)
            changed = changed.reshape(plan.shape)
            own = (plan.need("sample", "") == sample).expand(plan.shape)
            assert changed[real_places(plan, sample)].all(), (name, sample)
            assert real_places(plan, sample).any()
            assert not changed[~own].any(), (name, sample)


def by_hand(family: str) -> Tensor:
    """(rows, places) of the tower's first block: the sample whose patch stands there, -1 for padding."""
    if family in QWEN:
        return torch.tensor([[0] * 24 + [1] * 24 + [2] * 16])
    if family in ("llava_next", "llava_onevision"):
        # Two pictures of a whole and two crops, one of a whole and four; LLaVA-NeXT's tower has a class token.
        rows = torch.tensor([0] * 3 + [1] * 3 + [2] * 5)
        return rows[:, None].expand(-1, 17 if family == "llava_next" else 16)
    if family == "mllama":
        # Tiles of a class token and 16 patches, filled up to 24; one, two and four tiles are real.
        tile, place = torch.arange(96) // 24, torch.arange(96) % 24
        rows = [torch.where((tile < real) & (place < 17), sample, -1) for sample, real in enumerate([1, 2, 4])]
        return torch.stack(rows)
    places = {"florence2": 64, "idefics3": 16, "idefics2": 16, "gemma3": 16}.get(family, 17)
    return torch.arange(3)[:, None].expand(-1, places)


@pytest.mark.parametrize("family", [*TILES, *QWEN])
def test_a_vector_per_sample_reaches_its_patches_alone(family: str) -> None:
    """Add with one vector per sample at what enters the tower's first block: as a raw hook that adds by a table made by
    hand, in the block and in the logits, bit for bit; padding stays.
    """
    model, given = hooked(family), inputs(family)
    owner = by_hand(family)
    vectors = torch.randn(3, 16 if family == "florence2" else 32, generator=torch.Generator().manual_seed(1))
    push = torch.where(owner[..., None] >= 0, vectors[owner], 0.0)
    block = model.hf_model.get_submodule(model.hook_points[EMBED].module)

    def add(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        key = None if args else next(iter(kwargs))
        value = args[0] if key is None else kwargs[key]
        shift = push.mT.reshape(value.shape) if family == "florence2" else push.reshape(value.shape)
        return ((value + shift, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: value + shift})

    handle = block.register_forward_pre_hook(add, with_kwargs=True)
    try:
        with torch.no_grad():
            expected = model.hf_model(**given).logits
            value = raw_value(model, "vision.blocks.0.hook_resid_post", given)
    finally:
        handle.remove()
    with model.hooks([Add(EMBED, vectors)]):
        logits, cache = model.run_with_cache(given, "vision.blocks.0.hook_resid_post")
    got = cache["vision.blocks.0.hook_resid_post"]
    assert torch.equal(got.mT.reshape(value.shape) if family == "florence2" else got, value)
    assert logits is not None
    assert torch.equal(logits, expected)
    assert not torch.equal(logits, model.run_with_hooks(given))


@pytest.mark.parametrize("family", ["llava", *TILES, *QWEN])
def test_copies_for_beams_stand_as_the_layout_says(family: str) -> None:
    """Every patch that the tower sees, in a generation with three beams and in one pass on inputs that are repeated as
    generation repeats them, holds what the patch of the same sample, image and index holds in a plain pass.
    """
    model, given = hooked(family), inputs(family)
    _, cache = model.run_with_cache(given, [EMBED, OUT])
    seen: list[tuple[Tensor, Layout]] = []

    def look(value: Tensor, hook: Hook) -> None:
        seen.append((value.clone(), layout(Hook(hook.name, None, 0, cache.batch), value.shape)))

    prompt = {name: value for name, value in given.items() if not name.startswith("decoder")}
    with model.hooks([([EMBED, OUT], look)]):
        model.generate(prompt, 2, num_beams=3)
        # Mllama's images are repeated by transformers itself, others' are read before.
        assert seen[0][0].shape[0] == cache[EMBED].shape[0] * (3 if family == "mllama" else 1)
        model.run_with_hooks(repeated(family, given))
    for name, (value, plan) in zip([EMBED, OUT] * 2, seen, strict=True):
        plain = _by_place(cache[name], layout(Hook(name, None, 0, cache.batch), cache[name].shape))
        found = _by_place(value, plan)
        times = value.numel() // cache[name].numel()
        assert {place: len(values) for place, values in found.items()} == dict.fromkeys(plain, times), name
        for place, values in found.items():
            for item in values:
                assert torch.allclose(item, plain[place][0], atol=1e-5), (name, place)
        assert not torch.allclose(plain[0, 0, 1][0], plain[1, 0, 1][0], atol=1e-2)
        assert len(plan.need("unit", "").unique()) == 3 * times


def repeated(family: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every row three times, one after the other; packed patches image by image."""
    made = {name: value.repeat_interleave(3, dim=0) for name, value in given.items()}
    if family in QWEN:
        parts = given["pixel_values"].split([24, 24, 16])
        made["pixel_values"] = torch.cat([part for part in parts for _ in range(3)])
    return made


def _by_place(value: Tensor, plan: Layout) -> dict[tuple[int, int, int], list[Tensor]]:
    """(sample, image, index) -> the vectors there."""
    flat = value.reshape(*plan.shape, -1)
    samples, images, own = (plan.need(name, "").expand(plan.shape) for name in ("sample", "image", "own"))
    found: dict[tuple[int, int, int], list[Tensor]] = {}
    for row, column in (plan.modality == Modality.IMAGE).expand(plan.shape).nonzero().tolist():
        place = int(samples[row, column]), int(images[row, column]), int(own[row, column])
        found.setdefault(place, []).append(flat[row, column])
    return found


@pytest.mark.parametrize(
    ("family", "to", "origin"),
    [
        ("llava_next", range(3), range(3, 6)),
        ("llava_onevision", range(3), range(3, 6)),
        ("qwen2_vl", range(6), range(6, 12)),
        ("qwen2_5_vl", range(6), range(6, 12)),
        ("qwen3_vl", range(6), range(6, 12)),
        ("idefics3", [0], [1]),
    ],
)
def test_patching_takes_an_image_with_all_its_crops(family: str, to: Any, origin: Any) -> None:
    """The first sample's image tokens from the second's picture (both of equal size): rows copied by hand."""
    model, given = hooked(family), inputs(family)
    _, cache = model.run_with_cache(given, OUT)
    with model.hooks([Patch(OUT, cache, sample=[1, 1, 2])]):
        _, got = model.run_with_cache(given, OUT)
    expected = cache[OUT].clone()
    expected[list(to)] = cache[OUT][list(origin)]
    assert torch.equal(got[OUT], expected)
    assert not torch.equal(expected, cache[OUT])


def test_patching_refuses_images_of_other_sizes() -> None:
    """Two tiles can't be patched from four: the numbers are named."""
    model, given = hooked("mllama"), inputs("mllama")
    _, cache = model.run_with_cache(given, BLOCK)
    with pytest.raises(BadInputError, match=r"34 positions at .* are to be patched from 68 of the source's sample 2"):
        model.run_with_hooks(given, [Patch(BLOCK, cache, sample=[0, 2, 2])])


def test_an_index_counts_through_the_crops() -> None:
    """-1 is the last patch of an image's last crop, 17 the class token of its second; padding tiles have none."""
    model, given = hooked("llava_next"), inputs("llava_next")
    _, plain = model.run_with_cache(given, EMBED)
    with model.hooks([Add(EMBED, torch.ones(32), at=[17, -1])]):
        _, cache = model.run_with_cache(given, EMBED)
    changed = (cache[EMBED] != plain[EMBED]).all(dim=-1).nonzero().tolist()
    assert changed == [[1, 0], [2, 16], [4, 0], [5, 16], [7, 0], [10, 16]]
    model, given = hooked("mllama"), inputs("mllama")
    _, plain = model.run_with_cache(given, OUT)
    with model.hooks([Add(OUT, torch.ones(64), at=-1)]):
        _, cache = model.run_with_cache(given, OUT)
    changed = (cache[OUT] != plain[OUT]).all(dim=-1).nonzero().tolist()
    # One real tile, two and four, of 17 patches each.
    assert changed == [[0, 16], [1, 33], [2, 67]]
    with pytest.raises(BadInputError, match=r"sample 0: .*index=17.*there are only 17 patches at 'projector.hook_out'"):
        model.run_with_hooks(given, [Add(OUT, torch.ones(64), at=17)])


@pytest.mark.parametrize("family", ["mllama", "florence2"])
def test_keys_of_cross_attention(family: str) -> None:
    """One factor per sample and one head: as a raw hook on the projection of keys that knows the rows by hand."""
    model, given = hooked(family), inputs(family)
    name, factors = "blocks.1.xattn.hook_k", torch.tensor([2.0, -1.0, 0.5])
    block = model.structure.text.blocks[1]
    project = model.hf_model.get_submodule(f"{block.path}.{block.parts['xk']}")
    if family == "mllama":
        # A row per tile, four to a sample; only real tiles.
        rows = torch.tensor([2.0, 1, 1, 1, -1, -1, 1, 1, 0.5, 0.5, 0.5, 0.5])[:, None, None]
    else:
        rows = torch.where(given["attention_mask"] == 1, factors[:, None], 1.0)[..., None]

    def scale(module: Any, args: Any, output: Tensor) -> Tensor:
        return torch.cat([output[..., :16] * rows, output[..., 16:]], dim=-1)

    handle = project.register_forward_hook(scale)
    try:
        with torch.no_grad():
            expected = model.hf_model(**given).logits
    finally:
        handle.remove()
    got = model.run_with_hooks(given, [Scale(name, factors, heads=0)])
    assert got is not None
    assert torch.equal(got, expected)
    assert not torch.equal(got, model.run_with_hooks(given))


def test_encoder_points_have_the_prompt_and_text_points_the_decoder() -> None:
    """Florence-2: a vector per sample at image positions of the encoder and at the second token of the decoder."""
    model, given = hooked("florence2"), inputs("florence2")
    vectors = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    image = given["input_ids"] == 150
    second = torch.zeros(3, 5, dtype=torch.bool)
    second[:, 1] = True
    for name, at, mask in (
        ("encoder.blocks.0.hook_resid_post", "image", image),
        ("blocks.0.hook_resid_post", 1, second),
    ):
        _, before = model.run_with_cache(given, name)
        with model.hooks([Add(name, vectors, at=at)]):
            _, after = model.run_with_cache(given, name)
        expected = torch.where(mask[..., None], before[name] + vectors[:, None], before[name])
        assert torch.equal(after[name], expected)
    with pytest.raises(BadInputError, match="there are only 5 tokens"):
        model.run_with_hooks(given, [Add("blocks.0.hook_resid_post", vectors, at=5)])


@pytest.mark.parametrize("family", ["llava_next", "mllama", "qwen2_5_vl", "florence2"])
def test_every_point_of_a_pass_has_a_layout(family: str) -> None:
    """Shapes of all points fit, heads are told by name (`xattn.` and `encoder.` included), the sample is known."""
    model = hooked(family)
    _, cache = model.run_with_cache(inputs(family))
    for name, value in cache.items():
        plan = layout(Hook(name, None, 0, cache.batch), value.shape)
        assert (model.hook_points[name].form == "heads") == has_heads(name), name
        vector = 1 + has_heads(name)
        assert plan.shape[0] * plan.shape[1] == value.shape[:-vector].numel(), name
        assert plan.need("sample", name).unique().tolist() == [0, 1, 2], name


@pytest.mark.parametrize(
    "family", ["llava_next", "llava_onevision", "idefics3", "smolvlm", "internvl", "mllama", "qwen2_vl", "qwen3_vl"]
)
def test_images_of_one_sample_are_told_apart_through_real_processors(family: str) -> None:
    """Two pictures in the first sample and one in the second, cut into crops or packed: another picture of the same
    size changes exactly the projector's places that have its sample and number.
    """
    pictures = [[picture(40, 24, 0), picture(20, 48, 1)], [picture(48, 32, 2)]]
    before = run(family, batch_of(family, pictures))
    plan = layout(Hook(OUT, None, 0, before.batch), before[OUT].shape)
    for sample, image in ((0, 0), (0, 1), (1, 0)):
        other = [list(row) for row in pictures]
        other[sample][image] = picture(*pictures[sample][image].size, 7)
        changed = (run(family, batch_of(family, other))[OUT] != before[OUT]).any(dim=-1).reshape(plan.shape)
        own = (plan.need("sample", "") == sample) & (plan.need("image", "") == image)
        own = own.expand(plan.shape)
        if family == "mllama":
            # Empty tiles of a picture see its real ones.
            changed = changed & (plan.modality == Modality.IMAGE)
            own = own & (plan.modality == Modality.IMAGE)
        assert own.any()
        assert torch.equal(changed, own), (sample, image)
        count = int(own.sum())
        assert (plan.need("length", "").expand(plan.shape)[own] == count).all()
        assert plan.need("own", "")[own].tolist() == list(range(count))


@pytest.mark.parametrize("family", ["llava_next", "idefics3"])
def test_copies_of_samples_with_two_images(family: str) -> None:
    """LLaVA-NeXT's pixels have a row per image, Idefics3's a row per sample: each is repeated as a whole."""
    batch = batch_of(family, [[picture(40, 24, 0), picture(20, 48, 1)], [picture(48, 32, 2)]])
    plain = run(family, batch)[OUT]
    twice = batch.with_inputs({name: value.repeat_interleave(2, dim=0) for name, value in batch.inputs.items()})
    value = run(family, twice)[OUT]
    places = [_by_place(item, layout(Hook(OUT, None, 0, batch), item.shape)) for item in (plain, value)]
    assert places[0].keys() == places[1].keys()
    for place, found in places[1].items():
        assert len(found) == 2
        assert all(torch.allclose(item, places[0][place][0], atol=1e-5) for item in found)
