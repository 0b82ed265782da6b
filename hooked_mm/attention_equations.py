"""What must hold between the hook points of attention: projections, pattern, values, what heads give, what is added."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hooked_mm.access import linear_map
from hooked_mm.architectures import (
    APPENDED_KEYS,
    CONVOLUTIONS,
    HEAD_GATES,
    HEAD_NORMS,
    NORMS_BEHIND_ROTARY,
    QUERY_KEY_NORMS,
    QUERY_LATENT_SCALES,
    QUERY_SCALES,
    SCORE_BIASES,
    VALUE_NORMS,
)
from hooked_mm.checks import Check, compare
from hooked_mm.norms import norm_gain, norm_of, norm_scale
from hooked_mm.structure import Block, scale_factor, submodule
from hooked_mm.views import Fused, GatedHeads


class AttentionEquations:
    """The checks of one block's attention.

    Args:
        values: Hook name -> value, of one pass; patterns included.
        model: The transformers model, for the weights.
        block: What was found of the block.
        prefix: Of its hook names, `"vision.blocks.3."`.
        keep: Positions that are not padding, or None.
    """

    def __init__(
        self, values: Mapping[str, Tensor], model: nn.Module, block: Block, prefix: str, keep: Tensor | None
    ) -> None:
        self.values, self.model, self.block, self.prefix, self.keep = values, model, block, prefix, keep
        self.dtype = next(value.dtype for name, value in values.items() if name.startswith(f"{prefix}hook_"))

    def get(self, name: str) -> Tensor | None:
        """A value of this block, None if the block has no such point."""
        return self.values.get(self.prefix + name)

    def _same(self, what: str, name: str, got: Tensor, expected: Tensor) -> Check:
        return compare(what, self.prefix + name, got, expected, self.keep, self.dtype)

    def _module(self, role: str) -> Any:
        return submodule(self.model, f"{self.block.path}.{self.block.parts[role]}")

    def _mixed(self, role: str, stream: str) -> Tensor | None:
        """What several streams are mixed to for attention or MLP: of all that the module gives, what is as wide."""
        value = self.get(stream)
        if value is None:
            return None
        given = self._module(role)(value)
        tensors = [one for one in (given if isinstance(given, tuple) else (given,)) if isinstance(one, Tensor)]
        shape = (*value.shape[:2], self.block.d_model)
        return next((one for one in tensors if one.shape == shape), None)

    def _after(self, role: str, value: Tensor) -> Tensor:
        """What a norm, factor or gate behind a module makes of its output."""
        if f"{role}_after" in self.block.parts:
            value = self._run(self._module(f"{role}_after"), value)
        if role in self.block.scales:
            return value * scale_factor(submodule(self.model, self.block.path), self.block.scales[role])
        return value

    def _run(self, module: Any, value: Tensor) -> Tensor:
        """A module's output; convolutions over positions are told which are padding."""
        masked = "conv_mask" in inspect.signature(type(module).forward).parameters
        result: Tensor = module(value, conv_mask=self.keep) if masked else module(value)
        return result

    def _convolved(self, name: str, letter: str, value: Tensor) -> Tensor:
        """Projected keys or values (..., heads, d_head) behind a convolution over positions, if attention has one."""
        found = (getattr(self._module(name), other.format(letter), None) for other in CONVOLUTIONS)
        convolution = next((module for module in found if module is not None), None)
        return value if convolution is None else self._run(convolution, value.flatten(-2)).reshape(value.shape)

    def projections(self, name: str, prefix: str) -> Iterator[Check]:
        """Queries, keys and values are projected from what attention stands on."""
        bare = self.block.wiring in ("post", "after")
        source = self.get("hook_resid_pre" if bare else "ln1.hook_out")
        if prefix and (self.block.wiring == "post" or "lnx" in self.block.parts):
            source = self.get("ln1.hook_out" if self.block.wiring == "post" else "lnx.hook_out")
        if source is None and self.block.wiring == "streams":
            source = self._mixed("attn_mix", "hook_resid_pre")
        if source is None:
            return
        source = self._cut(source)
        for index, letter in enumerate("qkv"):
            value = self.get(f"{name}.hook_{letter}")
            # Keys and values of cross-attention come from elsewhere.
            if value is None or (prefix and letter != "q"):
                continue
            if f"{prefix}{letter}" in self.block.parts:
                expected = self._projected(f"{prefix}{letter}", source)
            elif "qkv" in self.block.parts:
                fused = Fused(index, self.block.n_heads, self.block.n_kv_heads, self.block.fused_by_head)
                expected = fused.parts(self._module("qkv")(source))[index].flatten(-2)
            else:
                continue
            got = value.flatten(-2)
            # Windows are rearranged between the norm and the projection.
            if got.shape == expected.shape:
                yield self._same("projection of the norm's output", f"{name}.hook_{letter}", got, expected)

    def _cut(self, value: Tensor) -> Tensor:
        """A square grid's values (n, p, d) as (windows, places, d), by the block's own method."""
        if not (size := self.block.windows):
            return value
        side = math.isqrt(value.shape[1])
        block = submodule(self.model, self.block.path)
        windows: Tensor = block.window_partition(value.unflatten(1, (side, side)), size)[0]
        return windows.flatten(1, 2)

    def _joined(self, windows: Tensor, places: int) -> Tensor:
        """(windows, places, d) as a square grid's values (n, p, d), without what filled the windows up."""
        if not (size := self.block.windows):
            return windows
        side = math.isqrt(places)
        full = -(-side // size) * size
        block = submodule(self.model, self.block.path)
        whole: Tensor = block.window_unpartition(windows.unflatten(1, (size, size)), size, (full, full), (side, side))
        return whole.flatten(1, 2)

    def output(self, name: str, prefix: str) -> Iterator[Check]:
        """z gives what is added: for attention whose pattern can't be had, so that no more can be checked."""
        z, result, added = (self.get(point) for point in (f"{name}.hook_z", f"{name}.hook_result", f"hook_{name}_out"))
        if z is None:
            return
        if result is not None:
            yield self._results(name, prefix, z, result)
        if added is not None:
            total = self._joined(self._module(f"{prefix}o")(z.flatten(-2)), added.shape[1])
            what = "z through the output projection == what is added"
            yield self._same(what, f"{name}.hook_z", added, self._after(name, total))

    def _projected(self, role: str, source: Tensor) -> Tensor:
        """Queries, keys or values (..., heads * d_head) of what attention stands on."""
        if role == "q" and "q_a" in self.block.parts:
            scales = (getattr(self._module("attn"), name, None) for name in QUERY_LATENT_SCALES)
            scale = next((value for value in scales if value is not None), 1.0)
            source = self._module("q_a_norm")(self._module("q_a")(source)) * scale
        whole: Tensor = self._module(role)(source)
        if role == "q" and self.block.gated_q:
            return GatedHeads(self.block.n_heads).halves(whole)[0].flatten(-2)
        return whole

    def attention(self, name: str, prefix: str) -> Iterator[Check]:
        """Rows sum to one; pattern and values give z; z gives what is added; queries and keys give the pattern."""
        pattern, z = self.get(f"{name}.hook_pattern"), self.get(f"{name}.hook_z")
        q, k, v = (self.get(f"{name}.hook_{letter}") for letter in "qkv")
        if pattern is None or z is None:
            return
        rows = pattern.sum(dim=-1).movedim(1, -1)
        yield self._same("rows of attention sum to 1", f"{name}.hook_pattern", rows, torch.ones_like(rows))
        channels = pattern.shape[-2] != z.shape[-3]
        result, added = self.get(f"{name}.hook_result"), self.get(f"hook_{name}_out")
        each = None if result is None else self._results(name, prefix, z, result)
        if each is not None:
            yield each
        own_values = k if v is None else v
        merged = own_values is not None and self._merged(name, pattern, own_values)
        if merged:
            kind = "merged attention: one pattern over a decoder's own positions and the encoder's"
            yield Check("pattern * values == z", f"{self.prefix}{name}.hook_z", "not applicable", None, kind)
        elif v is not None:
            v = self._normed(VALUE_NORMS, name, self._convolved(name, "v", v))
            mixed = self._normed(HEAD_NORMS, name, _mix_channels(pattern, v) if channels else _mix(pattern, v))
            gate = self._head_gate(name)
            mixed = mixed if gate is None else mixed * gate
            found = self._same(
                "pattern * values == z" if gate is None else "gate * pattern * values == z", f"{name}.hook_z", z, mixed
            )
            if found.verdict == "fails" and (found.error is None or (each is not None and each.verdict == "holds")):
                # z is what the output projection gets, so it is the values that are none.
                yield replace(found, point=f"{self.prefix}{name}.hook_v")
            yield found
        for letter, value in (("q", q), ("k", k)):
            rotated = self.get(f"{name}.hook_rot_{letter}")
            if value is not None and rotated is not None:
                length = value.shape[1]
                behind = merged and self._appends(self._module(name))
                own = rotated[:, -length:] if behind else rotated[:, :length] if merged else rotated
                yield self._lengths(name, prefix, letter, value, own)
        points = ("rot_q", "rot_k") if self.block.rotary else ("q", "k")
        q, k = (self.get(f"{name}.hook_{point}") for point in points)
        if q is not None and k is not None and not channels:
            found = self._scores(name, prefix, pattern, q, k)
            yield replace(found, point=f"{self.prefix}{name}.hook_{points[0]}")
            yield replace(found, point=f"{self.prefix}{name}.hook_{points[1]}")
        if "o_norm" in self.block.parts and added is not None:
            total = self._after(name, self._module("o")(self._module("o_norm")(z.flatten(-2))))
            yield self._same("norm and projection of z == what is added", f"hook_{name}_out", added, total)
        if result is None or added is None:
            return
        _, bias = linear_map(self._module(f"{prefix}o"), z.shape[-2] * z.shape[-1])
        total = result.sum(dim=-2)
        total = self._joined(total + bias.to(total), added.shape[1])
        total = self._after(name, total)
        if total.shape != added.shape:
            kind = "attention in windows: heads' results lie in window order, what is added in the picture's"
            yield Check("sum of heads", f"{self.prefix}{name}.hook_result", "not applicable", None, kind)
            return
        what = "sum of heads + bias == what is added"
        if self.block.row_mask == name:
            # What is added is read as a difference, which is as exact as the stream is large.
            total = total * (added.abs().amax(dim=-1, keepdim=True) > 0)
            stream = self.get("hook_resid_pre")
            slack = 0.0 if stream is None else 8 * torch.finfo(self.dtype).eps * stream.abs().max().item()
            yield compare(what, f"{self.prefix}hook_{name}_out", added, total, self.keep, self.dtype, slack)
            return
        yield self._same(what, f"hook_{name}_out", added, total)

    def _merged(self, name: str, pattern: Tensor, v: Tensor) -> bool:
        """Whether a decoder's attention has one pattern over its own positions and an encoder's (T5Gemma)."""
        module = self._module(name)
        takes = "encoder_hidden_states" in inspect.signature(type(module).forward).parameters
        return name == "attn" and pattern.shape[-1] > v.shape[1] and (takes or self._appends(module))

    def _appends(self, module: Any) -> bool:
        """Whether the keys of a decoder's own positions stand behind the encoder's (DiffusionGemma)."""
        return any(hasattr(module, name) for name in APPENDED_KEYS)

    def _normed(self, names: tuple[str, ...], name: str, value: Tensor) -> Tensor:
        """Values, or what heads give, behind the norm that attention has for them, if it has one."""
        norms = (getattr(self._module(name), norm, None) for norm in names)
        norm = next((found for found in norms if found is not None), None)
        return value if norm is None else norm(value)

    def _head_gate(self, name: str) -> Tensor | None:
        """The sigmoid of a projection that multiplies what each head gives: by one number (LFM3), or by components."""
        module, source = self._module(name), self.get("ln1.hook_out")
        if source is None and self.block.wiring == "streams":
            source = self._mixed("attn_mix", "hook_resid_pre")
        gate = next((getattr(module, n) for n in HEAD_GATES if getattr(module, n, None) is not None), None)
        if source is None:
            return None
        if self.block.gated_q:
            return GatedHeads(self.block.n_heads).halves(self._module("q")(source))[1].sigmoid()
        return None if gate is None else torch.sigmoid(gate(source)).unflatten(-1, (self.block.n_heads, -1))

    def _results(self, name: str, prefix: str, z: Tensor, result: Tensor) -> Check:
        """Each head's result is its z through its columns of the output projection."""
        weight, _ = linear_map(self._module(f"{prefix}o"), z.shape[-2] * z.shape[-1])
        weight = weight.to(z.device, z.dtype).unflatten(-1, (z.shape[-2], -1))
        expected = torch.einsum("...hk,dhk->...hd", z, weight)
        return self._same("z through the output projection == result", f"{name}.hook_result", result, expected)

    def _lengths(self, name: str, prefix: str, letter: str, value: Tensor, rotated: Tensor) -> Check:
        """Rotation keeps lengths, up to one factor; a query-key norm is applied first, or behind it (HunYuan)."""
        module = self._module("xattn" if prefix else "attn")
        what = f"rotation keeps the length of {'queries' if letter == 'q' else 'keys'}"
        told = (module, getattr(module, "config", None))
        if letter == "q" and any(getattr(owner, scale, None) for owner in told for scale in QUERY_SCALES):
            kind = "queries are scaled by their position, behind the rotary embedding"
            return Check(what, f"{self.prefix}{name}.hook_q", "not applicable", None, kind)
        value = self._convolved("xattn" if prefix else "attn", letter, value)
        norm = next((getattr(module, n) for name in QUERY_KEY_NORMS if hasattr(module, n := name.format(letter))), None)
        if norm is not None and not isinstance(norm, nn.Identity):
            width = getattr(norm, "weight", value).shape[-1]
            whole = width != value.shape[-1]
            if whole and width != value.shape[-2] * value.shape[-1]:
                why = f"{value.shape[-2]} heads of {value.shape[-1]} do not fit a norm of {width}"
                return Check(what, f"{self.prefix}{name}.hook_{letter}", "fails", None, why)
            value = norm(value.flatten(-2)).unflatten(-1, value.shape[-2:]) if whole else norm(value)
        later = getattr(module, NORMS_BEHIND_ROTARY[letter], None)
        if later is not None:
            # Lengths decide what the norm's quotient is as long as; its gain is undone.
            value = value / norm_scale(value, norm_of(later, value.shape[-1]))
            rotated = rotated / norm_gain(later, value.shape[-1])[0].to(rotated)
        before, after = value.float().norm(dim=-1), rotated.float().norm(dim=-1)
        before = before.reshape(after.shape) if before.numel() == after.numel() else before
        if before.shape == after.shape:
            before = before * (after.sum() / before.sum())
        return self._same(what, f"{name}.hook_{letter}", after, before)

    def _scores(self, name: str, prefix: str, pattern: Tensor, q: Tensor, k: Tensor) -> Check:
        """The softmax of queries and keys, where attention is allowed, is the pattern."""
        module = self._module("xattn" if prefix else "attn")
        what = "softmax of queries * keys == pattern"
        if getattr(module, "sinks", None) is not None:
            kind = "attention with sinks: part of every row goes to none of the positions"
            return Check(what, f"{self.prefix}{name}.hook_q", "not applicable", None, kind)
        takes = inspect.signature(type(module).forward).parameters
        if any(name in takes or getattr(module, name, None) is not None for name in SCORE_BIASES):
            kind = "attention with a bias for each distance, which is added to queries * keys"
            return Check(what, f"{self.prefix}{name}.hook_q", "not applicable", None, kind)
        k = k.repeat_interleave(q.shape[-2] // k.shape[-2], dim=-2)
        scaling = next((s for n in ("scaling", "scale") if isinstance(s := getattr(module, n, None), float)), None)
        scores = torch.einsum("...qhd,...khd->...hqk", q.float(), k.float())
        scores = scores * (q.shape[-1] ** -0.5 if scaling is None else scaling)
        cap = getattr(module, "attn_logit_softcapping", None)
        scores = scores if cap is None else cap * torch.tanh(scores / cap)
        scores = scores.reshape(pattern.shape)
        if self.block.row_mask == name:
            # Rows that see no image are spread over everything, and dropped.
            seen = (pattern.amax(dim=-1, keepdim=True) > pattern.amin(dim=-1, keepdim=True)).to(scores.dtype)
            scores = scores * seen
        guess = scores.masked_fill(pattern <= 0, -torch.inf).softmax(dim=-1).nan_to_num()
        return self._same(what, f"{name}.hook_q", guess.movedim(1, -1), pattern.float().movedim(1, -1))


def _mix(pattern: Tensor, v: Tensor) -> Tensor:
    """Per-head mix of values, (b, p, heads, d_head), or (patches, heads, d_head) in a packed tower."""
    packed = v.ndim == 3
    # Tiles of one image are rows of their own where they are projected, and one sequence where they are attended to.
    v = v.reshape(pattern.shape[0], -1, *v.shape[-2:])
    v = v.repeat_interleave(pattern.shape[1] // v.shape[-2], dim=-2)
    mixed = torch.einsum("bhqk,bkhd->bqhd", pattern, v)
    return mixed.squeeze(0) if packed else mixed


def _mix_channels(pattern: Tensor, v: Tensor) -> Tensor:
    """Attention between channels: each position's channels are mixed within their group."""
    return torch.einsum("bgcd,bpgd->bpgc", pattern, v)
