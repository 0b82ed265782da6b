"""Embeddings by convention or by size; numbers that logits are multiplied and divided by, read off the forward."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor, nn

from hooked_mm.errors import UnsupportedModelError
from hooked_mm.vocabulary import find_embedding, find_unembedding, logit_cap, logit_scale


class Model(nn.Module):
    """A model that names nothing."""

    def __init__(self, tables: int = 1, heads: int = 1) -> None:
        super().__init__()
        self.tables = nn.ModuleList([nn.Embedding(9, 4) for _ in range(tables)])
        self.heads = nn.ModuleList([nn.Linear(4, 9) for _ in range(heads)])
        self.other = nn.Linear(4, 5)

    def get_output_embeddings(self) -> None:
        return None


class Multiplies(Model):
    def forward(self, hidden: Tensor, config: Any) -> Tensor:
        return self.heads[0](hidden) * config.text_config.logits_scaling


class Divides(Model):
    def forward(self, hidden: Tensor, config: Any) -> Tensor:
        return self.heads[0](hidden) / config.text_config.logits_scaling


class Caps(Model):
    def forward(self, hidden: Tensor, config: Any) -> Tensor:
        cap = config.final_logit_softcapping
        return cap * (self.heads[0](hidden) / cap).tanh()


class Plain(Model):
    def forward(self, hidden: Tensor, config: Any) -> Tensor:
        return self.heads[0](hidden)


@pytest.mark.parametrize(
    ("kind", "scale", "cap"), [(Multiplies, 8.0, None), (Divides, 0.125, None), (Caps, 1.0, 30.0), (Plain, 1.0, None)]
)
def test_only_what_the_forward_uses_counts(kind: type[Model], scale: float, cap: float | None) -> None:
    config = SimpleNamespace(logits_scaling=8.0, final_logit_softcapping=30.0)
    assert logit_scale(kind(), config) == scale
    assert logit_cap(kind(), config) == cap
    assert logit_scale(kind(), SimpleNamespace()) == 1.0


def test_embeddings_by_their_size() -> None:
    model = Model()
    assert find_embedding(model, 9) is model.tables[0]
    assert find_unembedding(model, 9) is model.heads[0]


def test_what_is_not_there_once_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="names no token embedding, and 2 tables have 9 rows"):
        find_embedding(Model(tables=2), 9)
    with pytest.raises(UnsupportedModelError, match="0 linear maps have 9 outputs: it has no logits"):
        find_unembedding(Model(heads=0), 9)
