"""The explorer's logit lens: what the layers would already say, at words and on patches, and where they say a word."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from analyses.lens_page import LensSample, View, lens_sample
from analyses.logit_lens import Lens, logit_lens
from analyses.segmentation import first_tokens
from analyses.tab_maps import Drawing, drawn, lacking, position_maps
from analyses.targets import answer_targets
from hooked_mm.explorer import tab
from hooked_mm.explorer.asked import Asked
from hooked_mm.explorer.panels import Heat, Note, Panel, Table
from hooked_mm.explorer.tab import Choice, Control, Number, Text
from hooked_mm.explorer.work import Work
from hooked_mm.hooked import HookedMM

TOP = 10
"""Words that are read in each cell."""

MOST_COLUMNS, MOST_LAYERS, MOST_GRIDS, MOST_CELLS = 64, 12, 4, 1024
"""Of what is drawn: positions in a table, layers as maps, grids of patches, patches of a grid with words."""

WHERE = {
    "answer": "where the chosen words of the answer are predicted",
    "prompt": "the prompt's text",
    "patches": "the pictures' patches",
}
SHOWN = {
    "word": "First word, coloured by its probability",
    "probability": "Probability of the first word",
    "entropy": "Entropy in nats",
}


@dataclass
class _Found:
    """What is found in one look, and the Python that finds it again."""

    panels: list[Panel] = field(default_factory=list)
    arrays: dict[str, Tensor] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    options: list[tuple[str, Any]] = field(default_factory=list)

    def keep(self, name: str, value: Tensor | None, python: str) -> None:
        """An array, if it is there, and its expression."""
        if value is not None:
            self.arrays[name], self.names[name] = value, python

    @property
    def python(self) -> str:
        """All lines; the last makes the arrays."""
        imports = ["import torch", "from analyses.logit_lens import logit_lens"]
        imports += ["from analyses.targets import answer_targets"] if "answer_targets" in "".join(self.lines) else []
        arrays = ", ".join(f"{name!r}: {python}" for name, python in self.names.items())
        return "\n".join([*imports, "", *self.lines, f"arrays = {{{arrays}}}"])


class LensTab:
    """See the module."""

    name, title, order = "lens", "Logit lens", 50
    about = (
        "Which words each layer would already say, read through the model's own last norm and unembedding: where the "
        "answer is predicted, along the prompt, and on every patch of the pictures."
    )

    def controls(self, model: HookedMM) -> Sequence[Control]:
        """Where, what a cell shows, a word to follow, a layer for patches, a position to look at closely."""
        layers = model.cfg.n_layers
        return [
            Choice("where", "Positions", [(label, name) for name, label in WHERE.items()], "answer"),
            Choice("shown", "A cell shows", [(label, name) for name, label in SHOWN.items()], "word"),
            Text("word", "Follow a word", info="its probability at every layer, and over the pictures"),
            Number("layer", "Layer of the patches' words", 0, layers, layers, info="behind so many blocks"),
            Choice("position", "Closer look at", [], info="click a cell: its layer's first words", changing=True),
        ]

    def look(self, asked: Asked, values: Mapping[str, Any], work: Work) -> tab.View:
        """See `hooked_mm.explorer.tab`.

        Raises:
            UnknownWordError: If the model can't say the word that is to be followed.
            BadInputError: If the answer has no word.
        """
        if values["where"] == "answer" and (empty := lacking(asked, pictures=False)):
            return empty
        work.step("running the model")
        found, word = _Found(), None
        if text := values["word"].strip():
            (word,), several = (list(part) for part in first_tokens(asked.model.tokenizer, [text]))
            word = int(word)
            if several:
                begin = asked.model.tokenizer.decode([word])
                found.panels.append(Note(f"{text!r} is several tokens; followed is the first, {begin!r}."))
        found.lines.append("text = batch.decoder or batch")
        if values["where"] == "patches":
            _patches(found, asked, values, word, work)
        else:
            _words(found, asked, values, word, work)
        return tab.View(found.panels, found.python, found.arrays, {"position": found.options})


def _where(asked: Asked, kind: str) -> tuple[Bool[Tensor, "1 p"], list[str]]:
    """The positions to look at, and how they are found."""
    text = asked.answer_batch
    empty = "where = torch.zeros_like(text.modality, dtype=torch.bool)"
    if kind == "patches":
        return text.mask(modality="image"), ['where = text.mask(modality="image")']
    if kind == "prompt":
        line = 'where = text.mask(modality="text") & ~text.mask(role="answer")'
        return text.mask(modality="text") & ~text.mask(role="answer"), [line]
    where = torch.zeros_like(text.modality, dtype=torch.bool)
    where[0, answer_targets(asked.batch, asked.tokens).row] = True
    return where, [empty, "where[0, answer_targets(batch, tokens).row] = True"]


def _short(word: str, most: int = 12) -> str:
    """A word for a cell: blanks alone are named."""
    shown = word.strip() or repr(word)
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def _heat(found: _Found, sample: LensSample, labels: Sequence[str], values: Mapping[str, Any], what: str) -> None:
    """Layers x positions, as the control asks for."""
    cells, shown = sample.lens.cells, values["shown"]
    first, entropy = cells.probabilities[..., 0], cells.entropy
    numbers, peak = (entropy, math.log(sample.vocabulary)) if shown == "entropy" else (first, 1.0)
    texts = [[f"{value:.2f}" for value in row] for row in numbers.tolist()]
    if shown == "word":
        texts = [[_short(sample.text(token)) for token in row] for row in cells.ids[..., 0].tolist()]
    rows = [str(layer) for layer in sample.lens.layers]
    places = sample.lens.positions.tolist()
    frame: dict[str, Any] = {
        "corner": "layer \\ position",
        "picks": ("layer", "position"),
        "row_values": list(sample.lens.layers),
        "column_values": places,
    }
    found.panels.append(Heat(numbers, rows, labels, f"{SHOWN[shown]}, {what}", texts=texts, peak=peak, **frame))
    if cells.chosen is not None:
        told_ = [[f"{value:.2f}" for value in row] for row in cells.chosen.tolist()]
        title = f"Probability of {values['word'].strip()!r}, {what}"
        found.panels.append(Heat(cells.chosen, rows, labels, title, texts=told_, **frame))
    found.options += [(f"{place}: {label}", place) for place, label in zip(places, labels, strict=True)]
    _closer(found, sample, labels, values)


def _closer(found: _Found, sample: LensSample, labels: Sequence[str], values: Mapping[str, Any]) -> None:
    """The first words of one cell."""
    position, layer, lens = values["position"], values["layer"], sample.lens
    if position is None:
        return
    if position not in lens.positions.tolist():
        found.panels.append(Note(f"Position {position} is not among those shown: click a cell.", "warning"))
        return
    at, row = lens.positions.tolist().index(position), list(lens.layers).index(layer)
    ids, shares = lens.cells.ids[row, at].tolist(), lens.cells.probabilities[row, at].tolist()
    rows = [
        (number + 1, sample.text(token), share) for number, (token, share) in enumerate(zip(ids, shares, strict=True))
    ]
    title = f"Behind {layer} blocks at position {position}, {labels[at]!r}"
    picks = [{"word": sample.text(token).strip()} if sample.text(token).strip() else None for token in ids]
    found.panels.append(Table(("place", "word", "probability"), rows, title, picks))


def _read(
    found: _Found,
    asked: Asked,
    work: Work,
    where: Bool[Tensor, "1 p"],
    lines: Sequence[str],
    word: int | None,
    *,
    top: int = TOP,
    layers: Sequence[int] | None = None,
    name: str = "lens",
) -> Lens:
    """The lens at some positions, and its Python."""
    (lens,) = logit_lens(asked.model, asked.batch, layers=layers, top=top, words=word, where=where, tell=work.step)
    call = f"logit_lens(model, batch, layers={layers}, top={top}, words={word}, where=where)"
    found.lines += [*lines, f"({name},) = {call}"]
    return lens


def _keep(found: _Found, lens: Lens, name: str = "lens", before: str = "") -> None:
    """The lens' numbers among the arrays."""
    found.keep(f"{before}positions", lens.positions, f"{name}.positions")
    for cell in ("ids", "probabilities", "entropy"):
        found.keep(f"{before}{cell}", getattr(lens.cells, cell), f"{name}.cells.{cell}")
    found.keep(f"{before}followed", lens.cells.chosen, f"{name}.cells.chosen")


