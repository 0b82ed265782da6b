"""The logit lens as one interactive page per sample, each a single file without outside resources, and their index.

A page holds the picture with its patch grid, the prompt, and a table of tokens x layers. Pointing at a cell shows its
most probable words and where in the picture its token lies; pointing at the picture shows the layer that is most
confident there. What comes from a model, a data set or a user is data: it stands in a JSON block in which no tag can
begin, and reaches the page as text alone; a policy in the page's head lets no other script run than the page's own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from jinja2 import Environment
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from analyses.gallery import environment
from analyses.logit_lens import Lens
from hooked_mm.batch import Batch, Modality, Role
from hooked_mm.drawing import bounded_uri, data_uri, enlarge
from hooked_mm.errors import BadInputError
from hooked_mm.frames import Box, frame
from hooked_mm.hooked import HookedMM

SCRIPTS = ("lens_data.js", "lens_table.js", "lens_pictures.js", "lens.js")
"""The page's script, in parts that follow each other."""

SIDE = 896
"""Pixels of the longer side of a picture at most; less where a sample has several."""


@dataclass(frozen=True)
class View:
    """A grid of patches over a picture.

    Attributes:
        picture: Which of the sample's pictures.
        title: What is shown, for people.
        rows: (rows, cols) int64, the row of the table that each patch has; -1 where it has none. None: no patch has a
            known place, and `title` says why.
        box: (left, top, right, bottom), what the grid covers, as shares of the picture's width and height.
    """

    picture: int
    title: str
    rows: Int[Tensor, "rows cols"] | None = None
    box: Box = (0.0, 0.0, 1.0, 1.0)

    def row_at(self, x: float, y: float) -> int:
        """The row of the table whose patch lies at a place, in shares of width and height; -1 if there is none."""
        if self.rows is None:
            return -1
        left, top, right, bottom = self.box
        down, across = self.rows.shape
        row = math.floor((y - top) / (bottom - top) * down)
        col = math.floor((x - left) / (right - left) * across)
        return int(self.rows[row, col]) if 0 <= row < down and 0 <= col < across else -1


@dataclass(frozen=True)
class LensSample:
    """What a page shows of one sample.

    Attributes:
        title: Of the page.
        lens: What was read.
        tokens: The text of every position.
        kinds: `image`, `template`, `question`, `answer` or `text`, of every position.
        text: Token id -> its text.
        vocabulary: How many words the model has.
        pictures: The sample's pictures.
        views: What is shown of them.
        prompt: What was asked.
        answer: What was said, or None.
        facts: More to tell, (name, value).
    """

    title: str
    lens: Lens
    tokens: Sequence[str]
    kinds: Sequence[str]
    text: Callable[[int], str]
    vocabulary: int
    pictures: Sequence[Image.Image] = ()
    views: Sequence[View] = ()
    prompt: str = ""
    answer: str | None = None
    facts: Sequence[tuple[str, str]] = field(default_factory=tuple)


def token_text(tokenizer: Any) -> Callable[[int], str]:
    """Token id -> the text it spells, with the space in front of a word that some tokenizers decode without.

    A token that spells part of a letter is told by its name in the vocabulary.

    Args:
        tokenizer: A transformers tokenizer; None names tokens by their numbers.
    """
    if tokenizer is None:
        return lambda token: f"#{token}"

    def text(token: int) -> str:
        spelt = str(tokenizer.decode([token]))
        piece = tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str):
            return spelt
        if "\ufffd" in spelt:
            return piece
        begins = piece[:1] in ("▁", "Ġ")
        return f" {spelt}" if begins and not spelt[:1].isspace() else spelt

    return text


