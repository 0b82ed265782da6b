"""The command `hooked-mm models`: the table, one report, a folder, exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from hooked_mm import models
from hooked_mm.errors import BadInputError
from hooked_mm.small import small_model_path
from hooked_mm.survey import ARCHITECTURES, Surveyed
from hooked_mm.testing.miniatures import miniature
from tests.test_card import ADAPTER, planted, save


def test_the_table_has_a_row_per_family(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    """Points, blocks, checks and kinds of each, or why there is none; no failure, so no exit status; and as a page."""
    lines = [line for line, _ in models.table(["llava", "qwen2_vl", "evolla"])]
    assert [line.split()[:2] for line in lines] == [
        *(["architecture", "status"], ["llava", "conforms"], ["qwen2_vl", "conforms"], ["evolla", "not"])
    ]
    assert lines[1].split()[2:5] == ["153", "4", "3"]
    assert lines[1].split()[6] == "0"
    assert "packed tower" in lines[2]
    assert "it reads proteins" in lines[3]
    models.main(["llava", "evolla", "--page", str(tmp_path / "page.md")])
    assert "2 architectures: 1 conforms, 0 partly, 0 refused, 1 not built" in capsys.readouterr().out
    page = (tmp_path / "page.md").read_text()
    assert "| `llava` | conforms | 153 | 4 | 3 |" in page
    assert "| `evolla` | not built |  |  |  |" in page


def test_without_names_every_architecture_has_a_row(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as transformers has, each by its own name; one that fails is the exit status."""
    rows = {family: Surveyed(family, "conforms", "") for family in ARCHITECTURES}
    monkeypatch.setattr("hooked_mm.survey.survey_one", lambda family, full: rows[family])
    models.main([])
    assert f"{len(ARCHITECTURES)} architectures: {len(ARCHITECTURES)} conforms" in capsys.readouterr().out
    rows["llava"] = Surveyed("llava", "partly", "not available: blocks.{l}.attn.hook_q", points=1)
    with pytest.raises(SystemExit):
        models.main([])


def test_one_report(capsys: pytest.CaptureFixture) -> None:
    """`--check FAMILY` and `--check FOLDER` print what was checked; `--full` looks at every block."""
    models.main(["--check", "llava", "--full"])
    printed = capsys.readouterr().out
    assert "blocks looked at: vision 0, 1, 2; text 0, 1, 2, 3" in printed
    assert "unembed(norm(last resid_post)) == logits" in printed
    models.main(["--check", str(small_model_path("llava"))])
    assert "blocks looked at: vision 0, 3; text 0, 5" in capsys.readouterr().out


def test_a_failure_is_the_exit_status(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A model that changes the stream between its blocks is reported, and the status is 1; the table's too."""
    real = miniature

    def lying(family: str) -> nn.Module:
        made: nn.Module = real(family)
        for block in made.get_submodule("model.language_model.layers").children():
            # The next block gets something else than what this one gave.
            block.register_forward_pre_hook(lambda module, args: (args[0] + 0.1, *args[1:]))
        return made

    monkeypatch.setattr("hooked_mm.survey.miniature", lying)
    with pytest.raises(SystemExit) as caught:
        models.main(["--check", "llava"])
    assert caught.value.code == 1
    assert "FAILS at" in capsys.readouterr().out
    _, (line, row) = models.table(["llava"])
    assert row is not None
    assert row.status == "partly"
    assert row.fails == int(line.split()[6]) > 0
    with pytest.raises(SystemExit):
        models.main(["llava"])


def test_a_family_that_is_none() -> None:
    """A name that is neither a family nor a folder is refused by what looks for it."""
    with pytest.raises(BadInputError, match=r"no miniature of 'lava'; nearest: llava"):
        models.check_miniature("lava")


def test_the_checked_models_random_state_is_left_alone() -> None:
    """Building and checking draws from generators of its own."""
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    models.check_miniature("llava")
    assert torch.equal(torch.rand(1), expected)


def test_the_small_models_table(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured, read from the folder; siblings behind; nothing is asked of the model."""
    folder = save("llava", tmp_path / "llava")
    with pytest.raises(BadInputError, match=r"accuracy.json' does not exist; measure:"):
        models.small_table([folder])
    (folder / "accuracy.json").write_text(planted(100).to_json())
    assert len(models.small_table([folder])) == 3
    adapter = folder / "adapters" / "place"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "accuracy.json").write_text(json.dumps(ADAPTER))
    monkeypatch.setattr(models, "SMALL_MODELS", ("llava",))
    monkeypatch.setattr(models, "small_model_path", lambda name: tmp_path / name)
    models.main(["--small"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[:6] == ["llava", "1,504,576", "3.0", "64", "4", "6"]
    assert lines[2].split()[6:] == ["0.105", "0.116", "0.124", "0.127", "0.142", "0.171", "0.182"]
    assert lines[5].split() == "llava place 0.000 > 0.977 0.003 > 0.967 0.750 > 0.500 0.900 > 0.300".split()
