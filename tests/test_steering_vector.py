"""Steering vectors come back as they were saved, do what `Add` does, and refuse models they do not belong to."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open

import hooked_mm
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.interventions import Add
from hooked_mm.selectors import TokenOfInterest
from hooked_mm.steering_vector import SteeringVector, load_vectors, save_vectors

HOOK = "blocks.3.hook_resid_post"
FULL = SteeringVector(
    torch.linspace(-1, 2, 128),
    HOOK,
    "shift",
    'the "sea" über alles',
    positions=TokenOfInterest(("sea", "snow")).describe(),
    model="llava-hf/llava",
    revision="abc",
    adapter="place",
    made_from={"samples": 20, "stores": ("a", "b"), "consistency": 0.25, "median": None},
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def assert_same(one: SteeringVector, other: SteeringVector) -> None:
    """Every field, values bit for bit."""
    assert torch.equal(one.values, other.values)
    for name in (f.name for f in fields(one) if f.name != "values"):
        assert getattr(one, name) == getattr(other, name), name


def test_round_trip(tmp_path: Path) -> None:
    """One vector with all it knows; tuples have become the lists that JSON has already before it is saved."""
    assert FULL.save(tmp_path / "deep" / "v") == tmp_path / "deep" / "v"
    loaded = SteeringVector.load(str(tmp_path / "deep" / "v"))
    assert_same(loaded, FULL)
    assert loaded.positions["words"] == ["sea", "snow"]
    assert (loaded.layer, loaded.values.dtype, loaded.made_from["median"]) == (3, torch.float32, None)
    assert loaded.norm == pytest.approx(float(np.linalg.norm(FULL.values.double().numpy())), rel=1e-6)


@given(
    widths=st.lists(st.integers(1, 5), max_size=4),
    seed=st.integers(0, 99),
    scale=st.sampled_from([0.0, 1e-20, 1.0, 1e30]),
    told=st.dictionaries(st.text(), JSON, max_size=3),
    text=st.text(),
)
def test_round_trip_of_many(
    tmp_path_factory: pytest.TempPathFactory, widths: list[int], seed: int, scale: float, told: dict, text: str
) -> None:
    """Any number, of any widths and scales, zero too, with any story, in order."""
    rng = np.random.default_rng(seed)
    made = [
        SteeringVector(rng.standard_normal(d) * scale, f"blocks.{n}.hook_q", text, text, told, made_from=told)
        for n, d in enumerate(widths)
    ]
    folder = save_vectors(made, tmp_path_factory.mktemp("vectors"))
    loaded = load_vectors(folder)
    assert len(loaded) == len(made)
    for one, other in zip(loaded, made, strict=True):
        assert_same(one, other)


def test_files_are_safetensors_and_json(tmp_path: Path) -> None:
    """Two files that other programs read; saving again leaves nothing of what was there; one is not many."""
    save_vectors([FULL, replace(FULL, name="other")], tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["steering_vectors.json", "steering_vectors.safetensors"]
    with pytest.raises(BadInputError, match=r"holds 2 steering vectors, not one; use load_vectors"):
        SteeringVector.load(tmp_path)
    FULL.save(tmp_path)
    with safe_open(tmp_path / "steering_vectors.safetensors", "np") as file:
        assert list(file.keys()) == ["0"]
        np.testing.assert_array_equal(file.get_tensor("0"), FULL.values.numpy())
    assert json.loads((tmp_path / "steering_vectors.json").read_text())["vectors"][0]["hook"] == HOOK


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: {**content, "format": 2}, "has format 2, this version reads 1"),
        (lambda content: {**content, "vectors": None}, "has format 1, this version reads 1"),
        (lambda content: {**content, "vectors": [{"hook": "a"}, {"hook": "b"}]}, "holds no steering vectors as we"),
        (lambda content: {**content, "vectors": [{"hook": "a", "eval": "b"}]}, "holds no steering vectors as we"),
        (lambda content: {**content, "sha256": "0"}, "by half"),
    ],
)
def test_other_formats_are_refused(change: Callable[[dict], dict], message: str, tmp_path: Path) -> None:
    """Another format, another number of tensors, unknown fields, another file of tensors."""
    file = FULL.save(tmp_path) / "steering_vectors.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(BadInputError, match=message):
        load_vectors(tmp_path)


def test_pickles_are_refused_with_the_way_out(tmp_path: Path) -> None:
    """As XL-VLMs saves its shift vectors."""
    (tmp_path / "shift_vectors.pth").write_bytes(b"anything")
    with pytest.raises(BadInputError, match=r"'shift_vectors.pth' is a pickle of PyTorch, .*make SteeringVector\("):
        load_vectors(tmp_path)


@pytest.mark.parametrize(
    ("hook", "layer"),
    [(HOOK, 3), ("blocks.11.attn.hook_z", 11), ("vision.blocks.0.hook_mlp_out", 0), ("hook_embed", None)],
)
def test_the_layer_is_the_hooks(hook: str, layer: int | None) -> None:
    """Of the language model or a tower; none outside blocks."""
    assert SteeringVector([1.0], hook).layer == layer


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_values_are_float32_of_their_own(dtype: torch.dtype) -> None:
    """Whatever a store holds; what is done to the source later changes nothing, and the vector is frozen."""
    source = torch.tensor([1.5, -2.0], dtype=dtype, requires_grad=True)
    vector = SteeringVector(source, HOOK)
    with torch.no_grad():
        source += 1
    assert (vector.values.dtype, vector.values.tolist(), vector.values.requires_grad) == (
        torch.float32,
        [1.5, -2],
        False,
    )
    with pytest.raises(FrozenInstanceError):
        vector.hook = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"values": [[1.0]]}, "values must be real numbers in 1 dimensions"),
        ({"values": [float("nan")]}, "values holds NaN"),
        ({"values": torch.tensor([1e300], dtype=torch.float64)}, "values in float32 holds NaN or infinite"),
        ({"values": []}, "values must be real numbers"),
        ({"hook": ""}, "give its name"),
        ({"made_from": {"k": float("nan")}}, "made_from of a steering vector must be what JSON can hold"),
        ({"positions": object()}, "positions of a steering vector must be what JSON can hold"),
        ({"made_from": {"k": torch.ones(1)}}, "Tensor is not JSON serializable; use text"),
    ],
)
def test_what_is_no_vector_is_refused(settings: dict[str, Any], message: str) -> None:
    """When it is made, not when somebody loads it."""
    with pytest.raises(BadInputError, match=message):
        SteeringVector(**{"values": [1.0], "hook": HOOK, **settings})


def test_it_does_what_add_does(llava: HookedMM, images: list[Image.Image]) -> None:
    """Generated answers and logits are those with `Add` of alpha v, written by hand; without it they are others."""
    batch = llava.prepare(images[:2], "what place is this ?", answers=["sea", "snow"])
    values = torch.randn(128, generator=torch.Generator().manual_seed(0))
    vector = SteeringVector(values, HOOK, model="somewhere/else/llava")
    given = vector.intervention(alpha=3.0, at="answer", model=llava)
    with_it = llava.run_with_hooks(batch, [given])
    assert with_it is not None
    assert (given.alpha, vector.intervention().at) == (3.0, Add(HOOK, values, at="generated").at)

    def by_hand(value: torch.Tensor, hook: Any) -> torch.Tensor:
        return value + 3.0 * values * batch.mask(role="answer")[:, :, None]

    expected, without = llava.run_with_hooks(batch, [(HOOK, by_hand)]), llava.run_with_hooks(batch)
    assert expected is not None
    assert without is not None
    assert torch.allclose(with_it, expected, atol=1e-4)
    assert (with_it - without).abs().max() > 0.1


def test_another_model_is_refused(llava: HookedMM, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, revision, missing hook or width; each error names both and the way out; `force` does not look."""
    mine = SteeringVector(torch.ones(128), HOOK, "shift", "sea", model="small:llava")
    mine.check_model(llava)
    replace(mine, model=None).check_model(llava)
    replace(mine, adapter="place").check_model(llava)
    # The shipped model has no revision, so there is nothing to compare.
    replace(mine, revision="abc").check_model(llava)
    monkeypatch.setattr(llava.hf_model.config, "_commit_hash", "123", raising=False)
    replace(mine, revision="123").check_model(llava)
    wrong = {
        r"vector 'sea' is one of the model 'x/idefics2', this is '.*/llava'; .*force=True": {"model": "x/idefics2"},
        r"is one of 'small:llava' \(revision 'abc'\), this is revision '123'; .*force=True": {"revision": "abc"},
        r"belongs at 'blocks.9.hook_resid_post', which '.*llava' has not; nearest: .*": {
            "hook": "blocks.9.hook_resid_post"
        },
        r"'small:llava' has length 64, the vectors at .* of '.*llava' have 128": {"values": torch.ones(64)},
    }
    for message, change in wrong.items():
        other = replace(mine, **change)
        for refused in (lambda v: v.check_model(llava), lambda v: v.intervention(model=llava)):
            with pytest.raises(BadInputError, match=message):
                refused(other)
        assert isinstance(other.intervention(model=llava, force=True), Add)
        assert isinstance(other.intervention(), Add)
    # Neurons are more than the stream is wide.
    SteeringVector(torch.ones(256), "blocks.3.mlp.hook_post", model="llava").check_model(llava)


def test_a_vector_of_norm_0_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The shift between identical models: saved, loaded and used like any other, but not in silence."""
    zero = SteeringVector.load(SteeringVector(torch.zeros(4), HOOK, "shift", "sea").save(tmp_path))
    assert zero.norm == 0
    assert repr(zero) == f"SteeringVector('{HOOK}', shift 'sea', <4 of norm 0, which changes nothing>)"
    with caplog.at_level(logging.WARNING):
        zero.intervention()
    assert "'sea', <4 of norm 0, which changes nothing>) is added" in caplog.text
    assert "nothing" not in repr(FULL)


def test_it_is_offered_by_the_package() -> None:
    """As the other names are; and it prints in a line."""
    assert hooked_mm.SteeringVector is SteeringVector
    assert repr(replace(FULL, name="sea")) == (
        f"SteeringVector('{HOOK}', shift 'sea', <128 of norm {FULL.norm:.4g}>, of 'llava-hf/llava' "
        "(revision 'abc', adapter 'place'))"
    )
