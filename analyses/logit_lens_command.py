"""The logit lens over a data set: an interactive page per sample, all cells as a table, scores over layers.

    hooked-mm analyse logit-lens --model.id small:llava --data ScenesDataModule --data.size 20 --output runs/lens

Writes `index.html`, which leads to a page per sample (`pages/`), `cells/` (Parquet: the words of every token and
layer), and, as every analysis does, scores over layers: how sure the first word is, the entropy, and what is there
already of the last layer's word. On any number of processes, each with its share of the samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float64
from torch import Tensor
from tqdm import tqdm

from analyses.frame import add_layers, everywhere, finish, new_parser, parsed
from analyses.lens_page import IndexEntry, LensSample, lens_sample, write_index, write_lens_page
from analyses.logit_lens import lens_points, logit_lens
from analyses.result import Result, Score
from hooked_mm.data import Sample, SampleDataModule
from hooked_mm.drawing import enlarge
from hooked_mm.errors import BadInputError
from hooked_mm.extraction_job import LISTED
from hooked_mm.hooked import HookedMM
from hooked_mm.intervals import bootstrap
from hooked_mm.loading import Batches, BatchMaker, OnError, Prepared, deal
from hooked_mm.prepare import load_images
from hooked_mm.processes import Processes
from hooked_mm.reader import ModelSource
from hooked_mm.run_output import output_folder

SCORES = (
    "probability of the first word",
    "entropy in nats",
    "agreement with the last layer",
    "probability of the last layer's word",
)
"""Means over a sample's positions, then over samples. The last layer is the deepest one that was asked for."""


@dataclass
class Seen:
    """What is kept of a sample once its page is written.

    Attributes:
        number: In the data set.
        entry: Its line of the index.
        means: (modalities, layers, scores), NaN where the sample has no position of a modality.
        rows: Positions of each modality.
    """

    number: int
    entry: IndexEntry
    means: Float64[Tensor, "modalities layers scores"]
    rows: list[int]


def sample_means(
    sample: LensSample, modalities: Sequence[str]
) -> tuple[Float64[Tensor, "modalities layers scores"], list[int]]:
    """`SCORES` of one sample, and how many positions they are means of.

    Args:
        sample: With words chosen: those of the last layer.
        modalities: `all`, `text`, `image`.

    Raises:
        BadInputError: For another modality, or if no word was chosen.
    """
    cells = sample.lens.cells
    if cells.rank is None or cells.chosen is None:
        raise BadInputError("the lens was read without chosen words; read it with words='last'")
    values = torch.stack([cells.probabilities[..., 0], cells.entropy, cells.rank == 0, cells.chosen], dim=-1).double()
    image = torch.tensor([kind == "image" for kind in sample.kinds])
    masks = {"all": torch.ones_like(image), "text": ~image, "image": image}
    if unknown := [name for name in modalities if name not in masks]:
        raise BadInputError(f"there is no modality {unknown[0]!r}; choose among {', '.join(masks)}")
    means = [values[:, masks[name]].mean(dim=1) for name in modalities]
    return torch.stack(means), [int(masks[name].sum()) for name in modalities]


def scores_of(
    seen: Sequence[Seen], modalities: Sequence[str], layers: Sequence[int], draws: int, seed: int
) -> list[Score]:
    """Means over samples with bootstrap intervals over samples; modalities that no sample has are left out."""
    means = torch.stack([one.means for one in seen])
    found = []
    for place, modality in enumerate(modalities):
        own = means[:, place]
        there = ~own[:, 0, 0].isnan()
        if not there.any():
            continue
        bands = bootstrap(own[there].flatten(1), draws=max(1, draws), seed=seed)
        estimate, low, high = (end.reshape(len(layers), -1).tolist() for end in bands)
        about = {"rows": sum(one.rows[place] for one in seen), "samples": int(there.sum())}
        for which, name in enumerate(SCORES):
            for at, layer in enumerate(layers):
                ends = (low[at][which], high[at][which]) if draws else (float("nan"), float("nan"))
                found.append(Score(name, modality, layer, estimate[at][which], *ends, **about))
    return found


