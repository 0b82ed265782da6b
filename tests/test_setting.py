"""Settings side by side: each row of a batch is steered as its setting says, and as if it were alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hooked_mm.conditions import Above
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.positions import LAST_PROMPT, Positions
from hooked_mm.runner import Hook
from hooked_mm.steering_vector import SteeringVector
from steering.gate import Gate
from steering.setting import ANSWERING, OPERATIONS, Setting, positions, side_by_side

HOOKS = ("blocks.1.hook_resid_post", "blocks.3.hook_resid_post")


def vector(seed: int, hook: str = HOOKS[0], norm: float = 3.0) -> SteeringVector:
    """A random direction."""
    drawn = torch.randn(128, generator=torch.Generator().manual_seed(seed))
    return SteeringVector(norm * drawn / drawn.norm(), hook, "coarse", f"v{seed}")


def by_hand(setting: Setting) -> Callable[[Tensor], Tensor]:
    """The table's formulas, in float64, one position at a time."""
    assert setting.vector is not None
    v, a = setting.vector.values.double(), setting.alpha
    u = v / v.norm()

    def change(x: Tensor) -> Tensor:
        x = x.double()
        if setting.operation == "add":
            return x + a * v
        if setting.operation == "add_keep_norm":
            return (x + a * v) * x.norm() / (x + a * v).norm()
        if setting.operation == "project_out":
            return x - (x @ u) * u
        if setting.operation == "set":
            return x + (a - x @ u) * u
        assert setting.second is not None
        e1 = setting.second.values.double()
        e1 = e1 / e1.norm()
        e2 = v - (v @ e1) * e1
        e2 = e2 / e2.norm()
        p, q = x @ e1, x @ e2
        turned = (p * math.cos(a) - q * math.sin(a)) * e1 + (p * math.sin(a) + q * math.cos(a)) * e2
        return x - p * e1 - q * e2 + turned

    return change


SETTINGS = [
    Setting(),
    Setting(vector(0), 1.5),
    Setting(vector(1, HOOKS[1]), -2.0, "last_prompt"),
    Setting(vector(2), 0.7, operation="add_keep_norm"),
    Setting(vector(3), operation="project_out"),
    Setting(vector(4), 2.5, "image", "set"),
    Setting(vector(5), 0.8, "all", "rotate", second=vector(6)),
    Setting(vector(7), 1.0, "question+last_prompt", also=(Setting(vector(8, HOOKS[1]), 2.0),)),
    Setting(vector(9), 1.0, also=(Setting(vector(10), 2.0, operation="set"), Setting(vector(11), 0.5))),
]


@given(order=st.permutations(range(len(SETTINGS))), count=st.integers(1, len(SETTINGS)))
def test_each_row_is_steered_by_its_own_setting(
    llava: HookedMM, images: list[Any], order: list[int], count: int
) -> None:
    """Against the formulas by hand at each chosen position, whatever settings stand beside; others stay bit for bit."""
    settings = [SETTINGS[number] for number in order[:count]]
    batch = llava.prepare([images[row] for row in range(count)], ["what colour is the ring ?"] * count)
    seen: dict[str, list[Tensor]] = {hook: [] for hook in HOOKS}

    def look(value: Tensor, hook: Hook) -> None:
        seen[hook.name].append(value.clone())

    hooks: list[Any] = [(list(HOOKS), look), *side_by_side(settings), (list(HOOKS), look)]
    llava.run_with_hooks(batch, hooks, stop_at_layer=4)
    masks = {at: positions(at).resolve(Hook(HOOKS[0], 1, 0, batch), seen[HOOKS[0]][0].shape) for at in POSITIONS}
    for row, setting in enumerate(settings):
        for hook in HOOKS:
            before, after = (value[row] for value in seen[hook])
            expected = before.double()
            for part in setting.parts:
                assert part.vector is not None
                if part.vector.hook != hook:
                    continue
                change = by_hand(part)
                chosen = masks[part.at][row]
                expected = torch.stack([change(x) if on else x for x, on in zip(expected, chosen, strict=True)])
            touched = any(part.vector is not None and part.vector.hook == hook for part in setting.parts)
            assert torch.allclose(after.double(), expected, atol=1e-4), (setting, hook)
            assert touched != torch.equal(before, after)


POSITIONS = sorted({part.at for setting in SETTINGS for part in setting.parts})


