"""The Python of a class or function, where there is some."""

from __future__ import annotations

import inspect
import textwrap
from typing import Any


def source_of(code: Any) -> str:
    """The source of a class or function, from its left margin; empty for what was typed in or compiled."""
    try:
        return textwrap.dedent(inspect.getsource(code))
    except (OSError, TypeError):
        return ""
