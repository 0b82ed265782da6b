"""Training: the losses by hand, every stage learns what it should, and two processes train one model."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hooked_mm.small.families import FAMILIES, build
from hooked_mm.small.labels import IGNORE
from hooked_mm.small.packing import Packer
from hooked_mm.small.pool import Pool, partner_words
from hooked_mm.small.train import (
    AlignmentStage,
    LanguageStage,
    Stage,
    TowerStage,
    fit,
    mimetic,
    naming_losses,
    without,
)

NAMES = tuple(FAMILIES)
KINDS = (TowerStage, AlignmentStage, LanguageStage)


def stage(kind: type[Stage], name: str, steps: int, numbers: range = range(6)) -> Stage:
    """A stage of an untrained model, the same every time, over a few scenes."""
    torch.manual_seed(0)
    model, processor = build(name)
    family = FAMILIES[name]
    pool = Pool(family, processor, [("train", 0, index) for index in numbers])
    if kind is AlignmentStage:
        return AlignmentStage(family, model, pool, steps, processor.tokenizer.get_vocab())
    if kind is LanguageStage:
        return LanguageStage(family, model, pool, steps, Packer(processor.tokenizer, family.image_token(model)))
    return TowerStage(family, model, pool, steps)


def test_without() -> None:
    """The word left out has no probability and no gradient; the others' sum to one in their old proportions."""
    logits = torch.tensor([[1.0, 2.0, -3.0], [0.5, 0.0, 4.0]], requires_grad=True)
    left = without(logits, torch.tensor([1, IGNORE])).softmax(-1)
    e = [math.exp(value) for value in (1.0, -3.0)]
    assert left[0].tolist() == pytest.approx([e[0] / sum(e), 0.0, e[1] / sum(e)], abs=1e-6)
    assert torch.equal(left[1], logits[1].softmax(-1))
    left[0, 0].log().backward()
    assert logits.grad is not None
    assert logits.grad[0, 1] == 0
    assert logits.grad[0, 0] != 0


def test_naming_losses() -> None:
    """A purple circle, unlabelled ground and a grey red ring, by hand: without the partners square and black."""
    shapes, colours = torch.randn(2, 2, 6), torch.randn(2, 2, 8)
    logits = {"shapes": shapes, "colours": colours}
    truth = {"shapes": torch.tensor([[0, IGNORE], [5, IGNORE]]), "colours": torch.tensor([[4, IGNORE], [0, IGNORE]])}
    got = naming_losses(logits, truth, partner_words(), torch.tensor([False, True]))

    def loss(values: Tensor, label: int, left_out: list[int]) -> float:
        terms = [math.exp(v) for n, v in enumerate(values.tolist()) if n not in left_out]
        return math.log(sum(terms)) - float(values[label])

    # Purple's shape is the square (1), the circle's colour black (7); red has no shape.
    assert float(got["shapes"]) == pytest.approx((loss(shapes[0, 0], 0, [1]) + loss(shapes[1, 0], 5, [])) / 2, abs=1e-5)
    assert float(got["colours"]) == pytest.approx(loss(colours[0, 0], 4, [7]), abs=1e-5)


def test_a_class_without_labels_has_no_loss() -> None:
    """All pictures grey: the colours' loss and its gradient are zero, not undefined."""
    colours = torch.randn(1, 2, 8, requires_grad=True)
    truth = {"shapes": torch.tensor([[0, 1]]), "colours": torch.tensor([[0, 1]])}
    loss = naming_losses({"colours": colours}, truth, partner_words(), torch.tensor([True]))["colours"]
    loss.backward()
    assert float(loss.detach()) == 0
    assert colours.grad is not None
    assert float(colours.grad.abs().max()) == 0


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_each_stage_learns(name: str, kind: type[Stage], tmp_path: Path) -> None:
    """After a few steps, as many as asked for, the loss on the same batch has fallen; a curve is left."""
    one = stage(kind, name, 6)
    canvas, group = max(one.pool.groups.items(), key=lambda pair: len(pair[1].scenes))
    rows = np.arange(len(group.scenes))
    log, one.log_dict = one.log_dict, lambda *_, **__: None

    def loss() -> float:
        with torch.no_grad():
            return float(one.loss((canvas, rows, [9])))

    first = loss()
    decoder = copy.deepcopy(FAMILIES[name].decoder(one.model).state_dict())
    one.log_dict = log
    steps: list[Any] = []
    one.on_train_batch_end = lambda *args: steps.append(args)
    fit(one, 2, 1, [0], tmp_path / "curve.jsonl")
    one.log_dict = lambda *_, **__: None
    assert len(steps) == 6
    assert loss() < first
    assert all(torch.isfinite(value).all() for value in one.state_dict().values())
    state = FAMILIES[name].decoder(one.model).state_dict()
    layers = {k: v for k, v in state.items() if k.startswith(("layers", "blocks"))}
    assert layers
    assert all(torch.equal(v, decoder[k]) for k, v in layers.items()) == (kind is not LanguageStage)


