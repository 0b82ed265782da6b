"""What a model says to a data set under many settings of steering, each sample's beside what it says unsteered.

A `Reader`, so that it runs on any number of processes into a store, which an interruption leaves resumable. Per batch,
pictures are encoded and prompts computed once (`hooked_mm.prefix`); settings are then answered side by side, so many
rows at a time. The store has no rows; its table of samples has

    text      what the unsteered model says
    steered   what it says under each setting, in their order
    kl        with `side_effects`: per setting, what steering does to the next token's distribution
    nll       with `surprise`: per setting, how surprising the unsteered model finds what is said
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mm.data import SampleDataModule
from hooked_mm.errors import BadInputError, StoreError
from hooked_mm.extraction import is_out_of_memory
from hooked_mm.extraction_job import extract
from hooked_mm.generation import GenerationOutput, until_end
from hooked_mm.hooked import HookedMM
from hooked_mm.loading import Prepared
from hooked_mm.prefix import SharedPrompts
from hooked_mm.reader import Extracted, ModelSource, Reader, sample_rows, versions
from hooked_mm.steering_vector import SteeringVector, last_part
from hooked_mm.store import ActivationStore
from hooked_mm.store_format import read_manifest
from steering.setting import Setting, side_by_side
from steering.side_effects import next_token_kl, token_nll


class SteeredAnswers(Reader):
    """Answers of every prompt, unsteered and under each setting.

    Args:
        model: The hooked model, or where to load it from.
        settings: How to steer.
        max_new_tokens: Longest answer.
        answer_prefix: How every answer begins.
        rows: Samples times settings in one generation at most.
        side_effects: Also measure the KL divergence of the first answered token's distribution from the unsteered one.
        surprise: Also measure the negative log-likelihood of what is said under the unsteered model, whose exponential
            is the perplexity; a forward pass more over every answer.
        max_positions: About so many positions in a batch of prompts at most.
        force: Do not refuse vectors of another model.

    Raises:
        BadInputError: If there are no settings, or a vector is none of this model.
    """

    def __init__(
        self,
        model: HookedMM | ModelSource,
        settings: Sequence[Setting],
        *,
        max_new_tokens: int = 20,
        answer_prefix: str | None = None,
        rows: int = 256,
        side_effects: bool = False,
        surprise: bool = False,
        max_positions: int | None = None,
        force: bool = False,
    ) -> None:
        if not settings or rows < 1:
            raise BadInputError(f"{len(settings)} settings, rows={rows}; at least one of each is needed")
        self.settings, self.max_new_tokens, self.rows = list(settings), max_new_tokens, rows
        self.side_effects, self.surprise, self.force = side_effects, surprise, force
        super().__init__(model, "none", answer_prefix, max_positions)

    def _attach(self, model: HookedMM) -> None:
        super()._attach(model)
        parts = [part for setting in self.settings for part in setting.parts]
        acting = [one for part in parts for one in (part.vector, part.second, part.gate and part.gate.saved)]
        for vector in acting:
            if isinstance(vector, SteeringVector) and not self.force:
                vector.check_model(model)

    def asked(self) -> dict[str, Any]:
        """What of the manifest is known without the model."""
        return {
            "answer_prefix": self.answer_prefix,
            "max_new_tokens": self.max_new_tokens,
            "side_effects": self.side_effects,
            "surprise": self.surprise,
            "settings": [setting.fingerprint() for setting in self.settings],
        }

    def made_by(self) -> dict[str, Any]:
        """What the store's manifest says."""
        return {**self.whose(), **self.asked(), "versions": versions()}

    @torch.no_grad()
    def represent(self, prepared: Prepared) -> Extracted:
        """The answers of one batch; where memory is not enough for so many rows, of fewer at a time from then on."""
        if prepared.batch is None:
            return Extracted(skipped=prepared.skipped)
        device = self.model.device
        batch = prepared.batch.to(device)
        pictures = None if prepared.pictures is None else prepared.pictures.to(device)
        told: dict[str, list[Any]] | None = None
        while told is None:
            try:
                told = self._told(SharedPrompts(self.model, batch, pictures, prepared.picture_of), len(batch))
            except Exception as error:
                # With as many rows as samples, only fewer samples help, which the run sees to.
                if not is_out_of_memory(error) or self.rows <= len(batch):
                    raise
            if told is None:
                self.rows = max(len(batch), self.rows // 2)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
        positions = int(batch.inputs["attention_mask"].sum())
        return Extracted(samples=sample_rows(prepared, **told), skipped=prepared.skipped, positions=positions)

    def _told(self, prompts: SharedPrompts, count: int) -> dict[str, list[Any]]:
        """What the table of samples says of each."""
        said: list[list[str]] = [[] for _ in range(count)]
        kl: list[list[float]] = [[] for _ in range(count)]
        nll: list[list[float]] = [[] for _ in range(count)]
        first: Tensor | None = None
        for part in self._parts(count):
            rows = [row for _ in part for row in range(count)]
            hooks = side_by_side([setting for setting in part for _ in range(count)])
            output = prompts.generate(rows, hooks, self.max_new_tokens, return_logits=self.side_effects)
            for row, text in zip(rows, output.text, strict=True):
                said[row].append(text)
            if output.logits is not None:
                # The first part begins with the model as it is.
                first = output.logits[:count, 0].clone() if first is None else first
                for row, one in zip(rows, next_token_kl(first.repeat(len(part), 1), output.logits[:, 0]), strict=True):
                    kl[row].append(float(one))
            if self.surprise:
                for row, one in zip(rows, self._surprise(output), strict=True):
                    nll[row].append(float(one))
        told: dict[str, list[Any]] = {"text": [row[0] for row in said], "steered": [row[1:] for row in said]}
        # With those of the unsteered model in front.
        return told | ({"kl": kl} if self.side_effects else {}) | ({"nll": nll} if self.surprise else {})

    def _parts(self, samples: int) -> Iterator[list[Setting]]:
        """The settings, the unsteered one first, so many at a time as make `rows` rows."""
        settings, each = [Setting(), *self.settings], max(1, self.rows // samples)
        return (settings[start : start + each] for start in range(0, len(settings), each))

    def _surprise(self, output: GenerationOutput) -> Float[Tensor, " rows"]:
        """Mean negative log-likelihood, in nats a token, of what was said, under the unsteered model."""
        assert output.batch is not None  # prepared batches are always extended
        new = output.tokens.shape[1]
        logits = self.model.run_with_hooks(output.batch, logits_to_keep=new + 1)
        assert logits is not None
        nll = token_nll(logits[:, -new - 1 : -1], output.tokens)
        kept = until_end(output.tokens, self.model.hf_model.generation_config.eos_token_id)
        # Padding may be impossible to the model, and 0 times infinity would be no number.
        return nll.where(kept, 0).sum(dim=1) / kept.sum(dim=1).clamp_min(1)


@dataclass(frozen=True)
class Answers:
    """What was said, of one data set.

    Attributes:
        samples: Per sample the data set's columns and the store's own.
        texts: Per setting, what was said to each sample; the unsteered model stands first.
        kl: (settings, samples) KL of the next token's distribution from the unsteered one, in nats, or None.
        nll: (settings, samples) surprise of the unsteered model at what was said, in nats a token.
    """

    samples: list[dict[str, Any]]
    texts: list[list[str]]
    kl: Float[Tensor, "s n"] | None = None
    nll: Float[Tensor, "s n"] | None = None

    @classmethod
    def of(cls, store: ActivationStore) -> Answers:
        """Those of a store.

        Raises:
            BadInputError: If it holds none.
        """
        if "steered" not in store.samples.column_names:
            raise BadInputError(f"the store {str(store.path)!r} holds no steered answers; make one with `answer`")
        rows = store.samples.to_pylist()
        if not rows:
            raise BadInputError(f"the store {str(store.path)!r} holds no samples: all were skipped, see its `skipped`")
        texts = [[row["text"], *row["steered"]] for row in rows]
        measured = {
            name: torch.tensor([row[name] for row in rows]).T for name in ("kl", "nll") if rows[0].get(name) is not None
        }
        return cls(rows, [list(said) for said in zip(*texts, strict=True)], **measured)


def answer(
    model: HookedMM | ModelSource,
    data: SampleDataModule,
    settings: Sequence[Setting],
    path: str | Path,
    *,
    resume: bool = False,
    on_error: Any = "skip",
    options: Mapping[str, Any] | None = None,
    **trainer_options: Any,
) -> Answers:
    """Let a model answer a data set under settings, into a store; a complete one of the same is read, with `resume`.

    Args:
        model: The hooked model, or where to load it from.
        data: The samples.
        settings: How to steer.
        path: The store's folder.
        resume: Go on with what a cut-off run left, or read what a finished one made.
        on_error: As in `extract`.
        options: Of `SteeredAnswers`.
        trainer_options: As in `extract`.

    Raises:
        StoreError: As `extract`; or if what is there was made with other settings, data or model.
    """
    reader = SteeredAnswers(model, settings, **(options or {}))
    if resume and (found := finished(Path(path), reader, data)) is not None:
        return Answers.of(found)
    return Answers.of(extract(reader, data, path, resume=resume, on_error=on_error, **trainer_options))


def finished(folder: Path, reader: SteeredAnswers, data: SampleDataModule) -> ActivationStore | None:
    """The complete store that a run would make, if it is there already.

    Raises:
        StoreError: If a complete store is there, but of other settings, data or another model.
    """
    if not (folder / "manifest.json").exists():
        return None
    manifest = read_manifest(folder)
    if not manifest["complete"]:
        return None
    told = {**reader.asked(), "data": data.describe()}
    if isinstance(reader.source, HookedMM):
        told |= reader.whose()
    # A folder lies elsewhere on every machine.
    model = told.pop("model", None) if isinstance(reader.source, HookedMM) else reader.source.id
    told = json.loads(json.dumps(told, default=str))
    old = manifest["made_by"]
    changed = [name for name, value in told.items() if old.get(name) != value]
    if last_part(str(old.get("model"))) != last_part(str(model)):
        changed.append("model")
    if isinstance(reader.source, ModelSource):
        # As far as it can be told without loading the model.
        known: dict[str, Any] = {"adapter": reader.source.adapter, "dtype": reader.source.dtype.removeprefix("torch.")}
        known = {name: value for name, value in known.items() if value != "auto"}
        if re.fullmatch("[0-9a-f]{40}", reader.source.revision or ""):
            known["revision"] = reader.source.revision
        changed += [name for name, value in known.items() if old.get(name) != value]
    if changed:
        raise StoreError(
            f"the answers in {str(folder)!r} are complete, but were made otherwise ({', '.join(changed)} differ); use "
            "the same settings or another path"
        )
    store = ActivationStore.open(folder)
    held = {name for table in (store.samples, store.skipped) for name in table.column("sample").to_pylist()}
    if odd := held ^ set(data.ids()):
        raise StoreError(
            f"the answers in {str(folder)!r} are complete, but are those of other data ({len(odd)} samples differ, "
            f"{min(odd)!r} among them); use the same data or another path"
        )
    return store
