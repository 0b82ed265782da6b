"""Captions against people's captions of the same pictures: CIDEr, BLEU-1 to BLEU-4 and ROUGE-L, without Java.

CIDEr is `steering.cider`; BLEU (Papineni et al. 2002) and ROUGE-L (Lin 2004) are torchmetrics'. Captions are split by
`words_of`, which is not the Penn Treebank tokeniser that published COCO scores come from (a Java program): compare
these scores with each other, not to the last decimal with published ones.

- BLEU-n is of the corpus, with the geometric mean over n-grams of 1 to n, no smoothing, and for the brevity penalty
  the reference closest in length, the shorter of two as close.
- ROUGE-L is the mean over captions of the F1 of the longest common subsequence, of the reference where it is highest.
  (COCO's own weighs recall more, beta = 1.2, and takes precision and recall from different references.)
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torchmetrics.functional.text import bleu_score, rouge_score

from hooked_mm.errors import BadInputError
from steering.cider import LONGEST, cider
from steering.gathered import RecordMetric, check_lengths

WORD = re.compile(r"\w+(?:['’-]\w+)*")


def words_of(caption: str) -> list[str]:
    """The words of a caption in lower case, without punctuation but what stands within a word (man's, t-shirt)."""
    return WORD.findall(caption.lower())


def check(captions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Refuses lists of different lengths, and a text where a list of references is wanted.

    Raises:
        BadInputError: If they are not lists of the same pictures.
    """
    check_lengths(captions=captions, references=references)
    for sample, given in enumerate(references):
        if isinstance(given, str):
            raise BadInputError(f"references={given!r} is one text; write [{given!r}]", sample)


def caption_scores(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """How much captions are like people's.

    Args:
        captions: One per picture.
        references: Per picture, the captions that people gave.

    Returns:
        "CIDEr" (0 to 10; published ones are often times 100), "BLEU-1" to "BLEU-4" and "ROUGE-L" (0 to 1).

    Raises:
        BadInputError: If there are no captions, one has no references or one text for a list of them, or the lists
            differ in length.
    """
    check(captions, references)
    own = [words_of(caption) for caption in captions]
    # In the order of their lengths, since torchmetrics takes the first of two that are as close.
    theirs = [sorted((words_of(caption) for caption in given), key=len) for given in references]
    # First, since it alone refuses missing captions and references.
    scores = {"CIDEr": cider(own, theirs)[0]}
    texts, targets = [" ".join(words) for words in own], [[" ".join(words) for words in given] for given in theirs]
    for n in range(1, LONGEST + 1):
        scores[f"BLEU-{n}"] = float(bleu_score(texts, targets, n_gram=n))
    # With a tokeniser of our own, torchmetrics needs no files from the network.
    rouge = rouge_score(texts, targets, accumulate="best", normalizer=str, tokenizer=str.split, rouge_keys="rougeL")
    return scores | {"ROUGE-L": float(rouge["rougeL_fmeasure"])}


class CaptionScores(RecordMetric):
    """`caption_scores` of the captions of all processes.

    It keeps the captions: CIDEr needs all references before it scores the first caption, and torchmetrics' own ROUGE
    can't be gathered from processes that have different numbers of samples.
    """

    def update(self, captions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Add captions and the references of the same pictures.

        Raises:
            BadInputError: If the lists differ in length, or references are one text.
        """
        check(captions, references)
        self.keep((own, list(given)) for own, given in zip(captions, references, strict=True))

    def compute(self) -> dict[str, float]:
        """The scores.

        Raises:
            BadInputError: If there are no captions, or one has no references.
        """
        records = self.records()
        return caption_scores([own for own, _ in records], [given for _, given in records])
