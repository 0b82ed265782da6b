"""What was measured of a small model, as counts: read and written as `accuracy.json`, without running anything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import nan, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from hooked_mm.errors import BadInputError

FILE = "accuracy.json"
"""In a model's folder; those of a second training lie beside it as `accuracy-seed1.json`."""

HELD_OUT_OBJECT = "held-out object"
"""In the place of a split: those questions of `unseen` that are about the object with the held-out pair, or name it."""


@dataclass(frozen=True)
class Share:
    """`right` of `of`."""

    right: int
    of: int

    @property
    def value(self) -> float:
        """From 0 to 1; not a number where nothing was counted."""
        return self.right / self.of if self.of else nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % score interval (Wilson 1927, with z = 1.96); 0 to 1 where nothing was counted."""
        if not self.of:
            return 0.0, 1.0
        z, n, p = 1.959964, self.of, self.value
        middle = p + z**2 / (2 * n)
        reach = z * sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        return max(0.0, (middle - reach) / (1 + z**2 / n)), min(1.0, (middle + reach) / (1 + z**2 / n))

    def __add__(self, other: Share) -> Share:
        return Share(self.right + other.right, self.of + other.of)

    def __str__(self) -> str:
        return f"{self.value:.3f}" if self.of else "-"


@dataclass(frozen=True)
class Captions:
    """Captions of one style.

    Attributes:
        exact: Every word as in one of the right captions.
        wordings: How many of the exact ones are in which wording.
        attributes: Per word class, attribute words in their slots (see `evaluate.slots`).
    """

    exact: Share
    wordings: dict[str, int]
    attributes: dict[str, Share]


@dataclass(frozen=True)
class Accuracy:
    """Greedy answers on fresh scenes.

    Attributes:
        seed: Of the scenes.
        questions: Per split (`test`, `unseen`) and for `HELD_OUT_OBJECT`: question type -> share right.
        wrong_image: Question type -> share right when each question of `test` is asked of another scene's picture.
        wrong_image_captions: Exact captions, default prompt, of the scene that is not the one in the picture.
        chance: Question type -> what the best constant answer would get of the same questions.
        captions: Per split, style -> what was said.
    """

    seed: int
    questions: dict[str, dict[str, Share]]
    wrong_image: dict[str, Share]
    wrong_image_captions: Share
    chance: dict[str, Share]
    captions: dict[str, dict[str, Captions]]

    def to_json(self) -> str:
        """As `accuracy.json` holds it; every share as its two counts."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Accuracy:
        """Read what `to_json` wrote.

        Raises:
            BadInputError: If it is something else.
        """
        try:
            made: dict[str, Any] = json.loads(text)
            return cls(
                made["seed"],
                {split: _shares(types) for split, types in made["questions"].items()},
                _shares(made["wrong_image"]),
                Share(**made["wrong_image_captions"]),
                _shares(made["chance"]),
                {
                    split: {style: _captions(value) for style, value in styles.items()}
                    for split, styles in made["captions"].items()
                },
            )
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise BadInputError(
                f"this is not what a small model's evaluation writes ({type(error).__name__}: {error}); make it again: "
                "python -m hooked_mm.small.evaluate FOLDER"
            ) from error

    @classmethod
    def load(cls, folder: str | Path, file: str = FILE) -> Accuracy:
        """The measurements that lie in a model's folder.

        Raises:
            BadInputError: If there are none, or the file is something else.
        """
        path = Path(folder) / file
        if not path.is_file():
            raise BadInputError(f"{str(path)!r} does not exist; measure: python -m hooked_mm.small.evaluate {folder}")
        return cls.from_json(path.read_text())


def _shares(made: Mapping[str, Mapping[str, int]]) -> dict[str, Share]:
    return {name: Share(**value) for name, value in made.items()}


def _captions(made: Mapping[str, Any]) -> Captions:
    return Captions(Share(**made["exact"]), dict(made["wordings"]), _shares(made["attributes"]))


def mean(shares: Mapping[str, Share]) -> float:
    """The mean over the names of which anything was counted, each counting the same; not a number without any."""
    values = [share.value for share in shares.values() if share.of]
    return float(np.mean(values)) if values else nan
