"""Visual-token ablation: against forward passes written by hand, closed forms, and pictures that are wholly gone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from analyses.targets import Targets, prompt_targets
from analyses.token_ablation import (
    Fill,
    ImageTokens,
    ablated_points,
    ablated_scores,
    data_means,
    effects,
    image_tokens,
    moments,
    replace_tokens,
    token_features,
)
from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.testing import miniature, miniature_inputs

ASKED = ["what colour is the star ?", "what place is this ?", "is the red object big or small ?"]


@pytest.fixture(scope="module")
def batch(llava: HookedMM, images: list[Image.Image]) -> Batch:
    """Three questions of different lengths."""
    return llava.prepare(images[:3], ASKED)


def sets(batch: Batch, *names: str) -> Tensor:
    """(sets, b, 64): no token, every token, the even ones."""
    every = torch.ones(len(batch), 64, dtype=torch.bool)
    even = every.clone()
    even[:, 1::2] = False
    return torch.stack([{"none": ~every, "all": every, "even": even}[name] for name in names])


def by_hand(model: HookedMM, batch: Batch, instead: Any) -> Tensor:
    """Logits with image features that `instead` made of the model's own, by transformers alone."""
    hf, inputs = model.hf_model, batch.inputs
    with torch.no_grad():
        features = hf.get_image_features(pixel_values=inputs["pixel_values"])
        features = features if isinstance(features, list | tuple) else features.pooler_output
        embedded = hf.get_input_embeddings()(inputs["input_ids"])
        for row, own in enumerate(features):
            embedded[row, batch.mask("image")[row]] = instead(own, row)
        out = hf.model.language_model(
            inputs_embeds=embedded, attention_mask=inputs["attention_mask"], position_ids=inputs.get("position_ids")
        )
        logits: Tensor = hf.lm_head(out.last_hidden_state)
    return logits


def test_replaced_tokens_are_what_the_formula_says(llava: HookedMM, batch: Batch) -> None:
    """Mean, zero and given vectors, for all tokens and for some, against features put in by hand."""
    targets = prompt_targets(batch, [20, 30, 40])
    row, token = targets.row, targets.token
    other = torch.linspace(-1, 1, 128)

    def some(own: Tensor, new: Tensor) -> Tensor:
        changed = own.clone()
        changed[::2] = new
        return changed

    cases = {
        ("mean", "all"): lambda own, _: own.mean(0).expand_as(own),
        ("mean", "even"): lambda own, _: some(own, own.mean(0)),
        ("zero", "even"): lambda own, _: some(own, torch.zeros(128)),
        ("data", "even"): lambda own, _: some(own, other),
    }
    for (kind, name), instead in cases.items():
        fill = Fill(kind, {"hook_embed": other})  # type: ignore[arg-type]
        (found,) = ablated_scores(llava, batch, targets, sets(batch, name), fill, kind="log_prob")
        expected = by_hand(llava, batch, instead)[torch.arange(3), row].log_softmax(-1)[torch.arange(3), token]
        torch.testing.assert_close(found, expected.double(), rtol=0, atol=2e-5, msg=f"{kind} {name}")


def test_ablating_nothing_changes_nothing_bit_for_bit(llava: HookedMM, batch: Batch) -> None:
    """The score of the empty set is the model's own."""
    targets = prompt_targets(batch, [20, 30, 40])
    with torch.no_grad():
        # As few rows of logits, which a product of another shape rounds differently.
        logits = llava.run_with_hooks(batch, logits_to_keep=1)
    assert logits is not None
    (found,) = ablated_scores(llava, batch, targets, sets(batch, "none"))
    assert torch.equal(found, logits[torch.arange(3), 0, targets.token].double())
    scores = ablated_scores(llava, batch, targets, sets(batch, "none", "none", "all"))
    assert effects(scores)[0].abs().max() == 0
    assert effects(scores)[1].abs().min() > 1e-3


def test_scores_of_every_kind(llava: HookedMM, batch: Batch) -> None:
    """Logit, log-probability, probability, and the difference to a foil, of several targets of one sample."""
    last = batch.last_prompt()
    targets = Targets(torch.tensor([2, 2, 0]), last[[2, 2, 0]] - torch.tensor([0, 3, 1]), torch.tensor([11, 12, 13]))
    logits = by_hand(llava, batch, lambda own, _: torch.zeros_like(own)).double()[targets.sample, targets.row]
    gone = sets(batch, "all")[:, targets.sample]
    fill = Fill("zero")
    pick = (torch.arange(3), targets.token)
    for kind, expected in {
        "logit": logits[pick],
        "log_prob": logits.log_softmax(-1)[pick],
        "probability": logits.softmax(-1)[pick],
    }.items():
        (found,) = ablated_scores(llava, batch, targets, gone, fill, kind=kind)  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    apart = Targets(targets.sample, targets.row, targets.token, torch.tensor([1, 2, 3]))
    (found,) = ablated_scores(llava, batch, apart, gone, fill)
    torch.testing.assert_close(found, logits[pick] - logits[torch.arange(3), [1, 2, 3]], rtol=0, atol=1e-4)
    with pytest.raises(BadInputError, match="a probability has no foil"):
        ablated_scores(llava, batch, apart, gone, fill, kind="probability")


