"""The parts of one block: by name, by an exception, by what flows; and what is said where none of them knows."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from hooked_mm.blocks import find_block, first, looked_into, named_parts, named_wiring, unexplained
from hooked_mm.errors import UnsupportedModelError
from hooked_mm.flow import Wired
from hooked_mm.resolve import resolve
from hooked_mm.testing.miniatures import miniature


class Settings:
    """A configuration that says how many heads there are."""

    num_attention_heads = 4


def nothing(block: nn.Module, names: Mapping[str, str]) -> Wired | None:
    """A flow that says nothing."""
    return None


def block(**more: nn.Module) -> nn.Module:
    """A block that goes by the names of LLaMA."""
    made, attention, mlp = nn.Module(), nn.Module(), nn.Module()
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        attention.add_module(name, nn.Linear(16, 16))
    for name, sizes in {"gate_proj": (16, 24), "up_proj": (16, 24), "down_proj": (24, 16)}.items():
        mlp.add_module(name, nn.Linear(*sizes))
    parts = {"input_layernorm": nn.LayerNorm(16), "self_attn": attention}
    parts |= {"post_attention_layernorm": nn.LayerNorm(16), "mlp": mlp}
    for name, part in (parts | more).items():
        made.add_module(name, part)
    return made


LLAMA = {
    "block": "",
    "ln1": "input_layernorm",
    "attn": "self_attn",
    "ln2": "post_attention_layernorm",
    "mlp": "mlp",
    **{role: f"self_attn.{role}_proj" for role in "qkvo"},
    **{f"mlp_{role}": f"mlp.{role}_proj" for role in ("gate", "up", "down")},
}


def test_parts_by_name() -> None:
    """Every role of a LLaMA's block, and that this is all of it."""
    made = block()
    assert named_parts(made) == LLAMA
    assert unexplained(made, LLAMA) == []
    assert named_wiring(made, LLAMA) == "pre"
    assert first(made, ("nowhere", "mlp.down_proj")) == "mlp.down_proj"
    assert first(made, ("nowhere",)) is None


def test_a_name_that_means_another_part_beside_another_name() -> None:
    """`post_attention_layernorm` is the second norm, unless one stands before the MLP: then it is attention's last."""
    both = named_parts(block(pre_feedforward_layernorm=nn.LayerNorm(16)))
    assert (both["ln2"], both["attn_after"]) == ("pre_feedforward_layernorm", "post_attention_layernorm")


@pytest.mark.parametrize("more", [{"extra": nn.Linear(16, 16)}, {"post_norm": nn.LayerNorm(16)}])
def test_names_that_leave_something_unexplained_say_nothing(more: dict[str, nn.Module]) -> None:
    """A child with weights that belongs to no role may change what is added: no sum is claimed, inner parts are."""
    made = block(**more)
    assert unexplained(made, named_parts(made)) == list(more)
    found = find_block(made, "layers.0", "decoder", Settings(), nothing)
    assert found.wiring == "opaque"
    assert (found.n_heads, found.d_head, found.d_mlp, found.d_model) == (4, 4, 24, 16)
    assert named_wiring(block(extra=nn.Dropout()), LLAMA) == "pre"


def test_weights_of_the_block_itself() -> None:
    """A factor that a table names is explained, another one is not."""
    made = block()
    made.lambda_1 = nn.Parameter(torch.ones(16))
    assert unexplained(made, LLAMA) == []
    made.strange = nn.Parameter(torch.ones(16))
    assert unexplained(made, LLAMA) == ["strange"]


def test_what_flows_stands_above_names_and_what_is_told_above_both() -> None:
    """Roles of the flow replace those of names; an exception's replace these, where the block has such a part."""
    made = block(other=nn.LayerNorm(16))

    def flow(module: nn.Module, names: Mapping[str, str]) -> Wired:
        assert names["mlp_down"] == "mlp.down_proj"
        return Wired({**LLAMA, "ln2": "other"}, "parallel")

    found = find_block(made, "layers.0", "decoder", Settings(), flow)
    assert (found.wiring, found.parts["ln2"]) == ("parallel", "other")
    told = {"ln2": "post_attention_layernorm", "ln1": "not.here"}
    found = find_block(made, "layers.0", "decoder", Settings(), flow, told)
    assert (found.parts["ln1"], found.parts["ln2"]) == ("input_layernorm", "post_attention_layernorm")


def test_a_part_that_adds_nothing_is_still_there() -> None:
    """Attention whose last projection is zero adds nothing that flows; names that explain the whole block are kept."""

    def flow(module: nn.Module, names: Mapping[str, str]) -> Wired:
        return Wired({role: path for role, path in LLAMA.items() if "attn" not in path}, "single")

    assert dict(find_block(block(), "layers.0", "decoder", Settings(), flow).parts) == LLAMA
    assert find_block(block(extra=nn.Linear(2, 2)), "layers.0", "decoder", Settings(), flow).wiring == "single"


def test_nothing_known_is_refused() -> None:
    """The message lists what the block has."""
    with pytest.raises(UnsupportedModelError, match=r"no recognised ln1, attn, ln2, mlp; it has 0, 1.*PART_NAMES"):
        find_block(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "x", "decoder", Settings(), nothing)


def test_attention_that_does_not_say_how_many_heads_is_refused() -> None:
    """Neither itself nor its configuration."""
    with pytest.raises(UnsupportedModelError, match="does not say how many heads"):
        find_block(block(), "x", "decoder", object(), nothing)


def test_which_attention_can_be_looked_into() -> None:
    """One that asks transformers for its function; not one that is written out."""
    llava = miniature("llava")
    assert looked_into(llava.model.language_model.layers[0].self_attn)

    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    assert not looked_into(Own())


def test_half_precision_changes_nothing() -> None:
    """Sums hold too roughly in half precision; what flows is looked at in float32, and the model stays as it was."""
    for family in ("llava", "florence2", "gemma3", "aya_vision"):
        model = miniature(family)
        exact = resolve(model)
        half = model.bfloat16()
        assert resolve(half) == exact, family
        assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
