"""Train a small model from nothing on scenes: `python -m hooked_mm.small.train --output DIR`.

Three stages, because answering questions from random weights has a long plateau (the patch that matches the
question's word has to be found first):

1. *tower*: dense labels per patch (object or not; shape, colour, size, position of an object patch; place elsewhere);
2. *alignment*: a projected patch must name its attributes through the decoder's input embeddings;
3. *language*: captions and questions, packed per image; keys start as a multiple of the queries ("mimetic"
   initialisation), so that attention starts by looking for what resembles the query.

Two processes with one thread each average their gradients over gloo; on two cores this is faster than two threads.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from hooked_mm.scenes.language import WORD_CLASSES
from hooked_mm.small.build import build_llava
from hooked_mm.small.evaluate import evaluate, write_model_card
from hooked_mm.small.packing import IGNORE, Packed, Packer, ScenePool, make_pool


class _Rows(IterableDataset):
    """Endless random rows of a pool: (rows, step), the batch as one item."""

    def __init__(self, pool: ScenePool, batch: int, steps: int, seed: list[int]) -> None:
        self.pool, self.batch, self.steps, self.seed = pool, batch, steps, seed

    def __iter__(self) -> Iterator[tuple[np.ndarray, list[int]]]:
        rng = np.random.default_rng(self.seed)
        order = np.empty(0, np.int64)
        for step in range(self.steps):
            if len(order) < self.batch:
                order = np.concatenate([order, rng.permutation(len(self.pool.scenes))])
            rows, order = order[: self.batch], order[self.batch :]
            yield rows, [*self.seed, step]

    def __len__(self) -> int:
        return self.steps


class Stage(lightning.LightningModule):
    """What the stages share: the optimiser, the schedule and the pool."""

    learning_rate = 2e-3

    def __init__(self, pool: ScenePool, steps: int) -> None:
        super().__init__()
        self.pool, self.steps = pool, steps

    def configure_optimizers(self) -> dict:
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(parameters, lr=self.learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, self.learning_rate, total_steps=self.steps + 1, pct_start=0.08, cycle_momentum=False
        )
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class TowerStage(Stage):
    """Dense labels per patch, on what the projector will see of the tower."""

    def __init__(self, model: Any, pool: ScenePool, steps: int) -> None:
        super().__init__(pool, steps)
        self.tower = model.model.vision_tower
        width = model.config.vision_config.hidden_size
        classes = {name: len(words) for name, words in WORD_CLASSES.items() if name != "counts"}
        self.heads = nn.ModuleDict({name: nn.Linear(width, count) for name, count in {**classes, "object": 2}.items()})

    def training_step(self, batch: tuple[np.ndarray, list[int]]) -> Tensor:
        rows, _ = batch
        patches = self.tower(self.pool.images(rows), output_hidden_states=True).hidden_states[-1][:, 1:]
        losses = {}
        for name, head in self.heads.items():
            labels = self.pool.labels[name][rows]
            losses[name] = F.cross_entropy(head(patches).flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
        self.log_dict(losses, prog_bar=True)
        return 2 * losses["shapes"] + sum(losses.values())


class AlignmentStage(Stage):
    """A projected patch must name its attributes through the decoder's input embeddings (cosine over a class)."""

    temperature = 0.1

    def __init__(self, model: Any, pool: ScenePool, steps: int, vocabulary: dict[str, int]) -> None:
        super().__init__(pool, steps)
        self.tower, self.projector = model.model.vision_tower, model.model.multi_modal_projector
        self.embedding = model.get_input_embeddings()
        # A position has two words ("top left"): it is named by the sum of their embeddings.
        self.words = {
            name: [torch.tensor([vocabulary[part] for part in word.split()]) for word in words]
            for name, words in WORD_CLASSES.items()
            if name != "counts"
        }

    def training_step(self, batch: tuple[np.ndarray, list[int]]) -> Tensor:
        rows, _ = batch
        patches = self.tower(self.pool.images(rows), output_hidden_states=True).hidden_states[-1][:, 1:]
        named = F.normalize(self.projector(patches), dim=-1)
        losses = {}
        for name, words in self.words.items():
            targets = F.normalize(torch.stack([self.embedding(ids).sum(0) for ids in words]), dim=-1)
            logits = (named @ targets.T / self.temperature).flatten(0, 1)
            losses[name] = F.cross_entropy(logits, self.pool.labels[name][rows].flatten(), ignore_index=IGNORE)
        self.log_dict(losses, prog_bar=True)
        return sum(losses.values(), torch.zeros(()))


