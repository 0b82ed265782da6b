"""Commands of a command: `hooked-mm steer compute`, `hooked-mm analyse linearity`; a thin table, nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

from hooked_mm.errors import unknown


@dataclass(frozen=True)
class CommandTable:
    """The commands behind `hooked-mm NAME`.

    Attributes:
        name: As it is typed.
        summary: One line.
        rows: Command -> module of the package, function in it, and what it does, in a line.
        module: Imports a module of the package by its name; called for the command that is chosen alone.
    """

    name: str
    summary: str
    rows: Mapping[str, tuple[str, str, str]]
    module: Callable[[str], ModuleType]

    def usage(self) -> str:
        """What `--help` prints."""
        width = max(map(len, self.rows))
        lines = [f"  {name:<{width}}  {does}" for name, (_, _, does) in self.rows.items()]
        return "\n".join(
            [
                f"usage: hooked-mm {self.name} COMMAND [arguments]",
                "",
                self.summary,
                "",
                "commands:",
                *lines,
                "",
                f"hooked-mm {self.name} COMMAND --help    what a command takes",
            ]
        )

    def run(self, argv: Sequence[str] | None = None) -> None:
        """Hand the arguments behind a command's name on to it; without any, or asked for help, print the usage.

        Raises:
            BadInputError: If there is no such command; the nearest is offered.
        """
        arguments = list(argv or ())
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(self.usage())
            return
        name, *rest = arguments
        if name not in self.rows:
            raise unknown(f"command of {self.name}", name, self.rows)
        module, function, _ = self.rows[name]
        getattr(self.module(module), function)(rest)
