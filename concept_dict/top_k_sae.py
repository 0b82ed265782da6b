"""Top-k sparse autoencoder (Gao et al., "Scaling and evaluating sparse autoencoders", 2024, section 2.3).

A = ReLU(TopK(Z E^T + b)), minimises ||Z - A C||_F^2 / ||Z||_F^2 over encoder E (k, d), bias b (k) and unit concepts C
by Adam on minibatches, for many rows. A concept that fired for no row of an epoch is dead: it begins anew at a row that
is represented badly. With several processes, gradients are summed over their shares of each batch.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from concept_dict.decomposition import Decomposition, generator, unit
from concept_dict.rows import Rows


def top_k(values: Float[Tensor, "m k"], active: int) -> Float[Tensor, "m k"]:
    """The largest so many of each row, if positive; zeros elsewhere."""
    best = values.topk(active, dim=1)
    return torch.zeros_like(values).scatter(1, best.indices, best.values.clamp_min(0))


class TopKSAE(Decomposition):
    """A sparse autoencoder whose rows activate so many concepts at most.

    Args:
        n_components: Number of concepts k.
        active: Concepts that a row may activate.
        center: Subtract the mean first.
        whiten: Multiply rows by S^(-whiten / 2), S their second moments, first: from 0, as they are, to 1, where all
            directions have the same size. With 1/2 a few large ones no longer decide alone (see `whitening`).
        max_iter: Epochs at most.
        batch_size: Rows per step, over all processes.
        learning_rate: Of Adam; it falls to a tenth over the epochs.
        tol: Stop when an epoch, without concepts begun anew, lowers the loss by less than this share.
        random_state: Seed of start and order.

    Attributes (after `fit`), besides those of `Decomposition`:
        encoder_: E (k, d).
        bias_: b (k,).
        loss_history_: Per epoch ||Z - A C||^2 / ||Z||^2, while the epoch went on.
        n_revived_: How often a dead concept began anew.
        n_dead_: Concepts that no row activates in the end.
    """

    def __init__(
        self,
        n_components: int = 100,
        *,
        active: int = 8,
        center: bool = True,
        whiten: float = 0.0,
        max_iter: int = 100,
        batch_size: int = 1024,
        learning_rate: float = 3e-3,
        tol: float = 1e-4,
        random_state: int | None = 0,
    ) -> None:
        self.n_components = n_components
        self.active = active
        self.center = center
        self.whiten = whiten
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.tol = tol
        self.random_state = random_state

    def begin(self, rows: Rows) -> None:
        """Concepts start at rows drawn by chance, the encoder as their transpose."""
        self._check_at_least_one("active", "max_iter", "batch_size")
        self._rows = data = self._centred(rows)
        random = generator(self.random_state, rows.processes.size)
        equal = torch.ones(rows.count, device=rows.device)
        start = unit(data.draw(equal, torch.rand(self.n_components, generator=random, dtype=torch.float64)))
        self.components_, self.encoder_ = start.clone(), start.clone()
        self.bias_ = torch.zeros(self.n_components, device=rows.device)
        self._order = torch.Generator().manual_seed(random.initial_seed() % 2**62 + 1 + rows.processes.rank)
        self._scale = max(data.size / data.total, 1e-300) ** 0.5
        self._parameters = [self.encoder_.requires_grad_(), self.bias_.requires_grad_(), start.requires_grad_()]
        self._adam = torch.optim.Adam(self._parameters, lr=self.learning_rate)
        self.loss_history_: list[float] = []
        self.n_iter_ = self.n_revived_ = 0

    def step(self) -> bool:
        """One epoch."""
        rows, processes = self._rows, self._rows.processes
        rate = self.learning_rate * 0.1 ** (self.n_iter_ / self.max_iter)
        for group in self._adam.param_groups:
            group["lr"] = rate
        encoder, bias, concepts = self._parameters
        steps = -(-rows.total // self.batch_size)
        order = torch.randperm(rows.count, generator=self._order).to(rows.device)
        fired = torch.zeros(self.n_components, device=rows.device)
        worst = torch.zeros(rows.count, device=rows.device)
        total = torch.zeros((), dtype=torch.float64, device=rows.device)
        for index in order.tensor_split(steps):
            # In the rows' own scale, so that one learning rate serves all.
            chunk = rows.take(index) / self._scale
            with torch.enable_grad():
                codes = top_k(chunk @ encoder.T + bias, min(self.active, self.n_components))
                error = (chunk - codes @ concepts).square().sum(dim=1)
                gradients = torch.autograd.grad(error.sum() / min(self.batch_size, rows.total), self._parameters)
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                parameter.grad = processes.sum(gradient)
            self._adam.step()
            with torch.no_grad():
                concepts.copy_(unit(concepts))
                fired += (codes > 0).sum(dim=0)
                worst[index] = error.detach()
                total += error.detach().double().sum()
        self.loss_history_.append(float(processes.sum(total)) / rows.total)
        self.n_iter_ += 1
        revived = self._revive(processes.sum(fired), worst)
        if self.n_iter_ == self.max_iter:
            return True
        history = self.loss_history_
        return len(history) > 1 and not revived and 0 <= history[-2] - history[-1] <= self.tol * history[-1]

    @torch.no_grad()
    def _revive(self, fired: Tensor, worst: Float[Tensor, " n"]) -> int:
        """Begin dead concepts anew at rows that are represented badly; how many."""
        dead = (fired == 0).nonzero()[:, 0].tolist()
        # Late in the training they would not have the time to learn.
        if not dead or 2 * self.n_iter_ > self.max_iter:
            return 0
        encoder, bias, concepts = self._parameters
        for concept, found in zip(dead, self._rows.largest(worst, len(dead)), strict=False):
            direction = unit(self._rows.row(found)[None])[0]
            encoder[concept], concepts[concept], bias[concept] = direction, direction, 0
            for parameter in self._parameters:
                for moment in ("exp_avg", "exp_avg_sq"):
                    self._adam.state[parameter][moment][concept] = 0
        self.n_revived_ += len(dead)
        return len(dead)

    def progress(self) -> dict[str, float]:
        """The loss of the last epoch."""
        return {"loss": self.loss_history_[-1], "revived": float(self.n_revived_)}

    @torch.no_grad()
    def _end(self) -> Float[Tensor, "n k"]:
        """Back to the rows' scale: activations carry it."""
        encoder, bias, concepts = self._parameters
        self.encoder_, self.components_ = encoder.detach(), concepts.detach().clone()
        self.bias_ = bias.detach() * self._scale
        rows = self._rows
        del self._parameters, self._adam, self._order
        active = self._measure(rows)
        used = rows.processes.sum((active > 0).sum(dim=0))
        self.n_dead_ = int((used == 0).sum())
        return active

    @torch.no_grad()
    def activations(self, chunk: Float[Tensor, "m d"]) -> Float[Tensor, "m k"]:
        """What the encoder says, the largest few."""
        return top_k(chunk @ self.encoder_.T + self.bias_, min(self.active, self.n_components))
