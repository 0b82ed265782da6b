"""Probes: planted truths are found as well as theory says, chance is chance, and the rows are the right positions."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu, norm
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.runner import match_names
from hooked_mm.scenes.captions import STYLES, caption
from hooked_mm.scenes.dataset import picture
from hooked_mm.scenes.world import Scene, SceneObject, scene
from hooked_mm.small import probes
from hooked_mm.small.families import FAMILIES, build
from hooked_mm.small.probes import (
    RULES,
    SPOKEN,
    VALUES,
    Ceiling,
    Part,
    auroc,
    best,
    ceilings,
    collect,
    main,
    probe,
    shuffled,
    table,
)

HOOKS = ["hook_embed", "blocks.2.hook_resid_post"]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> HookedMM:
    """A small model of each family before training."""
    torch.manual_seed(3)
    made, processor = build(request.param)
    return HookedMM(made.eval().requires_grad_(False), processor, check=False)


@given(rows=st.integers(2, 30), levels=st.integers(1, 9), seed=st.integers(0, 999))
def test_auroc_is_the_share_of_pairs_in_order(rows: int, levels: int, seed: int) -> None:
    """As scikit-learn and scipy's rank sum have it, with many ties (few levels) or none but by chance."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, levels, (rows, 3)).astype(float)
    truth = rng.random((rows, 3)) < 0.5
    truth[0], truth[1] = True, False
    found = auroc(scores, truth)
    np.testing.assert_allclose(found, roc_auc_score(truth, scores, average=None), atol=1e-12)
    for column in range(3):
        above, below = scores[truth[:, column], column], scores[~truth[:, column], column]
        np.testing.assert_allclose(found[column], mannwhitneyu(above, below).statistic / (len(above) * len(below)))
        pairs = (above[:, None] > below).mean() + 0.5 * (above[:, None] == below).mean()
        np.testing.assert_allclose(found[column], pairs)


def test_auroc_by_hand() -> None:
    """Positives 3, 2 against negatives 2, 1: three pairs in order and one tie of four; undefined without negatives."""
    scores = np.array([[3.0, 1], [2, 2], [2, 3], [1, 4]])
    truth = np.array([[True, True], [True, True], [False, True], [False, True]])
    found = auroc(scores, truth)
    assert found[0] == pytest.approx(3.5 / 4)
    assert np.isnan(found[1])


def planted(rng: np.random.Generator, rows: int, width: int, strength: float, words: int = 3) -> Part:
    """Noise, plus for each word a direction of its own of length `strength` where it is true: d' = `strength`."""
    truth = rng.random((rows, words)) < 0.4
    directions = np.linalg.qr(np.random.default_rng(0).normal(size=(width, words)))[0].T
    values = rng.normal(size=(rows, width)) + truth @ (strength * directions)
    # Scale and offset differ between dimensions, as in a residual stream.
    values = values * np.geomspace(0.01, 100, width) + np.linspace(-50, 50, width)
    return Part(values.astype(np.float32), truth)


@pytest.mark.parametrize("strength", [0.0, 1.0, 2.5])
def test_a_planted_direction_is_found(strength: float) -> None:
    """Held-out AUROC is Phi(d' / sqrt 2), the best that any classifier reaches on two Gaussians d' apart."""
    rng = np.random.default_rng(1)
    parts = [planted(rng, rows, 24, strength) for rows in (3000, 1000, 6000)]
    result = probe(*parts)
    best_possible = norm.cdf(strength / np.sqrt(2))
    np.testing.assert_allclose(result.auroc, best_possible, atol=0.025)
    assert result.validation == pytest.approx(best_possible, abs=0.03)
    # One direction found from shuffled labels may lie along the signal by chance, as likely backwards as forwards.
    chances = [probe(shuffled(parts[0], rng), shuffled(parts[1], rng), parts[2], [1.0]).auroc for _ in range(12)]
    assert abs(np.mean(chances) - 0.5) < 0.04


@pytest.mark.parametrize("width", [10, 400])
def test_without_signal_it_is_chance(width: int) -> None:
    """Also with more dimensions than samples, where a probe fits the training rows perfectly."""
    rng = np.random.default_rng(2)
    parts = [planted(rng, rows, width, 0.0, words=8) for rows in (150, 150, 2000)]
    result = probe(*parts)
    assert abs(result.auroc.mean() - 0.5) < 0.02
    np.testing.assert_allclose(result.auroc, 0.5, atol=0.06)


def test_the_penalty_is_chosen_on_validation_rows() -> None:
    """With few rows a strong penalty is better; the choice is that of the validation rows, not of the test rows."""
    rng = np.random.default_rng(3)
    parts = [planted(rng, rows, 100, 1.5) for rows in (110, 500, 2000)]
    alone = {penalty: probe(*parts, penalties=[penalty]) for penalty in (0.001, 10.0, 100.0)}
    chosen = probe(*parts, penalties=list(alone))
    assert chosen.validation == max(result.validation for result in alone.values())
    assert chosen.penalty == 100.0
    np.testing.assert_array_equal(chosen.auroc, alone[100.0].auroc)
    assert alone[0.001].auroc.mean() < chosen.auroc.mean() - 0.02


