"""What is known of a model's build: its stacks of blocks, what each block is made of, projector, norms, embeddings.

`resolve` finds all this in a transformers model; everything else only reads it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hooked_mm.errors import BadInputError
from hooked_mm.weights import weight_of

Wiring = Literal["pre", "post", "parallel", "after", "single", "streams", "gated", "opaque"]
"""How a block's parts and its stream x are joined:

- `pre`: x + attn(ln1 x), then + mlp(ln2 x).
- `post`: ln1(x + attn x), then ln2(x + mlp x) (BERT, BART).
- `parallel`: x + attn(ln1 x) + mlp(ln1 x); there is no stream in the middle.
- `after`: x + norm(attn x), then + norm(mlp x): only what is added is normalised.
- `single`: x + part(ln1 x), the part being attention, a mixer or an MLP.
- `streams`: several streams run side by side; each part sees a mix of them, and what it gives is spread over them.
- `gated`: gate(x, attn(ln1 x)), then gate(x, mlp(ln2 x)): the stream itself is weighed, too (Muse Spark).
- `opaque`: in no such way that is known; only what enters and leaves the block and its inner parts can be read.
"""


@dataclass(frozen=True)
class StackConfig:
    """Sizes of a stack of blocks; where blocks differ in width, those of the last."""

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int


@dataclass(frozen=True)
class HookedConfig(StackConfig):
    """Sizes of the language model, and of the tower in `vision`."""

    d_vocab: int
    family: str
    vision: StackConfig | None


@dataclass(frozen=True)
class Block:
    """One block of a stack.

    Attributes:
        path: Of the block in the transformers model.
        parts: Role (see PART_NAMES) -> path inside the block.
        kind: Its class, with what distinguishes blocks of one class; blocks of one kind behave alike.
        wiring: See `Wiring`.
        scales: `"attn"`, `"mixer"`, `"xattn"`, `"mlp"` -> (attribute, function) that multiplies what is added.
        rotary: Queries and keys change between projection and scores (rotary embedding, query-key norm).
        row_mask: The role of a part of whose output some rows are dropped before the sum (text that sees no image), or
            nothing.
        map: The stream between blocks is a map (n, d, rows, cols).
        windows: Side of the windows that the block cuts its grid (n, rows, cols, d) into for attention; 0 for none.
        patterns: Its attention can be looked into.
        own_softmax: It computes its pattern itself, and not by transformers' attention interface.
        gated_q: The projection of each head's query holds, behind it, a gate: what the head mixes is multiplied by it.
        fused_by_head: The fused projection holds each head's query, key and value behind each other.
        inserted: The model adds something to the stream behind this block.
        rescaled: The attribute of the block that multiplies the whole stream at its end, or nothing.
    """

    path: str
    parts: MappingProxyType[str, str] = field(repr=False)
    kind: str
    wiring: Wiring
    scales: MappingProxyType[str, tuple[str, str]] = field(repr=False)
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_model: int
    d_mlp: int
    rotary: bool
    row_mask: str
    map: bool
    windows: int = 0
    patterns: bool = True
    own_softmax: bool = False
    gated_q: bool = False
    fused_by_head: bool = False
    inserted: bool = False
    rescaled: str = ""

    @property
    def mixing(self) -> str | None:
        """Path, in the transformers model, of the module that moves information between positions, if there is one."""
        found = next((self.parts[role] for role in ("attn", "mixer", "xattn") if role in self.parts), None)
        return None if found is None else f"{self.path}.{found}"

    def behind(self, role: str) -> str:
        """The role of the module whose output is what `attn`, `mixer`, `xattn` or `mlp` adds, but for a factor."""
        family = "attn" if role == "mixer" else role
        return next((r for r in (f"{family}_after", f"{family}_add") if r in self.parts), role)

    @property
    def mid(self) -> str | None:
        """Path of the module, in the block, that the stream behind attention enters first."""
        if self.wiring in ("pre", "gated"):
            return self.parts.get("conv2", self.parts.get("ln2"))
        if self.wiring == "streams":
            return self.parts["mlp_mix"]
        if self.wiring == "after":
            mlp, gate = self.parts["mlp"], self.parts.get("mlp_gate")
            return mlp if gate is None or gate.startswith(f"{mlp}.") else gate
        return None

    @property
    def cross_only(self) -> bool:
        """A block that only attends to the image; it does not run without one."""
        return "xattn" in self.parts and "attn" not in self.parts


@dataclass(frozen=True)
class Stack(StackConfig):
    """A stack of blocks with its place.

    Attributes:
        owner: Path of the module that runs the blocks.
        blocks: In execution order.
        packed: All images' patches lie in one sequence (patches, d), each image attending to itself.
        streams: How many streams run side by side, (b, p, streams, d) or (b, p, streams * d); all begin alike.
        embed_norm: Path of a norm between the embedding and the first block, or None.
        final_norm: Path of the norm behind the last block, where cross-attention reads its output; the text's own is
            the structure's.
    """

    owner: str
    blocks: tuple[Block, ...] = field(repr=False)
    embed_norm: str | None
    final_norm: str | None = None
    packed: bool = False
    streams: int = 1


@dataclass(frozen=True)
class ConnectorAttention:
    """One attention module between tower and text: a resampler's layer, or a pooling.

    Attributes:
        path: In the transformers model.
        before: It runs before what `projector.hook_in` shows.
        own_softmax: It computes its pattern itself, and not by transformers' attention interface.
    """

    path: str
    before: bool = False
    own_softmax: bool = False


PREFIXES = {"text": "", "encoder": "encoder.", "vision": "vision."}
"""Stream -> what its hook names begin with."""


@dataclass(frozen=True)
class Readout:
    """How the stream behind the last block becomes logits: paths and numbers, as in `Structure`.

    Attributes:
        final_norm: None where blocks normalise after the sum, or where there is none.
        collapse: Path of the module that makes one stream of several before the final norm.
        streams: How many these are.
        unembed: From the final norm to the vocabulary.
        logit_scale: What the unembedding's output is multiplied by.
        logit_cap: Logits become cap * tanh(logits / cap); None for no soft-cap.
        words: How many of the unembedding's outputs are words; None for all.
    """

    final_norm: str | None
    collapse: str | None
    streams: int
    unembed: str
    logit_scale: float
    logit_cap: float | None
    words: int | None


@dataclass(frozen=True)
class Structure:
    """Module paths of one model, the token that marks image positions, and how positions are counted.

    Attributes:
        family: `config.model_type`.
        text: The decoder's blocks.
        encoder: The text encoder's blocks of an encoder-decoder, which then hold the image positions.
        vision: The tower's blocks.
        projector: Path of the module from tower features to image tokens.
        projector_out: Module and field that hold the image tokens in picture order, where not the projector's output;
            no field: the module's output.
        projector_each: Path of a projector that runs once per image: a pass has no one value of it, and it no points.
        connector: The attention modules between tower and text whose pattern can be looked into, as they are called.
        final_norm: None where blocks normalise after the sum, or where there is none.
        embed: Token embedding.
        unembed: From the final norm to the vocabulary.
        head: Path of the module that calls the unembedding and returns the logits.
        logit_scale: What the unembedding's output is multiplied by.
        logit_cap: Logits become cap * tanh(logits / cap); None for no soft-cap.
        words: How many of the unembedding's outputs are words; None for all.
        image_token_id: None when the configuration names none.
        cross_attention: Image features are attended to and never stand in the text's sequence.
        plain_positions: Position ids are one number per token (not the three of Qwen-VL's rotary embedding), taken by
            the decoder as an argument, so that they can be counted from the attention mask.
        no_generation: Why its own generation can't be run with hooks, where it can't.
        collapse: Path of the module that makes one stream of several before the final norm.
        left_out: Paths of what the model was loaded without: its tower and what lies between it and the text.
    """

    family: str
    text: Stack
    encoder: Stack | None
    vision: Stack | None
    projector: str | None
    projector_out: tuple[str, str] | None
    final_norm: str | None
    embed: str
    unembed: str
    head: str
    logit_scale: float
    logit_cap: float | None
    image_token_id: int | None
    cross_attention: bool
    plain_positions: bool
    projector_each: str | None = None
    connector: tuple[ConnectorAttention, ...] = ()
    words: int | None = None
    collapse: str | None = None
    no_generation: str = ""
    left_out: tuple[str, ...] = ()

    @property
    def readout(self) -> Readout:
        """How a stream becomes logits."""
        return Readout(
            **{name: getattr(self, name) for name in Readout.__dataclass_fields__ if name != "streams"},
            streams=self.text.streams,
        )

    @property
    def absent(self) -> dict[str, str]:
        """Hook points that other models have and this one can't have, or globs of them -> why."""
        if self.left_out:
            return dict.fromkeys(("vision.*", "projector.*"), NO_TOWER)
        why = "the projector runs once per image, so a pass has no one value of it; read image positions of hook_embed"
        return dict.fromkeys(("projector.hook_in", "projector.hook_out"), why) if self.projector_each else {}

    @property
    def stacks(self) -> dict[str, Stack]:
        """Stream name -> stack, in execution order."""
        found = {"vision": self.vision, "encoder": self.encoder, "text": self.text}
        return {name: stack for name, stack in found.items() if stack is not None}

    def refuse_pictures(self, sample: int | None = None) -> None:
        """Refuse a picture given to a model without its tower.

        Raises:
            BadInputError: It says how to load the model for pictures.
        """
        if self.left_out:
            raise BadInputError(f"a picture was given, but {NO_TOWER}; load it with its tower", sample)


NO_TOWER = "the model was loaded without its tower (tower=False)"


def describe(structure: Structure, d_vocab: int) -> HookedConfig:
    """The sizes of a model."""

    def sizes(stack: Stack) -> dict[str, int]:
        return {field.name: getattr(stack, field.name) for field in fields(StackConfig)}

    vision = StackConfig(**sizes(structure.vision)) if structure.vision else None
    return HookedConfig(**sizes(structure.text), d_vocab=d_vocab, family=structure.family, vision=vision)


def vocabulary(unembed: nn.Module) -> int:
    """How many logits an unembedding gives; Idefics's has a part of its own for additional words."""
    # A packed weight has a shape of its own.
    rows = getattr(unembed, "out_features", None) or unembed.get_parameter("weight").shape[0]
    return int(rows) + int(getattr(unembed, "out_additional_features", 0))


def scale_factor(block: nn.Module, scale: tuple[str, str]) -> Tensor:
    """What multiplies a module's output before it is added: a row of SCALES, of a block."""
    attribute, function = scale
    own = weight_of(block, attribute)
    value = torch.as_tensor(getattr(block, attribute)) if own is None else own
    return torch.tanh(value) if function == "tanh" else value


def inner_linear(module: Any) -> Any:
    """The linear map that a module is, or that it wraps (to bound what goes in and comes out); else the module."""
    inside = [child for child in module.children() if hasattr(child, "in_features")]
    return inside[0] if not hasattr(module, "in_features") and len(inside) == 1 else module


def submodule(module: Any, path: str) -> Any:
    """The attribute at a dotted path, or None."""
    for name in path.split(".") if path else ():
        module = getattr(module, name, None)
        if module is None:
            return None
    return module
