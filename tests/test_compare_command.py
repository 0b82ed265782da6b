"""`hooked-mm analyse compare`: results of folders in one plot, under other names if told."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from analyses.analyse_command import main
from hooked_mm.errors import BadInputError
from tests.test_result import RESULT_A


def test_two_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pictures and a table are written and named; names have to be as many as results."""
    RESULT_A.write(tmp_path / "a")
    replace(RESULT_A).write(tmp_path / "b")
    results = f"[{tmp_path / 'a'}, {tmp_path / 'b'}]"
    both = ["compare", "--results", results, "--output", str(tmp_path / "both")]
    with pytest.raises(BadInputError, match="called differently"):
        main(both)
    with pytest.raises(BadInputError, match="1 names for 2 results"):
        main([*both, "--names", "[x]"])
    main([*both, "--names", "[x, y]"])
    assert capsys.readouterr().out.strip() == str(tmp_path / "both" / "linearity.png")
    with open(tmp_path / "both" / "scores.csv", newline="") as file:
        assert {row["model"] for row in csv.DictReader(file)} == {"x", "y"}
