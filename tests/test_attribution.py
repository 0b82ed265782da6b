"""The formulas of decomposition and logit attribution, on tensors, by hand and in closed form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hooked_mm import attribution
from hooked_mm.access import linear_map
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.norms import NormFormula, norm_scale
from hooked_mm.resolve import resolve
from hooked_mm.testing.miniatures import miniature
from tests.versions import IN_CLIP

NAMES = [
    "vision.hook_embed",
    "vision.blocks.0.hook_attn_out",
    "hook_embed",
    *(
        f"blocks.{at}.{p}"
        for at in range(2)
        for p in ("hook_resid_pre", "attn.hook_z", "hook_attn_out", "hook_mlp_out")
    ),
    "blocks.1.hook_insert_out",
    "blocks.2.hook_xattn_out",
    "blocks.2.hook_mlp_out",
    "hook_logits",
]


def labels(*args: Any, **options: Any) -> list[str]:
    """Labels alone."""
    return [label for label, _ in attribution.component_names(NAMES, *args, **options)]


def test_components_are_listed_in_order_with_their_labels() -> None:
    """By hand, for a model with deepstack behind block 1 and a block 2 that only cross-attends."""
    assert attribution.layer_count(NAMES) == 3
    assert attribution.layer_count(NAMES, "vision.") == 1
    assert labels(0) == ["embed"]
    assert labels(2) == ["embed", "0_attn_out", "0_mlp_out", "1_attn_out", "1_mlp_out", "1_insert_out"]
    assert labels(3)[-2:] == ["2_xattn_out", "2_mlp_out"]
    assert labels(1, mlp_input=True) == ["embed", "0_attn_out", "0_mlp_out", "1_attn_out"]
    assert labels(2, mlp_input=True)[-1] == "2_xattn_out"
    assert labels(3, mode="attn") == ["embed", "0_attn_out", "1_attn_out", "2_xattn_out"]
    assert labels(3, mode="mlp", incl_embeds=False) == ["0_mlp_out", "1_mlp_out", "2_mlp_out"]
    assert attribution.component_names(NAMES, 1, stack="vision.") == [
        ("embed", "vision.hook_embed"),
        ("0_attn_out", "vision.blocks.0.hook_attn_out"),
    ]


def test_streams_are_listed_with_their_labels() -> None:
    """As TransformerLens names them."""
    assert [p[0] for p in attribution.stream_places(2, 2)] == ["0_pre", "1_pre", "final_post"]
    assert [p[0] for p in attribution.stream_places(1, 2, incl_mid=True)] == ["0_pre", "0_mid", "1_pre"]
    assert attribution.stream_places(1, 2, mlp_input=True)[-1] == ("1_mid", 1, True)


def test_layers_modes_and_stacks_that_are_not_there() -> None:
    """Each refusal names the value and what there is."""
    assert [attribution.resolve_layer(layer, 3) for layer in (None, -1, 3, 0)] == [3, 3, 3, 0]
    with pytest.raises(BadInputError, match="layer=4 is outside 0 to 3"):
        attribution.resolve_layer(4, 3)
    with pytest.raises(BadInputError, match="layer=-2 is outside"):
        attribution.resolve_layer(-2, 3)
    with pytest.raises(BadInputError, match="mlp_input=True needs a layer from 0 to 2"):
        attribution.resolve_layer(None, 3, mlp_input=True)
    with pytest.raises(BadInputError, match="mode='atn'; nearest: attn"):
        attribution.component_names(NAMES, 1, mode="atn")  # type: ignore[arg-type]
    with pytest.raises(BadInputError, match=r"no stack 'encoder\.'; it has '', 'vision\.'"):
        attribution.layer_count(NAMES, "encoder.")


def test_what_runs_for_images_alone() -> None:
    """Cross-attention, deepstack, and a block without self-attention."""
    assert [name for name in NAMES if attribution.only_with_images(name, NAMES)] == [
        "blocks.1.hook_insert_out",
        "blocks.2.hook_xattn_out",
        "blocks.2.hook_mlp_out",
    ]


def test_components_that_miss_their_sum_are_refused() -> None:
    """Rounding passes, in float32 and in bfloat16; a component left out does not."""
    parts = torch.randn(20, 3, 5, 16, generator=torch.Generator().manual_seed(0))
    attribution.check_sum(parts, parts.sum(0), "x")
    half = parts.to(torch.bfloat16)
    total = half[0]
    for part in half[1:]:
        total = total + part
    attribution.check_sum(half, total, "x")
    for wrong, whole in ((parts[1:], parts.sum(0)), (half[1:], total)):
        with pytest.raises(BadInputError, match=r"do not add up to x: they miss it by .* pass check=False"):
            attribution.check_sum(wrong, whole, "x")


@given(heads=st.integers(1, 4), d_head=st.integers(1, 5), d=st.integers(1, 9))
def test_heads_add_up_to_the_projection(heads: int, d_head: int, d: int) -> None:
    """Σ_h W_O[h] z[h] + b is the Linear; one head is the Linear on z with the others zero."""
    generator = torch.Generator().manual_seed(heads * d)
    out = nn.Linear(heads * d_head, d).double()
    z = torch.randn(2, 3, heads, d_head, dtype=torch.float64, generator=generator)
    weight, bias = linear_map(out, heads * d_head)
    results = attribution.head_results(z, weight)
    assert results.shape == (heads, 2, 3, d)
    assert torch.allclose(results.sum(0) + bias, out(z.flatten(-2)), atol=1e-12)
    only = torch.zeros_like(z)
    only[..., -1, :] = z[..., -1, :]
    assert torch.allclose(results[-1], out(only.flatten(-2)) - out.bias, atol=1e-12)


def test_an_affine_module_that_is_no_plain_linear_is_probed() -> None:
    """A LoRA adapter is part of what the module does; its base weight alone is not."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4))
    base = net[0].weight.detach().clone()
    wrapped = peft.get_peft_model(net, peft.LoraConfig(target_modules=["0"], init_lora_weights=False)).eval()
    module = wrapped.base_model.model[0]
    weight, bias = linear_map(module, 6)
    x = torch.randn(5, 6)
    assert torch.allclose(x @ weight.T + bias, module(x), atol=1e-6)
    assert (weight - base).abs().max() > 1e-2


