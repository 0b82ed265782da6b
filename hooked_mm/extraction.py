"""Extraction, a batch at a time: prompts to answers to representations.

Per batch: generate the answer or take the given one, one forward pass over prompt and answer up to the deepest layer
asked for, gather the selected positions. Text that was generated is run again by its token ids, so positions are those
the model produced. `extraction_job` runs this over a data set, on any number of processes, into a store.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hooked_mm.adapter_switch import adapters_off, check_switchable
from hooked_mm.batch import Batch, Modality, Role, count_positions
from hooked_mm.errors import BadInputError
from hooked_mm.generation import until_end
from hooked_mm.hooked import HookedMM
from hooked_mm.image_reuse import encode, proven, without_pictures, write_features
from hooked_mm.loading import AnswerSource, BatchMaker, Prepared
from hooked_mm.reader import Extracted, ModelSource, Reader, sample_rows, versions
from hooked_mm.runner import Hook, match_names
from hooked_mm.selectors import Pick, Selector, gather
from hooked_mm.store import ActivationStore

logger = logging.getLogger(__name__)


class Extractor(Reader):
    """Turns prepared batches into representations.

    Args:
        model: The hooked model, or where to load it from.
        hooks: Hook names or globs of the text stream.
        selector: Which positions represent a sample; several by name, which rows then carry.
        answer: `"generated"` by the model, `"given"` by the samples (one pass only), `"none"`: prompts alone, or
            `"stored"`: generated once before, see `stored`.
        max_new_tokens: Longest generated answer.
        answer_prefix: How every answer begins, given or generated; it has the role of an answer.
        stored: A store whose generated answers are read again, token for token, at other points.
        stored_by: Whose answers these may be: `"itself"`, the same model's, or `"another"` model's with the same
            tokens (its fine-tuned sibling's).
        max_positions: About so many positions in a batch at most, padding counted.
        share_pictures: Encode a picture that several samples of a batch show once, where that is proven to change
            nothing.
        adapter_off: Read the model with its adapters switched off: its base.

    Raises:
        BadInputError: For settings that do not fit each other or the model.
    """

    def __init__(
        self,
        model: HookedMM | ModelSource,
        hooks: str | list[str],
        selector: Selector | dict[str, Selector],
        answer: AnswerSource = "generated",
        max_new_tokens: int = 40,
        answer_prefix: str | None = None,
        stored: str | Path | None = None,
        max_positions: int | None = None,
        share_pictures: bool = True,
        stored_by: Literal["itself", "another"] = "itself",
        adapter_off: bool = False,
    ) -> None:
        if answer not in ("generated", "given", "none", "stored"):
            raise BadInputError(f"answer={answer!r}; it must be 'generated', 'given', 'none' or 'stored'")
        if (answer == "stored") != (stored is not None):
            raise BadInputError(f"answer={answer!r}, stored={stored!r}: 'stored' and a store's path belong together")
        if stored_by not in ("itself", "another"):
            raise BadInputError(f"stored_by={stored_by!r}; it must be 'itself' or 'another'")
        self.hooks, self.max_new_tokens, self.stored = hooks, max_new_tokens, stored
        self.selectors = dict(selector) if isinstance(selector, Mapping) else {type(selector).__name__: selector}
        self.share_pictures = share_pictures
        self._shares: bool | None = None if share_pictures else False
        self.stored_by, self.adapter_off = stored_by, adapter_off
        self.answers_of: dict[str, Any] = {}
        """Which model gave the stored answers, if another."""
        self.hook_names: list[str] = []
        super().__init__(model, answer, answer_prefix, max_positions)

    def _attach(self, model: HookedMM) -> None:
        super()._attach(model)
        self.hook_names = match_names(self.hooks, model.hook_names)
        points = model.hook_points
        foreign = [name for name in self.hook_names if points[name].stream != "text" or points[name].form != "vector"]
        if foreign:
            raise BadInputError(f"{foreign[0]!r} is not a (batch, pos, d) point of the language model; choose others")
        layers = [points[name].layer for name in self.hook_names]
        # Blocks above the deepest one asked for need not run.
        inside = [layer for layer in layers if layer is not None]
        self._stop = max(inside) + 1 if len(inside) == len(layers) else None

    def load(self, device: torch.device | str) -> None:
        """Load the model, if it is not there yet, and the stored answers."""
        super().load(device)
        if self.adapter_off:
            check_switchable(self.model.hf_model)
        if self.stored is not None and not self.answers:
            another = self.stored_by == "another"
            self.answers, whose = stored_answers(self.stored, self.made_by(), self.model.tokenizer, another)
            self.answers_of = whose if another else {}

    def settings(self) -> dict[str, Any]:
        """What of the manifest is known without the model."""
        stored = {"stored": None if self.stored is None else str(self.stored)}
        return {
            "selectors": {name: selector.describe() for name, selector in self.selectors.items()},
            "answer": self.answer,
            "answer_prefix": self.answer_prefix,
            **(stored if self.stored_by == "itself" else {**stored, "stored_by": self.stored_by}),
            "max_new_tokens": self.max_new_tokens,
        }

    def made_by(self) -> dict[str, Any]:
        """What the store's manifest says."""
        return {
            **self.whose(adapters=not self.adapter_off),
            "hooks": self.hook_names,
            **self.settings(),
            **({"answers_of": self.answers_of} if self.answers_of else {}),
            "versions": versions(),
        }

    @torch.no_grad()
    def represent(self, prepared: Prepared) -> Extracted:
        """Representations of one batch.

        Raises:
            BadInputError: If the data set's columns have names of the store's own.
        """
        with adapters_off(self.model.hf_model) if self.adapter_off else nullcontext():
            return self._represent(prepared)

    def _represent(self, prepared: Prepared) -> Extracted:
        if prepared.batch is None:
            return Extracted(skipped=prepared.skipped)
        batch = prepared.batch.to(self.model.device)
        shared: Any = nullcontext()
        if self._may_share(prepared, batch):
            assert prepared.pictures is not None
            features = encode(self.model, prepared.pictures.to(self.model.device))
            shared = self.model.hooks([write_features(batch, features, prepared.picture_of)])
            batch = without_pictures(batch)
        with shared:
            batch, texts, tokens = self._answered(batch, prepared)
            picks = [(n, pick) for n, select in self.selectors.items() for pick in select(batch, self.model.tokenizer)]
            # All rows of a sample together.
            picks.sort(key=lambda named: named[1].sample)
            values = self._read(batch, [pick for _, pick in picks])
        table = sample_rows(prepared, text=texts, answer_tokens=tokens)
        ids = [sample.id for sample in prepared.samples]
        computed = int(batch.inputs["attention_mask"].sum())
        return Extracted(values, _rows(batch, picks, ids), table, prepared.skipped, computed)

    def _read(self, batch: Batch, picks: Sequence[Pick]) -> dict[str, Tensor]:
        """The picks' values at every hook, (n, d) each."""
        values: dict[str, Tensor] = {}

        def keep(value: Tensor, hook: Hook) -> None:
            # At once, so that no layer's other positions stay in memory.
            values[hook.name] = gather(value, picks)

        last: dict[str, Any] = {} if self._stop is not None else {"logits_to_keep": 1}
        self.model.run_with_hooks(batch, [(self.hook_names, keep)], stop_at_layer=self._stop, **last)
        return values

    def _may_share(self, prepared: Prepared, batch: Batch) -> bool:
        """Whether pictures are encoded once: proven on the first batch where any occurs twice."""
        if prepared.pictures is None or self._shares is False:
            return False
        if self._shares is None:
            pictures = prepared.pictures.to(self.model.device)
            self._shares = proven(self.model, batch, pictures, prepared.picture_of, self.hook_names)
            if not self._shares:
                logger.warning(
                    "pictures that several samples show are encoded for each of them: in this model features do not "
                    "enter the decoder at hook_embed alone, or depend on the text"
                )
        return self._shares

    def _answered(self, batch: Batch, prepared: Prepared) -> tuple[Batch, list[str | None], list[list[int] | None]]:
        """The batch to read from, and the answers as text and, where generated, as token ids."""
        samples = prepared.samples
        if self.answer == "generated":
            generated = self.model.generate(batch, self.max_new_tokens)
            assert generated.batch is not None  # prepared batches are always extended
            kept = until_end(generated.tokens, self.model.hf_model.generation_config.eos_token_id)
            ids = [row[keep].tolist() for row, keep in zip(generated.tokens, kept, strict=True)]
            return generated.batch, list(generated.text), ids
        if self.answer == "stored":
            said = [self.answers[sample.id] for sample in samples]
            width = max(map(len, said))
            tokens = torch.tensor([row + [0] * (width - len(row)) for row in said], device=self.model.device)
            lengths = torch.tensor([len(row) for row in said], device=self.model.device)
            kept = torch.arange(width, device=self.model.device) < lengths[:, None]
            tokenizer = self.model.tokenizer
            names = [tokenizer.convert_ids_to_tokens(row) for row in tokens.tolist()]
            texts = [tokenizer.decode(row, skip_special_tokens=True).strip() for row in said]
            return batch.extend(tokens, kept, names), list(texts), list(said)
        return batch, [sample.answer if self.answer == "given" else None for sample in samples], [None] * len(samples)


def _rows(batch: Batch, picks: Sequence[tuple[str, Pick]], ids: Sequence[str]) -> list[dict[str, Any]]:
    """What the store says of every pick."""
    modality, role = batch.modality.tolist(), batch.role.tolist()
    # As the sample counts its own tokens, whatever padding its companions bring.
    position = count_positions(batch.inputs["attention_mask"]).tolist()
    return [
        {
            "sample": ids[pick.sample],
            # A mean has no one position.
            "position": position[pick.sample][pick.positions[0]] if len(pick.positions) == 1 else None,
            "modality": Modality(modality[pick.sample][pick.positions[-1]]).name.lower(),
            "role": Role(role[pick.sample][pick.positions[-1]]).name.lower(),
            "word": pick.word,
            "selector": name,
        }
        for name, pick in picks
    ]


def stored_answers(
    path: str | Path, made_by: Mapping[str, Any], tokenizer: Any, another: bool = False
) -> tuple[dict[str, list[int]], dict[str, Any]]:
    """Generated answers of a store.

    Args:
        path: The store.
        made_by: Of the run that will read them.
        tokenizer: Of that run's model.
        another: Whether they may be those of another model.

    Returns:
        Sample -> token ids; and the model that gave them: its `model`, `revision` and `adapter`.

    Raises:
        BadInputError: If the store is of another prompt prefix or, unless that is meant, of another model; if its
            answers were not generated, or if the tokens of another model's spell something else for this one.
    """
    store = ActivationStore.open(path)
    whose = ("model", "revision", "adapter")
    for what in ("answer_prefix",) if another else (*whose, "answer_prefix"):
        if store.made_by.get(what) != made_by[what]:
            remedy = "" if what == "answer_prefix" else " (of another model, if that is meant: stored_by='another')"
            raise BadInputError(
                f"the answers in {str(path)!r} come from {what}={store.made_by.get(what)!r}, this run has "
                f"{made_by[what]!r}; use a store of the same{remedy}, or answer='generated'"
            )
    table = store.samples.to_pydict()
    columns = (table.get(name, [None] * len(table["sample"])) for name in ("answer_tokens", "text"))
    found: dict[str, list[int]] = {}
    for sample, tokens, text in zip(table["sample"], *columns, strict=True):
        if not tokens:
            continue
        read = tokenizer.decode(tokens, skip_special_tokens=True).strip() if another else text
        if read != text:
            raise BadInputError(
                f"the answer of {sample!r} in {str(path)!r} is {text!r}, but its tokens spell {read!r} for this model: "
                "models of different tokenizers can't read each other's answers; let each read its own"
            )
        found[sample] = tokens
    if not found:
        raise BadInputError(f"the store {str(path)!r} holds no generated answers; make it with answer='generated'")
    return found, {name: store.made_by.get(name) for name in whose}


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, says that memory was not enough."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def halves(make: BatchMaker, numbers: Sequence[int]) -> list[Prepared]:
    """The same samples in two batches."""
    half = (len(numbers) + 1) // 2
    return [make(numbers[:half]), make(numbers[half:])]
