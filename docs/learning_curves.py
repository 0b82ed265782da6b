"""Draw how the shipped small models learnt, from each one's `training.jsonl`: `python docs/learning_curves.py`."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from hooked_mm.small import SMALL_MODELS, small_model_path

STAGES = {
    "TowerStage": ("1. tower: loss per patch", ("shapes", "colours", "sizes", "positions", "places")),
    "AlignmentStage": ("2. alignment: loss per image token", ("shapes", "colours", "sizes", "positions", "places")),
    "LanguageStage": ("3. language: share of words right", ("question", "caption")),
}


def curves(axes: Axes, lines: list[dict], names: tuple[str, ...]) -> None:
    """One line per measure over the steps of a stage."""
    for name in names:
        axes.plot([line["step"] for line in lines], [line[name] for line in lines], label=name, linewidth=1.2)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)


def main() -> None:
    """Write docs/learning_curves.png: a row per model, a column per stage."""
    figure, grid = plt.subplots(len(SMALL_MODELS), 3, figsize=(12, 3 * len(SMALL_MODELS)), squeeze=False)
    for row, model in zip(grid, SMALL_MODELS, strict=True):
        text = (small_model_path(model) / "training.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        for axes, (stage, (title, names)) in zip(row, STAGES.items(), strict=True):
            curves(axes, [line for line in lines if line["stage"] == stage], names)
            axes.set_title(f"{model}, {title}", fontsize=10)
            axes.set_ylim(bottom=0, top=1 if stage == "LanguageStage" else None)
            axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(Path(__file__).parent / "learning_curves.png", dpi=80)


if __name__ == "__main__":
    main()
