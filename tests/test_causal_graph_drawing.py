"""Pictures of graphs and of tokens: what is drawn where."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from analyses.causal_discovery import Learned
from analyses.causal_explanation import Explanation, Nodes
from analyses.causal_graph_drawing import LEVELS, graph_picture, layout_of, node_crops, token_pictures, token_values
from analyses.pag_orientation import Pag
from analyses.picture_maps import picture_maps
from analyses.possible_d_sep import pds_paths
from hooked_mm.hooked import HookedMM


def example(marks: dict[tuple[int, int], int]) -> Explanation:
    """Four nodes, of which 0 and 1 are image tokens and 3 is t."""
    array = np.zeros((4, 4), dtype=np.int8)
    for (a, b), mark in marks.items():
        array[a, b] = mark
    pag = Pag(array)
    nodes = Nodes((5, 9, 20, 30), (True, True, False, False), (0.1, 0.2, 0.3, 0.4))
    return Explanation(nodes, (0, 1, 2, 3), Learned(pag, {}, (6,), 0, True), pds_paths(pag, 3, 3))


# 0 o-> 1 <-> 3 <-- 2
CHAIN = {(0, 1): 2, (1, 0): 1, (1, 3): 2, (3, 1): 2, (2, 3): 2, (3, 2): 3}


def test_t_is_at_the_right_and_its_tree_left_of_it_by_depth_and_position() -> None:
    """Farther nodes farther left, earlier positions above; nodes that are not in the tree are not drawn."""
    places = layout_of(example(CHAIN))
    assert set(places) == {0, 1, 2, 3}
    assert max(places, key=lambda node: places[node][0]) == 3
    assert places[0][0] < min(places[1][0], places[2][0])
    assert places[1][1] > places[2][1]
    assert set(layout_of(example({(1, 3): 2, (3, 1): 2}))) == {1, 3}
    assert layout_of(example({})) == {3: (0.0, 0.0)}


def colours(image: Image.Image) -> set[tuple[int, int, int]]:
    """All that are in a picture."""
    return set(map(tuple, np.asarray(image).reshape(-1, 3).tolist()))


def test_marks_and_the_verified_subset_are_visible() -> None:
    """Each mark changes the picture at its end of the edge; the subset has a rim of its own colour."""
    labels = ["one", "two", "three", "four"]
    drawn = {mark: graph_picture(example({(1, 3): 2, (3, 1): mark}), labels) for mark in (1, 2, 3)}
    assert len({image.size for image in drawn.values()}) == 1
    pixels = {mark: np.asarray(image).astype(int) for mark, image in drawn.items()}
    for one, other in ((1, 2), (1, 3), (2, 3)):
        differ = np.abs(pixels[one] - pixels[other]).sum(2).nonzero()
        assert len(differ[0]) > 20
        # Only at the end of node 1, which stands at the left.
        assert differ[1].max() < drawn[1].width / 2
    # An arrowhead is the darkest, a bare end the lightest.
    dark = {mark: float((255 - own).sum()) for mark, own in pixels.items()}
    assert dark[2] > dark[3]
    rim = (0xC1, 0x12, 0x1F)
    plain, marked = (graph_picture(example(CHAIN), labels, subset) for subset in ((), (1,)))
    assert rim in colours(marked)
    assert rim not in colours(plain)


def test_labels_are_text_and_nothing_else() -> None:
    """Dollars and the like are not read as formulas, whatever a tokenizer has."""
    odd = ["$x^2", r"\frac{", "<b>", "\n"]
    assert graph_picture(example(CHAIN), odd).width > 100
    assert graph_picture(example({}), odd).width > 50


def test_token_values() -> None:
    """A node, one of the explanation, one of the verified subset, everything else clear."""
    told = example({(1, 3): 2, (3, 1): 2, (0, 1): 2, (1, 0): 1})
    values = token_values(told, 40, [1])
    assert values.nonzero()[:, 0].tolist() == [5, 9, 20, 30]
    assert float(values[9]) == pytest.approx(LEVELS["subset"])
    assert float(values[5]) == pytest.approx(LEVELS["explanation"])
    assert float(values[20]) == pytest.approx(LEVELS["node"])


def test_tokens_lie_where_their_patches_are(llava: HookedMM, images: list[Image.Image]) -> None:
    """The first image token at the top left, the last at the bottom right."""
    square = [images[0].resize((64, 64))]
    batch = llava.prepare(square, "star ?")
    own = batch.mask(modality="image")[0].nonzero()[:, 0]
    shown = []
    for place in (int(own[0]), int(own[-1])):
        values = torch.zeros(batch.modality.shape[1])
        values[place] = 1
        (picture,) = token_pictures(llava, batch, 0, values, square)
        shown.append(np.asarray(picture.convert("HSV"))[..., 1].astype(float))
    for one, (down, across) in zip(shown, ((0, 0), (1, 1)), strict=True):
        rows, cols = (one > 100).nonzero()
        assert len(rows)
        assert abs(rows.mean() / one.shape[0] - down) < 0.1
        assert abs(cols.mean() / one.shape[1] - across) < 0.1


@pytest.mark.parametrize(("name", "size"), [("llava", (64, 64)), ("qwen2_vl", (64, 48)), ("molmo", (72, 48))])
def test_nodes_show_their_own_patch(small: Callable[[str], HookedMM], name: str, size: tuple[int, int]) -> None:
    """In a picture with one bright pixel block, only the patches that hold it; text and latents have none."""
    model, image = small(name), Image.new("RGB", size, (0, 0, 0))
    box = (size[0] // 2 + 1, size[1] // 2 + 1, size[0] // 2 + 3, size[1] // 2 + 3)
    image.paste((255, 0, 0), box)
    batch = model.prepare(image, "what colour is the star ?")
    places = batch.mask(modality="image")[0].nonzero()[:, 0].tolist()
    places = [place for place in places if not bool(batch.separator[0, place])]
    last = batch.modality.shape[1] - 1
    nodes = Nodes((*places, last), (*[True] * len(places), False), (0.1,) * (len(places) + 1))
    crops = node_crops(model, batch, 0, nodes, [image], around=0)
    assert len(places) not in crops
    lit = {node for node, crop in crops.items() if np.asarray(crop)[..., 0].max() > 200}
    values = torch.zeros(last + 1)
    values[[places[node] for node in lit]] = 1.0
    for one in picture_maps(model, batch, 0, values, [image]):
        pixels = one.on_pixels(size, smooth=False)
        assert bool((pixels[box[1] : box[3], box[0] : box[2]] == 1).all())
        # Beside the patches that hold the block nothing is lit.
        assert float((pixels > 0).double().mean()) <= 4 / one.values.numel() * 2


def test_latents_have_no_patch_of_their_own(small: Callable[[str], HookedMM], images: list[Image.Image]) -> None:
    """There is nothing to show in their nodes."""
    model = small("idefics2")
    batch = model.prepare(images[0], "what colour is the star ?")
    place = int(batch.mask(modality="image")[0].nonzero()[0])
    assert node_crops(model, batch, 0, Nodes((place,), (True,), (1.0,)), images[:1]) == {}


def test_a_crop_is_drawn_in_its_node() -> None:
    """Its colour is in the picture, and only there where the node stands."""
    plain = graph_picture(example(CHAIN), ["a", "b", "c", "d"])
    shown = graph_picture(example(CHAIN), ["a", "b", "c", "d"], (), {0: Image.new("RGB", (8, 8), (1, 200, 3))})
    assert plain.size == shown.size
    assert (1, 200, 3) in colours(shown) - colours(plain)
    differ = np.abs(np.asarray(plain).astype(int) - np.asarray(shown).astype(int)).sum(2).nonzero()
    assert np.ptp(differ[1]) < 60
