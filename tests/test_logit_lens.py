"""The logit lens: the model's own logits at the end, the formula by hand in float64 before, memory, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from analyses.logit_lens import Cells, lens_points, logit_lens, read_cells
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.small import small_model_path
from hooked_mm.testing.miniatures import miniature_inputs
from tests.miniature_checks import shared


def _rms(x: np.ndarray, model: Any, offset: float = 0.0) -> np.ndarray:
    """x / sqrt(mean x^2 + epsilon) * (offset + weight)."""
    norm = model.model.language_model.norm
    weight = norm.weight.detach().double().numpy() + offset
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * weight


def _layer_norm(x: np.ndarray, model: Any) -> np.ndarray:
    """Cohere's: centred, divided by the standard deviation, no bias."""
    norm = model.model.language_model.norm
    centred = x - x.mean(-1, keepdims=True)
    weight = norm.weight.detach().double().numpy()
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + norm.variance_epsilon) * weight


def _words(x: np.ndarray, model: Any) -> np.ndarray:
    return x @ model.get_output_embeddings().weight.detach().double().numpy().T


# By hand, in float64: the final norm, and what becomes of the logits. The last two have numbers in their configuration
# that their forward does not use.
HEADS: dict[str, tuple[Callable[[np.ndarray, Any], np.ndarray], Callable[[np.ndarray, Any], np.ndarray]]] = {
    "llava": (_rms, lambda logits, _: logits),
    "gemma4": (_rms, lambda logits, _: 30 * np.tanh(logits / 30)),
    "granite4_vision": (_rms, lambda logits, model: logits / model.config.text_config.logits_scaling),
    "cohere_compass": (_layer_norm, lambda logits, _: logits * 0.25),
    "gemma3": (lambda x, model: _rms(x, model, offset=1), lambda logits, _: logits),
    "aya_vision": (_layer_norm, lambda logits, _: logits),
}


def _softmax(logits: np.ndarray) -> np.ndarray:
    grown = np.exp(logits - logits.max(-1, keepdims=True))
    return grown / grown.sum(-1, keepdims=True)


def _by_hand(family: str, stream: Tensor, norms: int = 1, bare: bool = False) -> np.ndarray:
    """Probabilities (p, vocab) of a stream; `bare`: without what becomes of the logits."""
    model, (norm, settle) = shared(family), HEADS[family]
    value = stream.detach().double().numpy()
    for _ in range(norms):
        value = norm(value, model)
    logits = _words(value, model)
    return _softmax(logits if bare else settle(logits, model))


def _streams(model: Any, inputs: dict[str, Tensor]) -> tuple[list[Tensor], Tensor]:
    """What plain PyTorch hooks see: h^0 .. h^L of the first sample, and its logits."""
    seen: list[Tensor] = []
    blocks = model.model.language_model.layers
    handles = [
        blocks[0].register_forward_pre_hook(
            lambda _, a, k: seen.append((a or (k["hidden_states"],))[0]), with_kwargs=True
        )
    ]
    handles += [
        block.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
        for block in blocks
    ]
    with torch.no_grad():
        logits = model(**inputs).logits
    for handle in handles:
        handle.remove()
    return [value[0] for value in seen], logits[0]


