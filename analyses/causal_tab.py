"""The explorer's causal interpretation: what a head's attention says explains a word, and whether it does (CLEANN)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from analyses.attention_graphs import HeadRows, head_rows, node_labels, node_masks
from analyses.causal_check import check, summary
from analyses.causal_discovery import MOST_CONDITIONS
from analyses.causal_explanation import DEPTH, MOST_IMAGES, THRESHOLD, Explanation, explain
from analyses.causal_graph_drawing import graph_picture, node_crops, token_pictures, token_values
from analyses.partial_correlation import ALPHA
from analyses.tab_maps import lacking, named, position_words
from analyses.targets import Targets, answer_targets
from hooked_mm.connector import Connector, connector_map
from hooked_mm.errors import UnsupportedModelError
from hooked_mm.explorer import tab
from hooked_mm.explorer.asked import Asked
from hooked_mm.explorer.panels import Facts, Note, Panel, Picture, Pictures, Table, Words
from hooked_mm.explorer.tab import Choice, Control, Number, Toggle
from hooked_mm.explorer.work import Work
from hooked_mm.hooked import HookedMM

TESTS, BUDGET = 10_000, 32
"""Tests of one graph and masked runs of one explanation at first: a second's worth."""

ALPHAS = (1e-12, 1e-9, 1e-7, 1e-6, ALPHA, 1e-4, 1e-3, 0.01, 0.05, 0.1)
"""Levels of a test; decades, as they are compared by their order of magnitude."""

MOST_DRAWN, MOST_PICTURES, MOST_WORDS, MOST_HEADS, SIDE, GRAPH = 20, 12, 200, 32, 240, 900
"""Of what is drawn: nodes of a graph, pictures with tokens, words, heads as pictures; pixels of each, of the graph."""

SETTINGS = ("threshold", "most_images")
LEARNING = ("alpha", "depth", "most_conditions", "most_tests")


class CausalTab:
    """See the module."""

    name, title, order = "causal", "Causality", 40
    about = (
        "A causal graph of the tokens a head attends to, learned from its attention; what in it explains a word of the "
        "answer; and whether the model says another word when those tokens are masked."
    )

    def controls(self, model: HookedMM) -> Sequence[Control]:
        """What is explained, by which head; of the graph; of the verification."""
        last = model.cfg.n_layers - 1
        alphas = [(f"{alpha:g}", alpha) for alpha in ALPHAS]
        hows = [("no position reads them", "knockout"), ("image tokens become their mean", "mean")]
        return [
            Choice("token", "Word to explain", [], info="the first chosen one at first", changing=True),
            Number("layer", "Layer", 0, last, last),
            Choice("head", "Head", [], info="the one that looks at the pictures most at first", changing=True),
            Toggle("every", "Learn the graphs of all heads", info="takes as many times as long"),
            Number("threshold", "Attention threshold (raw)", 0, 0.5, THRESHOLD, 0.001, "tokens above it are nodes"),
            Number("most_images", "Image tokens at most", 1, 100, MOST_IMAGES),
            Choice("alpha", "Alpha", alphas, ALPHA, "level of a test of independence; smaller: fewer edges"),
            Number("depth", "Search range", 1, 6, DEPTH, info="steps from the word"),
            Number("most_conditions", "Conditions of a test at most", 0, 8, MOST_CONDITIONS),
            Number("most_tests", "Tests of a graph at most", 1000, 200_000, TESTS, 1000),
            Toggle("verify", "Verify by masking", True, "does the model say another word without these tokens?"),
            Choice("how", "Masked", hows, "knockout"),
            Number("budget", "Masked runs at most", 1, 400, BUDGET),
        ]

    def look(self, asked: Asked, values: Mapping[str, Any], work: Work) -> tab.View:
        """See `hooked_mm.explorer.tab`.

        Raises:
            UnsupportedModelError: If no row of attention holds both pictures and words.
        """
        if empty := lacking(asked, pictures=True):
            return empty
        number = values["token"] if values["token"] in asked.numbers else asked.tokens[0]
        work.step("reading attention")
        model, count = asked.model, asked.model.cfg.n_heads
        targets = answer_targets(asked.batch, [number])
        settings = {name: values[name] for name in SETTINGS}
        heads = head_rows(model, asked.batch, targets, values["layer"], count, **settings)
        by_number = {one.head: one for one in heads}
        chosen = values["head"] if values["head"] in by_number else heads[0].head
        learning = {name: values[name] for name in LEARNING}
        every = {
            one.head: explain(one.rows, one.nodes, **learning, tell=_told(work, one.head, values["most_tests"]))
            for one in heads
            if values["every"] or one.head == chosen
        }
        shown = _Shown(asked, values, work, targets, number, by_number[chosen], every[chosen])
        wanted = [("word", values["token"], number), ("head", values["head"], chosen)]
        panels: list[Panel] = [
            Note(f"There is no {what} {asked_for!r} here; explained is {taken!r}.", "warning")
            for what, asked_for, taken in wanted
            if asked_for not in (None, taken)
        ]
        panels += [*shown.panels(), *_heads(heads, every, chosen, shown)]
        options = {
            "token": list(zip(named(asked, asked.numbers), asked.numbers, strict=True)),
            "head": [(f"{n}: {by_number[n].image_mass:.3f} on the pictures", n) for n in sorted(by_number)],
        }
        arrays = {
            "heads": torch.tensor([one.head for one in heads]),
            "image_mass": torch.tensor([one.image_mass for one in heads]),
            **shown.arrays(),
        }
        if values["every"]:
            arrays["explaining"] = torch.tensor([len(every[one.head].members) for one in heads])
        return tab.View(panels, shown.python(), arrays, options)


