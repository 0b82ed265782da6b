"""Whole words with all their sub-tokens, in two families of tokenizers trained here on a few lines."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hooked_mm.errors import BadInputError, UnknownWordError
from hooked_mm.hooked import HookedMM
from hooked_mm.words import WordMatch, check_words, find_words, word_pattern

CORPUS = ["no one is at the top left of a big red ring", "a cat in the sea has no hat", "the star is on top and so on"]


def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2's kind: bytes as letters, a leading space belongs to the word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def sentence_piece() -> PreTrainedTokenizerFast:
    """Llama's kind: "▁" for spaces, single digits, bytes for what has no piece of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=60, initial_alphabet=["▁", *"0123456789.,"]))
    learnt = json.loads(tokenizer.to_str())["model"]
    vocab = dict(learnt["vocab"])
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    merges = [tuple(pair) for pair in learnt["merges"]]
    tokenizer.model = models.BPE(vocab, merges, byte_fallback=True)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZERS = {"byte-level": cache(byte_level), "sentence-piece": cache(sentence_piece)}
KINDS = st.sampled_from(sorted(TOKENIZERS))


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids without special tokens."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def spelled(tokenizer: Any, ids: list[int]) -> bytes:
    """What tokens spell, byte by byte from their names: no decoder has a part in it."""
    # GPT-2's table: printable bytes stand for themselves, the others for characters from 256 on.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in plain}
    table |= {chr(256 + n): byte for n, byte in enumerate(b for b in range(256) if b not in plain)}
    found = b""
    for name in tokenizer.convert_ids_to_tokens(ids):
        if name.startswith("<0x"):
            found += bytes([int(name[3:5], 16)])
        elif "byte" in type(tokenizer.backend_tokenizer.decoder).__name__.lower():
            found += bytes(table[letter] for letter in name)
        else:
            found += name.replace("▁", " ").encode()
    return found


def check(kind: str, text: str, words: list[str], expected: list[str]) -> list[WordMatch]:
    """The expected words are found, in order, and the tokens of each spell it, white space around it aside."""
    tokenizer = TOKENIZERS[kind]()
    ids = encode(tokenizer, text)
    found = find_words(tokenizer, ids, words)
    assert [match.word for match in found] == expected, text
    for match in found:
        said = spelled(tokenizer, ids[match.start : match.stop])
        assert b" ".join(said.split()).lower() == match.word.lower().encode(), text
        # Nor is a token at either end there for nothing.
        for shorter in (ids[match.start + 1 : match.stop], ids[match.start : match.stop - 1]):
            assert spelled(tokenizer, shorter).strip() != said.strip()
    return found


PIECES = [
    "no",
    "snow",
    "No",
    "cat",
    "cattle",
    "CAT",
    "1",
    "12",
    "1.5",
    "21",
    "triangle",
    "Triangle",
    "t-shirt",
    "cat's",
]
PIECES += ["scat", "top", "left", "top left", "café", "caf", "😀", "naïve", "bobcat", "know", "it’s", "十", "top-left"]


@given(KINDS, st.lists(st.tuples(st.sampled_from(PIECES), st.sampled_from([" ", ", ", " . ", "! ", " — "]))))
def test_planted_words_are_found_and_nothing_else(kind: str, planted: list[tuple[str, str]]) -> None:
    """Of a text put together from words, exactly the pieces asked for are found, whatever stands beside them."""
    targets = ["no", "cat", "1", "triangle", "café"]
    expected = [piece.lower() for piece, _ in planted if piece.lower() in targets]
    check(kind, "".join(piece + gap for piece, gap in planted), targets, expected)


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
@pytest.mark.parametrize("word", ["triangle", "snow", "cattle", "café", "purple"])
def test_all_sub_tokens_are_covered(kind: str, word: str) -> None:
    """A word that these tokenizers split keeps every piece, in the middle and at both ends of a text."""
    tokenizer = TOKENIZERS[kind]()
    assert len(encode(tokenizer, f" {word}")) >= 3
    for text in (f"a {word} that is", word, f"a {word}", f"{word}.", f"({word})", f"a {word}😀", f"😀 {word} 😀"):
        check(kind, text, [word], [word])


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("snow", "no"),
        ("cattle", "cat"),
        ("bobcat", "cat"),
        ("12", "1"),
        ("1.5", "1"),
        ("0,1", "1"),
        ("t-shirt", "shirt"),
        ("isn't", "isn"),
        ("it’s", "it"),
        ("caf", "café"),
        ("cafés", "café"),
        ("top of the left", "top left"),
        ("laptop left", "top left"),
    ],
)
def test_parts_of_words_are_not_words(kind: str, text: str, word: str) -> None:
    """Neither letters of a longer word nor a digit of a number, hyphens, apostrophes and decimal marks included."""
    check(kind, f"a {text} is", [word], [])
    check(kind, text, [word], [])


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
def test_numbers_at_the_end_of_a_sentence(kind: str) -> None:
    """A full stop or comma behind a number is not a decimal mark."""
    check(kind, "there is 1. And 12, 1, 1", ["1", "12"], ["1", "12", "1", "1"])


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
def test_phrases(kind: str) -> None:
    """Words of several words are found whole, over any white space, and the longest wins."""
    found = check(kind, "at the top left of Top  Left", ["top left", "left"], ["top left", "top left"])
    assert all(match.stop - match.start >= 2 for match in found)
    check(kind, "left of the top left", ["left", "top left"], ["left", "top left"])
    check(kind, "on top of the top left", ["top", "top left"], ["top", "top left"])
    check(kind, "a t-shirt and a shirt", ["t-shirt", "shirt"], ["t-shirt", "shirt"])


