"""Top tokens of a store, end to end, against the lens of each row by itself."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from analyses.by_sample import mean_scores
from analyses.layers import Layers
from analyses.result import Result
from analyses.top_tokens import class_tokens
from analyses.top_tokens_command import count_tokens, main
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.small import small_model_path
from hooked_mm.store import ActivationStore
from hooked_mm.word_classes import words_of


@pytest.fixture(scope="module")
def store(llava: HookedMM, images: list[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """Three layers of image and text rows of three samples."""
    batch = llava.prepare(images[:3], ["what place is this ?", "what", "what colour is the circle ?"])
    names = ["blocks.0.hook_resid_pre", "blocks.2.hook_resid_post", "blocks.5.hook_resid_post"]
    _, cache = llava.run_with_cache(batch, names)
    rows = [
        {
            "sample": f"s{sample}",
            "position": position,
            "modality": ["pad", "text", "image"][batch.modality[sample, position]],
        }
        for sample, position in batch.mask().nonzero().tolist()
    ]
    values = {name: cache[name][batch.mask()] for name in names}
    samples = [{"sample": f"s{n}", "sample_number": n} for n in range(3)]
    made_by = {"model": str(small_model_path("llava"))}
    return ActivationStore.from_arrays(tmp_path_factory.mktemp("store") / "rows", values, rows, samples, made_by)


def test_counts_and_shares_are_those_of_single_rows(llava: HookedMM, store: ActivationStore) -> None:
    """However the rows are cut; a class's share is the mean over samples of the share within each."""
    layers = Layers.of_store(store).of("image")
    colours = class_tokens(llava.tokenizer, words_of("colours"), 72)
    counted = count_tokens(layers, llava, 3, {"colours": colours}, size=50)
    assert list(counted.tokens) == [0, 3, 6]
    for place, layer in enumerate([0, 3, 6]):
        best = llava.to_logits(layers.values(layer)).softmax(-1).topk(3)
        times = Counter(best.indices.flatten().tolist())
        found = counted.tokens[layer].best(100)
        assert {item.token: item.count for item in found} == times
        inside = torch.tensor([llava.tokenizer.decode([t]) in words_of("colours") for t in best.indices[:, 0].tolist()])
        shares = inside.reshape(3, 64).double().mean(1)
        one = [
            s for s in mean_scores(counted.sums, counted.rows, "image", list(counted.tokens), 50, 0) if s.layer == layer
        ]
        assert one[0].score == "top token is of colours"
        assert one[0].value == pytest.approx(float(shares.mean()))
        assert (one[0].rows, one[0].samples) == (192, 3)
        assert one[0].low <= one[0].value <= one[0].high
        assert one[1].value == pytest.approx(float(best.values[:, 0].mean()), rel=1e-5)
        assert counted.rows.tolist() == [64] * 3
        assert counted.sums["top token is of colours"][:, place].tolist() == (shares * 64).tolist()
    assert all(s.low != s.low for s in mean_scores(counted.sums, counted.rows, "image", list(counted.tokens), 0, 0))


def test_the_command_writes_tables_and_curves(store: ActivationStore, tmp_path: Path) -> None:
    """From a store alone: a CSV of all listed tokens, a Markdown table, scores and a plot; no model is loaded."""
    out = tmp_path / "out"
    main(
        [
            "--store",
            str(store.path),
            "--output",
            str(out),
            "--count",
            "4",
            "--word_classes",
            "[colours]",
            "--draws",
            "20",
        ]
    )
    with open(out / "tokens.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 3 * 4
    assert {row["modality"] for row in rows} == {"all", "text", "image"}
    assert (out / "tokens.md").read_text().count("\n") == 2 + 3
    result = Result.load(out)
    assert len(result.scores) == 2 * 3 * 3
    assert json.loads((out / "result.json").read_text())["settings"]["word_classes"] == ["colours"]
    assert (out / "top_token_is_of_colours.png").is_file()
    with pytest.raises(BadInputError, match="already holds a result"):
        main(["--store", str(store.path), "--output", str(out)])
