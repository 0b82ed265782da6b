"""Attention of chosen rows: what `hook_pattern` has there, of every stack, without the rest ever being there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from hooked_mm import attention
from hooked_mm.attention_rows import attention_rows, each_row, pattern_layers
from hooked_mm.errors import BadInputError, UnknownHookError
from hooked_mm.hooked import HookedMM
from hooked_mm.knockout import KnockOut
from hooked_mm.testing.miniatures import miniature, miniature_inputs

# Kinds of attention: plain; packed by images; in windows of the grid; cross-attention, gated and of a decoder; a bias
# by distance; patterns of modules that compute them themselves; chunks of a mask that sees both ways.
FAMILIES = ("llava", "qwen2_5_vl", "florence2", "mllama", "udop", "blip", "pp_formulanet", "gemma3")


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_equal_those_of_the_whole_pattern(family: str) -> None:
    """Every layer of language model, encoder and tower, attention and cross-attention, all heads and some."""
    model = HookedMM(miniature(family), check=False)
    batch: Any = model._batch(miniature_inputs(model.hf_model, family=family))
    names = [name for name in model.hook_names if name.endswith("attn.hook_pattern")]
    names = [name for name in names if not name.startswith("projector")]
    _, cache = model.run_with_cache(batch, names)
    seen = set()
    for stack in ("", "encoder", "vision"):
        for part in ("attn", "xattn"):
            for layer in pattern_layers(model, stack, part):
                name = f"{stack}.blocks.{layer}.{part}.hook_pattern".lstrip(".")
                seen.add(name)
                whole = cache[name]
                rows = torch.randint(0, whole.shape[2], (len(whole), 3), generator=torch.Generator().manual_seed(layer))
                expected = torch.stack([whole[n][:, own] for n, own in enumerate(rows)])
                found = attention_rows(model, batch, rows, layer, None, stack, part=part)
                assert list(found) == [layer]
                assert (found[layer] - expected).abs().max() < 2e-5
                # No more is kept than was asked: not as a view of the whole, either.
                assert found[layer].untyped_storage().nbytes() == found[layer].numel() * found[layer].element_size()
                found = (
                    attention_rows(model, batch, rows, layer, [2, 0], stack, part=part) if whole.shape[1] > 2 else {}
                )
                assert all((value - expected[:, [2, 0]]).abs().max() < 2e-5 for value in found.values())
    assert seen == set(names)


@pytest.mark.parametrize("side", ["left", "right"])
def test_neither_padding_nor_companions_change_a_row(llava: HookedMM, images: list[Image.Image], side: str) -> None:
    """Rows of a short prompt beside a long one are those it has alone, keys shifted; padding gets nothing."""
    texts = ["what colour is the star ?", "star ?"]
    batch = llava.prepare(images[:2], texts, answers=["red", "blue"], padding_side=side)
    (long, short) = (int((batch.modality[n] != 0).sum()) for n in (0, 1))
    start = long - short if side == "left" else 0
    rows = torch.tensor([[long - 1, 3], [start + short - 1, start + 3]])
    found = attention_rows(llava, batch, rows, [1, 4])
    alone = llava.prepare(images[1], texts[1], answers=["blue"])
    single = attention_rows(llava, alone, torch.tensor([[short - 1, 3]]))
    assert list(single) == list(range(llava.cfg.n_layers))
    for layer, value in found.items():
        own = value[1, :, :, start : start + short]
        assert torch.allclose(own, single[layer][0], atol=2e-6)
        assert float(value[1].sum() - own.sum()) == pytest.approx(0, abs=1e-6)


def test_only_rows_are_computed_and_the_block_runs_its_own_function(
    llava: HookedMM, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing eager happens; PyTorch's SDPA runs once per layer; the pass ends behind the last layer asked."""
    batch = llava.prepare(images[:1], "what colour is the star ?")
    called, original = [], torch.nn.functional.scaled_dot_product_attention

    def counted(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        called.append(tuple(query.shape))
        return original(query, *args, **kwargs)

    def refused(*_: Any) -> None:
        raise AssertionError("a whole pattern was computed")

    monkeypatch.setattr(attention, "eager_attention", refused)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    found = attention_rows(llava, batch, torch.tensor([[5]]), [0, 2])
    length = batch.length
    assert [shape[2] for shape in called].count(length) == 3
    assert {layer: tuple(value.shape) for layer, value in found.items()} == dict.fromkeys(
        (0, 2), (1, llava.cfg.n_heads, 1, length)
    )
    assert not found[0].requires_grad


def test_the_rows_are_those_that_act(llava: HookedMM, images: list[Image.Image]) -> None:
    """Under a knockout they are cut, in later layers changed by it; hooks behind the last layer asked do not matter."""
    batch = llava.prepare(images[:1], "what colour is the star ?")
    last = batch.last_prompt()[:, None]
    plain = attention_rows(llava, batch, last, [1, 2])
    with llava.hooks([KnockOut([1, 5], keys="image")]):
        cut = attention_rows(llava, batch, last, [1, 2])
        _, cache = llava.run_with_cache(batch, "blocks.*.attn.hook_pattern")
    for layer in (1, 2):
        assert torch.allclose(cut[layer], cache[f"blocks.{layer}.attn.hook_pattern"][:, :, last[0]], atol=1e-6)
        assert (cut[layer] - plain[layer]).abs().max() > 1e-3
    assert not cut[1][..., batch.mask("image")[0]].any()
    with llava.hooks([("blocks.1.attn.hook_rot_q", lambda value, hook: 0 * value)]):
        even = attention_rows(llava, batch, last, 1)[1]
    assert torch.allclose(even, torch.full_like(even, 1 / (int(last) + 1)).masked_fill(even == 0, 0))


def test_keys_and_rows_of_minus_one_are_nan_and_chunks_change_nothing(
    llava: HookedMM, images: list[Image.Image]
) -> None:
    """Columns are chosen behind the softmax; a function sees the rows some at a time, in their order."""
    batch = llava.prepare(images[:2], ["what colour is the star ?", "star ?"])
    rows = batch.length - 1 - torch.arange(7).repeat(2, 1)
    whole = attention_rows(llava, batch, rows, 3)[3]
    keys = torch.tensor([[4, 9], [20, -1]])
    holed = rows.clone()
    holed[1, 2:] = -1
    found = attention_rows(llava, batch, holed, 3, [1], keys=keys)[3]
    assert torch.equal(found[0, 0], whole[0, 1][:, [4, 9]])
    assert torch.equal(found[1, 0, :2, 0], whole[1, 1, :2, 20])
    assert found[1, 0, 2:].isnan().all()
    assert found[1, 0, :, 1].isnan().all()
    parts: list[tuple[int, int, Tensor]] = []
    each_row(llava, batch, rows, lambda *told: parts.append(told), [3, 0], chunk=3)
    assert [(layer, start) for layer, start, _ in parts] == [(0, 0), (0, 3), (0, 6), (3, 0), (3, 3), (3, 6)]
    assert torch.allclose(torch.cat([part for layer, _, part in parts if layer == 3], dim=2), whole, atol=1e-7)


def test_what_can_not_be_asked_is_refused_and_nothing_stays(llava: HookedMM, images: list[Image.Image]) -> None:
    """Each error names the value; afterwards the model runs as before."""
    batch = llava.prepare(images[:1], "what colour is the star ?")
    before = llava.run_with_hooks(batch)
    one, length = torch.tensor([[3]]), batch.length
    for rows, options, wrong in (
        (torch.tensor([[length]]), {}, f"has {length} queries, there is no row {length}"),
        (torch.tensor([[3], [3]]), {}, "rows are given for 2"),
        (torch.tensor([[0.5]]), {}, r"torch.float32 \(1, 1\)"),
        (torch.tensor([[-2]]), {}, "-1 for none"),
        (one, {"heads": [99]}, r"heads \[99\] are asked"),
        (one, {"keys": torch.tensor([[length]])}, f"up to {length} are asked"),
    ):
        with pytest.raises(BadInputError, match=wrong):
            attention_rows(llava, batch, rows, 0, **options)
    with pytest.raises(BadInputError, match="chunk=0"):
        each_row(llava, batch, one, lambda *_: None, 0, chunk=0)
    with pytest.raises(UnknownHookError, match=r"blocks\.99\.attn"):
        attention_rows(llava, batch, one, 99)
    with pytest.raises(UnknownHookError, match="xattn"):
        attention_rows(llava, batch, one, 0, part="xattn")
    with pytest.raises(BadInputError, match="is not reached by this batch"):
        attention_rows(llava, llava.prepare(None, "what colour is the star ?"), one, 0, stack="vision")
    assert all(site.taps.rows is None for site in llava._runner.sites.values())
    after = llava.run_with_hooks(batch)
    assert before is not None
    assert after is not None
    assert torch.equal(before, after)
