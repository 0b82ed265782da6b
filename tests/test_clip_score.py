"""CLIPScore with a miniature CLIP: torchmetrics' numbers, float64 by hand, planted concepts, and chance."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torchmetrics.functional.multimodal import clip_score as torchmetrics_clip_score
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
)

from concept_dict.clip_score import (
    ClipEncoder,
    active_concepts,
    clip_score,
    clip_similarity,
    random_words,
    words_of_samples,
)
from hooked_mm.errors import BadInputError
from hooked_mm.processors import image_processor_class

WORDS = ["red", "blue", "ring", "star", "top", "left", "sea", "snow"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP with random weights, saved with its processor."""
    path = tmp_path_factory.mktemp("clip")
    vocabulary = {token: place for place, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=8, **special)
    shared = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**shared, "vocab_size": len(vocabulary), "max_position_embeddings": 8, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**text, "bos_token_id": 1},
        vision_config={**shared, "image_size": 16, "patch_size": 8},
        projection_dim=4,
    )
    model = CLIPModel(config)
    # Large embeddings and few dimensions, so that words differ and cosines have both signs.
    torch.nn.init.normal_(model.text_model.embeddings.token_embedding.weight)
    model.save_pretrained(path)
    pictures = image_processor_class("CLIP")(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(pictures, tokenizer).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def encoder(folder: Path) -> ClipEncoder:
    """That CLIP, loaded."""
    return ClipEncoder(folder, batch_size=3)


def _pixels(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    # Strong plain colours with noise, so that features differ.
    return np.clip(rng.integers(0, 256, 3) + rng.normal(0, 40, (16, 16, 3)), 0, 255).astype(np.uint8)


PICTURES = [Image.fromarray(_pixels(seed)) for seed in range(7)]


class _Tensors:
    """A CLIP as torchmetrics expects it: features are tensors, not outputs with fields."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config

    def to(self, device: Any) -> _Tensors:
        return self

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_features(pixel_values=pixel_values).pooler_output

    def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model.get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output


@pytest.fixture(scope="module")
def theirs(encoder: ClipEncoder) -> Callable[[list[int], list[str]], float]:
    """Torchmetrics' score of pictures and texts, with the same CLIP."""

    def score(pictures: list[int], texts: list[str]) -> float:
        tensors = [torch.as_tensor(_pixels(seed)).permute(2, 0, 1) for seed in pictures]
        loaded: Any = lambda: (_Tensors(encoder.model), encoder.processor)  # noqa: E731
        with torch.no_grad():
            return float(torchmetrics_clip_score(tensors, texts, loaded))

    return score


def test_single_pairs_equal_torchmetrics(encoder: ClipEncoder, theirs: Callable) -> None:
    """Times 40, for positive cosines and for negative ones, which both clamp to 0 where there is only one."""
    table = clip_similarity(encoder.images(PICTURES), encoder.texts(WORDS))
    assert 0 < int((table > 0).sum()) < table.numel(), "both signs have to occur"
    for picture in range(len(PICTURES)):
        for place, word in enumerate(WORDS):
            assert 40 * float(table[picture, place]) == pytest.approx(theirs([picture], [word]), abs=1e-3)


def test_a_mean_equals_torchmetrics_where_all_cosines_are_positive(encoder: ClipEncoder, theirs: Callable) -> None:
    """With a negative one among them torchmetrics is lower, since it clamps the mean only, and ours each sample."""
    table = clip_similarity(encoder.images(PICTURES), encoder.texts(WORDS)).numpy()
    best, worst = table.argmax(axis=1), table.argmin(axis=1)
    good = [picture for picture in range(len(PICTURES)) if table[picture, best[picture]] > 0]
    assert len(good) > 2
    said = [WORDS[best[picture]] for picture in good]
    ours = float(np.mean([table[picture, best[picture]] for picture in good]))
    assert 40 * ours == pytest.approx(theirs(good, said), abs=1e-3)
    assert (table[good, worst[good]] == 0).any()
    bad = next(picture for picture in good if table[picture, worst[picture]] == 0)
    mixed = theirs([*good, bad], [*said, WORDS[worst[bad]]])
    assert mixed < 40 * ours * len(good) / (len(good) + 1) - 1e-3


def test_features_do_not_depend_on_the_batch(folder: Path, encoder: ClipEncoder, tmp_path: Path) -> None:
    """Batches of any size, padding, files instead of pictures: the features of one by one, by the model itself."""
    model, processor = AutoModel.from_pretrained(folder).eval(), encoder.processor
    texts = ["red", "red ring top left", "snow sea"]
    with torch.no_grad():
        one = [model.get_text_features(**processor(text=[t], return_tensors="pt")).pooler_output[0] for t in texts]
        two = [model.get_image_features(**processor(images=p, return_tensors="pt")).pooler_output[0] for p in PICTURES]
    for found, raw in ((encoder.texts(texts), one), (encoder.images(PICTURES), two)):
        expected = torch.stack(raw)
        torch.testing.assert_close(found, expected / expected.norm(dim=1, keepdim=True), atol=1e-5, rtol=0)
    PICTURES[0].save(tmp_path / "0.png")
    torch.testing.assert_close(encoder.images([str(tmp_path / "0.png")]), encoder.images(PICTURES[:1]))


@given(n=st.integers(1, 5), m=st.integers(1, 5), seed=st.integers(0, 10_000))
def test_similarity_by_hand(n: int, m: int, seed: int) -> None:
    """2.5 max(cos, 0) in float64, of features of any length."""
    rng = np.random.default_rng(seed)
    images, texts = rng.standard_normal((n, 6)) * 3, rng.standard_normal((m, 6))
    expected = [[2.5 * max(a @ b / np.linalg.norm(a) / np.linalg.norm(b), 0) for b in texts] for a in images]
    np.testing.assert_allclose(clip_similarity(torch.as_tensor(images), torch.as_tensor(texts)), expected, atol=1e-5)


def test_words_are_those_of_the_strongest_concepts(encoder: ClipEncoder) -> None:
    """Per sample by hand: mean over its words; words and pictures are encoded once; no active concept, no score."""
    pooled = np.array([[0.0, 2.0, 1.0], [3.0, 0.0, 0.5], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    words = [["red", "ring", "star", "sea"], ["blue", "red"], []]
    calls: list[list] = []

    def texts(given: list[str]) -> torch.Tensor:
        calls.append(list(given))
        return ClipEncoder.texts(encoder, given)

    counting: Any = SimpleNamespace(texts=texts, images=encoder.images)
    found = clip_score(counting, PICTURES[:4], pooled, words)
    assert calls == [["red", "ring", "star", "sea", "blue"]]
    table = clip_similarity(encoder.images(PICTURES), encoder.texts(calls[0])).numpy()
    np.testing.assert_allclose(found[1].samples, [table[0, 4], table[1, 0], np.nan, np.nan], atol=1e-6)
    expected = [table[0, [4, 0]].mean(), table[1, [0, 1, 2]].mean(), np.nan, np.nan]
    np.testing.assert_allclose(found[3].samples, expected, atol=1e-6)
    assert found[3].mean == pytest.approx(np.mean(expected[:2]))
    again = clip_score(counting, encoder.images(PICTURES[:4]), pooled, words, counts=[3])
    np.testing.assert_array_equal(again[3].samples, found[3].samples)
    np.testing.assert_array_equal(again[3].random, found[3].random)


def test_words_that_fit_beat_random_ones(encoder: ClipEncoder) -> None:
    """Concepts called by the best word for each picture score above random words, those by the worst below."""
    table = clip_similarity(encoder.images(PICTURES), encoder.texts(WORDS)).numpy()
    pooled = np.eye(len(PICTURES))
    for choose, better in ((np.argmax, True), (np.argmin, False)):
        words = [[WORDS[place]] for place in choose(table, axis=1)]
        found = clip_score(encoder, PICTURES, pooled, words, counts=[1], vocabulary=WORDS)[1]
        assert (found.mean > found.random_mean) == better
    features = encoder.images(PICTURES)
    chance = [
        clip_score(encoder, features, pooled, words, counts=[1], vocabulary=WORDS, seed=seed)[1].random_mean
        for seed in range(40)
    ]
    assert np.mean(chance) == pytest.approx(float(table.mean()), rel=0.1)


def test_active_concepts_and_their_words() -> None:
    """Strongest first, none that is not active; so many concepts, so many words of each."""
    pooled = np.array([[0.5, 2.0, 0.0], [0.0, 0.0, -1.0]])
    assert active_concepts(pooled, 3) == [[1, 0], []]
    words = [["a", "b"], ["c", "d", "e"], ["f"]]
    assert words_of_samples(pooled, words, concepts=2, count=2) == [["c", "d", "a", "b"], []]
    assert words_of_samples(pooled, words) == [["c"], []]
    with pytest.raises(BadInputError, match="of 3 concepts, but words of 2"):
        words_of_samples(pooled, words[:2])
    with pytest.raises(BadInputError, match="concepts=0, count=1"):
        words_of_samples(pooled, words, concepts=0)


def test_random_words() -> None:
    """As many as there were, all different, the same for a seed; each about as often."""
    said = [["x"] * (number % 4) for number in range(400)]
    drawn = random_words(said, [*WORDS, "red"])
    assert [len(own) for own in drawn] == [len(own) for own in said]
    assert all(len(set(own)) == len(own) for own in drawn)
    assert drawn == random_words(said, WORDS) != random_words(said, WORDS, seed=1)
    share = [sum(own.count(word) for own in drawn) / sum(map(len, drawn)) for word in WORDS]
    np.testing.assert_allclose(share, 1 / 8, atol=0.04)
    assert sorted(random_words([["x"] * 5], ["a", "b"])[0]) == ["a", "b"]
    with pytest.raises(BadInputError, match="no words to draw from"):
        random_words(said, [])


def test_what_can_not_be_scored(encoder: ClipEncoder, tmp_path: Path) -> None:
    """Folders that are not there or hold something else, counts that differ, concepts without words."""
    with pytest.raises(BadInputError, match=r"there is no folder .*give one that holds a CLIP"):
        ClipEncoder(tmp_path / "none")
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=9, **shape)).save_pretrained(tmp_path)
    with pytest.raises(BadInputError, match=r"holds a BertModel, which has no features of images and texts"):
        ClipEncoder(tmp_path)
    with pytest.raises(BadInputError, match="7 images for 2 samples"):
        clip_score(encoder, PICTURES, np.ones((2, 1)), [["red"]])
    with pytest.raises(BadInputError, match="no concept has words"):
        clip_score(encoder, PICTURES[:2], np.ones((2, 1)), [[]])
    with pytest.raises(BadInputError, match="no images for CLIPScore"):
        encoder.images([])
