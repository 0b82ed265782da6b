"""The command for neurons: what it finds is what its functions say, and its tables say which words it silenced."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from sklearn.metrics import roc_auc_score

from analyses.model_samples import Samples
from analyses.neurons import Neuron, attributions
from analyses.neurons_command import check, effects, fields, find, main, most_active, said
from analyses.result import Result
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.dataset import SceneDataset, ScenesDataModule, picture
from hooked_mm.scenes.draw import render

DATA = ("--data", "ScenesDataModule", "--data.task", "questions", "--data.split", "train")


def test_targets_are_predicted_where_the_answer_says_them(llava: HookedMM) -> None:
    """In a caption every word has its own row; the same sample may come twice."""
    samples = Samples(llava, ScenesDataModule(4, style="full", batch_size=4), "given")
    ((names, batch, rows, targets),) = list(said(samples, ["red", "blue", "circle", "small"]))
    tokens = llava.tokenizer.convert_ids_to_tokens(targets.tolist())
    assert tokens == names
    assert batch.input_ids[torch.arange(len(rows)), rows + 1].tolist() == targets.tolist()
    assert len(names) > len({tuple(row) for row in batch.input_ids.tolist()})


def test_sums_over_batches_are_those_of_single_samples(llava: HookedMM) -> None:
    """Whatever the batches, each word has its own samples."""
    data = ScenesDataModule(2, "questions", "train", batch_size=7)
    found = find(Samples(llava, data, "given"), ["yes", "no", "two"])
    for word, one in found.items():
        asked = [data.dataset[n] for n in range(len(data.dataset)) if data.dataset[n].answer == word]
        assert one.samples == len(asked)
        total = torch.zeros(256, dtype=torch.float64)
        for sample in asked:
            target = torch.tensor(llava.tokenizer(f" {word}", add_special_tokens=False)["input_ids"])
            made = attributions(llava, llava.prepare(sample.images, sample.text), target, layers=[2])
            total += made.scores[2][0].double()
        if asked:
            torch.testing.assert_close(one.scores[2], total, rtol=1e-3, atol=1e-6)
            torch.testing.assert_close(torch.cat(one.by_layer)[:, 2].sum(), total.sum(), rtol=1e-3, atol=1e-6)
    assert sum(one.samples for one in found.values()) > 1


def test_what_a_logit_loses_is_measured_per_sample_and_set(llava: HookedMM) -> None:
    """Nothing without neurons; a word that nobody says has no entry."""
    samples = Samples(llava, ScenesDataModule(3, "questions", "train", batch_size=8), "given")
    many = [Neuron(2, number) for number in range(256)]
    found = check(samples, ["left", "user"], {"left": [[], many], "user": [[]]})
    assert list(found) == ["left"]
    assert found["left"][:, 0].abs().max() == 0
    assert found["left"][:, 1].abs().max() > 1e-3


def test_effects_are_means_beside_those_of_draws() -> None:
    """Of the top, of the most active, and what matched draws reach."""
    lost = torch.tensor([[2.0, 1.0, 0.5, 0.1], [4.0, 1.0, 0.5, 0.3]], dtype=torch.float64)
    values = {score.score: score.value for score in effects(lost, "red", 50, 0)}
    assert values["red: logit lost, top neurons silenced"] == 3
    assert values["red: logit lost, most active silenced"] == 1
    assert values["red: logit lost, mean of matched draws"] == pytest.approx(0.35)
    assert values["red: logit lost, largest of matched draws"] == 0.5


def test_the_most_active_are_of_the_same_layers() -> None:
    """As many of each, none of the chosen."""
    activity = {0: torch.tensor([5.0, 4.0, 3.0]), 1: torch.tensor([9.0, 8.0, 7.0])}
    assert most_active(activity, [Neuron(1, 0), Neuron(1, 2), Neuron(0, 1)]) == [Neuron(1, 1), Neuron(0, 0)]


def test_receptive_fields_are_held_against_the_masks_of_what_the_word_names(llava: HookedMM) -> None:
    """A picture without such is left out; however many go together."""
    data = SceneDataset(5)
    neurons = [Neuron(2, 122), Neuron(0, 35)]
    word = data.scene(2).objects[0].shape
    found, again = (fields(llava, data, word, neurons, size) for size in (5, 2))
    shown = [n for n in range(5) if any(thing.shape == word for thing in data.scene(n).objects)]
    assert 0 < len(shown) < 5
    for name, values in found.items():
        assert values.shape == (len(shown), 2)
        torch.testing.assert_close(values, again[name], rtol=0, atol=1e-3)
    item = data.scene(shown[0])
    batch = llava.prepare(picture(item), "what")
    _, cache = llava.run_with_cache(batch, "blocks.0.mlp.hook_post")
    size = cache["blocks.0.mlp.hook_post"][0][batch.mask("image")[0]][:, 35].abs().reshape(1, 1, 8, 8)
    side = max(item.width, item.height)
    large = torch.nn.functional.interpolate(size, (side, side), mode="bilinear")[0, 0]
    left, top = (side - item.width) // 2, (side - item.height) // 2
    own = large[top : top + item.height, left : left + item.width]
    masks = render(item)[1][[thing.shape == word for thing in item.objects]].max(0) > 0.5
    expected = roc_auc_score(masks.ravel(), own.numpy().ravel())
    assert float(found["pixel AUROC"][0, 1]) == pytest.approx(expected, abs=0.01)


@pytest.mark.usefixtures("loaded")
def test_the_command_writes_neurons_and_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A word that no answer says is noted; none at all is refused."""
    given = ["--model.id", "small:llava", *DATA, "--data.size", "3", "--answer", "given", "--draws", "20"]
    other = ["--check", "ScenesDataModule", "--check.size", "2", "--check.task", "questions"]
    more = ["--words", "[left, user]", "--count", "3", "--matched", "4", "--output", str(tmp_path / "out")]
    main([*given, *other, *more])
    with open(tmp_path / "out" / "neurons.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["word"] for row in rows] == ["left"] * 3
    assert float(rows[0]["attribution"]) >= float(rows[2]["attribution"]) > 0
    result = Result.load(tmp_path / "out")
    assert len(result.of("left: attributed to neurons")) == 6
    assert len(result.of("left: logit lost, 99th percentile of matched draws")) == 1
    assert "no answer says 'user'" in result.notes
    assert "left" in capsys.readouterr().out
    with pytest.raises(BadInputError, match="no answer says any of"):
        main([*given, "--words", "[user]", "--output", str(tmp_path / "none")])
