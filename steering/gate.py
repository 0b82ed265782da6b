"""Gates: for which samples steering acts, judged once per sample from the activation of a concept or along a direction.

    open(x) = [u.x > t]                 along a direction u of length 1 (`Gate`)
    open(x) = [A_k(x) > t]              by the activation of concept k of a dictionary (`ConceptAbove`)

x is the activation at the gate's own point and positions, its mean where these are several. A gate that is shut leaves
a sample token for token as it is ("conditional steering", 2501.03012, section 5; Lee et al. 2024, arXiv 2409.05907).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from concept_dict.decomposition import Decomposition
from concept_dict.metrics import poles
from hooked_mm.conditions import Above, Condition
from hooked_mm.errors import BadInputError
from hooked_mm.interventions import Intervention
from hooked_mm.positions import LAST_PROMPT, At
from hooked_mm.steering_vector import SteeringVector


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class ConceptAbove(Condition):
    """Passes where concept k of a dictionary is active above the threshold: A_k(x) > t.

    Attributes:
        fitted: The dictionary, of rows of the point that is looked at.
        concept: k; from the number of concepts on, the other ends of a signed dictionary's.
    """

    fitted: Decomposition
    concept: int
    direction: Float[Tensor, " d"] = field(init=False)

    def __post_init__(self) -> None:
        self.fitted.check_fitted()
        k = len(self.fitted.components_)
        if not 0 <= self.concept < k * (1 + self.fitted.SIGNED):
            raise BadInputError(f"concept={self.concept}; this dictionary has {k} concepts, counted from 0")
        object.__setattr__(self, "direction", self.fitted.components_[self.concept % k])
        super().__post_init__()

    def _projection(self, value: Tensor) -> Tensor:
        rows = value.detach().reshape(-1, value.shape[-1]).to(self.fitted.components_.device, torch.float32)
        active = self.fitted.transform(rows)
        active = poles(active) if self.fitted.SIGNED else active
        return active[:, self.concept].reshape(value.shape[:-1]).to(value.device)

    def passes(self, projection: Tensor) -> Tensor:
        """Which activations are above the threshold."""
        return projection > self.threshold


def digest(values: Tensor) -> str:
    """What no other numbers have, on whatever device they are."""
    return sha256(values.detach().cpu().float().contiguous().numpy().tobytes()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class Gate:
    """A condition with a name, for whole samples.

    Attributes:
        condition: Judged once per sample, from its prompt.
        name: For people and tables; two gates of one name are one.
        made_from: How it was made, as JSON holds it.
        saved: The vector it was read from, which knows whose it is.
    """

    condition: Condition
    name: str
    made_from: dict[str, Any] = field(default_factory=dict)
    saved: SteeringVector | None = None

    def __post_init__(self) -> None:
        if self.condition.over == "position":
            raise BadInputError(
                f"the gate {self.name!r} judges positions one by one (over='position'), but a gate opens for whole "
                "samples; make its condition with over='mean' or over='any'"
            )

    def fingerprint(self) -> list[Any]:
        """What tells it from any other gate: how it judges, and digests of its numbers."""
        told = self.condition
        found = [type(told).__name__, told.point, told.over, repr(told.at), told.cosine, float(told.threshold)]
        found.append(digest(told.direction))
        if isinstance(told, ConceptAbove):
            found += [repr(told.fitted), told.concept, digest(told.fitted.components_)]
        return found

    def of(self, intervention: Intervention) -> Intervention:
        """The intervention, for samples that the gate opens for."""
        return intervention.when(self.condition)

    def vector(self) -> SteeringVector:
        """The gate as a vector that can be saved beside others: its direction, its threshold in `made_from`.

        Raises:
            BadInputError: If it is no projection at one point, or judged elsewhere than at the last prompt position.
        """
        condition = self.condition
        plain = isinstance(condition, Above) and condition.point is not None and condition.over == "mean"
        if not plain or condition.cosine or condition.at != LAST_PROMPT:
            raise BadInputError(f"the gate {self.name!r} is {condition!r}; only projections at one point can be saved")
        assert condition.point is not None
        made_from = {**self.made_from, "threshold": condition.threshold}
        return SteeringVector(condition.direction, condition.point, "gate", self.name, made_from=made_from)

    @classmethod
    def of_vector(cls, vector: SteeringVector) -> Gate:
        """What `vector` made a vector of.

        Raises:
            BadInputError: If it is no gate.
        """
        if vector.kind != "gate" or "threshold" not in vector.made_from:
            raise BadInputError(f"{vector!r} is no gate; make one with learn_gate(...).vector()")
        condition = Above(vector.values, vector.made_from["threshold"], vector.hook, "mean", LAST_PROMPT)
        return cls(condition, vector.name, dict(vector.made_from), vector)


def learn_gate(
    inside: Float[Tensor, "n d"],
    outside: Float[Tensor, "m d"],
    point: str,
    name: str,
    *,
    leak: float = 0.005,
    at: At = LAST_PROMPT,
    made_from: dict[str, Any] | None = None,
) -> Gate:
    """A gate that opens for samples like those inside: a logistic regression of the rows at its point.

    The threshold is the middle between the two sets where they lie apart, and else what at most a share `leak` of the
    rows outside exceeds.

    Args:
        inside: Rows of samples to steer.
        outside: Rows of others.
        point: The hook point that the rows were read at.
        name: For people.
        leak: Share of the rows outside that may pass.
        at: The positions that the rows were read at.
        made_from: What is to be written down beside the counts and shares.

    Raises:
        BadInputError: If a set has fewer than two rows, widths differ, or `leak` is no share.
    """
    if min(len(inside), len(outside)) < 2 or inside.shape[1:] != outside.shape[1:]:
        raise BadInputError(
            f"a gate is learnt from rows inside {tuple(inside.shape)} and outside {tuple(outside.shape)}; give at "
            "least two of each, of one width"
        )
    if not 0 <= leak < 1:
        raise BadInputError(f"leak={leak}; it is a share of the rows outside, from 0 to below 1")
    rows = torch.cat([inside, outside]).double().cpu().numpy()
    labels = np.repeat([1, 0], [len(inside), len(outside)])
    scaler = StandardScaler().fit(rows)
    probe = LogisticRegression(C=1.0, max_iter=2000, class_weight="balanced").fit(scaler.transform(rows), labels)
    # In the units of the activations, as the rows were divided by their spread.
    direction = torch.from_numpy(probe.coef_[0] / scaler.scale_)
    direction = direction / direction.norm()
    along = torch.from_numpy(rows) @ direction
    ins, outs = along[: len(inside)], along[len(inside) :]
    apart = bool(ins.min() > outs.max())
    threshold = float((ins.min() + outs.max()) / 2) if apart else _exceeded_by(outs, leak)
    told = {
        **(made_from or {}),
        "rows": [len(inside), len(outside)],
        "leak": leak,
        "opens": [float((part > threshold).double().mean()) for part in (ins, outs)],
    }
    return Gate(Above(direction.float(), threshold, point, "mean", at), name, told)


def learn_concept_gate(
    fitted: Decomposition,
    inside: Float[Tensor, "n d"],
    outside: Float[Tensor, "m d"],
    point: str,
    name: str,
    *,
    leak: float = 0.005,
    at: At = LAST_PROMPT,
) -> Gate:
    """A gate by that concept of a dictionary which tells samples inside best from those outside.

    Best by the area under the curve of its activation (Hanley and McNeil 1982); the threshold is what at most a share
    `leak` of the rows outside exceeds.

    Args:
        fitted: The dictionary, of rows of the point.
        inside: Rows of samples to steer.
        outside: Rows of others.
        point: The hook point that the rows were read at.
        name: For people.
        leak: Share of the rows outside that may pass.
        at: The positions that the rows were read at.

    Raises:
        BadInputError: If a set is empty, or `leak` is no share.
    """
    if not len(inside) or not len(outside) or not 0 <= leak < 1:
        raise BadInputError(
            f"{len(inside)} rows inside, {len(outside)} outside, leak={leak}; give rows of both, and a share below 1"
        )
    active = fitted.transform(torch.cat([inside, outside]).float())
    active = (poles(active) if fitted.SIGNED else active).double().cpu()
    labels = np.repeat([1, 0], [len(inside), len(outside)])
    areas = [float(roc_auc_score(labels, column)) for column in active.T.numpy()]
    concept = int(np.argmax(areas))
    ins, outs = active[: len(inside), concept], active[len(inside) :, concept]
    threshold = _exceeded_by(outs, leak)
    told = {
        "concept": concept,
        "concepts": len(areas),
        "area": areas[concept],
        "leak": leak,
        "opens": [float((part > threshold).double().mean()) for part in (ins, outs)],
    }
    condition = ConceptAbove(fitted=fitted, concept=concept, threshold=threshold, point=point, over="mean", at=at)
    return Gate(condition, name, told)


def _exceeded_by(values: Float[Tensor, " m"], share: float) -> float:
    """What no more than this share of them exceeds, up to the rounding of activations in float32."""
    ordered = values.sort(descending=True).values
    return float(ordered[int(share * len(ordered))] + 1e-5 * values.abs().max())


def gates_of(vectors: Sequence[SteeringVector]) -> list[Gate]:
    """Those of saved vectors that are gates."""
    return [Gate.of_vector(vector) for vector in vectors if vector.kind == "gate"]