@pytest.mark.parametrize("side", ["left", "right"])
def test_companions_padding_and_the_size_of_a_pass_do_not_matter(
    llava: HookedMM, images: list[Image.Image], side: str
) -> None:
    """Noise and all: a sample alone has what it has among others."""
    fill, keys = Fill("noise", seed=3), [5, 6, 7]
    batch = llava.prepare(images[:3], ASKED, padding_side=side)
    targets = prompt_targets(batch, [20, 30, 40])
    together = ablated_scores(llava, batch, targets, sets(batch, "even", "all"), fill, keys=keys, size=4)
    for sample in range(3):
        alone = llava.prepare(images[sample], ASKED[sample])
        own = prompt_targets(alone, targets.token[[sample]])
        found = ablated_scores(llava, alone, own, sets(alone, "even", "all"), fill, keys=keys[sample : sample + 1])
        torch.testing.assert_close(found[:, 0], together[:, sample], rtol=0, atol=1e-4)


def laid_out(images: list[list[int]]) -> ImageTokens:
    """Tokens whose images are given per sample; -1 beyond."""
    image = torch.tensor(images)
    row = torch.where(image >= 0, torch.arange(len(image))[:, None], -1)
    return ImageTokens("hook_embed", row, torch.arange(image.shape[1]).expand_as(image), image, tuple(image.shape))  # type: ignore[arg-type]


def test_moments_are_those_of_each_image_alone() -> None:
    """Two images of one sample are two; what fills a sample up has no part."""
    values = np.random.default_rng(0).standard_normal((2, 6, 3))
    values[1, 4:] = 1e6
    tokens = laid_out([[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, -1, -1]])
    mean, scale = moments(torch.from_numpy(values), tokens)
    for sample, own in ((0, slice(0, 3)), (0, slice(3, 6)), (1, slice(0, 4))):
        part = values[sample, own]
        np.testing.assert_allclose(mean[sample, own], np.broadcast_to(part.mean(0), part.shape), atol=1e-12)
        np.testing.assert_allclose(scale[sample, own], np.broadcast_to(part.std(0), part.shape), atol=1e-12)


def test_noise_is_seeded_and_of_matched_scale() -> None:
    """By seed and key alone, in whatever place and company; mean and deviation of the image's tokens."""
    values = torch.randn(1, 4000, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5.0, 0.1]) + 7
    tokens = laid_out([[0] * 4000])
    one, again, other, keyed = (
        Fill("noise", seed=seed).instead(values, tokens, [key]) for seed, key in ((1, 4), (1, 4), (2, 4), (1, 5))
    )
    assert torch.equal(one, again)
    assert not torch.isclose(one, other).all()
    assert not torch.isclose(one, keyed).all()
    torch.testing.assert_close(one.std(1), values.std(1), rtol=0.05, atol=0)
    torch.testing.assert_close(one.mean(1), values.mean(1), rtol=0.05, atol=0)
    beside = torch.cat([values[:, :1].expand(1, 4000, 3), values])
    both = Fill("noise", seed=1).instead(beside, laid_out([[0] + [-1] * 3999, [0] * 4000]), [9, 4])
    torch.testing.assert_close(both[1], one[0])


def test_several_images_of_a_sample_keep_their_own_means(llava: HookedMM, images: list[Image.Image]) -> None:
    """As by hand, picture by picture."""
    batch = llava.prepare([[images[0], images[1]], [images[2]]], ["what", "what place"])
    tokens, values = token_features(llava, batch)
    assert tokens.counts.tolist() == [128, 64]
    assert tokens.image[0].tolist() == [0] * 64 + [1] * 64
    gone = tokens.real.clone()
    seen: dict[str, Tensor] = {}
    hooks = replace_tokens(["hook_embed"], gone, Fill("mean"))
    llava.run_with_hooks(batch, [*hooks, ("blocks.0.hook_resid_pre", lambda value, hook: seen.update(v=value.clone()))])
    found = tokens.gather(seen["v"])
    torch.testing.assert_close(found[0, :64], values[0, :64].mean(0).expand(64, -1))
    torch.testing.assert_close(found[0, 64:], values[0, 64:].mean(0).expand(64, -1))
    torch.testing.assert_close(found[1, :64], values[1, :64].mean(0).expand(64, -1))


