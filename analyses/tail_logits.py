"""Logits from the first target's row on: a vocabulary's logits at every position of a long prompt are never made."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from analyses.targets import Targets
from hooked_mm.batch import Batch
from hooked_mm.hooked import HookedMM
from hooked_mm.interventions import HookLike

KEEP = "logits_to_keep"


def tail_options(model: HookedMM, batch: Batch, targets: Targets) -> dict[str, Any]:
    """What to hand to the model's forward; nothing, if it always makes all logits."""
    inner = model.hf_model.get_base_model() if hasattr(model.hf_model, "get_base_model") else model.hf_model
    known = KEEP in inspect.signature(inner.forward).parameters
    return {KEEP: batch.length - int(targets.row.min())} if known and len(targets) else {}


def in_tail(targets: Targets, batch: Batch, logits: Float[Tensor, "b k vocab"]) -> Targets:
    """The targets as rows of the logits that were made."""
    return Targets(targets.sample, targets.row - (batch.length - logits.shape[1]), targets.token, targets.foil)


def tail_logits(
    model: HookedMM, batch: Batch, targets: Targets, hooks: Sequence[HookLike] = ()
) -> tuple[Float[Tensor, "b k vocab"], Targets]:
    """Logits of one pass from the first target's row on, and the targets as rows of them.

    Args:
        model: The model, with its active hooks at work.
        batch: Whose targets they are.
        targets: What is predicted.
        hooks: Functions or interventions besides.
    """
    logits = model.run_with_hooks(batch, hooks, **tail_options(model, batch, targets))
    assert logits is not None
    return logits, in_tail(targets, batch, logits)
