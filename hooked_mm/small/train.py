"""Train a small model from nothing on scenes: `python -m hooked_mm.small.train FAMILY --output DIR`.

Three stages, because answering questions from random weights has a long plateau (the patch that matches the
question's word has to be found first):

1. *tower*: dense labels per patch (object or not; shape, colour, size, position of an object patch; place elsewhere);
2. *alignment*: an image token must name the attributes of its part of the picture through the decoder's input
   embeddings;
3. *language*: captions and questions, packed per image; attention starts by looking for what resembles the query, and
   by copying what it finds (`mimetic`).

In the first two a third of the pictures is grey, so that shapes are not guessed from colours; in all three the
held-out partner of a word is left out of its softmax (`pool.partner_words`), so that it is never denied.

Two processes with one thread each average their gradients over gloo; on two cores this is faster than two threads.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from abc import abstractmethod
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

from hooked_mm.scenes.language import DESCRIBED, WORD_CLASSES
from hooked_mm.small.accuracy import FILE
from hooked_mm.small.card import Training, write_model_card
from hooked_mm.small.evaluate import evaluate
from hooked_mm.small.families import FAMILIES, build, save_model, save_processor
from hooked_mm.small.family import Family, Steps
from hooked_mm.small.labels import IGNORE
from hooked_mm.small.muon import Muon
from hooked_mm.small.packing import Packed, Packer
from hooked_mm.small.pool import Batch, Pool, partner_words

NOT_HIDDEN = ("embed", "lm_head", "transformer.ff_out", "heads.", "latents", "lora_")
"""Parts of the names of matrices that Muon is not for: those at the model's ends, and thin ones."""


class _Batches(IterableDataset):
    def __init__(self, pool: Pool, batch: int, steps: int, seed: list[int]) -> None:
        self.pool, self.batch, self.steps, self.seed = pool, batch, steps, seed

    def __iter__(self) -> Iterator[Batch]:
        return self.pool.batches(self.batch, self.steps, self.seed)

    def __len__(self) -> int:
        return self.steps


class Stage(lightning.LightningModule):
    """What the stages share: the optimisers, the schedule and the pool.

    Weight matrices between hidden layers are updated by Muon, all else (embeddings, biases, heads) by AdamW: shapes,
    the hardest thing to see, are learnt in a third of the steps that AdamW alone needs.
    """

    matrix_rate, rate = 1e-2, 2e-3

    def __init__(self, family: Family, model: Any, pool: Pool, steps: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.family, self.model, self.pool, self.steps = family, model, pool, steps

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """The loss of a batch; what is to be seen of it is logged."""

    def training_step(self, batch: Batch) -> None:
        """One step of both optimisers."""
        loss = self.loss(batch)
        self.manual_backward(loss)
        nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        optimisers, schedules = self.optimizers(), self.lr_schedulers()
        if not isinstance(optimisers, list):  # Lightning gives one as itself
            optimisers, schedules = [optimisers], [schedules]
        for optimiser, schedule in zip(optimisers, schedules, strict=True):
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()

    def configure_optimizers(self) -> tuple[list, list]:
        named = {name: p for name, p in self.named_parameters() if p.requires_grad}
        matrices = {name for name, p in named.items() if p.ndim == 2 and not any(part in name for part in NOT_HIDDEN)}
        optimisers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                [p for name, p in named.items() if name not in matrices],
                self.rate,
                betas=(0.9, 0.98),
                weight_decay=0.05,
            ),
        ]
        if matrices:
            optimisers.append(Muon([named[name] for name in sorted(matrices)], self.matrix_rate))
        schedules = [
            torch.optim.lr_scheduler.OneCycleLR(
                optimiser,
                optimiser.param_groups[0]["lr"],
                total_steps=self.steps + 1,
                pct_start=0.08,
                cycle_momentum=False,
            )
            for optimiser in optimisers
        ]
        return optimisers, schedules


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
        summed = F.cross_entropy(value.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
        # A batch may have no label of a class at all, as when all its pictures are grey.
        losses[name] = summed / (labels != IGNORE).sum().clamp(min=1)
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
        width = family.tower_width(model)
        classes = {name: len(WORD_CLASSES[name]) for name in DESCRIBED}
        self.heads = nn.ModuleDict({name: nn.Linear(width, count) for name, count in {**classes, "object": 2}.items()})
        self.partner = partner_words()

    def loss(self, batch: Batch) -> Tensor:
        canvas, rows, _ = batch
        group = self.pool.groups[canvas]
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
            for name in DESCRIBED
        }
        self.partner = partner_words()

    def loss(self, batch: Batch) -> Tensor:
        canvas, rows, _ = batch
        group = self.pool.groups[canvas]
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

    matrix_rate = 3e-3  # at the towers' rate, the plateau does not break

    def __init__(self, family: Family, model: Any, pool: Pool, steps: int, packer: Packer) -> None:
        super().__init__(family, model, pool, steps)
        self.packer = packer
        self.prefixes = {
            canvas: (group.prompt["input_ids"][0], family.positions(model, group.prompt))
            for canvas, group in pool.groups.items()
        }

    def loss(self, batch: Batch) -> Tensor:
        canvas, rows, seed = batch
        group = self.pool.groups[canvas]
        scenes = [group.scenes[row] for row in rows]
        packed = self.packer(scenes, *self.prefixes[canvas], np.random.default_rng(seed))
        pixels = self.pool.pictures(group, rows, some_grey=False)
        logits, labels, weights = packed_logits(self.family, self.model, packed, pixels)
        loss = (F.cross_entropy(logits, labels, reduction="none") * weights).sum() / weights.sum()
        right = (logits.argmax(-1) == labels).float()
        parts = {"question": weights > 1, "caption": weights <= 1}
        shares = {name: right[which].mean() for name, which in parts.items() if which.any()}
        self.log_dict({"loss": loss, **shares}, prog_bar=True)
        return loss


