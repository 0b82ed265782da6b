"""A run of extraction: the samples that are left, dealt out to processes, batch by batch into one store.

Every process takes a share of the samples that no finished shard holds, whatever number of processes wrote those.
No collective is called while batches run, so no process waits for another before the end.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader
from tqdm import tqdm

from hooked_mm.data import SampleDataModule
from hooked_mm.errors import StoreError
from hooked_mm.extraction import halves, is_out_of_memory
from hooked_mm.loading import Batches, BatchMaker, OnError, Prepared, deal
from hooked_mm.reader import Extracted, Reader
from hooked_mm.store import ActivationStore
from hooked_mm.store_format import read_manifest
from hooked_mm.store_writer import StoreWriter

LISTED = 20
"""Skipped samples that the summary names one by one; more are counted by reason."""


class _Together:
    """What processes agree on at the start and the end, over a gloo group that waits as long as the slowest takes."""

    def __init__(self) -> None:
        self.many = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.rank = dist.get_rank() if self.many else 0
        self.size = dist.get_world_size() if self.many else 1
        # A run over night must not end in the default of half an hour.
        self.group = dist.new_group(backend="gloo", timeout=timedelta(days=30)) if self.many else None

    def first_does(self, what: Callable[[], Any]) -> Any:
        """The first process does it, before any other goes on; what it raises, all raise."""
        if not self.many:
            return what()
        told: list[Any] = [None, None]
        if not self.rank:
            try:
                told[0] = what()
            except Exception as error:
                told[1] = error
        dist.broadcast_object_list(told, src=0, group=self.group)
        if told[1] is not None:
            raise told[1]
        return told[0]

    def wait(self) -> None:
        """Until all are here."""
        if self.many:
            dist.barrier(group=self.group)


class Extraction(lightning.LightningModule):
    """The extractor at work in one process, and the samples that are left to it.

    The model is no submodule, so that Lightning leaves its weights where they are.
    """

    def __init__(
        self, extractor: Reader, data: SampleDataModule, path: Path, resume: bool, on_error: OnError, **shards: Any
    ) -> None:
        super().__init__()
        self.extractor, self.data, self.path = extractor, data, path
        self.resume, self.on_error, self.shards = resume, on_error, shards
        self.ids = data.ids()
        self.writer: StoreWriter | None = None

    def setup(self, stage: str) -> None:
        self.extractor.load(self.trainer.strategy.root_device)

    def predict_dataloader(self) -> DataLoader:
        """Called once in every process, when all are there and the model is loaded."""
        self.together = _Together()
        made_by = {**self.extractor.made_by(), "data": self.data.describe()}

        def open_writer() -> StoreWriter:
            return StoreWriter(self.path, made_by, resume=self.resume, rank=self.together.rank, **self.shards)

        def begin() -> None:
            self.writer = open_writer()
            foreign = self.writer.done() - set(self.ids)
            if foreign:
                raise StoreError(
                    f"{str(self.path)!r} holds sample {min(foreign)!r}, which this data set has not; continue it with "
                    "its own data, or choose another path"
                )

        self.together.first_does(begin)
        if self.writer is None:
            self.writer = open_writer()
        done = self.together.first_does(self.writer.done)
        left = [number for number, name in enumerate(self.ids) if name not in done]
        self.share = deal(left, self.together.rank, self.together.size, self.data.batch_size)
        extractor = self.extractor
        self.make = BatchMaker(
            self.data.dataset,
            extractor.model,
            extractor.answer,
            extractor.answer_prefix,
            self.on_error,
            extractor.answers if extractor.answer == "stored" else None,
        )
        self.batches = Batches(self.make, self.share, self.data.batch_size, extractor.max_positions)
        return DataLoader(self.batches, batch_size=None, num_workers=self.data.num_workers)

    def transfer_batch_to_device(self, batch: Prepared, device: Any, dataloader_idx: int) -> Prepared:
        """The extractor places what it needs where the model is."""
        return batch

    def predict_step(self, prepared: Prepared) -> list[Extracted]:
        """One batch, or its halves if it is too large for memory."""
        if prepared.batch is None or len(prepared.numbers) <= self.batches.batch_size:
            try:
                return [self.extractor.represent(prepared)]
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if len(prepared.numbers) == 1:
                    (sample,) = prepared.samples
                    reason = "there is not enough memory for it, even alone"
                    return [Extracted(skipped=[*prepared.skipped, self.make.skip(sample, reason)])]
        # Outside the handler, which would keep what the failed step had in memory.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.batches.shrink((len(prepared.numbers) + 1) // 2)
        found = [Extracted(skipped=prepared.skipped)]
        for half in halves(self.make, prepared.numbers):
            found += self.predict_step(half)
        return found


class _Store(Callback):
    """Hands each batch to the store as it comes."""

    def on_predict_batch_end(self, trainer: Any, module: Extraction, outputs: list[Extracted], *_: Any) -> None:
        assert module.writer is not None
        for part in outputs:
            module.writer.add(part.values, part.rows, part.samples, part.skipped)


class _Progress(Callback):
    """A bar with rate and time left, and the same as scalars where the trainer has a logger."""

    def __init__(self, every: float = 10.0) -> None:
        self.every = every

    def on_predict_start(self, trainer: Any, module: Extraction) -> None:
        name = "samples" if module.together.size == 1 else f"samples of process 1 of {module.together.size}"
        total, first = len(module.share), trainer.is_global_zero
        self.bar = tqdm(total=total, desc=name, unit="sample", disable=not first, dynamic_ncols=True, smoothing=0.05)
        self.start = self.last = time.monotonic()
        self.counts: Counter[str] = Counter()

    def on_predict_batch_end(self, trainer: Any, module: Extraction, outputs: list[Extracted], *_: Any) -> None:
        for part in outputs:
            self.counts["samples"] += len(part.samples)
            self.counts["skipped"] += len(part.skipped)
            self.counts["rows"] += len(part.rows)
            self.counts["positions"] += part.positions
            self.bar.update(len(part.samples) + len(part.skipped))
        now = time.monotonic()
        per_second = self.counts["positions"] / max(now - self.start, 1e-9)
        self.bar.set_postfix_str(f"{per_second:,.0f} tokens/s, {self.counts['skipped']} skipped", refresh=False)
        if trainer.logger is not None and now - self.last >= self.every:
            self.last = now
            self._log(trainer, now)

    def on_predict_end(self, trainer: Any, module: Extraction) -> None:
        self.bar.close()
        if trainer.logger is not None:
            self._log(trainer, time.monotonic())

    def _log(self, trainer: Any, now: float) -> None:
        seconds = max(now - self.start, 1e-9)
        rates = {f"{name} per second": self.counts[name] / seconds for name in ("samples", "positions")}
        step = self.counts["samples"] + self.counts["skipped"]
        trainer.logger.log_metrics({**{k: float(v) for k, v in self.counts.items()}, **rates}, step)


def quiet() -> None:
    """Keep Lightning from telling which devices it does not use, and from advertising."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")


