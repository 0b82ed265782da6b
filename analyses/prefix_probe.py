"""How much of the text before it a token remembers: a probe learns to say the prefix from one representation.

LLM-Microscope (arXiv 2502.15007), "contextual memory":  C_i = -log P(w_1 ... w_{i-1} | e_i).  As there, e_i mixes the
representations of all layers with learnt weights and goes through a two-layer network into an autoregressive decoder,
and all is trained together with cross-entropy. What differs, and why:

- The decoder is a small transformer trained from nothing; theirs begins as a copy of the model. So scores of two models
  come from equal decoders, no model is needed beside a store, and training takes minutes on a CPU.
- e_i is added to every input of the decoder; there it is the first input. A small decoder that may pass it over learns
  the language and stays blind to it for a long time.
- Each layer by itself is a further input of the same decoder, through a first matrix of its own: scores per layer.
- So is a learnt vector that knows nothing of the token: with it the loss is -log P(prefix), what language alone makes
  of the prefix, and most of any C_i. *Information* is what the token adds:  log P(prefix | e_i) - log P(prefix).
- The sizes of representations vary between layers and models; each is normalised to mean 0 and variance 1 first.
- A prefix is given with its length: where it begins is not to be said. Its first part is cut off where it is long.
- Scores are of samples that had no part in training; training ends when samples of a third kind are said no better.
- Control: the same probe is given the representation of a row of another sample.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import lightning
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from analyses.prefixes import PAD, Prefixes
from analyses.splits import Part
from hooked_mm.errors import BadInputError

IntArray = Int[np.ndarray, " n"]
Read = Callable[[IntArray], Tensor]
"""Rows by their numbers, at all layers: (m, layers, d)."""


@dataclass(frozen=True)
class Setting:
    """What the probe is and how it is trained.

    Attributes:
        width: Of the decoder.
        depth: Its blocks.
        hidden: Of the network from a representation to the decoder.
        epochs: At most.
        patience: Epochs without a better validation loss after which training ends.
        batch_size: Rows.
        learning_rate: Of AdamW, with a linear warm-up over the first epoch.
        seed: Of weights, order and inputs.
    """

    width: int = 96
    depth: int = 2
    hidden: int = 192
    epochs: int = 12
    patience: int = 2
    batch_size: int = 32
    learning_rate: float = 2e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.width, self.depth, self.hidden, self.epochs, self.patience, self.batch_size) < 1:
            raise BadInputError(f"{self}: every size must be 1 at least")
        if self.width % 4 or not self.learning_rate > 0:
            raise BadInputError(f"{self}: the width must be a multiple of 4 (heads), the learning rate above 0")


class PrefixProbe(lightning.LightningModule):
    """The probe. Its inputs are numbered: 0 ... L - 1 the layers, L their mixture, L + 1 nothing.

    Args:
        layers: How many L.
        size: Of a representation d.
        names: How many tokens there are.
        longest: Tokens of a prefix at most.
        setting: See there.
    """

    def __init__(self, layers: int, size: int, names: int, longest: int, setting: Setting) -> None:
        super().__init__()
        self.layers, self.setting = layers, setting
        width = setting.width
        self.mixture = nn.Parameter(torch.zeros(layers))
        # Layers share a basis, so that what is learnt of one may hold for others: all begin with the same matrix.
        first = torch.randn(size, setting.hidden) * size**-0.5
        self.first = nn.Parameter(first.repeat(layers + 1, 1, 1))
        self.bias = nn.Parameter(torch.zeros(layers + 1, setting.hidden))
        self.second = nn.Linear(setting.hidden, width)
        self.nothing = nn.Parameter(0.02 * torch.randn(width))
        self.embed = nn.Embedding(names, width)
        self.place = nn.Parameter(0.02 * torch.randn(longest, width))
        block = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, setting.depth, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.unembed = nn.Linear(width, names)
        self.best: tuple[float, dict[str, Tensor]] = (float("inf"), {})
        self.waited = 0
        self._sum: list[tuple[float, int]] = []

    def encode(self, values: Float[Tensor, "m layers d"], inputs: Int[Tensor, " m"]) -> Float[Tensor, "m width"]:
        """e_i of rows, for the input that each is to be given."""
        rows = F.layer_norm(values.float(), values.shape[-1:])
        made = self.nothing.expand(len(rows), -1).clone()
        mixed = torch.einsum("l,mld->md", self.mixture.softmax(0), rows)
        for layer in range(self.layers + 1):
            own = inputs == layer
            if own.any():
                chosen = mixed[own] if layer == self.layers else rows[own, layer]
                made[own] = self.second(F.gelu(chosen @ self.first[layer] + self.bias[layer])).to(made.dtype)
        return made

    def losses(self, encoded: Float[Tensor, "m width"], prefix: Int[Tensor, "m t"]) -> Float[Tensor, "m t"]:
        """-log p of each token of the prefixes given e_i and the tokens before it; 0 behind a prefix's end."""
        said = self.embed(prefix[:, :-1].clamp_min(0))
        begin = torch.zeros_like(encoded)[:, None]
        steps = torch.cat([begin, said], dim=1) + self.place[: prefix.shape[1]] + encoded[:, None]
        # True is what a place may not see; a mask of infinities would be converted in every block.
        later = torch.ones(prefix.shape[1], prefix.shape[1], dtype=torch.bool, device=steps.device).triu(1)
        scores = self.unembed(self.blocks(steps, mask=later, is_causal=True))
        return F.cross_entropy(scores.transpose(1, 2), prefix, ignore_index=PAD, reduction="none")

    def connect(self, read: Read, prefixes: Prefixes, parts: Mapping[Part, IntArray]) -> None:
        """Give it its rows; they are no part of the module."""
        self.read, self.prefixes, self.parts = read, prefixes, parts
        self.drawn = torch.Generator().manual_seed(self.setting.seed)

    def given(self, rows: IntArray) -> tuple[Tensor, Tensor]:
        """Representations and prefixes of rows, on the module's device."""
        return self.read(rows).to(self.device), self.prefixes.batch(rows).to(self.device)

    def train_dataloader(self) -> DataLoader:
        """Numbers of rows, in a new order every epoch."""
        return self._loader("train", True)

    def val_dataloader(self) -> DataLoader:
        """Numbers of rows."""
        return self._loader("validation", False)

    def _loader(self, part: Part, shuffle: bool) -> DataLoader:
        rows = torch.from_numpy(self.parts[part])
        return DataLoader(
            rows,  # type: ignore[arg-type]
            self.setting.batch_size,
            shuffle,
            generator=torch.Generator().manual_seed(self.setting.seed),
        )

    def training_step(self, rows: Int[Tensor, " m"], index: int) -> Tensor:
        """A fifth of the rows is given as the mixture, a fifth as nothing, the others at a layer."""
        chance = torch.full((self.layers + 2,), 0.6 / self.layers)
        chance[-2:] = 0.2
        inputs = torch.multinomial(chance, len(rows), replacement=True, generator=self.drawn).to(self.device)
        values, prefix = self.given(rows.cpu().numpy())
        return self.losses(self.encode(values, inputs), prefix).sum() / (prefix != PAD).sum()

    def validation_step(self, rows: Int[Tensor, " m"], index: int) -> None:
        """The loss of every input in turn."""
        values, prefix = self.given(rows.cpu().numpy())
        inputs = (torch.arange(len(rows)) % (self.layers + 2)).to(self.device)
        found = self.losses(self.encode(values, inputs), prefix)
        self._sum.append((float(found.sum()), int((prefix != PAD).sum())))

    def on_validation_epoch_end(self) -> None:
        """Keep the best weights; end when they stay the best."""
        loss = sum(one for one, _ in self._sum) / max(1, sum(count for _, count in self._sum))
        self._sum = []
        if loss < self.best[0]:
            self.best, self.waited = (loss, copy.deepcopy(self.state_dict())), 0
        else:
            self.waited += 1
            self.trainer.should_stop = self.waited >= self.setting.patience

    def configure_optimizers(self) -> dict[str, object]:
        """AdamW, warmed up over the first epoch."""
        steps = max(1, len(self.parts["train"]) // self.setting.batch_size)
        optimiser = torch.optim.AdamW(self.parameters(), self.setting.learning_rate)
        warm = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, (step + 1) / steps))
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": warm, "interval": "step"}}