def _words(found: _Found, asked: Asked, values: Mapping[str, Any], word: int | None, work: Work) -> None:
    """Layers x words of the answer or the prompt."""
    where, lines = _where(asked, values["where"])
    total = int(where.sum())
    if total > MOST_COLUMNS:
        end = values["where"] == "prompt"
        kept = where[0].nonzero()[-MOST_COLUMNS:] if end else where[0].nonzero()[:MOST_COLUMNS]
        first, last = int(kept.min()), int(kept.max())
        where[:, :first], where[:, last + 1 :] = False, False
        lines = [*lines, f"where[:, :{first}], where[:, {last} + 1 :] = False, False"]
        what = "last" if end else "first"
        found.panels.append(
            Note(f"Shown are the {what} {MOST_COLUMNS} of {total} positions; choose words of the answer to see others.")
        )
    lens = _read(found, asked, work, where, lines, word)
    sample = lens_sample(asked.model, asked.batch, 0, lens)
    labels = list(sample.tokens)
    if values["where"] == "answer":
        row_of = dict(zip(answer_targets(asked.batch, asked.tokens).row.tolist(), asked.tokens, strict=True))
        labels = [asked.word(row_of[place]) for place in lens.positions.tolist()]
    if not labels:
        found.panels.append(Note("There is no text in the prompt."))
        return
    what = "where each word is predicted" if values["where"] == "answer" else "at each position of the prompt"
    _heat(found, sample, labels, values, what)
    _keep(found, lens)