def test_what_a_setting_does_first_is_done_first(llava: HookedMM, images: list[Any]) -> None:
    """Also where a setting beside it does there first what it does last."""
    v, w = vector(0), vector(1)
    both = Setting(v, 2.0, also=(Setting(w, 0.5, operation="set"),))
    other = Setting(w, 0.5, operation="set", also=(Setting(v, 2.0),))
    third = Setting(w, operation="project_out", also=(Setting(v, 2.0),))
    batch = llava.prepare(images[:3], ["what colour is the ring ?"] * 3)
    last = llava.run_with_cache(batch, HOOKS[0])[1][HOOKS[0]][:, -1].double()
    with llava.hooks(side_by_side([other, both, third])):
        found = llava.run_with_cache(batch, HOOKS[0])[1][HOOKS[0]][:, -1].double()
    for row, setting in enumerate([other, both, third]):
        expected = last[row]
        for part in setting.parts:
            expected = by_hand(part)(expected)
        assert torch.allclose(found[row], expected, atol=1e-4)


def test_settings_that_act_alike_are_one_intervention() -> None:
    """Eight alphas of two vectors at a point take one, another point or rule takes another."""
    alike = [Setting(vector(number % 2), alpha) for number, alpha in enumerate(range(8))]
    assert len(side_by_side(alike)) == 1
    assert len(side_by_side([*alike, Setting(vector(0), 1.0, "all"), Setting(vector(0, HOOKS[1]))])) == 3
    assert side_by_side([Setting(), Setting()]) == []


def test_a_gate_opens_for_its_own_rows_only(llava: HookedMM, images: list[Any]) -> None:
    """Rows of one batch with a gate that is open, one that is shut, and none."""
    direction = torch.eye(128)[0]
    batch = llava.prepare(images[:4], ["what place is this ?"] * 4)
    _, cache = llava.run_with_cache(batch, HOOKS[0])
    along = cache[HOOKS[0]][:, -1, 0]
    opened, shut = (
        Gate(Above(direction, float(along.mean()) + off, HOOKS[0], "mean", LAST_PROMPT), name)
        for off, name in ((-100.0, "open"), (100.0, "shut"))
    )
    settings = [
        Setting(vector(0, HOOKS[1]), 2.0, gate=opened),
        Setting(vector(0, HOOKS[1]), 2.0, gate=shut),
        Setting(vector(0, HOOKS[1]), 2.0),
        Setting(),
    ]
    plain = llava.run_with_hooks(batch)
    steered = llava.run_with_hooks(batch, side_by_side(settings))
    assert plain is not None
    assert steered is not None
    moved = [not torch.equal(one, other) for one, other in zip(plain, steered, strict=True)]
    assert moved == [True, False, True, False]


def test_rules_of_positions_are_joined_by_plus() -> None:
    """Each word means what it means alone."""
    assert positions("image") == Positions(modality="image")
    assert positions(ANSWERING) == Positions(last_prompt=True) | Positions(generated=True)
    assert positions("from 3") == Positions(start=3)
    assert positions("from -2") == Positions(start=-2)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"operation": "ad"}, "ad.*add"),
        ({"at": "last"}, "last"),
        ({"operation": "project_out", "alpha": 2.0}, "no amount"),
        ({"operation": "rotate"}, "turn away"),
        ({"second": vector(1)}, "nothing else takes one"),
        ({"operation": "rotate", "second": vector(1, HOOKS[1])}, "no plane"),
    ],
)
def test_what_can_not_be_is_refused(options: dict[str, Any], match: str) -> None:
    """With what was wrong and what to do."""
    with pytest.raises(BadInputError, match=match):
        Setting(vector(0), **options)


def test_settings_tell_themselves_apart() -> None:
    """Other numbers of the same name are another setting; every operation has its row in the table."""
    one = SteeringVector([1.0, 2.0], "a", name="v")
    # Of the same length and sum.
    other = SteeringVector([2.0, 1.0], "a", name="v")
    assert Setting(one).fingerprint() != Setting(other).fingerprint()
    assert Setting(one).fingerprint() == Setting(SteeringVector([1.0, 2.0], "a", name="v")).fingerprint()
    described = Setting(one, 2.0, also=(Setting(other),)).describe()
    assert described["vector"] == "v + v"
    assert described["alpha"] == 2.0
    assert Setting().describe()["kind"] == "none"
    import steering.setting

    assert all(f"`{name}`" in (steering.setting.__doc__ or "") for name in OPERATIONS)
