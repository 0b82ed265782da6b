"""Where a concept is: planted directions by hand, gradients by finite differences, probes against masks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import rankdata

from concept_dict.where import WhereMap, best_way, has_grid, patch_activations, patch_gradients, where_map
from hooked_mm.errors import BadInputError, UnknownHookError
from hooked_mm.frames import frame
from hooked_mm.hooked import HookedMM
from hooked_mm.layout import ImageLayout
from hooked_mm.scenes.dataset import SceneDataset, picture
from hooked_mm.scenes.draw import render
from hooked_mm.scenes.world import COLOURS, Scene
from hooked_mm.small import SMALL_MODELS
from tests.planted import planted

HOOK = "blocks.2.hook_resid_post"
# Where a model has patches with places: at the text's own positions, or only in the tower.
PLACED = {"llava": HOOK, "qwen2_vl": HOOK, "molmo": HOOK, "idefics2": "vision.blocks.3.hook_resid_post"}
PROMPT = "describe the picture ."


@pytest.fixture(scope="module")
def models() -> dict[str, HookedMM]:
    """The small models."""
    return {name: HookedMM.small(name, check=False) for name in SMALL_MODELS}


def _masks(item: Scene, colour: str) -> np.ndarray:
    """Which pixels show an object of the colour."""
    covers = [cover for thing, cover in zip(item.objects, render(item)[1], strict=True) if thing.colour == colour]
    return np.max([*covers, np.zeros((item.height, item.width))], axis=0) > 0.5


@pytest.mark.parametrize("name", list(SMALL_MODELS))
def test_a_planted_direction_lights_up_the_patches_it_was_put_into(name: str, models: dict[str, HookedMM]) -> None:
    """Oblong and square pictures in one batch: what is added to some patches is found there, in its size, and nowhere
    else.
    """
    model, hook = models[name], PLACED[name]
    images = [Image.new("RGB", size, "grey") for size in ((72, 48), (56, 56), (48, 72))]
    batch = model.prepare(images, PROMPT)
    with torch.no_grad():
        _, cache = model.run_with_cache(batch, [hook])
    value = cache[hook].clone()
    direction = torch.nn.functional.normalize(
        torch.randn(value.shape[-1], generator=torch.Generator().manual_seed(0)), dim=0
    )
    # Nothing of the direction anywhere, but 3 at one cell of each picture.
    value -= (value @ direction)[..., None] * direction
    cells = [(1, 2), (0, 0), (4, 3)]
    layout = batch.layout
    for sample, (row, column) in enumerate(cells):
        grid = layout.images[sample].grid if name != "idefics2" else layout.images[sample].patches
        assert grid is not None
        if name == "idefics2":
            at = grid[row, column]
            value[at[0], at[1]] += 3 * direction
        else:
            value[sample, grid[row, column]] += 3 * direction
    cache._values[hook] = value
    for sample, (row, column) in enumerate(cells):
        (found,) = patch_activations(planted(direction[None].numpy()), cache, hook, sample)
        expected = torch.zeros(found.shape[:2])
        expected[row, column] = 3
        torch.testing.assert_close(found[..., 0], expected, atol=1e-4, rtol=1e-4)
        # On the picture the cell lies at its share of what the grid covers.
        area = where_map(model, images[sample], found[..., 0])
        left, top, right, bottom = area.box
        middle = (
            int(top + (row + 0.5) * (bottom - top) / found.shape[0]),
            int(left + (column + 0.5) * (right - left) / found.shape[1]),
        )
        pixels = area.pixels()
        assert pixels.shape == images[sample].size[::-1]
        if 0 <= middle[0] < pixels.shape[0] and 0 <= middle[1] < pixels.shape[1]:
            assert pixels[middle] == pytest.approx(3, abs=1e-3)


def test_pixels_by_hand() -> None:
    """A square box around an oblong picture: its two upper rows are half outside; what no patch covers is NaN."""
    values = np.array([[1, 2], [3, 4]], np.float32)
    area = WhereMap(values, (0, -2, 8, 6), (8, 4))
    assert (area.pixels() == np.repeat(np.repeat(values, 4, 1), 2, 0)).all()
    part = WhereMap(values, (2, 0, 6, 4), (8, 4)).pixels()
    assert np.isnan(part[:, [0, 1, 6, 7]]).all()
    assert (part[:, 2:6] == np.repeat(np.repeat(values, 2, 1), 2, 0)).all()
    assert area.draw(Image.new("RGB", (8, 4)), side=80).size == (80, 40)


def test_transform_of_every_patch_is_the_dictionarys(llava: HookedMM) -> None:
    """The map of every concept at every patch is what `transform` gives for that patch's vector."""
    batch = llava.prepare([Image.new("RGB", (64, 48), "red")], PROMPT)
    _, cache = llava.run_with_cache(batch, [HOOK])
    fitted = planted(np.random.default_rng(0).standard_normal((5, 128)), mean=np.linspace(-1, 1, 128))
    (found,) = patch_activations(fitted, cache, HOOK, 0)
    rows = cache.select(HOOK, modality="image").values
    torch.testing.assert_close(found.flatten(0, 1), fitted.transform(rows).to(found))
    assert found.shape == (8, 8, 5)


