"""Every family's real processor: the check at load holds, and no sample depends on its batch."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hooked_mm.errors import ConformanceError
from hooked_mm.hooked import HookedMM
from hooked_mm.probe import made_batch
from tests.processors import FAMILIES, processor
from tests.tiny import picture, tiny

COMPOSED = (
    *("llava", "llava_next", "llava_onevision", "idefics2", "idefics3", "smolvlm", "gemma3", "internvl"),
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
)
"""Not Mllama, whose text before an image attends to all image slots of the batch, empty ones included; nor those whose
processors take one image per sample."""
SIZES = [(24, 24), (40, 24), (20, 48), (64, 32)]
TEXTS = ["where", "what is it?", "and the colour of this one?", "describe the triangle in the snow, please"]
sample = st.tuples(
    st.sampled_from([0, 1, 3]),
    st.lists(st.tuples(st.sampled_from(SIZES), st.integers(0, 3)), min_size=3, max_size=3),
    st.sampled_from(TEXTS),
)
Sample = tuple[int, list[tuple[tuple[int, int], int]], str]


@functools.cache
def hooked(family: str) -> HookedMM:
    """The random model of a family with its processor, not checked (shared: leave it as it is)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return HookedMM(tiny(family), processor(family), check=False)


# Qwen2-VL's blocks and processor are those of Qwen2.5-VL's, and it is large.
@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=pytest.mark.slow) if f == "qwen2_vl" else f for f in FAMILIES]
)
def test_the_check_at_load_holds(family: str) -> None:
    """Through `prepare` and the family's own processor, with as many copies of the picture as points in a pass; the
    same holds on a batch of one.
    """
    model = HookedMM(tiny(family), processor(family))
    assert model.conformance is not None
    assert model.conformance.ok
    assert len(model.conformance.checks) > 100
    batch, copies = made_batch(model)
    assert copies == len(batch) == 8
    assert batch.has_images
    assert len(batch.image_sample) == copies


@pytest.mark.parametrize(
    "family", ["llava", pytest.param("qwen2_5_vl", marks=pytest.mark.slow), "idefics3", "florence2"]
)
def test_the_check_at_load_finds_a_write_without_effect(family: str) -> None:
    """A block whose attention is multiplied by nothing: writes into it change no more than rounding, and are named."""
    model = tiny(family)
    block = hooked(family).structure.text.blocks[0]
    out = model.get_submodule(f"{block.path}.{block.parts['o']}")
    kept = {name: value.clone() for name, value in out.named_parameters()}
    try:
        for value in out.parameters():
            value.zero_()
        with pytest.raises(ConformanceError) as caught:
            HookedMM(model, processor(family))
    finally:
        for name, value in out.named_parameters():
            value.copy_(kept[name])
    found = caught.value.report.failed_points()
    for name in ("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_pattern", "attn.hook_z"):
        assert found[f"blocks.0.{name}"].startswith("a write changes what follows does not hold")
    assert all(name.startswith("blocks.0.") for name in found)


@pytest.mark.parametrize("family", COMPOSED)
@given(samples=st.lists(sample, min_size=1, max_size=3), side=st.sampled_from(["left", "right"]))
def test_a_sample_does_not_depend_on_its_batch(family: str, samples: list[Sample], side: str) -> None:
    """With 0, 1 or 3 pictures of any size, companions and padding on either side: every block's stream within 1e-5 of
    its size.
    """
    model = hooked(family)
    pictures = [[picture(*size, seed) for size, seed in chosen[:count]] for count, chosen, _ in samples]
    texts = [text for _, _, text in samples]
    names = "blocks.*.hook_resid_post" if any(pictures) else "blocks.0.hook_resid_post"
    _, together = model.run_with_cache(model.prepare(pictures, texts, padding_side=side), names)
    real = together.batch.mask()
    for row, (own, text) in enumerate(zip(pictures, texts, strict=True)):
        _, alone = model.run_with_cache(model.prepare([own], [text]), names if own else "blocks.0.hook_resid_post")
        kept = real[row]
        assert int(kept.sum()) == alone.batch.input_ids.shape[1]
        assert torch.equal(together.batch.input_ids[row][kept], alone.batch.input_ids[0])
        for name in set(together) & set(alone):
            there, here = together[name][row][kept], alone[name][0]
            assert (there - here).abs().max() <= 1e-5 * max(1.0, float(here.abs().max())), name
