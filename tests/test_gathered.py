"""Records through bytes and back, and every metric of steering's evaluation in two processes as in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics import Metric

from hooked_mm.errors import BadInputError
from steering.answer_counts import AnswerCounts
from steering.caption_scores import CaptionScores
from steering.cider import CIDEr
from steering.gathered import RecordMetric, check_lengths, decode, encode
from steering.side_effects import NextTokenKL, Perplexity
from steering.style_counts import StyleCounts
from steering.vqa_accuracy import VQAAccuracy
from tests.processes import run_in_processes

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), st.lists, max_leaves=8
)
SHARES = {"uneven": [0, 5, 7], "one has none": [0, 0, 7]}
"""Where each process's samples end."""


class Kept(RecordMetric):
    """The records themselves."""

    def update(self, records: list[Any]) -> None:
        self.keep(records)

    def compute(self) -> list[Any]:
        return self.records()


def metrics() -> dict[str, tuple[Metric, list[Any]]]:
    """Every metric, with seven samples of what it takes."""
    before, after = torch.randn(2, 7, 11, generator=torch.Generator().manual_seed(0))
    answers = ["no", "none", "Yes.", "schön\n猫", "2", "", "2"]
    others = ["no", "no", "yes", 'a "b"\r\n', "3", "x", "3"]
    captions = ["a red cat sits here", "the sea", "", "two sad dogs", "blue sky", "a cat on a mat", "red red red"]
    references = [[caption + " today", "a cat"] for caption in captions]
    tokens = [[caption.split() for caption in given] for given in references]
    types = ["yes/no", "yes/no", "yes/no", "other", "number", "other", "number"]
    ten = [[answer] * 8 + ["2", "none"] for answer in others]
    return {
        "records": (Kept(), [[[name, 0.1 + 0.2, None] for name in answers]]),
        "accuracy": (VQAAccuracy(), [answers, ten, types]),
        "answers": (AnswerCounts(), [answers, others]),
        "cider": (CIDEr(), [[caption.split() for caption in captions], tokens]),
        "captions": (CaptionScores(), [captions, references]),
        "styles": (StyleCounts(), [captions]),
        "kl": (NextTokenKL(), [before, after]),
        "perplexity": (Perplexity(), [before, torch.arange(7)]),
    }


def compute(start: int, stop: int) -> dict[str, Any]:
    """Every metric of these samples, in batches of two; none where there are no samples."""
    found = {}
    for name, (metric, columns) in metrics().items():
        for first in range(start, stop, 2):
            metric.update(*(column[first : min(first + 2, stop)] for column in columns))
        found[name] = metric.compute()
        # After a synchronisation a metric is its process's own again, and goes on.
        if stop > start:
            metric.update(*(column[start : start + 1] for column in columns))
    return found


def share(rank: int, size: int, folder: Path) -> None:
    """Compute as one of several processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    found = {name: compute(*ends[rank : rank + 2]) for name, ends in SHARES.items()}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def shares(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("shares")
    run_in_processes(share, 2, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
@pytest.mark.parametrize("case", SHARES)
@pytest.mark.parametrize("name", metrics())
def test_two_processes_find_what_one_finds(shares: list[dict[str, Any]], name: str, case: str) -> None:
    """Both the same, with shares of different sizes and with one that has no samples."""
    expected = compute(0, 7)[name]
    for found in shares:
        if isinstance(expected, torch.Tensor):
            torch.testing.assert_close(found[case][name], expected, rtol=1e-12, atol=0)
        else:
            assert found[case][name] == expected


@given(batches=st.lists(st.lists(JSON, max_size=5), min_size=1, max_size=4))
def test_records_come_back_as_they_were(batches: list[list[Any]]) -> None:
    """Texts with any character, floats to the last bit, batches of none; and through `forward`, and saved."""
    every = [record for batch in batches for record in batch]
    assert decode(map(encode, batches)) == every
    metric = Kept()
    for batch in batches:
        assert metric(batch) == batch
    assert metric.compute() == every
    metric.persistent(True)
    again = Kept()
    again.load_state_dict(metric.state_dict())
    assert again.records() == every
    metric.reset()
    assert metric.records() == []


def test_lengths() -> None:
    """None stands for no list; the message names the lists."""
    check_lengths(a=["x"], b=None, c=[1])
    with pytest.raises(BadInputError, match="1 a, 2 c"):
        check_lengths(a=["x"], b=None, c=[1, 2])
    with pytest.raises(BadInputError, match=r"write \['x'\]"):
        check_lengths(a="x")