def _patches(found: _Found, asked: Asked, values: Mapping[str, Any], word: int | None, work: Work) -> None:
    """What patches say, and where a word is said."""
    where, lines = _where(asked, "patches")
    if not bool(where.any()):
        why = asked.batch.layout.why if asked.images else "the conversation has no picture"
        said = "No position of the text holds a part of a picture, so there is nothing to read there"
        found.panels.append(Note(f"{said}: {why or 'the text reads pictures by attention to another sequence'}."))
        return
    lens = _read(found, asked, work, where, lines, word, layers=[values["layer"]])
    sample = lens_sample(asked.model, asked.batch, 0, lens, asked.images)
    placed = [view for view in sample.views if view.rows is not None]
    for view in placed[:MOST_GRIDS]:
        found.panels.append(_grid(sample, view, values))
    if len(placed) > MOST_GRIDS:
        found.panels.append(Note(f"Shown are {MOST_GRIDS} of {len(placed)} grids of patches."))
    if len(placed) < len(sample.views):
        found.panels += [Note(view.title) for view in sample.views if view.rows is None]
        found.panels.append(_in_a_row(sample, values))
    found.panels.append(_commonest(sample, values["layer"]))
    _keep(found, lens)
    _chosen(found, asked, values, word, work, sample)
    if word is not None:
        _maps(found, asked, values, word, work, where)


def _grid(sample: LensSample, view: View, values: Mapping[str, Any]) -> Heat:
    """The words of one grid's patches."""
    assert view.rows is not None
    title = f"{SHOWN[values['shown']]}, behind {values['layer']} blocks; {view.title}"
    rows, columns = ([str(n) for n in range(size)] for size in view.rows.shape)
    return _table_of(sample, view.rows, values, rows=rows, columns=columns, title=title, corner="row \\ column")


def _in_a_row(sample: LensSample, values: Mapping[str, Any]) -> Heat:
    """The words of positions whose place in a picture is not known, the first of them."""
    rows = torch.arange(len(sample.lens.positions))[None, :MOST_COLUMNS]
    columns = [str(place) for place in sample.lens.positions[:MOST_COLUMNS].tolist()]
    title = f"{SHOWN[values['shown']]}, of the first {len(columns)} of {len(sample.lens.positions)} image positions"
    return _table_of(sample, rows, values, [f"layer {values['layer']}"], columns, title, "position")


