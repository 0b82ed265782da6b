"""What an analysis found: scores per layer and modality, with what they were computed of; written, read, compared."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from analyses.curves import Curve, curves_figure
from hooked_mm.errors import BadInputError
from hooked_mm.run_output import output_folder, text_columns
from hooked_mm.store_format import write_json

RESULT, TABLE = "result.json", "scores.csv"


@dataclass(frozen=True)
class Score:
    """One number.

    Attributes:
        score: What it is, as a plot's title: `linearity`, `TwoNN dimension`.
        modality: Of which rows: `all`, `text`, `image`.
        layer: Of the stream; of a pair of layers the first. None where it is of none.
        value: The number.
        low, high: Its bootstrap interval; NaN without one.
        rows: How many rows it was computed of.
        samples: Of how many samples.
        left_out: Rows that had to be left out, as duplicates.
    """

    score: str
    modality: str
    layer: int | None
    value: float
    low: float = math.nan
    high: float = math.nan
    rows: int = 0
    samples: int = 0
    left_out: int = 0


@dataclass
class Result:
    """All scores of one run.

    Attributes:
        analysis: Its name, as it is typed.
        model: What to call the model in tables and plots.
        scores: In the order in which they are shown.
        settings: What it was made with.
        notes: What a reader must know: rows left out, scores that could not be had.
    """

    analysis: str
    model: str
    scores: list[Score]
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def kinds(self) -> list[str]:
        """The names of its scores, in their order."""
        return list(dict.fromkeys(score.score for score in self.scores))

    def of(self, score: str, modality: str | None = None) -> list[Score]:
        """The scores of one name, and of one modality if one is given, by layer."""
        found = [one for one in self.scores if one.score == score and modality in (None, one.modality)]
        return sorted(found, key=lambda one: -1 if one.layer is None else one.layer)

    def write(self, folder: str | Path) -> Path:
        """`scores.csv`, `result.json`, a plot per score (`NAME.png`), and a run of TensorBoard in `tensorboard/`.

        TensorBoard has a scalar per score and modality, its steps are layers; and the plots.

        Args:
            folder: Made if it is not there.

        Raises:
            BadInputError: If it can't be made.
        """
        out = output_folder(folder)
        names = [item.name for item in fields(Score)]
        with open(out / TABLE, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["analysis", "model", *names])
            writer.writeheader()
            writer.writerows({"analysis": self.analysis, "model": self.model, **_row(one)} for one in self.scores)
        write_plots([self], out)
        with SummaryWriter(str(out / "tensorboard")) as board:
            board.add_text("notes", "\n".join(f"- {note}" for note in self.notes) or "none")
            for name in self.kinds():
                if (figure := score_figure([self], name)) is not None:
                    board.add_figure(name, figure)
                # Steps in their order: TensorBoard takes a step back for a run that began anew.
                for one in self.of(name):
                    if math.isfinite(one.value):
                        board.add_scalar(f"{name}/{one.modality}", one.value, one.layer or 0)
        # Last, as its presence says that the run is whole.
        write_json(out / RESULT, {**asdict(self), "scores": [_row(one) for one in self.scores]})
        return out

    @classmethod
    def load(cls, folder: str | Path) -> Result:
        """What `write` wrote.

        Raises:
            BadInputError: If the folder holds no result, or a damaged one.
        """
        file = Path(folder) / RESULT
        if not file.is_file():
            raise BadInputError(f"{str(folder)!r} holds no {RESULT}; give the output folder of an analysis")
        try:
            told = json.loads(file.read_text())
            scores = [Score(**{name: _number(name, value) for name, value in row.items()}) for row in told["scores"]]
            return cls(told["analysis"], told["model"], scores, told["settings"], told["notes"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInputError(f"{str(file)!r} is not an analysis's result ({error!r}); run it again") from error

    def table(self) -> str:
        """Scores by layer as text, a column per modality."""
        lines: list[str] = []
        for name in self.kinds():
            own = self.of(name)
            modalities = list(dict.fromkeys(one.modality for one in own))
            layers = list(dict.fromkeys(one.layer for one in own))
            by = {(one.layer, one.modality): one for one in own}
            body = [
                ["" if layer is None else str(layer), *(_cell(by.get((layer, modality))) for modality in modalities)]
                for layer in layers
            ]
            lines += [name, *text_columns([["layer", *modalities], *body]), ""]
        return "\n".join([*lines, *self.notes]).rstrip()


def in_order(scores: Sequence[Score], names: Sequence[str], modalities: Sequence[str]) -> list[Score]:
    """Scores by name, then modality, then layer, whatever processes found them; those of other names are left out."""
    by_layer = sorted(scores, key=lambda one: one.layer or 0)
    wanted = [(name, modality) for name in names for modality in modalities]
    return [one for pair in wanted for one in by_layer if (one.score, one.modality) == pair]


def curves_of(results: Sequence[Result], score: str) -> list[Curve]:
    """One score of one or more models over layers, as far as it is known at two layers."""
    curves = []
    for result in results:
        for modality in dict.fromkeys(one.modality for one in result.of(score)):
            own = [one for one in result.of(score, modality) if one.layer is not None and math.isfinite(one.value)]
            if len(own) > 1:
                points = [(one.layer, one.value, one.low, one.high) for one in own]
                curves.append(Curve(modality, result.model, *map(list, zip(*points, strict=True))))
    return curves


def score_figure(results: Sequence[Result], score: str) -> Any:
    """One score over layers as a picture; None if it is known at no two layers."""
    curves = curves_of(results, score)
    return curves_figure(curves, score) if curves else None


def file_name(score: str) -> str:
    """A score's name as that of a file."""
    return "".join(letter if letter.isalnum() else "_" for letter in score).strip("_")


