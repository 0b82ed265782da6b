"""Proof, at load, that every hook point of a model means what its name says.

On one batch with a real image: the equations of the blocks (`equations`), the logits from the last stream, image
features at image positions and nowhere else, attention that re-weights, and for every point that a write changes what
follows while reading changes nothing. The fast form does this for the first and last block of each kind, the full form
for every block. What fails is named; a point that fails can be refused or marked as unavailable.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hooked_mm.batch import Batch
from hooked_mm.equations import BlockEquations, Check, compare, tolerance
from hooked_mm.hook_points import HookPoint
from hooked_mm.norms import norm_scale
from hooked_mm.runner import Hook
from hooked_mm.structure import Stack, Structure

if TYPE_CHECKING:
    from hooked_mm.hooked import HookedMM

PREFIXES = {"text": "", "encoder": "encoder.", "vision": "vision."}


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


def tested_layers(stack: Stack, *, full: bool) -> tuple[int, ...]:
    """All blocks, or the first and the last of each kind."""
    if full:
        return tuple(range(len(stack.blocks)))
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for layer, block in enumerate(stack.blocks):
        kinds.setdefault((block.kind, block.inserted, block.d_model, tuple(block.scales)), []).append(layer)
    return tuple(sorted({layer for layers in kinds.values() for layer in (layers[0], layers[-1])}))


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
    if structure.vision and structure.vision.packed:
        kinds.append("packed tower: the patches of all images are one sequence")
    if structure.vision and structure.vision.blocks[0].map:
        kinds.append("hierarchical tower: the stream is a map that changes size and width between stages")
    if any(block.inserted for block in structure.text.blocks):
        kinds.append("deepstack: image features are added behind early blocks, too")
    return tuple(kinds)


class _Probe:
    """The passes of one conformance check."""

    def __init__(self, model: HookedMM, batch: Batch, *, full: bool, copies: int) -> None:
        self.model, self.batch, self.full = model, batch, full
        self.runner, self.structure = model._runner, model.structure
        self.points = model.hook_points
        self.layers = {name: tested_layers(stack, full=full) for name, stack in self.structure.stacks.items()}
        self.copies = copies
        self.dead: set[str] = set()

    def names(self) -> list[str]:
        """Every point of the tested blocks, and those outside blocks, that is reached."""
        return [
            name
            for name, point in self.points.items()
            if name not in self.dead and (point.layer is None or point.layer in self.layers.get(point.stream, ()))
        ]

    def reached(self) -> Iterator[Check]:
        """Every listed point fires: an attention that does not ask transformers for its function has no pattern."""
        try:
            self.read(self.names())
            return
        except Exception:
            names = self.names()
        for name in names:
            try:
                self.read([name])
            except Exception:
                self.dead.add(name)
                yield Check("the point is reached", name, "fails", None, "no value passes there in a forward pass")

    def keep(self, stream: str) -> Tensor | None:
        """Positions of a stream that are not padding."""
        if stream == "vision" or (stream == "text" and self.structure.encoder):
            return None
        return self.batch.inputs["attention_mask"].bool()

    def read(self, names: Iterable[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits and values of one pass."""
        logits, values = self.runner.forward(self.batch, list(names), save=True)
        assert logits is not None
        return logits, values

    def run(self) -> Iterator[Check]:
        """Every check."""
        with torch.no_grad():
            bare = self.model.hf_model(**self.batch.inputs).logits
            yield from self.reached()
            plain, _ = self.read([name for name in self.names() if not self.points[name].costly])
            same = torch.equal(plain, bare)
            yield Check("reading changes no logit, bit for bit", "hook_logits", "holds" if same else "fails")
            between = [
                f"{PREFIXES[s]}blocks.{layer + 1}.hook_resid_pre" for s in self.layers for layer in self.layers[s]
            ]
            names = [*self.names(), *(name for name in between if name in self.points)]
            logits, values = self.read(names)
            what = "reading patterns changes the logits by rounding only"
            yield compare(what, "hook_logits", logits, bare, self.keep("text"))
            sections = [self.blocks(stream, stack, values) for stream, stack in self.structure.stacks.items()]
            sections += [self.logits(values), self.images(values), self.crossed(values), self.writes(values)]
            for section in sections:
                try:
                    yield from section
                except KeyError as missing:
                    # What follows from a value that is never reached can't be checked; that it is not, was said above.
                    if missing.args[0] not in self.dead:
                        raise

    def blocks(self, stream: str, stack: Stack, values: Mapping[str, Tensor]) -> Iterator[Check]:
        """The equations of each tested block, and how blocks join."""
        keep = self.keep(stream)
        for layer in self.layers[stream]:
            block, prefix = stack.blocks[layer], f"{PREFIXES[stream]}blocks.{layer}."
            yield from BlockEquations(values, self.model.hf_model, block, prefix, keep).all()
            following = values.get(f"{PREFIXES[stream]}blocks.{layer + 1}.hook_resid_pre")
            post = values[f"{prefix}hook_resid_post"]
            if following is None:
                continue
            if following.shape != post.shape:
                kind = "hierarchical tower: a convolution changes size and width between stages"
                yield Check("resid_post == next resid_pre", f"{prefix}hook_resid_post", "not applicable", None, kind)
                continue
            inserted = values.get(f"{prefix}hook_insert_out")
            total = post if inserted is None else post + inserted
            what = "resid_post (+ what is inserted) == next resid_pre"
            yield compare(what, f"{PREFIXES[stream]}blocks.{layer + 1}.hook_resid_pre", following, total, keep)
            if inserted is not None and stream == "text":
                outside = self.batch.mask("text")
                zero = inserted[outside]
                yield compare("nothing is inserted at text positions", f"{prefix}hook_insert_out", zero, 0 * zero)
        first = values[f"{PREFIXES[stream]}blocks.0.hook_resid_pre"]
        yield compare(
            "hook_embed == first resid_pre",
            f"{PREFIXES[stream]}hook_embed",
            values[f"{PREFIXES[stream]}hook_embed"],
            first,
        )

    def logits(self, values: Mapping[str, Tensor]) -> Iterator[Check]:
        """unembed(norm(last stream)) == logits, scale and soft-cap included."""
        last = f"blocks.{len(self.structure.text.blocks) - 1}.hook_resid_post"
        keep = self.keep("text")
        stream = values[last]
        inserted = values.get(last.replace("resid_post", "insert_out"))
        stream = stream if inserted is None else stream + inserted
        lens = self.model.to_logits(stream)
        yield compare("unembed(norm(last resid_post)) == logits", "hook_logits", values["hook_logits"], lens, keep)
        if self.structure.final_norm is None:
            kind = "blocks normalise after the sum, so there is no final norm"
            yield Check("the final norm's output", "ln_final.hook_out", "not applicable", None, kind)
            return
        norm = self.model.hf_model.get_submodule(self.structure.final_norm)
        out = values["ln_final.hook_out"]
        yield compare("the final norm's output", "ln_final.hook_out", out, norm(stream), keep)
        if (quotient := values.get("ln_final.hook_normalized")) is not None:
            access: Any = self.points["ln_final.hook_normalized"].access
            expected = access.formula.output(norm, quotient)
            yield compare("quotient * gain", "ln_final.hook_normalized", out, expected, keep)
            scale = values["ln_final.hook_scale"]
            yield compare(
                "the stream's divisor", "ln_final.hook_scale", scale, norm_scale(stream, access.formula), keep
            )

    def crossed(self, values: Mapping[str, Tensor]) -> Iterator[Check]:
        """Keys of cross-attention are projected from the image's features, or from the encoder's last stream."""
        encoder = self.structure.encoder
        source = "projector.hook_out"
        if encoder:
            source = f"encoder.blocks.{len(encoder.blocks) - 1}.hook_resid_post"
        for layer in self.layers["text"]:
            block, name = self.structure.text.blocks[layer], f"blocks.{layer}.xattn.hook_k"
            if name in values:
                project = self.model.hf_model.get_submodule(f"{block.path}.{block.parts['xk']}")
                expected = project(values[source]).reshape(values[name].shape)
                yield compare("keys of cross-attention are of the image or encoder", source, values[name], expected)

    @property
    def embedded(self) -> str:
        """The point that holds image features."""
        return "encoder.hook_embed" if self.structure.encoder else "hook_embed"

    def images(self, values: Mapping[str, Tensor]) -> Iterator[Check]:
        """Image features are where positions are called image; another picture changes those and nothing else."""
        embed, out = values[self.embedded], values["projector.hook_out"]
        image = self.batch.mask("image")
        pixels = self.batch.inputs["pixel_values"]
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(pixels.shape, generator=generator).to(pixels)
        # Padding crops and tiles are all zero and stay so: models tell them by that.
        noise = noise * (pixels.flatten(-3).abs().amax(-1) > 0)[..., None, None, None] if pixels.ndim > 3 else noise
        inputs = {**self.batch.inputs, "pixel_values": pixels + noise}
        watched = [name for name in (self.embedded, "projector.hook_out", *self.embed_norm) if name in self.points]
        logits, other = self.runner.forward(self.batch.with_inputs(inputs), watched, save=True)
        assert logits is not None
        changed = (other[self.embedded] != embed).any(dim=-1)
        moved = bool((logits != values["hook_logits"]).any())
        yield Check("another picture changes the logits", self.embedded, "holds" if moved else "fails")
        if self.structure.cross_attention:
            kind = "cross-attention: image features have no positions in the text"
            verdict: Any = "fails" if bool(changed.any()) else "holds"
            yield Check("another picture changes no text embedding", self.embedded, verdict)
            yield Check("image features stand at image positions", self.embedded, "not applicable", None, kind)
            return
        outside = int((changed & ~image).sum())
        where = f"{outside} positions outside change"
        verdict = "holds" if outside == 0 else "fails"
        yield Check(
            "another picture changes image positions only", self.embedded, verdict, None, where if outside else ""
        )
        slots = image & ~self.batch.separator
        still = int((slots & ~changed).sum())
        verdict = "holds" if still == 0 and bool(slots.any()) else "fails"
        yield Check(
            "another picture changes every image position",
            self.embedded,
            verdict,
            None,
            f"{still} stay" if still else "",
        )
        slots = slots & ~self.shrunk()
        direct = self._features(embed[slots], out.flatten(0, -2))
        yield direct if direct.verdict == "holds" else self._shifted(direct, values, other, slots)

    def shrunk(self) -> Tensor:
        """Positions of grids that the model made smaller than the projector's: means of several of its outputs."""
        found = torch.zeros_like(self.batch.separator)
        for sample, image in zip(self.batch.image_sample, self.batch.layout.images, strict=True):
            if image.grid is not None and image.tokens is not None and image.grid.shape != image.tokens.shape[:2]:
                found[sample, image.grid[image.grid >= 0]] = True
        return found

    @property
    def embed_norm(self) -> tuple[str, str]:
        """The points of a norm behind the embedding, where there is one."""
        prefix = "encoder." if self.structure.encoder else ""
        return f"{prefix}ln_embed.hook_scale", f"{prefix}ln_embed.hook_normalized"

    def _shifted(
        self, direct: Check, values: Mapping[str, Tensor], other: Mapping[str, Tensor], slots: Tensor
    ) -> Check:
        """Where positions are added to features (and a norm follows), another picture moves both by the same."""

        def merged(found: Mapping[str, Tensor]) -> Tensor:
            scale, quotient = (found.get(name) for name in self.embed_norm)
            return found[self.embedded] if scale is None or quotient is None else quotient * scale

        moved = (merged(other) - merged(values))[slots]
        features = (other["projector.hook_out"] - values["projector.hook_out"]).flatten(0, -2)
        if len(features) != len(moved):
            return direct
        if self.embed_norm[0] in self.points:
            features = features - features.mean(dim=-1, keepdim=True)
        found = compare(direct.what, direct.point, moved, features)
        return replace(found, detail="up to learned positions, which are added") if found.verdict == "holds" else direct

    def _features(self, slots: Tensor, features: Tensor) -> Check:
        """Each image position holds one of the projector's outputs, in order up to whole crops that are rearranged."""
        what = "image features stand at image positions"
        size = features.abs().max().item()
        if len(slots) == len(features):
            direct = compare(what, "projector.hook_out", slots, features)
            if direct.verdict == "holds":
                return direct
            ratio = (slots.float() * features.float()).sum() / features.float().square().sum()
            scaled = compare(what, "projector.hook_out", slots, features * ratio.to(features.dtype))
            if scaled.verdict == "holds":
                return Check(what, "projector.hook_out", "holds", scaled.error, f"times {ratio.item():.4g}")
        nearest = torch.cdist(slots.float(), features.float()).min(dim=1)
        error = (slots - features[nearest.indices]).abs().max().item() / max(size, 1e-12)
        once = len(nearest.indices.unique()) == len(slots) or self.copies > 1
        good = error <= tolerance(slots.dtype) and once
        detail = (
            "crops are rearranged into one picture" if good else "some image positions hold no output of the projector"
        )
        return Check(what, "projector.hook_out", "holds" if good else "fails", error, detail)

    def writes(self, values: Mapping[str, Tensor]) -> Iterator[Check]:
        """Zeroing each point changes what follows it; rows of other samples stay as they are."""
        names = self.names()
        for start in range(0, len(names), self.copies):
            yield from self._write(names[start : start + self.copies], values)

    def _write(self, names: list[str], values: Mapping[str, Tensor]) -> Iterator[Check]:
        follows = {name: self.follower(name) for name in names}
        hooks = [(name, partial(_spoil, row=row, rows=self.copies)) for row, name in enumerate(names)]
        watched = sorted({point for point in follows.values() if point is not None})
        _, after = self.runner.forward(self.batch, watched, hooks, save=True)
        parts = [
            None if point is None else tuple(_part(found[point], row, self.copies) for found in (values, after))
            for row, point in enumerate(follows.values())
        ]
        if any(part is not None and _close(*part) for part in parts):
            # So small a change may be rounding, of eager attention or of a sum over heads: compare with a pass that
            # writes at the same points and changes nothing.
            _, values = self.runner.forward(self.batch, watched, [(name, _keep) for name in names], save=True)
        for row, name in enumerate(names):
            point = follows[name]
            if point is None:
                kind = "the projector reads an earlier block of the tower; nothing follows"
                yield Check("a write changes what follows", name, "not applicable", None, kind)
                continue
            before, now = (_part(value, row, self.copies) for value in (values[point], after[point]))
            changed = not torch.equal(before, now)
            yield Check(
                "a write changes what follows", name, "holds" if changed else "fails", None, f"looked at {point}"
            )

    def follower(self, name: str) -> str | None:
        """The point at which a write must be seen."""
        point = self.points[name]
        names = self.names()
        if point.layer is not None:
            own = f"{PREFIXES[point.stream]}blocks.{point.layer}.hook_resid_post"
            if name not in (own, own.replace("resid_post", "insert_out")):
                return own
        stream = point.stream
        if stream == "vision":
            if name == "vision.hook_embed":
                return "vision.blocks.0.hook_resid_post"
            following = f"vision.blocks.{(point.layer or 0) + 1}.hook_resid_pre"
            if following in self.points:
                return following if following in names else "projector.hook_in"
            return "projector.hook_in" if self.tower_end() else None
        if name == "projector.hook_in":
            return "projector.hook_out"
        if name == "projector.hook_out" and not self.structure.cross_attention:
            return self.embedded
        return "blocks.0.hook_resid_post" if name == "hook_embed" else "hook_logits"

    def tower_end(self) -> bool:
        """Whether the projector reads the tower's last block."""
        layer = getattr(self.model.hf_model.config, "vision_feature_layer", None)
        chosen = layer if isinstance(layer, list | tuple) else [-1 if layer is None else layer]
        return any(index in (-1, len(self.structure.stacks["vision"].blocks)) for index in chosen)


