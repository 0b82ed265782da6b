"""The folder of a run is made or refused by name; tables as text stand under each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from hooked_mm.errors import BadInputError
from hooked_mm.run_output import output_folder, text_columns


def test_the_folder_is_made_with_those_above_it(tmp_path: Path) -> None:
    """Once more is no error; what stands in its way is."""
    folder = tmp_path / "a" / "b"
    assert output_folder(str(folder)) == folder
    assert output_folder(folder).is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInputError, match=r"the output folder .*file/x' can't be made"):
        output_folder(tmp_path / "file" / "x")


def test_columns_of_text_stand_under_each_other() -> None:
    """The first to the left, the others to the right; no blanks at the ends of lines."""
    assert text_columns([["", "effect"], ["red", "1"], ["orange", "20.5"]]) == [
        "        effect",
        "red          1",
        "orange    20.5",
    ]
    assert text_columns([["a", "bb", "1"], ["ccc", "d", "22"]], 2) == ["a    bb   1", "ccc  d   22"]
