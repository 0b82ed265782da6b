"""The command for direct logit attribution: its means are those of its functions, over all answers."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from analyses.logit_attribution import logit_attribution
from analyses.logit_attribution_command import main
from analyses.result import Result
from analyses.targets import answer_targets
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.dataset import ScenesDataModule
from hooked_mm.tensor_folder import read_json, read_tensors

MODEL = ("--model.id", "small:llava", "--model.dtype", "float32", "--draws", "20")
DATA = ("--data", "ScenesDataModule", "--data.task", "question", "--data.size", "5", "--data.batch_size", "3")


@pytest.mark.usefixtures("loaded")
def test_the_command_writes_means_heads_shares_and_maps(
    llava: HookedMM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every token of every answer counts; all parts are the logit; two answers are shown."""
    out = tmp_path / "out"
    main([*MODEL, *DATA, "--which", "all", "--gallery", "2", "--output", str(out)])
    data = ScenesDataModule(5, "question").dataset
    samples = [data[number] for number in range(5)]
    batch = llava.prepare(
        [one.images for one in samples], [one.text for one in samples], [one.answer for one in samples]
    )
    targets = answer_targets(batch)
    found = logit_attribution(llava, batch, targets)
    visual = batch.mask(modality="image")[targets.sample]
    result = Result.load(out)
    whole = {one.modality: one.value for one in result.of("mean share of the logit")}
    assert whole["all parts"] == pytest.approx(whole["the logit"], abs=1e-4)
    assert whole["the logit"] == pytest.approx(float(found.logits.mean()), abs=1e-3)
    assert whole["heads, image"] == pytest.approx(float(found.by_kind(visual)["heads, image"].mean()), abs=1e-3)
    mlps = result.of("MLPs, mean share of the logit")
    assert [one.value for one in mlps] == pytest.approx(
        [float(found.of(f"{n}_mlp_out").mean()) for n in range(6)], abs=1e-3
    )
    assert mlps[0].rows == len(targets)
    assert mlps[0].samples == 5
    with open(out / "heads.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24
    own = next(row for row in rows if (row["layer"], row["head"]) == ("3", "2"))
    expected = (found.sources[3][:, 2] * visual).sum(1).mean()
    assert float(own["image"]) == pytest.approx(float(expected), abs=1e-3)
    arrays = read_tensors(out, "shares", read_json(out, "shares", "shares", ""))
    assert sorted(arrays) == sorted(f"{name}/layer-{layer}" for name in _first(targets) for layer in range(6))
    real = batch.mask()[0]
    torch.testing.assert_close(arrays["sample-0/answer-0/layer-3"], found.sources[3][0][:, real], rtol=0, atol=1e-4)
    page = (out / "gallery.html").read_text()
    assert page.count("data:image") == 4
    assert "heads from patches" in page
    assert "mean share of the logit" in capsys.readouterr().out


def _first(targets: object) -> list[str]:
    """The names of the first two answers' tokens."""
    own = targets.sample.tolist()[:2]  # type: ignore[attr-defined]
    return [f"sample-{row}/answer-{own[:place].count(row)}" for place, row in enumerate(own)]


@pytest.mark.usefixtures("loaded")
def test_answers_must_be_there(tmp_path: Path) -> None:
    """None to stand behind the prompts, none with such a token, no draws."""
    given = [*MODEL, *DATA, "--output", str(tmp_path / "out")]
    with pytest.raises(BadInputError, match="answer='none'"):
        main([*given, "--answer", "none"])
    with pytest.raises(BadInputError, match="draws=0"):
        main([*given, "--draws", "0"])
    with pytest.raises(BadInputError, match="no sample has an answer to explain"):
        main([*given, "--which", "[9]"])