@pytest.mark.parametrize("family", HEADS)
def test_the_last_layer_is_normed_once_not_twice_and_scale_and_soft_cap_are_honoured(family: str) -> None:
    """Every layer equals the formula in float64, the last one the model's own logits; other formulas are far off."""
    model = shared(family)
    inputs = miniature_inputs(model, family=family)
    streams, logits = _streams(model, inputs)
    (lens, *_) = logit_lens(HookedMM(model, check=False), inputs, top=7)
    assert list(lens.layers) == list(range(len(streams)))
    own = inputs["attention_mask"][0].bool()
    assert torch.equal(lens.positions, own.nonzero()[:, 0])
    for layer, stream in enumerate(streams):
        expected = _by_hand(family, stream[own])
        found = lens.cells.probabilities[layer].double().numpy()
        assert np.abs(found - np.sort(expected, -1)[:, ::-1][:, :7]).max() < 1e-6
        assert np.abs(found - np.take_along_axis(expected, lens.cells.ids[layer].numpy(), -1)).max() < 1e-6
        entropy = -(expected * np.log(expected)).sum(-1)
        assert np.abs(lens.cells.entropy[layer].double().numpy() - entropy).max() < 1e-4
    best = logits[own].softmax(-1).topk(7)
    assert torch.allclose(lens.cells.probabilities[-1], best.values, atol=1e-6)
    assert torch.equal(lens.cells.ids[-1, :, 0], best.indices[:, 0])
    right = _by_hand(family, streams[-1][own])
    assert np.abs(_by_hand(family, streams[-1][own], norms=2) - right).max() > 1e-4, (
        "the test would not see a second norm"
    )
    if family in ("gemma4", "granite4_vision", "cohere_compass"):
        assert np.abs(_by_hand(family, streams[-1][own], bare=True) - right).max() > 1e-5, "nor a forgotten scale"


def test_a_word_that_is_chosen() -> None:
    """Rank and probability of the word that the last layer says: there rank 0; counted by hand everywhere."""
    model = shared("llava")
    inputs = miniature_inputs(model, family="llava")
    hooked = HookedMM(model, check=False)
    (lens, *_) = logit_lens(hooked, inputs)
    (fixed, *_) = logit_lens(hooked, inputs, words=11)
    streams, _ = _streams(model, inputs)
    assert lens.cells.rank is not None
    assert lens.cells.chosen is not None
    assert lens.words is not None
    assert fixed.cells.rank is not None
    assert not lens.cells.rank[-1].any()
    assert torch.equal(lens.words, lens.cells.ids[-1, :, 0])
    assert torch.equal(lens.cells.chosen[-1], lens.cells.probabilities[-1, :, 0])
    rows = torch.arange(len(lens.positions))
    for layer, stream in enumerate(streams):
        expected = torch.from_numpy(_by_hand("llava", stream[lens.positions]))
        own = expected[rows, lens.words]
        assert torch.allclose(lens.cells.chosen[layer].double(), own, atol=1e-6)
        assert torch.equal(lens.cells.rank[layer], (expected > own[:, None]).sum(-1))
        assert torch.equal(fixed.cells.rank[layer], (expected > expected[:, 11:12]).sum(-1))
    (plain, *_) = logit_lens(hooked, inputs, words=None)
    assert (plain.words, plain.cells.rank, plain.cells.chosen) == (None, None, None)


@pytest.mark.parametrize("family", ["florence2", "blip-2", "mllama"])
def test_other_forms_of_models(family: str) -> None:
    """Encoder-decoders are read in the decoder; the last layer gives the model's own words there, too."""
    model = shared(family)
    inputs = miniature_inputs(model, family=family)
    with torch.no_grad():
        logits = model(**inputs).logits
    lenses = logit_lens(HookedMM(model, check=False), inputs, top=3)
    assert len(lenses) == len(logits)
    for sample, lens in enumerate(lenses):
        best = logits[sample, lens.positions].softmax(-1).topk(3)
        assert torch.allclose(lens.cells.probabilities[-1], best.values, atol=1e-5)
        assert len(lens.layers) == len(lens.cells.ids)
        assert lens.cells.ids.shape[1:] == (len(lens.positions), 3)


def test_a_sample_does_not_depend_on_its_batch(llava: HookedMM, images: list[Any]) -> None:
    """Alone or padded beside a longer one."""
    texts = ["what place is this ?", "what colour is the thing on the left , and what place is this ?"]
    together = logit_lens(llava, llava.prepare(images[:2], texts))
    alone = logit_lens(llava, llava.prepare(images[:1], texts[:1]))[0]
    assert torch.allclose(together[0].cells.probabilities, alone.cells.probabilities, atol=1e-5)
    assert torch.equal(together[0].cells.ids[-1, :, 0], alone.cells.ids[-1, :, 0])
    batch = llava.prepare(images[:1], texts[:1])
    assert len(alone.positions) == int((batch.modality != 0).sum())


