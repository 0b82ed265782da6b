"""TensorBoard's table of runs: settings under the same names for every method, and numbers at the step asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from torch.utils.tensorboard import SummaryWriter

from concept_dict.dictionary import METHODS
from concept_dict.pca import PCA
from concept_dict.run_table import compare_runs, method_settings
from concept_dict.semi_nmf import SemiNMF


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_has_the_same_names(name: str) -> None:
    """As it is unless told, nothing else is said."""
    found = method_settings(METHODS[name](7))
    assert list(found) == ["method", "k", "seed", "other"]
    assert (found["method"], found["k"], found["other"]) == (name, 7, "")


def test_what_was_changed_is_told() -> None:
    """By name and value; concepts at hand are not written out; a method without chance has no seed."""
    assert method_settings(SemiNMF(3, tol=0.5, center=False, random_state=4)) == {
        "method": "SemiNMF",
        "k": 3,
        "seed": "4",
        "other": "center=False, tol=0.5",
    }
    assert method_settings(SemiNMF(3, init=torch.eye(3)))["other"] == "init=given"
    assert method_settings(PCA(2))["seed"] == ""


def test_a_run_stays_one_line(tmp_path: Path) -> None:
    """One file, with scalars at their step and the settings they came of."""
    with SummaryWriter(str(tmp_path)) as writer:
        compare_runs(writer, {"method": "PCA", "k": 2}, {"result/error": 0.25}, 2)
    assert len(list(tmp_path.rglob("events*"))) == 1
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("result/error")] == [(2, 0.25)]
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    told = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert (told["method"].string_value, told["k"].number_value) == ("PCA", 2)
    with SummaryWriter(str(tmp_path / "bare")) as writer:
        compare_runs(writer, {}, {"a": 1.0})
    assert not [tag for tag in EventAccumulator(str(tmp_path / "bare")).Reload().summary_metadata if "hparams" in tag]
