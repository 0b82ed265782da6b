"""Direct logit attribution over a data set: what heads, MLPs and visual tokens put into the answers' logits.

    hooked-mm analyse logit-attribution --model.id small:llava --data ScenesDataModule --data.task question \\
        --data.size 40 --output runs/shares

Explained are the answers' first tokens (or those that `--which` says), without a foil. Scores are mean shares per
layer: of heads from image positions, of heads from text, of MLPs; and of the whole. Writes `heads.csv` with every
head's mean share from either, a heat table of heads, and, for the answers of the gallery, the share of every head from
every position (`shares.safetensors`, names like `sample-0/answer-0/layer-3`). The gallery shows maps: what each patch
puts into the answer through all heads.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from analyses.by_sample import ratio_by_sample
from analyses.frame import finish, new_parser, parsed
from analyses.gallery import Entry, write_gallery
from analyses.heat_table import heat_figure
from analyses.logit_attribution import LogitShares, logit_attribution
from analyses.map_overlay import SIDE, blended, scale_of, told
from analyses.model_samples import Samples, add_model, loaded, samples_of
from analyses.pair_options import rounded
from analyses.picture_maps import picture_maps
from analyses.result import Result, Score
from analyses.targets import NoTargetsError, Targets, answer_targets, special_ids
from hooked_mm.batch import Batch, Modality
from hooked_mm.data import Sample
from hooked_mm.drawing import enlarge
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.intervals import bootstrap
from hooked_mm.prepare import load_images
from hooked_mm.tensor_folder import write_folder


@dataclass
class Found:
    """What was found so far, a row per target.

    Attributes:
        samples: The sample of each.
        kinds: Kind of part -> its share.
        layers: (what, modality, layer) -> its share.
        heads: (layer, head) -> its share from image positions, and from others.
        arrays: Shares of every position.
        entries: Of a gallery.
        unsplit: Layers whose heads could not be split by position, and why.
    """

    samples: list[int] = field(default_factory=list)
    kinds: dict[str, list[float]] = field(default_factory=dict)
    layers: dict[tuple[str, str, int], list[float]] = field(default_factory=dict)
    heads: dict[tuple[int, int], list[tuple[float, float]]] = field(default_factory=dict)
    arrays: dict[str, Tensor] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    unsplit: dict[int, str] = field(default_factory=dict)

    def add(self, made: LogitShares, visual: Tensor) -> None:
        """Take in the shares of a batch."""
        self.unsplit |= made.unsplit
        for kind, values in {**made.by_kind(visual), "all parts": made.total(), "the logit": made.logits}.items():
            self.kinds.setdefault(kind, []).extend(values.tolist())
        for layer, parts in made.sources.items():
            seen, other = (parts * visual[:, None]).sum(2), (parts * ~visual[:, None]).sum(2)
            for modality, values in (("image", seen), ("text", other)):
                self.layers.setdefault(("heads", modality, layer), []).extend(values.sum(1).tolist())
            for head in range(parts.shape[1]):
                both = zip(seen[:, head].tolist(), other[:, head].tolist(), strict=True)
                self.heads.setdefault((layer, head), []).extend(both)
        for label in made.labels:
            if label.endswith("_mlp_out"):
                key = ("MLPs", "all", int(label.split("_")[0]))
                self.layers.setdefault(key, []).extend(made.of(label).tolist())


def entry(
    model: HookedMM, sample: Sample, batch: Batch, targets: Targets, made: LogitShares, number: int, visual: Tensor
) -> Entry:
    """A target's parts, and what each patch puts into it."""
    row, images = int(targets.sample[number]), load_images(sample.images)
    token = model.tokenizer.convert_ids_to_tokens(int(targets.token[number]))
    kinds = {kind: float(values[number]) for kind, values in made.by_kind(visual).items()}
    facts = [("token", token), ("logit", float(made.logits[number])), *kinds.items()]
    pictures = [("the picture", enlarge(image, SIDE)) for image in images]
    if images and made.sources:
        try:
            maps = picture_maps(model, batch, row, made.by_position()[number], images)
        except BadInputError as error:
            return Entry(f"{sample.id}: {token}", facts, pictures, f"{sample.text}\n(no map: {error.reason})")
        scale = scale_of(*(one.values for one in maps), signed=True)
        for one in maps:
            drawn = blended(images[one.picture], one.values, one.box, scale=scale, signed=True)
            pictures.append((f"heads from patches{' (overview)' if one.overview else ''}: {told(one.values)}", drawn))
    return Entry(f"{sample.id}: {token}", facts, pictures, sample.text)


