"""Processes: sums and values of all of them, in all of them; alone, everything comes back as it was given."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hooked_mm.processes import Processes, goes_on_alone


def _one_of_two(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    processes, own = Processes(), torch.tensor([1.0, 10.0 * (rank + 1)])
    found = (processes.rank, processes.size, processes.sum(own), own, processes.gather({"rank": rank}))
    alone = goes_on_alone()
    torch.save((*found, alone, dist.is_initialized()), f"{folder}/{rank}.pt")


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """The sum is in both, and what was summed is left as it was; then the first goes on, and the group is gone."""
    mp.spawn(_one_of_two, (str(tmp_path),), 2)
    for place in range(2):
        rank, size, total, own, values, alone, meeting = torch.load(tmp_path / f"{place}.pt", weights_only=True)
        assert (rank, size, alone, meeting) == (place, 2, place == 0, False)
        assert total.tolist() == [2.0, 30.0]
        assert own.tolist() == [1.0, 10.0 * (place + 1)]
        assert values == [{"rank": 0}, {"rank": 1}]


def test_alone() -> None:
    """No group is needed."""
    value = torch.ones(2)
    processes = Processes()
    assert (processes.rank, processes.size) == (0, 1)
    assert processes.sum(value) is value
    assert processes.gather("x") == ["x"]
    assert goes_on_alone()