def test_half_precision_is_widened(llava: HookedMM) -> None:
    """Float32 arithmetic whatever the cache holds."""
    batch = llava.prepare([Image.new("RGB", (64, 64), "red")], PROMPT)
    _, cache = llava.run_with_cache(batch, [HOOK])
    fitted = planted(np.eye(128)[:2])
    (found,) = patch_activations(fitted, cache.to("cpu", torch.bfloat16), HOOK, 0)
    assert found.dtype == torch.float32


def _auroc(values: np.ndarray, truth: np.ndarray) -> float:
    known = np.isfinite(values)
    values, truth = values[known], truth[known]
    positive = truth.sum()
    ranks = rankdata(values)
    return float((ranks[truth].sum() - positive * (positive + 1) / 2) / (positive * (len(truth) - positive)))


@pytest.mark.parametrize("name", list(SMALL_MODELS))
def test_a_colours_probe_lies_on_objects_of_the_colour(name: str, models: dict[str, HookedMM]) -> None:
    """A direction per colour, patches inside such objects minus others, on some scenes; on other scenes its map is
    higher inside the objects of the colour than outside, by the masks that the pictures were drawn with.
    """
    model, hook = models[name], PLACED[name]
    data = SceneDataset(56, split="validation", seed=3)
    scenes = [data.scene(index) for index in range(len(data))]
    colours = list(COLOURS)
    with torch.no_grad():
        batch = model.prepare([picture(item) for item in scenes], PROMPT)
        _, cache = model.run_with_cache(batch, [hook])
    sums, counts = torch.zeros(2, len(colours), cache[hook].shape[-1]), torch.zeros(2, len(colours))
    for number, item in enumerate(scenes[:40]):
        (grid,) = cache.grid(hook, number)
        for k, colour in enumerate(colours):
            inside = _cells(model, item, _masks(item, colour), (grid.shape[0], grid.shape[1]))
            for end, chosen in enumerate((inside > 0.6, inside < 0.1)):
                sums[end, k] += grid[torch.from_numpy(chosen)].sum(0)
                counts[end, k] += int(chosen.sum())
    means = sums / counts[..., None]
    probe = planted((means[0] - means[1]).numpy(), signed=True)
    scored = []
    for number, item in enumerate(scenes[40:], start=40):
        (found,) = patch_activations(probe, cache, hook, number)
        for k, colour in enumerate(colours):
            truth = _masks(item, colour)
            if truth.any():
                values = where_map(model, picture(item), found[..., k]).pixels()
                assert np.isfinite(values).mean() > 0.8
                scored.append((_auroc(values, truth), np.nanmean(values[truth]) - np.nanmean(values[~truth])))
    aurocs, gaps = np.array(scored).T
    assert len(scored) > 20
    assert aurocs.mean() > 0.9
    assert (gaps > 0).mean() > 0.9


