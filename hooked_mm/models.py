"""Every architecture with what was checked, the proof for one model (`--check`), or the trained ones (`--small`)."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from hooked_mm.conformance import ConformanceReport
from hooked_mm.errors import ConformanceError
from hooked_mm.hooked import HookedMM
from hooked_mm.small import SMALL_MODELS, adapters_of, small_model_path
from hooked_mm.small.accuracy import Accuracy, mean
from hooked_mm.small.card import SIBLING, facts, sibling
from hooked_mm.survey import ARCHITECTURES, Surveyed, check_miniature, markdown, summary, survey
from hooked_mm.testing.miniatures import RECIPES


def check_model(model_id: str, *, full: bool, dtype: str, device_map: str | None) -> ConformanceReport:
    """Load a model of the hub or a folder and check it; or the miniature, for the name of a family."""
    if model_id in RECIPES:
        return check_miniature(model_id, full=full)[1]
    try:
        model = HookedMM.from_pretrained(model_id, dtype=dtype, device_map=device_map, check="full" if full else True)
    except ConformanceError as error:
        report: ConformanceReport = error.report
        return report
    assert model.conformance is not None
    return model.conformance


_COLUMNS = "{:24} {:9} {:>6} {:>4} {:>5} {:>5} {:>4} {:>4} {:>8} {:>5}  {}"


def table(families: Sequence[str] = ARCHITECTURES, *, full: bool = False) -> Iterator[tuple[str, Surveyed | None]]:
    """The lines of the table with what each is of: the heading, then one per architecture, as soon as it is known."""
    heading = ("architecture", "status", "points", "text", "tower", "hold", "fail", "n/a", "error", "s", "kind")
    yield _COLUMNS.format(*heading), None
    for row in survey(families, full=full):
        numbers = (row.points, row.layers, row.vision_layers, row.holds, row.fails, row.not_applicable)
        measured = (f"{row.error:.1e}", f"{row.seconds:.1f}") if row.points else ("", "")
        cells = [str(number) if row.points else "" for number in numbers]
        yield _COLUMNS.format(row.family, row.status, *cells, *measured, row.note), row


def _print_table(families: Sequence[str], *, full: bool, page: Path | None) -> bool:
    """Print the table line by line; whether no architecture fails a check that it should pass."""
    rows = []
    for line, row in table(families, full=full):
        print(line, flush=True)
        rows += [] if row is None else [row]
    print(
        f"\n{summary(rows)}.\nerror: the largest deviation of any equation, relative to the largest value. n/a follows "
        "from the kind of model.\nhooked-mm models --check FAMILY_OR_ID prints every check. What is not built lacks a "
        "package or takes no picture."
    )
    if page is not None:
        page.write_text(f"{markdown(rows)}\n")
    return all(row.status in ("conforms", "not built") for row in rows)


def small_table(folders: Sequence[Path]) -> list[str]:
    """The lines about small models: a row per model, and behind them one per fine-tuned sibling.

    Args:
        folders: Of the models, with their `accuracy.json`; an adapter's lies in its own folder.

    Raises:
        BadInputError: If a model or an adapter was not measured.
    """
    columns = "{:10} {:>10} {:>5} {:>7} {:>6} {:>9}  {:>5} {:>6}  {:>5} {:>5} {:>5}  {:>5} {:>6}"
    lines = [
        columns.format("", "", "", "image", "tower", "", "questions", "", "captions", "", "", "wrong", "").rstrip(),
        columns.format(
            *("model", "parameters", "MB", "tokens", "layers", "layers", "test", "unseen", "full", "short", "any"),
            *("image", "chance"),
        ),
    ]
    siblings = []
    for folder in folders:
        is_, found = facts(folder), Accuracy.load(folder)
        low, high = is_.image_tokens
        shares = [mean(found.questions["test"]), mean(found.questions["unseen"])]
        shares += [found.captions["test"][style].exact.value for style in ("full", "short", "any")]
        shares += [mean(found.wrong_image), mean(found.chance)]
        lines.append(
            columns.format(
                folder.name,
                f"{is_.parameters:,}",
                f"{is_.megabytes:.1f}",
                str(low) if low == high else f"{low}-{high}",
                is_.tower_layers,
                is_.layers,
                *(f"{share:.3f}" for share in shares),
            )
        )
        siblings += [(folder.name, name, sibling(folder, name)) for name in adapters_of(folder)]
    if siblings:
        lines += ["", f"{'model':10} {'adapter':12} " + " ".join(f"{what:>16}" for what in SIBLING)]
        for model, name, told in siblings:
            cells = [f"{before:.3f} > {after:.3f}" for before, after in told.values()]
            lines.append(f"{model:10} {name:12} " + " ".join(f"{cell:>16}" for cell in cells))
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """The command `hooked-mm models`."""
    parser = ArgumentParser(
        prog="hooked-mm models",
        description="Without arguments: every image-text-to-text architecture of the installed transformers as a "
        "random miniature: what resolves, what was checked, what is not available and why. Takes a few minutes.",
    )
    parser.add_argument("families", nargs="*", default=[], help="only these architectures")
    parser.add_argument("--page", type=Path, help="also write the table to this Markdown file")
    parser.add_argument("--check", metavar="ID", help="a hub id, a folder or a family: print its whole report")
    parser.add_argument("--small", action="store_true", help="the trained models that ship, and how well they see")
    parser.add_argument("--full", action="store_true", help="look at every block, not the first and last of each kind")
    parser.add_argument("--dtype", default="auto", help="of the weights, with --check")
    parser.add_argument("--device_map", help="as in transformers, with --check")
    chosen = parser.parse_args(None if argv is None else list(argv))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if chosen.small:
            fine = True
            print("\n".join(small_table([small_model_path(name) for name in SMALL_MODELS])))
            print(
                "\nShares right on scenes never seen. questions: mean over types, on the test split and scenes with\n"
                "pairs of shape and colour that were never shown. captions: every word right, by the style asked for\n"
                "(any: none). wrong image: questions asked of another picture. chance: the best constant answer.\n"
                "adapters: shares without > with it; of what it was taught, then questions and styles it was not."
            )
        elif chosen.check:
            report = check_model(chosen.check, full=chosen.full, dtype=chosen.dtype, device_map=chosen.device_map)
            print(report)
            fine = report.ok
        else:
            fine = _print_table(chosen.families or ARCHITECTURES, full=chosen.full, page=chosen.page)
    if not fine:
        sys.exit(1)
