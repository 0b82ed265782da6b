"""What concepts mean: words through the final norm and the unembedding, and the samples that activate them most."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from concept_dict.grounding import STOPWORDS, is_signed, is_whole_word, read_words, top_samples, top_words
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.language import vocabulary
from hooked_mm.scenes.world import COLOURS

TEXT = [
    "the red cat sat on a red mat",
    "Red cattle and a catalogue of cats",
    "a café and the café don't , 12 ! Red cat",
] * 20


def _norm(model: HookedMM) -> Any:
    return model.hf_model.get_submodule(model.structure.final_norm)


def _unembedding(model: HookedMM) -> np.ndarray:
    return model.hf_model.get_output_embeddings().weight.double().numpy()


def _probabilities(model: HookedMM, concept: np.ndarray, gain: np.ndarray | float) -> np.ndarray:
    """softmax(W (gain * c / rms(c))) in float64: LLaMA's final norm and unembedding, written out."""
    logits = _unembedding(model) @ (gain * concept / np.sqrt((concept**2).mean()))
    raised = np.exp(logits - logits.max())
    return raised / raised.sum()


def _all_words(model: HookedMM, concept: np.ndarray) -> dict[str, float]:
    """Every whole word with its probability, in the order given."""
    size = model.cfg.d_vocab
    found = top_words(model, torch.as_tensor(concept)[None], size, stopwords=(), candidates=size)[0]
    return {word.text: word.probability for word in found}


def _unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values)


@pytest.mark.parametrize("colour", COLOURS)
def test_the_direction_of_a_word_is_named_by_it(llava: HookedMM, colour: str) -> None:
    """A concept that norm and unembedding turn into a word's own row of the unembedding has that word first."""
    row = _unembedding(llava)[llava.tokenizer.get_vocab()[colour]]
    concept = torch.as_tensor(_unit(row / _norm(llava).weight.double().numpy()))
    words = top_words(llava, concept[None])[0]
    assert words[0].text == colour
    assert words[0].probability > 0.9
    assert len(words) == 5


@pytest.mark.parametrize("seed", range(3))
def test_probabilities_are_those_over_the_whole_vocabulary(llava: HookedMM, seed: int) -> None:
    """The probabilities are a float64 softmax of unembed(norm(c)), of words that are left out too, in falling order."""
    concept = _unit(np.random.default_rng(seed).standard_normal(llava.cfg.d_model))
    expected = _probabilities(llava, concept, _norm(llava).weight.double().numpy())
    found, vocabulary = _all_words(llava, concept), llava.tokenizer.get_vocab()
    assert len(found) > 40
    for word, probability in found.items():
        assert probability == pytest.approx(expected[vocabulary[word]], rel=2e-5)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    # Marks and special tokens are left out, with their share.
    assert sum(found.values()) < 1


def test_xl_vlms_fault_forgotten_final_norm(llava: HookedMM) -> None:
    """Where leaving out the final norm's gain would give the words another order, ours is that with it."""
    gain, vocabulary = _norm(llava).weight.double().numpy(), llava.tokenizer.get_vocab()
    different = 0
    for seed in range(12):
        concept = _unit(np.random.default_rng(seed).standard_normal(llava.cfg.d_model))
        found = list(_all_words(llava, concept))
        ids = [vocabulary[word] for word in found]
        right, wrong = (_probabilities(llava, concept, g)[ids] for g in (gain, 1.0))
        assert (np.diff(right) <= 0).all()
        different += bool((np.diff(wrong) > 0).any())
    assert different > 6


def test_a_strong_gain_changes_the_first_word() -> None:
    """With gains far from 1 the first word of a concept is another than the unembedding alone would give."""
    # A model of its own, since it is changed.
    model = HookedMM.small("llava")
    vocabulary = model.tokenizer.get_vocab()
    red, blue = (_unembedding(model)[vocabulary[word]] for word in ("red", "blue"))
    gain = np.where(np.abs(red) > np.abs(blue), 20.0, 0.05)
    _norm(model).weight.copy_(torch.as_tensor(gain))
    concept = _unit(_unit(red) + 3 * _unit(blue))
    first = [int(_probabilities(model, concept, g).argmax()) for g in (gain, 1.0)]
    assert first == [vocabulary["red"], vocabulary["blue"]]
    assert top_words(model, torch.as_tensor(concept)[None])[0][0].text == "red"


@pytest.mark.parametrize("seed", range(3))
def test_xl_vlms_fault_least_probable_words(llava: HookedMM, seed: int) -> None:
    """The words are those of largest probability: every whole word that is left out has less, whatever the count."""
    concept = _unit(np.random.default_rng(seed).standard_normal(llava.cfg.d_model))
    everything = _all_words(llava, concept)
    shown = top_words(llava, torch.as_tensor(concept)[None], 5, stopwords=())[0]
    rest = [probability for word, probability in everything.items() if word not in {word.text for word in shown}]
    assert min(word.probability for word in shown) >= max(rest)
    assert shown[0].probability == max(everything.values())