def test_bare_space_token_is_no_part_of_a_number() -> None:
    """ "▁" before a digit is a token of its own; the number's first token is the digit."""
    tokenizer = TOKENIZERS["sentence-piece"]()
    ids = encode(tokenizer, "a 12 is")
    assert tokenizer.convert_ids_to_tokens(ids[1:4]) == ["▁", "1", "2"]
    assert find_words(tokenizer, ids, ["12"]) == [WordMatch("12", 2, 4)]


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
@pytest.mark.parametrize("word", ["école", "дом", "ёж", "红色"])
def test_words_that_begin_with_a_character_of_several_tokens(kind: str, word: str) -> None:
    """The first byte of the first character belongs to the word: it is there that the model decides to say it."""
    check(kind, f"a {word} is", [word], [word])
    check(kind, word, [word], [word])


@pytest.mark.parametrize(("text", "word"), [("ſnow", "snow"), ("\u212ain", "kin"), ("kın", "kin"), ("kİn", "kin")])
def test_letters_that_unicode_folds_together(text: str, word: str) -> None:
    """Long s, Kelvin sign and Turkish i do not stop the search: the word is found or it is not."""
    tokenizer = TOKENIZERS["byte-level"]()
    found = find_words(tokenizer, encode(tokenizer, f"{text} and {word}"), [word])
    assert {match.word for match in found} == {word}


def test_words_keep_the_form_they_were_asked_in() -> None:
    """The match names the word as the caller wrote it, and any iterable of words will do."""
    tokenizer = TOKENIZERS["byte-level"]()
    ids = encode(tokenizer, "a TRIANGLE and snow")
    assert [match.word for match in find_words(tokenizer, ids, ["Snow", "triAngle"])] == ["triAngle", "Snow"]
    assert [match.word for match in find_words(tokenizer, ids, (word for word in ["snow"]))] == ["snow"]


@given(KINDS, st.text(max_size=12), st.text(max_size=12))
def test_a_word_is_found_among_any_characters(kind: str, before: str, after: str) -> None:
    """Whatever else is in a text, emoji, controls and all scripts, a word between spaces is found with its tokens."""
    tokenizer = TOKENIZERS[kind]()
    ids = encode(tokenizer, f"{before} triangle {after}")
    found = find_words(tokenizer, ids, ["triangle"])
    assert [spelled(tokenizer, ids[match.start : match.stop]).strip() for match in found] == [b"triangle"]


@pytest.mark.parametrize("words", [[], [""], ["  "], ["red", ""]])
def test_empty_words_are_refused(words: list[str]) -> None:
    """There is nothing to look for; the error shows what was given."""
    with pytest.raises(BadInputError, match="non-empty"):
        word_pattern(words)


def test_characters_with_a_meaning_in_patterns_stand_for_themselves() -> None:
    """A word is text, not a regular expression."""
    assert word_pattern(["a.c"]).search("abc") is None
    assert word_pattern(["a.c"]).search("a.c")


def test_words_the_model_cannot_say_are_refused_by_name(llava: HookedMM) -> None:
    """Words outside the shipped vocabulary are refused and named; those inside, in any case, are accepted."""
    check_words(llava.tokenizer, ["red", "Red", "top left", "triangle"])
    for words in (["elephant"], ["red", "elephant"], ["red elephant"], [""], ["red", " "]):
        with pytest.raises(UnknownWordError, match=repr(words[-1])):
            check_words(llava.tokenizer, words)
    check_words(TOKENIZERS["byte-level"](), ["elephant", "école"])
