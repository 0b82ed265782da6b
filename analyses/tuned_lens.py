"""The tuned lens: a logit lens whose every layer is first translated into the last one's language.

Belrose et al. 2023 (arXiv 2303.08112). For each layer l < L an affine translator, which begins as the identity,

    lens_l(h) = to_logits(h + A_l h + b_l),    A_l (d, d), b_l (d,), both 0 at first

is trained to say what the model says in the end:

    loss_l = mean over rows of KL(softmax(to_logits(h^L)) || softmax(lens_l(h^l)))

Norm and unembedding are the model's own and stay as they are. Layers have losses of their own and are trained side by
side. The paper takes SGD with Nesterov momentum, a rate that falls linearly to zero, gradients clipped to norm 1 and
weight decay, which pulls towards the plain lens; `sgd` is that, `adamw`, the default, takes Adam's steps with decoupled
decay instead, for which rates need not be fitted to the width of the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import lightning
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from analyses.layers import Layers
from hooked_mm.errors import BadInputError
from hooked_mm.extraction_job import quiet_trainer
from hooked_mm.processes import Processes
from hooked_mm.tensor_folder import read_json, read_tensors, write_folder

NAME = "tuned_lens"
Optimiser = Literal["adamw", "sgd"]
RATES: dict[str, float] = {"adamw": 2e-3, "sgd": 1.0}


class Readable(Protocol):
    """What is needed of a model: a `HookedMM`, or its `unembedding` alone."""

    def to_logits(self, resid: Float[Tensor, "... d_model"], *, grad: bool = False) -> Float[Tensor, "... vocab"]:
        """unembed(norm(resid)), with scale and soft-cap, in the gradient's graph if asked for."""
        ...


class TunedLens(nn.Module):
    """Translators of some layers; as made, each is the identity.

    Args:
        layers: Their numbers; n is the stream behind n blocks.
        width: d of the stream.

    Attributes:
        weight: (layers, d, d), A.
        bias: (layers, d), b.
    """

    def __init__(self, layers: Sequence[int], width: int) -> None:
        super().__init__()
        self.layers = [int(layer) for layer in layers]
        self.weight = nn.Parameter(torch.zeros(len(self.layers), width, width))
        self.bias = nn.Parameter(torch.zeros(len(self.layers), width))

    def translate(self, layer: int, resid: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """h + A h + b, in the translators' dtype.

        Raises:
            BadInputError: If the layer has no translator, or the stream another width.
        """
        if layer not in self.layers or resid.shape[-1] != self.bias.shape[1]:
            raise BadInputError(
                f"layer {layer} of width {resid.shape[-1]}: translators are of layers {self.layers} and width "
                f"{self.bias.shape[1]}"
            )
        place, wide = self.layers.index(layer), resid.to(self.weight)
        return wide + wide @ self.weight[place].T + self.bias[place]

    def logits(
        self, model: Readable, layer: int, resid: Float[Tensor, "... d"], *, grad: bool = False
    ) -> Float[Tensor, "... vocab"]:
        """lens_l(h); of a layer without a translator, as the last one, the plain lens.

        Args:
            model: Whose norm and unembedding to use.
            layer: Of the stream.
            resid: The stream.
            grad: Keep the gradient's graph.
        """
        value = self.translate(layer, resid) if layer in self.layers else resid
        return model.to_logits(value, grad=grad)

    def save(self, folder: str | Path, told: Mapping[str, Any]) -> Path:
        """Write `tuned_lens.safetensors` and `tuned_lens.json`, with what is told of its making; the folder."""
        tensors = {"weight": self.weight, "bias": self.bias}
        return write_folder(folder, NAME, tensors, {"layers": self.layers, "made_by": dict(told)})

    @classmethod
    def load(cls, folder: str | Path) -> TunedLens:
        """What `save` wrote.

        Raises:
            BadInputError: If the folder holds none, or tensors that do not fit its layers.
        """
        content = read_json(folder, NAME, "tuned lens", "write its translators with TunedLens.save")
        tensors = read_tensors(folder, NAME, content)
        shapes = {name: tuple(value.shape) for name, value in tensors.items()}
        layers, width = content.get("layers"), shapes.get("bias", (0, 0))[-1]
        if not isinstance(layers, list) or shapes != {
            "weight": (len(layers), width, width),
            "bias": (len(layers), width),
        }:
            raise BadInputError(f"{str(folder)!r} has tensors {shapes} for layers {layers}; save the tuned lens again")
        made = cls(layers, width)
        made.load_state_dict(tensors)
        return made.requires_grad_(False)


def divergence(target: Float[Tensor, "n vocab"], logits: Float[Tensor, "n vocab"]) -> Float[Tensor, " n"]:
    """KL(softmax(target) || softmax(logits)) per row, in nats.

    A word that the model never says (its logit the least number there is) adds nothing.
    """
    said, seen = target.float().log_softmax(-1), logits.float().log_softmax(-1)
    # Of words with probability 0 both logarithms may be -inf.
    terms = torch.where(said.exp() > 0, said.exp() * (said - seen), 0.0)
    return terms.sum(-1)


class ShuffledRows(IterableDataset):
    """Rows of all layers of a store, drawn in another order in every epoch, without end.

    Args:
        layers: The store's layers.
        rows: Which of its rows.
        size: Rows per batch over all processes.
        seed: Of the orders.
    """

    def __init__(self, layers: Layers, rows: Int[np.ndarray, " n"], size: int, seed: int = 0) -> None:
        super().__init__()
        if not len(rows):
            raise BadInputError("there are no rows to train on; take more samples, or a larger share for training")
        self.layers, self.rows, self.size, self.seed = layers, rows, min(size, len(rows)), seed

    def __iter__(self) -> Iterator[dict[int, Float[Tensor, "m d"]]]:
        everyone, rng = Processes(), np.random.default_rng(self.seed)
        while True:
            order = self.rows[rng.permutation(len(self.rows))]
            for start in range(0, len(order) - self.size + 1, self.size):
                # Sorted, so that a file is read from its beginning to its end.
                own = np.sort(order[start : start + self.size])[everyone.rank :: everyone.size]
                yield {layer: self.layers.values(layer, own) for layer in self.layers.numbers}


Load = Callable[[torch.device], Readable]


class Training(lightning.LightningModule):
    """Trains all translators side by side.

    Args:
        lens: Is trained.
        model: Whose norm and unembedding to use, or what loads them onto the process's device.
        steps: So many batches.
        optimiser: `adamw` or `sgd`.
        rate: Falls linearly to zero.
        decay: Weight decay.
    """

    def __init__(
        self, lens: TunedLens, model: Readable | Load, steps: int, optimiser: Optimiser, rate: float, decay: float
    ) -> None:
        super().__init__()
        self.lens, self.steps, self.optimiser, self.rate, self.decay = lens, steps, optimiser, rate, decay
        # In a list: a module that Lightning found would be moved and saved.
        self._model: list[Any] = [model]
        self._open = ExitStack()
        self.losses: list[float] = []

    def on_fit_start(self) -> None:
        """Load the ends of the model, and let their weights be."""
        if not hasattr(self._model[0], "to_logits"):
            self._model = [self._model[0](self.device)]
        self._open.enter_context(frozen(self._model[0]))

    def close(self) -> None:
        """Leave the model as it was."""
        self._open.close()

    def configure_optimizers(self) -> Any:
        """With a rate that falls linearly to zero."""
        made: torch.optim.Optimizer
        if self.optimiser == "adamw":
            made = torch.optim.AdamW(self.lens.parameters(), lr=self.rate, weight_decay=self.decay)
        else:
            made = torch.optim.SGD(
                self.lens.parameters(), lr=self.rate, momentum=0.9, nesterov=True, weight_decay=self.decay
            )
        schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda step: max(0.0, 1 - step / self.steps))
        return {"optimizer": made, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: dict[int, Tensor]) -> Tensor:
        """The sum of the layers' losses."""
        model, last = self._model[0], max(batch)
        target = model.to_logits(batch[last])
        losses = [
            divergence(target, self.lens.logits(model, layer, batch[layer], grad=True)).mean()
            for layer in self.lens.layers
        ]
        total = torch.stack([loss.to(losses[0].device) for loss in losses]).sum()
        self.losses.append(float(total.detach()))
        return total


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """While open, a hooked model's weights require no gradient; then as before."""
    inside = getattr(model, "hf_model", None)
    weights = [] if inside is None else [weight for weight in inside.parameters() if weight.requires_grad]
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