def test_the_unembedding_alone_reads_the_same(llava: HookedMM, images: list[Any]) -> None:
    """On a store's rows, which have no model."""
    batch = llava.prepare(images[:1], "what place is this ?")
    name = "blocks.2.hook_resid_post"
    _, cache = llava.run_with_cache(batch, name)
    rows = cache.select(name, sample=0).values
    found = read_cells(HookedMM.unembedding(small_model_path("llava"), dtype="float32"), rows)
    (whole,) = logit_lens(llava, batch, layers=[3])
    assert torch.equal(found.ids, whole.cells.ids[0])
    assert torch.allclose(found.probabilities, whole.cells.probabilities[0], atol=1e-6)


def test_only_layers_asked_for_run(llava: HookedMM, images: list[Any]) -> None:
    """Layer 2 needs two blocks; the third and the head are not computed."""
    ran: list[int] = []
    layers = llava.hf_model.model.language_model.layers
    handles = [block.register_forward_hook(lambda *_, n=n: ran.append(n)) for n, block in enumerate(layers)]
    (lens,) = logit_lens(llava, llava.prepare(images[:1], "what place is this ?"), layers=[2, 0])
    for handle in handles:
        handle.remove()
    assert ran == [0, 1]
    assert lens.layers == {0: "blocks.0.hook_resid_pre", 2: "blocks.1.hook_resid_post"}
    (first,) = logit_lens(llava, llava.prepare(images[:1], "what place is this ?"), layers=[0])
    assert torch.equal(first.cells.ids[0], lens.cells.ids[0])