def train(
    read: Read,
    prefixes: Prefixes,
    parts: Mapping[Part, IntArray],
    trainer: lightning.Trainer,
    setting: Setting,
) -> PrefixProbe:
    """A probe with the weights that were best on the validation rows; the global random state is left as it was.

    Args:
        read: Gives rows at all layers; a batch of them is held at a time.
        prefixes: Of the rows.
        parts: Rows of training, validation and test; each has a prefix.
        trainer: One process; its `max_epochs` is that of the setting.
        setting: See there.

    Raises:
        BadInputError: If there are no rows to train on or none to validate on, or one of them has no prefix.
    """
    lengths = prefixes.lengths()
    for part in ("train", "validation"):
        if not len(parts[part]) or not lengths[parts[part]].all():
            raise BadInputError(f"{part} needs rows, all with a token before them; give the rows that have one")
    _, layers, size = read(parts["train"][:1]).shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setting.seed)
        probe = PrefixProbe(layers, size, len(prefixes.names), int(lengths.max()), setting)
        probe.connect(read, prefixes, parts)
        trainer.fit(probe)
    probe.load_state_dict(probe.best[1])
    return probe.eval()


@dataclass(frozen=True)
class Said:
    """How well prefixes were said, per row, in nats over the whole prefix.

    Attributes:
        rows: Which.
        tokens: In each prefix.
        own: C_i by input: the layers in order, then their mixture.
        other: The same, given the representation of a row of another sample.
        nothing: -log P(prefix), of the learnt vector that knows nothing of the row.
    """

    rows: IntArray
    tokens: IntArray
    own: Float[np.ndarray, "m inputs"]
    other: Float[np.ndarray, "m inputs"]
    nothing: Float[np.ndarray, " m"]