def quiet_trainer(**options: Any) -> lightning.Trainer:
    """A Trainer without loggers, checkpoints, summaries, bars and advertisements."""
    quiet()
    defaults: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "use_distributed_sampler": False,
    }
    return lightning.Trainer(**{**defaults, **options})


def extract(
    extractor: Reader,
    data: SampleDataModule,
    path: str | Path,
    *,
    resume: bool = False,
    on_error: OnError = "skip",
    trainer: lightning.Trainer | None = None,
    megabytes_per_shard: float = 256,
    seconds_per_shard: float = 300,
    **trainer_options: Any,
) -> ActivationStore:
    """Run an extraction and open the store it made; in a run of many processes, every one of them calls this.

    Args:
        extractor: What to extract, from which model.
        data: The samples.
        path: The store's directory, the same for all processes.
        resume: Go on with a store that a cut-off run left there, on however many processes.
        on_error: A sample that can't be used is listed in the store and left out (`"skip"`), or ends the run
            (`"stop"`).
        trainer: Runs it; one process on the CPU unless given here or by options.
        megabytes_per_shard: See `StoreWriter`.
        seconds_per_shard: See `StoreWriter`.
        trainer_options: For `lightning.Trainer` (`accelerator`, `devices`, `num_nodes`, `strategy`, ...).

    Raises:
        StoreError: If the directory can't be used, or the run ended early (the store can then be resumed).
        BadInputError: If two samples share an id, the folder of pictures is missing, or for a bad sample where that
            ends the run.
    """
    folder = Path(path)
    if (folder / "manifest.json").exists() and read_manifest(folder)["complete"]:
        # Before a large model is loaded for nothing.
        raise StoreError(f"{str(path)!r} already holds a store, which is complete; open it, or choose another path")
    data.check()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are forked
    job = Extraction(
        extractor,
        data,
        folder,
        resume,
        on_error,
        megabytes_per_shard=megabytes_per_shard,
        seconds_per_shard=seconds_per_shard,
    )
    if trainer is None:
        trainer = quiet_trainer(**{"accelerator": "cpu", "devices": 1, **trainer_options})
    trainer.callbacks += [_Store(), _Progress()]
    try:
        trainer.predict(job, return_predictions=False)
    except BaseException:
        # Whatever ended the run, what it has done is kept.
        if job.writer is not None:
            job.writer.flush()
            job.writer.release()
        raise
    assert job.writer is not None
    job.writer.flush()
    job.together.wait()
    job.together.first_does(lambda: _close(job))
    store = ActivationStore.open(folder)
    if not job.together.rank:
        print(summary(store))
    return store


def _close(job: Extraction) -> None:
    assert job.writer is not None
    missing = set(job.ids) - job.writer.done()
    if missing:
        job.writer.release()
        raise StoreError(
            f"the run ended with {len(missing)} of {len(job.ids)} samples left; {str(job.path)!r} keeps the others: "
            "run it again with resume=True"
        )
    job.writer.close()


def summary(store: ActivationStore) -> str:
    """What a run has made: rows and samples, and every sample it had to skip with the reason."""
    lines = [f"{len(store)} rows of {store.samples.num_rows} samples in {str(store.path)!r}"]
    if store.skipped.num_rows:
        total = store.skipped.num_rows + store.samples.num_rows
        lines.append(f"{store.skipped.num_rows} of {total} samples skipped:")
        entries = store.skipped.to_pylist()
        if len(entries) <= LISTED:
            lines += [f"  {entry['sample']}: {entry['reason']}" for entry in entries]
        else:
            reasons = Counter(entry["reason"] for entry in entries)
            lines += [f"  {count} x {reason}" for reason, count in reasons.most_common(LISTED)]
            lines.append(f"  each of them: ActivationStore.open({str(store.path)!r}).skipped")
    return "\n".join(lines)
