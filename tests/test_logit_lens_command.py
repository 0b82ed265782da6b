"""The lens as a command: pages, cells and scores of a data set, against the lens of each sample by itself."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from analyses import analyse_command
from analyses.logit_lens import logit_lens
from analyses.logit_lens_command import SCORES, main, sample_means
from analyses.result import Result
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.reader import ModelSource
from hooked_mm.scenes.dataset import SceneDataset
from hooked_mm.small import SMALL_MODELS
from hooked_mm.testing.miniatures import miniature
from tests.lens_samples import made_sample
from tests.pages import broken_links, run_page
from tests.processes import run_in_processes


def _command(out: Path, *options: str, model: str = "llava", size: int = 4) -> list[str]:
    data = ["--model.id", f"small:{model}", "--model.dtype", "float32", "--data", "ScenesDataModule"]
    more = ["--data.size", str(size), "--draws", "20", "--output", str(out)]
    return [*data, *more, *options]


def _cells(out: Path) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """The table's rows by sample and layer, in the order of positions."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in pq.read_table(out / "cells").to_pylist():
        found.setdefault((row["sample"], row["layer"]), []).append(row)
    return {key: sorted(rows, key=lambda row: row["position"]) for key, rows in found.items()}


def _told(path: Path) -> Any:
    """What a page's script reads."""
    block = path.read_text().split('<script type="application/json" id="data">')[1]
    return json.loads(block.split("</script>")[0])


@pytest.mark.usefixtures("loaded")
def test_pages_cells_and_scores_are_those_of_each_sample_by_itself(llava: HookedMM, tmp_path: Path) -> None:
    """Whatever shared its batch; scores are means over samples of means over positions, worked out by hand."""
    out = tmp_path / "lens"
    main(_command(out, "--samples", "3", "--answer", "given", "--layers", "[0, 3, -1]", "--top", "4"))
    cells = _cells(out)
    data = SceneDataset(4)
    assert set(cells) == {(data[n].id, layer) for n in range(3) for layer in (0, 3, 6)}
    means: dict[tuple[str, str, int], list[float]] = {}
    for number in range(3):
        sample = data[number]
        batch = llava.prepare([sample.images], sample.text, [sample.answer])
        (lens,) = logit_lens(llava, batch, layers=[0, 3, 6], top=4)
        spelt = [[llava.tokenizer.decode([n]) for n in row[:, 0].tolist()] for row in lens.cells.ids]
        assert lens.cells.rank is not None
        for place, layer in enumerate([0, 3, 6]):
            rows = cells[sample.id, layer]
            assert [row["position"] for row in rows] == list(range(len(lens.positions)))
            shares = np.array([row["probabilities"] for row in rows])
            assert np.allclose(shares, lens.cells.probabilities[place], atol=1e-5)
            assert np.mean([row["rank"] for row in rows] == lens.cells.rank[place].numpy()) > 0.99
            assert [row["words"][0].strip() for row in rows] == spelt[place]
            assert [row["word"].strip() for row in rows] == spelt[-1]
            image = np.array([row["kind"] == "image" for row in rows])
            assert image.sum() == 64
            same = np.array(spelt[place]) == np.array(spelt[-1])
            entropy, chosen = ([row[name] for row in rows] for name in ("entropy", "probability"))
            for name, value in zip(SCORES, (shares[:, 0], entropy, same, chosen), strict=True):
                for modality, mask in (("all", image | True), ("text", ~image), ("image", image)):
                    means.setdefault((name, modality, layer), []).append(float(np.asarray(value, float)[mask].mean()))
        told = _told(out / "pages" / f"{number:05d}.html")
        assert (told["title"], told["prompt"], told["answer"]) == (sample.id, sample.text, sample.answer)
        assert told["layers"] == [0, 3, 6]
        assert f"pages/{number:05d}.html" in (out / "index.html").read_text()
    found = Result.load(out)
    assert len(found.scores) == len(means) == 4 * 3 * 3
    for score in found.scores:
        assert score.layer is not None
        assert score.value == pytest.approx(np.mean(means[score.score, score.modality, score.layer]), abs=1e-5)
        assert score.low <= score.value + 1e-12 <= score.high + 2e-12
        assert score.samples == 3
    assert (found.analysis, found.model) == ("logit-lens", "small:llava")
    assert not list((out / "pages").glob("00003*"))
    assert (out / "agreement_with_the_last_layer.png").is_file()


