"""Steer a model: compute vectors, apply them, evaluate what they do, sweep over layers and alphas.

    hooked-mm steer compute -c compute.yaml
    hooked-mm steer apply|evaluate|sweep -c steer.yaml

Nothing heavy is imported before one of these is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module

from hooked_mm.errors import unknown

COMMANDS: dict[str, tuple[str, str, str]] = {
    "compute": ("compute_command", "main", "steering vectors of an activation store's rows, with controls"),
    "apply": ("apply_command", "main", "answers of a model with steering vectors added"),
    "evaluate": ("sweep_command", "evaluate_main", "what one setting does: effect, damage, intervals, controls"),
    "sweep": ("sweep_command", "main", "the same over layers x alphas x vectors, with the Pareto front"),
}
"""Command -> module of this package, function in it, and what it does."""


def usage() -> str:
    """What `hooked-mm steer --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {does}" for name, (_, _, does) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: hooked-mm steer COMMAND [arguments]",
            "",
            (__doc__ or "").splitlines()[0],
            "",
            "commands:",
            *lines,
            "",
            "hooked-mm steer COMMAND --help    what a command takes",
        ]
    )


def load(name: str) -> Callable[[Sequence[str]], None]:
    """The function of a command.

    Raises:
        BadInputError: If there is no such command; the nearest is offered.
    """
    if name not in COMMANDS:
        raise unknown("command of steer", name, COMMANDS)
    module, function, _ = COMMANDS[name]
    return getattr(import_module(f"steering.{module}"), function)


def main(argv: Sequence[str] | None = None) -> None:
    """The command `hooked-mm steer`."""
    arguments = list(argv or ())
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return
    name, *rest = arguments
    load(name)(rest)
