"""The table of hook points: consistent in itself, and in the order in which a model comes by."""

from __future__ import annotations

from typing import get_args

import pytest

from hooked_mm.hook_rows import BLOCK_ROWS, as_run
from hooked_mm.structure import Wiring


def test_every_wiring_has_its_rows() -> None:
    """No wiring without a list, no list without a wiring."""
    assert set(BLOCK_ROWS) == set(get_args(Wiring))


@pytest.mark.parametrize("wiring", BLOCK_ROWS)
def test_no_name_twice_and_the_stream_at_both_ends(wiring: str) -> None:
    """A block begins with the stream that enters and ends with the one that leaves; every row says what it is."""
    names = [row.name for row in BLOCK_ROWS[wiring]]
    assert len(names) == len(set(names))
    assert (names[0], names[-1]) == ("hook_resid_pre", "hook_resid_post")
    assert all(row.meaning for row in BLOCK_ROWS[wiring])


@pytest.mark.parametrize("wiring", ["opaque", "streams", "gated"])
def test_where_nothing_is_added_alone_no_point_says_what_is_added(wiring: str) -> None:
    """Attention and MLP can be read inside; what they add to the stream can't."""
    assert not {"hook_attn_out", "hook_mlp_out", "hook_mixer_out"} & {row.name for row in BLOCK_ROWS[wiring]}
    assert {"attn.hook_q", "mlp.hook_post"} <= {row.name for row in BLOCK_ROWS[wiring]}


def test_queries_keys_and_values_in_the_order_of_their_calls() -> None:
    """The three change places among themselves; all else stays where it is."""
    rows = BLOCK_ROWS["pre"]
    usual = [row.name for row in rows]
    assert [row.name for row in as_run(rows, {})] == usual
    turned = [row.name for row in as_run(rows, {"q": 30, "k": 10, "v": 20})]
    places = [usual.index(f"attn.hook_{letter}") for letter in "qkv"]
    assert [turned[place] for place in places] == ["attn.hook_k", "attn.hook_v", "attn.hook_q"]
    assert [name for i, name in enumerate(turned) if i not in places] == [
        name for i, name in enumerate(usual) if i not in places
    ]
