"""The list of hook points, as data: what each is called, on which side of which module it lies, what it means.

Rows (`hook_rows`) become points here. A point whose part a model lacks is absent from its list.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

from torch import nn

from hooked_mm.access import (
    Access,
    AddedValue,
    Detached,
    FieldValue,
    HeadResult,
    ModuleValue,
    NormValue,
    RescaleValue,
    ScaledValue,
)
from hooked_mm.hook_rows import BLOCK_ROWS, FUSED_PAIRS, Row, as_run, norm_rows
from hooked_mm.norms import NormFormula, find_norm_formula
from hooked_mm.sources import source_of
from hooked_mm.structure import Block, Stack, Structure, scale_factor
from hooked_mm.views import (
    PLAIN,
    ByHead,
    Fused,
    GatedHeads,
    Half,
    Heads,
    Map,
    OnGrid,
    Plain,
    Streams,
    Swapped,
    Tiles,
    View,
)

Stream = Literal["text", "encoder", "vision", "projector"]
TAP_SIDES: dict[str, str] = {"hook_rot_q": "q", "hook_rot_k": "k", "hook_pattern": "pattern"}
# transformers 5.0 and 5.1 record hidden states, which towers' features are taken from, before hooks see them: there
# only what is written into the tensor itself reaches the record.
_RECORDED_INSIDE = find_spec("transformers.utils.output_capturing") is None


@dataclass(frozen=True)
class HookPoint:
    """One place in one model where a value can be read and written.

    Attributes:
        name: As users type it.
        stream: Which sequence its positions belong to.
        layer: The block's index, None outside blocks.
        meaning: What it is, with its shape.
        access: How it is reached.
        needs: Points that must be read before it in the same pass.
        needs_image: It is not reached when a batch has no image.
        once: In a generation it is reached in the first pass only.
        costly: Left out unless asked for by name: it makes blocks compute what they would not.
        tap: The attention module and the value of it that must be tapped, or None.
        form: What stands behind batch and position: a vector, a vector per head; or a pattern (b, heads, q, k).
    """

    name: str
    stream: Stream
    layer: int | None
    meaning: str
    access: Access = field(default=Detached(), repr=False)
    needs: tuple[str, ...] = ()
    needs_image: bool = False
    once: bool = False
    costly: bool = False
    tap: tuple[str, str] | None = None
    form: Literal["vector", "heads", "pattern"] = "vector"

    @property
    def module(self) -> str:
        """Path of the module in the transformers model at which the value lies."""
        return self.access.module


class _Builder:
    """Turns rows into points for one model."""

    def __init__(self, model: nn.Module, structure: Structure) -> None:
        self.model, self.structure = model, structure
        self._formulas: dict[str, NormFormula | None] = {}

    def norm_value(self, path: str, quantity: Any, view: View = PLAIN) -> NormValue | None:
        """A norm's divisor or quotient, None if no formula explains it; each norm is run once to find out."""
        if path not in self._formulas:
            self._formulas[path] = find_norm_formula(self.model.get_submodule(path))
        formula = self._formulas[path]
        if formula is None:
            return None
        return NormValue(path, quantity, formula, partial(self.model.get_submodule, path), view)

    def _path(self, block: Block, role: str) -> str | None:
        if role == "block":
            return block.path
        if role == "mid":
            return None if block.mid is None else f"{block.path}.{block.mid}"
        if role == "mid_norm":
            role = "lnx" if "lnx" in block.parts else "ln1"
        inside = block.parts.get(role)
        return None if inside is None else f"{block.path}.{inside}"

    def _added(self, block: Block, prefix: str, row: Row, view: View) -> tuple[Access, tuple[str, ...]]:
        """What is added to the stream: the module's output, or what a norm, factor or mask makes of it."""
        role = row.part
        behind = self._path(block, block.behind(role))
        assert behind is not None
        joined = role == "attn" and block.windows
        if role not in block.scales and role != block.row_mask and not joined:
            return ModuleValue(behind, "output", view), ()
        # In a block without a middle everything ends in what leaves it, so only the last part can be written there.
        last = role == "mlp" or block.mid is None
        where = (block.path, "output", view) if last else (self._mid(block), "input", view, True)
        total = ModuleValue(*where)
        before = f"{prefix}hook_resid_mid" if role == "mlp" and block.mid else f"{prefix}hook_resid_pre"
        if role == block.row_mask or joined:
            return AddedValue(before, total), (before,)
        if role in block.scales:
            factor = partial(scale_factor, self.model.get_submodule(block.path), block.scales[role])
            return ScaledValue(behind, factor, before, total), (before,)
        raise AssertionError(f"{role} of {block.kind} has neither factor nor mask")

    def _mid(self, block: Block) -> str:
        path = self._path(block, "mid")
        assert path is not None
        return path

    def _access(self, block: Block, prefix: str, row: Row, text: bool) -> tuple[Access, tuple[str, ...]] | None:
        path = self._path(block, row.part)
        if row.kind == "tap":
            return self._tap(block, row)
        if row.part in ("q", "k", "v") and path is None and (fused := self._path(block, "qkv")):
            view = Fused("qkv".index(row.part), block.n_heads, block.n_kv_heads, block.fused_by_head)
            return ModuleValue(fused, "output", view if text else OnGrid(view)), ()
        for pair, order in FUSED_PAIRS.items():
            if row.part in order and path is None and (fused := self._path(block, pair)):
                return ModuleValue(fused, "output", Half(order.index(row.part))), ()
        if "o_norm" in block.parts and row.part == "o":
            # Heads are heads before the norm; behind it no head has a result of its own.
            path = None if row.kind == "result" else self._path(block, "o_norm")
        if path is None:
            return None
        flat = row.part in ("ln2", "mid", "mlp", "mlp_gate", "mlp_down")
        plain: View = Plain(positions=flat) if text else OnGrid(PLAIN)
        if block.map and (row.part in ("block", "conv1", "conv2")):
            plain = Map()
        if row.kind == "rescale":
            return self._rescale(block)
        if row.kind == "added":
            return self._added(block, prefix, row, plain)
        if row.kind in ("heads", "kv_heads"):
            heads = block.n_heads if row.kind == "heads" else block.n_kv_heads
            each: View = GatedHeads(heads) if row.part == "q" and block.gated_q else Heads(heads)
            return ModuleValue(path, row.side, each if text else OnGrid(each)), ()
        if row.kind == "result":
            return HeadResult(path, block.n_heads, partial(self.model.get_submodule, path)), ()
        if row.kind in ("scale", "normalized"):
            value = self.norm_value(path, row.kind, plain)
            return None if value is None else (value, ())
        if row.kind == "in_place":
            return ModuleValue(path, row.side, Map() if block.map else plain, in_place=True), ()
        recorded = _RECORDED_INSIDE and not text and row.name == "hook_resid_post"
        return ModuleValue(path, row.side, plain, in_place=recorded), ()

    def _rescale(self, block: Block) -> tuple[Access, tuple[str, ...]] | None:
        if not block.rescaled:
            return None
        factor = partial(scale_factor, self.model.get_submodule(block.path), (block.rescaled, "identity"))
        return RescaleValue(block.path, factor), ()

    def _tap(self, block: Block, row: Row) -> tuple[Access, tuple[str, ...]] | None:
        attention = self._path(block, row.part)
        name = row.name.split(".")[-1]
        if attention is None or not block.patterns:
            return None
        if name != "hook_pattern" and (not block.rotary or block.own_softmax):
            return None
        tap = TAP_SIDES[name]
        view: View = ByHead(block.n_heads) if tap == "pattern" else Swapped()
        return ModuleValue(f"taps:{attention}:{tap}", "output", view), ()

    def block(self, prefix: str, stream: Stream, layer: int, block: Block) -> Iterator[HookPoint]:
        first = f"{prefix}blocks.{layer}."
        once = stream != "text"
        for row in as_run(BLOCK_ROWS[block.wiring], self._projection_order(block)):
            made = self._access(block, first, row, stream != "vision")
            if made is None:
                continue
            access, needs = made
            name = row.name.split(".")[-1]
            yield HookPoint(
                name=first + row.name,
                stream=stream,
                layer=layer,
                meaning=row.meaning,
                access=access,
                needs=needs,
                needs_image=stream == "vision"
                or block.cross_only
                or (row.name.startswith("xattn") and self.structure.cross_attention),
                # Keys and values of cross-attention are those of the image or encoder, projected once.
                once=once or row.part in ("xk", "xv"),
                costly=name in ("hook_pattern", "hook_result"),
                tap=(f"{block.path}.{block.parts[row.part]}", TAP_SIDES[name]) if row.kind == "tap" else None,
                form=_form(row),
            )

    def _projection_order(self, block: Block) -> dict[str, int]:
        """Role -> when attention calls queries, keys and values, by its source: not always in this order."""
        found: dict[str, int] = {}
        for roles in (("q", "k", "v"), ("xq", "xk", "xv")):
            if not set(roles) <= set(block.parts):
                continue
            owner = block.parts[roles[0]].rpartition(".")[0]
            source = source_of(type(self.model.get_submodule(f"{block.path}.{owner}")).forward)
            called = {role: source.find(f"self.{block.parts[role].rpartition('.')[2]}(") for role in roles}
            found |= called if min(called.values()) >= 0 else {}
        return found

    def stack(self, prefix: str, stream: Stream, stack: Stack, after: str | None) -> Iterator[HookPoint]:
        once = stream != "text"
        enter = "embeddings with image features merged in" if stream != "vision" else "what enters tower block 0"
        embed: View = Map() if stack.blocks[0].map else OnGrid(PLAIN) if stream == "vision" else PLAIN
        if stack.streams > 1:
            embed = Streams(stack.streams)
        first = ModuleValue(stack.blocks[0].path, "input", embed)
        needs_image = stream == "vision"
        if stack.embed_norm:
            yield from self.norm_points(f"{prefix}ln_embed", stack.embed_norm, stream, "the embedding's norm")
        yield HookPoint(f"{prefix}hook_embed", stream, None, f"{enter} (b, p, d)", first, (), needs_image, once)
        for layer, block in enumerate(stack.blocks):
            yield from self.block(prefix, stream, layer, block)
            following = stack.blocks[layer + 1].path if layer + 1 < len(stack.blocks) else after
            if block.inserted and following:
                post = f"{prefix}blocks.{layer}.hook_resid_post"
                access = AddedValue(post, ModuleValue(following, "input"))
                name, meaning = f"{prefix}blocks.{layer}.hook_insert_out", "what is added behind the block (b, p, d)"
                yield HookPoint(name, stream, layer, meaning, access, (post,), True, once)

        if stack.final_norm:
            yield from self.norm_points(f"{prefix}ln_final", stack.final_norm, stream, "final norm")

    def norm_points(self, name: str, path: str, stream: Stream, what: str) -> Iterator[HookPoint]:
        """The points of a norm outside blocks."""
        for row in norm_rows(name, "", what):
            derived = row.kind in ("scale", "normalized")
            access = self.norm_value(path, row.kind) if derived else ModuleValue(path, "output")
            if access is not None:
                once, needs_image = stream != "text", stream == "vision"
                yield HookPoint(row.name, stream, None, row.meaning, access, (), needs_image, once)

    def projector(self) -> Iterator[HookPoint]:
        """What goes into the projector, unless that runs image by image, and the image tokens."""
        structure, path = self.structure, self.structure.projector
        maps = structure.vision is not None and structure.vision.blocks[-1].map
        plain: View = Tiles() if structure.cross_attention else OnGrid(PLAIN)
        view = Map() if maps or (path and self._takes_a_map(path)) else plain
        meanings = ("tower features that are projected (n, p, d)", "image tokens (n, p, d_model)")
        leaving: Access | None = None
        yield from self._connector(before=True)
        if path:
            entering = ModuleValue(path, "input", view)
            yield HookPoint("projector.hook_in", "projector", None, meanings[0], entering, (), True, True)
            leaving = ModuleValue(path, "output", plain)
        yield from self._connector(before=False)
        if structure.projector_out:
            last, name = structure.projector_out
            leaving = FieldValue(last, name) if name else ModuleValue(last, "output")
        if leaving is not None:
            yield HookPoint("projector.hook_out", "projector", None, meanings[1], leaving, (), True, True)

    def _connector(self, *, before: bool) -> Iterator[HookPoint]:
        """The patterns of the attention between tower and text, in front of or behind what enters the projector."""
        for number, own in enumerate(self.structure.connector):
            if own.before == before:
                yield HookPoint(
                    f"projector.attn.{number}.hook_pattern",
                    "projector",
                    None,
                    "pattern of a resampler or pooling (rows, heads, q, k)",
                    ModuleValue(f"taps:{own.path}:pattern", "output"),
                    (),
                    needs_image=True,
                    once=True,
                    costly=True,
                    tap=(own.path, "pattern"),
                    form="pattern",
                )

    def _takes_a_map(self, path: str) -> bool:
        """Whether a projector begins with a convolution, which takes (n, d, rows, cols)."""
        modules = self.model.get_submodule(path).modules()
        return isinstance(next((m for m in modules if any(True for _ in m.parameters(False))), None), nn.Conv2d)

    def points(self) -> Iterator[HookPoint]:
        structure = self.structure
        if structure.vision:
            yield from self.stack("vision.", "vision", structure.vision, None)
        yield from self.projector()
        if structure.encoder:
            yield from self.stack("encoder.", "encoder", structure.encoder, None)
        yield from self.stack("", "text", structure.text, structure.final_norm)
        if structure.final_norm:
            yield from self.norm_points("ln_final", structure.final_norm, "text", "final norm")
        logits = FieldValue(structure.head, "logits")
        yield HookPoint("hook_logits", "text", None, "logits, after scale and soft-cap (b, p, vocab)", logits)


def _form(row: Row) -> Literal["vector", "heads", "pattern"]:
    if row.name.endswith("hook_pattern"):
        return "pattern"
    return "heads" if row.kind in ("heads", "kv_heads", "result", "tap") else "vector"


def list_hook_points(model: nn.Module, structure: Structure) -> dict[str, HookPoint]:
    """Every hook point of a model by name, in execution order."""
    return {point.name: point for point in _Builder(model, structure).points()}