def cells_table(name: str, sample: LensSample) -> pa.Table:
    """A row per token and layer: `word` is what the last layer says at that token, `rank` 0 the first word."""
    lens, cells = sample.lens, sample.lens.cells
    layers, count, top = cells.ids.shape
    ids = cells.ids.numpy().reshape(-1)
    distinct, inverse = np.unique(ids, return_inverse=True)
    texts = pa.DictionaryArray.from_arrays(
        pa.array(inverse.astype(np.int32)), pa.array([sample.text(int(token)) for token in distinct], pa.string())
    )
    each, repeated = np.tile(np.arange(count), layers), np.repeat(np.arange(layers), count)
    chosen = [sample.text(token) for token in ([] if lens.words is None else lens.words.tolist())]
    columns = {
        "sample": pa.array([name] * len(each), pa.string()),
        "position": pa.array(each.astype(np.int32)),
        "kind": pa.array(sample.kinds, pa.string()).take(pa.array(each)),
        "token": pa.array(sample.tokens, pa.string()).take(pa.array(each)),
        "layer": pa.array(np.array(list(lens.layers), np.int16)[repeated]),
        "words": pa.FixedSizeListArray.from_arrays(texts.dictionary_decode(), top),
        "ids": pa.FixedSizeListArray.from_arrays(pa.array(ids), top),
        "probabilities": pa.FixedSizeListArray.from_arrays(pa.array(cells.probabilities.numpy().reshape(-1)), top),
        "entropy": pa.array(cells.entropy.numpy().reshape(-1)),
    }
    if cells.rank is not None and cells.chosen is not None:
        columns["word"] = pa.array(chosen, pa.string()).take(pa.array(each))
        columns["rank"] = pa.array(cells.rank.numpy().reshape(-1))
        columns["probability"] = pa.array(cells.chosen.numpy().reshape(-1))
    return pa.table(columns)


def answered(model: HookedMM, prepared: Prepared, answer: str, max_new_tokens: int) -> tuple[Any, list[str | None]]:
    """The batch with what is said behind its prompts, and that as text."""
    assert prepared.batch is not None
    batch = prepared.batch.to(model.device)
    if answer == "generated":
        output = model.generate(batch, max_new_tokens)
        assert output.batch is not None  # prepared batches are always extended
        return output.batch, list(output.text)
    return batch, [sample.answer if answer == "given" else None for sample in prepared.samples]


def read_samples(
    model: HookedMM, prepared: Prepared, data: Sequence[Sample], made: Any
) -> Iterator[tuple[int, str, LensSample]]:
    """The samples of a batch through the lens: number, id, and what a page shows."""
    batch, said = answered(model, prepared, made.answer, made.max_new_tokens)
    lenses = logit_lens(model, batch, layers=made.layers, point=made.point, top=made.top)
    for place, (number, sample) in enumerate(zip(prepared.numbers, prepared.samples, strict=True)):
        # Batches are prepared without their pictures' pixels.
        pictures = load_images(data[number].images)
        facts = [("model", called(made)), ("point", made.point)]
        shown = lens_sample(model, batch, place, lenses[place], pictures)
        yield number, sample.id, replace(shown, title=sample.id, prompt=sample.text, answer=said[place], facts=facts)


def called(made: Any) -> str:
    """The model's name in tables and plots."""
    return str(made.name or made.model.name)


def _share(made: Any, device: torch.device) -> tuple[list[Seen], list[dict[str, str]], list[int]]:
    """This process's samples, written; those that could not be used; and the layers."""
    everyone, data = Processes(), made.data
    model = made.model.load(device)
    _ = model.tokenizer  # refuses a model without a processor
    layers = list(lens_points(model.hook_names, made.point, made.layers))
    numbers = deal(range(min(made.samples, len(data.ids()))), everyone.rank, everyone.size, data.batch_size)
    make = BatchMaker(data.dataset, model, made.answer, None, made.on_error)
    seen: list[Seen] = []
    skipped: list[dict[str, str]] = []
    writer: pq.ParquetWriter | None = None
    with tqdm(total=len(numbers), desc="samples", unit="sample", disable=bool(everyone.rank)) as bar:
        for prepared in Batches(make, numbers, data.batch_size, made.max_positions):
            bar.update(len(prepared.numbers) + len(prepared.skipped))
            skipped += prepared.skipped
            for number, name, sample in read_samples(model, prepared, data.dataset, made) if prepared.batch else ():
                address = f"pages/{number:05d}.html"
                write_lens_page(made.output / address, sample, {"all samples": "../index.html"})
                table = cells_table(name, sample)
                writer = writer or pq.ParquetWriter(
                    made.output / "cells" / f"{everyone.rank:04d}.parquet", table.schema
                )
                writer.write_table(table)
                small = [enlarge(picture, 72) for picture in sample.pictures]
                entry = IndexEntry(address, name, sample.prompt, sample.answer, len(sample.tokens), small)
                seen.append(Seen(number, entry, *sample_means(sample, made.modalities)))
    if writer is not None:
        writer.close()
    return seen, skipped, layers


