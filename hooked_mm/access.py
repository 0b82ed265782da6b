"""How a value is reached: read from the model, shown in the form its name promises, and written back.

Most values are the input or output of a module. Others follow from one by a formula (a norm's scale, a head's result)
or lie between two modules (what a gate lets through). Each kind is one class with `read` and `write`; `runner` calls
them inside a trace and knows nothing else about a point.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.utils import ModelOutput

from hooked_mm.errors import BadInputError
from hooked_mm.norms import NormFormula, apply_norm, centre, norm_scale
from hooked_mm.structure import inner_linear
from hooked_mm.views import PLAIN, Pass, View
from hooked_mm.weights import device_of, dtype_of, placed

Side = Literal["input", "output"]


class Access(Protocol):
    """Reads and writes one kind of value."""

    @property
    def module(self) -> str:
        """Path of the module at which the value lies, for the order of visits."""

    @property
    def side(self) -> Side:
        """Whether it is read when the module begins or when it ends."""

    def read(self, run: Pass) -> Tensor:
        """The value as the name promises it."""

    def write(self, run: Pass, new: Tensor) -> None:
        """Let the model go on with `new`, of the shape that `read` gave."""


@dataclass(frozen=True)
class Detached:
    """The access of a point whose model is not there: that of a cache loaded from a file."""

    module: str = ""
    side: ClassVar[Side] = "output"

    def read(self, run: Pass) -> Tensor:
        raise BadInputError("this hook point comes from a file and belongs to no model")

    def write(self, run: Pass, new: Tensor) -> None:
        self.read(run)


def _whole(envoy: Any, side: Side) -> Tensor:
    raw = envoy.output if side == "output" else envoy.input
    if isinstance(raw, ModelOutput):
        return raw[_features_field(raw)]
    return raw[0] if isinstance(raw, tuple) else raw


def _features_field(output: ModelOutput) -> str:
    """Where a module's result holds what it makes: its pooled features, else its last states."""
    return "pooler_output" if output.get("pooler_output") is not None else "last_hidden_state"


def _put(envoy: Any, side: Side, new: Tensor) -> None:
    if side == "input":
        envoy.input = new
        return
    raw = envoy.output
    if isinstance(raw, ModelOutput):
        raw[_features_field(raw)] = new
        return
    envoy.output = (new, *raw[1:]) if isinstance(raw, tuple) else new


@dataclass(frozen=True)
class ModuleValue:
    """The first tensor that goes into a module, or comes out of it.

    A write at the *input* of a norm would miss the residual stream, which the block keeps beside the norm: such values
    are written in place (`in_place`), into the one tensor that both read.
    """

    module: str
    side: Side
    view: View = PLAIN
    in_place: bool = False

    def read(self, run: Pass) -> Tensor:
        return self.view.show(_whole(run.get(self.module), self.side), run)

    def write(self, run: Pass, new: Tensor) -> None:
        envoy = run.get(self.module)
        whole = _whole(envoy, self.side)
        flat = self.view.back(new, whole)
        if self.in_place:
            whole.copy_(flat)
        else:
            _put(envoy, self.side, flat)


@dataclass(frozen=True)
class FieldValue:
    """A tensor in a field of a module's output object (`logits` of the model)."""

    module: str
    name: str
    side: ClassVar[Side] = "output"

    def read(self, run: Pass) -> Tensor:
        return getattr(run.get(self.module).output, self.name)

    def write(self, run: Pass, new: Tensor) -> None:
        setattr(run.get(self.module).output, self.name, new)


@dataclass(frozen=True)
class ScaledValue:
    """What a module's output adds to the stream after a parameter has multiplied it, (..., d).

    Written in the sum, since a factor of zero could not be undone: the sum becomes what was there before plus the new
    value. `before` names the point that holds the stream before the sum; it is read whenever this point is.
    """

    module: str
    factor: Callable[[], Tensor] = field(repr=False)
    before: str
    total: ModuleValue
    side: ClassVar[Side] = "output"

    def read(self, run: Pass) -> Tensor:
        value = _whole(run.get(self.module), "output")
        return value * self.factor().to(value.device, value.dtype)

    def write(self, run: Pass, new: Tensor) -> None:
        self.total.write(run, run.memo[self.before].to(new.device) + new)


