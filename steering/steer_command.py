"""Steer a model: compute vectors, apply them, evaluate what they do, sweep over layers and alphas.

    hooked-mm steer compute -c compute.yaml
    hooked-mm steer apply|evaluate|sweep -c steer.yaml

Nothing heavy is imported before one of these is chosen.
"""

from __future__ import annotations

from importlib import import_module

from hooked_mm.command_table import CommandTable

COMMANDS: dict[str, tuple[str, str, str]] = {
    "compute": ("compute_command", "main", "steering vectors of an activation store's rows, with controls"),
    "apply": ("apply_command", "main", "answers of a model with steering vectors added"),
    "evaluate": ("sweep_command", "evaluate_main", "what one setting does: effect, damage, intervals, controls"),
    "sweep": ("sweep_command", "main", "the same over layers x alphas x vectors, with the Pareto front"),
}
"""Command -> module of this package, function in it, and what it does."""

TABLE = CommandTable(
    "steer", (__doc__ or "").splitlines()[0], COMMANDS, lambda module: import_module(f"steering.{module}")
)
main = TABLE.run
