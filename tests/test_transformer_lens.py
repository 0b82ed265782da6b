"""The same names mean the same values as in TransformerLens: LLaVA and Qwen2.5-VL, side by side in one process.

Needs TransformerLens 4 (`pip install transformer-lens`), and is skipped without it. Its bridge runs attention eagerly;
ours keeps SDPA wherever no pattern is asked for, so equality is up to rounding: 1e-5, relative and absolute.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from jaxtyping import Bool
from PIL import Image
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from hooked_mm.batch import Batch
from hooked_mm.hooked import HookedMM
from hooked_mm.runner import Hook
from hooked_mm.small import small_model_path

pytest.importorskip("transformer_lens")

TransformerBridge = pytest.importorskip("transformer_lens.model_bridge").TransformerBridge

PROMPTS = ["what colour is the circle ?", "describe the scene .", "is there a red square ?", "what place is this ?"]
# Ours within a block of the decoder; TransformerLens has all of these by the same names.
STREAM = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
INSIDE = (
    *("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z", "attn.hook_pattern"),
    *("mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_post", "ln1.hook_out", "ln2.hook_out"),
)
NORMS = tuple(f"{norm}.{name}" for norm in ("ln1", "ln2") for name in ("hook_scale", "hook_normalized"))
ROTATED = ("attn.hook_rot_q", "attn.hook_rot_k")


def bridge(model: Any) -> Any:
    """TransformerLens around a copy of the model, which it rebuilds in place.

    The small LLaVA's folder stands for every model's name: only tokenizer and processor are taken from there. (With a
    name that has no loadable processor TransformerLens tries to install torchvision with pip.)
    """
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    return TransformerBridge.boot_transformers(str(small_model_path("llava")), hf_model=model, device="cpu")


class Pair:
    """One model in both libraries, with one batch, and what both have read on it."""

    def __init__(self, ours: HookedMM, inputs: Mapping[str, Tensor]) -> None:
        self.ours, self.theirs = ours, bridge(ours.hf_model)
        self.inputs = dict(inputs)
        self.rest = {name: value for name, value in self.inputs.items() if name != "input_ids"}
        self.real: Bool[Tensor, "b p"] = self.inputs["attention_mask"].bool()
        self.our_logits, cache = ours.run_with_cache(self.inputs)
        # In a pass of their own, so that everything else is read as it is computed without patterns.
        patterns = ours.run_with_cache(self.inputs, "*attn.hook_pattern")[1]
        self.our_values = {**cache, **patterns}
        with torch.no_grad():
            self.their_logits, self.their_cache = self.theirs.run_with_cache(self.inputs["input_ids"], **self.rest)

    def run_theirs(self, name: str, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Logits of TransformerLens with a function at a hook."""
        with torch.no_grad():
            return self.theirs.run_with_hooks(
                self.inputs["input_ids"], fwd_hooks=[(name, lambda value, hook: function(value))], **self.rest
            )

    def run_ours(self, name: str, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Our logits with the same function at the same hook."""
        logits = self.ours.run_with_hooks(self.inputs, [(name, lambda value, hook: function(value))])
        assert logits is not None
        return logits

    def check(self, name: str, theirs: str | None = None) -> None:
        """Equal at positions that are not padding; for patterns, at rows that are not."""
        ours, expected = self.our_values[name], self.their_cache[theirs or name]
        assert ours.shape == expected.shape, (name, ours.shape, expected.shape)
        if not name.startswith(("vision", "projector")):
            if name.endswith("hook_pattern"):
                ours, expected = ours.transpose(1, 2), expected.transpose(1, 2)
            ours, expected = ours[self.real], expected[self.real]
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5, msg=lambda text: f"{name}: {text}")


@pytest.fixture(scope="module")
def batch(llava: HookedMM, images: list[Image.Image]) -> Batch:
    """Four prompts of different lengths, padded on the left."""
    return llava.prepare(images[:4], PROMPTS)


@pytest.fixture(scope="module")
def llavas(llava: HookedMM, batch: Batch) -> Pair:
    """The small trained LLaVA."""
    return Pair(llava, batch.inputs)


@pytest.fixture(scope="module")
def qwens() -> Pair:
    """A random Qwen2.5-VL of 3 + 3 layers: grouped keys, windows in the tower, pictures of two sizes, left padding.

    TransformerLens refuses the family where torchvision is missing, which only its processor would need.
    """
    from transformer_lens.model_bridge.supported_architectures.qwen2_5_vl import Qwen2_5_VLArchitectureAdapter

    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 62,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        image_token_id=4,
        vision_start_token_id=5,
        vision_end_token_id=6,
        video_token_id=7,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2_5_VLForConditionalGeneration(config).requires_grad_(False).eval()
        # transformers starts at 0.02, where attention is nearly uniform and equal by default.
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
        grids = torch.tensor([[1, 4, 6], [1, 8, 4]])
        pixels = torch.randn(int(grids.prod(dim=1).sum()), 3 * 2 * 4 * 4)
    rows = [[8, 9, 5, *[4] * (int(grid.prod()) // 4), 6, *range(10, 16)] for grid in grids]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    inputs = {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "pixel_values": pixels,
        "image_grid_thw": grids,
        "mm_token_type_ids": (ids == 4).long(),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Qwen2_5_VLArchitectureAdapter, "required_libraries", [])
        return Pair(HookedMM(model), inputs)


@pytest.mark.parametrize("name", [*STREAM, *INSIDE, *NORMS, *ROTATED])
def test_llava_blocks(llavas: Pair, name: str) -> None:
    """The stream, attention (patterns and rotated queries and keys too), the MLP and the norms, in every layer."""
    for layer in range(llavas.ours.cfg.n_layers):
        llavas.check(f"blocks.{layer}.{name}")


@pytest.mark.parametrize("name", [*STREAM, *INSIDE, *NORMS])
def test_qwen_blocks(qwens: Pair, name: str) -> None:
    """The same with three position streams; TransformerLens lists rotated queries and keys here, but never fires."""
    for layer in range(3):
        qwens.check(f"blocks.{layer}.{name}")
        assert not any(f"blocks.{layer}.{rotated}" in qwens.their_cache for rotated in ROTATED)


@pytest.mark.parametrize("pair", ["llavas", "qwens"])
def test_ends_of_the_stream(pair: str, request: pytest.FixtureRequest) -> None:
    """The final norm, the logits, and what enters block 0; their `hook_embed` is before the picture is merged in."""
    both: Pair = request.getfixturevalue(pair)
    both.check("ln_final.hook_out")
    both.check("hook_embed", "blocks.0.hook_resid_pre")
    assert both.our_logits is not None
    torch.testing.assert_close(both.our_logits[both.real], both.their_logits[both.real], rtol=1e-5, atol=1e-5)
    image = both.inputs["input_ids"] == both.ours.structure.image_token_id
    different = (both.their_cache["hook_embed"] - both.our_values["hook_embed"]).abs().amax(dim=-1) > 1e-3
    assert torch.equal(different, image)


def test_llava_tower_and_projector(llavas: Pair) -> None:
    """Under their names for them; TransformerLens has no `resid_mid` in a tower."""
    inner = ("hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "ln1.hook_out", "ln2.hook_out")
    for layer in range(4):
        for name in (*inner, "attn.hook_q", "attn.hook_z", "attn.hook_pattern", "mlp.hook_pre", "mlp.hook_post"):
            llavas.check(f"vision.blocks.{layer}.{name}", f"vision_encoder.encoder_layers.{layer}.{name}")
    llavas.check("projector.hook_in", "vision_projector.hook_in")
    llavas.check("projector.hook_out", "vision_projector.hook_out")


def test_qwen_tower(qwens: Pair) -> None:
    """A packed tower: one row per patch of all pictures, in the order in which the tower computes them."""
    for layer in range(3):
        for name in ("hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out"):
            qwens.check(f"vision.blocks.{layer}.{name}", f"vision_encoder.blocks.{layer}.{name}")


@pytest.mark.parametrize("name", ["hook_resid_pre", "hook_resid_post", "attn.hook_z", "attn.hook_pattern"])
def test_writes_do_the_same(llavas: Pair, name: str) -> None:
    """The same change at the same hook gives the same logits, which are not those without it."""

    def change(value: Tensor) -> Tensor:
        # Heads in reverse order for what has heads; rows of patterns still sum to one.
        dim = {"attn.hook_z": 2, "attn.hook_pattern": 1}.get(name)
        return value.flip(dim) if dim else value * 0.5 + 0.1

    hook = f"blocks.2.{name}"
    ours, theirs = llavas.run_ours(hook, change)[llavas.real], llavas.run_theirs(hook, change)[llavas.real]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert llavas.our_logits is not None
    assert (ours - llavas.our_logits[llavas.real]).abs().max() > 0.1


def test_writing_resid_mid_differs_by_intention(llavas: Pair) -> None:
    """Theirs changes what the second norm reads, ours the stream: `hook_resid_post` is the new value plus the MLP."""
    new = torch.randn(4, llavas.real.shape[1], 128, generator=torch.Generator().manual_seed(0))
    names = ["blocks.2.hook_mlp_out", "blocks.2.hook_resid_post"]
    with llavas.ours.hooks([("blocks.2.hook_resid_mid", lambda value, hook: new)]):
        _, ours = llavas.ours.run_with_cache(llavas.inputs, names)
    seen: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any) -> None:
        seen[hook.name] = value.clone()

    with torch.no_grad():
        llavas.theirs.run_with_hooks(
            llavas.inputs["input_ids"],
            fwd_hooks=[("blocks.2.hook_resid_mid", lambda value, hook: new), *((name, keep) for name in names)],
            **llavas.rest,
        )
    # TransformerLens tells a hook its first name, of which ours is an alias.
    mlp, post = seen["blocks.2.mlp.hook_out"], seen["blocks.2.hook_out"]
    torch.testing.assert_close(ours[names[1]], new + ours[names[0]])
    torch.testing.assert_close(ours[names[0]][llavas.real], mlp[llavas.real], rtol=1e-5, atol=1e-5)
    assert (post - new - mlp)[llavas.real].abs().max() > 1


def test_writes_in_generation_do_the_same(llavas: Pair, batch: Batch) -> None:
    """Greedy generation with a change in every step gives the same tokens; so it does without, and they differ."""

    def change(value: Tensor) -> Tensor:
        return value.flip(-1)

    def ours(*hooks: tuple[str, Callable[[Tensor, Hook], Tensor]]) -> Tensor:
        with llavas.ours.hooks(list(hooks)):
            return llavas.ours.generate(batch, 6, eos_token_id=None).tokens

    def theirs(*hooks: tuple[str, Callable[[Tensor, Any], Tensor]]) -> Tensor:
        options = {"do_sample": False, "stop_at_eos": False, "return_type": "tokens", "verbose": False}
        rest = {name: value for name, value in llavas.rest.items() if name != "position_ids"}
        with torch.no_grad(), llavas.theirs.hooks(fwd_hooks=list(hooks)):
            return llavas.theirs.generate(batch.input_ids, max_new_tokens=6, **options, **rest)[:, -6:]

    name = "blocks.2.hook_resid_post"
    plain, changed = ours(), ours((name, lambda value, hook: change(value)))
    assert torch.equal(plain, theirs())
    assert torch.equal(changed, theirs((name, lambda value, hook: change(value))))
    assert not torch.equal(plain, changed)
