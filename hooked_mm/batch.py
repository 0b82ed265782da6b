"""A padded batch that knows, for every position, its modality and its role.

A batch is what every reader of activations selects by: `batch.mask(modality="image")` instead of counting tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooked_mm.architectures import IMAGE_MASK_NAMES
from hooked_mm.batch_rows import take_inputs, take_layout, taken
from hooked_mm.errors import BadInputError, nearest
from hooked_mm.found_positions import Found
from hooked_mm.layout import Layout
from hooked_mm.layout_kinds import has_image_positions, read_layout
from hooked_mm.layout_source import Source, pictures
from hooked_mm.structure import Structure


class Modality(IntEnum):
    """What a position holds."""

    PAD = 0
    TEXT = 1
    IMAGE = 2


class Role(IntEnum):
    """What part a text position plays. Image and pad positions have role NONE; raw inputs are UNKNOWN."""

    UNKNOWN = -1
    NONE = 0
    TEMPLATE = 1
    QUESTION = 2
    ANSWER = 3


def parse_modality(value: str | Modality) -> Modality:
    """`"image"` -> Modality.IMAGE; an unknown name is refused with the known ones."""
    return _parse(Modality, value)


def parse_role(value: str | Role) -> Role:
    """`"answer"` -> Role.ANSWER; an unknown name is refused with the known ones."""
    return _parse(Role, value)


def _parse(kind: type[IntEnum], value: Any) -> Any:
    if isinstance(value, kind):
        return value
    names = [member.name.lower() for member in kind]
    if str(value).lower() not in names:
        close = nearest(str(value), names)
        raise BadInputError(f"unknown {kind.__name__.lower()} {value!r}{close}; known: {', '.join(names)}")
    return kind[str(value).upper()]


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward pass with what is known about their positions.

    Attributes:
        inputs: The model's own forward tensors (`input_ids`, `attention_mask`, `pixel_values`, ...).
        modality: (b, p) int8, values of `Modality`. IMAGE are the positions where image features stand; the marks that
            some processors write around them are text.
        role: (b, p) int8, values of `Role`.
        layout: Where the images lie in the sequence and in the tower; see `Layout` for kinds and grids.
        tokens: Per sample, the token strings of all positions; empty without a tokenizer.
        decoder: For an encoder-decoder model, the positions of the decoder (`decoder_input_ids`), with answers, as a
            batch of its own whose `inputs` are `input_ids` and `attention_mask`; the others then are the encoder's.
    """

    inputs: dict[str, Tensor]
    modality: Int[Tensor, "b p"]
    role: Int[Tensor, "b p"]
    layout: Layout
    tokens: list[list[str]]
    decoder: Batch | None = None

    def __len__(self) -> int:
        return self.modality.shape[0]

    @property
    def input_ids(self) -> Int[Tensor, "b p"]:
        """Token ids, (batch, pos), which a model that puts images in front or behind has fewer of than positions."""
        return self.inputs["input_ids" if "input_ids" in self.inputs else "decoder_input_ids"]

    @property
    def length(self) -> int:
        """Positions that the decoder computes per sample."""
        return (self if self.decoder is None else self.decoder).modality.shape[1]

    @property
    def has_images(self) -> bool:
        """Whether the vision tower will run."""
        return bool(pictures(self.inputs))

    def with_inputs(self, inputs: dict[str, Tensor]) -> Batch:
        """The same positions with other forward tensors (another picture, say)."""
        return replace(self, inputs=inputs)

    @property
    def image_sample(self) -> Int[Tensor, " images"]:
        """Which sample each image belongs to, in batch order."""
        return self.layout.image_sample

    @property
    def image_index(self) -> Int[Tensor, "b p"]:
        """Which image each position belongs to, numbered in batch order; -1 elsewhere."""
        return self.layout.image_index

    @property
    def separator(self) -> Bool[Tensor, "b p"]:
        """Image positions that hold no patch of an image (newlines)."""
        return self.layout.separator

    def to(self, device: str | torch.device) -> Batch:
        """The same batch with its tensors on another device."""
        return replace(
            self,
            inputs={name: value.to(device) for name, value in self.inputs.items()},
            modality=self.modality.to(device),
            role=self.role.to(device),
            layout=self.layout.to(device),
            decoder=None if self.decoder is None else self.decoder.to(device),
        )

    def take(self, rows: Sequence[int]) -> Batch:
        """The batch of these samples, in this order; a sample may come several times. Padding stays as it is.

        Args:
            rows: Numbers of samples, from 0 on.

        Raises:
            BadInputError: If a sample does not exist, or it can't be told which part of an input belongs to a sample.
        """
        which = taken(self.layout, rows)
        return replace(
            self,
            inputs=take_inputs(self.inputs, self.layout, which),
            modality=self.modality[which.samples],
            role=self.role[which.samples],
            layout=take_layout(self.layout, which),
            tokens=[list(self.tokens[row]) for row in which.samples.tolist()] if self.tokens else [],
            decoder=None if self.decoder is None else self.decoder.take(rows),
        )

    def mask(
        self, modality: str | Modality | None = None, role: str | Role | None = None, sample: int | None = None
    ) -> Bool[Tensor, "b p"]:
        """Positions of a modality, a role and a sample; every condition left out admits all but padding."""
        chosen = self.modality != Modality.PAD if modality is None else self.modality == parse_modality(modality)
        if role is not None:
            wanted = parse_role(role)
            if bool((self.role == Role.UNKNOWN).any()) and wanted != Role.UNKNOWN:
                raise BadInputError(
                    f"role {wanted.name.lower()!r} was asked for, but this batch was made from raw tensors, so "
                    "roles are unknown; make it with model.prepare(...)"
                )
            chosen = chosen & (self.role == wanted)
        if sample is not None:
            if not -len(self) <= sample < len(self):
                raise BadInputError(f"sample {sample} asked of a batch of {len(self)}")
            only = torch.zeros(len(self), 1, dtype=torch.bool, device=chosen.device)
            only[sample] = True
            chosen = chosen & only
        return chosen

    def last_prompt(self) -> Int[Tensor, " b"]:
        """The position per sample from which the answer's first token is predicted."""
        known = (self.modality != Modality.PAD) & (self.role != Role.ANSWER)
        positions = torch.arange(known.shape[1], device=known.device)
        return torch.where(known, positions, -1).max(dim=1).values

    def extend(self, new_tokens: Int[Tensor, "b new"], kept: Bool[Tensor, "b new"], names: list[list[str]]) -> Batch:
        """The batch with generated tokens behind its prompts, as role `answer`; tokens not `kept` become padding.

        Prompts must be padded on the left, or prompt and answer would not be adjacent. In an encoder-decoder model the
        tokens go behind the decoder's.

        Raises:
            BadInputError: If any sample of the batch is padded on the right.
        """
        if self.decoder is not None:
            longer = self.decoder.extend(new_tokens, kept, names)
            inputs = {**self.inputs, **_decoder_inputs(longer.inputs)}
            return replace(self, inputs=inputs, decoder=longer)
        padded = self.modality[:, -1] == Modality.PAD
        if bool(padded.any()):
            row = int(padded.nonzero()[0])
            raise BadInputError("is padded on the right; prepare with padding_side='left' to extend a batch", row)
        new = new_tokens.shape[1]
        longer_inputs = {name: _longer(name, value, new) for name, value in self.inputs.items()}
        mask = kept.to(self.inputs["attention_mask"].dtype)
        longer_inputs["input_ids"] = torch.cat([self.input_ids, new_tokens], dim=1)
        longer_inputs["attention_mask"] = torch.cat([self.inputs["attention_mask"], mask], dim=1)
        if "position_ids" in longer_inputs:
            longer_inputs["position_ids"] = count_positions(longer_inputs["attention_mask"])
        modality = torch.where(kept, int(Modality.TEXT), int(Modality.PAD)).to(self.modality)
        role = torch.where(kept, int(Role.ANSWER), int(Role.NONE)).to(self.role)
        return replace(
            self,
            inputs=longer_inputs,
            modality=torch.cat([self.modality, modality], dim=1),
            role=torch.cat([self.role, role], dim=1),
            layout=self.layout.pad(new),
            tokens=[old + new for old, new in zip(self.tokens, names, strict=True)],
        )


