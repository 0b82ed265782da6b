"""The program `hooked-mm`: a thin dispatcher to commands that packages contribute.

A command is an entry point of the group `hooked_mm.commands`: its name, and a function that takes the arguments behind
the name. Nothing heavy is imported before a command is chosen; the list shows the first line of each command's module.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points, version
from importlib.util import find_spec

from hooked_mm.errors import HookedMMError, nearest

GROUP = "hooked_mm.commands"


def commands() -> dict[str, EntryPoint]:
    """Every installed command by name, from this project or from others."""
    return {entry.name: entry for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name)}


def summary(entry: EntryPoint) -> str:
    """The first line of the docstring of the command's module, read without importing it."""
    try:
        spec = find_spec(entry.module)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        return f"(its module {entry.module} is not installed)"
    with open(spec.origin, encoding="utf-8") as source:
        text = ast.get_docstring(ast.parse(source.read())) or ""
    return text.splitlines()[0] if text else ""


def usage() -> str:
    """What `hooked-mm --help` prints."""
    known = commands()
    width = max((len(name) for name in known), default=0)
    lines = [f"  {name:<{width}}  {summary(entry)}" for name, entry in known.items()]
    return "\n".join(
        [
            "usage: hooked-mm COMMAND [arguments]",
            "",
            "Vision-language models from the inside: read, name and change what happens in them.",
            "",
            "commands:",
            *lines,
            "",
            "hooked-mm COMMAND --help    what a command takes",
            "hooked-mm --version         this version",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 2 for bad usage or bad input, 130 for an interruption."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"hooked-mm {version('hooked-mm')}")
        return 0
    known = commands()
    name, *rest = arguments
    if name not in known:
        print(f"hooked-mm: no command {name!r}{nearest(name, known)}; see hooked-mm --help", file=sys.stderr)
        return 2
    try:
        known[name].load()(rest)
    except HookedMMError as error:
        print(f"hooked-mm {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"hooked-mm {name}: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