def _told(work: Work, head: int, most: int) -> Callable[[int], None]:
    return lambda done: work.step(f"testing independences in head {head}", done, most)


class _Shown:
    """One head's explanation, as panels, arrays and Python."""

    def __init__(
        self,
        asked: Asked,
        values: Mapping[str, Any],
        work: Work,
        targets: Targets,
        number: int,
        held: HeadRows,
        explanation: Explanation,
    ) -> None:
        self.asked, self.values, self.work, self.number = asked, values, work, number
        self.held, self.explanation, self.row = held, explanation, int(targets.row[0])
        self.word = asked.word(number).strip()
        words = position_words(asked, torch.tensor(held.nodes.positions))
        marks = zip(node_labels(asked.batch, 0, held.nodes), words, held.nodes.image, strict=True)
        self.labels = [label if image else word.strip() or label for label, word, image in marks]
        self.refused, self.checked = "", None
        if values["verify"]:
            try:
                self.checked = check(
                    asked.model, asked.batch, 0, self.row, explanation, **self._masking, tell=self._tell
                )
            except UnsupportedModelError as error:
                self.refused = f"It can't be verified: {error}"
        self.subset = () if self.checked is None else self.checked.verification.subset
        self.connector: Connector | None = None
        if asked.batch.layout.kind == "resampled":
            self.connector = connector_map(asked.model, asked.batch)

    @property
    def _masking(self) -> dict[str, Any]:
        return {"how": self.values["how"], "budget": self.values["budget"]}

    def _tell(self, done: int) -> None:
        self.work.step("masking tokens", done, self.values["budget"])

    def _said(self, token: int) -> str:
        return str(self.asked.model.tokenizer.decode([token])).strip()

    def panels(self) -> list[Panel]:
        """From the finding to its details."""
        told, learned = self.explanation, self.explanation.learned
        image = sum(told.nodes.image)
        facts = [
            ("word", self.word),
            ("predicted at", f"position {self.row}"),
            ("layer", self.held.layer),
            ("head", self.held.head),
            ("nodes", f"{image} of the pictures, {len(told.nodes) - image} of text"),
            ("edges", len(told.pag.edges())),
            ("tests", sum(learned.tests)),
        ]
        found: list[Panel] = [Facts(facts), Note(self._finding())]
        if self.refused:
            found.append(Note(self.refused, "warning"))
        if not learned.complete:
            found.append(
                Note("The search was cut short by a limit: the graph holds what the tests made so far say.", "warning")
            )
        if learned.refused:
            found.append(Note(f"{learned.refused} tests could not be made, as one row is a sum of others."))
        return [*found, *self._graph(), *self._pictures(), self._text(), *self._table()]

    def _finding(self) -> str:
        checked, members = self.checked, len(self.explanation.members)
        if checked is None:
            return f"{self.word!r}: explained by {members} tokens in this head; not verified by masking."
        said = None if checked.predicted is None else self._said(checked.predicted)
        verification = checked.verification
        return f"{self.word!r}: {summary(self.explanation, verification, said)} ({verification.tried} masked runs)."

    def _graph(self) -> list[Panel]:
        told, kept = self.explanation, self.explanation.members[:MOST_DRAWN]
        if not kept:
            return []
        # Nearest come first, so paths of those that are kept run through those that are kept.
        drawn = replace(told, paths={node: told.paths[node] for node in kept})
        labels = [*self.labels[:-1], f"{self.word} (predicted)"]
        caption = "right: the word; left of it what explains it, by steps; thick rims: masked, the word changes"
        crops = node_crops(self.asked.model, self.asked.batch, 0, told.nodes, self.asked.images)
        picture = Picture(caption, graph_picture(drawn, labels, self.subset, crops))
        found: list[Panel] = [Pictures([picture], "Graph", min(GRAPH, max(picture.image.size)))]
        if len(kept) < len(told.members):
            found.append(
                Note(f"Drawn are the nearest {len(kept)} of {len(told.members)} tokens that explain the word.")
            )
        return found

    def _pictures(self) -> list[Panel]:
        """The image tokens: nodes, explanation and subset, then what lies within each number of steps."""
        told, asked = self.explanation, self.asked
        deepest = max(map(len, told.paths.values()), default=1) - 1
        found = self._over("nodes, explanation, verified", told, None)
        by_steps = deepest > 1 and any(told.nodes.image[node] for node in told.paths)
        for steps in range(1, deepest + 1 if by_steps else 1):
            near = {node: path for node, path in told.paths.items() if len(path) <= steps + 1}
            self.work.step("drawing pictures", steps, deepest)
            found += self._over(f"within {steps} step{'s' if steps > 1 else ''}", replace(told, paths=near), 0.0)
        title = "Image tokens: pale nodes of the graph, stronger the explanation, strongest what masking verified"
        places = [] if self.connector is None else [Note("Latents belong to no place: shown are patches they look at.")]
        drawn = len(found[:MOST_PICTURES])
        more = [Note(f"Shown are {drawn} of {len(found)} pictures.")] if drawn < len(found) else []
        return [Pictures(found[:MOST_PICTURES], title, SIDE), *places, *more] if asked.images else []

    def _over(self, caption: str, explanation: Explanation, nodes: float | None) -> list[Picture]:
        """Tokens on every picture; `nodes` is another strength of what is a node alone."""
        levels = None if nodes is None else {"node": nodes, "explanation": 0.8, "subset": 0.8}
        values = token_values(explanation, self.asked.batch.modality.shape[1], self.subset, levels)
        drawn = self._drawn(values)
        return [Picture(f"{caption}{name}", image) for name, image in zip(self._names(len(drawn)), drawn, strict=True)]

    def _drawn(self, values: Tensor) -> list[Image.Image]:
        asked, device = self.asked, self.asked.model.device
        return token_pictures(asked.model, asked.batch, 0, values.to(device), asked.images, self.connector, SIDE)

    def _names(self, count: int) -> list[str]:
        """What each of so many drawn pictures is."""
        names = []
        several = len(self.asked.images) > 1
        for number, place in enumerate(self.asked.batch.layout.images):
            name = f", picture {number + 1}" if several else ""
            names.append(name)
            if any(getattr(place, f"{kind}overview") is not None for kind in ("", "patches_", "tokens_")):
                names.append(f"{name}, overview")
        return names if len(names) == count else [f", {number + 1}" for number in range(count)]

    def _text(self) -> Words:
        """The text behind the pictures as far as the word: which of it are nodes, explain, are verified."""
        batch, length = self.asked.batch, self.asked.batch.modality.shape[1]
        values = token_values(self.explanation, length, self.subset)
        values[self.row] = torch.nan
        text = node_masks(batch)[1][0].cpu()
        text[self.row + 1 :] = False
        places = text.nonzero()[-MOST_WORDS:, 0]
        title = f"Text tokens behind the pictures, up to the one that predicts {self.word!r}"
        return Words(
            list(zip(position_words(self.asked, places), values[places].tolist(), strict=True)), title, peak=1.0
        )

    def _table(self) -> list[Panel]:
        told = self.explanation
        rows = [
            (
                self.labels[node],
                "picture" if told.nodes.image[node] else "text",
                len(told.paths[node]) - 1,
                told.nodes.weights[node],
                "yes" if node in self.subset else "",
            )
            for node in told.members
        ]
        columns = ("token", "of", "steps", "attention to it", "verified")
        return [Table(columns, rows, f"What explains {self.word!r}, nearest first")] if rows else []

    def arrays(self) -> dict[str, Tensor]:
        """The graph and what was found in it."""
        nodes = self.held.nodes
        found = {
            "positions": torch.tensor(nodes.positions),
            "attention": torch.tensor(nodes.weights),
            "rows": self.held.rows,
            "marks": torch.from_numpy(self.explanation.pag.marks.copy()),
            "explanation": torch.tensor(self.explanation.members, dtype=torch.long),
        }
        if self.checked is not None:
            found["verified"] = torch.tensor(self.subset, dtype=torch.long)
        return found

    def python(self) -> str:
        """How the arrays are found again."""
        values = self.values
        settings, learning, masking = (
            ", ".join(f"{name}={value!r}" for name, value in chosen.items())
            for chosen in (
                {name: values[name] for name in SETTINGS},
                {name: values[name] for name in LEARNING},
                self._masking,
            )
        )
        lines = [
            "import torch",
            "from analyses.attention_graphs import head_rows",
            "from analyses.causal_check import check",
            "from analyses.causal_explanation import explain",
            "from analyses.targets import answer_targets",
            "",
            f"targets = answer_targets(batch, [{self.number}])",
            f"heads = head_rows(model, batch, targets, {values['layer']}, model.cfg.n_heads, {settings})",
            f"head = next(one for one in heads if one.head == {self.held.head})",
            f"learning = dict({learning})",
            "found = explain(head.rows, head.nodes, **learning)",
            "arrays = {",
            '    "heads": torch.tensor([one.head for one in heads]),',
            '    "image_mass": torch.tensor([one.image_mass for one in heads]),',
            '    "positions": torch.tensor(head.nodes.positions),',
            '    "attention": torch.tensor(head.nodes.weights),',
            '    "rows": head.rows,',
            '    "marks": torch.from_numpy(found.pag.marks),',
            '    "explanation": torch.tensor(found.members, dtype=torch.long),',
            "}",
        ]
        if self.checked is not None:
            lines.append(f"checked = check(model, batch, 0, {self.row}, found, {masking})")
            lines.append('arrays["verified"] = torch.tensor(checked.verification.subset, dtype=torch.long)')
        if values["every"]:
            lines.append("every = [explain(one.rows, one.nodes, **learning) for one in heads]")
            lines.append('arrays["explaining"] = torch.tensor([len(one.members) for one in every])')
        return "\n".join(lines)


