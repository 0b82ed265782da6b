"""Finding whole words, with all their sub-tokens, in a sequence of token ids.

A word is found in the *decoded text*, by its boundaries, and mapped back to the tokens that spell it. Never by
substring ("no" in "snow", "cat" in "cattle"), nor by its first sub-token alone (which "1" and "2" may share).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hooked_mm.errors import BadInputError, UnknownWordError


@dataclass(frozen=True)
class WordMatch:
    """A word found in a sequence: tokens `start` to `stop` (exclusive) spell it; `word` as it was asked for."""

    word: str
    start: int
    stop: int


def token_ends(tokenizer: Any, ids: Sequence[int]) -> tuple[str, list[int]]:
    """The decoded text and, per token, where its characters end in it.

    By decoding growing prefixes, which is right for every tokenizer: a token's text may depend on what precedes it, and
    one character may take several tokens (a prefix then decodes to a replacement character, which is not counted).
    """
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    ends, last = [], 0
    for count in range(1, len(ids) + 1):
        prefix = tokenizer.decode(ids[:count], clean_up_tokenization_spaces=False)
        same = next(
            (i for i, (a, b) in enumerate(zip(prefix, text, strict=False)) if a != b), min(len(prefix), len(text))
        )
        last = max(last, same)
        ends.append(last)
    return text, ends


def word_pattern(words: Iterable[str]) -> re.Pattern[str]:
    """A pattern for any of the words as whole words: case ignored, inner white space free, longest first.

    Hyphens and apostrophes belong to words ("t-shirt" has no "shirt"), as a decimal mark belongs to a number.
    """
    ordered = sorted({word.strip().lower() for word in words}, key=len, reverse=True)
    if not ordered or not all(ordered):
        raise BadInputError(f"words of interest must be non-empty; got {list(words)!r}")
    options = "|".join(r"\s+".join(re.escape(part) for part in word.split()) for word in ordered)
    return re.compile(rf"(?<![\w'’-])(?<!\d[.,])(?:{options})(?![\w'’-])(?![.,]\d)", re.IGNORECASE)


def find_words(tokenizer: Any, ids: Sequence[int], words: Iterable[str]) -> list[WordMatch]:
    """Every whole-word occurrence in the sequence, in order.

    Args:
        tokenizer: A transformers tokenizer.
        ids: Token ids, for instance of an answer.
        words: Words or phrases; case and a leading space do not matter.
    """
    text, ends = token_ends(tokenizer, list(ids))
    starts = [0, *ends[:-1]]
    canonical = {" ".join(word.lower().split()): word for word in words}
    found = []
    for match in word_pattern(words).finditer(text):
        covered = [
            i for i, (a, b) in enumerate(zip(starts, ends, strict=True)) if a < match.end() and b > match.start()
        ]
        # A token of white space alone ("▁" before a digit) is no part of the word.
        while covered and not text[starts[covered[0]] : ends[covered[0]]].strip():
            covered.pop(0)
        word = canonical[" ".join(match.group().lower().split())]
        found.append(WordMatch(word, covered[0], covered[-1] + 1))
    return found


def check_words(tokenizer: Any, words: Iterable[str]) -> None:
    """Refuse words that the tokenizer can't make, since they could never be found.

    Raises:
        UnknownWordError: If a word tokenizes to the unknown token.
    """
    for word in words:
        ids = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        if not ids or (tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids):
            raise UnknownWordError(
                f"the tokenizer can't make the word {word!r} (it contains the unknown token), so the model can never "
                "say it; choose a word of its vocabulary"
            )
