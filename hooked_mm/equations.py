"""What must hold between hook points if each means what its name says: the equations of a transformer block.

Pure functions: from values read in one pass to checks. `conformance` reads the values, and adds the checks that need
passes of their own (other pictures, writes).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hooked_mm.access import Fused, GatedHeads, linear_map
from hooked_mm.architectures import CLAMPS, HEAD_GATES, QUERY_KEY_NORMS
from hooked_mm.norms import centre, find_norm_formula, norm_scale
from hooked_mm.structure import Block, scale_factor, submodule

Verdict = Literal["holds", "fails", "not applicable"]


@dataclass(frozen=True)
class Check:
    """One thing that was checked.

    Attributes:
        what: The equation or property, in words.
        point: The hook point that it vouches for.
        verdict: Whether it holds; `not applicable` follows from a kind of model, which `detail` states.
        error: Largest deviation, relative to the largest value; None where nothing was compared.
        detail: The reason, or what was found.
    """

    what: str
    point: str
    verdict: Verdict
    error: float | None = None
    detail: str = ""


def tolerance(dtype: torch.dtype) -> float:
    """Relative to the largest value: rounding of a few operations; a wrong point is off by the values themselves."""
    return max(2e-5, 8 * torch.finfo(dtype).eps)


def compare(
    what: str,
    point: str,
    got: Tensor,
    expected: Tensor,
    keep: Tensor | None = None,
    dtype: torch.dtype | None = None,
    slack: float = 0.0,
) -> Check:
    """Whether two values agree, where `keep` (over the leading dimensions) is true, to the rounding of `dtype`.

    `slack` is what larger values, of which these are differences, allow besides.
    """
    if got.shape != expected.shape:
        return Check(what, point, "fails", None, f"shapes {tuple(got.shape)} and {tuple(expected.shape)} differ")
    if keep is not None and keep.shape == got.shape[: keep.ndim]:
        got, expected = got[keep], expected[keep]
    size = max(expected.abs().max().item(), 1e-12) if expected.numel() else 1.0
    error = (got.float() - expected.float()).abs().max().item() / size if got.numel() else 0.0
    allowed = tolerance(dtype or got.dtype) + slack / size
    return Check(what, point, "holds" if error <= allowed else "fails", error)


class BlockEquations:
    """The checks of one block.

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

    def all(self) -> Iterator[Check]:
        """Every check of this block, from the stream through norms, attention and MLP."""
        yield from self._guarded("hook_resid_mid", self.sums())
        yield from self._guarded("ln1.hook_out", self.norms())
        for name, prefix in (("attn", ""), ("xattn", "x")):
            yield from self._guarded(f"{name}.hook_q", self.projections(name, prefix))
            if self.get(f"{name}.hook_pattern") is not None:
                yield from self._guarded(f"{name}.hook_z", self.attention(name, prefix))
        yield from self._guarded("mlp.hook_post", self.mlp())

    def _guarded(self, name: str, checks: Iterator[Check]) -> Iterator[Check]:
        """Shapes that fit no equation at all are a failure, too."""
        try:
            yield from checks
        except RuntimeError as error:
            what = "shapes fit the equations"
            yield Check(what, self.prefix + name, "fails", None, str(error).splitlines()[0])

    def sums(self) -> Iterator[Check]:
        """resid_pre + what attention adds == resid_mid; resid_mid + what the MLP adds == resid_post."""
        pre, mid, post = (self.get(f"hook_resid_{name}") for name in ("pre", "mid", "post"))
        mlp = self.get("hook_mlp_out")
        if self.block.wiring == "opaque":
            kind = "what this block adds is no sum of two parts, so there are no points for what is added"
            yield Check("the block's sum", f"{self.prefix}hook_resid_post", "not applicable", None, kind)
            return
        if self.block.wiring in ("parallel", "single") and pre is not None and post is not None:
            total, names = self._sum(pre, "attn", "mixer", "mlp")
            what = " + ".join(["resid_pre", *(name.removeprefix("hook_").removesuffix("_out") for name in names)])
            yield from self._total(f"{what} == resid_post", "hook_resid_post", post, total, names)
            return
        if pre is None or mid is None or post is None or mlp is None:
            return
        if self.block.wiring == "post":
            kind = "this block normalises after the sum, so no sum of points is the stream"
            yield Check("attention's sum", f"{self.prefix}hook_resid_mid", "not applicable", None, kind)
            yield Check("the MLP's sum", f"{self.prefix}hook_resid_post", "not applicable", None, kind)
            return
        first, names = self._sum(pre, "conv1", "attn", "mixer", "xattn")
        yield from self._total("resid_pre + attention == resid_mid", "hook_resid_mid", mid, first, names)
        conv = self.get("hook_conv2_out")
        second = mid + mlp if conv is None else mid + conv + mlp
        names = ["hook_mlp_out"] if conv is None else ["hook_conv2_out", "hook_mlp_out"]
        yield from self._total("resid_mid + MLP == resid_post", "hook_resid_post", post, second, names)

    def _sum(self, start: Tensor, *parts: str) -> tuple[Tensor, list[str]]:
        """A stream with what these parts add, and the names of those that there are."""
        names = [f"hook_{part}_out" for part in parts]
        found = {name: value for name in names if (value := self.get(name)) is not None}
        return sum(found.values(), start), list(found)

    def _total(self, what: str, name: str, got: Tensor, expected: Tensor, added: list[str]) -> Iterator[Check]:
        """A sum that does not hold speaks against what is added as much as against the stream."""
        found = self._same(what, name, got, expected)
        yield found
        if found.verdict == "fails":
            yield from (replace(found, point=self.prefix + other) for other in added)

    def _norm_inputs(self) -> dict[str, Tensor | None]:
        """What each norm stands on, by other points."""

        def total(*names: str) -> Tensor | None:
            found = [value for name in names if (value := self.get(f"hook_{name}")) is not None]
            return sum(found[1:], found[0]) if found else None

        if self.block.wiring == "pre":
            return {"ln1": total("resid_pre", "conv1_out"), "ln2": total("resid_mid", "conv2_out")}
        if self.block.wiring in ("parallel", "single"):
            return dict.fromkeys(("ln1", "ln2"), total("resid_pre"))
        if self.block.wiring != "post":
            return {}
        crossed = self.get("ln1.hook_out")
        across = self.get("hook_xattn_out")
        return {
            "ln1": total("resid_pre", "attn_out"),
            "lnx": None if crossed is None or across is None else crossed + across,
            "ln2": total("resid_mid", "mlp_out"),
        }

    def norms(self) -> Iterator[Check]:
        """Each norm's divisor, quotient and output, from the stream it stands on."""
        for name, x in self._norm_inputs().items():
            out = self.get(f"{name}.hook_out")
            if x is None or out is None:
                continue
            module = self._module(name)
            formula = find_norm_formula(module)
            scale, normalized = self.get(f"{name}.hook_scale"), self.get(f"{name}.hook_normalized")
            if formula is None or scale is None or normalized is None:
                kind = f"{type(module).__name__} is no LayerNorm or RMSNorm, so it has no divisor"
                yield Check("a norm's divisor", f"{self.prefix}{name}.hook_scale", "not applicable", None, kind)
                continue
            yield self._same("the stream's divisor", f"{name}.hook_scale", scale, norm_scale(x, formula))
            quotient = centre(x, formula) / scale
            yield self._same("stream / divisor", f"{name}.hook_normalized", normalized, quotient.to(normalized.dtype))
            yield self._same("quotient * gain", f"{name}.hook_out", out, formula.output(module, normalized))

    def projections(self, name: str, prefix: str) -> Iterator[Check]:
        """Queries, keys and values are projected from what attention stands on."""
        bare = self.block.wiring in ("post", "after")
        source = self.get("hook_resid_pre" if bare else "ln1.hook_out")
        if prefix and self.block.wiring == "post":
            source = self.get("ln1.hook_out")
        if source is None:
            return
        for index, letter in enumerate("qkv"):
            value = self.get(f"{name}.hook_{letter}")
            # Keys and values of cross-attention come from elsewhere.
            if value is None or (prefix and letter != "q"):
                continue
            if f"{prefix}{letter}" in self.block.parts:
                expected = self._projected(f"{prefix}{letter}", source)
            elif "qkv" in self.block.parts:
                fused = Fused(index, self.block.n_heads, self.block.n_kv_heads)
                expected = fused.parts(self._module("qkv")(source))[index].flatten(-2)
            else:
                continue
            got = value.flatten(-2)
            # Windows are rearranged between the norm and the projection.
            if got.shape == expected.shape:
                yield self._same("projection of the norm's output", f"{name}.hook_{letter}", got, expected)

    def _projected(self, role: str, source: Tensor) -> Tensor:
        """Queries, keys or values (..., heads * d_head) of what attention stands on."""
        if role == "q" and "q_a" in self.block.parts:
            source = self._module("q_a_norm")(self._module("q_a")(source))
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
        if v is not None:
            mixed = _mix_channels(pattern, v) if channels else _mix(pattern, v)
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
                yield self._lengths(name, prefix, letter, value, rotated)
        points = ("rot_q", "rot_k") if self.block.rotary else ("q", "k")
        q, k = (self.get(f"{name}.hook_{point}") for point in points)
        if q is not None and k is not None and not channels:
            found = self._scores(name, prefix, pattern, q, k)
            yield replace(found, point=f"{self.prefix}{name}.hook_{points[0]}")
            yield replace(found, point=f"{self.prefix}{name}.hook_{points[1]}")
        if result is None or added is None:
            return
        bias = getattr(self._module(f"{prefix}o"), "bias", None)
        total = result.sum(dim=-2)
        total = self._after(name, total if bias is None else total + bias)
        if total.shape != added.shape:
            kind = "attention in windows: heads' results lie in window order, what is added in the picture's"
            yield Check("sum of heads", f"{self.prefix}{name}.hook_result", "not applicable", None, kind)
            return
        yield self._same("sum of heads + bias == what is added", f"hook_{name}_out", added, total)

    def _head_gate(self, name: str) -> Tensor | None:
        """The sigmoid of a projection that multiplies what each head gives: by one number (LFM3), or by components."""
        module, source = self._module(name), self.get("ln1.hook_out")
        gate = next((getattr(module, n) for n in HEAD_GATES if getattr(module, n, None) is not None), None)
        if source is None or not (gate or self.block.gated_q):
            return None
        if self.block.gated_q:
            return GatedHeads(self.block.n_heads).halves(self._module("q")(source))[1].sigmoid()
        return torch.sigmoid(gate(source)).unflatten(-1, (self.block.n_heads, -1))

    def _results(self, name: str, prefix: str, z: Tensor, result: Tensor) -> Check:
        """Each head's result is its z through its columns of the output projection."""
        weight, _ = linear_map(self._module(f"{prefix}o"), z.shape[-2] * z.shape[-1])
        weight = weight.to(z.device, z.dtype).unflatten(-1, (z.shape[-2], -1))
        expected = torch.einsum("...hk,dhk->...hd", z, weight)
        return self._same("z through the output projection == result", f"{name}.hook_result", result, expected)

    def _after(self, role: str, value: Tensor) -> Tensor:
        """What a norm, factor or gate behind a module makes of its output."""
        if f"{role}_after" in self.block.parts:
            value = self._module(f"{role}_after")(value)
        if role in self.block.scales:
            return value * scale_factor(submodule(self.model, self.block.path), self.block.scales[role])
        return value

    def _lengths(self, name: str, prefix: str, letter: str, value: Tensor, rotated: Tensor) -> Check:
        """Rotation keeps lengths, up to one factor; a query-key norm is applied first."""
        module = self._module("xattn" if prefix else "attn")
        norm = next((getattr(module, n) for name in QUERY_KEY_NORMS if hasattr(module, n := name.format(letter))), None)
        if norm is not None and not isinstance(norm, nn.Identity):
            whole = getattr(norm, "weight", value).shape[-1] != value.shape[-1]
            value = norm(value.flatten(-2)).unflatten(-1, value.shape[-2:]) if whole else norm(value)
        before, after = value.float().norm(dim=-1), rotated.float().norm(dim=-1)
        before = before.reshape(after.shape) if before.numel() == after.numel() else before
        if before.shape == after.shape:
            before = before * (after.sum() / before.sum())
        what = f"rotation keeps the length of {'queries' if letter == 'q' else 'keys'}"
        return self._same(what, f"{name}.hook_{letter}", after, before)

    def _scores(self, name: str, prefix: str, pattern: Tensor, q: Tensor, k: Tensor) -> Check:
        """The softmax of queries and keys, where attention is allowed, is the pattern."""
        module = self._module("xattn" if prefix else "attn")
        what = "softmax of queries * keys == pattern"
        if getattr(module, "sinks", None) is not None:
            kind = "attention with sinks: part of every row goes to none of the positions"
            return Check(what, f"{self.prefix}{name}.hook_q", "not applicable", None, kind)
        k = k.repeat_interleave(q.shape[-2] // k.shape[-2], dim=-2)
        scaling = next((s for n in ("scaling", "scale") if isinstance(s := getattr(module, n, None), float)), None)
        scores = torch.einsum("...qhd,...khd->...hqk", q.float(), k.float())
        scores = scores * (q.shape[-1] ** -0.5 if scaling is None else scaling)
        cap = getattr(module, "attn_logit_softcapping", None)
        scores = scores if cap is None else cap * torch.tanh(scores / cap)
        scores = scores.reshape(pattern.shape)
        guess = scores.masked_fill(pattern <= 0, -torch.inf).softmax(dim=-1).nan_to_num()
        return self._same(what, f"{name}.hook_q", guess.movedim(1, -1), pattern.float().movedim(1, -1))

    def mlp(self) -> Iterator[Check]:
        """post == act(pre) (* pre_linear); down projection of post == what the MLP adds."""
        pre, up, post = (self.get(f"mlp.hook_{name}") for name in ("pre", "pre_linear", "post"))
        added = self.get("hook_mlp_out")
        act = self._activation()
        if pre is not None and post is not None and act is not None:
            neurons = self._bounded(act, pre) if up is None else self._bounded(act, pre, up)
            yield self._same("act(pre) == post", "mlp.hook_post", post, neurons)
        source = self.get("hook_resid_mid" if self.block.wiring in ("post", "after") else "ln2.hook_out")
        if source is None and self.block.wiring in ("parallel", "single"):
            source = self.get("ln1.hook_out")
        if source is not None:
            for index, (name, role) in enumerate((("mlp.hook_pre", "mlp_gate"), ("mlp.hook_pre_linear", "mlp_up"))):
                if (value := self.get(name)) is not None:
                    fused = role not in self.block.parts
                    expected = self._module("mlp_gate_up" if fused else role)(source)
                    expected = expected.chunk(2, dim=-1)[index] if fused else expected
                    yield self._same("projection of the norm's output", name, value, expected)
        if post is not None and added is not None:
            total = self._after("mlp", self._module("mlp_down")(post))
            if self.block.row_mask:
                kept = added.abs().amax(dim=-1, keepdim=True) > 0
                total = torch.where(kept, total, torch.zeros_like(total))
                # What is added is read as a difference, which is as exact as the stream is large.
                mid = self.get("hook_resid_mid")
                size = 0.0 if mid is None else mid.abs().max().item()
                yield compare(
                    "down projection of post == what the MLP adds",
                    f"{self.prefix}hook_mlp_out",
                    added,
                    total,
                    self.keep,
                    self.dtype,
                    slack=8 * torch.finfo(self.dtype).eps * size,
                )
                return
            yield self._same("down projection of post == what the MLP adds", "hook_mlp_out", added, total)

    def _bounded(self, act: Callable[[Tensor], Tensor], pre: Tensor, up: Tensor | None = None) -> Tensor:
        """The neurons that gate and up projection give, within the bounds that the MLP sets."""
        mlp = self._module("mlp")
        clamps = ((limit, when) for name, when in CLAMPS if (limit := getattr(mlp, name, None)) is not None)
        limit, when = next(clamps, (math.inf, "after"))
        gate = act(pre.clamp(max=limit)) if when == "before" else act(pre).clamp(max=limit)
        return gate if up is None else gate * up.clamp(-limit, limit)

    def _activation(self) -> Callable[[Tensor], Tensor] | None:
        roles = [role for role in ("mlp", "mlp_gate") if role in self.block.parts]
        gate = self.block.parts.get("mlp_gate", "").rpartition(".")[0]
        owners = [submodule(self.model, self.block.path), *map(self._module, roles[:1])]
        owners += [submodule(self.model, f"{self.block.path}.{gate}")] if gate else []
        names = ("act_fn", "activation_fn", "activation", "act")
        found = (getattr(owner, name, None) for owner in owners for name in names)
        return next((act for act in found if callable(act)), None)


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
