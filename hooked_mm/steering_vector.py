"""A direction with its provenance: of which hook point of which model, read at which positions, made from what.

    shift = SteeringVector(values, "blocks.3.hook_resid_post", "shift", "sea", model="llava", made_from={...})
    with model.hooks([shift.intervention(alpha=2.0, model=model)]):
        model.generate(batch)

Vectors of one hook are added and scaled: `2 * sea - snow`; see `vector_arithmetic`.

On disk, one or many in a folder (see `tensor_folder`):

    steering_vectors.json         per vector its hook, kind, name and provenance, in order
    steering_vectors.safetensors  their values, float32, by number
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mm.errors import BadInputError, nearest
from hooked_mm.hooked import HookedMM
from hooked_mm.interventions import Add
from hooked_mm.positions import At
from hooked_mm.tensor_folder import read_json, read_tensors, write_folder
from hooked_mm.value_layout import stream_of
from hooked_mm.vector_arithmetic import added, scaled
from hooked_mm.vectors import checked

logger = logging.getLogger(__name__)

FORMAT = 1
FILE = "steering_vectors"
"""Name of both files, without their endings."""
AS_WIDE_AS_THE_STREAM = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
"""Points whose vectors have the model's own width."""


@dataclass(frozen=True, eq=False, repr=False)
class SteeringVector:
    """A direction in the activations of one hook point.

    Attributes:
        values: The direction, in the units of the activations; kept as float32 on the CPU.
        hook: The hook point it belongs to.
        kind: How such a direction is made: `"shift"`, `"coarse"`, `"fine"`, `"concept"`, `"probe"`, ...
        name: For people.
        positions: The rule of the positions it was read at, as an activation store's manifest describes a selector.
        model: Id, or folder, of the model it belongs to.
        revision: Of that model on the hub.
        adapter: Of that model, as an activation store's manifest has it.
        made_from: How it was made: stores, samples, settings, figures.

    Raises:
        BadInputError: If the values are no finite vector, the hook is no name, or what JSON should hold is no JSON.
    """

    values: Float[Tensor, " d"]
    hook: str
    kind: str = ""
    name: str = ""
    positions: Any = None
    model: str | None = None
    revision: str | None = None
    adapter: str | Sequence[str] | None = None
    made_from: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.hook, str) or not self.hook:
            raise BadInputError(f"hook={self.hook!r}; a steering vector belongs to one hook point, give its name")
        # A copy, which nobody else changes.
        values = checked("values", self.values, (1,)).detach().to("cpu", torch.float32, copy=True)
        object.__setattr__(self, "values", checked("values in float32", values, (1,)).contiguous())
        for part in ("positions", "adapter", "made_from"):
            value = getattr(self, part)
            plain = dict(value) if isinstance(value, Mapping) else value
            try:
                # As it will be when it was saved and loaded.
                object.__setattr__(self, part, json.loads(json.dumps(plain, allow_nan=False)))
            except (TypeError, ValueError) as error:
                raise BadInputError(
                    f"{part} of a steering vector must be what JSON can hold, but {error}; use text, finite numbers, "
                    "lists, mappings or None"
                ) from None

    @property
    def layer(self) -> int | None:
        """The block of its hook, None outside blocks."""
        found = re.search(r"(?:^|\.)blocks\.(\d+)\.", self.hook)
        return None if found is None else int(found[1])

    @property
    def norm(self) -> float:
        """Its length, in the units of the activations."""
        return float(self.values.norm())

    def __repr__(self) -> str:
        told = " ".join(filter(None, (self.kind, repr(self.name) if self.name else "")))
        idle = ", which changes nothing" if self.norm == 0 else ""
        owner = f", of {self._owner()}" if self.model else ""
        parts = [repr(self.hook), *([told] if told else []), f"<{len(self.values)} of norm {self.norm:.4g}{idle}>"]
        return f"SteeringVector({', '.join(parts)}{owner})"

    def _owner(self) -> str:
        known = {"revision": self.revision, "adapter": self.adapter}
        more = ", ".join(f"{what} {value!r}" for what, value in known.items() if value)
        return f"{self.model!r}{f' ({more})' if more else ''}"

    def intervention(
        self, alpha: float = 1.0, at: At = "generated", model: HookedMM | None = None, force: bool = False
    ) -> Add:
        """x + alpha v at its hook.

        Args:
            alpha: How much of it.
            at: Which positions: a rule, or a short form of one.
            model: Where it will be used: checked first.
            force: Do not check.

        Raises:
            BadInputError: If the model is another one, see `check_model`.
        """
        if model is not None and not force:
            self.check_model(model)
        if self.norm == 0:
            logger.warning("%r is added, which changes nothing", self)
        return Add(self.hook, self.values, alpha, at=at)

    def check_model(self, model: HookedMM) -> None:
        """Refuse a model that this is no vector of.

        Names are compared by their last part, since a folder lies elsewhere on every machine; an adapter may differ, as
        a shift from a model to its fine-tuned sibling is used in either.

        Raises:
            BadInputError: If the model's name or revision is another (where both are known), or it lacks the hook, or
                the hook has vectors of another width; it names both and the remedy.
        """
        config = model.hf_model.config
        name, revision = getattr(config, "_name_or_path", None), getattr(config, "_commit_hash", None)
        what = f"the steering vector {self.name or self.kind or self.hook!r}"
        remedy = "make it for this model, or pass force=True to intervention"
        if self.model and name and last_part(self.model) != last_part(name):
            raise BadInputError(f"{what} is one of the model {self._owner()}, this is {name!r}; {remedy}")
        if self.revision and revision and self.revision != revision:
            raise BadInputError(f"{what} is one of {self._owner()}, this is revision {revision!r}; {remedy}")
        if self.hook not in model.hook_names:
            near = nearest(self.hook, model.hook_names)
            raise BadInputError(
                f"{what} of {self._owner()} belongs at {self.hook!r}, which {name!r} has not{near}; "
                "make it for this model"
            )
        at_stream = stream_of(self.hook) == "text" and self.hook.endswith(AS_WIDE_AS_THE_STREAM)
        if at_stream and len(self.values) != model.cfg.d_model:
            raise BadInputError(
                f"{what} of {self._owner()} has length {len(self.values)}, the vectors at {self.hook!r} of "
                f"{name!r} have {model.cfg.d_model}; make it for this model"
            )

    def check_alike(self, other: SteeringVector) -> None:
        """Refuse a vector that this one can't be added to.

        Raises:
            BadInputError: If it belongs to another hook, model or revision (both known), or is of another width.
        """
        differs = [
            (what, one, two)
            for what, one, two in (("hook", self.hook, other.hook), ("width", len(self.values), len(other.values)))
            if one != two
        ]
        if self.model and other.model and last_part(self.model) != last_part(other.model):
            differs.append(("model", self.model, other.model))
        if self.revision and other.revision and self.revision != other.revision:
            differs.append(("revision", self.revision, other.revision))
        if differs:
            what, one, two = differs[0]
            raise BadInputError(
                f"{self!r} and {other!r} do not belong together: {what} {one!r} and {two!r}; use vectors of one hook "
                "of one model, or add each by an intervention of its own"
            )

    def __mul__(self, factor: float) -> SteeringVector:
        return scaled(self, factor) if isinstance(factor, int | float) else NotImplemented

    __rmul__ = __mul__

    def __neg__(self) -> SteeringVector:
        return scaled(self, -1)

    def __add__(self, other: SteeringVector) -> SteeringVector:
        return added([self, other]) if isinstance(other, SteeringVector) else NotImplemented

    def __sub__(self, other: SteeringVector) -> SteeringVector:
        return added([self, other], [1, -1]) if isinstance(other, SteeringVector) else NotImplemented

    def save(self, folder: str | Path) -> Path:
        """Write it into a folder, in place of what vectors were there; see `save_vectors`."""
        return save_vectors([self], folder)

    @classmethod
    def load(cls, folder: str | Path) -> SteeringVector:
        """Read what `save` wrote.

        Raises:
            BadInputError: As `load_vectors`, or if the folder holds another number of vectors than one.
        """
        return _only(load_vectors(folder), folder, "load_vectors")

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload to the Hugging Face hub with a generated card; see `vector_hub.push_vectors`."""
        from hooked_mm.vector_hub import push_vectors

        return push_vectors([self], repo_id, **options)

    @classmethod
    def from_pretrained(cls, path_or_repo: str | Path, revision: str | None = None, **options: Any) -> SteeringVector:
        """The vector of a folder or of the hub; see `vector_hub.vectors_from_hub`.

        Raises:
            BadInputError: As there, or if it is another number of vectors than one.
        """
        from hooked_mm.vector_hub import vectors_from_hub

        return _only(vectors_from_hub(path_or_repo, revision, **options), path_or_repo, "vectors_from_hub")


def _only(found: list[SteeringVector], where: str | Path, remedy: str) -> SteeringVector:
    if len(found) != 1:
        raise BadInputError(f"{str(where)!r} holds {len(found)} steering vectors, not one; use {remedy}")
    return found[0]


def last_part(model: str) -> str:
    """What two mentions of a model have in common: the last part of its id or folder, `small:` aside."""
    return Path(model.removeprefix("small:")).name


def save_vectors(vectors: Sequence[SteeringVector], folder: str | Path) -> Path:
    """Write steering vectors, of any hooks and widths, into one folder, in place of what vectors were there.

    Returns:
        The folder.
    """
    told = [{f.name: getattr(v, f.name) for f in fields(v) if f.name != "values"} for v in vectors]
    tensors = {str(number): vector.values for number, vector in enumerate(vectors)}
    return write_folder(folder, FILE, tensors, {"format": FORMAT, "vectors": told})


def load_vectors(folder: str | Path) -> list[SteeringVector]:
    """Read what `save_vectors` wrote, in the same order.

    Raises:
        BadInputError: If the folder holds no steering vectors, those of another format, or was copied by half.
    """
    remedy = "make SteeringVector(values, hook, model=...) of its tensor, and save that"
    content = read_json(folder, FILE, "steering vectors", remedy)
    if content.get("format") != FORMAT or not isinstance(content.get("vectors"), list):
        raise BadInputError(
            f"{str(Path(folder) / f'{FILE}.json')!r} has format {content.get('format')}, this version reads {FORMAT}; "
            "update hooked-mm"
        )
    tensors = read_tensors(folder, FILE, content)
    try:
        return [SteeringVector(tensors[str(number)], **told) for number, told in enumerate(content["vectors"])]
    except (KeyError, TypeError) as error:
        raise BadInputError(
            f"{str(folder)!r} holds no steering vectors as we write them ({error}); save again"
        ) from error
