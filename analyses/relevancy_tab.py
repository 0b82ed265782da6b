"""The explorer's tab of relevancy: what each token of the answer rests on, over pictures and words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from analyses.picture_maps import PictureMap
from analyses.relevancy import Relevancies, relevancies, shares
from analyses.relevancy_command import by_role
from analyses.tab_maps import (
    KIND,
    MEAN,
    SCALE,
    Drawing,
    bounded,
    drawn,
    lacking,
    map_arrays,
    named,
    percents,
    position_maps,
    shares_table,
    text_words,
    token_choice,
    top_words,
)
from analyses.targets import answer_targets
from analyses.tower_relevancy import Start, end_to_end
from hooked_mm.errors import BadInputError
from hooked_mm.explorer.asked import Asked
from hooked_mm.explorer.panels import Facts, Heat, Note, Panel, Table, Words
from hooked_mm.explorer.tab import Choice, Control, Toggle, View
from hooked_mm.explorer.work import Work
from hooked_mm.hooked import HookedMM

TEXT, THROUGH, TOWER = "language model", "end to end", "tower"

WHERE = {
    TEXT: "to the language model's image tokens",
    THROUGH: "to the patches, through connector and tower",
    TOWER: "to the patches, by the tower alone",
}
"""Down to where relevancy is carried -> what it is called."""

STARTS: dict[str, Start] = {THROUGH: "relevancy", TOWER: "even"}
"""What the image tokens bring into the tower; see `tower_relevancy.end_to_end`."""

PICTURE = "image"


@dataclass(frozen=True)
class Found:
    """What was computed for a view.

    Attributes:
        text: Relevancy of the language model's positions.
        maps: Per token, a map per grid over the pictures; none where there are no pictures.
        why: Why there are none, where there are pictures.
    """

    text: Relevancies
    maps: list[list[PictureMap]]
    why: str = ""


class RelevancyTab:
    """See `hooked_mm.explorer.tab.Tab`."""

    name, title, order = "relevancy", "Relevancy", 20
    about = (
        "What each chosen token rests on: attention and its gradients, carried through all layers (Chefer et al. "
        "2021), over the pictures and over the words. Click a token to see its words."
    )

    def controls(self, model: HookedMM) -> Sequence[Control]:
        """See `Tab`."""
        return [
            Choice("where", "Relevancy", [(label, name) for name, label in WHERE.items()], TEXT),
            KIND,
            Toggle("normalise", "Rows add up to one", True, "as the paper does; off, R's own numbers are shown"),
            SCALE,
            Choice("token", "Words by relevancy to", [("the mean of the tokens", MEAN)], MEAN, changing=True),
        ]

    def look(self, asked: Asked, values: Mapping[str, Any], work: Work) -> View:
        """See `Tab`."""
        if (empty := lacking(asked, pictures=values["where"] != TEXT)) is not None:
            return empty
        tokens, notes = bounded(asked)
        chosen, options = token_choice(asked, tokens, values["token"])
        found = _found(asked, tokens, values, work)
        work.step("pictures")
        names, sums = named(asked, tokens), by_role(asked.batch, found.text)
        table, columns = shares_table({column: value for (_, column), value in sums.items()})
        arrays: dict[str, Tensor] = {"positions": found.text.positions, "shares": table}
        more = {"decoder": found.text.decoder, "keys": found.text.keys}
        arrays |= {name: value for name, value in more.items() if value is not None}
        for token, maps in zip(tokens, found.maps, strict=False):
            arrays |= map_arrays(f"token-{token}", maps)
        drawings = [
            Drawing(name, maps, {"token": token}) for name, token, maps in zip(names, tokens, found.maps, strict=False)
        ]
        panels = [*notes, *drawn(drawings, asked.images, values["scale"], f"Relevancy {WHERE[values['where']]}")]
        if found.why:
            panels.append(Note(f"There is no map over the picture: {found.why}", "warning"))
        panels += _shared(asked, tokens, table, columns)
        panels += _by_words(asked, tokens, found.text, table, columns, chosen)
        return View(panels, _python(values, tokens, found), arrays, {"token": options})


def make_tab(folders: Sequence[Path]) -> RelevancyTab:
    """The tab; it opens no folders.

    Raises:
        BadInputError: If any are given.
    """
    if folders:
        raise BadInputError(f"the relevancy tab opens no folders, but {len(folders)} were given; leave them out")
    return RelevancyTab()


def _found(asked: Asked, tokens: Sequence[int], values: Mapping[str, Any], work: Work) -> Found:
    model, batch, images = asked.model, asked.batch, asked.images
    targets = answer_targets(batch, tokens)

    def tell(done: int, total: int) -> None:
        work.step(f"a backward pass for token {done + 1} of {total}", done, total)

    work.step("a forward pass with all attention")
    options = {"kind": values["kind"], "normalise": values["normalise"], "tell": tell}
    if values["where"] != TEXT:
        found = end_to_end(model, batch, targets, **options, start=STARTS[values["where"]])
        return Found(found.text, [found.maps(model, batch, number, images) for number in range(len(targets))])
    text = relevancies(model, batch, targets, **options)
    if not images:
        return Found(text, [])
    try:
        return Found(text, position_maps(model, batch, text.positions if text.keys is None else text.keys, images))
    except BadInputError as error:
        return Found(text, [], str(error))


def _shared(asked: Asked, tokens: Sequence[int], table: Tensor, columns: Sequence[str]) -> list[Panel]:
    """Picture against text, token by token."""
    names = named(asked, tokens)
    heat = Heat(
        table,
        names,
        ["picture" if name == PICTURE else name for name in columns],
        "What each token rests on, in percent",
        "token \\ on",
        ("token", None),
        list(tokens),
        texts=percents(table),
        peak=1.0,
    )
    if PICTURE not in columns or not asked.images:
        note = "the picture is read by cross-attention, beside the text" if asked.images else "there is no picture"
        return [heat, Note(f"Shares are of the text alone: {note}.")]
    own = table[:, list(columns).index(PICTURE)]
    order = own.argsort(descending=True, stable=True).tolist()
    most = ", ".join(f"{names[place]} ({100 * float(own[place]):.0f} %)" for place in order[:5])
    words = Words(
        [(asked.word(token), float(value)) for token, value in zip(tokens, own, strict=True)],
        "Tokens of the answer by how much of them rests on the picture",
        [{"token": token} for token in tokens],
        1.0,
    )
    return [Facts([("rest most on the picture", most), ("mean of the tokens", float(own.mean()))]), words, heat]


def _by_words(
    asked: Asked, tokens: Sequence[int], text: Relevancies, table: Tensor, columns: Sequence[str], chosen: int
) -> list[Panel]:
    """The words of the prompt for one token, and the most relevant for each."""
    names = named(asked, tokens)
    whose = "the mean of the tokens" if chosen == MEAN else f"token {names[tokens.index(chosen)]}"
    rows = slice(None) if chosen == MEAN else slice(tokens.index(chosen), tokens.index(chosen) + 1)
    parts = [("The prompt and the answer", asked.batch, text.positions)]
    if text.decoder is not None:
        parts.append(("The answer so far", asked.answer_batch, text.decoder))
    panels: list[Panel] = []
    for prefix, batch, values in parts:
        mean = shares(values[rows].double().mean(0))
        words = text_words(asked.model, batch, mean)
        # A picture's sum would leave the words without colour.
        peak = max((value for word, value in words if not word.startswith("[picture")), default=0.0)
        panels.append(Words(words, f"{prefix}, by relevancy to {whose}", peak=peak or None))
    image = asked.batch.mask("image")[0].cpu()
    told, most = [], text.positions[:, image].amax(1) if bool(image.any()) else None
    mask = asked.batch.mask("text")[0]
    for number, name in enumerate(names):
        best = top_words(text_words(asked.model, asked.batch, text.positions[number], mask))
        told.append([name, float(text.scores[number]), best, "" if most is None else float(most[number])])
    title = "The most relevant words, beside the most relevant image token"
    heads = ["token", "score", "most relevant words", "largest of the picture"]
    return [*panels, Table(heads, told, title, [{"token": token} for token in tokens])]


def _python(values: Mapping[str, Any], tokens: Sequence[int], found: Found) -> str:
    kind, normalise, where = values["kind"], values["normalise"], values["where"]
    options = f"kind={kind!r}, normalise={normalise!r}"
    used = [*(["map_arrays"] if found.maps else []), *(["position_maps"] if found.maps and where == TEXT else [])]
    lines = [
        *(["from analyses.relevancy import relevancies"] if where == TEXT else []),
        "from analyses.relevancy_command import by_role",
        f"from analyses.tab_maps import {', '.join([*used, 'shares_table'])}",
        "from analyses.targets import answer_targets",
        *([] if where == TEXT else ["from analyses.tower_relevancy import end_to_end"]),
        "",
        f"targets = answer_targets(batch, tokens[:{len(tokens)}])",
    ]
    if where == TEXT:
        lines.append(f"found = relevancies(model, batch, targets, {options})")
    else:
        lines += [
            f"tower = end_to_end(model, batch, targets, {options}, start={STARTS[where]!r})",
            "found = tower.text",
        ]
    lines += [
        "shares = {column: value for (_, column), value in by_role(batch, found).items()}",
        'arrays = {"positions": found.positions, "shares": shares_table(shares)[0]}',
    ]
    lines += [
        f'arrays["{name}"] = found.{name}' for name in ("decoder", "keys") if getattr(found.text, name) is not None
    ]
    if found.maps and where == TEXT:
        places = "positions" if found.text.keys is None else "keys"
        lines.append(f"maps = position_maps(model, batch, found.{places}, images)")
    elif found.maps:
        lines.append("maps = [tower.maps(model, batch, number, images) for number in range(len(targets))]")
    if found.maps:
        lines += [
            f"for token, own in zip(tokens[:{len(tokens)}], maps):",
            '    arrays |= map_arrays(f"token-{token}", own)',
        ]
    return "\n".join(lines)