class LanguageStage(Stage):
    """Captions and questions, packed behind the image."""

    def __init__(self, model: Any, pool: ScenePool, steps: int, packer: Packer) -> None:
        super().__init__(pool, steps)
        self.model, self.packer = model, packer

    def training_step(self, batch: tuple[np.ndarray, list[int]]) -> Tensor:
        rows, seed = batch
        packed = self.packer([self.pool.scenes[row] for row in rows], np.random.default_rng(seed))
        logits, labels, weights = packed_logits(self.model, packed, self.pool.images(rows))
        loss = (F.cross_entropy(logits, labels, reduction="none") * weights).sum() / weights.sum()
        right = (logits.argmax(-1) == labels).float()
        question = weights > 1
        self.log_dict(
            {"loss": loss, "question": right[question].mean(), "caption": right[~question].mean()}, prog_bar=True
        )
        return loss


def packed_logits(model: Any, packed: Packed, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (targets, vocab), labels and weights at the positions that have a target."""
    core = model.model
    features = torch.stack(core.get_image_features(images).pooler_output)
    embeds = model.get_input_embeddings()(packed.ids)
    image = packed.image_slice
    embeds = torch.cat([embeds[:, : image.start], features, embeds[:, image.stop :]], dim=1)
    mask = torch.zeros(packed.mask.shape).masked_fill(~packed.mask, torch.finfo(torch.float32).min)
    hidden = core.language_model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=packed.positions, use_cache=False
    ).last_hidden_state
    kept = packed.labels != IGNORE
    return model.lm_head(hidden[kept]), packed.labels[kept], packed.weights[kept]


def mimetic_keys(model: Any, scale: float = 1.4) -> None:
    """k_proj = scale * q_proj in every decoder layer (Trockman & Kolter 2023, in spirit)."""
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.k_proj.weight.copy_(scale * layer.self_attn.q_proj.weight)


def fit(stage: Stage, batch: int, processes: int, seed: list[int]) -> None:
    """Run one stage on `processes` processes, whose gradients are averaged."""
    rows = _Rows(stage.pool, batch, stage.steps, seed)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        max_steps=stage.steps,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[TQDMProgressBar(refresh_rate=20)],
        log_every_n_steps=20,
    )
    trainer.fit(stage, DataLoader(rows, batch_size=None))


def main(argv: list[str] | None = None) -> None:
    """Train, save in bf16, evaluate on fresh scenes and write the model card."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/small/llava"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16, help="images per process and step")
    parser.add_argument("--scenes", type=int, default=24_000, help="distinct scenes to train on, over all processes")
    parser.add_argument("--tower-steps", type=int, default=1000)
    parser.add_argument("--alignment-steps", type=int, default=300)
    parser.add_argument("--language-steps", type=int, default=1200)
    parser.add_argument("--evaluate", type=int, default=1000, help="fresh scenes to evaluate on")
    options = parser.parse_args(argv)

    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    torch.set_num_threads(1)
    started = time.monotonic()
    torch.manual_seed(options.seed)
    model, processor = build_llava()
    # The projector reads the tower before its last norm, so that norm would never get a gradient.
    model.model.vision_tower.post_layernorm.requires_grad_(False)
    patch = model.config.vision_config.patch_size

    rank = rank_zero_only.rank
    share = range(rank, options.scenes, options.processes)
    pool = make_pool(1000 + options.seed, share, patch, two_objects=0.8)
    packer = Packer(processor.tokenizer, model.config.image_seq_length, question_weight=3.0)
    seed = [options.seed, rank]
    fit(TowerStage(model, pool, options.tower_steps), 2 * options.batch, options.processes, [*seed, 1])
    alignment = AlignmentStage(model, pool, options.alignment_steps, processor.tokenizer.get_vocab())
    fit(alignment, 2 * options.batch, options.processes, [*seed, 2])
    mimetic_keys(model)
    fit(LanguageStage(model, pool, options.language_steps, packer), options.batch, options.processes, [*seed, 3])
    if rank:
        return
    minutes = (time.monotonic() - started) / 60
    model.to(torch.bfloat16).save_pretrained(options.output)
    processor.save_pretrained(options.output)
    (options.output / "model.safetensors").chmod(0o644)
    write_model_card(options.output, evaluate(options.output, options.evaluate), minutes, vars(options))
    print(f"trained in {minutes:.1f} minutes; the model and its card (README.md) are in {options.output}")


if __name__ == "__main__":
    main()
