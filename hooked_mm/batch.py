"""A padded batch that knows, for every position, its modality and its role.

A batch is what every reader of activations selects by: `batch.mask(modality="image")` instead of counting tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooked_mm.errors import BadInputError, nearest


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
        modality: (batch, pos) int8, values of `Modality`.
        role: (batch, pos) int8, values of `Role`.
        image_sample: (images,) which sample each image belongs to, in the order the tower sees them.
        tokens: Per sample, the token strings of all positions; empty without a tokenizer.
    """

    inputs: dict[str, Tensor]
    modality: Int[Tensor, "b p"]
    role: Int[Tensor, "b p"]
    image_sample: Int[Tensor, " images"]
    tokens: list[list[str]]

    def __len__(self) -> int:
        return self.modality.shape[0]

    @property
    def input_ids(self) -> Int[Tensor, "b p"]:
        """Token ids, (batch, pos)."""
        return self.inputs["input_ids"]

    @property
    def length(self) -> int:
        """Positions that the decoder computes per sample."""
        ids = self.inputs.get("decoder_input_ids")
        if ids is not None:
            return ids.shape[1]
        return self.input_ids.shape[1]

    @property
    def has_images(self) -> bool:
        """Whether the vision tower will run."""
        return "pixel_values" in self.inputs

    def with_inputs(self, inputs: dict[str, Tensor]) -> Batch:
        """The same positions with other forward tensors (another picture, say)."""
        return replace(self, inputs=inputs)

    def to(self, device: str | torch.device) -> Batch:
        """The same batch with its tensors on another device."""
        inputs = {name: value.to(device) for name, value in self.inputs.items()}
        modality, role, owner = (value.to(device) for value in (self.modality, self.role, self.image_sample))
        return replace(self, inputs=inputs, modality=modality, role=role, image_sample=owner)

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

        Prompts must be padded on the left, or prompt and answer would not be adjacent.

        Raises:
            BadInputError: If any sample of the batch is padded on the right.
        """
        padded = self.modality[:, -1] == Modality.PAD
        if bool(padded.any()):
            row = int(padded.nonzero()[0])
            raise BadInputError("is padded on the right; prepare with padding_side='left' to extend a batch", row)
        mask = kept.to(self.inputs["attention_mask"].dtype)
        inputs = {
            **self.inputs,
            "input_ids": torch.cat([self.input_ids, new_tokens], dim=1),
            "attention_mask": torch.cat([self.inputs["attention_mask"], mask], dim=1),
        }
        if "position_ids" in inputs:
            inputs["position_ids"] = count_positions(inputs["attention_mask"])
        modality = torch.where(kept, int(Modality.TEXT), int(Modality.PAD)).to(self.modality)
        role = torch.where(kept, int(Role.ANSWER), int(Role.NONE)).to(self.role)
        return replace(
            self,
            inputs=inputs,
            modality=torch.cat([self.modality, modality], dim=1),
            role=torch.cat([self.role, role], dim=1),
            tokens=[old + new for old, new in zip(self.tokens, names, strict=True)],
        )


def count_positions(attention_mask: Int[Tensor, "b p"]) -> Int[Tensor, "b p"]:
    """Position ids that do not depend on padding: the first real token has 0.

    Left to itself a model counts padding too; rotary attention is then the same only up to rounding.
    """
    return (attention_mask.long().cumsum(dim=1) - 1).clamp_min(0)


def batch_from_inputs(inputs: Mapping[str, Any], image_token_id: int | None) -> Batch:
    """A batch from the model's own forward tensors: modality from the image token, roles unknown.

    Raises:
        BadInputError: If there are no `input_ids` of shape (batch, pos).
    """
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    ids = tensors.get("input_ids")
    if ids is None or ids.ndim != 2:
        shape = None if ids is None else tuple(ids.shape)
        raise BadInputError(
            f"a batch needs 'input_ids' of shape (batch, pos); got {shape} among {sorted(inputs)}. Use the output "
            "of the model's processor, or model.prepare(images=..., text=...)"
        )
    mask = tensors.setdefault("attention_mask", torch.ones_like(ids))
    image = ids == image_token_id if image_token_id is not None else torch.zeros_like(ids, dtype=torch.bool)
    modality = torch.where(image, int(Modality.IMAGE), int(Modality.TEXT))
    modality = modality.masked_fill(mask == 0, int(Modality.PAD)).to(torch.int8)
    role = torch.where(modality == Modality.TEXT, int(Role.UNKNOWN), int(Role.NONE)).to(torch.int8)
    images = tensors["pixel_values"].shape[0] if "pixel_values" in tensors else 0
    return Batch(tensors, modality, role, image_owner(image, images), tokens=[])


def image_owner(image: Bool[Tensor, "b p"], images: int) -> Int[Tensor, " images"]:
    """Which sample each image belongs to, when every image takes the same number of positions."""
    total = int(image.sum())
    if not images:
        return torch.zeros(0, dtype=torch.long, device=image.device)
    if total % images:
        raise BadInputError(
            f"{total} image positions can't be shared equally by {images} images; each image token of the text must "
            "be expanded to the number of patches, and there must be one per image"
        )
    owner = image.nonzero()[:, 0]
    return owner[:: total // images]
