"""What a tab shows fits together, or is refused where it is made."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hooked_mm.errors import BadInputError
from hooked_mm.explorer.panels import Heat, Table, Words

HEAT: dict[str, Any] = {"values": torch.zeros(2, 3), "rows": ["a", "b"], "columns": ["x", "y", "z"]}


def test_what_fits_is_made() -> None:
    """With picks or without, and empty."""
    assert Table(["a", "b"], [[1, 2]], picks=[None]).rows == [[1, 2]]
    assert Table(["a"], []).rows == []
    assert Words([("a", 1.0)], picks=[{"token": 0}]).picks
    assert Words([]).words == []
    assert Heat(**HEAT, row_values=[4, 5], column_values="xyz", texts=[["1"] * 3] * 2).peak is None
    assert Heat(torch.zeros(0, 3), [], ["x", "y", "z"]).rows == []


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        (Table, {"columns": ["a"], "rows": [[1], [1, 2]]}, r"columns \['a'\] and 2 rows has rows \[\[1, 2\]\]"),
        (Table, {"columns": ["a"], "rows": [[1]], "picks": [None, None]}, "2 picks; give a value per column"),
        (Words, {"words": [("a", 1.0)], "picks": [None, None]}, "1 words and 2 picks"),
        (Heat, HEAT | {"rows": ["a"]}, r"values of shape \(2, 3\) for 1 rows and 3 columns"),
        (Heat, HEAT | {"values": torch.zeros(2, 3, 1)}, r"values of shape \(2, 3, 1\)"),
        (Heat, HEAT | {"row_values": [1]}, "row_values has 1 entries, not 2"),
        (Heat, HEAT | {"column_values": [1, 2]}, "column_values has 2 entries, not 3"),
        (Heat, HEAT | {"texts": [["1"] * 3]}, "texts has 1 entries, not 2"),
        (Heat, HEAT | {"texts": [["1"] * 3, ["1"] * 2]}, r"texts\[1\] has 2 entries, not 3"),
    ],
)
def test_what_does_not_fit_is_refused(kind: Any, options: dict[str, Any], reason: str) -> None:
    """Where the tab makes it, not where the page draws it: with the numbers that differ."""
    with pytest.raises(BadInputError, match=reason):
        kind(**options)