def _longer(name: str, value: Tensor, new: int) -> Tensor:
    """An input that tells something of every position, told of `new` more: they are text, and see what the last saw."""
    if name in ("token_type_ids", "mm_token_type_ids"):
        return torch.cat([value, value.new_zeros(len(value), new)], dim=1)
    if name == "cross_attention_mask":
        return torch.cat([value, value[:, -1:].expand(-1, new, *value.shape[2:])], dim=1)
    return value


def _decoder_inputs(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The decoder's tensors by the names the model's forward has for them."""
    return {f"decoder_{name}": inputs[name] for name in ("input_ids", "attention_mask")}


def count_positions(attention_mask: Int[Tensor, "b p"]) -> Int[Tensor, "b p"]:
    """Position ids that do not depend on padding: the first real token has 0.

    Left to itself a model counts padding too; rotary attention is then the same only up to rounding.
    """
    return (attention_mask.long().cumsum(dim=1) - 1).clamp_min(0)


def batch_from_inputs(
    inputs: Mapping[str, Any], structure: Structure, config: Any, found: Found | None = None
) -> Batch:
    """A batch from the model's own forward tensors: modality from the image token, roles unknown.

    Where the tensors do not tell how an image was cut (InternVL, Gemma 3 with pan-and-scan, Idefics2 with image
    splitting), a grid is missing, or each crop counts as an image of its own; `prepare` knows.

    Args:
        inputs: What the model's processor returns.
        structure: The model's structure, for its image token.
        config: The model's configuration.
        found: Where images stand, if the model showed that and the tensors do not say.

    Raises:
        BadInputError: If there are no `input_ids` of shape (batch, pos), or a sample's image positions are not those
            its images take.
    """
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    # Where the only encoder is the tower, all text is the decoder's.
    prefix = "decoder_" if "input_ids" not in tensors and structure.encoder is None else ""
    ids = tensors.get(f"{prefix}input_ids")
    if prefix and ids is not None and not structure.cross_attention:
        raise BadInputError(
            f"given are 'decoder_input_ids' alone, but in the blocks of {structure.family!r} no cross-attention is "
            "known by which they would see a picture; add its name to PART_NAMES (xattn) in hooked_mm/architectures.py"
        )
    if ids is None or ids.ndim != 2:
        shape = None if ids is None else tuple(ids.shape)
        raise BadInputError(
            f"a batch needs 'input_ids' of shape (batch, pos); got {shape} among {sorted(inputs)}. Use the output "
            "of the model's processor, or model.prepare(images=..., text=...)"
        )
    mask = tensors.setdefault(f"{prefix}attention_mask", torch.ones_like(ids))
    seen = dict(tensors)
    if found is None:
        image = torch.zeros_like(ids, dtype=torch.bool) if prefix else image_positions(tensors, structure, config)
    else:
        image, mask = found.image, found.widened(mask, found.image)
        seen["input_ids"] = found.widened(ids, -1)
    modality = modalities(image, mask)
    role = torch.where(modality == Modality.TEXT, int(Role.UNKNOWN), int(Role.NONE)).to(torch.int8)
    source = Source(seen, image, config, attended=structure.cross_attention)
    decoder = None
    if "decoder_input_ids" in tensors and not prefix:
        ids = tensors["decoder_input_ids"]
        mask = tensors.setdefault("decoder_attention_mask", torch.ones_like(ids))
        # Some masks say of the encoder's positions, too, which the decoder may see.
        mask = mask[:, -ids.shape[1] :]
        decoder = decoder_batch(ids, mask, torch.where(mask == 0, int(Role.NONE), int(Role.UNKNOWN)), [])
    return Batch(tensors, modality, role, read_layout(source), [], decoder)


def image_positions(inputs: Mapping[str, Tensor], structure: Structure, config: Any) -> Bool[Tensor, "b p"]:
    """Where image features take the place of the image token's embedding."""
    ids = inputs["input_ids"]
    named = next((inputs[name] for name in IMAGE_MASK_NAMES if name in inputs), None)
    if named is not None:
        return named.bool() & inputs["attention_mask"].bool()
    if structure.image_token_id is None or structure.cross_attention or not has_image_positions(config):
        return torch.zeros_like(ids, dtype=torch.bool)
    return (ids == structure.image_token_id) & inputs["attention_mask"].bool()


def modalities(image: Bool[Tensor, "b p"], attention_mask: Int[Tensor, "b p"]) -> Int[Tensor, "b p"]:
    """`Modality` of every position."""
    modality = torch.where(image, int(Modality.IMAGE), int(Modality.TEXT))
    return modality.masked_fill(attention_mask == 0, int(Modality.PAD)).to(torch.int8)


def decoder_batch(
    ids: Int[Tensor, "b q"], mask: Int[Tensor, "b q"], role: Int[Tensor, "b q"], tokens: list[list[str]]
) -> Batch:
    """The positions of an encoder-decoder model's decoder: all text."""
    nothing = torch.zeros_like(ids, dtype=torch.bool)
    layout = Layout("none", ids.new_zeros(0), torch.full_like(ids, -1), nothing)
    inputs = {"input_ids": ids, "attention_mask": mask}
    return Batch(inputs, modalities(nothing, mask), role.to(torch.int8), layout, tokens)
