"""The command for knockout: its table is what its functions say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from analyses.attention_knockout import CUTS, Cut, knocked_out, scores
from analyses.image_pairs import scene_pairs
from analyses.knockout_command import main, parsed_cuts
from analyses.pair_batches import PairBatches, pair_groups
from analyses.result import Result
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.tensor_folder import read_json, read_tensors

MODEL = ("--model.id", "small:llava", "--model.dtype", "float32", "--draws", "20", "--attribute", "colour")


@pytest.mark.usefixtures("loaded")
def test_the_command_writes_what_each_cut_changes(llava: HookedMM, tmp_path: Path) -> None:
    """A window of three layers around the fourth, clipped at the sixth; both kinds of change."""
    out = tmp_path / "out"
    more = ["--window", "3", "--layers", "[3, 5]", "--cuts", "['last -> object', 'subject->object']"]
    main([*MODEL, "--size", "3", "--batch_size", "2", *more, "--output", str(out)])
    cuts, windows = [Cut("last", "object"), Cut("subject", "object")], [range(2, 5), range(4, 6)]
    parts = []
    for pairs in PairBatches(llava, scene_pairs("colour", 3), 2):
        found = knocked_out(llava, pairs.clean, pairs.targets, pair_groups(llava, pairs), cuts, windows)
        parts.append(found.change(scores(llava, pairs.clean, pairs.targets), "difference"))
    expected = torch.cat(parts, dim=2)
    result = Result.load(out)
    for place, cut in enumerate(cuts):
        own = result.of("change of the logit difference", str(cut))
        assert [one.layer for one in own] == [3, 5]
        assert [one.value for one in own] == pytest.approx(expected[:, place].mean(1).tolist(), abs=1e-3)
        assert own[0].samples == 3
    assert len(result.of("change of the probability")) == 4
    content = read_json(out, "changes", "numbers", "")
    arrays = read_tensors(out, "changes", content)
    torch.testing.assert_close(arrays["difference/last -> object"], expected[:, 0], rtol=0, atol=1e-3)
    assert (out / "heat-probability.png").is_file()
    assert "3 pairs; windows of 3 layers" in result.notes


def test_cuts_are_written_with_an_arrow() -> None:
    """All that are known, unless some are given."""
    assert parsed_cuts(None) == list(CUTS)
    assert parsed_cuts(["last->object"]) == [Cut("last", "object")]
    with pytest.raises(BadInputError, match="the cut 'last object' is none"):
        parsed_cuts(["last object"])


@pytest.mark.usefixtures("loaded")
def test_layers_and_draws_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    """Before anything runs."""
    given = [*MODEL, "--size", "1", "--output", str(tmp_path / "out")]
    with pytest.raises(BadInputError, match="layer 6 was asked for"):
        main([*given, "--layers", "[6]"])
    with pytest.raises(BadInputError, match="draws=0"):
        main([*given, "--draws", "0"])