def analyse(made: Any, device: torch.device) -> Result:
    """The pages, the table and the result; the index is written by the first process.

    Raises:
        BadInputError: If no sample could be used; it says why.
    """
    everyone = Processes()
    seen, skipped, layers = _share(made, device)
    shares = everyone.gather((seen, skipped))
    seen = sorted((one for share, _ in shares for one in share), key=lambda one: one.number)
    skipped = [one for _, share in shares for one in share]
    notes = [f"skipped {one['sample']}: {one['reason']}" for one in skipped[:LISTED]]
    notes += [f"and {len(skipped) - LISTED} more were skipped"] if len(skipped) > LISTED else []
    if not seen:
        raise BadInputError("no sample could be looked at; " + ("; ".join(notes) or "the data set is empty"))
    scores = scores_of(seen, made.modalities, layers, made.draws, made.seed)
    there = {score.modality for score in scores}
    notes += [f"there are no tokens of modality {name}" for name in made.modalities if name not in there]
    names = ("answer", "max_new_tokens", "point", "layers", "top", "samples", "modalities", "draws", "seed")
    settings = {**{name: made[name] for name in names}, "data": made.data.describe()}
    result = Result("logit-lens", called(made), scores, settings, notes)
    if not everyone.rank:
        write_index(
            made.output / "index.html",
            f"Logit lens: {called(made)}",
            _facts(made, seen, layers, notes),
            [one.entry for one in seen],
        )
    return result


def _facts(made: Any, seen: Sequence[Seen], layers: Sequence[int], notes: Sequence[str]) -> list[tuple[str, str]]:
    """What stands above the index."""
    described: Mapping[str, Any] = made.data.describe()
    facts = [
        ("data", ", ".join(f"{name}: {value}" for name, value in described.items())),
        ("samples", str(len(seen))),
        (
            "layers",
            f"{layers[0]} to {layers[-1]} of {made.point}" if len(layers) > 1 else f"{layers[0]} of {made.point}",
        ),
        ("answers", made.answer),
    ]
    return [*facts, *(("note", note) for note in notes)]


def main(argv: Sequence[str] | None = None) -> None:
    """The command `hooked-mm analyse logit-lens`."""
    parser = new_parser("logit-lens", __doc__)
    parser.add_class_arguments(ModelSource, "model")
    parser.add_subclass_arguments(SampleDataModule, "data", required=True)
    lens = parser.add_argument_group("lens")
    lens.add_argument("--samples", type=int, default=100, help="so many at most, from the first on")
    lens.add_argument("--answer", type=Literal["generated", "given", "none"], default="none", help="behind the prompt")
    lens.add_argument("--max_new_tokens", type=int, default=40, help="of generated answers")
    lens.add_argument("--max_positions", type=int | None, help="about so many positions in a batch at most")
    lens.add_argument("--top", type=int, default=5, help="words per cell")
    lens.add_argument("--on_error", type=OnError, default="skip", help="list a bad sample and go on, or stop")
    lens.add_argument(
        "--trainer", type=dict[str, Any], default={}, help="of Lightning: {accelerator: gpu, devices: 8, strategy: ddp}"
    )
    lens.add_argument("--name", type=str | None, help="what to call the model in tables and plots")
    add_layers(parser)
    made = parsed(parser, argv)
    made.data.check()
    if made.samples < 1:
        raise BadInputError(f"samples={made.samples}: at least one must be looked at")
    for name in ("pages", "cells"):
        output_folder(made.output / name)
    finish(everywhere(made.trainer, lambda device: analyse(made, device)), made.output)
