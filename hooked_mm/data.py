"""Samples and the Lightning data module that hands them out: what extraction takes, whatever data set it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset

from hooked_mm.errors import BadInputError
from hooked_mm.prepare import SampleImages, load_images


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


@dataclass(frozen=True)
class Loaded:
    """A batch of samples with their decoded pictures, and those left out: `{"sample": id, "reason": why}`."""

    samples: list[Sample]
    pictures: list[list[Image.Image]]
    skipped: list[dict[str, str]]


def load(samples: Sequence[Sample]) -> Loaded:
    """Decode the pictures of a batch; what can't be used is counted and named, never guessed."""
    good, pictures, skipped = [], [], []
    for sample in samples:
        try:
            decoded = load_images(sample.images)
            if not sample.text.strip():
                raise BadInputError(f"the prompt is empty ({sample.text!r}); write a question or an instruction")
        except BadInputError as error:
            skipped.append({"sample": sample.id, "reason": error.reason})
        else:
            good.append(sample)
            pictures.append(decoded)
    return Loaded(good, pictures, skipped)


class SampleDataModule(lightning.LightningDataModule):
    """Any sequence of samples as a data module for `Trainer.predict`.

    Args:
        dataset: A map-style data set of `Sample`; ids must be unique.
        batch_size: Samples per batch.
        num_workers: Processes that decode pictures; 0 decodes in the main process.
    """

    def __init__(self, dataset: Dataset | Sequence[Sample], batch_size: int = 32, num_workers: int = 0) -> None:
        super().__init__()
        self.dataset, self.batch_size, self.num_workers = dataset, batch_size, num_workers

    def ids(self) -> list[str]:
        """The samples' ids, in order."""
        if hasattr(self.dataset, "ids"):
            return self.dataset.ids()
        return [self.dataset[index].id for index in range(len(self.dataset))]  # type: ignore[arg-type]

    def describe(self) -> dict[str, Any]:
        """What a store's manifest says of the data; a store is only continued with the same."""
        return {"name": type(self).__name__, "samples": len(self.dataset)}  # type: ignore[arg-type]

    def without(self, done: set[str]) -> SampleDataModule:
        """The same data module without the samples whose ids are given.

        Raises:
            BadInputError: If two samples share an id.
        """
        ids = self.ids()
        if len(set(ids)) < len(ids):
            twice = next(name for name in ids if ids.count(name) > 1)
            raise BadInputError(f"two samples have the id {twice!r}; ids must be unique")
        left = [index for index, name in enumerate(ids) if name not in done]
        return SampleDataModule(Subset(self.dataset, left), self.batch_size, self.num_workers)  # type: ignore[arg-type]

    def transfer_batch_to_device(self, batch: Loaded, device: Any, dataloader_idx: int) -> Loaded:
        """Pictures and texts stay where they are; `HookedMM` places its own inputs."""
        return batch

    def predict_dataloader(self) -> DataLoader:
        return DataLoader(
            self.dataset,  # type: ignore[arg-type]
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=load,
        )
