"""What runs over a data set and leaves something in a store: a batch in, rows and a table of samples out.

`extraction_job` deals samples out to processes, writes, resumes and halves batches for any reader; `extraction` reads
representations, the upper floors read whatever else a model can be asked for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hooked_mm.adapter_switch import adapters_on
from hooked_mm.data import OWN_COLUMNS
from hooked_mm.errors import BadInputError, UnsupportedModelError
from hooked_mm.hooked import HookedMM
from hooked_mm.loading import AnswerSource, Prepared
from hooked_mm.small import small_adapter_path, small_model_path
from hooked_mm.unembedding import Unembedding
from hooked_mm.untrained import untrained_copy


@dataclass(frozen=True)
class ModelSource:
    """A model to load: on every process its own, or one over several GPUs (`device_map="auto"`).

    Attributes:
        id: Hub id or folder, or `small:NAME` for a model that ships with the package.
        dtype: `"bfloat16"`, ..., or `"auto"` for the checkpoint's own.
        device_map: As in transformers; None puts the whole model on the process's own device.
        adapter: Hub id or folder of a PEFT adapter; of a shipped model, its name.
        revision: Of a model on the hub.
        random_weights: A seed, for the same architecture with random weights: a control.
    """

    id: str
    dtype: str = "auto"
    device_map: str | None = None
    adapter: str | None = None
    revision: str | None = None
    random_weights: int | None = None

    def __post_init__(self) -> None:
        if self.random_weights is not None and self.adapter is not None:
            raise BadInputError(
                f"random_weights={self.random_weights} and adapter={self.adapter!r}: an adapter belongs to trained "
                "weights; give one of the two"
            )

    @property
    def name(self) -> str:
        """What to call it in tables and plots."""
        with_adapter = "" if self.adapter is None else f" + {self.adapter}"
        return f"{self.id}{with_adapter}{'' if self.random_weights is None else ', random weights'}"

    def load(self, device: torch.device | str) -> HookedMM:
        """The model, hooked and checked."""
        model = self._load(device)
        return model if self.random_weights is None else untrained_copy(model, self.random_weights)

    def _load(self, device: torch.device | str) -> HookedMM:
        """As it was trained."""
        where = self.device_map or ({"": str(device)} if str(device) != "cpu" else None)
        if self.id.startswith("small:"):
            name = self.id.removeprefix("small:")
            return HookedMM.small(name, self.adapter, dtype=self.dtype, device_map=where)
        options: dict[str, Any] = {} if self.revision is None else {"revision": self.revision}
        return HookedMM.from_pretrained(self.id, dtype=self.dtype, device_map=where, adapter=self.adapter, **options)

    def words(self, device: torch.device | str) -> HookedMM | Unembedding:
        """What turns directions into words: the model's unembedding alone.

        The whole model where that can't be had: its ends are not told apart, or the adapter changes them.
        """
        path: str | Path = self.id
        adapter: str | Path | None = self.adapter
        options: dict[str, Any] = {} if self.revision is None else {"revision": self.revision}
        if self.id.startswith("small:"):
            name = self.id.removeprefix("small:")
            path, options = small_model_path(name), {}
            adapter = None if self.adapter is None else small_adapter_path(name, self.adapter)
        if self.random_weights is not None:
            return self.load(device)
        try:
            return HookedMM.unembedding(path, dtype=self.dtype, device=device, adapter=adapter, **options)
        except UnsupportedModelError:
            return self.load(device)


@dataclass
class Extracted:
    """The store's share of one batch (see `StoreWriter.add`), and what it took: samples, positions computed."""

    values: dict[str, Tensor] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    positions: int = 0


class Reader(ABC):
    """Turns prepared batches into a store's rows and samples.

    Args:
        model: The hooked model, or where to load it from.
        answer: What stands behind the prompts, see `Extractor`.
        answer_prefix: How every answer begins.
        max_positions: About so many positions in a batch at most, padding counted.

    Attributes:
        answers: Stored answers, sample -> token ids, where these are read again.
    """

    model: HookedMM

    def __init__(
        self,
        model: HookedMM | ModelSource,
        answer: AnswerSource = "none",
        answer_prefix: str | None = None,
        max_positions: int | None = None,
    ) -> None:
        self.source, self.answer = model, answer
        self.answer_prefix, self.max_positions = answer_prefix, max_positions
        self.answers: dict[str, list[int]] = {}
        if isinstance(model, HookedMM):
            self._attach(model)

    def _attach(self, model: HookedMM) -> None:
        """Take the model; refuse it if it is none for this reader."""
        self.model = model

    def load(self, device: torch.device | str) -> None:
        """Load the model, if it is not there yet."""
        if isinstance(self.source, ModelSource) and not hasattr(self, "model"):
            self._attach(self.source.load(device))

    def whose(self, adapters: bool = True) -> dict[str, Any]:
        """What a store's manifest says of the model.

        Args:
            adapters: Whether it is read with the adapters that are switched on.
        """
        config = self.model.hf_model.config
        on = adapters_on(self.model.hf_model) if adapters else []
        source = self.source if isinstance(self.source, ModelSource) else None
        named = on if source is None else source.adapter
        seed = None if source is None else source.random_weights
        return {
            "model": config._name_or_path,
            **({} if seed is None else {"random_weights": seed}),
            "revision": getattr(config, "_commit_hash", None),
            "adapter": named if on else None,
            "family": self.model.cfg.family,
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }

    @abstractmethod
    def made_by(self) -> dict[str, Any]:
        """What the store's manifest says; a store is only continued with the same."""

    @abstractmethod
    def represent(self, prepared: Prepared) -> Extracted:
        """The store's share of one batch."""


def versions() -> dict[str, str]:
    """Of the packages that a run depends on."""
    return {name: version(name) for name in ("hooked-mm", "torch", "transformers", "nnsight")}


def sample_rows(prepared: Prepared, **more: list[Any]) -> list[dict[str, Any]]:
    """A store's table of the samples of a batch: the data set's columns, what a store always says, and `more`.

    Args:
        prepared: The batch.
        more: Further columns, a value per sample.

    Raises:
        BadInputError: If the data set's columns have names of the store's own.
    """
    own = {*OWN_COLUMNS, *more}
    clashing = sorted({name for sample in prepared.samples for name in sample.columns} & own)
    if clashing:
        raise BadInputError(f"the data set's columns {clashing} are names of the store's own; rename them")
    rows: list[dict[str, Any]] = []
    for place, (number, sample) in enumerate(zip(prepared.numbers, prepared.samples, strict=True)):
        told: Mapping[str, Any] = {name: values[place] for name, values in more.items()}
        given = {"sample": sample.id, "sample_number": number, "image": sample.images}
        rows.append({**sample.columns, **given, "prompt": sample.text, "answer": sample.answer, **told})
    return rows
