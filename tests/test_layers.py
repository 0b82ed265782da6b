"""The residual stream of a store: which hook is which layer, rows of a modality, a share for every process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from analyses.layers import Layers, layer_hooks
from hooked_mm.errors import BadInputError, UnknownHookError
from hooked_mm.hooked import HookedMM
from hooked_mm.store import ActivationStore
from tests.layered import layered_store

VALUES = {layer: torch.arange(24.0).reshape(8, 3) + 100 * layer for layer in range(3)}
SAMPLES = [0, 0, 0, 1, 1, 2, 2, 2]
MODALITY = ["image", "text", "text", "image", "text", "image", "image", "text"]


@pytest.fixture
def layers(tmp_path: Path) -> Layers:
    """Three layers of eight rows."""
    words = [None if kind == "image" else f"w{place}" for place, kind in enumerate(MODALITY)]
    return Layers.of_store(layered_store(tmp_path / "store", VALUES, SAMPLES, MODALITY, words))


def test_what_is_which_layer() -> None:
    """The last block's output is the last layer; the stream before block 0 wins over the bare embedding."""
    names = ["hook_embed", "blocks.0.hook_resid_pre", "blocks.0.hook_resid_post", "blocks.10.hook_resid_post"]
    assert layer_hooks(names) == {0: names[1], 1: names[2], 11: names[3]}
    assert layer_hooks(names[:1] + names[2:]) == {0: names[0], 1: names[2], 11: names[3]}
    assert layer_hooks(["blocks.3.hook_resid_pre", "blocks.2.hook_resid_post"]) == {3: "blocks.2.hook_resid_post"}
    assert layer_hooks(["blocks.3.hook_attn_out", names[2]], "hook_attn_out") == {3: "blocks.3.hook_attn_out"}
    with pytest.raises(UnknownHookError, match=r"none of \['vision.blocks.0.hook_resid_post'\] is a layer"):
        layer_hooks(["vision.blocks.0.hook_resid_post"])


def test_the_last_layer_is_neither_dropped_nor_normed(llava: HookedMM) -> None:
    """Pairs reach what leaves the last block; the final norm's output is no layer, though it be stored."""
    hooks = layer_hooks([*llava.hook_names])
    assert list(hooks) == list(range(llava.cfg.n_layers + 1))
    assert hooks[llava.cfg.n_layers] == f"blocks.{llava.cfg.n_layers - 1}.hook_resid_post"
    assert Layers(None, hooks).pairs[-1] == (llava.cfg.n_layers - 1, llava.cfg.n_layers)  # type: ignore[arg-type]


def test_rows_of_a_modality(layers: Layers) -> None:
    """With their samples, positions and tokens; one that has no rows is refused by name."""
    image = layers.of("image")
    kept = [place for place, kind in enumerate(MODALITY) if kind == "image"]
    assert len(image) == 4
    assert torch.equal(image.values(2), VALUES[2][kept])
    assert image.samples.tolist() == [0, 1, 2, 2]
    assert image.positions.tolist() == [0, 0, 0, 1]
    assert image.words == [None] * 4
    assert layers.of("text").words == ["w1", "w2", "w4", "w7"]
    assert layers.of("all") is layers
    with pytest.raises(BadInputError, match="no rows of modality 'video'; it has image, text"):
        layers.of("video")


def test_layers_that_are_missing_are_told(layers: Layers) -> None:
    """Two that are far apart are no pair; one that there is not is refused with those there are."""
    assert layers.pairs == [(0, 1), (1, 2)]
    with pytest.raises(BadInputError, match=r"there is no layer 5; there are \[0, 1, 2\]"):
        layers.values(5)
    apart = Layers.of_store(layers.store, layers=[0, 2])
    with pytest.raises(BadInputError, match="between 0 and 2 layers are missing"):
        _ = apart.pairs
    with pytest.raises(BadInputError, match="there is one layer only"):
        _ = Layers.of_store(layers.store, layers=[1]).pairs
    with pytest.raises(BadInputError, match="holds no layer 7"):
        Layers.of_store(layers.store, layers=[1, 7])


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_processes_share_the_rows(layers: Layers, count: int) -> None:
    """Every row in exactly one of them, whatever the size of a batch."""
    for size in (1, 3, 100):
        seen: list[int] = []
        for rank in range(count):
            share: Any = SimpleNamespace(rank=rank, size=count)
            for rows, values in layers.batches([0, 2], size, share):
                assert len(rows) <= size
                assert torch.equal(values[0], VALUES[0][rows])
                assert torch.equal(values[2], VALUES[2][rows])
                seen += rows.tolist()
        assert sorted(seen) == list(range(8))


def test_means_over_positions_have_no_position(tmp_path: Path) -> None:
    """It is said how to have rows with one."""
    row = {"sample": "a", "position": None, "modality": "text", "role": None, "word": None, "selector": "MeanOver"}
    store = ActivationStore.from_arrays(
        tmp_path, {"blocks.0.hook_resid_post": np.zeros((1, 2), np.float32)}, [row], [{"sample": "a"}], {}
    )
    with pytest.raises(BadInputError, match="extract with the selector EachOf"):
        _ = Layers.of_store(store).positions
