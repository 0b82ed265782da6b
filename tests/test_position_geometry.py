"""A conversation's rows and their measures, by hand and on planted rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from analyses.position_geometry import MEANS, MEASURES, PositionRows, measured, position_rows, why_not
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM


def made(values: Tensor, images: int) -> PositionRows:
    """Rows, the first of them of images."""
    count = values.shape[1]
    return PositionRows(tuple(range(len(values))), values, torch.arange(count), torch.arange(count) < images)


@pytest.fixture
def drawn() -> PositionRows:
    """Three layers of 60 image and 50 text positions in 6 dimensions, off the origin."""
    made_by = torch.Generator().manual_seed(0)
    return made(torch.randn(3, 110, 6, generator=made_by, dtype=torch.float64) + 2, 60)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "molmo"])
def test_rows_are_transformers_hidden_states(
    small: Callable[[str], HookedMM], images: list[Image.Image], name: str
) -> None:
    """In front of the first block and behind each but the last, whose hidden state transformers gives normed."""
    model = small(name)
    batch = model.prepare(images[0], "what colour is the star ?")
    rows = position_rows(model, batch)
    with torch.no_grad():
        states = model.hf_model(**batch.inputs, output_hidden_states=True).hidden_states
    assert rows.layers == tuple(range(model.cfg.n_layers + 1))
    torch.testing.assert_close(rows.values[:-1], torch.stack(states[:-1])[:, 0], atol=1e-4, rtol=1e-4)
    assert torch.equal(rows.image, batch.mask(modality="image")[0])


def test_padding_is_no_position(llava: HookedMM, images: list[Image.Image]) -> None:
    """Beside a longer one a sample has the rows that it has alone."""
    texts = ["what colour is the star ?", "what colour is the star at the top left ?"]
    both = llava.prepare(images[:2], texts)
    alone = llava.prepare(images[0], texts[0])
    beside = position_rows(llava, both)
    assert len(beside.position) == int(alone.modality.shape[1])
    torch.testing.assert_close(beside.values, position_rows(llava, alone).values, atol=1e-4, rtol=1e-4)
    few = position_rows(llava, alone, most=5)
    assert int(few.image.sum()) == 5
    assert few.left_out == (59, int((~beside.image).sum()) - 5)
    every = alone.mask(modality="image")[0].nonzero()[:, 0].tolist()
    assert few.position[few.image].tolist()[::4] == [every[0], every[-1]]


def test_measures_by_hand(drawn: PositionRows) -> None:
    """Norm, cosines of pairs, singular values, the cosine of the two means."""
    for name, mask in (("image", drawn.image), ("text", ~drawn.image), ("all", drawn.image | True)):
        own = drawn.values[1, mask].numpy()
        units = own / np.linalg.norm(own, axis=1, keepdims=True)
        cosines = (units @ units.T)[~np.eye(len(own), dtype=bool)]
        spectrum = np.linalg.svd(own - own.mean(0), compute_uv=False) ** 2
        assert float(measured(drawn, "norm")[name][1]) == pytest.approx(np.linalg.norm(own, axis=1).mean())
        assert float(measured(drawn, "mean_cosine")[name][1]) == pytest.approx(cosines.mean())
        assert float(measured(drawn, "anisotropy")[name][1]) == pytest.approx(spectrum[0] / spectrum.sum())
    image, text = (drawn.values[2, mask].numpy().mean(0) for mask in (drawn.image, ~drawn.image))
    expected = image @ text / np.linalg.norm(image) / np.linalg.norm(text)
    assert float(measured(drawn, MEANS)["image and text"][2]) == pytest.approx(expected)


def test_a_linear_step_is_told_from_noise(drawn: PositionRows) -> None:
    """Held out and adjusted; the last layer has no step."""
    turned = drawn.values[0] @ torch.linalg.qr(drawn.values[0, :6])[0] + 1
    rows = made(torch.stack([drawn.values[0], turned, drawn.values[2]]), 60)
    for name in ("linearity", "adjusted"):
        for values in measured(rows, name).values():
            assert float(values[0]) == pytest.approx(1, abs=1e-6)
            assert abs(float(values[1])) < 0.5
            assert bool(values[2].isnan())


def test_a_plane_has_two_dimensions() -> None:
    """Whatever space it lies in."""
    plane = torch.randn(1, 800, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(9, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64))[0]
    found = measured(made(plane @ turn[:2], 400), "dimension")
    assert all(float(values[0]) == pytest.approx(2, abs=0.35) for values in found.values())


def test_too_few_rows_give_no_number_and_are_told(drawn: PositionRows) -> None:
    """Each measure has its least; more dimensions than positions leave no adjusted score."""
    few = drawn.take(torch.arange(110) < 61)
    for name, measure in MEASURES.items():
        values, told = measured(few, name)["text"], " ".join(why_not(few, name))
        assert bool(values.isnan().all()) == (measure.least > 1)
        assert (f"needs {measure.least} positions; there are 1 of text" in told) == (measure.least > 1)
    wide = made(torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(3)), 20)
    assert bool(measured(wide, "adjusted")["all"].isnan().all())
    assert "20 positions of image for 64 dimensions" in " ".join(why_not(wide, "adjusted"))
    widest = made(torch.zeros(2, 40, 2000), 20)
    assert bool(measured(widest, "linearity")["all"].isnan().all())
    assert "width of 2000" in why_not(widest, "linearity")[0]
    assert "no image positions" in why_not(drawn.of("text"), MEANS)[0]
    assert bool(measured(drawn.of("text"), MEANS)["image and text"].isnan().all())


def test_rows_that_are_all_alike_have_no_direction() -> None:
    """No number, and no error: one token many times is no fault."""
    rows = made(torch.ones(2, 60, 4), 30)
    assert bool(measured(rows, "anisotropy")["all"].isnan().all())
    assert float(measured(rows, "mean_cosine")["all"][0]) == pytest.approx(1)


def test_massive_positions_are_left_out_if_asked(drawn: PositionRows) -> None:
    """One position of a hundred times the norm at one layer."""
    values = drawn.values.clone()
    values[1, 7] *= 100
    rows = made(values, 60)
    assert (rows.massive() > 10).nonzero()[:, 0].tolist() == [7]
    assert rows.ordinary().position.tolist() == [n for n in range(110) if n != 7]


def test_measures_and_layers_that_there_are_not(drawn: PositionRows) -> None:
    """Refused; who is told may end it."""
    with pytest.raises(BadInputError, match="curl"):
        measured(drawn, "curl")
    with pytest.raises(BadInputError, match="layer '3'"):
        drawn.at(3)
    with pytest.raises(BadInputError, match="audio"):
        drawn.of("audio")
    steps: list[tuple[int, int]] = []
    measured(drawn, "norm", lambda _, done, total: steps.append((done, total)))
    assert steps == [(0, 3), (1, 3), (2, 3)]