@given(centred=st.booleans(), count=st.integers(1, 6))
def test_shares_add_up_to_the_logit(centred: bool, count: int) -> None:
    """In float64, against PyTorch's own norm and Linear: shares and what needs no stream are the logit."""
    generator = torch.Generator().manual_seed(count)
    d, vocab = 12, 7
    parts = torch.randn(count, 2, 3, d, dtype=torch.float64, generator=generator)
    norm = (nn.LayerNorm(d) if centred else nn.RMSNorm(d, eps=1e-6)).double()
    unembed = nn.Linear(d, vocab).double()
    with torch.no_grad():
        norm.weight.normal_(generator=generator)
        if centred:
            norm.bias.normal_(generator=generator)
        logits = unembed(norm(parts.sum(0)))
    formula = NormFormula(centred, 1e-5 if centred else 1e-6)
    scale = norm_scale(parts.sum(0), formula)
    weight, bias = linear_map(unembed, d)
    for ids in (torch.tensor(3), torch.tensor([[1], [2]]), torch.tensor([[0, 1, 2], [4, 5, 6]])):
        u, constant = attribution.directions(weight, bias, norm, ids, torch.device("cpu"))
        shares = attribution.attribute(parts, scale, u, formula)
        expected = logits.gather(-1, ids.expand(2, 3)[..., None])[..., 0]
        assert torch.allclose(shares.sum(0) + constant, expected, atol=1e-10)
    u, constant = attribution.directions(weight, bias, None, torch.tensor(3), torch.device("cpu"))
    assert torch.equal(u, unembed.weight[3])
    assert torch.equal(constant, unembed.bias[3])


def test_tokens_are_ids_or_single_token_strings(llava: HookedMM) -> None:
    """One for all, one per sample, one per position; the tokenizer's own ids."""
    tokenizer = llava.tokenizer
    red, blue = tokenizer.convert_tokens_to_ids(["red", "blue"])
    size = llava.cfg.d_vocab

    def ids(tokens: Any, **options: Any) -> Any:
        return attribution.token_ids(tokens, (2, 3), size, tokenizer, **options).tolist()

    assert ids("red") == ids(red) == ids(torch.tensor(red)) == red
    assert ids(["red", "blue"]) == ids([red, blue]) == ids(torch.tensor([red, blue])) == [red, blue]
    assert ids(torch.arange(6).view(2, 3)) == [[0, 1, 2], [3, 4, 5]]
    assert ids("red blue", first_subtoken=True) == red
    assert ids("<unk>") == tokenizer.unk_token_id


def test_tokens_that_can_not_be_meant_are_refused(llava: HookedMM) -> None:
    """Several tokens, none, unknown words, foreign ids, shapes that fit nothing, strings without a tokenizer."""

    def refuse(tokens: Any, why: str, tokenizer: Any = llava.tokenizer) -> None:
        with pytest.raises(BadInputError, match=why):
            attribution.token_ids(tokens, (2, 3), llava.cfg.d_vocab, tokenizer)

    refuse("red blue", r"'red blue' is 2 tokens \['red', 'blue'\], not one")
    refuse("", r"'' is 0 tokens")
    refuse("zebra", r"'zebra' is not in the vocabulary \(it becomes '<unk>'\)")
    size = llava.cfg.d_vocab
    refuse(size, f"token id {size} is outside the vocabulary of {size}")
    refuse(torch.tensor([1, -1]), "token id -1 is outside")
    refuse([1, 2, 3], r"shape \(3,\) fit neither samples \(2,\) nor positions \(2, 3\)")
    refuse("red", "is a string, which needs a tokenizer", None)


def test_norms_are_found_by_the_stack_they_belong_to(llava: HookedMM) -> None:
    """Paths by hand from transformers' LLaVA; what has no norm is refused."""
    structure = llava.structure
    assert attribution.norm_path(structure, "", 6, False) == "model.language_model.norm"
    assert attribution.norm_path(structure, "", 2, True) == "model.language_model.layers.2.post_attention_layernorm"
    tower = f"model.vision_tower.{IN_CLIP}encoder.layers"
    assert attribution.norm_path(structure, "vision.", 1, False) == f"{tower}.1.layer_norm1"
    with pytest.raises(BadInputError, match=r"'vision\.' has no final norm that is known; give layer= below 4"):
        attribution.norm_path(structure, "vision.", 4, False)
    with pytest.raises(BadInputError, match=r"no stack 'encoder\.'"):
        attribution.norm_path(structure, "encoder.", 0, False)
    florence = resolve(miniature("florence2"))
    assert attribution.norm_path(florence, "", 3, False) is None
    with pytest.raises(BadInputError, match=r"normalises after the sum.*pass apply_ln=False"):
        attribution.norm_path(florence, "", 1, True)
