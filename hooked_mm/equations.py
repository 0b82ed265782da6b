"""What must hold between hook points if each means what its name says: the equations of a transformer block.

Pure functions: from values read in one pass to checks. `conformance` reads the values, and adds the checks that need
passes of their own (other pictures, writes).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from hooked_mm.architectures import CLAMPS, MLP_SCALES
from hooked_mm.attention_equations import AttentionEquations
from hooked_mm.checks import Check, compare
from hooked_mm.hook_rows import FUSED_PAIRS
from hooked_mm.norms import centre, find_norm_formula, norm_scale
from hooked_mm.structure import submodule


class BlockEquations(AttentionEquations):
    """The checks of one block, with those of its attention."""

    def all(self) -> Iterator[Check]:
        """Every check of this block, from the stream through norms, attention and MLP."""
        yield from self._guarded("hook_resid_mid", self.sums())
        yield from self._guarded("ln1.hook_out", self.norms())
        for name, prefix in (("attn", ""), ("xattn", "x")):
            yield from self._guarded(f"{name}.hook_q", self.projections(name, prefix))
            seen = self.get(f"{name}.hook_pattern") is not None
            yield from self._guarded(f"{name}.hook_z", (self.attention if seen else self.output)(name, prefix))
        yield from self._guarded("mlp.hook_post", self.mlp())

    def _guarded(self, name: str, checks: Iterator[Check]) -> Iterator[Check]:
        """Shapes that fit no equation at all, and modules that can't be run on a value alone, are failures, too."""
        try:
            yield from checks
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
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
        if self.block.wiring == "streams":
            yield from self._streams()
            return
        if self.block.wiring == "gated":
            yield from self._joined_by_gates()
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
        second, names = self._sum(mid, "conv2", "mlp", "extra", "rescale")
        yield from self._total("resid_mid + MLP == resid_post", "hook_resid_post", post, second, names)

    def _streams(self) -> Iterator[Check]:
        """What is left of the streams behind a part, beside what was kept of them, is one vector in their shares."""
        for what, role, before, after in (
            ("attention", "attn_mix", "hook_resid_pre", "hook_resid_mid"),
            ("the MLP", "mlp_mix", "hook_resid_mid", "hook_resid_post"),
        ):
            value, behind = self.get(before), self.get(after)
            if value is None or behind is None:
                continue
            told = f"{what} adds one vector to all streams, by the shares of its mix"
            if role == "attn_mix" and "embed_add" in self.block.parts:
                kind = "embeddings of their own are added to the streams before attention"
                yield Check(told, self.prefix + after, "not applicable", None, kind)
                continue
            yield self._same(told, after, behind, self._spread(role, value, behind))

    def _spread(self, role: str, value: Tensor, behind: Tensor) -> Tensor:
        """The streams that come closest: kept @ value + shares * (the vector that explains most of `behind`)."""
        wide = value if value.ndim > 3 else value.unflatten(-1, (-1, self.block.d_model))
        given = [one for one in self._module(role)(value) if isinstance(one, Tensor)]
        count = wide.shape[-2]
        shares = next(one for one in given if one.shape == wide.shape[:-1])
        kept = next((one for one in given if one.shape == (*wide.shape[:-1], count)), None)
        rest = wide if kept is None else torch.matmul(kept.transpose(-1, -2), wide)
        left = behind.reshape(wide.shape) - rest
        vector = torch.einsum("...s,...sd->...d", shares, left) / shares.square().sum(dim=-1, keepdim=True)
        return (rest + shares.unsqueeze(-1) * vector.unsqueeze(-2)).reshape(behind.shape)

    def _joined_by_gates(self) -> Iterator[Check]:
        """gate(resid_pre, what attention gives) == resid_mid; gate(resid_mid, what the MLP gives) == resid_post."""
        pre, mid, post = (self.get(f"hook_resid_{name}") for name in ("pre", "mid", "post"))
        z, source = self.get("attn.hook_z"), self.get("ln2.hook_out")
        if pre is None or mid is None or post is None or z is None or source is None:
            return
        given = self._after("attn", self._module("o")(z.flatten(-2)))
        found = self._module("attn_join")(pre, given)
        yield self._same("gate(resid_pre, attention) == resid_mid", "hook_resid_mid", mid, found)
        found = self._module("mlp_join")(mid, self._after("mlp", self._module("mlp")(source)))
        yield self._same("gate(resid_mid, MLP) == resid_post", "hook_resid_post", post, found)

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

        if self.block.wiring in ("pre", "gated"):
            return {"ln1": total("resid_pre", "conv1_out"), "ln2": total("resid_mid", "conv2_out")}
        if self.block.wiring in ("parallel", "single"):
            return dict.fromkeys(("ln1", "ln2"), total("resid_pre"))
        if self.block.wiring == "streams":
            return {"ln1": self._mixed("attn_mix", "hook_resid_pre"), "ln2": self._mixed("mlp_mix", "hook_resid_mid")}
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

    def mlp(self) -> Iterator[Check]:
        """post == act(pre) (* pre_linear); down projection of post == what the MLP adds."""
        pre, up, post = (self.get(f"mlp.hook_{name}") for name in ("pre", "pre_linear", "post"))
        added = self.get("hook_mlp_out")
        act = self._activation()
        if pre is not None and post is not None and act is not None:
            neurons = self._bounded(act, pre) if up is None else self._bounded(act, pre, up)
            neurons = self._module("mlp_norm")(neurons) if "mlp_norm" in self.block.parts else neurons
            yield self._same("act(pre) == post", "mlp.hook_post", post, neurons)
        source = self.get("hook_resid_mid" if self.block.wiring in ("post", "after") else "ln2.hook_out")
        if source is None and self.block.wiring in ("parallel", "single"):
            source = self.get("ln1.hook_out")
        if source is None and self.block.wiring == "streams":
            source = self._mixed("mlp_mix", "hook_resid_mid")
        if source is not None:
            for name, role in (("mlp.hook_pre", "mlp_gate"), ("mlp.hook_pre_linear", "mlp_up")):
                if (value := self.get(name)) is not None:
                    expected = self._neurons(role, source)
                    yield self._same("projection of the norm's output", name, value, expected)
        if post is not None and added is not None:
            scales = (getattr(self._module("mlp"), name, None) for name in MLP_SCALES)
            factor = next((scale for scale in scales if scale is not None), 1.0)
            total = self._after("mlp", self._module("mlp_down")(post) * factor)
            if self.block.row_mask == "mlp":
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

    def _neurons(self, role: str, source: Tensor) -> Tensor:
        """What the gate or the up projection gives, alone or as half of a fused pair."""
        if role in self.block.parts:
            alone: Tensor = self._module(role)(source)
            return alone
        pair, order = next((pair, order) for pair, order in FUSED_PAIRS.items() if pair in self.block.parts)
        whole: Tensor = self._module(pair)(source)
        return whole.chunk(2, dim=-1)[order.index(role)]

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
