"""The small texts of the explorer's page as HTML: what is being done, what went wrong, what waits to be sent."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from PIL import Image

from hooked_mm.drawing import bounded_uri
from hooked_mm.explorer.markup import panels_html
from hooked_mm.explorer.tab import View

HEAD = "<div class='hm-head'><b>hooked-mm</b> explorer<span>ask, look inside, intervene</span></div>"

HINT = "<p class='hm-hint'>Ask first, then press Look.</p>"

CSS = """
.hm-head { font-size: 1.35rem; padding: .4rem 0; }
.hm-head span { font-size: .9rem; opacity: .7; margin-left: .8rem; }
.hm-hint, .hm-about { opacity: .75; margin: .2rem 0; font-size: .92rem; }
.hm-error { border-left: 4px solid #c82800; padding: .3rem .7rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.hm-progress { display: flex; gap: .8rem; align-items: center; font-size: .92rem; }
.hm-progress progress { width: 16rem; height: .6rem; }
.hm-tray { display: flex; gap: .4rem; flex-wrap: wrap; align-items: center; font-size: .85rem; }
.hm-tray img { height: 56px; border-radius: 4px; }
.hm-python summary { cursor: pointer; opacity: .8; margin-top: .6rem; }
.hm-python pre { overflow-x: auto; padding: .6rem; font-size: .85rem;
  border: 1px solid var(--border-color-primary, #ddd); }
.hm-control { flex: 1 1 180px !important; min-width: min(180px, 100%) !important; }
.hm-tokens label { padding: 2px 8px !important; }
"""


def about_html(about: str) -> str:
    """What a tab says of itself."""
    return f"<p class='hm-about'>{escape(about)}</p>"


def error_html(reason: str) -> str:
    """What went wrong."""
    return f"<div class='hm-error' role='alert'>{escape(reason)}</div>"


def progress_html(told: str, share: float | None) -> str:
    """What is being done, with a bar: of how much, where that is known."""
    value = "" if share is None else f" value='{min(max(share, 0.0), 1.0):.3f}'"
    return f"<div class='hm-progress' role='status'><progress{value}></progress><span>{escape(told)} …</span></div>"


def tray_html(pictures: Sequence[Image.Image], told: str = "with the next question") -> str:
    """Pictures that wait, and what for."""
    if not pictures:
        return ""
    shown = "".join(f"<img alt='picture {n + 1}' src='{bounded_uri(one, 112)}'>" for n, one in enumerate(pictures))
    return f"<div class='hm-tray'>{escape(told)}: {shown}</div>"


def view_html(view: View) -> str:
    """All panels of a view, and its Python behind a fold."""
    python = f"<details class='hm-python'><summary>Python</summary><pre>{escape(view.python)}</pre></details>"
    return panels_html(view.panels) + (python if view.arrays else "")


def side_titles(names: Sequence[str]) -> list[str]:
    """What the sides are called: by their models; where one model sees two pictures, by that."""
    return [f"{name}, the other picture" if name in names[:place] else name for place, name in enumerate(names)]


def visible(word: str) -> str:
    """A token as a person can see it: where it is space or holds what does not show, by its name."""
    return word if word.strip() and word.isprintable() else repr(word)