@pytest.mark.parametrize("family", ["mllama", "florence2", "qwen3_vl", "idefics2", "llava_next", "blip"])
def test_without_any_token_nothing_is_left_of_the_picture(family: str) -> None:
    """Also where features enter between layers (deepstack), by cross-attention, in an encoder, or as latents."""
    model = HookedMM(miniature(family), check=False)
    inputs = miniature_inputs(model.hf_model)
    batches = [model._batch(given) for given in (inputs, {**inputs, "pixel_values": -0.5 * inputs["pixel_values"]})]
    found, whole = [], []
    for batch in batches:
        point = ablated_points(model, batch)[0]
        tokens, values = token_features(model, batch)
        assert tokens.point == point
        assert values.shape[:2] == tokens.real.shape
        targets = prompt_targets(batch, [7] * len(batch))
        real = tokens.real.cpu()
        scores = ablated_scores(model, batch, targets, torch.stack([torch.zeros_like(real), real]), Fill("zero"))
        whole.append(scores[0])
        found.append(scores[1])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)
    assert (whole[0] - whole[1]).abs().max() > 1e-4


def test_separators_are_no_tokens_of_a_picture() -> None:
    """LLaVA-NeXT's newlines hold no patch: they are not counted, and stay as they are."""
    model = HookedMM(miniature("llava_next"), check=False)
    batch = model._batch(miniature_inputs(model.hf_model))
    newlines = batch.mask("image") & batch.separator
    assert newlines.any(1).all()
    tokens, _ = token_features(model, batch)
    assert tokens.counts.tolist() == (batch.mask("image").sum(1) - newlines.sum(1)).tolist()
    seen: dict[str, Tensor] = {}
    hooks = replace_tokens(["hook_embed"], None, Fill("zero"))
    model.run_with_hooks(batch, [*hooks, ("blocks.0.hook_resid_pre", lambda value, hook: seen.update(v=value.clone()))])
    _, cache = model.run_with_cache(batch, "hook_embed")
    assert torch.equal(seen["v"][newlines], cache["hook_embed"][newlines])
    assert not seen["v"][batch.mask("image") & ~newlines].any()


def test_a_blind_model_answers_alike_about_any_picture(llava: HookedMM, images: list[Image.Image]) -> None:
    """The hooks hold through a generation."""
    batch = llava.prepare(images[:6], "what colour is the object at the top left ?")
    assert len(set(llava.generate(batch, 3).text)) > 1
    means = data_means(llava, [batch])
    for gone in (torch.ones(6, 64, dtype=torch.bool), None):
        with llava.hooks(replace_tokens(["hook_embed"], gone, Fill("data", means))):
            assert len(set(llava.generate(batch, 3).text)) == 1
            (blind,) = set(llava.generate(batch, 3, num_beams=2).text)
    clear = llava.generate(batch, 3, num_beams=2).text
    changed = next(sample for sample in range(1, 6) if clear[sample] != blind)
    some = torch.zeros(6, 64, dtype=torch.bool)
    some[changed] = True
    with llava.hooks(replace_tokens(["hook_embed"], some, Fill("data", means))):
        found = llava.generate(batch, 3, num_beams=2).text
    assert found == [blind if sample == changed else answer for sample, answer in enumerate(clear)]


def test_means_over_a_data_set_are_over_all_tokens(llava: HookedMM, images: list[Image.Image]) -> None:
    """However they were batched."""
    batches = [llava.prepare(images[:1], "what"), llava.prepare(images[1:4], "what place is this ?")]
    rows = [
        cache.select("hook_embed", modality="image").values
        for _, cache in (llava.run_with_cache(batch, "hook_embed") for batch in batches)
    ]
    (mean,) = data_means(llava, batches).values()
    torch.testing.assert_close(mean, torch.cat(rows).double().mean(0).float())


def test_refusals_name_value_reason_and_remedy(llava: HookedMM, batch: Batch) -> None:
    """Whatever can't be replaced."""
    text, targets = llava.prepare(None, "what place is this ?"), prompt_targets(batch, [1, 2, 3])
    for what, call in {
        "no picture": lambda: ablated_points(llava, text),
        "'median'; known: mean": lambda: Fill("median"),  # type: ignore[arg-type]
        "no vector to put in at 'hook_embed'": lambda: ablated_scores(
            llava, batch, targets, sets(batch, "all"), Fill("data")
        ),
        r"\(1, 1, 64\); they must be": lambda: ablated_scores(llava, batch, targets, sets(batch, "all")[:, :1]),
        "one flag for each token": lambda: ablated_scores(llava, batch, targets, sets(batch, "all")[..., :5]),
        "no batch was given": lambda: data_means(llava, []),
        "not laid out as": lambda: image_tokens("hook_embed", batch, (3, batch.length, 2)).gather(torch.zeros(3, 2)),
    }.items():
        with pytest.raises(BadInputError, match=what):
            call()
