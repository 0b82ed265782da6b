"""BERTScore with a miniature BERT: greedy matching written out in float64, and what torchmetrics does wrong alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torchmetrics.functional.text.bert import bert_score as torchmetrics_bert_score
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

from concept_dict.bert_score import BertScorer, bert_score
from hooked_mm.errors import BadInputError

SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
WORDS = "a the red blue green ring star circle big small top left in snow sea forest".split()
TEXTS = ["red", "a big red ring in the snow", "blue star", "small green circle top left", "sea", "the forest in snow"]
CAPTIONS = ["a red ring", "a red ring in the snow", "a big blue star", "circle", "the blue sea a ring", "a star"]


def _save(path: Path, end: str = " [SEP]") -> Path:
    vocabulary = {token: place for place, token in enumerate([*SPECIAL.values(), *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    ids = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing(f"[CLS] $A{end}", special_tokens=ids)
    PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=12, **SPECIAL).save_pretrained(path)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
    model = BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=12, **shape))
    # Tokens differ by more than their positions do, and share a direction, as those of trained models do.
    torch.nn.init.normal_(model.embeddings.word_embeddings.weight, std=0.3)
    model.embeddings.word_embeddings.weight.data += 0.3 * torch.randn(16)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with random weights, saved with its tokenizer."""
    return _save(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def scorer(folder: Path) -> BertScorer:
    """That BERT, loaded."""
    return BertScorer(folder)


def _by_hand(folder: Path, text: str, reference: str, layer: int = -1) -> list[float]:
    """Precision, recall, F1 in float64: the mean of every token's best cosine (0 at least), without special tokens."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).double().eval()
    sides = []
    for item in (text, reference):
        with torch.no_grad():
            states = model(**tokenizer(item, return_tensors="pt"), output_hidden_states=True).hidden_states[layer][0]
        sides.append([state / state.norm() for state in states[1:-1]])
    precision = float(np.mean([max(0, *(float(a @ b) for b in sides[1])) for a in sides[0]]))
    recall = float(np.mean([max(0, *(float(a @ b) for a in sides[0])) for b in sides[1]]))
    return [precision, recall, 2 * precision * recall / (precision + recall)]


@pytest.mark.parametrize("layer", [None, 0, 2])
def test_scores_by_hand(folder: Path, layer: int | None) -> None:
    """Every pair, texts of all lengths and in an order that is not that of their lengths."""
    found = BertScorer(folder, layer)(TEXTS, CAPTIONS)
    for place, pair in enumerate(zip(TEXTS, CAPTIONS, strict=True)):
        expected = _by_hand(folder, *pair, layer=-1 if layer is None else layer)
        np.testing.assert_allclose([found.precision[place], found.recall[place], found.f1[place]], expected, atol=1e-5)
    assert np.std(found.f1) > 0.01, "a test in which all pairs score alike would find no wrong order"


def test_torchmetrics_brings_more_than_two_pairs_into_a_wrong_order(folder: Path, scorer: BertScorer) -> None:
    """Why pairs go to it two by two: all at once, most scores are those of other pairs."""
    options: dict[str, Any] = {"model": scorer.model, "user_tokenizer": scorer.tokenizer, "max_length": 12}
    at_once = torchmetrics_bert_score(TEXTS, CAPTIONS, **options)["f1"]
    right = scorer(TEXTS, CAPTIONS).f1
    wrong = np.abs(np.asarray(at_once) - right) > 1e-4
    if not wrong.any():
        pytest.fail("torchmetrics keeps the order now: pairs can go to it in larger batches (bert_score.PAIRS)")
    for place in range(0, 6, 2):
        two = torchmetrics_bert_score(TEXTS[place : place + 2], CAPTIONS[place : place + 2], **options)["f1"]
        np.testing.assert_allclose(two, right[place : place + 2], atol=1e-5)


def test_properties(scorer: BertScorer) -> None:
    """A text with itself has 1; exchanged, precision and recall change places; companions and repeats do not matter."""
    itself = scorer(TEXTS, TEXTS)
    np.testing.assert_allclose([itself.precision, itself.recall, itself.f1], 1, atol=1e-5)
    there, back = scorer(TEXTS, CAPTIONS), scorer(CAPTIONS, TEXTS)
    np.testing.assert_allclose(there.precision, back.recall, atol=1e-5)
    np.testing.assert_allclose(there.f1, back.f1, atol=1e-5)
    order = [3, 3, 0, 5, 3]
    some = scorer([TEXTS[i] for i in order], [CAPTIONS[i] for i in order])
    np.testing.assert_allclose(some.f1, there.f1[order], atol=1e-5)


def test_an_empty_text_has_no_score(scorer: BertScorer) -> None:
    """NaN, and the others keep their places."""
    found = scorer(["red", "", "sea", "  "], ["a red ring", "a star", "", "sea"])
    assert np.isnan(found.f1).tolist() == [False, True, True, True]
    assert found.f1[0] == pytest.approx(scorer(["red"], ["a red ring"]).f1[0], abs=1e-6)
    assert len(scorer([], []).f1) == 0


def test_words_of_concepts_with_captions(folder: Path, scorer: BertScorer) -> None:
    """The strongest concept's words in one line, by hand; no active concept, no score; the baseline."""
    pooled = np.array([[2.0, 0.5], [0.0, 1.0], [0.0, 0.0]])
    words, captions = [["red", "ring", "star", "sea"], ["blue"]], CAPTIONS[:3]
    found = bert_score(scorer, captions, pooled, words)
    assert sorted(found) == [1, 3]
    expected = [_by_hand(folder, "red ring star", captions[0])[2], _by_hand(folder, "blue", captions[1])[2]]
    np.testing.assert_allclose(found[3].samples, [*expected, np.nan], atol=1e-5)
    assert found[3].mean == pytest.approx(np.mean(expected), abs=1e-5)
    assert np.isnan(found[1].random).tolist() == [False, False, True]
    # With one word to draw from the baseline is that word's score.
    only = bert_score(scorer, captions, pooled, words, counts=[1], vocabulary=["sea"])[1]
    np.testing.assert_allclose(only.random[:2], [_by_hand(folder, "sea", c)[2] for c in captions[:2]], atol=1e-5)


def test_what_can_not_be_scored(folder: Path, scorer: BertScorer, tmp_path: Path) -> None:
    """Folders, layers, tokenizers without the special tokens, texts that are too long, counts that differ."""
    with pytest.raises(BadInputError, match=r"there is no folder .*give one that holds a BERT"):
        BertScorer(tmp_path / "none")
    with pytest.raises(BadInputError, match=r"layer=4; the model in .* has layers 0 to 3"):
        BertScorer(folder, 4)
    with pytest.raises(BadInputError, match="adds 1 special tokens"):
        BertScorer(_save(tmp_path / "open", end=""))
    with pytest.raises(BadInputError, match=r"14 tokens is too long for this model, which reads 12: 'red red"):
        scorer(["red " * 12], ["a ring"])
    with pytest.raises(BadInputError, match="2 texts for 1 references"):
        scorer(["red", "blue"], ["sea"])
    with pytest.raises(BadInputError, match="3 captions for 2 samples"):
        bert_score(scorer, CAPTIONS[:3], np.ones((2, 1)), [["red"]])
