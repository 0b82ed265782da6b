"""Vectors of folders that the one who starts the explorer opened: steering vectors, and concepts of dictionaries.

A folder holds what `hooked-mm steer compute` writes, or a concept dictionary, or dictionaries in folders of its own as
`hooked-mm learn` leaves them. It is looked at when the page starts, and read when the first visitor looks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from concept_dict.dictionary import FILE as DICTIONARY
from concept_dict.dictionary import ConceptDictionary, dictionary_folders
from hooked_mm.errors import BadInputError
from hooked_mm.steering_vector import FILE as VECTORS
from hooked_mm.steering_vector import SteeringVector, load_vectors
from steering.directions import concept


@dataclass(frozen=True)
class Opened:
    """A vector of a folder.

    Attributes:
        vector: It.
        label: For people.
        python: The expression that reads it again.
        imports: The line that the expression needs.
    """

    vector: SteeringVector
    label: str
    python: str
    imports: str


def check_folders(folders: Sequence[Path]) -> None:
    """Refuse folders that hold neither vectors nor a dictionary, before anybody waits for them.

    Raises:
        BadInputError: It names the first of them.
    """
    for folder in folders:
        if not (folder / f"{VECTORS}.json").is_file() and not dictionary_folders(folder):
            raise BadInputError(
                f"{str(folder)!r} holds neither steering vectors ({VECTORS}.json) nor a concept dictionary "
                f"({DICTIONARY}.json); open what `hooked-mm steer compute` or `hooked-mm learn` has written"
            )


def concept_vector(dictionary: ConceptDictionary, number: int) -> SteeringVector:
    """A concept of norm 1 as a direction to steer along.

    Raises:
        BadInputError: If there is no such concept.
    """
    made_by = dictionary.made_by
    owner: dict[str, Any] = {name: made_by.get(name) for name in ("model", "revision", "adapter")}
    values = concept(dictionary.concepts, number)
    places = made_by.get("selectors")
    return SteeringVector(values, dictionary.hook, "concept", f"concept {number}", positions=places, **owner)


def read_vectors(folder: Path) -> list[Opened]:
    """All vectors of a folder, in their order.

    Raises:
        BadInputError: If what it holds can't be read.
    """
    if (folder / f"{VECTORS}.json").is_file():
        line = "from hooked_mm.steering_vector import load_vectors"
        return [
            Opened(one, f"{one.name or one.kind} ({one.kind}, {one.hook})", f"load_vectors({str(folder)!r})[{n}]", line)
            for n, one in enumerate(load_vectors(folder))
        ]
    line = "from concept_dict.dictionary import ConceptDictionary\nfrom steering.opened_vectors import concept_vector"
    found = []
    for where in dictionary_folders(folder):
        dictionary = ConceptDictionary.load(where)
        for n in range(len(dictionary.concepts)):
            label = f"concept {n} of {where.name} ({dictionary.hook})"
            python = f"concept_vector(ConceptDictionary.load({str(where)!r}), {n})"
            found.append(Opened(concept_vector(dictionary, n), label, python, line))
    return found
