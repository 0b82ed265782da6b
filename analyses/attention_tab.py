"""The explorer's tab of attention: layers and heads, what they look at, and which of them look at clicked patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from analyses.attention_shares import AttentionShares, attention_shares, picture_columns
from analyses.attention_views import (
    AnswerAttention,
    answer_attention,
    clicked_columns,
    head_maps,
    seen_through,
    strongest,
)
from analyses.tab_maps import (
    MOST_MAPS,
    MOST_ROWS,
    SCALE,
    Drawing,
    drawn,
    lacking,
    map_arrays,
    named,
    percents,
    text_words,
)
from analyses.targets import answer_targets
from hooked_mm.attention_rows import Part, pattern_layers
from hooked_mm.errors import BadInputError
from hooked_mm.explorer.asked import Asked
from hooked_mm.explorer.panels import Facts, Heat, Note, Panel, Words
from hooked_mm.explorer.tab import Choice, Control, Number, View
from hooked_mm.explorer.work import Work
from hooked_mm.hooked import HookedMM

STRONGEST = -1
"""The layer, or head, that gives most."""

CLICKED = "clicked"

COLUMNS = {
    "image": "the picture",
    "question": "the question",
    CLICKED: "the chosen patches",
    "template": "the template",
    "answer": "the answer so far",
}
"""Kind of key -> what it is called."""

SHORT = {"image": "pictures", CLICKED: "patches"}
"""The same above a column."""


@dataclass(frozen=True)
class Seen:
    """What was computed for a view.

    Attributes:
        shares: Of all layers and heads.
        values: (n, layers, heads), the measure that is shown, for the kind of key that is shown.
        layer, head: That are looked at closely.
        attention: Of that layer.
        part: Self-attention or cross-attention.
    """

    shares: AttentionShares
    values: Float64[Tensor, "n layers heads"]
    layer: int
    head: int
    attention: AnswerAttention
    part: Part

    @property
    def of_layer(self) -> Float64[Tensor, "n heads"]:
        """The values of that layer."""
        return self.values[:, self.shares.layers.index(self.layer)]


class AttentionTab:
    """See `hooked_mm.explorer.tab.Tab`."""

    name, title, order = "attention", "Attention", 10
    about = (
        "Where each head of each layer looks when the model says the chosen tokens: the attention of the position that "
        "predicts a token. Click a cell to see a layer and head; choose patches of the picture to see who looks "
        "at them."
    )

    def controls(self, model: HookedMM) -> Sequence[Control]:
        """See `Tab`."""
        layers, heads = model.cfg.n_layers, model.cfg.n_heads
        return [
            Choice("towards", "Attention to", [(label, name) for name, label in COLUMNS.items()], "image"),
            Choice("measure", "As", [("share of attention", "share"), ("mean per token or patch", "mean")], "share"),
            Choice("layer", "Layer", [("the strongest", STRONGEST), *((str(n), n) for n in range(layers))], STRONGEST),
            Choice("head", "Head", [("the strongest", STRONGEST), *((str(n), n) for n in range(heads))], STRONGEST),
            Choice(
                "each",
                "Over the chosen tokens",
                [("their mean, several heads", "mean"), ("each token, one head", "each")],
                "mean",
            ),
            Number("count", "Heads with a map", 1, MOST_MAPS, 8),
            SCALE,
        ]

    def look(self, asked: Asked, values: Mapping[str, Any], work: Work) -> View:
        """See `Tab`."""
        towards = values["towards"]
        if (empty := lacking(asked, pictures=towards in ("image", CLICKED))) is not None:
            return empty
        if towards == CLICKED and not asked.points:
            return View([Note("Choose patches of the picture first; their attention is shown here.")])
        work.step("attention of the answer's tokens")
        seen = _seen(asked, values)
        heads = _heads(seen, values) if values["each"] == "mean" else [seen.head]
        panels: list[Panel] = [_facts(asked, seen, towards), *_figures(asked, seen, towards, values["measure"])]
        arrays = {"heads": seen.values, "groups": seen.shares.by_layer()}
        work.step("pictures of what heads look at")
        if towards in ("image", CLICKED):
            drawings, made = _maps(asked, seen, heads, values["each"] == "mean")
            arrays |= made
            own = [one for one in drawings if one.maps]
            kind = "mean over the chosen tokens" if values["each"] == "mean" else f"head {seen.head}, each chosen token"
            panels[2:2] = drawn(own, asked.images, values["scale"], f"Layer {seen.layer}, {kind}")
        else:
            keys = asked.batch if seen.part == "xattn" else asked.answer_batch
            mean = seen.attention.patterns[seen.layer][:, seen.head].double().mean(0).cpu()
            words = text_words(asked.model, keys, mean, seen.attention.groups[towards].any(0))
            title = f"{COLUMNS[towards]}, by the attention of layer {seen.layer}, head {seen.head} to it"
            panels.insert(2, Words(words, title.capitalize()))
            arrays["positions"] = mean
        return View(panels, _python(asked, values, seen, heads), arrays)


def make_tab(folders: Sequence[Path]) -> AttentionTab:
    """The tab; it opens no folders.

    Raises:
        BadInputError: If any are given.
    """
    if folders:
        raise BadInputError(f"the attention tab opens no folders, but {len(folders)} were given; leave them out")
    return AttentionTab()


def _seen(asked: Asked, values: Mapping[str, Any]) -> Seen:
    model, batch, towards = asked.model, asked.batch, values["towards"]
    part = seen_through(model, batch, "image" if towards == CLICKED else towards)
    layers = pattern_layers(model, part=part)
    if values["layer"] != STRONGEST and values["layer"] not in layers:
        raise BadInputError(f"layer {values['layer']} has no {part} patterns; those of this model are {layers}")
    several = len(asked.images) > 1
    columns = picture_columns(batch, answer_targets(batch, asked.tokens), part) if several else {}
    if towards == CLICKED:
        first = answer_attention(model, batch, asked.tokens, layers[:1], part=part)
        columns[CLICKED] = clicked_columns(model, batch, first, 0, asked.points, asked.images)
    shares = attention_shares(model, batch, asked.tokens, part, columns)
    found = shares.by_head(towards, share=values["measure"] == "share")
    # A token that has no such keys, as the answer's first has no answer before it, has no part in the mean.
    mean = found.nanmean(0)
    chosen_layers = layers if values["layer"] == STRONGEST else [values["layer"]]
    chosen_heads = list(range(mean.shape[1])) if values["head"] == STRONGEST else [values["head"]]
    rows = [layers.index(layer) for layer in chosen_layers]
    best = strongest(mean[rows][:, chosen_heads], chosen_layers, chosen_heads, 1)
    if not best:
        raise BadInputError(f"there is nothing of {COLUMNS[towards]} to attend to; look at something else")
    layer, head = best[0]
    return Seen(shares, found, layer, head, answer_attention(model, batch, asked.tokens, [layer], part=part), part)


def _heads(seen: Seen, values: Mapping[str, Any]) -> list[int]:
    """The heads of the layer with a map: those that give most, the chosen one among them."""
    mean = seen.of_layer.nanmean(0)[None]
    best = [head for _, head in strongest(mean, [seen.layer], list(range(mean.shape[1])), values["count"])]
    return best if seen.head in best else [seen.head, *best[:-1]]


def _maps(asked: Asked, seen: Seen, heads: Sequence[int], mean: bool) -> tuple[list[Drawing], dict[str, Tensor]]:
    """Maps of some heads for the mean of the tokens, or of one head for each token."""
    drawings: list[Drawing] = []
    arrays: dict[str, Tensor] = {}
    pairs = [(seen.layer, head) for head in heads]
    tokens = [None] if mean else range(len(seen.attention))[:MOST_MAPS]
    names = named(asked, asked.tokens)
    for token in tokens:
        found = head_maps(asked.model, asked.batch, seen.attention, token, pairs, asked.images)
        for (_, head), maps in found.items():
            name = f"head {head}" if token is None else names[token]
            drawings.append(Drawing(name, maps, {"layer": seen.layer, "head": head}))
            prefix = "" if token is None else f"token-{asked.tokens[token]}-"
            arrays |= map_arrays(f"{prefix}layer-{seen.layer}-head-{head}", maps)
    return drawings, arrays


def _facts(asked: Asked, seen: Seen, towards: str) -> Facts:
    share = seen.shares.by_head(towards).nanmean(0)
    at = seen.shares.layers.index(seen.layer)
    kind = "cross-attention" if seen.part == "xattn" else "self-attention"
    return Facts(
        [
            ("layer", seen.layer),
            ("head", seen.head),
            (f"its share of attention to {COLUMNS[towards]}", float(share[at, seen.head])),
            ("of all heads of the layer", float(share[at].mean())),
            ("of all layers and heads", float(share.mean())),
            ("tokens", len(seen.attention)),
            ("attention", kind),
        ]
    )


def _figures(asked: Asked, seen: Seen, towards: str, measure: str) -> list[Panel]:
    layers = [str(layer) for layer in seen.shares.layers]
    heads = [str(head) for head in range(seen.values.shape[2])]
    what = f"{'share of attention' if measure == 'share' else 'mean attention'} to {COLUMNS[towards]}"
    kinds = [name for name in seen.shares.shares if bool(seen.shares.counts[name].any())]
    columns = [list(seen.shares.shares).index(name) for name in kinds]
    by_layer, names = seen.shares.by_layer()[:, columns], named(asked, asked.tokens)
    here, rows = seen.of_layer, min(len(names), MOST_ROWS)
    mean = ["mean"] if rows > 1 else []
    by_head = torch.cat([*[here.nanmean(0)[None] for _ in mean], here[:rows]])
    panels: list[Panel] = [
        Heat(
            seen.values.nanmean(0),
            layers,
            heads,
            f"Layers and heads, {what}, mean over the chosen tokens",
            "layer \\ head",
            ("layer", "head"),
            seen.shares.layers,
        ),
        Words(
            list(zip([asked.word(token) for token in asked.tokens], here[:, seen.head].tolist(), strict=True)),
            f"Tokens of the answer, {what} of layer {seen.layer}, head {seen.head}",
        ),
        Heat(by_head, [*mean, *names[:rows]], heads, f"Layer {seen.layer}, {what}", "token \\ head", (None, "head")),
        Heat(
            by_layer,
            layers,
            [SHORT.get(name, name) for name in kinds],
            "Where attention goes, in percent, mean over the chosen tokens and all heads",
            "layer \\ to",
            ("layer", "towards"),
            seen.shares.layers,
            [name if name in COLUMNS else "image" for name in kinds],
            percents(by_layer),
            1.0,
        ),
    ]
    if rows < len(names):
        panels.append(
            Note(f"The first {rows} of {len(names)} tokens are shown by head; all of them are in the arrays.")
        )
    return panels


def _python(asked: Asked, values: Mapping[str, Any], seen: Seen, heads: Sequence[int]) -> str:
    towards, several, part = values["towards"], len(asked.images) > 1, seen.part
    pairs = [(seen.layer, head) for head in heads]
    clicked, share, mapped = towards == CLICKED, values["measure"] == "share", towards in ("image", CLICKED)
    used = ["answer_attention", *(["clicked_columns"] if clicked else []), *(["head_maps"] if mapped else [])]
    lines = [
        f"from analyses.attention_shares import attention_shares{', picture_columns' if several else ''}",
        f"from analyses.attention_views import {', '.join(used)}",
        *(["from analyses.tab_maps import map_arrays"] if mapped else []),
        "",
        f"seen = answer_attention(model, batch, tokens, [{seen.layer}], part={part!r})",
    ]
    if several:
        lines.append(f"columns = picture_columns(batch, seen.targets, {part!r})")
    elif clicked:
        lines.append("columns = {}")
    if clicked:
        lines.append(f"columns[{CLICKED!r}] = clicked_columns(model, batch, seen, 0, points, images)")
    more = ", columns" if clicked or several else ""
    lines += [
        f"shares = attention_shares(model, batch, tokens, {part!r}{more})",
        f'arrays = {{"heads": shares.by_head({towards!r}, share={share}), "groups": shares.by_layer()}}',
    ]
    if not mapped:
        lines.append(f'arrays["positions"] = seen.patterns[{seen.layer}][:, {seen.head}].double().mean(0).cpu()')
    elif values["each"] == "mean":
        lines += [
            f"maps = head_maps(model, batch, seen, None, {pairs}, images)",
            "for (layer, head), own in maps.items():",
            '    arrays |= map_arrays(f"layer-{layer}-head-{head}", own)',
        ]
    else:
        lines += [
            f"for number, token in enumerate(tokens[:{MOST_MAPS}]):",
            f"    maps = head_maps(model, batch, seen, number, {pairs}, images)",
            "    for (layer, head), own in maps.items():",
            '        arrays |= map_arrays(f"token-{token}-layer-{layer}-head-{head}", own)',
        ]
    return "\n".join(lines)