def train(
    layers: Layers,
    model: Readable | Load,
    rows: Int[np.ndarray, " n"] | None = None,
    *,
    steps: int = 250,
    size: int = 2048,
    optimiser: Optimiser = "adamw",
    rate: float | None = None,
    decay: float = 1e-3,
    seed: int = 0,
    trainer: Mapping[str, Any] | None = None,
) -> tuple[TunedLens, list[float]]:
    """Train a translator for every layer but the last, by Lightning, on rows that are read as they are needed.

    Args:
        layers: Rows at several layers, the last of them the model's last.
        model: Whose norm and unembedding to use, or a function that loads them onto a device, each process its own.
        rows: Which rows; all unless given.
        steps: Batches.
        size: Rows per batch, over all processes.
        optimiser: `adamw` or `sgd`, see the module's text.
        rate: At first; 2e-3 for AdamW and 1 for SGD unless given.
        decay: Weight decay.
        seed: Of the order of the rows.
        trainer: Of `lightning.Trainer`; one process on the CPU unless told otherwise.

    Returns:
        The lens on the CPU, and the loss of every step, summed over layers, in nats.

    Raises:
        BadInputError: If there is no layer before the last, or no row, or numbers are out of range.
    """
    if len(layers.numbers) < 2 or steps < 1 or size < 1:
        raise BadInputError(
            f"layers {layers.numbers}, steps={steps}, size={size}: at least two layers, a step and a row are needed"
        )
    chosen = np.arange(len(layers)) if rows is None else rows
    width = layers.values(layers.numbers[0], slice(0, 1)).shape[-1]
    lens = TunedLens(layers.numbers[:-1], width)
    module = Training(lens, model, steps, optimiser, RATES[optimiser] if rate is None else rate, decay)
    loader = DataLoader(ShuffledRows(layers, chosen, size, seed), batch_size=None)
    options = {"accelerator": "cpu", "devices": 1, "gradient_clip_val": 1.0 if optimiser == "sgd" else None}
    try:
        quiet_trainer(**{**options, **(trainer or {}), "max_steps": steps}).fit(module, loader)
    finally:
        module.close()
    return lens.cpu().requires_grad_(False), module.losses