def _heads(heads: Sequence[HeadRows], every: Mapping[int, Explanation], chosen: int, shown: _Shown) -> list[Panel]:
    """All heads, with what was found in those whose graph was learned; a click shows one's graph."""
    rows, picks = [], []
    pictures: list[Picture] = []
    for one in heads:
        told = every.get(one.head)
        found = ("", "", "") if told is None else (len(told.members), len(told.pag.edges()), sum(told.learned.tests))
        rows.append((f"{one.head}{' (shown)' if one.head == chosen else ''}", one.image_mass, len(one.nodes), *found))
        picks.append({"head": one.head, "every": False})
        if told is not None and len(every) > 1 and shown.asked.images and len(pictures) < MOST_HEADS:
            shown.work.step("drawing heads", len(pictures), len(heads))
            drawn = shown._drawn(token_values(told, shown.asked.batch.modality.shape[1]))
            pictures.append(Picture(f"head {one.head}: {len(told.members)} tokens explain it", drawn[0], picks[-1]))
    columns = ("head", "attention to the pictures", "nodes", "explaining tokens", "edges", "tests")
    panels: list[Panel] = [Table(columns, rows, f"Heads of layer {heads[0].layer}; a click learns one's graph", picks)]
    if pictures:
        panels.append(Pictures(pictures, "What explains the word in each head, on the first picture", 176))
        if len(pictures) < len(every):
            panels.append(Note(f"Shown are {len(pictures)} of {len(every)} heads, those that look at pictures most."))
    return panels


def make_tab(folders: Sequence[Path] = ()) -> tab.Tab:
    """The tab; it opens no folders."""
    return CausalTab()
