"""Train a small model from nothing on scenes: `python -m hooked_mm.small.train FAMILY --output DIR`.

Three stages, because answering questions from random weights has a long plateau (the patch that matches the
question's word has to be found first):

1. *tower*: dense labels per patch (object or not; shape, colour, size, position of an object patch; place elsewhere);
2. *alignment*: an image token must name the attributes of its part of the picture through the decoder's input
   embeddings;
3. *language*: captions and questions, packed per image; keys start as a multiple of the queries ("mimetic"
   initialisation), so that attention starts by looking for what resembles the query.

In the first two a third of the pictures is grey, so that shapes are not guessed from colours; in all three the
held-out partner of a word is left out of its softmax (`pool.partner_words`), so that it is never denied.

Two processes with one thread each average their gradients over gloo; on two cores this is faster than two threads.
"""

from __future__ import annotations

import argparse
import json
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
from hooked_mm.small.families import FAMILIES, Family, build
from hooked_mm.small.packing import Packed, Packer
from hooked_mm.small.pool import ATTRIBUTES, IGNORE, Group, Pool, partner_words

NAMED = (*ATTRIBUTES, "places")
"""What parts of a picture are trained to tell."""

Batch = tuple[Group, np.ndarray, list[int]]


class _Batches(IterableDataset):
    def __init__(self, pool: Pool, batch: int, steps: int, seed: list[int]) -> None:
        self.pool, self.batch, self.steps, self.seed = pool, batch, steps, seed

    def __iter__(self) -> Iterator[Batch]:
        return self.pool.batches(self.batch, self.steps, self.seed)

    def __len__(self) -> int:
        return self.steps


