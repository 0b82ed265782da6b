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
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from concept_dict.decomposition import Decomposition
from concept_dict.dictionary import ConceptDictionary
from concept_dict.rows import Rows
from concept_dict.run_table import compare_runs, method_settings
from hooked_mm.errors import BadInputError
from hooked_mm.extraction_job import quiet_trainer
from hooked_mm.run_output import output_folder
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


RESULTS = ("relative_error", "active", "dead", "steps", "seconds")
"""What of a dictionary TensorBoard's table of runs shows."""


def variants(
    method: Decomposition, ks: Sequence[int], seeds: Sequence[int], start: Decomposition | None = None
) -> Iterator[tuple[str, Decomposition]]:
    """The decompositions of a sweep by name; a method without chance has one seed.

    Args:
        method: With its settings.
        ks: Numbers of concepts.
        seeds: Seeds.
        start: A fit to start from.

    Raises:
        BadInputError: If there is no k or no seed, or the method can't start from it.
    """
    if not ks or not seeds:
        raise BadInputError(f"k={list(ks)}, seeds={list(seeds)}: give at least one of each")
    chance = "random_state" in method.get_params()
    if start is not None and list(ks) != [size := len(start.components_)]:
        raise BadInputError(f"the start has {size} concepts, but k={list(ks)}; give k=[{size}]")
    for k in ks:
        for seed in seeds if chance else [None]:
            made = clone(method).set_params(n_components=k, **({"random_state": seed} if chance else {}))
            if start is not None:
                made.start_from(start)
            yield f"{type(method).__name__}-k{k}" + (f"-seed{seed}" if chance else ""), made


class Learning(lightning.LightningModule):
    """Decompositions fitted one after the other to the same rows.

    Args:
        store: Of the rows.
        hook: Which of its activations.
        jobs: Name -> unfitted decomposition.
        output: A folder in which each gets one of its name; those that are there already are left. In `log` each has a
            run of TensorBoard.
        made_by: Where the rows come from, kept with each dictionary.
    """

    def __init__(
        self,
        store: ActivationStore,
        hook: str,
        jobs: Mapping[str, Decomposition],
        output: Path,
        made_by: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        # A Trainer refuses a module without parameters. Concepts are none: no gradient is taken for them.
        self.idle = torch.nn.Parameter(torch.zeros(()))
        self.store, self.hook, self.output, self.made_by = store, hook, output, made_by
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
            # A run of its own for each, so that their curves lie over each other; what one that was cut off left goes.
            self.writer = (
                SummaryWriter(self.output / "log" / self.name, purge_step=0) if self.trainer.is_global_zero else None
            )
        done = self.job.step()
        self.steps += 1
        progress = self.job.progress()
        self.bar.set_postfix({key: f"{value:.5g}" for key, value in progress.items()}, refresh=False)
        self.bar.update()
        if self.writer is not None:
            for key, value in progress.items():
                self.writer.add_scalar(key, value, self.steps)
        if done:
            self._keep(self.job)
            self.job = None

    def _keep(self, job: Decomposition) -> None:
        active = job.end()
        self.bar.close()
        size, processes = self.rows.size(job.center), self.rows.processes
        counts = processes.sum((active != 0).sum(dim=0))
        folder = self.output / self.name
        learnt = Learnt(
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
        self.learnt.append(learnt)
        if self.writer is not None:
            ConceptDictionary(job, self.hook, self.made_by).save(folder)
            # At k, so that the points of a sweep show what more concepts bring.
            found = {f"result/{name.replace('_', ' ')}": float(getattr(learnt, name)) for name in RESULTS}
            compare_runs(self.writer, method_settings(job), found, learnt.k)
            self.writer.close()


def learn(
    store: ActivationStore,
    hook: str,
    method: Decomposition,
    output: str | Path,
    *,
    k: Sequence[int] | None = None,
    seeds: Sequence[int] = (0,),
    where: Mapping[str, Any] | None = None,
    start: ConceptDictionary | str | Path | None = None,
    trainer: lightning.Trainer | None = None,
    **trainer_options: Any,
) -> list[Learnt]:
    """Fit a method to the rows of a store, once for every k and seed; in a run of many processes, all call this.

    Args:
        store: Of the rows; a part of one (`store.where`) does as well.
        hook: Which of its activations.
        method: With its settings; `n_components` and `random_state` are set by `k` and `seeds`.
        output: A folder for the dictionaries, `METHOD-kK-seedS` each; those that are there are left as they are.
        k: Numbers of concepts; 20, or as many as the start has, unless given.
        seeds: Seeds.
        where: Conditions on rows, as `ActivationStore.where` takes them; kept with the dictionaries.
        start: A dictionary of the same hook, or its folder, to start from; for methods that can (`start_from`).
        trainer: Runs it; one process on the CPU unless given here or by options.
        trainer_options: For `lightning.Trainer` (`accelerator`, `devices`, `strategy`, ...).

    Returns:
        What was learnt in this run, in order.

    Raises:
        BadInputError: If the rows can't be used, or do not allow a k or the start.
    """
    store, made_by = store.where(**where or {}), dict(store.made_by)
    if where:
        made_by["where"] = dict(where)
    first: Decomposition | None = None
    if start is not None:
        first = _start(start, store, hook).decomposition
        made_by["start"] = repr(start.decomposition) if isinstance(start, ConceptDictionary) else str(start)
    ks = k if k is not None else ((20,) if first is None else (len(first.components_),))
    jobs = dict(variants(method, ks, seeds, first))
    store.activations(hook, slice(0, 0))  # refuses a hook that is not there
    module = Learning(store, hook, jobs, output_folder(output), made_by)
    if trainer is None:
        trainer = quiet_trainer(
            **{"accelerator": "cpu", "devices": 1, "max_epochs": -1, "log_every_n_steps": 1, **trainer_options}
        )
    trainer.fit(module)
    return module.learnt


def _start(start: ConceptDictionary | str | Path, store: ActivationStore, hook: str) -> ConceptDictionary:
    """The dictionary to start from, if it is of such rows."""
    found = start if isinstance(start, ConceptDictionary) else ConceptDictionary.load(start)
    if found.hook != hook:
        raise BadInputError(f"the start has concepts of {found.hook!r}, not of {hook!r}; give one of this hook")
    width, own = store.activations(hook, slice(0, 0)).shape[1], found.concepts.shape[1]
    if own != width:
        raise BadInputError(f"the start's concepts have width {own}, the rows {width}; give a dictionary of this model")
    return found


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
