"""The model card: every number of the measurements in its cell, and what the model is, from the model itself."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hooked_mm.errors import BadInputError
from hooked_mm.scenes.captions import STYLES
from hooked_mm.scenes.questions import QUESTION_TYPES
from hooked_mm.small.accuracy import Accuracy, Captions, Share
from hooked_mm.small.card import Training, caption_table, facts, question_table, sibling, write_model_card
from hooked_mm.small.families import FAMILIES, build

MADE = Training("python -m hooked_mm.small.train llava --output x", 71.25, "2 CPU cores", 4, {"steps": 9, "batch": 16})


def planted(start: int) -> Accuracy:
    """Shares that are all different: the n-th is start + n of 1000."""
    numbers = iter(range(start, start + 300))

    def shares(names: object) -> dict[str, Share]:
        return {name: Share(next(numbers), 1000) for name in names}  # type: ignore[attr-defined]

    columns = {split: shares(QUESTION_TYPES) for split in ("test", "unseen")}
    columns["held-out object"] = shares(("colour", "where"))
    captions = {
        split: {
            style: Captions(Share(next(numbers), 1000), {"full": 700, "short": 3}, shares(["shapes", "places"]))
            for style in STYLES
        }
        for split in ("test", "unseen")
    }
    wrong, chance = shares(QUESTION_TYPES), shares(QUESTION_TYPES)
    return Accuracy(6, columns, wrong, Share(start, 999), chance, captions)


def counts(**shares: tuple[int, int]) -> dict[str, dict[str, int]]:
    """Shares as an adapter's file holds them."""
    return {name.replace("_", " "): {"right": right, "of": of} for name, (right, of) in shares.items()}


ADAPTER = {
    "before": {
        "change": counts(style_followed=(0, 300), exactly_right=(1, 300)),
        "questions": counts(colour=(10, 10), count=(5, 10)),
        "styles": counts(full=(9, 10)),
    },
    "after": {
        "change": counts(style_followed=(293, 300), exactly_right=(290, 300)),
        "questions": counts(colour=(4, 10), count=(6, 10)),
        "styles": counts(full=(3, 10)),
    },
}
"""What is measured of an adapter."""


def save(family: str, folder: Path) -> Path:
    """A random model of a family, as the shipped ones are written."""
    torch.manual_seed(0)
    model, processor = build(family)
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def cells(table: str) -> dict[str, list[str]]:
    """The first cell of each row -> the others."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {row[0]: row[1:] for row in rows}


def test_each_number_stands_in_its_cell() -> None:
    """Two runs, side by side; what was not asked is a dash."""
    one, two = planted(100), planted(500)
    found = cells(question_table([one, two]))
    assert found["where"] == ["0.103 / 0.503", "0.114 / 0.514", "0.123 / 0.523", "0.169 / 0.569", "0.180 / 0.580"]
    assert found["relation"][2] == "- / -"
    # Means of eleven, eleven, two, eleven and eleven numbers in a row.
    assert found["**mean over types**"] == [
        "0.105 / 0.505",
        "0.116 / 0.516",
        "0.122 / 0.522",
        "0.171 / 0.571",
        "0.182 / 0.582",
    ]
    assert found["question"] == ["test", "unseen", "of the held-out object", "wrong image", "chance"]
    captions = cells(caption_table([one]))
    assert set(STYLES) <= set(captions)
    assert captions["full"][1:] == ["0.124 (0.105 to 0.146)", "0.145", "shapes 0.125, places 0.126"]


@pytest.mark.parametrize(("family", "tokens"), [("llava", (64, 64)), ("idefics2", (36, 36)), ("qwen2_vl", (36, 54))])
def test_facts_come_from_the_model(family: str, tokens: tuple[int, int], tmp_path: Path) -> None:
    """Parameters as the file counts them, image tokens as the families' table says, transformers' own class names."""
    found = facts(save(family, tmp_path))
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert found.parameters == sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
    assert found.image_tokens == tokens
    assert found.kind == json.loads((tmp_path / "config.json").read_text())["architectures"][0]
    assert found.decoder.endswith("Model, 128 x 6")
    assert (found.tower_layers, found.layers, found.tower[-3:]) == (4, 6, "x 4")
    assert FAMILIES[family].name == family


def test_the_card(tmp_path: Path) -> None:
    """What it is, how it was made, both seeds, its siblings; and its lines of Python are Python."""
    folder = save("llava", tmp_path / "mine")
    with pytest.raises(BadInputError, match=r"training.json' does not exist"):
        write_model_card(folder)
    MADE.save(folder)
    assert Training.load(folder) == MADE
    (folder / "accuracy.json").write_text(planted(100).to_json())
    write_model_card(folder)
    card = (folder / "README.md").read_text()
    assert "a slash" not in card
    assert "siblings" not in card
    (folder / "accuracy-seed5.json").write_text(planted(500).to_json())
    adapter = folder / "adapters" / "place"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(BadInputError, match=r"does not say what the adapter does"):
        write_model_card(folder)
    (adapter / "accuracy.json").write_text(json.dumps(ADAPTER))
    assert sibling(folder, "place") == {
        "style followed": (0, 293 / 300),
        "exactly right": (1 / 300, 290 / 300),
        "questions": (0.75, 0.5),
        "styles": (0.9, 0.3),
    }
    write_model_card(folder)
    card = (folder / "README.md").read_text()
    for part in (
        "# mine:",
        "`LlavaForConditionalGeneration`",
        "CLIP",
        "71.2 minutes on 2 CPU cores, seed 4 (batch 16, steps 9)",
        MADE.command,
        "0.103 / 0.503",
        "2 trainings by the same recipe, seeds 4 and 5",
        "| [place](adapters/place/README.md) | 0.000 → 0.977 | 0.003 → 0.967 | 0.750 → 0.500 | 0.900 → 0.300 |",
        "right in 100 of 999 / 500 of 999 cases",
        "The scenes have seed 6;",
        "black circle, purple square",
        "700 of 1000 in `full`, 3 of 1000 in `short`",
        "on 1000 fresh scenes",
    ):
        assert part in card, part
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    ast.parse(code)
    assert 'HookedMM.small("mine")' in code