def test_as_good_as_logistic_regression() -> None:
    """On planted truths of correlated words, scikit-learn's logistic regression reaches no higher."""
    rng = np.random.default_rng(4)
    mixing = np.random.default_rng(5).normal(size=(40, 40)) / 6
    parts = [Part((p := planted(rng, rows, 40, 2.0)).values @ mixing, p.truth) for rows in (800, 400, 2000)]
    train, _, test = parts
    scaler = StandardScaler().fit(train.values)
    scores = [
        LogisticRegression(C=1e6, max_iter=5000)
        .fit(scaler.transform(train.values), column)
        .decision_function(scaler.transform(test.values))
        for column in train.truth.T
    ]
    np.testing.assert_allclose(probe(*parts).auroc, auroc(np.stack(scores, axis=1), test.truth), atol=0.01)


def test_too_few_scenes_are_refused() -> None:
    """A word that is true of all rows, or none, can't be probed; the split and column are named."""
    rng = np.random.default_rng(6)
    parts = [planted(rng, 20, 4, 1.0) for _ in range(3)]
    parts[1].truth[:, 2] = False
    with pytest.raises(BadInputError, match=r"column 2 .* all 20 rows of 'validation'.*more scenes"):
        probe(*parts)


def test_shuffling_keeps_what_there_is() -> None:
    """As many rows of each word as before, in another order, each column for itself; the original stays."""
    part = planted(np.random.default_rng(7), 200, 4, 1.0)
    before = part.truth.copy()
    mixed = shuffled(part, np.random.default_rng(8))
    np.testing.assert_array_equal(part.truth, before)
    np.testing.assert_array_equal(mixed.truth.sum(0), before.sum(0))
    agree = (mixed.truth == before).mean(0)
    assert (agree < 0.7).all()
    assert len(set(agree)) > 1


def thing(shape: str, colour: str, size: str, x: float, y: float) -> SceneObject:
    return SceneObject(shape, colour, size, x, y, 0.2)


SCENES = [
    Scene("snow", (thing("circle", "red", "big", 0.25, 0.25),), 1),
    Scene("sea", (thing("ring", "blue", "small", 0.25, 0.75), thing("star", "red", "big", 0.75, 0.75)), 2, 64, 48),
]
SAID = [
    "a circle that is big and red at the top left in the snow .",
    "a ring that is small and blue at the bottom left and a star that is big and red at the bottom right in the sea .",
]


def test_rows_are_the_right_positions(model: HookedMM) -> None:
    """Against the model's activations, one scene at a time, at positions counted by hand in the caption."""
    assert [caption(item, "full") for item in SCENES] == SAID
    rows = collect(model, SCENES, HOOKS)
    assert set(rows) == {(name, rule) for name in VALUES for rule in RULES} - {("count", "predicts")}
    # Word numbers of each scene's attribute words; what predicts a word is the one before it.
    numbers = {
        "shape": [[1], [1, 13]],
        "size": [[4], [4, 16]],
        "colour": [[6], [6, 18]],
        "position": [[9], [9, 21]],
        "place": [[13], [25]],
    }
    by_hand: dict[str, list[torch.Tensor]] = {rule: [] for rule in ("image mean", "last prompt", *numbers)}
    for index, (item, said) in enumerate(zip(SCENES, SAID, strict=True)):
        batch = model.prepare([picture(item)], [STYLES["full"].prompt], [said])
        cache = model.run_with_cache(batch, HOOKS)[1]
        values = torch.stack([cache[hook][0] for hook in HOOKS])
        start = batch.input_ids.shape[1] - len(said.split())
        image = batch.input_ids[0] == model.structure.image_token_id
        by_hand["image mean"].append(values[:, image].mean(1, keepdim=True))
        by_hand["last prompt"].append(values[:, start - 1 : start])
        for name, places in numbers.items():
            by_hand[name].append(values[:, [start + number - 1 for number in places[index]]])
    for (name, rule), found in rows.items():
        expected = torch.cat(by_hand[name if rule == "predicts" else rule], dim=1).numpy()
        np.testing.assert_allclose(found.values, expected, atol=2e-5, err_msg=f"{name}, {rule}")


def test_rows_know_the_truth(model: HookedMM) -> None:
    """Of scenes: whatever some object is; of words: the word that comes next."""
    rows = collect(model, SCENES, HOOKS[:1], batch_size=1)

    def told(name: str, rule: str) -> list[set[str]]:
        return [{VALUES[name][column] for column in np.flatnonzero(row)} for row in rows[name, rule].truth]

    for rule in ("image mean", "last prompt"):
        assert told("colour", rule) == [{"red"}, {"blue", "red"}]
        assert told("position", rule) == [{"top left"}, {"bottom left", "bottom right"}]
        assert told("count", rule) == [{"one"}, {"two"}]
        assert told("place", rule) == [{"snow"}, {"sea"}]
    assert told("shape", "predicts") == [{"circle"}, {"ring"}, {"star"}]
    assert told("size", "predicts") == [{"big"}, {"small"}, {"big"}]
    assert told("position", "predicts") == [{"top left"}, {"bottom left"}, {"bottom right"}]