def test_xl_vlms_fault_first_sub_token() -> None:
    """A concept whose most probable tokens are pieces is named by whole words further down; of pieces that the
    tokenizer alone can't tell from words, a vocabulary can.
    """
    tokenizer = _byte_level()
    tokens = tokenizer.get_vocab()
    logits = torch.zeros(1, len(tokenizer))
    for text, value in (("tle", 9.0), ("ogue", 8.0), ("he", 7.0), ("Ġcatal", 6.0), ("Ġcattle", 5.0)):
        logits[0, tokens[text]] = value
    model = _reading(tokenizer)
    assert [word.text for word in top_words(model, logits, 2)[0]] == ["catal", "cattle"]
    assert [word.text for word in top_words(model, logits, 2, candidates=400, vocabulary=["Cattle", "cat"])[0]] == [
        "cattle",
        "cat",
    ]


def test_a_list_of_stopwords_of_ones_own(llava: HookedMM, tmp_path: Path) -> None:
    """Words apart by any white space, in any case; a file that is not there is named."""
    (tmp_path / "mine.txt").write_text("Red\n  blue\tGREEN\n")
    assert read_words(tmp_path / "mine.txt") == {"red", "blue", "green"}
    rows = torch.as_tensor(_unembedding(llava)[[llava.tokenizer.get_vocab()["red"]]])
    assert top_words(llava, rows / _norm(llava).weight)[0][0].text == "red"
    found = top_words(llava, rows / _norm(llava).weight, stopwords=read_words(tmp_path / "mine.txt"))[0]
    assert "red" not in {word.text for word in found}
    assert (
        top_words(llava, rows / _norm(llava).weight, stopwords=["RED"])[0]
        == top_words(llava, rows / _norm(llava).weight, stopwords=["red"])[0]
    )
    with pytest.raises(BadInputError, match="no list of words"):
        read_words(tmp_path / "gone.txt")


def test_concepts_of_another_width_are_refused(llava: HookedMM) -> None:
    """As those of a tower are: they are no directions of the residual stream."""
    with pytest.raises(BadInputError, match=r"\(3, 96\).*width 128"):
        top_words(llava, torch.ones(3, 96))


def test_stopwords_and_marks_are_left_out(llava: HookedMM) -> None:
    """ "the" and "?" name no concept, even where they are most probable; a list of one's own may let "the" through."""
    gain, vocabulary = _norm(llava).weight.double().numpy(), llava.tokenizer.get_vocab()
    concepts = torch.as_tensor(
        np.stack([_unit(_unembedding(llava)[vocabulary[token]] / gain) for token in ("the", "?", "</s>")])
    )
    for token, concept, words in zip(("the", "?", "</s>"), concepts, top_words(llava, concepts, 8), strict=True):
        # It is the most probable token, so that something had to leave it out.
        assert int(_probabilities(llava, concept.numpy(), gain).argmax()) == vocabulary[token]
        assert len(words) == 8
        assert not {word.text for word in words} & (STOPWORDS | {"?", "<image>", ".", ":", "</s>"})
    assert top_words(llava, concepts[:1], stopwords=["red"])[0][0].text == "the"
    left = top_words(llava, concepts[:1], stopwords=())[0][:3]
    assert [w.text for w in top_words(llava, concepts[:1], 2, {left[0].text})[0]] == [w.text for w in left[1:]]


@given(count=st.integers(1, 70), candidates=st.integers(1, 200), k=st.integers(1, 3))
def test_counts(llava: HookedMM, count: int, candidates: int, k: int) -> None:
    """No more words than asked for, out of no more tokens than asked for; more than there are is no error."""
    drawn = torch.randn(k, llava.cfg.d_model, generator=torch.Generator().manual_seed(k))
    found = top_words(llava, drawn, count, candidates=candidates)
    assert len(found) == k
    for words, whole in zip(found, top_words(llava, drawn, count, candidates=10**6), strict=True):
        assert len(words) <= min(count, candidates)
        assert words == whole[: len(words)]
    known = sum(word.isalpha() and word not in STOPWORDS for word in vocabulary())
    assert all(len(words) == min(count, known) for words in top_words(llava, drawn, count))


