"""Proof, at load, that every hook point of a model means what its name says.

On one batch with a real image: the equations of the blocks (`equations`), the logits from the last stream, image
features at image positions and nowhere else, attention that re-weights, and for every point that a write changes what
follows while reading changes nothing. The fast form does this for the first and last block of each kind, the full form
for every block. What fails is named; a point that fails can be refused or marked as unavailable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from hooked_mm.batch import Batch
from hooked_mm.blocks import named_parts
from hooked_mm.checks import Check
from hooked_mm.hook_points import HookPoint
from hooked_mm.passes import Passes, reads_tower_end
from hooked_mm.skeleton import block_lists
from hooked_mm.structure import Structure

if TYPE_CHECKING:
    from hooked_mm.hooked import HookedMM


@dataclass(frozen=True)
class ConformanceReport:
    """Everything that was checked of one model; prints as a table.

    Attributes:
        model: What was checked.
        checks: One entry per equation, point and block.
        layers: Stream -> the blocks that were looked at.
        kinds: What kind of model it is, from which every `not applicable` follows.
    """

    model: str
    checks: tuple[Check, ...]
    layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    kinds: tuple[str, ...] = ()

    @property
    def failures(self) -> list[Check]:
        """What does not hold."""
        return [check for check in self.checks if check.verdict == "fails"]

    @property
    def ok(self) -> bool:
        """Whether nothing fails."""
        return not self.failures

    def failed_points(self) -> dict[str, str]:
        """Hook point -> why it can't be trusted."""
        found: dict[str, str] = {}
        for check in self.failures:
            error = "" if check.error is None else f" (off by {check.error:.1e} of the largest value)"
            found.setdefault(
                check.point, f"{check.what} does not hold{error}{': ' if check.detail else ''}{check.detail}"
            )
        return found

    def untrusted(self, points: Mapping[str, HookPoint], structure: Structure) -> dict[str, str]:
        """Every point that can't be trusted: those that fail, and the same in the other blocks of their kind."""
        reasons = self.failed_points()
        found = dict(reasons)
        for name, why in reasons.items():
            point = points.get(name)
            if point is None or point.layer is None:
                continue
            blocks = structure.stacks[point.stream].blocks
            for layer, block in enumerate(blocks):
                other = name.replace(f"blocks.{point.layer}.", f"blocks.{layer}.")
                if block.kind == blocks[point.layer].kind and other in points:
                    found.setdefault(other, f"at {name} {why}")
        for name, point in points.items():
            lost = [needed for needed in point.needs if needed in found]
            if lost:
                found.setdefault(name, f"it needs {lost[0]}: {found[lost[0]]}")
        return found

    def table(self) -> list[tuple[str, str, int, str, str]]:
        """(stream, what, how many held of how many, largest error, remark), one row per property."""
        rows: dict[tuple[str, str], list[Check]] = {}
        for check in self.checks:
            stream = check.point.split(".", maxsplit=1)[0] if check.point.startswith(("vision", "encoder")) else "text"
            rows.setdefault((stream, check.what), []).append(check)
        made = []
        for (stream, what), checks in rows.items():
            errors = [check.error for check in checks if check.error is not None]
            worst = f"{max(errors):.1e}" if errors else ""
            failed = [check for check in checks if check.verdict == "fails"]
            if failed:
                remark = f"FAILS at {', '.join(check.point for check in failed[:3])}" + (
                    " ..." if len(failed) > 3 else ""
                )
            elif all(check.verdict == "not applicable" for check in checks):
                remark = f"not applicable: {checks[0].detail}"
            else:
                remark = "holds" + (f": {checks[0].detail}" if len(checks) == 1 and checks[0].detail else "")
            made.append((stream, what, len(checks), worst, remark))
        return made

    def __str__(self) -> str:
        held = sum(check.verdict == "holds" for check in self.checks)
        none = sum(check.verdict == "not applicable" for check in self.checks)
        layers = "; ".join(f"{stream} {', '.join(map(str, which))}" for stream, which in self.layers.items())
        lines = [
            f"{self.model}: {held} checks hold, {len(self.failures)} fail, {none} do not apply",
            f"blocks looked at: {layers}",
            *(f"kind: {kind}" for kind in self.kinds),
            "",
            f"{'stream':8} {'what':52} {'points':>6} {'error':>8}  result",
        ]
        lines += [f"{s:8} {what:52} {n:6} {worst:>8}  {remark}" for s, what, n, worst, remark in self.table()]
        return "\n".join(lines)


def describe_kinds(model: HookedMM) -> tuple[str, ...]:
    """What kind of model this is, in the sentences that reasons refer to."""
    structure = model.structure
    kinds = []
    if structure.cross_attention:
        kinds.append("cross-attention: text attends to image features, which have no positions in the text")
    if structure.encoder:
        kinds.append("encoder-decoder: image positions are in the text encoder")
    if structure.final_norm is None:
        kinds.append("no final norm: blocks normalise after the sum")
    if structure.projector_each or (structure.projector_out and structure.projector is None):
        kinds.append("the projector runs image by image: there is no one value that goes into it")
    if structure.vision is None and structure.projector:
        kinds.append("no tower: image tokens are made of pixels by the projector alone")
    if structure.vision is None and hasattr(model.hf_model.config, "vq_config"):
        kinds.append("pictures as words: a model of its own turns them into tokens of the vocabulary")
    if structure.vision and structure.vision.packed:
        kinds.append("packed tower: the patches of all images are one sequence")
    if structure.vision and structure.vision.blocks[0].map:
        kinds.append("hierarchical tower: the stream is a map that changes size and width between stages")
    if structure.vision and not reads_tower_end(model.hf_model.config, structure.vision.n_layers):
        kinds.append("early exit: the projector reads an earlier block of the tower than its last")
    if (streams := structure.text.streams) > 1:
        kinds.append(f"several streams: {streams} run side by side, and parts see a mix of them")
    if any(block.inserted for block in structure.text.blocks):
        kinds.append("deepstack: image features are added behind early blocks, too")
    if others := further_stacks(model.hf_model, structure):
        kinds.append(f"further stacks: blocks without hook points in {', '.join(others)}")
    return tuple(kinds)


def further_stacks(hf_model: nn.Module, structure: Structure) -> list[str]:
    """Paths of lists of blocks with attention that no hook point lies in: second towers, resamplers, audio."""
    ours = {id(hf_model.get_submodule(block.path)) for stack in structure.stacks.values() for block in stack.blocks}

    def attends(block: nn.Module) -> bool:
        return not {"attn", "xattn"}.isdisjoint(named_parts(block))

    return [
        path
        for path, blocks in block_lists(hf_model).items()
        if any(map(attends, blocks)) and not any(id(module) in ours for block in blocks for module in block.modules())
    ]


def check_conformance(model: HookedMM, batch: Batch, *, full: bool = False, copies: int = 1) -> ConformanceReport:
    """Check a model on a batch with at least one image in every sample.

    Args:
        model: The model.
        batch: From `prepare` or raw tensors.
        full: Every block, instead of the first and last of each kind.
        copies: How many times the batch is one and the same sample; every pass of writes then tests as many points.
            1 for samples that differ.
    """
    probe = Passes(model, batch, full=full, copies=copies)
    checks = tuple(probe.run())
    name = f"{type(model.hf_model).__name__} ({model.cfg.family})"
    return ConformanceReport(name, checks, probe.layers, describe_kinds(model))
