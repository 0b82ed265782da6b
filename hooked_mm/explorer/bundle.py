"""What is downloaded: everything that was shown, with the Python that finds it again.

| in the zip | what |
|---|---|
| `reproduce-TAB.py` | asks again and finds the tab's arrays; writes `again-TAB.safetensors` beside it |
| `arrays-TAB.safetensors` | the numbers behind what the tab showed |
| `picture-1.png`, ... | the pictures of the conversation, in their order |
| `shown/TAB-1-1.png`, ... | the pictures that the tab showed: panel, picture |
| `page.html` | what was shown, as a page that runs no script and asks for nothing |
| `about.json` | versions, model, settings, the conversation |

Two downloads of the same are the same, byte by byte. Nothing in them says where on the server anything
lies, but for folders opened by `--open`, which a tab's Python names as they were given.
"""

from __future__ import annotations

import io
import json
import platform
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from hooked_mm.explorer import markup
from hooked_mm.explorer.asked import Asked
from hooked_mm.explorer.panels import Pictures
from hooked_mm.explorer.tab import View

STAMP = (1980, 1, 1, 0, 0, 0)
"""The date of every file in a zip: the earliest that there is."""

SAVE = """\
save_file(
    {{name: value.detach().cpu().contiguous().clone() for name, value in arrays.items()}},
    here / {file!r},
)
"""


def script(asked: Asked, body: str, name: str = "view") -> str:
    """A program that asks again and finds what was shown again.

    Args:
        asked: The answered question, with its chosen tokens and patches.
        body: A view's Python; it ends with `arrays`.
        name: Of the tab.
    """
    saved = SAVE.format(file=f"again-{name}.safetensors")
    return f"{_asking(asked, saves=True)}\n# What the tab {name!r} shows.\n{body.strip()}\n\n{saved}"


def conversation_script(asked: Asked) -> str:
    """A program that asks again and prints the answer."""
    return f"{_asking(asked, saves=False)}\nprint(generated.text[0])\n"


def _asking(asked: Asked, saves: bool) -> str:
    conversation, options = asked.conversation, asked.generation.options
    several, count = len(conversation.turns) > 1, len(asked.images)
    imports = ["from pathlib import Path", "", "import torch", *(["from PIL import Image"] if count else [])]
    imports += ["from safetensors.torch import save_file"] if saves else []
    imports += ["", "from hooked_mm.hooked import HookedMM"]
    imports += ["from hooked_mm.prompts import Turn"] if several else []
    turns = "".join(
        f"        Turn(text={turn.text!r}, answer={turn.answer!r}, images={turn.images}),\n"
        for turn in conversation.history
    )
    # Texts of visitors and models stand in it as literals alone.
    opened = f'[Image.open(here / f"picture-{{number}}.png").convert("RGB") for number in range(1, {count + 1})]'
    lines = [
        '"""Asks again what was asked in the explorer; the pictures lie beside this file."""',
        "",
        *imports,
        "",
        "here = Path(__file__).parent",
        f"model = {asked.name.portable.python}",
        f"images = {opened if count else []}",
        "history = None" if not several else f"history = [\n    [\n{turns}    ]\n]",
        f"prompt = model.prepare([images or None], [{conversation.turns[-1].text!r}], history=history)",
        f"torch.manual_seed({asked.generation.seed})",
        f"generated = model.generate(prompt, {', '.join(f'{key}={value!r}' for key, value in options.items())})",
        "batch = generated.batch",
        "# The chosen tokens of the answer, and the chosen places: picture, x and y in its pixels.",
        f"tokens = {tuple(asked.tokens)!r}",
        f"points = {tuple((int(picture), float(x), float(y)) for picture, x, y in asked.points)!r}",
        "",
    ]
    return "\n".join(lines)


def about(asked: Asked) -> dict[str, Any]:
    """What made the answer: versions, model, settings, the conversation."""
    number, turns = 0, []
    for turn in asked.conversation.turns:
        files = [f"picture-{number + place + 1}.png" for place in range(len(turn.images))]
        number += len(files)
        turns.append({"user": turn.text, "pictures": files, "model": turn.answer})
    name = asked.name.portable
    return {
        "versions": {
            "hooked-mm": version("hooked-mm"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "model": {"name": str(name), "python": name.python},
        "device": str(asked.model.device),
        "generation": asdict(asked.generation),
        "conversation": turns,
        "answer_tokens": [[token, word] for token, word in zip(asked.numbers, asked.words, strict=True)],
        "chosen_tokens": list(asked.tokens),
        "chosen_points": [list(point) for point in asked.points],
    }


def _png(image: Image.Image) -> bytes:
    made = io.BytesIO()
    # The pixels and nothing else: what a camera wrote beside them is the visitor's own.
    image.convert("RGB").save(made, "PNG", compress_level=3)
    return made.getvalue()


def _arrays(arrays: Mapping[str, Tensor]) -> bytes:
    return save({name: value.detach().cpu().contiguous().clone() for name, value in arrays.items()})


def _zipped(files: Mapping[str, bytes | str]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as whole:
        for name in sorted(files):
            body = files[name]
            data = body.encode("utf-8", "backslashreplace") if isinstance(body, str) else body
            # Pictures are compressed already.
            kind = zipfile.ZIP_STORED if name.endswith(".png") else zipfile.ZIP_DEFLATED
            whole.writestr(zipfile.ZipInfo(name, STAMP), data, kind)
    return made.getvalue()


def _common(asked: Asked, shown_html: str) -> dict[str, bytes | str]:
    files: dict[str, bytes | str] = {
        f"picture-{number + 1}.png": _png(image) for number, image in enumerate(asked.images)
    }
    files["about.json"] = json.dumps(about(asked), indent=2, ensure_ascii=False) + "\n"
    name = str(asked.name.portable)
    files["page.html"] = markup.page_html(name, [markup.conversation_html(asked.conversation, title=name), shown_html])
    return files


def bundle(asked: Asked, views: Mapping[str, View], shown_html: str) -> bytes:
    """A zip of what tabs showed of one question.

    Args:
        asked: The question, its answer, what was chosen.
        views: What was shown, by the tab's name.
        shown_html: The same as HTML that was made by `markup`.
    """
    files = _common(asked, shown_html)
    for name, view in views.items():
        files[f"reproduce-{name}.py"] = script(asked, view.python, name)
        if view.arrays:
            files[f"arrays-{name}.safetensors"] = _arrays(view.arrays)
        for place, panel in enumerate(view.panels):
            for number, picture in enumerate(panel.pictures if isinstance(panel, Pictures) else ()):
                files[f"shown/{name}-{place + 1}-{number + 1}.png"] = _png(picture.image)
    return _zipped(files)


def conversation_bundle(asked: Sequence[Asked]) -> bytes:
    """A zip of conversations alone; of two that are compared, each in a folder of its own."""
    files: dict[str, bytes | str] = {}
    for number, one in enumerate(asked):
        folder = f"side-{number + 1}/" if len(asked) > 1 else ""
        own = _common(one, "") | {"reproduce.py": conversation_script(one)}
        files |= {f"{folder}{name}": body for name, body in own.items()}
    return _zipped(files)
