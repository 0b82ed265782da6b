"""The web page: ask a model, look at what happens inside it, intervene.

    hooked-mm explore --small llava
    hooked-mm explore --model llava-hf/llava-1.5-7b-hf --dtype bfloat16 --device_map auto
    hooked-mm explore --small '[llava, qwen2_vl]' --open '[concepts=runs/demo/dictionary, steering=runs/vectors]'

It listens at 127.0.0.1; `--host` with `--password` shares it. Needs the extra `app`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from hooked_mm.errors import BadInputError

PASSWORD = "HOOKED_MM_PASSWORD"


def build_parser() -> ArgumentParser:
    """What the command takes."""
    parser = ArgumentParser(prog="hooked-mm explore", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=list[str], default=[], help="hub ids or folders; the first is shown first")
    parser.add_argument("--small", type=list[str], default=[], help="shipped small models: llava, idefics2, ...")
    parser.add_argument("--dtype", type=str | None, default=None, help="of --model: bfloat16, float32, ...")
    parser.add_argument("--device_map", type=str | None, default=None, help="of --model: auto, cuda, cpu")
    parser.add_argument("--revision", type=str | None, default=None, help="of --model")
    parser.add_argument("--open", type=list[str], default=[], help="TAB=FOLDER: what a tab shall offer")
    parser.add_argument("--host", type=str, default="127.0.0.1", help="address to listen at")
    parser.add_argument("--port", type=int | None, default=None, help="a free one from 7860 on unless given")
    parser.add_argument("--password", type=str | None, default=None, help=f"for visitors; or the variable {PASSWORD}")
    parser.add_argument("--open_to_all", type=bool, default=False, help="let others in without a password")
    return parser


def single(arguments: Sequence[str]) -> list[str]:
    """`--small llava` as one name more, which is what it means; a list in brackets stays one."""
    made = list(arguments)
    for place, word in enumerate(made):
        name, sign, given = word.partition("=")
        value = given if sign else "".join(made[place + 1 : place + 2])
        if name in ("--model", "--small", "--open") and not value.startswith("["):
            made[place] = f"{name}+{sign}{given}"
    return made


def folders_of(opened: Sequence[str]) -> dict[str, list[Path]]:
    """`TAB=FOLDER` as a table.

    Raises:
        BadInputError: If one is written otherwise, or there is no such folder.
    """
    found: dict[str, list[Path]] = {}
    for one in opened:
        tab, _, folder = one.partition("=")
        if not tab or not folder:
            raise BadInputError(f"--open {one!r} names no tab and folder; write TAB=FOLDER, as concepts=runs/concepts")
        if not Path(folder).is_dir():
            raise BadInputError(f"--open {one!r}: there is no folder {folder!r}")
        found.setdefault(tab, []).append(Path(folder))
    return found


def names_of(made: Any) -> list[Any]:
    """The models that were asked for; the small LLaVA unless any was."""
    from hooked_mm.explorer.conversation import ModelName

    options = {name: made[name] for name in ("dtype", "device_map", "revision") if made[name] is not None}
    names = [ModelName("id", name, tuple(options.items())) for name in made.model]
    names += [ModelName("small", name) for name in made.small]
    return names or [ModelName("small", "llava")]


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> None:
    """Serve the page until it is interrupted."""
    made = build_parser().parse_args(single(sys.argv[1:] if argv is None else argv))
    if find_spec("gradio") is None:
        raise BadInputError("the explorer needs Gradio: pip install 'hooked-mm[app]'")
    password = made.password or os.environ.get(PASSWORD)
    folders, names = folders_of(made.open), names_of(made)
    from hooked_mm.explorer.serving import check_reach, served

    check_reach(made.host, password, made.open_to_all)
    # Only now, as it takes seconds.
    from hooked_mm.explorer import markup, notices
    from hooked_mm.explorer.desk import Desk
    from hooked_mm.explorer.tab import load_tabs
    from hooked_mm.explorer.web_page import Page

    print(f"loading {names[0]} ...", flush=True)
    desk = Desk(names, load_tabs(folders))
    page = Page(desk)
    desk.warm()
    # However it is told to end, its folder of uploads is deleted.
    signal.signal(signal.SIGTERM, _interrupt)
    with served(page, made.host, made.port, password, markup.CSS + notices.CSS, made.open_to_all) as address:
        print(f"the explorer is at {address}  (Ctrl-C ends it)", flush=True)
        threading.Event().wait()