def lens_sample(
    model: HookedMM,
    batch: Batch,
    sample: int,
    lens: Lens,
    pictures: Sequence[Image.Image] = (),
) -> LensSample:
    """What a page shall show of a sample of a batch.

    Args:
        model: The model.
        batch: What the lens was read from; its answers, too.
        sample: Index in the batch.
        lens: Of this sample, from `logit_lens`.
        pictures: The sample's, as they were given to `prepare`.

    Returns:
        Title, prompt, answer and facts are left empty: put in your own by `dataclasses.replace`.

    Raises:
        BadInputError: If there are not as many pictures as the sample's part of the batch has.
    """
    read = batch if batch.decoder is None else batch.decoder
    places = lens.positions.tolist()
    text = token_text(None if model.processor is None else model.tokenizer)
    # Positions may be more than ids, where a model puts its images in front by itself.
    ids = read.input_ids[sample].tolist() if read.input_ids.shape == read.modality.shape else None
    tokens = [text(ids[place]) if ids else f"position {place}" for place in places]
    kinds = [_kind(int(read.modality[sample, place]), int(read.role[sample, place])) for place in places]
    views = _views(model, batch, sample, places, pictures)
    vocabulary = int(model.cfg.d_vocab)
    return LensSample("", lens, tokens, kinds, text, vocabulary, pictures, views)


def _kind(modality: int, role: int) -> str:
    if modality == Modality.IMAGE:
        return "image"
    return Role(role).name.lower() if role in (Role.TEMPLATE, Role.QUESTION, Role.ANSWER) else "text"


def _views(
    model: HookedMM, batch: Batch, sample: int, places: Sequence[int], pictures: Sequence[Image.Image]
) -> list[View]:
    """A view per grid of the sample's images; where there is none, one that says why."""
    own = (batch.layout.image_sample == sample).nonzero()[:, 0].tolist()
    if not pictures:
        return []
    if len(own) not in (0, len(pictures)):
        raise BadInputError(
            f"{len(pictures)} pictures were given for a sample of {len(own)} images; give those of the batch", sample
        )
    several = len(pictures) > 1
    # From a position in the batch to a row of the table; the last entry is for no position at all.
    row = torch.full((batch.modality.shape[1] + 1,), -1)
    if batch.decoder is None:
        row[torch.tensor(places)] = torch.arange(len(places))
    found = []
    for number, image in enumerate(pictures):
        name = f"picture {number + 1}" if several else "picture"
        layout = batch.layout.images[own[number]] if own else None
        grids = [] if layout is None else [(layout.grid, False), (layout.overview, True)]
        for grid, overview in grids:
            if grid is None or batch.decoder is not None:
                continue
            left, top, right, bottom = frame(model, image, (grid.shape[0], grid.shape[1]), overview)
            box = (left / image.width, top / image.height, right / image.width, bottom / image.height)
            rows, cols = grid.shape
            what = f"{name}{', overview' if overview else ''}: {rows} x {cols} patches"
            found.append(View(number, what, row[grid.cpu()], box))
        if not found or found[-1].picture != number:
            why = batch.layout.why or "no position of the text stands for a place in the picture"
            found.append(View(number, f"{name}: {why}"))
    return found


def _packed(values: np.ndarray) -> str:
    """Base64 of the values' little-endian bytes."""
    return base64.b64encode(values.astype(values.dtype.newbyteorder("<")).tobytes()).decode()


def _shares(values: np.ndarray) -> str:
    """Numbers from 0 to 1 as 16-bit integers."""
    return _packed(np.rint(np.clip(values, 0, 1) * 65535).astype(np.uint16))