def _slices(value: Tensor, row: int, rows: int) -> tuple[Any, ...]:
    """Where one of `rows` equal samples lies in a value."""
    if rows == 1:
        return (slice(None),)
    if value.shape[0] % rows == 0:
        size = value.shape[0] // rows
        return (slice(row * size, (row + 1) * size),)
    # A packed tower's queries and patterns have a batch of one, with all patches behind it.
    axis = 1 if value.ndim == 4 and value.shape[1] % rows == 0 and value.shape[2] != value.shape[3] else 2
    size = value.shape[axis] // rows
    part = slice(row * size, (row + 1) * size)
    return (slice(None), part) if axis == 1 else (slice(None), slice(None), part, part)


def _keep(value: Tensor, hook: Hook) -> Tensor:
    """Write what was read: what a write makes a model compute differently, it computes so here."""
    return value.clone()


def _close(before: Tensor, now: Tensor) -> bool:
    """Whether rounding could explain the difference."""
    return bool((before - now).abs().max() <= tolerance(before.dtype) * before.abs().max())


def _part(value: Tensor, row: int, rows: int) -> Tensor:
    return value[_slices(value, row, rows)]


def _spoil(value: Tensor, hook: Hook, *, row: int, rows: int) -> Tensor:
    """Zero one sample's part; a norm's divisor is doubled instead."""
    new = value.clone()
    where = _slices(value, row, rows)
    new[where] = 2 * new[where] if hook.name.endswith("hook_scale") else torch.zeros_like(new[where])
    return new