def _byte_level() -> PreTrainedTokenizerFast:
    """A tokenizer as GPT-2, Llama 3 and Qwen have it: a word after a space is another token than one without."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = {"special_tokens": ["<s>"], "initial_alphabet": alphabet, "show_progress": False}
    made.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=400, **special))
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")


def _sentence_piece(rebuilt: bool) -> Any:
    """A tokenizer as Llama 2 and LLaVA 1.5 have it, which puts a space before every text.

    Files say this by a normalizer that does so even where there is a space already; transformers' own class rebuilds
    them so that it does not.
    """
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # Only for training, so that no token spans two words.
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    special = {"special_tokens": ["<unk>", "<s>", "</s>"], "show_progress": False}
    made.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=80, **special))
    if rebuilt:
        content = json.loads(made.to_str())["model"]
        return LlamaTokenizer(vocab=content["vocab"], merges=[tuple(pair) for pair in content["merges"]])
    made.pre_tokenizer = None
    strip = decoders.Strip(content=" ", left=1)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(
    ("token", "whole"),
    [
        ("Ġred", True),
        ("ĠRed", True),
        ("Ġcattle", True),
        ("ĠcafÃ©", True),
        ("red", False),  # the end of "hundred"
        ("tle", False),
        ("12", False),
        ("Ġ12", False),
        ("Ġ,", False),
        ("'t", False),
        ("Ġ", False),
        ("Ã", False),  # half a character
        ("<s>", False),
    ],
)
def test_whole_words_of_a_byte_level_tokenizer(token: str, whole: bool) -> None:
    """Letters only, and the one token of that word after a space: no pieces, numbers, marks, bytes, special tokens."""
    tokenizer = _byte_level()
    assert token in tokenizer.get_vocab()
    assert is_whole_word(tokenizer, tokenizer.get_vocab()[token]) is whole


@pytest.mark.parametrize("rebuilt", [True, False])
@pytest.mark.parametrize(("token", "whole"), [("▁red", True), ("▁cat", True), ("tle", False), ("▁", False)])
def test_whole_words_of_a_sentence_piece_tokenizer(rebuilt: bool, token: str, whole: bool) -> None:
    """A word is one whether or not the tokenizer puts a second space before it."""
    tokenizer = _sentence_piece(rebuilt)
    assert is_whole_word(tokenizer, tokenizer.get_vocab()[token]) is whole


def _reading(tokenizer: Any) -> Any:
    """A model whose logits are what it is given."""

    def to_logits(resid: torch.Tensor) -> torch.Tensor:
        return resid

    size = SimpleNamespace(d_model=len(tokenizer))
    return SimpleNamespace(device=torch.device("cpu"), tokenizer=tokenizer, to_logits=to_logits, cfg=size)


def test_a_word_in_another_case_is_a_repetition() -> None:
    """Of "red" and "Red" only the more probable one is named."""
    tokenizer = _byte_level()
    vocabulary = tokenizer.get_vocab()
    logits = torch.zeros(1, len(tokenizer))
    for token, value in (("Ġred", 0.3), ("ĠRed", 0.4), ("Ġcat", 0.2)):
        logits[0, vocabulary[token]] = value
    words = top_words(_reading(tokenizer), logits, 2)[0]
    assert [word.text for word in words] == ["Red", "cat"]


@given(
    n=st.integers(1, 30),
    k=st.integers(1, 4),
    count=st.integers(1, 40),
    levels=st.sampled_from([2, 5, 10**6]),
    seed=st.integers(0, 2**31 - 1),
)
def test_top_samples(n: int, k: int, count: int, levels: int, seed: int) -> None:
    """Strongest first, the earlier sample where two are equal, and none that does not activate the concept at all."""
    pooled = np.random.default_rng(seed).integers(0, levels, (n, k)).astype(np.float32)
    for column, found in enumerate(top_samples(pooled, count)):
        values = pooled[:, column]
        expected = sorted((row for row in range(n) if values[row] > 0), key=lambda row: (-values[row], row))
        assert found == expected[:count]


def test_a_dead_concept_has_no_samples() -> None:
    """A concept that nothing activates has an empty list, in its place."""
    assert top_samples(np.array([[0.0, 1.0], [0.0, 2.0]]), 3) == [[], [1, 0]]


@given(n=st.integers(1, 20), count=st.integers(1, 25), seed=st.integers(0, 2**31 - 1))
def test_the_other_end(n: int, count: int, seed: int) -> None:
    """Negated, the samples of smallest activation come first; those above zero are at the first end alone."""
    pooled = np.random.default_rng(seed).standard_normal((n, 2))
    for column, (high, low) in enumerate(zip(top_samples(pooled, count), top_samples(-pooled, count), strict=True)):
        values = pooled[:, column]
        assert low == sorted((row for row in range(n) if values[row] < 0), key=lambda row: values[row])[:count]
        assert not set(high) & set(low)


def test_signed_is_told_by_what_transform_gives() -> None:
    """Products are signed, their positive part is not, wherever the mean lies."""
    concepts, mean = torch.eye(3)[:2], torch.tensor([5.0, -5.0, 0.0])
    assert is_signed(concepts, mean, lambda rows: (rows - mean) @ concepts.T)
    assert not is_signed(concepts, mean, lambda rows: ((rows - mean) @ concepts.T).clamp_min(0))