def page_data(sample: LensSample) -> dict[str, Any]:
    """What the page's script reads: see `templates/lens_data.js`. Cells row by row, in a row layer by layer.

    Token ids become places in a list of distinct texts, probabilities and entropies 16-bit shares of what is possible.

    Raises:
        BadInputError: If tokens or kinds are not as many as the lens has positions.
    """
    cells, count = sample.lens.cells, len(sample.lens.positions)
    if not len(sample.tokens) == len(sample.kinds) == count:
        raise BadInputError(
            f"{len(sample.tokens)} tokens and {len(sample.kinds)} kinds for a lens of {count} positions; give one each"
        )
    ids = cells.ids.numpy()
    distinct, inverse = np.unique(ids, return_inverse=True)
    words = dict.fromkeys(sample.text(int(token)) for token in distinct)
    number = {text: place for place, text in enumerate(words)}
    place = np.array([number[sample.text(int(token))] for token in distinct], np.uint32)[inverse.reshape(ids.shape)]
    place = place.transpose(1, 0, 2)
    kinds = list(dict.fromkeys(sample.kinds))
    return {
        "title": sample.title,
        "prompt": sample.prompt,
        "answer": sample.answer,
        "facts": [list(fact) for fact in sample.facts],
        "layers": list(sample.lens.layers),
        "hooks": list(sample.lens.layers.values()),
        "top": int(ids.shape[2]),
        "words": list(words),
        "low": _packed((place & 0xFFFF).astype(np.uint16)),
        "high": _packed((place >> 16).astype(np.uint8)) if len(words) > 0x10000 else "",
        "shares": _shares(cells.probabilities.numpy().transpose(1, 0, 2)),
        "entropy": _shares(cells.entropy.numpy().T / math.log(max(2, sample.vocabulary))),
        "most": math.log(max(2, sample.vocabulary)),
        "tokens": list(sample.tokens),
        "kinds": kinds,
        "kind": _packed(np.array([kinds.index(kind) for kind in sample.kinds], np.uint8)),
        "pictures": [bounded_uri(image, _side(len(sample.pictures))) for image in sample.pictures],
        "sizes": [list(image.size) for image in sample.pictures],
        "views": [_view(view) for view in sample.views],
    }


def _side(pictures: int) -> int:
    return max(256, round(SIDE / math.sqrt(max(1, pictures))))


def _view(view: View) -> dict[str, Any]:
    rows = torch.zeros(0, 0) if view.rows is None else view.rows
    return {
        "picture": view.picture,
        "title": view.title,
        "rows": int(rows.shape[0]),
        "cols": int(rows.shape[1]),
        "at": _packed(rows.numpy().astype(np.int32)),
        "box": [round(side, 6) for side in view.box],
    }


def as_script(data: Any) -> Markup:
    """JSON that ends no script element, opens no comment and breaks no line, whatever text it holds."""
    written = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    # The last are halves of characters, which no file can hold.
    return Markup(re.sub("[<>&\u2028\u2029\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", written))


def _environment() -> Environment:
    made = environment()
    assert made.loader is not None
    parts = "\n".join(made.loader.get_source(made, name)[0] for name in SCRIPTS)
    # In a block of its own, so that no name meets one of the browser's.
    script = f'"use strict";\n{{\n{parts}\n}}\n'
    made.globals["script"] = Markup(script)
    made.globals["script_hash"] = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    made.globals["small"] = lambda image: data_uri(enlarge(image, 72))
    return made


def write_lens_page(path: str | Path, sample: LensSample, links: Mapping[str, str] | None = None) -> Path:
    """One sample as a page.

    Args:
        path: Of the file.
        sample: What it shows.
        links: What to call it -> address, of other pages.

    Raises:
        BadInputError: As in `page_data`.
    """
    made = _environment().get_template("lens.html")
    page = made.render(title=sample.title, data=as_script(page_data(sample)), links=dict(links or {}))
    Path(path).write_text(page, encoding="utf-8")
    return Path(path)


@dataclass(frozen=True)
class IndexEntry:
    """A line of the index: the page's address, and what stands in its line (`pictures` made small)."""

    address: str
    title: str
    prompt: str
    answer: str | None
    tokens: int
    pictures: Sequence[Image.Image] = ()


def write_index(path: str | Path, title: str, facts: Sequence[tuple[str, str]], entries: Sequence[IndexEntry]) -> Path:
    """The page from which all samples' pages are reached."""
    page = _environment().get_template("lens_index.html").render(title=title, facts=facts, entries=entries)
    Path(path).write_text(page, encoding="utf-8")
    return Path(path)