def write_plots(results: Sequence[Result], folder: Path) -> list[Path]:
    """A picture per score that is known at several layers."""
    written = []
    for name in dict.fromkeys(kind for result in results for kind in result.kinds()):
        if (figure := score_figure(results, name)) is not None:
            written.append(folder / f"{file_name(name)}.png")
            figure.savefig(written[-1], dpi=120)
    return written


def compare(results: Sequence[Result], folder: str | Path) -> list[Path]:
    """Draw several models' scores into one plot each: base and fine-tuned, trained and untrained.

    Args:
        results: Of the same analysis, of models called differently.
        folder: For the pictures and one `scores.csv` of all.

    Raises:
        BadInputError: If there are fewer than two, they are of several analyses, or two are called the same.
    """
    kinds, names = {result.analysis for result in results}, [result.model for result in results]
    if len(results) < 2 or len(kinds) > 1 or len(set(names)) < len(names):
        raise BadInputError(
            f"results of {', '.join(sorted(kinds)) or 'nothing'}, of the models {names}; compare two or more results "
            "of one analysis, of models that are called differently"
        )
    out = output_folder(folder)
    with open(out / TABLE, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["analysis", "model", *(item.name for item in fields(Score))])
        writer.writeheader()
        for result in results:
            rows = ({"analysis": result.analysis, "model": result.model, **_row(one)} for one in result.scores)
            writer.writerows(rows)
    return write_plots(results, out)


def touching(first: Score, second: Score) -> bool:
    """Whether the intervals of two scores have a number in common; those without one touch everything."""
    ends = (first.low, first.high, second.low, second.high)
    return not all(map(math.isfinite, ends)) or (first.low <= second.high and second.low <= first.high)


def _row(score: Score) -> dict[str, Any]:
    """As a row of a table: what is not known is empty (JSON has no NaN)."""
    told = asdict(score)
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in told.items()}


def _number(name: str, value: Any) -> Any:
    return math.nan if value is None and name in ("value", "low", "high") else value


def _cell(score: Score | None) -> str:
    if score is None or not math.isfinite(score.value):
        return "-"
    band = f" [{score.low:.4g}, {score.high:.4g}]" if math.isfinite(score.low) else ""
    return f"{score.value:.4g}{band}"