def _table_of(
    sample: LensSample,
    at: Int[Tensor, "rows cols"],
    values: Mapping[str, Any],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    corner: str,
) -> Heat:
    """The words of positions laid out as `at` says; -1 stays empty."""
    cells, known, entropy = sample.lens.cells, at >= 0, values["shown"] == "entropy"
    numbers = (cells.entropy[0] if entropy else cells.probabilities[0, :, 0])[at.clamp_min(0)]
    numbers = numbers.masked_fill(~known, torch.nan)
    texts = None
    if at.numel() <= MOST_CELLS:
        ids = cells.ids[0, :, 0][at.clamp_min(0)]
        words = values["shown"] == "word"
        texts = [
            [
                "" if math.isnan(number) else _short(sample.text(token), 8) if words else f"{number:.2f}"
                for number, token in zip(*line, strict=True)
            ]
            for line in zip(numbers.tolist(), ids.tolist(), strict=True)
        ]
    peak = math.log(sample.vocabulary) if entropy else 1.0
    return Heat(numbers, rows, columns, title, corner, texts=texts, peak=peak)


def _commonest(sample: LensSample, layer: int) -> Table:
    """The words that most positions of the pictures say; a click follows one."""
    cells = sample.lens.cells
    counts = Counter(cells.ids[0, :, 0].tolist()).most_common(12)
    rows, picks = [], []
    for token, count in counts:
        own = cells.ids[0, :, 0] == token
        rows.append((sample.text(token), count, float(cells.probabilities[0, own, 0].mean())))
        picks.append({"word": sample.text(token).strip()} if sample.text(token).strip() else None)
    total = cells.ids.shape[1]
    columns = ("first word", f"of {total} positions", "mean probability there")
    return Table(columns, rows, f"What the pictures' positions say behind {layer} blocks", picks)


def _chosen(
    found: _Found, asked: Asked, values: Mapping[str, Any], word: int | None, work: Work, sample: LensSample
) -> None:
    """Layers x patches that were clicked."""
    labels: dict[int, str] = {}
    for picture, x, y in asked.points:
        width, height = asked.images[picture].size
        for view in sample.views:
            row = view.row_at(x / width, y / height) if view.picture == picture else -1
            if row >= 0 and view.rows is not None:
                down, across = (view.rows == row).nonzero()[0].tolist()
                labels[int(sample.lens.positions[row])] = f"{view.title}, row {down}, column {across}"
    places = sorted(labels)[:MOST_COLUMNS]
    if not places:
        said = "No position stands for a chosen patch." if asked.points else "Choose patches to see all their layers."
        found.panels.append(Note(said))
        return
    where = torch.zeros_like(asked.answer_batch.modality, dtype=torch.bool)
    where[0, places] = True
    lines = ["where = torch.zeros_like(text.modality, dtype=torch.bool)", f"where[0, {places}] = True"]
    lens = _read(found, asked, work, where, lines, word, name="chosen")
    of_chosen = lens_sample(asked.model, asked.batch, 0, lens)
    _heat(found, of_chosen, [labels[place] for place in places], values, "on the chosen patches")
    _keep(found, lens, "chosen", "chosen_")


def _maps(
    found: _Found, asked: Asked, values: Mapping[str, Any], word: int, work: Work, where: Bool[Tensor, "1 p"]
) -> None:
    """The followed word's probability over the pictures, layer by layer."""
    model, batch, last = asked.model, asked.batch, asked.model.cfg.n_layers
    layers = sorted({round(last * n / (MOST_LAYERS - 1)) for n in range(MOST_LAYERS)} | {values["layer"]})
    lens = _read(found, asked, work, where, _where(asked, "patches")[1], word, top=1, layers=layers, name="maps")
    assert lens.cells.chosen is not None
    found.keep("maps_followed", lens.cells.chosen, "maps.cells.chosen")
    resampled = batch.layout.kind == "resampled"
    if not resampled and all(view.rows is None for view in lens_sample(model, batch, 0, lens, asked.images).views):
        return
    sheet = torch.full((len(layers), batch.modality.shape[1]), 0.0 if resampled else torch.nan)
    sheet[:, lens.positions] = lens.cells.chosen
    work.step("drawing maps")
    maps = position_maps(model, batch, sheet.to(model.device), asked.images)
    drawings = [Drawing(f"layer {layer}", own, {"layer": layer}) for layer, own in zip(layers, maps, strict=True)]
    spread = ", handed on to the patches that each latent is made of" if resampled else ""
    found.panels += drawn(drawings, asked.images, "common", f"Probability of {values['word'].strip()!r}{spread}")


def make_tab(folders: Sequence[Path] = ()) -> tab.Tab:
    """The tab; it opens no folders."""
    return LensTab()