def partners(samples: IntArray, seed: int = 0) -> IntArray:
    """Per row, the place of a random row of another sample.

    Raises:
        BadInputError: If all rows are of one sample.
    """
    if len(np.unique(samples)) < 2:
        raise BadInputError("all rows are of one sample, so that there is no other to compare with; take more samples")
    rng = np.random.default_rng(seed)
    found = rng.integers(len(samples), size=len(samples))
    while (same := samples[found] == samples).any():
        found[same] = rng.integers(len(samples), size=int(same.sum()))
    return found


@torch.no_grad()
def say(probe: PrefixProbe, rows: IntArray, samples: IntArray, seed: int = 0) -> Said:
    """C_i of rows that the probe was not trained on, and its controls.

    Args:
        probe: Trained, with rows at hand (`connect`).
        rows: Which; each has a prefix.
        samples: Per row of the whole table its sample.
        seed: Of the choice of other rows.

    Raises:
        BadInputError: See `partners`.
    """
    inputs = probe.layers + 1
    own, other = (np.zeros((len(rows), inputs)) for _ in range(2))
    nothing, size = np.zeros(len(rows)), 4 * probe.setting.batch_size
    others = rows[partners(samples[rows], seed)]
    # By length, so that a batch holds few places behind a prefix's end.
    order = np.argsort(probe.prefixes.lengths()[rows], kind="stable")
    for start in range(0, len(rows), size):
        places = order[start : start + size]
        values, prefix = probe.given(rows[places])
        strange, _ = probe.given(others[places])
        for number in range(inputs):
            which = torch.full((len(places),), number, device=probe.device)
            for held, given in ((own, values), (other, strange)):
                held[places, number] = probe.losses(probe.encode(given, which), prefix).sum(1).cpu().numpy()
        blind = torch.full((len(places),), inputs, device=probe.device)
        nothing[places] = probe.losses(probe.encode(values, blind), prefix).sum(1).cpu().numpy()
    return Said(rows, probe.prefixes.lengths()[rows], own, other, nothing)
