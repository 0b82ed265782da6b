"""Kinds of keys: every key that is not padding is of one kind, in every kind of model."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from analyses.key_groups import key_groups
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from tests.processors import processor
from tests.tiny import tiny


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_key_is_of_one_kind(llava: HookedMM, images: list[Image.Image], side: str) -> None:
    """Groups are disjoint and leave padding alone; the first position is that of the sample, not of the batch."""
    batch = llava.prepare(
        images[:2], ["what colour is the star ?", "star ?"], answers=["red", "blue"], padding_side=side
    )
    for first in (False, True):
        groups = key_groups(batch, batch.length, first=first)
        assert torch.equal(torch.stack(list(groups.values())).sum(0), (batch.modality != 0).long())
    assert (groups["image"].sum(1) == 64).all()
    for sample in range(2):
        assert groups["first"][sample].nonzero().tolist() == [[int((batch.modality[sample] != 0).nonzero()[0])]]
        words = [batch.tokens[sample][place] for place in groups["answer"][sample].nonzero()[:, 0].tolist()]
        assert words[0].strip("▁Ġ") == ["red", "blue"][sample]
    assert int(groups["question"][1].sum()) == 2
    with pytest.raises(BadInputError, match="3 keys for a batch of"):
        key_groups(batch, 3)
    raw = llava._batch(batch.inputs)
    with pytest.raises(BadInputError, match="roles are unknown"):
        key_groups(raw, batch.length)


def test_keys_of_cross_attention(images: list[Image.Image]) -> None:
    """A tower's keys are all the image's, none where a sample has no image; an encoder's are its own positions."""
    model = HookedMM(tiny("mllama"), processor("mllama"), check=False)
    batch = model.prepare([images[0], None], ["what is this ?", "what is it ?"])
    groups = key_groups(batch, 12, "xattn", first=True)
    assert groups["first"].sum(1).tolist() == [1, 0]
    assert groups["image"].sum(1).tolist() == [11, 0]
    assert not groups["question"].any()
    model = HookedMM(tiny("florence2"), processor("florence2"), check=False)
    batch = model.prepare(images[:1], "what is this ?", answers=["red"])
    assert batch.decoder is not None
    crossed = key_groups(batch, batch.modality.shape[1], "xattn")
    assert torch.equal(crossed["image"], batch.mask("image"))
    own = key_groups(batch, batch.decoder.modality.shape[1])
    assert not own["image"].any()
    assert own["answer"].any()
