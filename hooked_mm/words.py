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


def token_spans(tokenizer: Any, ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """The decoded text and, per token, the characters (start, stop) it spells or helps to spell.

    By decoding growing prefixes, which is right for every tokenizer: a token's text may depend on what precedes it, and
    one character may take several tokens. A prefix that ends within a character decodes to a replacement character
    there; each of that character's tokens counts as spelling it.
    """
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    spans, last = [], 0
    for count in range(1, len(ids) + 1):
        prefix = tokenizer.decode(ids[:count], clean_up_tokenization_spaces=False)
        same = last
        while same < min(len(prefix), len(text)) and prefix[same] == text[same]:
            same += 1
        spans.append((last, same + 1 if len(prefix) > same else same))
        last = same
    return text, spans


def word_pattern(words: Iterable[str]) -> re.Pattern[str]:
    """A pattern with a group for each word, as a whole word: case ignored, inner white space free, longest first.

    Hyphens, and apostrophes between letters, belong to words ("t-shirt" has no "shirt", "cat's" no "cat"; 'stop' in
    quotes is "stop"), as a decimal mark belongs to a number.
    """
    asked = list(words)
    if not asked or not all(word.strip() for word in asked):
        raise BadInputError(f"words of interest must be non-empty; got {asked!r}")
    # Group names carry the order in which the words were asked for through their sorting by length.
    by_length = sorted(enumerate(asked), key=lambda item: len(" ".join(item[1].split())), reverse=True)
    options = "|".join(
        f"(?P<word{index}>" + r"\s+".join(re.escape(part) for part in word.split()) + ")" for index, word in by_length
    )
    return re.compile(rf"(?<![\w-])(?<!\w['’])(?<!\d[.,])(?:{options})(?![\w-])(?!['’]\w)(?![.,]\d)", re.IGNORECASE)


def find_words(tokenizer: Any, ids: Sequence[int], words: Iterable[str]) -> list[WordMatch]:
    """Every whole-word occurrence in the sequence, in order.

    Args:
        tokenizer: A transformers tokenizer.
        ids: Token ids, for instance of an answer.
        words: Words or phrases; case and a leading space do not matter.
    """
    asked = list(words)
    text, spans = token_spans(tokenizer, list(ids))
    found = []
    for match in word_pattern(asked).finditer(text):
        covered = [i for i, (start, stop) in enumerate(spans) if start < match.end() and stop > match.start()]
        word = asked[int((match.lastgroup or "word0").removeprefix("word"))]
        found.append(WordMatch(word, covered[0], covered[-1] + 1))
    return found


def can_make(tokenizer: Any, word: str) -> bool:
    """Whether the tokenizer has a way to write the word, without the unknown token."""
    ids = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
    return bool(ids) and (tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids)


def check_words(tokenizer: Any, words: Iterable[str]) -> None:
    """Refuse words that the tokenizer can't make, since they could never be found.

    Raises:
        UnknownWordError: If a word tokenizes to the unknown token.
    """
    for word in words:
        if not can_make(tokenizer, word):
            raise UnknownWordError(
                f"the tokenizer can't make the word {word!r} (it contains the unknown token), so the model can never "
                "say it; choose a word of its vocabulary"
            )
