"""Extraction: from samples to an activation store, through Lightning's `Trainer.predict`.

Per batch: prepare, generate the answer or take the given one, one forward pass over prompt and answer, gather the
selected positions. Text that was generated is run again by its token ids, so positions are those the model produced.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.callbacks import BasePredictionWriter, TQDMProgressBar
from PIL import Image
from torch import Tensor

from hooked_mm.batch import Batch, Modality, Role, count_positions
from hooked_mm.data import Loaded, Sample, SampleDataModule
from hooked_mm.errors import BadInputError, StoreError
from hooked_mm.hooked import HookedMM
from hooked_mm.runner import match_names
from hooked_mm.selectors import Selector, gather
from hooked_mm.store import ActivationStore, StoreWriter

AnswerSource = Literal["generated", "given", "none"]
OWN_COLUMNS = ("sample", "image", "prompt", "text", "answer")
"""What the store itself says of a sample; a data set's own columns must be called otherwise."""


@dataclass(frozen=True)
class Extracted:
    """The store's share of one batch; see `StoreWriter.add`."""

    values: dict[str, Tensor]
    rows: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    skipped: list[dict[str, str]]


class Extractor(lightning.LightningModule):
    """Turns batches of loaded samples into representations.

    Args:
        model: The hooked model; it is not a submodule, so Lightning leaves its weights where they are.
        hooks: Hook names or globs of the text stream.
        selector: Which positions represent a sample.
        answer: `"generated"` by the model, `"given"` by the samples (one pass only), or `"none"`: prompts alone.
        max_new_tokens: Longest generated answer.
    """

    def __init__(
        self,
        model: HookedMM,
        hooks: str | Sequence[str],
        selector: Selector,
        answer: AnswerSource = "generated",
        max_new_tokens: int = 40,
    ) -> None:
        super().__init__()
        if answer not in ("generated", "given", "none"):
            raise BadInputError(f"answer={answer!r}; it must be 'generated', 'given' or 'none'")
        self.model, self.selector = model, selector
        self.answer, self.max_new_tokens = answer, max_new_tokens
        self.hook_names = match_names(hooks, model.hook_names)
        points = model.hook_points
        foreign = [name for name in self.hook_names if points[name].stream != "text" or points[name].form != "vector"]
        if foreign:
            raise BadInputError(f"{foreign[0]!r} is not a (batch, pos, d) point of the language model; choose others")
        layers = [points[name].layer for name in self.hook_names]
        # Blocks above the deepest one asked for need not run.
        inside = [layer for layer in layers if layer is not None]
        self._stop = max(inside) + 1 if len(inside) == len(layers) else None

    def made_by(self) -> dict[str, Any]:
        """What the store's manifest says."""
        config = self.model.hf_model.config
        return {
            "model": config._name_or_path,
            "revision": getattr(config, "_commit_hash", None),
            "family": self.model.cfg.family,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "hooks": self.hook_names,
            **self.selector.describe(),
            "answer": self.answer,
            "max_new_tokens": self.max_new_tokens,
            "versions": {name: version(name) for name in ("hooked-mm", "torch", "transformers", "nnsight")},
        }

    def _batch(self, samples: list[Sample], pictures: list[list[Image.Image]]) -> tuple[Batch, list[str | None]]:
        """The batch to read from, and the answers as text."""
        text, answers = [sample.text for sample in samples], [sample.answer for sample in samples]
        if self.answer == "generated":
            generated = self.model.generate(self.model.prepare(pictures, text), self.max_new_tokens)
            assert generated.batch is not None  # prepared batches are always extended
            return generated.batch, list(generated.text)
        if self.answer == "given" and None in answers:
            raise BadInputError("has no answer, but given answers were asked for", answers.index(None))
        return self.model.prepare(pictures, text, answers if self.answer == "given" else None), answers

    @torch.no_grad()
    def predict_step(self, loaded: Loaded) -> Extracted:
        """Representations of one batch."""
        samples, pictures, skipped = list(loaded.samples), list(loaded.pictures), list(loaded.skipped)
        clashing = sorted({name for sample in samples for name in sample.columns} & set(OWN_COLUMNS))
        if clashing:
            raise BadInputError(f"the data set's columns {clashing} are names of the store's own; rename them")
        batch: Batch | None = None
        answers: list[str | None] = []
        while samples and batch is None:
            try:
                batch, answers = self._batch(samples, pictures)
            except BadInputError as error:
                if error.sample is None:
                    raise
                skipped.append({"sample": samples.pop(error.sample).id, "reason": error.reason})
                pictures.pop(error.sample)
        if batch is None:
            return Extracted({}, [], [], skipped)
        picks = self.selector(batch, self.model.tokenizer)
        _, cache = self.model.run_with_cache(batch, self.hook_names, stop_at_layer=self._stop)
        modality, role = batch.modality.tolist(), batch.role.tolist()
        # As the sample counts its own tokens, whatever padding its companions bring.
        position = count_positions(batch.inputs["attention_mask"]).tolist()
        rows = [
            {
                "sample": samples[pick.sample].id,
                # A mean has no one position.
                "position": position[pick.sample][pick.positions[0]] if len(pick.positions) == 1 else None,
                "modality": Modality(modality[pick.sample][pick.positions[-1]]).name.lower(),
                "role": Role(role[pick.sample][pick.positions[-1]]).name.lower(),
                "word": pick.word,
            }
            for pick in picks
        ]
        table = [
            {
                **sample.columns,
                "sample": sample.id,
                "image": _path_of(sample),
                "prompt": sample.text,
                "text": answer,
                "answer": sample.answer,
            }
            for sample, answer in zip(samples, answers, strict=True)
        ]
        return Extracted({name: gather(cache[name], picks) for name in self.hook_names}, rows, table, skipped)


