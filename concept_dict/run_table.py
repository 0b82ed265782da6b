"""What TensorBoard's table of runs (HPARAMS) compares: settings beside what came of them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from sklearn.base import BaseEstimator
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

Setting = str | bool | int | float


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
