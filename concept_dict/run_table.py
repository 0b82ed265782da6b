"""The folder of a run, and what TensorBoard's table of runs (HPARAMS) compares: settings beside what came of them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sklearn.base import BaseEstimator
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from hooked_mm.errors import BadInputError

Setting = str | bool | int | float


def output_folder(path: str | Path) -> Path:
    """The folder, made with those above it: before a run, so that none ends without a place for what it found.

    Raises:
        BadInputError: If it can't be made.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInputError(f"the output folder {str(folder)!r} can't be made ({error}); choose another") from error
    return folder


def method_settings(method: BaseEstimator) -> dict[str, Setting]:
    """Method, number of concepts, seed, and other parameters that are not as they are unless given.

    The names are the same for every method, since TensorBoard takes them from one run of the table.
    """
    given: dict[str, Any] = method.get_params()
    usual = {name: known.default for name, known in inspect.signature(type(method)).parameters.items()}
    own = {name: value for name, value in given.items() if name not in ("n_components", "random_state")}
    changed = {name: "given" if isinstance(v, Tensor) else v for name, v in own.items() if v is not usual[name]}
    return {
        "method": type(method).__name__,
        "k": int(given.get("n_components") or 0),
        "seed": str(given.get("random_state", "")),
        "other": ", ".join(f"{name}={value}" for name, value in changed.items() if value != usual[name]),
    }


def compare_runs(
    writer: SummaryWriter, settings: Mapping[str, Setting], found: Mapping[str, float], step: int | None = None
) -> None:
    """Numbers as scalars, and as what the settings led to.

    Both stand in the run's own file, so that a run stays one line.

    Args:
        writer: Of the run.
        settings: What it was made with; without any there are only scalars.
        found: Tag -> number.
        step: Where the scalars' points lie.
    """
    for tag, value in found.items():
        writer.add_scalar(tag, value, step)
    if settings:
        for summary in hparams(dict(settings), dict(found)):
            writer._get_file_writer().add_summary(summary)


def text_columns(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Cells under each other: the first `left` columns to the left, as text is read, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