def check_conformance(model: HookedMM, batch: Batch, *, full: bool = False, copies: int = 1) -> ConformanceReport:
    """Check a model on a batch with at least one image in every sample.

    Args:
        model: The model.
        batch: From `prepare` or raw tensors.
        full: Every block, instead of the first and last of each kind.
        copies: How many times the batch is one and the same sample; every pass of writes then tests as many points.
            1 for samples that differ.
    """
    probe = _Probe(model, batch, full=full, copies=copies)
    checks = tuple(probe.run())
    name = f"{type(model.hf_model).__name__} ({model.cfg.family})"
    return ConformanceReport(name, checks, probe.layers, describe_kinds(model))


def probe_batch(model: HookedMM) -> tuple[Batch, int]:
    """A batch made for the check, and how many times it holds the same sample: a picture of noise and a few words."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    picture, text = Image.fromarray(pixels).resize((96, 96)), "What is in this picture?"
    # A decoder of its own has one position until it is given an answer: nothing to attend to.
    answer = text if model.structure.encoder else None
    one = model.prepare([picture], [text], [answer])
    # Per-head results of the blocks looked at are the largest of what is kept.
    tested = sum(len(tested_layers(stack, full=False)) for stack in model.structure.stacks.values())
    size = one.input_ids.shape[1] * model.cfg.n_heads * model.cfg.d_model * model.dtype.itemsize * tested
    copies = int(min(8, max(1, 2**28 // size)))
    return (model.prepare([picture] * copies, [text] * copies, [answer] * copies), copies) if copies > 1 else (one, 1)
