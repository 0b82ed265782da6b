"""The connector's map from tokens to patches: against what patches really change, and against references by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from hooked_mm.batch import Batch
from hooked_mm.connector import connector_map, connector_patterns, rolled
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.runner import Hook
from hooked_mm.scenes.dataset import picture
from hooked_mm.scenes.world import sample_scene
from hooked_mm.testing.miniatures import known, miniature, miniature_inputs

MERGING = ("llava", "idefics3", "gemma3", "qwen2_5_vl", "qwen3_vl", "granite4_vision", "molmo", "paligemma")
RESAMPLING = ("idefics2", "kosmos-2", "blip-2", "instructblip", "idefics")


Small = Callable[[str], HookedMM]


def made(family: str) -> tuple[HookedMM, Batch]:
    model = HookedMM(miniature(family), check=False)
    batch = model._batch(miniature_inputs(model.hf_model, family=family))
    return model, batch


def pictures(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(3)
    return [picture(sample_scene(rng)) for _ in range(count)]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("family", known(MERGING + RESAMPLING))
def test_every_token_is_made_of_patches_in_shares_that_sum_to_one(family: str) -> None:
    model, batch = made(family)
    found = connector_map(model, batch)
    assert bool((found.weight >= 0).all())
    total = torch.zeros(len(batch), 1 + int(found.position.max()), dtype=torch.float64)
    total.index_put_((found.sample, found.position), found.weight.double(), accumulate=True)
    assert torch.allclose(total[total > 0], torch.ones(1, dtype=torch.float64), atol=1e-5)
    if batch.layout.kind != "cross":
        assert bool((batch.modality[found.sample, found.position] == 2).all())
        tokens = (batch.modality == 2) & ~batch.separator
        assert int((total > 0).sum()) == int(tokens.sum())
    values = torch.rand(batch.modality.shape, generator=torch.Generator().manual_seed(0))
    chosen = torch.zeros_like(values)
    chosen[found.sample, found.position] = values[found.sample, found.position]
    assert torch.allclose(found.on_patches(chosen).sum(), chosen.sum(), rtol=1e-5)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "molmo"])
def test_a_changed_patch_changes_the_tokens_that_are_made_of_it_and_no_others(name: str, small: Small) -> None:
    """Features of a patch are written over where they leave the tower; the tokens that move are those that C names."""
    model = small(name)
    images = pictures(2)
    batch = model.prepare([[image] for image in images], ["what place is this ?"] * 2)
    found = connector_map(model, batch)
    # Molmo's features are those of two layers, of which the last is not one.
    used = getattr(model.hf_model.config, "vision_feature_layer", -1)
    used = max(used) if isinstance(used, list | tuple) else used
    assert model.cfg.vision is not None
    last = f"vision.blocks.{used % model.cfg.vision.n_layers}.hook_resid_post"
    _, cache = model.run_with_cache(batch, [last, "hook_embed"], stop_at_layer=1)
    width, size = batch.layout.sheet(cache[last]).shape[1], found.size
    lead = width - size[1]
    rng = np.random.default_rng(0)
    # Molmo's pooling is so sure of itself that some patches have no weight at all.
    for entry in rng.choice((found.weight > 0.01).nonzero()[:, 0].numpy(), 4, replace=False).tolist():
        row, patch = int(found.row[entry]), int(found.patch[entry])

        def change(value: Tensor, hook: Hook, row: int = row, patch: int = patch) -> Tensor:
            new = value.clone()
            batch.layout.sheet(new)[row, patch + lead] += 3.0 * torch.randn(value.shape[-1])
            return new

        torch.manual_seed(0)
        with model.hooks([(last, change)]):
            _, other = model.run_with_cache(batch, "hook_embed", stop_at_layer=1)
        moved = (cache["hook_embed"] - other["hook_embed"]).abs().amax(-1) > 1e-5
        own = (found.row == row) & (found.patch == patch)
        expected = torch.zeros_like(moved)
        expected[found.sample[own], found.position[own]] = True
        # A crop's border is seen by its neighbour too, whose token lies outside the stitched grid.
        grids = torch.zeros_like(moved)
        grids[found.sample, found.position] = True
        assert torch.equal(moved & grids, expected)


def test_a_resampler_is_rolled_out_as_a_reference_by_hand(small: Small) -> None:
    """Small Idefics2: attention of both layers from the weights themselves, the sum over layers in loops, float64."""
    model = small("idefics2")
    (image,) = pictures(1)
    batch = model.prepare([[image]], ["what place is this ?"])
    names = connector_patterns(model)
    _, cache = model.run_with_cache(batch, names, stop_at_layer=0)
    layers = model.hf_model.model.connector.perceiver_resampler.layers
    seen: list[tuple[Tensor, Tensor]] = []
    handles = [
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((kwargs.get("latents", *args[:1]), kwargs.get("context", *args[1:2]))),
            with_kwargs=True,
        )
        for layer in layers
    ]
    with torch.no_grad():
        model.hf_model(**batch.inputs)
    for handle in handles:
        handle.remove()
    total = None
    for layer, name, (latents, context) in zip(layers, names, seen, strict=True):
        own = layer.self_attn
        keys = torch.cat([context, latents], dim=1).double()[0]
        q, k = (
            (given @ weight.double().T).reshape(len(given), -1, own.head_dim)
            for given, weight in ((latents.double()[0], own.q_proj.weight), (keys, own.k_proj.weight))
        )
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        pattern = (torch.einsum("qhd,khd->hqk", q, k) * own.head_dim**-0.5).softmax(-1)
        assert (pattern - cache[name][0]).abs().max() < 1e-5
        mean, patches = pattern.mean(0), len(context[0])
        total = torch.zeros(len(latents[0]), patches, dtype=torch.float64) if total is None else total
        new = torch.zeros_like(total)
        for query in range(len(new)):
            new[query] = total[query] + mean[query, :patches]
            for other in range(len(new)):
                new[query] += mean[query, patches + other] * total[other]
        total = new
    assert total is not None
    expected = total / total.sum(1, keepdim=True)
    found = connector_map(model, batch, cache)
    positions = batch.mask("image")[0].nonzero()[:, 0].tolist()
    dense = torch.zeros(len(positions), expected.shape[1], dtype=torch.float64)
    dense[[positions.index(p) for p in found.position.tolist()], found.patch] = found.weight.double()
    assert (dense - expected).abs().max() < 1e-5


def test_a_query_transformer_mixes_its_queries_and_leaves_the_question_out() -> None:
    generator = torch.Generator().manual_seed(0)
    first, across, last = (torch.rand(2, *size, generator=generator) for size in ((5, 5), (3, 4), (5, 5)))
    expected = across + last[:, :3, :3] @ across
    assert torch.allclose(rolled([first, across, last], 4), expected)
    with pytest.raises(BadInputError, match="none of the connector's 2 attentions has 7 patches"):
        rolled([first, last], 7)


def test_a_written_pattern_changes_the_image_tokens_and_gradients_reach_it(small: Small) -> None:
    for name in ("idefics2", "molmo"):
        model = small(name)
        batch = model.prepare([[image] for image in pictures(2)], ["what place is this ?"] * 2)
        (*_, last) = connector_patterns(model)
        _, cache = model.run_with_cache(batch, ["projector.hook_out", last], stop_at_layer=0)
        assert torch.allclose(cache[last].sum(-1), torch.ones(1), atol=1e-5)
        even = [(last, lambda value, hook: torch.full_like(value, 1 / value.shape[-1]))]
        with model.hooks(even):
            _, other = model.run_with_cache(batch, "projector.hook_out", stop_at_layer=0)
        assert (cache["projector.hook_out"] - other["projector.hook_out"]).abs().max() > 1e-2
        logits, kept = model.run_with_cache(batch, last, grad=True)
        assert logits is not None
        logits[:, -1].amax(-1).sum().backward()
        assert float(kept.grad(last).abs().max()) > 1e-6


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("family", "why"),
    [("molmo2", "how this model's image positions lie"), ("mllama", "cross-attention"), ("aria", "latent queries")],
)
def test_what_is_not_known_is_refused_with_the_reason(family: str, why: str) -> None:
    if family not in known((family,)):
        pytest.skip(f"this version of transformers has no {family}")
    with pytest.raises(BadInputError, match=why):
        connector_map(*made(family))


def test_a_batch_without_images_has_no_connector(llava: HookedMM) -> None:
    with pytest.raises(BadInputError, match="no images"):
        connector_map(llava, llava.prepare(None, ["what place is this ?"]))
