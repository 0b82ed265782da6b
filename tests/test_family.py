"""What every family of small models gives its training: parts that fit together, whatever the family."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hooked_mm.small.families import FAMILIES
from hooked_mm.small.pool import Pool
from tests.test_families import NAMES, made


@pytest.mark.parametrize("name", NAMES)
def test_parts_fit(name: str) -> None:
    """A label per patch and per token, as many numbers per patch as said, a token per place in the prompt."""
    family = FAMILIES[name]
    model, processor = made(name)
    pool = Pool(family, processor, [("train", 0, index) for index in range(12)])
    for group in pool.groups.values():
        pixels = pool.pictures(group, np.arange(len(group.scenes)), some_grey=True)
        with torch.no_grad():
            patches, tokens = family.patches(model, pixels), family.tokens(model, pixels)
        assert patches.shape[-1] == family.tower_width(model)
        for labels, parts in ((group.patches, patches), (group.tokens, tokens)):
            assert all(values.shape == parts.shape[:2] for values in labels.values())
        ids = group.prompt["input_ids"]
        image = (ids[0] == family.image_token(model)).nonzero()[:, 0]
        assert len(image) == tokens.shape[1]
        embeds = model.get_input_embeddings()(ids).expand(len(tokens), -1, -1)
        found = family.with_tokens(embeds, image, tokens)
        kept = torch.ones(ids.shape[1], dtype=torch.bool)
        kept[image] = False
        assert torch.equal(found[:, kept], embeds[:, kept])
        more = found[:, image] - (embeds[:, image] if name == "molmo" else 0)
        torch.testing.assert_close(more, tokens, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_attention_is_the_models(name: str) -> None:
    """Four matrices per layer, which are the weights themselves: what is written there is in the model."""
    model, _ = made(name)
    layers = list(FAMILIES[name].attention(FAMILIES[name].decoder(model)))
    assert len(layers) == 6
    storages = {value.untyped_storage().data_ptr() for value in model.parameters()}
    for weights in layers:
        assert [tuple(weight.shape) for weight in weights] == [(128, 128)] * 4
        assert all(weight.untyped_storage().data_ptr() in storages for weight in weights)