def packed_logits(family: Family, model: Any, packed: Packed, pixels: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (targets, vocab) without the banned words, labels and weights at the positions that have a target."""
    embeds = model.get_input_embeddings()(packed.ids)
    embeds = family.with_tokens(embeds, packed.image, family.tokens(model, pixels))
    mask = torch.zeros(packed.mask.shape).masked_fill(~packed.mask, torch.finfo(torch.float32).min)
    positions = packed.positions[0] if family.axes == 1 else packed.positions
    hidden = family.decoder(model)(
        inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state
    kept = packed.labels != IGNORE
    said = model.get_output_embeddings()(hidden[kept])
    return without(said, packed.banned[kept]), packed.labels[kept], packed.weights[kept]


def mimetic(family: Family, model: Any, scale: float = 1.4) -> None:
    """Start from what attention will need (Trockman & Kolter 2023, "Mimetic initialization", in spirit).

    Keys are a multiple of the queries: a position looks for what resembles it. What a head writes is what it read
    (o = v transposed), and a word is said by the direction that its embedding has; since image tokens have learnt to
    carry their words' embeddings, a word that is found can be said from the start.
    """
    with torch.no_grad():
        for query, key, value, out in family.attention(family.decoder(model)):
            key.copy_(scale * query)
            out.copy_(value.T)
        said = model.get_output_embeddings().weight
        said.copy_(model.get_input_embeddings().weight[: len(said)])


class Curve(lightning.Callback):
    """What a stage logs on the first process, averaged over every so many steps, as lines of JSON."""

    def __init__(self, path: Path, stage: str, every: int = 25) -> None:
        self.path, self.stage, self.every = path, stage, every
        self.sums: dict[str, list[float]] = {}
        self.start = time.monotonic()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        if not trainer.is_global_zero:
            return
        for name, value in trainer.callback_metrics.items():
            self.sums.setdefault(name, []).append(float(value))
        last = index + 1 == trainer.num_training_batches
        if (index + 1) % self.every == 0 or last:
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
        # The first stages train parts of the model, and some models have parts that no output depends on.
        strategy="ddp_find_unused_parameters_true" if processes > 1 else "auto",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[TQDMProgressBar(refresh_rate=20), Curve(curve, type(stage).__name__)],
        log_every_n_steps=20,
    )
    trainer.fit(stage, DataLoader(batches, batch_size=None))


def main(argv: list[str] | None = None) -> None:
    """Train, save in bf16, evaluate on fresh scenes and write the model card."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=sorted(FAMILIES))
    parser.add_argument("--output", type=Path, help="folder of the model, runs/small/FAMILY unless given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8, help="images per process and step")
    parser.add_argument("--scenes", type=int, default=30_000, help="distinct scenes to train on, over all processes")
    for stage in Steps._fields:
        parser.add_argument(f"--{stage}-steps", type=int, help=f"of the {stage} stage, the family's own unless given")
    parser.add_argument("--no-evaluation", action="store_true", help="leave evaluation and card for later")
    options = parser.parse_args(argv)
    output = options.output or Path("runs/small") / options.family
    typed = {
        name: value
        for name, value in vars(options).items()
        if name not in ("family", "output", "no_evaluation") and value != parser.get_default(name)
    }
    for stage, count in FAMILIES[options.family].steps._asdict().items():
        if getattr(options, f"{stage}_steps") is None:
            setattr(options, f"{stage}_steps", count)

    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    torch.set_num_threads(1)
    started = time.monotonic()
    torch.manual_seed(options.seed)
    family = FAMILIES[options.family]
    model, processor = build(options.family)

    rank = rank_zero_only.rank
    curve = output / "training.jsonl"
    if not rank:
        output.mkdir(parents=True, exist_ok=True)
        curve.unlink(missing_ok=True)
    share = range(rank, options.scenes, options.processes)
    pool = Pool(family, processor, [("train", options.seed, index) for index in share])
    seed = [options.seed, rank]
    tokenizer = processor.tokenizer
    tower = TowerStage(family, model, pool, options.tower_steps)
    early = family.tower_batch * options.batch
    fit(tower, early, options.processes, [*seed, 1], curve)
    alignment = AlignmentStage(family, model, pool, options.alignment_steps, tokenizer.get_vocab())
    fit(alignment, early, options.processes, [*seed, 2], curve)
    mimetic(family, model)
    packer = Packer(tokenizer, family.image_token(model))
    language = LanguageStage(family, model, pool, options.language_steps, packer)
    fit(language, options.batch, options.processes, [*seed, 3], curve)
    if rank:
        return
    canvas, rows, _ = next(pool.batches(options.batch, 1, seed))
    family.settle(model, pool.pictures(pool.groups[canvas], rows, some_grey=False))
    minutes = (time.monotonic() - started) / 60
    save_model(options.family, model, output)
    save_processor(processor, output)
    recipe = (*(f"{stage}_steps" for stage in Steps._fields), "batch", "scenes", "processes")
    settings = {name: getattr(options, name) for name in recipe}
    flags = (f" --{name.replace('_', '-')} {value}" for name, value in typed.items())
    command = f"python -m hooked_mm.small.train {options.family}{''.join(flags)}"
    device = f"{options.processes} CPU core" + "s" * (options.processes > 1)
    Training(command, round(minutes, 1), device, options.seed, settings).save(output)
    print(f"trained in {minutes:.1f} minutes; the model is in {output}")
    if not options.no_evaluation:
        (output / FILE).write_text(evaluate(output).to_json())
        write_model_card(output)


if __name__ == "__main__":
    main()