class Stage(lightning.LightningModule):
    """What the stages share: the optimiser, the schedule and the pool."""

    learning_rate = 2e-3

    def __init__(self, family: Family, model: Any, pool: Pool, steps: int) -> None:
        super().__init__()
        self.family, self.model, self.pool, self.steps = family, model, pool, steps

    def configure_optimizers(self) -> dict:
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(parameters, lr=self.learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, self.learning_rate, total_steps=self.steps + 1, pct_start=0.08, cycle_momentum=False
        )
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def naming_losses(
    logits: dict[str, Tensor], truth: dict[str, Tensor], partner: dict[str, Tensor], grey: Tensor
) -> dict[str, Tensor]:
    """Cross entropy per word class, over the parts of the pictures that have a label.

    Args:
        logits: Per class, (b, parts, words).
        truth: Per class, (b, parts) index or IGNORE.
        partner: See `partner_words`.
        grey: (b,) whether a picture is shown without colour; nobody is asked for its colours.
    """
    other = {"shapes": "colours", "colours": "shapes"}
    losses = {}
    for name, value in logits.items():
        labels = truth[name]
        if name in other:
            held = partner[name][truth[other[name]].clamp(min=0)]
            held = torch.where(truth[other[name]] == IGNORE, IGNORE, held)
            value = without(value, held)
        if name == "colours":
            labels = labels.masked_fill(grey[:, None], IGNORE)
        losses[name] = F.cross_entropy(value.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
    return losses


def without(logits: Tensor, index: Tensor) -> Tensor:
    """Logits (..., words) with the word of `index` (...) left out of the softmax, where it is not IGNORE."""
    lowest = torch.finfo(logits.dtype).min
    out = torch.zeros_like(logits).scatter(-1, index.clamp(min=0)[..., None], lowest)
    return torch.where((index == IGNORE)[..., None], logits, logits + out)


class TowerStage(Stage):
    """Dense labels per patch, on what the projector will see of the tower."""

    def __init__(self, family: Family, model: Any, pool: Pool, steps: int) -> None:
        super().__init__(family, model, pool, steps)
        width = getattr(model.config.vision_config, "embed_dim", None) or model.config.vision_config.hidden_size
        classes = {name: len(WORD_CLASSES[name]) for name in NAMED}
        self.heads = nn.ModuleDict({name: nn.Linear(width, count) for name, count in {**classes, "object": 2}.items()})
        self.partner = partner_words()

    def training_step(self, batch: Batch) -> Tensor:
        group, rows, _ = batch
        patches = self.family.patches(self.model, self.pool.pictures(group, rows, some_grey=True))
        logits = {name: head(patches) for name, head in self.heads.items()}
        truth = {name: labels[rows] for name, labels in group.patches.items()}
        losses = naming_losses(logits, truth, self.partner, group.grey[rows])
        self.log_dict(losses, prog_bar=True)
        return 2 * losses["shapes"] + sum(losses.values())


class AlignmentStage(Stage):
    """An image token must name its part of the picture through the decoder's input embeddings (cosine over a class)."""

    temperature = 0.1

    def __init__(self, family: Family, model: Any, pool: Pool, steps: int, vocabulary: dict[str, int]) -> None:
        super().__init__(family, model, pool, steps)
        self.embedding = model.get_input_embeddings()
        # A position has two words ("top left"): it is named by the sum of their embeddings.
        self.words = {
            name: [torch.tensor([vocabulary[part] for part in word.split()]) for word in WORD_CLASSES[name]]
            for name in NAMED
        }
        self.partner = partner_words()

    def training_step(self, batch: Batch) -> Tensor:
        group, rows, _ = batch
        tokens = self.family.tokens(self.model, self.pool.pictures(group, rows, some_grey=True))
        named = F.normalize(tokens, dim=-1)
        logits = {}
        for name, words in self.words.items():
            targets = F.normalize(torch.stack([self.embedding(ids).sum(0) for ids in words]), dim=-1)
            logits[name] = named @ targets.T / self.temperature
        truth = {name: labels[rows] for name, labels in group.tokens.items()}
        losses = naming_losses(logits, truth, self.partner, group.grey[rows])
        self.log_dict(losses, prog_bar=True)
        return sum(losses.values(), torch.zeros(()))


class LanguageStage(Stage):
    """Captions and questions, packed behind the image."""

    def __init__(
        self, family: Family, model: Any, pool: Pool, steps: int, packer: Packer, length: int | None = None
    ) -> None:
        super().__init__(family, model, pool, steps)
        self.packer, self.length = packer, length
        self.prefixes = {
            id(group): (group.prompt["input_ids"][0], family.positions(model, group.prompt))
            for group in pool.groups.values()
        }

    def training_step(self, batch: Batch) -> Tensor:
        group, rows, seed = batch
        scenes = [group.scenes[row] for row in rows]
        packed = self.packer(scenes, *self.prefixes[id(group)], np.random.default_rng(seed), self.length)
        pixels = self.pool.pictures(group, rows, some_grey=False)
        logits, labels, weights = packed_logits(self.family, self.model, packed, pixels)
        loss = (F.cross_entropy(logits, labels, reduction="none") * weights).sum() / weights.sum()
        right = (logits.argmax(-1) == labels).float()
        question = weights > 1
        self.log_dict(
            {"loss": loss, "question": right[question].mean(), "caption": right[~question].mean()}, prog_bar=True
        )
        return loss


def packed_logits(family: Family, model: Any, packed: Packed, pixels: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (targets, vocab) without the banned words, labels and weights at the positions that have a target."""
    embeds = model.get_input_embeddings()(packed.ids)
    embeds = embeds.index_copy(1, packed.image, family.tokens(model, pixels))
    mask = torch.zeros(packed.mask.shape).masked_fill(~packed.mask, torch.finfo(torch.float32).min)
    # One axis of positions is all that most decoders know; three are those of multimodal rotary embeddings.
    positions = packed.positions if family.name.startswith("qwen") else packed.positions[0]
    hidden = family.decoder(model)(
        inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state
    kept = packed.labels != IGNORE
    return without(model.lm_head(hidden[kept]), packed.banned[kept]), packed.labels[kept], packed.weights[kept]


def mimetic_keys(decoder: Any, scale: float = 1.4) -> None:
    """k_proj = scale * q_proj in every decoder layer (Trockman & Kolter 2023, in spirit)."""
    with torch.no_grad():
        for layer in decoder.layers:
            layer.self_attn.k_proj.weight.copy_(scale * layer.self_attn.q_proj.weight)


class Curve(lightning.Callback):
    """What a stage logs, averaged over every so many steps, as lines of JSON."""

    def __init__(self, path: Path, stage: str, every: int = 25) -> None:
        self.path, self.stage, self.every = path, stage, every
        self.sums: dict[str, list[float]] = {}
        self.start = time.monotonic()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        for name, value in trainer.callback_metrics.items():
            self.sums.setdefault(name, []).append(float(value))
        if (index + 1) % self.every == 0 and trainer.is_global_zero:
            means = {name: round(float(np.nanmean(values)), 4) for name, values in self.sums.items()}
            line = {"stage": self.stage, "step": index + 1, "seconds": round(time.monotonic() - self.start, 1), **means}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            self.sums.clear()


def fit(stage: Stage, batch: int, processes: int, seed: list[int], curve: Path) -> None:
    """Run one stage on `processes` processes, whose gradients are averaged."""
    batches = _Batches(stage.pool, batch, stage.steps, seed)
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
        callbacks=[TQDMProgressBar(refresh_rate=20), Curve(curve, type(stage).__name__)],
        log_every_n_steps=20,
    )
    trainer.fit(stage, DataLoader(batches, batch_size=None))
