"""Chefer's rules as plain loops over numbers in float64, and attention with its gradients by PyTorch alone.

Written from the paper (arXiv 2103.15679, eq. 5 to 11), without our own code, to check ours against.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

Matrix = list[list[float]]


def weigh(attention: Tensor, gradient: Tensor) -> Matrix:
    """Eq. 5: the mean over heads of what is positive of gradient times attention, (heads, q, k) each."""
    heads, queries, keys = attention.shape
    a, g = attention.double().tolist(), gradient.double().tolist()
    return [
        [sum(max(g[h][i][j] * a[h][i][j], 0.0) for h in range(heads)) / heads for j in range(keys)]
        for i in range(queries)
    ]


def identity(size: int) -> Matrix:
    """Each position begins as itself."""
    return [[1.0 if i == j else 0.0 for j in range(size)] for i in range(size)]


def product(left: Matrix, right: Matrix) -> Matrix:
    columns = list(zip(*right, strict=True))
    return [[sum(x * y for x, y in zip(row, column, strict=True) if x) for column in columns] for row in left]


def added(left: Matrix, right: Matrix) -> Matrix:
    return [[x + y for x, y in zip(one, other, strict=True)] for one, other in zip(left, right, strict=True)]


def transposed(matrix: Matrix) -> Matrix:
    return [list(column) for column in zip(*matrix, strict=True)]


def normalise(relevancy: Matrix) -> Matrix:
    """Eq. 8 and 9."""
    found = []
    for i, row in enumerate(relevancy):
        rest = [value - (1.0 if i == j else 0.0) for j, value in enumerate(row)]
        total = sum(rest)
        found.append([(value / total if total > 0 else 0.0) + (1.0 if i == j else 0.0) for j, value in enumerate(rest)])
    return found


def self_attended(layers: Sequence[Matrix]) -> Matrix:
    """Eq. 6, from the identity, the first layer first."""
    relevancy = identity(len(layers[0]))
    for layer in layers:
        relevancy = added(relevancy, product(layer, relevancy))
    return relevancy


def cross_attended(layers: Sequence[tuple[str, Matrix]], texts: int, source: Matrix) -> tuple[Matrix, Matrix]:
    """Eq. 6, 7 and 10 through layers called "self" and "cross"; of a source that never reads the text, R_qs = 0."""
    own = identity(texts)
    read = [[0.0] * len(source) for _ in range(texts)]
    for kind, layer in layers:
        if kind == "self":
            own, read = added(own, product(layer, own)), added(read, product(layer, read))
        else:
            mixed = product(layer, normalise(source))
            read = added(read, product(transposed(normalise(own)), mixed))
    return own, read


class Attentions(ExitStack):
    """While open, keeps what attention modules of an eagerly attending model return as their weights, with gradients.

    Args:
        model: A transformers model with `attn_implementation="eager"`.
        paths: Its attention modules.
        field: Which of their outputs holds the weights.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str], field: int = 1) -> None:
        super().__init__()
        self.kept: dict[str, Tensor] = {}
        for path in paths:
            handle = model.get_submodule(path).register_forward_hook(self._keep(path, field))
            self.callback(handle.remove)

    def _keep(self, path: str, field: int) -> Any:
        def keep(module: nn.Module, given: Any, out: Any) -> None:
            assert out[field] is not None, f"{path} returns no weights; is attention eager?"
            self.kept[path] = out[field]
            self.kept[path].retain_grad()

        return keep

    def weighed(self, path: str, row: int) -> Matrix:
        """Eq. 5 of one module, in one row of the batch; zero where the score did not depend on it."""
        value = self.kept[path]
        gradient = torch.zeros_like(value) if value.grad is None else value.grad
        return weigh(value[row].detach(), gradient[row])


class EagerCalls:
    """Weights of every call of a modeling file's eager attention, with gradients, for modules that keep them back.

    Args:
        monkeypatch: Of the test.
        path: Of the function, `transformers.models.qwen2_vl.modeling_qwen2_vl.eager_attention_forward`.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
        self.kept: dict[int, list[Tensor]] = {}
        file, name = path.rsplit(".", 1)
        real = getattr(import_module(file), name)

        def call(module: nn.Module, *args: Any, **options: Any) -> Any:
            out, weights = real(module, *args, **options)
            if weights.requires_grad:
                weights.retain_grad()
                self.kept.setdefault(id(module), []).append(weights)
            return out, weights

        monkeypatch.setattr(path, call)

    def weighed(self, module: nn.Module, call: int = 0, row: int = 0) -> Tensor:
        """Eq. 5 of one call of a module, in one row of it; without loops, as towers are large."""
        value = self.kept[id(module)][call]
        assert value.grad is not None
        return (value[row].detach().double() * value.grad[row].double()).clamp_min(0).mean(0)


def mixed(layers: Sequence[Tensor]) -> Tensor:
    """R^ of a stack too long for loops: eq. 6, 8 and 9 by matrices, the first layer first."""
    one = torch.eye(len(layers[0]), dtype=torch.float64)
    relevancy = one
    for layer in layers:
        relevancy = relevancy + layer @ relevancy
    rest = relevancy - one
    return rest / rest.sum(1, keepdim=True).clamp_min(1e-300) + one