def find(model: HookedMM, samples: Samples, made: Any) -> Found:
    """Shares of all answers of all samples."""
    found, seen = Found(), 0
    for some, batch in samples:
        try:
            targets = answer_targets(batch, made.which, special_ids(model))
        except NoTargetsError:
            samples.skipped += [f"{one.id}: no answer with such a token" for one in some]
            continue
        shares = logit_attribution(model, batch, targets, made.layers)
        text = batch.decoder or batch
        visual = (text.modality == Modality.IMAGE).cpu()[targets.sample.cpu()]
        if not shares.sources:
            raise BadInputError(
                "no layer's heads can be split by position: "
                + "; ".join(f"layer {layer}: {why}" for layer, why in shares.unsplit.items())
            )
        found.add(shares, visual)
        answers: dict[int, int] = {}
        for number, row in enumerate(targets.sample.tolist()):
            answer = answers.get(row, 0)
            answers[row] = answer + 1
            found.samples.append(seen + row)
            if len(found.entries) < made.gallery:
                name = f"sample-{seen + row}/answer-{answer}"
                real = (text.modality[row] != Modality.PAD).cpu()
                for layer, parts in shares.sources.items():
                    found.arrays[f"{name}/layer-{layer}"] = parts[number][:, real]
                found.entries.append(entry(model, some[row], batch, targets, shares, number, visual))
        seen += len(some)
    return found


def mean(values: Sequence[float], samples: Sequence[int]) -> Float64[Tensor, " s"]:
    """A value per sample whose mean is that over targets."""
    return ratio_by_sample(np.asarray(values), np.ones(len(values)), np.asarray(samples))


def scored(found: Found, made: Any) -> list[Score]:
    """Mean shares with bootstrap intervals over samples."""
    rows: list[tuple[str, str, int | None, Sequence[float]]] = [
        *(
            (f"{what}, mean share of the logit", modality, layer, v)
            for (what, modality, layer), v in found.layers.items()
        ),
        *(("mean share of the logit", kind, None, values) for kind, values in found.kinds.items()),
    ]
    about = {"rows": len(found.samples), "samples": len(set(found.samples))}
    made_of = []
    for what, modality, layer, values in rows:
        band = bootstrap(mean(values, found.samples), draws=made.draws, seed=made.seed)
        value, low, high = (float(end) for end in band)
        made_of.append(Score(what, modality, layer, value, low, high, **about))
    return made_of


def main(argv: Sequence[str] | None = None) -> None:
    """The command `hooked-mm analyse logit-attribution`."""
    parser = new_parser("logit-attribution", __doc__)
    add_model(parser, "given")
    parser.add_argument(
        "--which", type=str | list[int], default="first", help="of an answer's tokens: first, all, [0, 2]"
    )
    parser.add_argument("--layers", type=list[int] | None, help="whose heads are split by position; all that can be")
    parser.add_argument("--gallery", type=int, default=12, help="answers that are shown, and whose shares are written")
    made = parsed(parser, argv)
    if made.answer == "none" or made.draws < 1:
        raise BadInputError(f"answer={made.answer!r}, draws={made.draws}: answers must stand there; one draw at least")
    model = loaded(made)
    samples = samples_of(made, model)
    found = find(model, samples, made)
    if not found.samples:
        raise BadInputError("no sample has an answer to explain; take others, or --answer generated")
    settings = {name: made[name] for name in ("which", "layers", "answer", "draws", "seed")}
    result = Result("logit-attribution", made.name or made.model.name, scored(found, made), settings, samples.notes())
    result.notes += rounded(model)
    result.notes += [f"layer {layer} is not split by position: {why}" for layer, why in found.unsplit.items()]
    layers, heads = (sorted({place[side] for place in found.heads}) for side in (0, 1))
    table = np.full((len(layers), len(heads)), np.nan)
    with open(made.output / "heads.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["layer", "head", "image", "text"])
        for (layer, head), values in found.heads.items():
            both = torch.tensor(values, dtype=torch.float64).mean(0).tolist()
            writer.writerow([layer, head, *both])
            table[layers.index(layer), heads.index(head)] = both[0]
    title = "mean share of the logit from image positions"
    figure = heat_figure(table, list(map(str, layers)), [f"head {head}" for head in heads], title)
    figure.savefig(made.output / "heads.png", dpi=120)
    write_folder(made.output, "shares", found.arrays, {"of": "each sample's own positions, padding left out"})
    if found.entries:
        write_gallery(made.output / "gallery.html", "logit attribution", found.entries, result.notes)
    finish(result, made.output)
