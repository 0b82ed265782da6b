"""MMVP: pairs of pictures that CLIP takes for alike, with one question and opposite answers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pyarrow as pa

from hooked_mm.datasets.annotations import digest, read_bytes, read_csv
from hooked_mm.datasets.selection import Selection
from hooked_mm.datasets.table import InFolder, Table, TableDataModule
from hooked_mm.errors import BadInputError

NUMBERS = ("Index", "lndex")
"""What the column of ids is called: some copies of the published table begin with a small L."""
COLUMNS = ("Question", "Options", "Correct Answer")


class Mmvp(TableDataModule):
    """MMVP as samples, `mmvp-1` to `mmvp-300`; the text is question and options, the answer a letter such as `(a)`.

    Columns: `question`, `index`, `pair` (1 for the first two questions, 2 for the next two ...), `options`. A model is
    right about a pair if it is right about both: score by `pair`.

    Args:
        folder: The benchmark as downloaded: `Questions.csv` and the folder `MMVP Images`.
        where: Which samples are taken.
        template: What wraps question and options: a name of `TEMPLATES` or words with `{text}`.
        batch_size: Samples per batch.
        num_workers: Processes that decode pictures.

    Raises:
        BadInputError: If the file has another format, misses or repeats entries, or a pair is not whole.
    """

    def __init__(
        self,
        folder: str | Path,
        where: Selection | None = None,
        template: str | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        super().__init__(_table(Path(folder)), where, template, batch_size, num_workers)


def _table(folder: Path) -> Table:
    path = folder / "Questions.csv"
    raw = read_bytes(path)
    header, rows = read_csv(path, raw)
    number = next((name for name in NUMBERS if name in header), NUMBERS[0])
    names = (number, *COLUMNS)
    if not set(names) <= set(header):
        raise BadInputError(f"{str(path)!r} has the columns {', '.join(header)}, but MMVP has {', '.join(names)}")
    found = {name: [row[header.index(name)].strip() for row in rows] for name in names}
    for name, values in found.items():
        bad = next((value for value in values if not value or (name == number and not value.isdecimal())), None)
        if bad is not None:
            raise BadInputError(f"{str(path)!r} has {name}={bad!r} in row {values.index(bad) + 1}; repair the file")
    index = [int(value) for value in found[number]]
    pair = [(entry + 1) // 2 for entry in index]
    single = next((entry for entry, count in Counter(pair).items() if count == 1), None)
    if single is not None:
        raise BadInputError(
            f"{str(path)!r} has only one of the questions {2 * single - 1} and {2 * single}, which are a pair; take "
            "the file as downloaded, and choose samples with where"
        )
    return Table(
        source=str(path),
        ids=[f"mmvp-{entry}" for entry in index],
        # By number, never by place in a listing of the folder, where 10.jpg comes before 2.jpg.
        pictures=InFolder(folder / "MMVP Images", pa.array([f"{entry}.jpg" for entry in index])),
        columns={"index": index, "pair": pair, "options": found["Options"]},
        question=[f"{q} {options}" for q, options in zip(found["Question"], found["Options"], strict=True)],
        answer=found["Correct Answer"],
        made_of={"files": {path.name: digest(raw)}},
    )