@dataclass(frozen=True)
class RescaleValue:
    """What a factor s on the whole stream changes at a block's end: y - y / s, where y is what leaves the block."""

    module: str
    factor: Callable[[], Tensor] = field(repr=False)
    side: ClassVar[Side] = "output"

    def read(self, run: Pass) -> Tensor:
        whole = _whole(run.get(self.module), "output")
        return whole - whole / self.factor().to(whole.device, whole.dtype)

    def write(self, run: Pass, new: Tensor) -> None:
        envoy = run.get(self.module)
        whole = _whole(envoy, "output")
        _put(envoy, "output", whole / self.factor().to(whole.device, whole.dtype) + new)


@dataclass(frozen=True)
class AddedValue:
    """What is added to the stream between two points, as their difference: exact where it is zero.

    For additions that no module's output is: rows of which some are dropped, features added between blocks.
    """

    before: str
    total: ModuleValue

    @property
    def module(self) -> str:
        return self.total.module

    @property
    def side(self) -> Side:
        return self.total.side

    def read(self, run: Pass) -> Tensor:
        total = self.total.read(run)
        return total - run.memo[self.before].to(total.device)

    def write(self, run: Pass, new: Tensor) -> None:
        self.total.write(run, run.memo[self.before].to(new.device) + new)


@dataclass(frozen=True)
class NormValue:
    """A norm's divisor (..., 1) float32, or its quotient (..., d) before the gain; see `norms`."""

    module: str
    quantity: Literal["scale", "normalized"]
    formula: NormFormula
    norm: Callable[[], Any] = field(repr=False)
    view: View = PLAIN
    side: ClassVar[Side] = "input"

    def read(self, run: Pass) -> Tensor:
        written = run.memo.get(f"{self.module}:normalized")
        if self.quantity == "normalized" and written is not None:
            return written
        x = self.view.show(_whole(run.get(self.module), "input"), run)
        scale = norm_scale(x, self.formula)
        if self.quantity == "normalized":
            return apply_norm(x, scale, self.formula).to(x.dtype)
        run.memo[f"{self.module}:centred"] = centre(x, self.formula)
        return scale

    def write(self, run: Pass, new: Tensor) -> None:
        envoy = run.get(self.module)
        if self.quantity == "scale":
            new = run.memo[f"{self.module}:centred"].to(new.device) / new
        whole = _whole(envoy, "output")
        # accelerate moves a module's input between where it is read and where the module computes.
        new = new.to(whole)
        run.memo[f"{self.module}:normalized"] = new
        _put(envoy, "output", self.view.back(self.formula.output(self.norm(), new), whole))


@dataclass(frozen=True)
class HeadResult:
    """What each head adds through the output projection, (b, p, heads, d); they sum to its output without the bias.

    z (b, p, heads, d_head) and W (d, heads * d_head): result_h = z_h W_h^T (Elhage et al. 2021).
    """

    module: str
    heads: int
    projection: Callable[[], Any] = field(repr=False)
    side: ClassVar[Side] = "input"

    def prepare(self) -> dict[str, Any]:
        """The weights, before the trace: modules can't be run inside one without being taken for the model's own."""
        projection = self.projection()
        weight, bias = linear_map(projection, inner_linear(projection).in_features)
        return {f"{self.module}:weight": weight, f"{self.module}:bias": bias}

    def read(self, run: Pass) -> Tensor:
        z = _whole(run.get(self.module), "input").unflatten(-1, (self.heads, -1))
        z = z.flatten(1, 2) if z.ndim == 5 else z
        weight = run.memo[f"{self.module}:weight"].to(z.device, z.dtype).unflatten(-1, (self.heads, -1))
        return torch.einsum("...hk,dhk->...hd", z, weight)

    def write(self, run: Pass, new: Tensor) -> None:
        total = new.sum(dim=-2)
        total = total + run.memo[f"{self.module}:bias"].to(total)
        envoy = run.get(self.module)
        whole = _whole(envoy, "output")
        _put(envoy, "output", total.reshape(whole.shape).to(whole.device))


def linear_map(module: nn.Module, d_in: int) -> tuple[Float[Tensor, "out in"], Float[Tensor, " out"]]:
    """Weight and bias of an affine module by what it does: a plain Linear's own, else by probing (LoRA, quantised).

    Args:
        module: Takes (..., d_in).
        d_in: Its input width.
    """
    with torch.no_grad():
        if type(module) is nn.Linear and type(module.weight) is nn.Parameter:
            with placed(module):
                weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
            return weight, weight.new_zeros(weight.shape[0]) if bias is None else bias
        dtype, device = dtype_of(module), device_of(module)
        bias = module(torch.zeros(1, d_in, dtype=dtype, device=device))[0]
        return (module(torch.eye(d_in, dtype=dtype, device=device)) - bias).T, bias