def _stub(vocabulary: int, sizes: list[int]) -> Any:
    """A head that notes how many logits it was asked for: 16-bit ones of a map that is easily made."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(4, vocabulary, generator=generator)

    def to_logits(resid: Tensor) -> Tensor:
        sizes.append(resid.shape[:-1].numel() * vocabulary)
        return resid.float() @ weight

    return SimpleNamespace(cfg=SimpleNamespace(d_vocab=vocabulary), to_logits=to_logits)


def test_the_logits_of_a_long_sample_over_a_large_vocabulary_are_never_held() -> None:
    """A vocabulary of 150,000: never more than the budget at once, and the same as row by row."""
    sizes: list[int] = []
    model = _stub(150_000, sizes)
    rows = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    found = read_cells(model, rows, budget=2**20, words=7)
    assert max(sizes) <= 2**20 < sum(sizes)
    assert len(sizes) == math.ceil(40 / (2**20 // 150_000))
    one = read_cells(model, rows[17:18], budget=1, words=7)
    assert torch.equal(found.ids[17], one.ids[0])
    assert torch.allclose(found.entropy[17], one.entropy[0])
    assert found.rank is not None
    assert one.rank is not None
    assert found.rank[17] == one.rank[0]


@given(st.integers(1, 9), st.integers(2, 40), st.integers(1, 60), st.integers(1, 400))
def test_any_chunks_give_the_same(rows: int, vocabulary: int, top: int, budget: int) -> None:
    """Against NumPy in float64, whatever fits at once."""
    model = _stub(vocabulary, [])
    resid = torch.randn(rows, 4, generator=torch.Generator().manual_seed(rows))
    found = read_cells(model, resid, top, torch.arange(rows) % vocabulary, budget)
    expected = _softmax(model.to_logits(resid).double().numpy())
    assert found.ids.shape == (rows, min(top, vocabulary))
    best = np.sort(expected, -1)[:, ::-1][:, :top]
    assert np.allclose(found.probabilities.numpy(), best, atol=1e-6)
    assert found.rank is not None
    own = expected[np.arange(rows), np.arange(rows) % vocabulary]
    assert (found.rank.numpy() == (expected > own[:, None]).sum(-1)).all()


def test_words_that_are_never_said_and_no_rows() -> None:
    """A logit of minus infinity adds nothing to the entropy; no rows give no cells."""
    model = SimpleNamespace(
        cfg=SimpleNamespace(d_vocab=3),
        to_logits=lambda resid: torch.tensor([0.0, 0.0, -torch.inf]).expand(len(resid), 3),
    )
    assert torch.allclose(read_cells(model, torch.zeros(2, 4)).entropy, torch.tensor(math.log(2)))
    empty = read_cells(model, torch.zeros(0, 4), top=2, words=1)
    assert isinstance(empty, Cells)
    assert empty.ids.shape == (0, 2)
    assert empty.entropy.shape == (0,)


NAMES = [
    "hook_embed",
    *(f"blocks.{n}.hook_{p}" for n in range(3) for p in ("resid_pre", "attn_out", "resid_mid", "resid_post")),
]


def test_layers_and_points() -> None:
    """h^l is the stream behind l blocks; what lies within block l - 1 has the number of the stream it makes."""
    assert lens_points(NAMES)[0] == "blocks.0.hook_resid_pre"
    assert lens_points(NAMES)[3] == "blocks.2.hook_resid_post"
    assert lens_points(NAMES) == lens_points(NAMES, "resid_post") == lens_points(NAMES, "hook_resid_post")
    assert lens_points(NAMES, "attn_out") == {n + 1: f"blocks.{n}.hook_attn_out" for n in range(3)}
    assert list(lens_points(NAMES, layers=[-1, 1, 1])) == [1, 3]
    assert lens_points([n for n in NAMES if "pre" not in n])[0] == "hook_embed"


def test_refusals(llava: HookedMM) -> None:
    """With the value and the way out."""
    with pytest.raises(BadInputError, match=r"no point of the blocks 'hook_attn_oot'; nearest: hook_attn_out"):
        lens_points(NAMES, "attn_oot")
    with pytest.raises(BadInputError, match=r"layer 9 was asked for; 'hook_resid_post' has the layers 0 to 3"):
        lens_points(NAMES, layers=[9])
    with pytest.raises(BadInputError, match="layer 0 was asked for"):
        lens_points(NAMES, "attn_out", [0])
    model = _stub(10, [])
    with pytest.raises(BadInputError, match="top=0"):
        read_cells(model, torch.zeros(2, 4), 0)
    with pytest.raises(BadInputError, match="token 10 is not one of a vocabulary of 10"):
        read_cells(model, torch.zeros(2, 4), words=10)
    with pytest.raises(BadInputError, match="3 words were chosen for 2 rows"):
        read_cells(model, torch.zeros(2, 4), words=torch.zeros(3))
    with pytest.raises(BadInputError, match="words='first'"):
        logit_lens(llava, {}, words="first")  # type: ignore[arg-type]


def test_positions_that_are_asked_for_read_as_among_all(llava: HookedMM, images: list[Any]) -> None:
    """Also where a sample has none of them; each layer is told before it is read."""
    batch = llava.prepare(images[:2], ["what colour is the star ?", "how many objects are there ?"])
    where = torch.zeros_like(batch.modality, dtype=torch.bool)
    where[1, [70, 4, 9]] = True
    told: list[tuple[str, int, int]] = []
    none, some = logit_lens(llava, batch, where=where, top=3, tell=lambda *step: told.append(step))
    assert none.cells.ids.shape == (7, 0, 3)
    assert some.positions.tolist() == [4, 9, 70]
    whole = logit_lens(llava, batch, top=3)[1]
    at = torch.isin(whole.positions, some.positions)
    torch.testing.assert_close(some.cells.probabilities, whole.cells.probabilities[:, at], atol=1e-6, rtol=1e-5)
    assert torch.equal(some.cells.ids, whole.cells.ids[:, at])
    assert [(done, total) for _, done, total in told] == [(n, 7) for n in range(7)] * 2
    with pytest.raises(BadInputError, match="the batch's positions are"):
        logit_lens(llava, batch, where=where[:, 1:])
