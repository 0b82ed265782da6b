"""The explorer's tab of Grad-CAM, and of the other methods that say where in its pictures an answer comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analyses.attribution_methods import METHODS, answer_case, attribution
from analyses.grad_cam import GradCams, grad_cam
from analyses.gradcam_command import on_picture
from analyses.picture_maps import PictureMap
from analyses.tab_maps import (
    KIND,
    SCALE,
    Drawing,
    bounded,
    drawn,
    lacking,
    map_arrays,
    named,
    percents,
    position_maps,
)
from analyses.targets import answer_targets
from hooked_mm.errors import BadInputError
from hooked_mm.explorer.asked import Asked
from hooked_mm.explorer.panels import Heat, Note, Panel, Table
from hooked_mm.explorer.tab import Choice, Control, View
from hooked_mm.explorer.work import Work
from hooked_mm.hooked import HookedMM

GRAD_CAM = "Grad-CAM"

ALL = -1
"""All layers."""

ROWS = {"target": "the position that predicts the token", "question": "the question's tokens"}
"""Whose attention is shown -> what it is called."""

SLOW = {"integrated gradients": 4, "occlusion": 4}
"""Methods of many passes per token -> how many tokens they explain at a time."""

LARGEST = 1024
"""Pixels of a side that occlusion covers window by window."""


class GradCamTab:
    """See `hooked_mm.explorer.tab.Tab`."""

    name, title, order = "gradcam", "Grad-CAM", 30
    about = (
        "Which places of the pictures speak for each chosen token: attention times its gradient, layer by layer, or "
        "another of thirteen methods."
    )

    def controls(self, model: HookedMM) -> Sequence[Control]:
        """See `Tab`."""
        methods = [GRAD_CAM, *(name for name in METHODS if name != GRAD_CAM)]
        layers = [("all, their mean", ALL), *((str(number), number) for number in range(model.cfg.n_layers))]
        return [
            Choice("method", "Method", [(name, name) for name in methods], GRAD_CAM),
            Choice("layer", "Layer", layers, ALL, "of Grad-CAM"),
            Choice("rows", "Attention of", [(label, name) for name, label in ROWS.items()], "target", "of Grad-CAM"),
            KIND,
            SCALE,
        ]

    def look(self, asked: Asked, values: Mapping[str, Any], work: Work) -> View:
        """See `Tab`."""
        if (empty := lacking(asked, pictures=True)) is not None:
            return empty
        if values["method"] == GRAD_CAM:
            return _grad_cam(asked, values, work)
        return _other(asked, values, work)


def make_tab(folders: Sequence[Path]) -> GradCamTab:
    """The tab; it opens no folders.

    Raises:
        BadInputError: If any are given.
    """
    if folders:
        raise BadInputError(f"the Grad-CAM tab opens no folders, but {len(folders)} were given; leave them out")
    return GradCamTab()


def _grad_cam(asked: Asked, values: Mapping[str, Any], work: Work) -> View:
    tokens, notes = bounded(asked)
    rows, kind, layer = values["rows"], values["kind"], None if values["layer"] == ALL else values["layer"]

    if rows == "question" and not bool(asked.answer_batch.mask(role="question").any()):
        raise BadInputError(
            "the question stands in the encoder, where no token is predicted, so Grad-CAM has no rows of it to show; "
            "choose the position that predicts the token"
        )

    def tell(done: int, total: int) -> None:
        work.step(f"a backward pass for token {done + 1} of {total}", done, total)

    work.step("a forward pass with all attention")
    targets = answer_targets(asked.batch, tokens)
    found = grad_cam(asked.model, asked.batch, targets, rows=rows, kind=kind, tell=tell)
    if layer is not None and layer not in found.layers:
        raise BadInputError(f"layer {layer} has no attention to the picture; those of this model are {found.layers}")
    cams = torch.stack([found.mean(number, layer) for number in range(len(tokens))])
    shares = _shares(asked, found)
    work.step("pictures")
    arrays: dict[str, Tensor] = {"cam": cams, "scores": found.scores}
    panels, python = list(notes), _python_of_grad_cam(len(tokens), rows, kind, layer)
    try:
        maps = position_maps(asked.model, asked.batch, cams, asked.images)
        python = "\n".join([python, *_python_of_maps(len(tokens))])
    except BadInputError as error:
        maps = []
        panels.append(Note(f"There is no map over the picture: {error}", "warning"))
    for token, own in zip(tokens, maps, strict=False):
        arrays |= map_arrays(f"token-{token}", own)
    where = "mean of all layers" if layer is None else f"layer {layer}"
    panels += _drawn(asked, tokens, maps, values["scale"], f"{GRAD_CAM}, {where}, attention of {ROWS[rows]}")
    panels += [Note(f"{note[0].upper()}{note[1:]}.") for note in found.notes]
    layers, names = [str(number) for number in found.layers], named(asked, tokens)
    title = "How much of Grad-CAM lies on the picture, in percent; grey where nothing has a gradient"
    picks = (None, "layer")
    panels.append(
        Heat(shares, names, layers, title, "token \\ layer", picks, None, found.layers, percents(shares), 1.0)
    )
    scores = [[name, float(score)] for name, score in zip(names, found.scores, strict=True)]
    panels.append(Table(["token", "its logit" if kind == "logit" else "its log-probability"], scores))
    return View(panels, python, arrays)


def _shares(asked: Asked, found: GradCams) -> Tensor:
    """(tokens, layers): the share on the picture, mean over rows with a gradient; NaN where there is none."""
    own = zip(on_picture(asked.model, asked.batch, found), found.reached, strict=True)
    return torch.stack([share.masked_fill(~reached, torch.nan).nanmean(1) for share, reached in own])


def _other(asked: Asked, values: Mapping[str, Any], work: Work) -> View:
    method, kind = values["method"], values["kind"]
    tokens, notes = bounded(asked, SLOW[method]) if method in SLOW else bounded(asked)
    large = [image.size for image in asked.images if max(image.size) > LARGEST]
    if method == "occlusion" and large:
        raise BadInputError(
            f"occlusion covers a picture window by window, which takes long for one of {large[0]} pixels; give "
            f"pictures of at most {LARGEST} a side, or choose another method"
        )
    history = asked.conversation.history
    maps = []
    for number, token in enumerate(tokens):
        with _counted(asked.model, work, f"{method} of token {number + 1} of {len(tokens)}", number, len(tokens)):
            case = answer_case(asked.model, asked.batch, token, asked.images, asked.question, kind, history)
            maps += attribution(method, case)
    arrays: dict[str, Tensor] = {}
    for token, own in zip(tokens, maps, strict=True):
        arrays |= map_arrays(f"token-{token}", own)
    names = named(asked, tokens)
    sums = [[sum(float(one.values.nansum()) for one in own), _peak(own)] for own in maps]
    rows = [[name, *own] for name, own in zip(names, sums, strict=True)]
    table = Table(["token", "sum of its maps", "largest value"], rows)
    title = f"{method[0].upper()}{method[1:]}: {METHODS[method][1]}"
    panels = [*notes, *_drawn(asked, tokens, maps, values["scale"], title), table]
    return View(panels, _python_of_others(asked, method, kind, len(tokens)), arrays)


def _peak(maps: Sequence[PictureMap]) -> float:
    return max(float(one.values.nan_to_num(nan=-torch.inf).max()) for one in maps)


@contextmanager
def _counted(model: HookedMM, work: Work, told: str, done: int, total: int) -> Iterator[None]:
    """While open, every pass of the model is told, and is none once the work shall end."""
    passes = 0

    def step(*_: object) -> None:
        nonlocal passes
        passes += 1
        work.step(f"{told}, pass {passes}", done, total)

    handle = model.hf_model.register_forward_pre_hook(step)
    try:
        yield
    finally:
        handle.remove()


def _drawn(
    asked: Asked, tokens: Sequence[int], maps: Sequence[Sequence[PictureMap]], scale: str, title: str
) -> list[Panel]:
    drawings = [Drawing(name, own) for name, own in zip(named(asked, tokens), maps, strict=False)]
    return drawn(drawings, asked.images, scale, title)


def _python_of_grad_cam(count: int, rows: str, kind: str, layer: int | None) -> str:
    return "\n".join(
        [
            "import torch",
            "",
            "from analyses.grad_cam import grad_cam",
            "from analyses.tab_maps import map_arrays, position_maps",
            "from analyses.targets import answer_targets",
            "",
            f"targets = answer_targets(batch, tokens[:{count}])",
            f"found = grad_cam(model, batch, targets, rows={rows!r}, kind={kind!r})",
            f"cams = torch.stack([found.mean(number, layer={layer!r}) for number in range(len(targets))])",
            'arrays = {"cam": cams, "scores": found.scores}',
        ]
    )


def _python_of_maps(count: int) -> list[str]:
    return [
        f"for token, own in zip(tokens[:{count}], position_maps(model, batch, cams, images)):",
        '    arrays |= map_arrays(f"token-{token}", own)',
    ]


def _python_of_others(asked: Asked, method: str, kind: str, count: int) -> str:
    history = asked.conversation.history
    return "\n".join(
        [
            "from analyses.attribution_methods import answer_case, attribution",
            "from analyses.tab_maps import map_arrays",
            *(["from hooked_mm.prompts import Turn"] if history else []),
            "",
            f"question = {asked.question!r}",
            f"history = {history!r}",
            "arrays = {}",
            f"for token in tokens[:{count}]:",
            f"    case = answer_case(model, batch, token, images, question, {kind!r}, history)",
            f'    arrays |= map_arrays(f"token-{{token}}", attribution({method!r}, case)[0])',
        ]
    )