def test_no_word_belongs_to_two_attributes() -> None:
    """Or a predicted word's attribute would be a guess."""
    assert len(SPOKEN) == sum(len(options) for name, options in VALUES.items() if name != "count")


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Scene]]:
    """A few scenes."""
    sizes = {"train": 60, "validation": 40, "test": 40}
    return {split: [scene(split, index, 11) for index in range(count)] for split, count in sizes.items()}


@pytest.fixture(scope="module")
def found(model: HookedMM, splits: dict[str, list[Scene]]) -> list[Ceiling]:
    """The ceilings of an untrained model on them, at two layers."""
    with mock.patch.object(probes, "HOOKS", HOOKS):
        return ceilings(model, splits)


def test_fixed_tokens_say_nothing(found: list[Ceiling], splits: dict[str, list[Scene]]) -> None:
    """What enters the decoder at the prompt's last token and before each word is the same token always: exactly .5."""
    assert len(found) == 17 * 2
    for item in found:
        if item.hook == "hook_embed" and item.rule != "image mean":
            assert item.auroc == 0.5, (item.attribute, item.rule)
            assert set(item.words.values()) == {0.5}
    seen = {(item.attribute, item.rule): item for item in found if item.hook == "hook_embed"}
    # Places differ in their overall colours, so that even random image features tell them.
    assert seen["place", "image mean"].auroc > 0.8
    assert seen["place", "image mean"].rows == {"train": 60, "validation": 40, "test": 40}
    assert seen["shape", "predicts"].rows["test"] == sum(len(item.objects) for item in splits["test"])
    assert abs(np.mean([item.shuffled for item in found]) - 0.5) < 0.03


def ceiling(hook: str, test: float, validation: float, chance: float) -> Ceiling:
    return Ceiling("size", "predicts", hook, test, {}, validation, chance, 1.0, {})


def test_the_table() -> None:
    """A line per attribute and rule; the layer best on validation scenes is bold, even if another tests better."""
    trained = [
        ceiling("hook_embed", 0.5, 0.5, 0.48),
        ceiling("blocks.0.hook_resid_post", 0.91, 0.8, 0.5),
        ceiling("blocks.1.hook_resid_post", 0.9, 0.95, 0.55),
    ]
    untrained = [ceiling("hook_embed", 0.6, 0.5, 0.5), ceiling("blocks.0.hook_resid_post", 0.55, 0.7, 0.5)]
    assert best(trained) is trained[2]
    assert table(trained).splitlines() == [
        "| attribute | rule | embed | 0 | 1 | shuffled |",
        "|---|---|---|---|---|---|",
        "| size | predicts | 0.500 | 0.910 | **0.900** | 0.51 (0.48 to 0.55) |",
    ]
    last = table(trained, untrained).splitlines()[2]
    assert last == "| size | predicts | 0.500 | 0.910 | **0.900** | 0.51 (0.48 to 0.55) | 0.550 |"


def test_every_layer_is_probed(model: HookedMM) -> None:
    """What enters the decoder and what leaves each of its layers; the other tests take two of them."""
    left = [f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)]
    assert match_names(list(probes.HOOKS), model.hook_names) == ["hook_embed", *left]


@pytest.mark.usefixtures("unchecked")
def test_the_command_writes_both_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into the model's own folder; all numbers, what they were measured on, and the same again with the same seed."""
    monkeypatch.setattr(probes, "HOOKS", HOOKS)
    torch.manual_seed(0)
    made, processor = build("llava")
    made.save_pretrained(tmp_path / "mine")
    processor.save_pretrained(tmp_path / "mine")
    few = ["--train", "50", "--validation", "40", "--test", "40", "--seed", "11"]
    main([str(tmp_path / "mine"), *few])
    numbers = json.loads((tmp_path / "mine" / "probes.json").read_text())
    text = (tmp_path / "mine" / "probes.md").read_text()
    assert text in capsys.readouterr().out
    assert "50 of train, 40 of validation, 40 of test; seed\n11" in text
    assert text.count("\n| ") == 1 + 17
    assert (numbers["model"], numbers["family"], numbers["seed"]) == ("mine", "llava", 11)
    assert numbers["scenes"] == {"train": 50, "validation": 40, "test": 40}
    assert set(numbers["versions"]) >= {"torch", "scikit-learn"}
    assert len(numbers["trained"]) == len(numbers["untrained"]) == 17 * 2
    for item in numbers["trained"]:
        assert np.mean(list(item["words"].values())) == pytest.approx(item["auroc"])
    main([str(tmp_path / "mine"), *few, "--output", str(tmp_path / "again"), "--untrained", "false"])
    again = json.loads((tmp_path / "again" / "probes.json").read_text())
    assert again["trained"] == numbers["trained"]
    assert again["untrained"] is None
