"""What a model says under raw hooks, without anything of the package `steering`; and saved vectors to steer it with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from hooked_mm.data import Sample
from hooked_mm.hooked import HookedMM
from hooked_mm.interventions import Add
from hooked_mm.positions import as_rule
from hooked_mm.steering_vector import SteeringVector, load_vectors
from hooked_mm.store import ActivationStore
from steering.compute_command import main as compute
from tests.steering_stores import DEEP

PAIR = ["--source", "{answer: red}", "--target", "{answer: blue}", "--where", "{question_type: colour}"]


def said(model: HookedMM, samples: Sequence[Sample], added: Sequence[tuple[str, Tensor]] = ()) -> list[str]:
    """Answers with vectors added from the last position of the prompt on."""
    batch = model.prepare([one.images for one in samples], [one.text for one in samples])
    where = as_rule("last_prompt") | as_rule("generated")
    with model.hooks([Add(hook, values, at=where) for hook, values in added]):
        return model.generate(batch, 20).text


def along(model: HookedMM, samples: Sequence[Sample], vector: SteeringVector) -> Tensor:
    """How far the prompts' last positions lie along a vector's direction."""
    batch = model.prepare([one.images for one in samples], [one.text for one in samples])
    _, cache = model.run_with_cache(batch, vector.hook)
    return cache[vector.hook][:, -1].double() @ torch.nn.functional.normalize(vector.values.double(), dim=0)


def saved_vectors(store: ActivationStore, folder: Path, kinds: str = "coarse") -> list[SteeringVector]:
    """Those of the command, from red to blue, with controls."""
    options = ["--store", str(store.path), "--hook", DEEP, "--kind", f"[{kinds}]", "--output", str(folder)]
    compute([*options, *PAIR])
    return load_vectors(folder)


def gate_at_the_middle(model: HookedMM, samples: Sequence[Sample], vector: SteeringVector) -> SteeringVector:
    """A gate along a vector's direction that half of the samples pass, the threshold halfway between two of them."""
    ordered = along(model, samples, vector).sort().values
    middle = len(ordered) // 2
    about = {"threshold": float(ordered[middle - 1 : middle + 1].mean())}
    return SteeringVector(vector.values, vector.hook, "gate", "half", model=vector.model, made_from=about)


def opens(model: HookedMM, samples: Sequence[Sample], gate: SteeringVector) -> list[bool]:
    """Which samples it lets pass."""
    return (along(model, samples, gate) > gate.made_from["threshold"]).tolist()
