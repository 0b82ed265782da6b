"""Training: each stage trains what it should, the same seed gives the same weights, and `main` leaves a whole model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.dataset import SceneDataset, picture
from hooked_mm.scenes.language import CAPTION_PROMPT
from hooked_mm.small.build import build_llava
from hooked_mm.small.packing import IGNORE, Packer, ScenePool, make_pool
from hooked_mm.small.train import (
    AlignmentStage,
    LanguageStage,
    Stage,
    TowerStage,
    fit,
    main,
    mimetic_keys,
)


@pytest.fixture(scope="module")
def pool() -> ScenePool:
    """Twelve scenes."""
    return make_pool(1000, range(12), 8, two_objects=0.8)


def fresh() -> tuple[Any, Any]:
    """An untrained model and its processor, the same every time."""
    torch.manual_seed(0)
    return build_llava()


def stage(kind: type[Stage], model: Any, processor: Any, pool: ScenePool, steps: int) -> Stage:
    """A stage over the pool."""
    if kind is AlignmentStage:
        return AlignmentStage(model, pool, steps, processor.tokenizer.get_vocab())
    if kind is LanguageStage:
        return LanguageStage(model, pool, steps, Packer(processor.tokenizer, 36, 3.0))
    return TowerStage(model, pool, steps)


PARTS = ("vision_tower", "multi_modal_projector", "embed_tokens", "layers", "norm", "lm_head")
TRAINS = {TowerStage: set(PARTS[:1]), AlignmentStage: set(PARTS[:3]), LanguageStage: set(PARTS)}


def part(name: str) -> str:
    """Which part of the model a weight belongs to."""
    return next(word for word in PARTS if f".{word}." in f".{name}.")


@pytest.fixture(autouse=True)
def no_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training step may be called without a trainer."""
    monkeypatch.setattr(Stage, "log_dict", lambda *_, **__: None)


@pytest.mark.parametrize("kind", TRAINS, ids=lambda kind: kind.__name__)
def test_each_stage_trains_its_parts(kind: type[Stage], pool: ScenePool) -> None:
    """After three steps exactly the parts of the stage have changed, and the loss on its scenes has fallen."""
    model, processor = fresh()
    before = copy.deepcopy(model.state_dict())
    one = stage(kind, model, processor, pool, 3)
    batch = (np.arange(12), [0, 1])
    with torch.no_grad():
        first = float(one.training_step(batch))
    fit(one, 6, 1, [0, 0, 1])
    with torch.no_grad():
        assert float(one.training_step(batch)) < first
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    changed = {part(name) for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == TRAINS[kind]


def test_the_language_loss_is_the_weighted_mean(pool: ScenePool) -> None:
    """The loss equals cross-entropy over answers, text by text, questions three times as heavy as captions."""
    model, processor = fresh()
    one = stage(LanguageStage, model, processor, pool, 1)
    rows = np.array([2, 5])
    packed = one.packer([pool.scenes[row] for row in rows], np.random.default_rng([4]))
    total = weight = 0.0
    for row, number in enumerate(rows):
        image = pool.images(np.array([number]))
        end = packed.image_slice.stop
        starts = [p for p in range(end, packed.ids.shape[1]) if packed.positions[row, p] == end]
        stops = [*starts[1:], int((packed.positions[row] > 0).nonzero().max()) + 1]
        for index, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            ids = torch.cat([packed.ids[row, :end], packed.ids[row, start:stop]])[None]
            with torch.no_grad():
                logits = model(input_ids=ids, pixel_values=image, attention_mask=torch.ones_like(ids)).logits[0]
            targets = (packed.labels[row, start:stop] != IGNORE).nonzero()[:, 0]
            losses = F.cross_entropy(logits[targets + end], ids[0, targets + end + 1], reduction="none")
            factor = 3.0 if index else 1.0
            total, weight = total + factor * float(losses.sum()), weight + factor * len(losses)
    with torch.no_grad():
        assert float(one.training_step((rows, [4]))) == pytest.approx(total / weight, rel=1e-4)


def test_mimetic_keys() -> None:
    """Keys are 1.4 times the queries in every layer of the decoder, so that a token first attends to its like."""
    model, _ = fresh()
    before = copy.deepcopy(model.state_dict())
    mimetic_keys(model)
    for name, value in model.state_dict().items():
        if "language_model" in name and "k_proj" in name:
            torch.testing.assert_close(value, 1.4 * before[name.replace("k_proj", "q_proj")], rtol=1e-6, atol=0)
            assert not torch.equal(value, before[name])
        else:
            assert torch.equal(value, before[name])


TINY = ["--processes", "1", "--batch", "2", "--scenes", "8", "--tower-steps", "3", "--alignment-steps", "2"]
TINY += ["--language-steps", "3", "--evaluate", "3"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model after a few steps of every stage."""
    folder = tmp_path_factory.mktemp("trained") / "tiny"
    main(["--output", str(folder), "--seed", "4", *TINY])
    return folder


@pytest.mark.slow
def test_training_ends_with_a_whole_model(trained: Path) -> None:
    """What is saved loads in bfloat16, speaks, and has a card that names the seed; nothing else is left behind."""
    model = HookedMM.from_pretrained(trained)
    assert model.dtype == torch.bfloat16
    batch = model.prepare(picture(SceneDataset(1).scene(0)), CAPTION_PROMPT)
    assert model.generate(batch, 3).tokens.shape[1] <= 3
    card = (trained / "README.md").read_text()
    assert card.startswith("# tiny")
    assert "seed 4" in card
    assert "on 3 fresh scenes" in card
    shipped = HookedMM.small("llava").hf_model.state_dict()
    assert {n: v.shape for n, v in model.hf_model.state_dict().items()} == {n: v.shape for n, v in shipped.items()}


@pytest.mark.slow
def test_the_seed_decides_the_weights(trained: Path, tmp_path: Path) -> None:
    """The same seed gives bit for bit the same model, another seed another one."""
    main(["--output", str(tmp_path / "again"), "--seed", "4", *TINY])
    main(["--output", str(tmp_path / "other"), "--seed", "5", *TINY])
    first, again, other = (
        load_file(f / "model.safetensors") for f in (trained, tmp_path / "again", tmp_path / "other")
    )
    assert first.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not all(torch.equal(value, other[name]) for name, value in first.items())
