"""BERTScore of concepts' words with captions: do the words say what the caption says?

BERTScore (Zhang et al. 2020, arXiv 1904.09675) by torchmetrics with a model from a local folder: every token of the
words is matched with the most similar token of the caption (precision), and the reverse (recall), by cosine of
contextual embeddings, 0 at least; F1 is their harmonic mean. Beside it stands the score of random words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torchmetrics.functional.text.bert import bert_score as torchmetrics_bert_score
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

from concept_dict.clip_score import WordScore, random_words, words_of_samples
from hooked_mm.errors import BadInputError

PAIRS = 2
"""Pairs in one call of torchmetrics, which brings more than two into a wrong order: it sorts texts by length and undoes
that by applying the order once more instead of its inverse (torchmetrics 1.9; for two they are the same)."""


@dataclass(frozen=True)
class BertScores:
    """Precision, recall and F1 per pair of texts; NaN for an empty text."""

    precision: Float[np.ndarray, " n"]
    recall: Float[np.ndarray, " n"]
    f1: Float[np.ndarray, " n"]


class BertScorer:
    """A BERT (RoBERTa, ...) of transformers, from a local folder.

    Args:
        folder: With the model and its tokenizer, which puts one special token before and one behind a text; nothing is
            downloaded.
        layer: Whose hidden states to compare, 0 for the embeddings; the last unless given. (The paper names the best
            one for known models: 17 for roberta-large, 9 for bert-base-uncased.)
        device: Where to run it.

    Raises:
        BadInputError: If there is no such folder, no such layer, or the tokenizer adds other special tokens.
    """

    def __init__(self, folder: str | Path, layer: int | None = None, device: str | torch.device = "cpu") -> None:
        if not Path(folder).is_dir():
            raise BadInputError(
                f"there is no folder {str(folder)!r}; give one that holds a BERT of transformers with its tokenizer "
                "(save_pretrained, or a downloaded snapshot)"
            )
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
        layers = self.model.config.num_hidden_layers
        if layer is not None and not 0 <= layer <= layers:
            raise BadInputError(f"layer={layer}; the model in {str(folder)!r} has layers 0 to {layers}")
        if self.tokenizer.num_special_tokens_to_add() != 2:
            raise BadInputError(
                f"the tokenizer in {str(folder)!r} adds {self.tokenizer.num_special_tokens_to_add()} special tokens to "
                "a text, but BERTScore leaves out the first and the last token; give a model with both, such as BERT"
            )
        # What torchmetrics takes for "the last" when it is not told.
        self.layer, self.device = layer, torch.device(device)
        # Some tokenizers name no limit; positions then are the model's.
        self.longest = min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)

    def __call__(self, texts: Sequence[str], references: Sequence[str]) -> BertScores:
        """Scores of texts with their references, pair by pair; equal pairs are scored once.

        Raises:
            BadInputError: If there is not one reference per text, or one is too long for the model.
        """
        if len(texts) != len(references):
            raise BadInputError(f"{len(texts)} texts for {len(references)} references; there must be one for each")
        pairs = list(zip(texts, references, strict=True))
        wanted = [pair for pair in dict.fromkeys(pairs) if all(text.strip() for text in pair)]
        scores: dict[tuple[str, str], list[float]] = {}
        for start in tqdm(range(0, len(wanted), PAIRS), desc="BERTScore", delay=2, leave=False):
            part = wanted[start : start + PAIRS]
            found = torchmetrics_bert_score(
                [text for text, _ in part],
                [reference for _, reference in part],
                model=self.model,
                user_tokenizer=self.tokenizer,
                num_layers=self.layer,
                max_length=self._length([text for pair in part for text in pair]),
                device=self.device,
                batch_size=PAIRS,
            )
            columns = [torch.as_tensor(found[name]).reshape(-1).tolist() for name in ("precision", "recall", "f1")]
            scores |= {pair: list(values) for pair, *values in zip(part, *columns, strict=True)}
        missing = [float("nan")] * 3
        table = np.array([scores.get(pair, missing) for pair in pairs], float).reshape(-1, 3)
        return BertScores(*table.T)

    def _length(self, texts: Sequence[str]) -> int:
        """Tokens of the longest text; refuses what the model can't read whole."""
        lengths = [len(ids) for ids in self.tokenizer(list(texts))["input_ids"]]
        if max(lengths) > self.longest:
            text = texts[int(np.argmax(lengths))]
            raise BadInputError(
                f"a text of {max(lengths)} tokens is too long for this model, which reads {self.longest}: "
                f"{text[:60]!r}...; shorten the captions, or give another model"
            )
        return max(lengths)


def bert_score(
    scorer: BertScorer,
    captions: Sequence[str],
    pooled: Float[np.ndarray, "n k"],
    words: Sequence[Sequence[str]],
    *,
    concepts: int = 1,
    counts: Sequence[int] = (1, 3),
    vocabulary: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[int, WordScore]:
    """F1 of BERTScore of each sample's caption with the words of its strongest concepts, in one line.

    Args:
        scorer: The BERT.
        captions: One per sample.
        pooled: Activations of the samples (see `metrics.pool_samples`).
        words: Per concept its words, best first.
        concepts: How many concepts of each sample count.
        counts: How many words of each concept count: top-1, top-3, ...
        vocabulary: What random words are drawn from; all concepts' words unless given.
        seed: Of that draw.

    Returns:
        Count of words -> score beside that of as many random words; NaN for samples without words or caption.

    Raises:
        BadInputError: If there is not one caption per sample, or no concept has words.
    """
    if len(captions) != len(pooled):
        raise BadInputError(f"{len(captions)} captions for {len(pooled)} samples; there must be one for each")
    options = [word for own in words for word in own] if vocabulary is None else list(vocabulary)
    found = {}
    for count in counts:
        said = words_of_samples(pooled, words, concepts=concepts, count=count)
        chance = random_words(said, options, seed=seed)
        both = scorer([" ".join(own) for own in [*said, *chance]], [*captions, *captions]).f1
        found[count] = WordScore(both[: len(said)], both[len(said) :])
    return found
