"""The command for patching: its table is what its functions say, and its files hold every pair's numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from analyses.causal_tracing import control, traced
from analyses.image_pairs import scene_pairs
from analyses.pair_batches import PairBatches, pair_groups
from analyses.patching_command import main
from analyses.result import Result
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.tensor_folder import read_json, read_tensors

MODEL = ("--model.id", "small:llava", "--model.dtype", "float32", "--draws", "20")


@pytest.mark.usefixtures("loaded")
def test_the_command_writes_tables_numbers_and_a_gallery(
    llava: HookedMM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Means are over the pairs of all batches; a batch of one pair has no control, and that is noted."""
    out = tmp_path / "out"
    more = ["--components", "[resid_post]", "--layers", "[5]", "--attribution", "true", "--gallery", "1"]
    main([*MODEL, "--attribute", "colour", "--size", "3", "--batch_size", "2", *more, "--output", str(out)])
    result = Result.load(out)
    assert result.kinds() == ["recovery, resid_post", "control, resid_post", "attribution, resid_post"]
    found, points = [], ["blocks.5.hook_resid_post"]
    for pairs in PairBatches(llava, scene_pairs("colour", 3), 2):
        groups = pair_groups(llava, pairs)
        found.append(traced(llava, pairs, points, {"last": groups["last"]})[:, 0])
        if len(pairs) > 1:
            other = control(llava, pairs, points, {"last": groups["last"]})[:, 0]
    expected = torch.cat(found, dim=1)
    told = {(one.modality, one.layer): one for one in result.of("recovery, resid_post")}
    assert told["last", 5].value == pytest.approx(float(expected[0].mean()), abs=1e-4)
    assert told["last", 5].value == pytest.approx(1.0, abs=1e-4)
    assert told["last", 5].samples == 3
    assert told["object", 5].value == pytest.approx(0.0, abs=1e-4)
    control_of = {(one.modality, one.layer): one for one in result.of("control, resid_post")}
    assert control_of["last", 5].value == pytest.approx(float(other[0].mean()), abs=1e-3)
    assert control_of["last", 5].samples == 2
    assert any("1 pairs have no control" in note for note in result.notes)
    content = read_json(out, "recovery", "numbers", "")
    assert content["rows"] == points
    arrays = read_tensors(out, "recovery", content)
    torch.testing.assert_close(arrays["recovery/last"], expected, rtol=0, atol=1e-4)
    page = (out / "gallery.html").read_text()
    assert page.count("data:image") == 3
    assert "share attributed to each patch, blocks.5.hook_resid_post" in page
    assert (out / "recovery-resid_post.png").is_file()
    assert "3 pairs" in capsys.readouterr().out


@pytest.mark.usefixtures("loaded")
def test_without_pairs_or_draws_nothing_is_written(tmp_path: Path) -> None:
    """It says so."""
    given = [*MODEL, "--clean", "x", "--output", str(tmp_path / "out")]
    with pytest.raises(BadInputError, match="needs --corrupt"):
        main(given)
    with pytest.raises(BadInputError, match="draws=0"):
        main([*given, "--draws", "0"])
    assert not (tmp_path / "out" / "result.json").exists()
