"""Results of several models in one plot per score: base and fine-tuned, LLaVA and LLaVA-Med, trained and random.

hooked-mm analyse compare --results '[runs/base, runs/tuned]' --output runs/both
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from analyses.frame import new_parser
from analyses.result import Result, compare
from hooked_mm.errors import BadInputError


def main(argv: Sequence[str] | None = None) -> None:
    """The command `hooked-mm analyse compare`.

    Raises:
        BadInputError: As `compare`; or if there are not as many names as results.
    """
    parser = new_parser("compare", __doc__)
    parser.add_argument("--results", type=list[Path], required=True, help="output folders of one analysis")
    parser.add_argument("--names", type=list[str] | None, help="what to call their models, in the same order")
    made = parser.parse_args(None if argv is None else list(argv))
    results = [Result.load(folder) for folder in made.results]
    if made.names is not None:
        if len(made.names) != len(results):
            raise BadInputError(f"{len(made.names)} names for {len(results)} results; give one for each")
        results = [replace(result, model=name) for result, name in zip(results, made.names, strict=True)]
    for path in compare(results, made.output):
        print(path)
