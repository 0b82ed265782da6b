"""Dictionaries learnt from an activation store by a Lightning Trainer: any number of processes, several k and seeds.

Every process holds a stretch of the store's rows, or reads it chunk by chunk where it is larger than memory. One step
of a decomposition is one training step; what it exchanges between processes are sums (see `rows`). Each dictionary is
saved as soon as it is done, so a run that is cut off goes on with those that are missing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from sklearn.base import clone
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from concept_dict.decomposition import Decomposition
from concept_dict.dictionary import ConceptDictionary
from concept_dict.rows import Rows
from hooked_mm.errors import BadInputError
from hooked_mm.extraction_job import quiet_trainer
from hooked_mm.store import ActivationStore


@dataclass(frozen=True)
class Learnt:
    """One dictionary of a run: what was varied, where it lies, and how it went.

    `relative_error`: ||Z - mean - A C|| / ||Z - mean||; `active`: the mean number of concepts that a row activates.
    """

    name: str
    folder: Path
    k: int
    seed: int | None
    steps: int
    seconds: float
    relative_error: float
    active: float
    dead: int


def variants(method: Decomposition, ks: Sequence[int], seeds: Sequence[int]) -> Iterator[tuple[str, Decomposition]]:
    """The decompositions of a sweep by name; a method without chance has one seed.

    Raises:
        BadInputError: If there is no k or no seed.
    """
    if not ks or not seeds:
        raise BadInputError(f"k={list(ks)}, seeds={list(seeds)}: give at least one of each")
    chance = "random_state" in method.get_params()
    for k in ks:
        for seed in seeds if chance else [None]:
            made = clone(method).set_params(n_components=k, **({"random_state": seed} if chance else {}))
            yield f"{type(method).__name__}-k{k}" + (f"-seed{seed}" if chance else ""), made


class Learning(lightning.LightningModule):
    """Decompositions fitted one after the other to the same rows.

    Args:
        store: Of the rows.
        hook: Which of its activations.
        jobs: Name -> unfitted decomposition.
        output: A folder in which each gets one of its name; those that are there already are left.
    """

    def __init__(self, store: ActivationStore, hook: str, jobs: Mapping[str, Decomposition], output: Path) -> None:
        super().__init__()
        self.automatic_optimization = False
        # A Trainer refuses a module without parameters. Concepts are none: no gradient is taken for them.
        self.idle = torch.nn.Parameter(torch.zeros(()))
        self.store, self.hook, self.output = store, hook, output
        self.jobs = {name: job for name, job in jobs.items() if not (output / name / "dictionary.json").exists()}
        self.waiting = list(self.jobs)
        self.learnt: list[Learnt] = []
        self.job: Decomposition | None = None

    def configure_optimizers(self) -> None:
        """None: steps are the decompositions' own."""

    def train_dataloader(self) -> DataLoader:
        """One item, so that an epoch is a step."""
        return DataLoader(TensorDataset(torch.zeros(1)))

    def on_fit_start(self) -> None:
        """Take this process's rows."""
        self.rows = Rows.of_store(self.store, self.hook, self.trainer.strategy.root_device)

    def training_step(self, batch: Any, index: int) -> None:
        """A step of the decomposition whose turn it is."""
        if self.job is None:
            if not self.waiting:
                self.trainer.should_stop = True
                return
            self.name = self.waiting.pop(0)
            self.started, self.steps = time.monotonic(), 0
            self.bar = tqdm(desc=self.name, unit="step", disable=not self.trainer.is_global_zero, dynamic_ncols=True)
            self.job = self.jobs[self.name]
            self.job.begin(self.rows)
        done = self.job.step()
        self.steps += 1
        progress = self.job.progress()
        self.bar.set_postfix({key: f"{value:.5g}" for key, value in progress.items()}, refresh=False)
        self.bar.update()
        if self.trainer.logger is not None:
            self.trainer.logger.log_metrics({f"{self.name}/{k}": v for k, v in progress.items()}, self.steps)
        if done:
            self._keep(self.job)
            self.job = None

    def _keep(self, job: Decomposition) -> None:
        active = job.end()
        self.bar.close()
        size, processes = self.rows.moments(job.center)[1], self.rows.processes
        counts = processes.sum((active != 0).sum(dim=0))
        folder = self.output / self.name
        if not processes.rank:
            ConceptDictionary(job, self.hook, self.store.made_by).save(folder)
        self.learnt.append(
            Learnt(
                self.name,
                folder,
                job.n_components,
                job.get_params().get("random_state"),
                self.steps,
                time.monotonic() - self.started,
                job.reconstruction_err_ / max(size, 1e-300) ** 0.5,
                float(counts.sum()) / self.rows.total,
                int((counts == 0).sum()),
            )
        )


def learn(
    store: ActivationStore,
    hook: str,
    method: Decomposition,
    output: str | Path,
    *,
    k: Sequence[int] = (20,),
    seeds: Sequence[int] = (0,),
    trainer: lightning.Trainer | None = None,
    **trainer_options: Any,
) -> list[Learnt]:
    """Fit a method to the rows of a store, once for every k and seed; in a run of many processes, all call this.

    Args:
        store: Of the rows; a part of one (`where`) does as well.
        hook: Which of its activations.
        method: With its settings; `n_components` and `random_state` are set by `k` and `seeds`.
        output: A folder for the dictionaries, `METHOD-kK-seedS` each; those that are there are left as they are.
        k: Numbers of concepts.
        seeds: Seeds.
        trainer: Runs it; one process on the CPU unless given here or by options.
        trainer_options: For `lightning.Trainer` (`accelerator`, `devices`, `strategy`, ...).

    Returns:
        What was learnt in this run, in order.

    Raises:
        BadInputError: If the rows can't be used, or do not allow a k.
    """
    module = Learning(store, hook, dict(variants(method, k, seeds)), Path(output))
    if trainer is None:
        trainer = quiet_trainer(
            **{"accelerator": "cpu", "devices": 1, "max_epochs": -1, "log_every_n_steps": 1, **trainer_options}
        )
    trainer.fit(module)
    return module.learnt


def table(learnt: Sequence[Learnt]) -> str:
    """The dictionaries of a run as a table for people."""
    width = max((len(one.name) for one in learnt), default=4)
    lines = [f"{'dictionary':<{width}}  steps  seconds  relative error  active  dead"]
    lines += [
        f"{one.name:<{width}}  {one.steps:>5}  {one.seconds:>7.1f}  {one.relative_error:>14.4f}  {one.active:>6.2f}  "
        f"{one.dead:>4}"
        for one in learnt
    ]
    return "\n".join(lines)
