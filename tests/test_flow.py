"""What flows through a block tells what its parts are: blocks of every wiring, written out with names of no meaning."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hooked_mm.flow import Run, Wired, captured, wire
from tests.made_up import Glance, Ponder, Weigh

WIDTH = 24
Join = Callable[["Block", Tensor], Tensor]


class Block(nn.Module):
    """Parts a to f, joined by a function."""

    def __init__(self, join: Join, *, causal: bool = True) -> None:
        super().__init__()
        self.join = join
        # In no telling order.
        self.f, self.b = Weigh(WIDTH), Ponder(WIDTH)
        self.e, self.d, self.c = (Weigh(WIDTH) for _ in range(3))
        self.a = Glance(WIDTH, 3, causal=causal)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, **_: object) -> tuple[Tensor, None]:
        return self.join(self, x), None


def _pre(s: Block, x: Tensor) -> Tensor:
    m = x + s.drop(s.a(s.c(x)))
    return m + s.b(s.d(m))


def _sandwich(s: Block, x: Tensor) -> Tensor:
    m = x + s.e(s.a(s.c(x)))
    return m + s.f(s.b(s.d(m)))


def _parallel(s: Block, x: Tensor) -> Tensor:
    n = s.c(x)
    return x + s.b(n) + s.a(n)


def _after(s: Block, x: Tensor) -> Tensor:
    m = x + s.c(s.a(x))
    return m + s.d(s.b(m))


def _attention_alone(s: Block, x: Tensor) -> Tensor:
    return s.a(s.c(x)) + x


def _mlp_alone(s: Block, x: Tensor) -> Tensor:
    return s.b(s.c(x)) + x


def _in_place(s: Block, x: Tensor) -> Tensor:
    x = x.clone()
    x += s.a(s.c(x))
    x += s.b(s.d(x))
    return x


def _behind(s: Block, x: Tensor) -> Tensor:
    m = s.c(x + s.a(x))
    return s.d(m + s.b(m))


def _multiplied(s: Block, x: Tensor) -> Tensor:
    m = x + s.a(s.c(x))
    return m * s.b(s.d(m)).sigmoid()


def _halved(s: Block, x: Tensor) -> Tensor:
    m = x + 0.5 * s.a(s.c(x))
    return m + 0.5 * s.b(s.d(m))


ATTENTION = {"attn": "a", "q": "a.ask", "k": "a.offer", "v": "a.give", "o": "a.gather"}
MLP = {"mlp": "b", "mlp_gate": "b.open", "mlp_up": "b.widen", "mlp_down": "b.narrow"}
BOTH = {"block": "", **ATTENTION, **MLP}
EXPECTED: dict[str, tuple[Join, Wired | None]] = {
    "pre": (_pre, Wired({**BOTH, "ln1": "c", "ln2": "d"}, "pre")),
    "changed in place": (_in_place, Wired({**BOTH, "ln1": "c", "ln2": "d"}, "pre")),
    "norms on both sides": (
        _sandwich,
        Wired({**BOTH, "ln1": "c", "ln2": "d", "attn_after": "e", "mlp_after": "f"}, "pre"),
    ),
    "parallel": (_parallel, Wired({**BOTH, "ln1": "c"}, "parallel")),
    "norms behind only": (_after, Wired({**BOTH, "attn_after": "c", "mlp_after": "d"}, "after")),
    "attention alone": (_attention_alone, Wired({"block": "", **ATTENTION, "ln1": "c"}, "single")),
    "MLP alone": (_mlp_alone, Wired({"block": "", **MLP, "ln1": "c"}, "single")),
    "norms of the sums": (_behind, None),
    "a product": (_multiplied, None),
    "halves": (_halved, None),
}


def watched(block: nn.Module, positions: int = 6, seed: int = 0) -> Run:
    """A block with random weights and a random stream."""
    torch.manual_seed(seed)
    for parameter in block.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3 + (parameter.ndim == 1)
    return Run(block.eval().requires_grad_(False), (torch.randn(1, positions, WIDTH),), {})


@pytest.mark.parametrize("what", EXPECTED)
@given(causal=st.booleans(), seed=st.integers(0, 50), positions=st.integers(3, 9))
def test_parts_and_wiring(what: str, causal: bool, seed: int, positions: int) -> None:
    """Every part in its role, down to the projections, and nothing where the block is no sum of two parts."""
    join, expected = EXPECTED[what]
    assert wire(watched(Block(join, causal=causal), positions, seed), {}) == expected


def test_a_mixer_is_no_attention() -> None:
    """A part that mixes positions and has no heads stands in attention's place, without projections."""

    class Mixed(Block):
        class _Moved(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.shift = nn.Conv1d(WIDTH, WIDTH, 3, padding=2)

            def forward(self, x: Tensor) -> Tensor:
                return self.shift(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)

        def __init__(self) -> None:
            super().__init__(_pre)
            self.a = self._Moved()

    assert wire(watched(Mixed()), {}) == Wired({"block": "", **MLP, "mixer": "a", "ln1": "c", "ln2": "d"}, "pre")


def test_names_are_taken_for_what_lies_inside() -> None:
    """Known names of projections are kept where they lie in the module that flow finds, and dropped elsewhere."""
    named = {"q": "a.offer", "o": "a.gather", "mlp": "b", "mlp_gate": "b.widen", "mlp_down": "b.narrow"}
    found = wire(watched(Block(_pre)), named)
    assert found is not None
    assert {role: found.parts[role] for role in named} == named
    assert "k" not in found.parts
    assert wire(watched(Block(_pre)), {"q": "elsewhere.ask"}) == EXPECTED["pre"][1]


def test_a_block_that_fails_or_changes_its_width_says_nothing() -> None:
    """No exception leaves the probe; a stream of another shape is none."""

    def failing(s: Block, x: Tensor) -> Tensor:
        raise ValueError("no")

    assert wire(watched(Block(failing)), {}) is None
    assert wire(watched(Block(lambda s, x: torch.cat([x, s.a(x)], dim=-1))), {}) is None


def test_the_model_is_left_as_it_was() -> None:
    """No hook stays, no argument is changed, a run that fails behind the block still shows it."""
    block = Block(_in_place)
    stack = nn.Sequential(nn.Linear(WIDTH, WIDTH), block)
    x = torch.randn(1, 5, WIDTH)
    run = captured(block, lambda: stack(x) and 1 / 0)
    assert run is not None
    entering = run.args[0].clone()
    wire(run, {})
    assert torch.equal(run.args[0], entering)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in stack.modules())
    assert captured(block, lambda: 1 / 0) is None
