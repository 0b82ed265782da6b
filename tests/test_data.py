"""Samples have ids that are told once and are unique."""

from __future__ import annotations

import pytest

from hooked_mm.data import Sample, SampleDataModule
from hooked_mm.errors import BadInputError

GOOD = [Sample(f"s{number}", None, f"question {number} ?") for number in range(5)]


def test_ids_stand_in_order() -> None:
    """As the samples do; the number of samples is told to the store."""
    module = SampleDataModule(GOOD)
    assert module.ids() == ["s0", "s1", "s2", "s3", "s4"]
    assert module.describe() == {"name": "SampleDataModule", "samples": 5}


def test_repeated_ids_are_refused() -> None:
    """Two samples of one id could not be told apart in the store; the id is named."""
    with pytest.raises(BadInputError, match="'s3'"):
        SampleDataModule([*GOOD, GOOD[3]]).ids()


@pytest.mark.parametrize(("batch_size", "num_workers"), [(0, 0), (-3, 0), (4, -1)])
def test_sizes_that_there_are_not_are_refused(batch_size: int, num_workers: int) -> None:
    """The numbers are named."""
    with pytest.raises(BadInputError, match=f"batch_size={batch_size}, num_workers={num_workers}"):
        SampleDataModule(GOOD, batch_size, num_workers)


def test_ids_of_a_data_set_are_asked_for_where_it_knows_them() -> None:
    """A data set with `ids()` need not make its samples to name them."""

    class Lazy(list):
        def ids(self) -> list[str]:
            return ["x", "y"]

        def __getitem__(self, index: object) -> Sample:
            raise AssertionError("a sample was made")

    assert SampleDataModule(Lazy("xy")).ids() == ["x", "y"]
