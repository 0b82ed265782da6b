"""What each kind of point reads and writes, in every family, against raw PyTorch hooks and formulas by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hooked_mm.architectures import FAMILIES
from hooked_mm.hooked import HookedMM
from hooked_mm.runner import Hook
from hooked_mm.testing.miniatures import miniature, miniature_inputs
from tests.families import DISTINCT, TOWER, Place, close, places, raw_hook, raw_values, representatives, shift
from tests.shown import unshow

pytestmark = pytest.mark.oldest

Case = tuple[str, HookedMM, dict[str, Tensor]]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    """A family's miniature, wrapped, and a batch of three samples padded on the left."""
    model = miniature(request.param)
    return request.param, HookedMM(model, check=False), miniature_inputs(model)


@pytest.fixture(scope="module", params=DISTINCT)
def distinct(request: pytest.FixtureRequest) -> Case:
    """The same; families built like another one wait for the slow suite."""
    model = miniature(request.param)
    return request.param, HookedMM(model, check=False), miniature_inputs(model)


def pushed(value: Tensor, hook: Hook) -> Tensor:
    """The change of the raw hooks as a hook function."""
    return shift(value)


def test_every_module_point_reads_what_a_raw_hook_reads(case: Case) -> None:
    """Bit for bit, at every place of the table by hand, heads, fused projections, maps and flattened MLPs included."""
    family, model, inputs = case
    table = places(family)
    raw = raw_values(model.hf_model, inputs, table)
    logits, cache = model.run_with_cache(inputs, list(table))
    assert list(cache) == [name for name in model.hook_names if name in table]
    assert len(cache) == len(table)
    for name in table:
        assert torch.equal(cache[name], raw[name]), name
    assert logits is not None
    assert torch.equal(logits, raw["hook_logits"])


def test_the_table_leaves_out_only_what_no_module_holds(case: Case) -> None:
    """Every listed point is in the table by hand or of a kind that another test derives; nothing is unproved."""
    family, model, _ = case
    derived = ("hook_scale", "hook_normalized", "hook_result", "hook_pattern", "hook_rot_q", "hook_rot_k")
    rest = [name for name in model.hook_names if name not in places(family) and not name.endswith(derived)]
    mllama = ["vision.blocks.2.hook_insert_out", "blocks.1.hook_mlp_out", "blocks.3.hook_mlp_out"]
    deepstack = ["blocks.0.hook_insert_out", "blocks.1.hook_insert_out"]
    assert rest == {"mllama": mllama, "qwen3_vl": deepstack}.get(family, [])


def test_residual_streams_are_transformers_hidden_states(case: Case) -> None:
    """`output_hidden_states=True` gives the stream between text blocks, before deepstack; its last entry is normed."""
    family, model, inputs = case
    with torch.no_grad():
        out = model.hf_model(**inputs, output_hidden_states=True)
    # BLIP-2 keeps the language model's outputs apart, florence2 calls the decoder's so.
    states = {
        "blip-2": lambda: out.language_model_outputs.hidden_states,
        "florence2": lambda: out.decoder_hidden_states,
    }.get(family, lambda: out.hidden_states)()
    _, cache = model.run_with_cache(inputs, ["hook_embed", "blocks.*.hook_resid_pre", "blocks.*.hook_resid_post"])
    assert torch.equal(states[0], cache["hook_embed"])
    for layer in range(1, model.cfg.n_layers):
        assert torch.equal(states[layer], cache[f"blocks.{layer - 1}.hook_resid_post"]), layer
        inserted = family == "qwen3_vl" and layer <= 2
        assert torch.equal(states[layer], cache[f"blocks.{layer}.hook_resid_pre"]) != inserted, layer
    if family == "florence2":
        _, encoder = model.run_with_cache(inputs, "encoder.blocks.*.hook_resid_pre")
        assert all(torch.equal(out.encoder_hidden_states[i], value) for i, value in enumerate(encoder.values()))