def test_curve(tmp_path: Path) -> None:
    """A line for every so many steps and for the rest of them, with the mean of what was logged."""
    one = stage(TowerStage, "llava", 27, range(2))
    path = tmp_path / "curve.jsonl"
    values: list[float] = []

    def loss(batch: Any) -> Tensor:
        values.append(float(len(values)))
        one.log_dict({"seen": values[-1]})
        return one.heads["shapes"].weight.square().sum()

    one.loss = loss
    fit(one, 1, 1, [0], path)
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["TowerStage"] * 2
    assert [line["step"] for line in lines] == [25, 27]
    assert lines[0]["seen"] == pytest.approx(np.mean(values[:25]), abs=1e-3)
    assert lines[1]["seen"] == pytest.approx(np.mean(values[25:]), abs=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_mimetic(name: str) -> None:
    """In every layer of the decoder keys are 1.4 queries and o is v transposed; a word is said as it is embedded."""
    model, _ = build(name)
    before = copy.deepcopy(model.state_dict())
    decoder = FAMILIES[name].decoder(model)
    mimetic(FAMILIES[name], model)
    inside = {id(value) for value in decoder.parameters()}
    changed = 0
    for key, value in model.named_parameters():
        if id(value) in inside and key.endswith("k_proj.weight"):
            torch.testing.assert_close(value, 1.4 * before[key.replace("k_proj", "q_proj")], rtol=1e-6, atol=0)
            changed += not torch.equal(value, before[key])
        elif id(value) in inside and key.endswith("o_proj.weight"):
            assert torch.equal(value, before[key.replace("o_proj", "v_proj")].T)
            changed += not torch.equal(value, before[key])
        elif key.endswith("att_proj.weight"):
            q, k, v = value.chunk(3)
            was = before[key].chunk(3)
            assert torch.equal(q, was[0])
            assert torch.equal(v, was[2])
            torch.testing.assert_close(k, 1.4 * q, rtol=1e-6, atol=0)
            changed += not torch.equal(k, was[1])
        elif key.endswith("attn_out.weight"):
            assert torch.equal(value, before[key.replace("attn_out", "att_proj")].chunk(3)[2].T)
            changed += not torch.equal(value, before[key])
        elif key in ("lm_head.weight", "model.transformer.ff_out.weight"):
            assert torch.equal(value, model.get_input_embeddings().weight[: len(value)])
            changed += not torch.equal(value, before[key])
        else:
            assert torch.equal(value, before[key])
    assert changed == 13


SCRIPT = """
import sys, torch
from pathlib import Path
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from tests.test_train import TowerStage, fit, stage

if __name__ == "__main__":
    torch.set_num_threads(1)
    rank = rank_zero_only.rank
    one = stage(TowerStage, "llava", 3, range(6 * rank, 6 * rank + 6))
    fit(one, 2, 2, [rank], Path(sys.argv[1]) / "curve.jsonl")
    torch.save(one.state_dict(), Path(sys.argv[1]) / f"{rank}.pt")
"""


class Joint(TowerStage):
    """One process with the batches of two: the mean of both losses."""

    other: Any

    def loss(self, batch: Any) -> Tensor:
        both = [super().loss(batch)]
        pool, self.pool = self.pool, self.other[0]
        both.append(super().loss(next(self.other[1])))
        self.pool = pool
        return sum(both) / 2


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Both end with the same weights, those of one process whose loss is the mean over both batches."""
    script = tmp_path / "two.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parent.parent
    subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        check=True,
        cwd=root,
        timeout=500,
    )
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    plain, other = stage(TowerStage, "llava", 3, range(6)), stage(TowerStage, "llava", 3, range(6, 12))
    joint = Joint(plain.family, plain.model, plain.pool, 3)
    # The heads are drawn after the model: those of the processes were.
    joint.heads = plain.heads
    joint.other = (other.pool, other.pool.batches(2, 3, [1]))
    fit(joint, 2, 1, [0], tmp_path / "joint.jsonl")
    before = nn.ModuleDict({"model": stage(TowerStage, "llava", 3, range(1)).model}).state_dict()
    assert any(not torch.allclose(value, one[name], atol=1e-3) for name, value in before.items())
    for name, value in joint.state_dict().items():
        torch.testing.assert_close(value, one[name], rtol=1e-3, atol=1e-4)
