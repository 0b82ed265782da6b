"""Every image-text-to-text architecture of transformers: what resolves, what was proved, what can't be had and why.

Each is built as a miniature and put to the whole conformance check; nothing here is a list kept by hand.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from hooked_mm.conformance import ConformanceReport, describe_kinds
from hooked_mm.errors import BadInputError, UnsupportedModelError
from hooked_mm.hooked import HookedMM
from hooked_mm.testing.miniatures import PORTED, miniature, miniature_inputs

ARCHITECTURES: tuple[str, ...] = (*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, *PORTED)
"""`config.model_type` of all that the installed transformers calls image-text-to-text, and of those that we bring."""

Status = Literal["conforms", "partly", "refused", "not built"]
"""How far an architecture goes:

- `conforms`: every point of its list means what its name says.
- `partly`: some points do not, and are not available; the others do.
- `refused`: it is built, and no part of it can be trusted or found.
- `not built`: there is no miniature: a package is missing, or it takes no picture.
"""


@dataclass(frozen=True)
class Surveyed:
    """One architecture.

    Attributes:
        family: `config.model_type`.
        status: See `Status`.
        note: Its kinds; behind them what is not available, or why it is refused or not built.
        points: How many hook points it has.
        layers: Blocks of the text (and of a text encoder, if any).
        vision_layers: Blocks of the tower, 0 without one.
        holds: Checks that hold.
        fails: Checks that do not.
        not_applicable: Checks that do not apply to its kind.
        error: The largest deviation of any equation that holds, relative to the largest value.
        seconds: What building and checking took.
    """

    family: str
    status: Status
    note: str
    points: int = 0
    layers: int = 0
    vision_layers: int = 0
    holds: int = 0
    fails: int = 0
    not_applicable: int = 0
    error: float = 0.0
    seconds: float = 0.0


def check_miniature(family: str, *, full: bool = False) -> tuple[HookedMM, ConformanceReport]:
    """Build a family's miniature and check it; the model and its report, whatever it says.

    Raises:
        BadInputError: For a family without a miniature.
        UnsupportedModelError: If its parts are not found.
    """
    model = HookedMM(miniature(family), check="full" if full else True, strict=False)
    model.run_with_cache(miniature_inputs(model.hf_model, family=family), ())
    assert model.conformance is not None
    return model, model.conformance


def survey_one(family: str, *, full: bool = False) -> Surveyed:
    """How far one architecture goes; no exception says that it does not."""
    start = time.monotonic()
    try:
        model, report = check_miniature(family, full=full)
    except UnsupportedModelError as error:
        return Surveyed(family, "refused", str(error))
    except BadInputError as error:
        return Surveyed(family, "not built", error.reason)
    except Exception as error:
        # Whatever an architecture does that nobody thought of: the others are surveyed all the same.
        return Surveyed(family, "refused", f"it fails with {type(error).__name__}: {str(error).splitlines()[0]}")
    verdicts = Counter(check.verdict for check in report.checks)
    kinds = ", ".join(kind.split(":")[0] for kind in describe_kinds(model))
    lost = sorted({_bare(name) for name in report.failed_points()})
    note = "; ".join(filter(None, (kinds, f"not available: {', '.join(lost)}" if lost else "")))
    vision = model.cfg.vision
    return Surveyed(
        family=family,
        status="conforms" if report.ok else "partly",
        note=note,
        points=len(model.hook_names),
        layers=model.cfg.n_layers,
        vision_layers=vision.n_layers if vision else 0,
        holds=verdicts["holds"],
        fails=verdicts["fails"],
        not_applicable=verdicts["not applicable"],
        error=max((c.error for c in report.checks if c.error is not None and c.verdict == "holds"), default=0.0),
        seconds=time.monotonic() - start,
    )


def _bare(name: str) -> str:
    """A hook name with its layer left out."""
    return ".".join("{l}" if part.isdigit() else part for part in name.split("."))


def survey(families: Iterable[str] = ARCHITECTURES, *, full: bool = False) -> Iterator[Surveyed]:
    """Each architecture in turn, as soon as it is known."""
    for family in families:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield survey_one(family, full=full)


def summary(rows: Iterable[Surveyed]) -> str:
    """How many of how many reach each status."""
    found = list(rows)
    counts = Counter(row.status for row in found)
    order: tuple[Status, ...] = ("conforms", "partly", "refused", "not built")
    return f"{len(found)} architectures: " + ", ".join(f"{counts[status]} {status}" for status in order)


_PAGE = """# Architectures

How far each image-text-to-text architecture of transformers {version} goes, and Molmo, which this package brings, as
`hooked-mm models --page FILE` found by building each as a miniature with random weights and checking every hook point.
*conforms*: every point of its list means what its name says; *partly*: some points do not, and are not available;
*refused*: it is built, and has nothing that the points could mean; *not built*: a package is missing (install what is
named), or it takes no picture. What to do about one that does not go far enough: [My model is odd](odd_models.md).

{summary}.
"""


def markdown(rows: Iterable[Surveyed]) -> str:
    """The table as a page, with what its words mean."""
    rows = list(rows)
    lines = [
        _PAGE.format(version=transformers.__version__, summary=summary(rows)),
        "| architecture | status | points | text | tower | checks that hold | kind; what is not available, and why |",
        "|---|---|--:|--:|--:|--:|---|",
    ]
    lines += [
        f"| `{row.family}` | {row.status} | {row.points or ''} | {row.layers or ''} | {row.vision_layers or ''} | "
        f"{row.holds or ''} | {row.note.replace('|', '/').replace(chr(10), ' ')} |"
        for row in rows
    ]
    return "\n".join(lines)
