"""A page of docs/ run as it stands: its Python and its commands in their order, in one session, as a reader would."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"


def run_page(name: str, **mains: Callable[[Sequence[str]], object]) -> dict[str, Any]:
    """Run the blocks of a page; of its shell blocks the lines that call `hooked-mm COMMAND`, by the main of that name.

    Returns:
        The names that its Python has made.
    """
    names: dict[str, Any] = {}
    for language, block in re.findall(r"```(python|bash)\n(.*?)```", (DOCS / name).read_text(), re.DOTALL):
        if language == "python":
            exec(block, names)
            continue
        lines = [shlex.split(line) for line in block.splitlines() if line.startswith("hooked-mm ")]
        assert lines, f"a block of {name} calls no command"
        for _, command, *arguments in lines:
            mains[command](arguments)
    return names


def broken_links(name: str, web: bool = False) -> list[str]:
    """Links of a page that lead nowhere; those that lead into the web among them, unless the page may have such."""
    links = re.findall(r"\]\(([^)#]+)\)", (DOCS / name).read_text())
    return [link for link in links if not (DOCS / link).exists() and not (web and "://" in link)]
