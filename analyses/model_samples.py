"""What analyses that need the model itself share: a model, a data set, and its samples in prepared batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser

import hooked_mm.datasets
import hooked_mm.scenes.dataset  # noqa: F401  (data modules are offered by name)
from hooked_mm.batch import Batch
from hooked_mm.data import Sample, SampleDataModule
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.loading import BatchMaker, OnError
from hooked_mm.reader import ModelSource

Answer = Literal["generated", "given", "none"]


def add_model(parser: ArgumentParser, answer: Answer) -> None:
    """Options for a model and the samples it runs on.

    Args:
        parser: Of the command.
        answer: What stands behind prompts unless told.
    """
    parser.add_argument("--model", type=ModelSource, required=True, help="the model to look into")
    parser.add_subclass_arguments(SampleDataModule, "data", required=True)
    parser.add_argument("--answer", type=Answer, default=answer, help="behind the prompt")
    parser.add_argument("--max_new_tokens", type=int, default=20, help="of generated answers")
    parser.add_argument("--on_error", type=OnError, default="skip", help="list a bad sample and go on, or stop")
    parser.add_argument("--device", type=str, default="cpu", help="where the model runs: cuda, cuda:1, ...")
    parser.add_argument("--name", type=str | None, help="what to call the model in tables and plots")
    parser.add_argument("--draws", type=int, default=1000, help="of the bootstrap, over samples")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is left to chance")


@dataclass
class Samples:
    """A data set's samples as a model takes them, batch by batch.

    Attributes:
        model: The model.
        data: The data module.
        answer: `generated`, `given` or `none`: what stands behind the prompts.
        max_new_tokens: Of generated answers.
        on_error: Whether a bad sample is listed and left out, or ends the run.
        skipped: Reasons of those that were left out so far.
    """

    model: HookedMM
    data: SampleDataModule
    answer: Answer = "none"
    max_new_tokens: int = 20
    on_error: OnError = "skip"
    skipped: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[list[Sample], Batch]]:
        """The samples of a batch, their pictures among them, and the batch on the model's device."""
        maker = BatchMaker(self.data.dataset, self.model, "given" if self.answer == "given" else "none")
        maker.on_error = self.on_error
        total = len(self.data.dataset)  # type: ignore[arg-type]
        for start in range(0, total, self.data.batch_size):
            numbers = list(range(start, min(start + self.data.batch_size, total)))
            samples = {number: self.data.dataset[number] for number in numbers}
            prepared = maker(numbers, list(samples.values()))
            self.skipped += [f"{one['sample']}: {one['reason']}" for one in prepared.skipped]
            if prepared.batch is None:
                continue
            batch = prepared.batch.to(self.model.device)
            if self.answer == "generated":
                made = self.model.generate(batch, self.max_new_tokens).batch
                assert made is not None
                batch = made
            yield [samples[number] for number in prepared.numbers], batch

    def notes(self) -> list[str]:
        """How many samples were left out, and why."""
        shown = "; ".join(self.skipped[:3])
        return [f"{len(self.skipped)} samples were left out ({shown})"] if self.skipped else []


def loaded(made: Any) -> HookedMM:
    """The model that the options name, on their device.

    Raises:
        BadInputError: If there is no such device.
    """
    try:
        device = torch.device(made.device)
    except RuntimeError as error:
        raise BadInputError(f"device={made.device!r}: {error}") from error
    return made.model.load(device)


def samples_of(made: Any, model: HookedMM, data: SampleDataModule | None = None) -> Samples:
    """The samples that the options name, or those of another data module under the same options."""
    return Samples(model, data or made.data, made.answer, made.max_new_tokens, made.on_error)
