"""Samples and the Lightning data module that names them: what extraction takes, whatever data set it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning
from torch.utils.data import Dataset

from hooked_mm.errors import BadInputError
from hooked_mm.prepare import SampleImages

OWN_COLUMNS = ("sample", "sample_number", "image", "prompt", "text", "answer", "answer_tokens")
"""What a store itself says of a sample; a data set's own columns must be called otherwise."""


@dataclass(frozen=True)
class Sample:
    """One picture (or several, or none) with what is asked and, where known, answered.

    `columns`: whatever else the data set knows; it ends up in the store's table of samples.
    """

    id: str
    images: SampleImages
    text: str
    answer: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


class SampleDataModule(lightning.LightningDataModule):
    """Any sequence of samples as a data module.

    Args:
        dataset: A map-style data set of `Sample`; ids must be unique. With a method `ids()` it tells them all at once;
            without, every sample is made for its id.
        batch_size: Samples per batch at most.
        num_workers: Processes that decode and prepare pictures; 0 does so in the main process.
    """

    def __init__(self, dataset: Dataset | Sequence[Sample], batch_size: int = 32, num_workers: int = 0) -> None:
        super().__init__()
        if batch_size < 1 or num_workers < 0:
            raise BadInputError(f"batch_size={batch_size}, num_workers={num_workers}: at least 1, and not negative")
        self.dataset, self.batch_size, self.num_workers = dataset, batch_size, num_workers

    def ids(self) -> list[str]:
        """The samples' ids, in order.

        Raises:
            BadInputError: If two samples share one.
        """
        if hasattr(self.dataset, "ids"):
            ids = list(self.dataset.ids())
        else:
            ids = [self.dataset[index].id for index in range(len(self.dataset))]  # type: ignore[arg-type]
        seen: set[str] = set()
        for name in ids:
            if name in seen:
                raise BadInputError(f"two samples have the id {name!r}; ids must be unique")
            seen.add(name)
        return ids

    def check(self) -> None:
        """Refuse, before a model is loaded, what would make every sample a bad one; called when a run begins."""

    def describe(self) -> dict[str, Any]:
        """What a store's manifest says of the data; a store is only continued with the same."""
        return {"name": type(self).__name__, "samples": len(self.dataset)}  # type: ignore[arg-type]