def norm_by_hand(module: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Divisor, quotient and output of a norm in float64, from what its paper says."""
    x = x.double()
    eps = next(getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name))
    if isinstance(module, nn.LayerNorm):
        x = x - x.mean(dim=-1, keepdim=True)
    scale = (x.pow(2).sum(dim=-1, keepdim=True) / x.shape[-1] + eps) ** 0.5
    weight = module.weight.double() + (1 if type(module).__name__ == "Gemma3RMSNorm" else 0)
    bias = module.bias.double() if isinstance(module, nn.LayerNorm) else 0
    return scale, x / scale, x / scale * weight + bias


def test_norm_points_follow_the_formula(case: Case) -> None:
    """hook_scale, hook_normalized and hook_out of every norm in float64: LayerNorm, RMSNorm, Gemma's gain 1 + w."""
    family, model, inputs = case
    outs = {name: place for name, place in places(family).items() if name.endswith(".hook_out") and "ln" in name}
    entering = raw_values(model.hf_model, inputs, {n: Place(p.path, "input", p.view) for n, p in outs.items()})
    _, cache = model.run_with_cache(inputs, ["*hook_scale", "*hook_normalized", "*ln*hook_out"])
    assert len(cache) == 3 * len(outs)
    for name, place in outs.items():
        stem = name.removesuffix("hook_out")
        wanted = norm_by_hand(model.hf_model.get_submodule(place.path), entering[name])
        for point, expected in zip(("hook_scale", "hook_normalized", "hook_out"), wanted, strict=True):
            assert close(cache[stem + point], expected) < 2e-6, stem + point
        assert cache[stem + "hook_scale"].dtype == torch.float32


def test_results_are_each_heads_share_of_the_output_projection(case: Case) -> None:
    """z_h W_h^T per head in float64, and the sum over heads plus the bias is what the projection gives."""
    family, model, inputs = case
    heads = {name: place for name, place in places(family).items() if name.endswith("hook_z")}
    z = raw_values(model.hf_model, inputs, heads)
    total = raw_values(model.hf_model, inputs, {name: Place(place.path) for name, place in heads.items()})
    _, cache = model.run_with_cache(inputs, "*hook_result")
    assert len(cache) == len(heads)
    for name, place in heads.items():
        module: Any = model.hf_model.get_submodule(place.path)
        size = z[name].shape[-1]
        got = cache[name.replace("hook_z", "hook_result")]
        for head in range(z[name].shape[-2]):
            weight = module.weight[:, head * size : (head + 1) * size].double()
            assert close(got[..., head, :], z[name][..., head, :].double() @ weight.T) < 2e-6, name
        bias = 0 if module.bias is None else module.bias
        assert close(got.sum(dim=-2) + bias, total[name]) < 2e-6, name


def _writes(case: Case, names: list[str]) -> None:
    family, model, inputs = case
    table = places(family)
    last = f"vision.blocks.{len(TOWER[family]) - 1}."
    with torch.no_grad():
        plain = model.hf_model(**inputs).logits
    for name in names:
        with torch.no_grad(), raw_hook(model.hf_model, table[name], shift):
            expected = model.hf_model(**inputs).logits
        got = model.run_with_hooks(inputs, [(name, pushed)])
        assert got is not None
        assert close(got, expected) < 1e-5 if table[name].factor else torch.equal(got, expected), name
        # The last block of a tower may be one that nobody reads.
        assert close(expected, plain) > 1e-4 or name.startswith(last), name


def test_a_write_at_each_kind_of_point_equals_a_raw_hook(distinct: Case) -> None:
    """In one block of each class: bit-equal logits, within 1e-5 where a factor stands between, and not the old ones."""
    _writes(distinct, representatives(distinct[1].hf_model, distinct[0]))


@pytest.mark.slow
def test_a_write_at_every_point_equals_a_raw_hook(case: Case) -> None:
    """The same in all other blocks."""
    done = representatives(case[1].hf_model, case[0])
    _writes(case, [name for name in places(case[0]) if name not in done])


@pytest.mark.parametrize("quantity", ["scale", "normalized"])
def test_writing_a_norms_divisor_or_quotient_gives_the_formula_of_it(distinct: Case, quantity: str) -> None:
    """The norm's output is then (x / new scale) ⊙ gain + bias, or new quotient ⊙ gain + bias, for each kind of norm."""
    family, model, inputs = distinct
    table = places(family)
    names = [name for name in representatives(model.hf_model, family) if name.endswith(".hook_out") and "ln" in name]
    for name in names:
        place = table[name]
        module: Any = model.hf_model.get_submodule(place.path)
        seen: list[Tensor] = []

        def changed(_: Tensor, module: Any = module, seen: list[Tensor] = seen) -> Tensor:
            _, quotient, whole = norm_by_hand(module, seen[-1])
            bias = module.bias if isinstance(module, nn.LayerNorm) else 0
            new = quotient / 3 if quantity == "scale" else shift(quotient)
            return ((whole - bias) / quotient * new + bias).float()

        function: Callable[[Tensor, Hook], Tensor] = (lambda v, hook: v * 3) if quantity == "scale" else pushed
        source = Place(place.path, "input", place.view)
        with torch.no_grad(), raw_hook(model.hf_model, source, seen.append), raw_hook(model.hf_model, place, changed):
            expected = model.hf_model(**inputs).logits
        point = name.replace("hook_out", f"hook_{quantity}")
        got = model.run_with_hooks(inputs, [(point, function)])
        assert got is not None
        assert close(got, expected) < 2e-5, point


def test_writing_results_moves_the_projection_by_their_sum(distinct: Case) -> None:
    """Half of head 1's result: the output projection gives that much less, its bias stays."""
    family, model, inputs = distinct
    table = places(family)

    def halve(value: Tensor, hook: Hook) -> Tensor:
        value = value.clone()
        value[..., 1, :] *= 0.5
        return value

    for name in [name for name in representatives(model.hf_model, family) if name.endswith("hook_z")]:

        def less(z: Tensor) -> Tensor:
            z = z.clone()
            z[..., 1, :] *= 0.5
            return z

        with torch.no_grad(), raw_hook(model.hf_model, table[name], less):
            expected = model.hf_model(**inputs).logits
        got = model.run_with_hooks(inputs, [(name.replace("hook_z", "hook_result"), halve)])
        assert got is not None
        assert close(got, expected) < 1e-5, name
        assert close(got, raw_values(model.hf_model, inputs, {"l": table["hook_logits"]})["l"]) > 1e-4


def test_writing_what_deepstack_inserts() -> None:
    """Qwen3-VL adds tower features behind early blocks: read and written as the difference its own function makes."""
    model = HookedMM(miniature("qwen3_vl"), check=False)
    inputs = miniature_inputs(model.hf_model)
    decoder: Any = model.hf_model.model.language_model
    original, calls = decoder._deepstack_process, list[Tensor]()

    def watched(hidden: Tensor, *args: Any) -> Tensor:
        calls.append(original(hidden, *args) - hidden)
        return hidden + shift(calls[-1]) if len(calls) == 2 else hidden + calls[-1]

    decoder._deepstack_process = watched
    try:
        with torch.no_grad():
            expected = model.hf_model(**inputs).logits
    finally:
        decoder._deepstack_process = original
    _, cache = model.run_with_cache(inputs, "*hook_insert_out")
    assert close(cache["blocks.0.hook_insert_out"], calls[0]) < 1e-6
    image = inputs["input_ids"] == 150
    assert not cache["blocks.1.hook_insert_out"][~image].any()
    assert cache["blocks.1.hook_insert_out"][image].all()
    got = model.run_with_hooks(inputs, [("blocks.1.hook_insert_out", pushed)])
    assert got is not None
    assert close(got, expected) < 1e-5


def test_writing_mllamas_masked_mlp_and_tower_insertion() -> None:
    """What cross-attention's MLP adds (gated, rows without image dropped), and what stands between the two towers."""
    model = HookedMM(miniature("mllama"), check=False)
    inputs = miniature_inputs(model.hf_model)
    spots = {
        "blocks.3.hook_mlp_out": (
            Place("model.language_model.layers.3.post_attention_layernorm", "input"),
            Place("model.language_model.layers.3"),
        ),
        "vision.blocks.2.hook_insert_out": (
            Place("model.vision_model.transformer.layers.2"),
            Place("model.vision_model.global_transformer.layers.0", "input"),
        ),
    }
    for name, (before, after) in spots.items():
        seen: list[Tensor] = []

        def keep(value: Tensor, seen: list[Tensor] = seen) -> None:
            seen.append(value.clone())

        def change(value: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(value - seen[0])
            return seen[0] + shift(seen[1])

        with torch.no_grad(), raw_hook(model.hf_model, before, keep), raw_hook(model.hf_model, after, change):
            expected = model.hf_model(**inputs).logits
        _, cache = model.run_with_cache(inputs, name)
        assert torch.equal(cache[name], seen[1])
        got = model.run_with_hooks(inputs, [(name, pushed)])
        assert got is not None
        assert close(got, expected) < 1e-6, name


def test_a_fused_projection_keeps_its_other_parts() -> None:
    """The hand-written view itself: changing one of q, k, v leaves the other two of the raw tensor bit for bit."""
    whole = torch.randn(2, 5, 24)
    for index in range(3):
        changed = unshow(torch.zeros(2, 5, 4, 2), whole, f"fused {index} 4")
        parts, old = changed.chunk(3, dim=-1), whole.chunk(3, dim=-1)
        assert [torch.equal(a, b) for a, b in zip(parts, old, strict=True)] == [i != index for i in range(3)]
