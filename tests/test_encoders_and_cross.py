"""Miniatures of encoder-decoders, cross-attention, Q-Formers and prefixes: they run and see their pictures."""

from __future__ import annotations

import pytest

from hooked_mm.errors import BadInputError
from hooked_mm.testing.miniatures import recipe
from tests.miniature_checks import check_runs


@pytest.mark.parametrize(
    "family",
    [
        *("blip", "git", "idefics", "instructblip", "instructblipvideo", "kosmos-2", "kosmos-2.5", "pix2struct"),
        *("pp_formulanet", "t5gemma2", "udop", "vision-encoder-decoder"),
    ],
)
def test_runs_and_sees_its_picture(family: str) -> None:
    """As every miniature must."""
    check_runs(family)


def test_evolla_reads_no_picture() -> None:
    """It is mapped to image-text-to-text, and takes proteins."""
    with pytest.raises(BadInputError, match="proteins"):
        recipe("evolla")