def _path_of(sample: Sample) -> str | None:
    return str(sample.images) if isinstance(sample.images, str | os.PathLike) else None


class _Writer(BasePredictionWriter):
    """Hands each batch to the store as it comes."""

    def __init__(self, writer: StoreWriter) -> None:
        super().__init__("batch")
        self.writer = writer

    def write_on_batch_end(self, trainer: Any, module: Any, prediction: Extracted, *_: Any) -> None:
        self.writer.add(prediction.values, prediction.rows, prediction.samples, prediction.skipped)


def quiet_trainer(**options: Any) -> lightning.Trainer:
    """A Trainer without loggers, checkpoints, summaries and advertisements; a progress bar stays."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    defaults: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "callbacks": [],
    }
    merged = {**defaults, **options}
    merged["callbacks"] = [*merged["callbacks"], TQDMProgressBar(refresh_rate=1)]
    return lightning.Trainer(**merged)


def extract(
    extractor: Extractor, data: SampleDataModule, path: str | Path, *, resume: bool = False, **trainer_options: Any
) -> ActivationStore:
    """Run an extraction on one process and open the store it made.

    Args:
        extractor: What to extract, from which model.
        data: The samples.
        path: The store's directory.
        resume: Go on with a store that a cut-off run left there.
        trainer_options: For `lightning.Trainer`.

    Raises:
        StoreError: If the directory can't be used, or the run ended early (the store can then be resumed).
    """
    ids = data.ids()
    data.without(set())  # refuses repeated ids before anything is written
    made_by = {**extractor.made_by(), "data": data.describe()}
    writer = StoreWriter(path, made_by, resume=resume, rows_per_shard=4096)
    foreign = writer.done() - set(ids)
    if foreign:
        raise StoreError(
            f"{str(path)!r} holds sample {min(foreign)!r}, which this data set has not; continue it with its own "
            "data, or choose another path"
        )
    left = data.without(writer.done())
    trainer = quiet_trainer(**{"accelerator": "cpu", "devices": 1, **trainer_options, "callbacks": [_Writer(writer)]})
    try:
        if len(left.dataset):  # type: ignore[arg-type]
            trainer.predict(extractor, left, return_predictions=False)
    finally:
        # Whatever ended the run, what it has done is kept.
        writer.flush()
    missing = set(ids) - writer.done()
    if missing:
        raise StoreError(
            f"the run ended with {len(missing)} of {len(ids)} samples left; {str(path)!r} keeps the others: run it "
            "again with resume=True"
        )
    store = writer.close()
    if store.skipped.num_rows:
        reasons = Counter(store.skipped.column("reason").to_pylist())
        lines = "\n".join(f"  {count} x {reason}" for reason, count in reasons.most_common(5))
        print(
            f"{store.skipped.num_rows} of {store.skipped.num_rows + store.samples.num_rows} samples skipped:\n{lines}"
        )
    return store