def test_what_has_no_image_tokens_and_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A modality without positions has no mean; unknown ones, lenses without words, models without processors."""
    sample = made_sample()
    with pytest.raises(BadInputError, match="without chosen words"):
        sample_means(sample, ["all"])
    cells = sample.lens.cells
    object.__setattr__(cells, "rank", torch.zeros(4, 40, dtype=torch.long))
    object.__setattr__(cells, "chosen", cells.probabilities[..., 1])
    means, rows = sample_means(sample, ["image", "text"])
    assert rows == [6, 34]
    assert means[0, 2, 0] == pytest.approx(float(cells.probabilities[2, 5:11, 0].mean()))
    sample.kinds[5:11] = ["text"] * 6  # type: ignore[index]
    means, rows = sample_means(sample, ["image", "text"])
    assert means[0].isnan().all()
    assert not means[1].isnan().any()
    with pytest.raises(BadInputError, match="no modality 'video'; choose among all, text, image"):
        sample_means(sample, ["video"])
    monkeypatch.setattr(ModelSource, "load", lambda *_: HookedMM(miniature("llava")))
    with pytest.raises(BadInputError, match="made without a processor"):
        main(_command(tmp_path / "out"))
    with pytest.raises(BadInputError, match="samples=0"):
        main(_command(tmp_path / "none", "--samples", "0"))


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL_MODELS)
def test_every_small_model_with_answers_of_its_own(name: str, tmp_path: Path) -> None:
    """A page per sample with the generated answer; the last layer at the position before each answer token says it."""
    out = tmp_path / "lens"
    main(_command(out, "--answer", "generated", model=name))
    cells = _cells(out)
    last = max(layer for _, layer in cells)
    assert len({sample for sample, _ in cells}) == 4
    for own in (rows for (_, layer), rows in cells.items() if layer == last):
        kinds, tokens, words = ([row[column] for row in own] for column in ("kind", "token", "word"))
        answer = [n for n, kind in enumerate(kinds) if kind == "answer"]
        assert answer
        assert [tokens[n].strip() for n in answer] == [words[n - 1].strip() for n in answer]
    told = _told(out / "pages" / "00000.html")
    assert told["answer"]
    assert len(told["views"]) == (2 if name == "molmo" else 1)
    assert (told["views"][0]["rows"] == 0) == (name == "idefics2")


def _in_one_of_two(rank: int, count: int, out: Path, port: int) -> None:
    """As one of several processes that were started from outside, as by torchrun."""
    torch.set_num_threads(1)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(value) for name, value in {**ranks, **meeting}.items()})
    main(_command(out, "--trainer", "{devices: 2, strategy: ddp}", "--data.batch_size", "2", size=6))


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    """The same scores, pages and cells, each sample once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_in_processes(_in_one_of_two, 2, tmp_path / "two", port)
    main(_command(tmp_path / "one", size=6))
    one, two = Result.load(tmp_path / "one"), Result.load(tmp_path / "two")
    for first, second in zip(one.scores, two.scores, strict=True):
        assert (first.score, first.modality, first.layer) == (second.score, second.modality, second.layer)
        assert first.value == pytest.approx(second.value, abs=1e-6)
    names = [{path.name for path in (tmp_path / out / "pages").iterdir()} for out in ("one", "two")]
    assert names[0] == names[1]
    assert len(names[0]) == 6
    tables = [pq.read_table(tmp_path / out / "cells") for out in ("one", "two")]
    assert tables[0].num_rows == tables[1].num_rows
    assert len(list((tmp_path / "two" / "cells").iterdir())) == 2


@pytest.mark.slow
def test_the_page_of_docs_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its command and its Python, and what it says that they show."""
    monkeypatch.chdir(tmp_path)
    names = run_page("lenses.md", analyse=analyse_command.main)
    assert Path("lens.html").is_file()
    assert "star" in names["words"]
    assert len(list(Path("runs/lens/pages").iterdir())) == 12
    text = [round(score.value, 2) for score in Result.load("runs/lens").of("agreement with the last layer", "text")]
    assert (text[0], text[1], text[4]) == (0, 0.55, 0.95)
    assert not broken_links("lenses.md")
