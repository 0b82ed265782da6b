"""What a decomposition refuses, and models whose blocks differ: images alone, parallel attention and MLP."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    Gemma2Config,
)

from hooked_mm.cache import ActivationCache
from hooked_mm.errors import BadInputError, UnknownHookError
from hooked_mm.hook_points import HookPoint
from hooked_mm.hooked import HookedMM
from tests.decoders import INPUTS, close, miniature, run

QUESTIONS = ["what", "what place is this ?", "is there a red square ?"]


@pytest.fixture(scope="module")
def ran(llava: HookedMM, images: list[Image.Image]) -> tuple[Tensor, ActivationCache]:
    """Three samples on the small LLaVA: one image, two images, none."""
    return run(llava, llava.prepare([images[0], images[1:3], None], QUESTIONS, ["red", None, None]))


@pytest.fixture(scope="module")
def cache(ran: tuple[Tensor, ActivationCache]) -> ActivationCache:
    """Its cache."""
    return ran[1]


def test_what_a_norm_behind_attention_adds_is_what_is_decomposed() -> None:
    """Gemma 2 normalises what attention and MLP give before it is added; heads are shares of the normalised."""
    _, cache = run(miniature(Gemma2Config, head_dim=8), INPUTS)
    assert close(cache.decompose_resid().sum(0), cache["blocks.2.hook_resid_post"])
    assert close(cache.stack_head_results(incl_remainder=True).sum(0), cache["blocks.2.hook_resid_post"])


def test_components_that_do_not_add_up_are_refused(llava: HookedMM, images: list[Image.Image]) -> None:
    """A run whose stream was written to."""
    batch = llava.prepare(images[:1], QUESTIONS[:1])
    with llava.hooks([("blocks.2.hook_resid_post", lambda value, hook: value * 3)]):
        _, cache = run(llava, batch)
    assert close(cache.decompose_resid(2).sum(0), cache["blocks.2.hook_resid_pre"])
    with pytest.raises(BadInputError, match=r"residual stream of layer 3.*check=False"):
        cache.decompose_resid(3)
    assert cache.decompose_resid(3, check=False).shape[0] == 7
    with llava.hooks([("blocks.1.hook_attn_out", lambda value, hook: value * 0)]):
        _, cache = run(llava, batch)
    with pytest.raises(BadInputError, match="do not add up to attn_out of layer 1"):
        cache.stack_head_results()
    assert len(cache.stack_head_results(check=False)) == 24


def test_what_was_not_cached_is_named(llava: HookedMM, images: list[Image.Image]) -> None:
    """The first lacking point; what enters block 0 goes by either of its names; the rest is not needed."""
    batch = llava.prepare(images[:1], QUESTIONS[:1])
    few = run(llava, batch, ["blocks.*.hook_attn_out", "blocks.0.hook_resid_pre"])[1]
    assert few.decompose_resid(mode="attn").shape[0] == 7
    assert torch.equal(few.decompose_resid(0)[0], few["blocks.0.hook_resid_pre"])
    with pytest.raises(UnknownHookError, match=r"'blocks\.0\.hook_mlp_out' was not cached"):
        few.decompose_resid(2)
    with pytest.raises(UnknownHookError, match=r"'blocks\.5\.hook_resid_post' was not cached"):
        few.logit_attrs(few.decompose_resid(mode="attn"), 3)
    with pytest.raises(UnknownHookError, match=r"'hook_embed' was not cached"):
        run(llava, batch, "blocks.1.hook_attn_out")[1].decompose_resid(0)


def test_shapes_and_models_that_do_not_fit(cache: ActivationCache) -> None:
    """A stack of another selection, and a cache without weights."""
    parts = cache.decompose_resid(role="answer")
    with pytest.raises(BadInputError, match=r"fits neither the run's positions .* pass the selection it was made with"):
        cache.logit_attrs(parts, 3)
    with pytest.raises(BadInputError, match="fits neither"):
        cache.apply_ln_to_stack(parts, role="question")
    bare = ActivationCache(dict(cache), cache.batch, cache._points)
    assert torch.equal(bare.decompose_resid(), cache.decompose_resid())
    for needs in (
        lambda: bare.logit_attrs(parts, 3),
        lambda: bare.stack_head_results(),
        lambda: bare._norm(0, False, ""),
    ):
        with pytest.raises(
            BadInputError, match=r"needs the model's weights.*ActivationCache\.load\(path, model=model\)"
        ):
            needs()


def point(name: str, layer: int | None) -> HookPoint:
    """A text point of a made-up model."""
    return HookPoint(name, "m", "output", "text", layer, "")


def test_what_only_images_bring_is_part_of_the_sum(llava: HookedMM, cache: ActivationCache) -> None:
    """Deepstack between blocks and a block that only cross-attends: added with images, absent without."""
    names = ["hook_embed"]
    for layer, added in enumerate((["attn", "mlp"], ["xattn", "mlp"], ["attn", "mlp"])):
        block = f"blocks.{layer}."
        names += [block + "hook_resid_pre", *(f"{block}hook_{part}_out" for part in added), block + "hook_resid_post"]
        names += [block + "hook_insert_out"] * (layer == 2)
    points = {name: point(name, int(name[7]) if name.startswith("blocks") else None) for name in names}
    generator = torch.Generator().manual_seed(0)
    stream = torch.randn(*cache.batch.modality.shape, 8, generator=generator)
    values = {"hook_embed": stream}
    without = {"hook_embed": stream}
    for name in names[1:]:
        if name.endswith("_out"):
            values[name] = torch.randn(stream.shape, generator=generator)
            stream = stream + values[name]
        else:
            values[name] = stream
    made = ActivationCache(values, cache.batch, points)
    parts, labels = made.decompose_resid(return_labels=True)
    assert labels[3:5] == ["1_xattn_out", "1_mlp_out"]
    assert labels[-1] == "2_insert_out"
    assert close(parts.sum(0), stream)
    assert torch.equal(made.accumulated_resid()[-1], stream)
    broken = {name: value for name, value in values.items() if name != "blocks.2.hook_insert_out"}
    with pytest.raises(UnknownHookError, match=r"insert_out' was not cached"):
        ActivationCache(broken, cache.batch, points).decompose_resid()
    # The same model on text alone: block 1 does not run.
    stream = without["hook_embed"]
    for name in [n for n in names[1:] if not n.startswith("blocks.1.") and "insert" not in n]:
        if name.endswith("_out"):
            without[name] = values[name]
            stream = stream + values[name]
        else:
            without[name] = stream
    text = llava.prepare([None] * 3, QUESTIONS)
    plain = {name: value[:, : text.modality.shape[1]] for name, value in without.items()}
    alone = ActivationCache(plain, text, points)
    parts, labels = alone.decompose_resid(return_labels=True)
    assert labels == ["embed", "0_attn_out", "0_mlp_out", "2_attn_out", "2_mlp_out"]
    assert close(parts.sum(0), plain["blocks.2.hook_resid_post"])
    assert len(alone.accumulated_resid()) == 4


def test_a_block_whose_mlp_reads_what_attention_reads(cache: ActivationCache) -> None:
    """Parallel attention and MLP have no stream between them."""
    points = {name: point(name, 0) for name in ("blocks.0.hook_attn_out", "blocks.0.hook_mlp_out")}
    points["hook_embed"] = point("hook_embed", None)
    parallel = ActivationCache({}, cache.batch, points)
    with pytest.raises(BadInputError, match="attention and MLP read the same stream; leave mlp_input out"):
        parallel.decompose_resid(0, True)