def _cells(model: HookedMM, item: Scene, mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The share of each cell's pixels that a mask covers, by numbering the cells on the picture."""
    numbers = np.arange(shape[0] * shape[1], dtype=np.float32).reshape(shape)
    image = picture(item)
    cell = WhereMap(numbers, frame(model, image, shape), image.size).pixels()
    known = np.isfinite(cell)
    index = cell[known].astype(int)
    count, covered = (np.bincount(index, weights, numbers.size) for weights in (None, mask[known].astype(float)))
    return (covered / np.maximum(count, 1)).reshape(shape)


@pytest.mark.parametrize("name", list(SMALL_MODELS))
def test_gradients_are_those_of_finite_differences(name: str, models: dict[str, HookedMM]) -> None:
    """Scaling one patch by 1 + e and 1 - e changes the activation by 2 e times its value in the map, up to the sign."""
    model, hook = models[name], "blocks.3.hook_resid_post"
    images = [picture(SceneDataset(3).scene(index)) for index in (0, 1)]
    batch = model.prepare(images, PROMPT)
    fitted = planted(np.random.default_rng(1).standard_normal((3, model.cfg.d_model)))
    maps = patch_gradients(fitted, model, batch, hook, [(0, [-1], 0), (1, [-1], 2), (1, [-2, -1], 2)])
    point = "projector.hook_in" if name == "idefics2" else "projector.hook_out"
    layout = batch.layout
    for (sample, positions, concept), (grid,) in zip([(0, [-1], 0), (1, [-1], 2), (1, [-2, -1], 2)], maps, strict=True):
        assert (grid >= 0).all()
        cells = layout.images[sample].patches if name == "idefics2" else layout.images[sample].tokens
        assert cells is not None
        row, column = (int(n) for n in np.unravel_index(int(grid.argmax()), grid.shape))
        place = tuple(cells[row, column].tolist())
        scores = []
        for factor in (1.01, 0.99):

            def scaled(value: torch.Tensor, hook: object, factor: float = factor, place: tuple = place) -> torch.Tensor:
                changed = value.clone()
                sheet = changed if changed.ndim == 3 else changed[None]
                sheet[place] *= factor
                return changed

            with torch.no_grad(), model.hooks([(point, scaled)]):
                _, cache = model.run_with_cache(batch, [hook])
            scores.append(float(cache[hook][sample, positions].mean(0) @ fitted.components_[concept]))
        assert abs(scores[0] - scores[1]) / 0.02 == pytest.approx(float(grid[row, column]), rel=0.05)


def test_gradients_leave_nothing_behind(llava: HookedMM) -> None:
    """Weights have no gradients afterwards, and the next run none either."""
    batch = llava.prepare([Image.new("RGB", (64, 64), "red")], PROMPT)
    patch_gradients(planted(np.eye(128)[:1]), llava, batch, HOOK, [(0, [-1], 0)])
    assert all(weight.grad is None for weight in llava.hf_model.parameters())
    _, cache = llava.run_with_cache(batch, [HOOK])
    assert not cache[HOOK].requires_grad


def test_what_has_no_place_is_refused(models: dict[str, HookedMM]) -> None:
    """Latent queries have no grid, and the reason is told; a hook that was not read, and maps of several concepts."""
    model = models["idefics2"]
    image = Image.new("RGB", (64, 48))
    batch = model.prepare([image], PROMPT)
    assert not has_grid(batch)
    assert has_grid(models["llava"].prepare([image], PROMPT))
    assert not has_grid(models["llava"].prepare(None, PROMPT))
    _, cache = model.run_with_cache(batch, [HOOK])
    fitted = planted(np.eye(128)[:1])
    with pytest.raises(BadInputError, match="latent queries"):
        patch_activations(fitted, cache, HOOK, 0)
    with pytest.raises(UnknownHookError, match="was not cached"):
        patch_activations(fitted, cache, "hook_embed", 0)
    with pytest.raises(BadInputError, match=r"shape \(2, 2, 3\): choose one"):
        where_map(model, image, torch.zeros(2, 2, 3))


def test_the_way_that_a_model_allows(models: dict[str, HookedMM]) -> None:
    """Positions for what is read at image positions with a place, else gradients; none without any patch's place."""
    image = Image.new("RGB", (64, 48))
    batches = {name: models[name].prepare([image], PROMPT) for name in models}
    assert {name: best_way(batch, True) for name, batch in batches.items()} == {
        "llava": "positions",
        "qwen2_vl": "positions",
        "molmo": "positions",
        "idefics2": "gradient",
    }
    assert {best_way(batch, False) for batch in batches.values()} == {"gradient"}
    assert best_way(models["llava"].prepare(None, PROMPT), True) == "none"
    layout = batches["llava"].layout
    nowhere = replace(layout, images=tuple(ImageLayout() for _ in layout.images))
    assert best_way(replace(batches["llava"], layout=nowhere), True) == "none"
