"""What commands that explain tokens share: the walk over samples, what is written, scores with the share of samples."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from analyses.model_samples import Samples
from analyses.picture_maps import PictureMap
from analyses.targets import Targets
from analyses.token_maps import Draw, Explained, scores, walk, without_empty, write
from hooked_mm.batch import Batch
from hooked_mm.data import Sample, SampleDataModule
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.dataset import ScenesDataModule
from hooked_mm.tensor_folder import read_json, read_tensors

BOX = (0.0, 0.0, 8.0, 8.0)


class Options(SimpleNamespace):
    """Options of a command, which are also read by name."""

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


def options(**changes: Any) -> Options:
    plain = {
        "answer": "given",
        "tokens": "all",
        "kind": "logit",
        "samples": 2,
        "max_new_tokens": 3,
        "draws": 20,
        "seed": 0,
    }
    return Options(**{**plain, "name": "it", **changes})


def explain(batch: Batch, targets: Targets, pictures: Draw) -> list[Explained]:
    """A token's row, and a map where pictures are wanted."""
    found = []
    for number, sample in enumerate(targets.sample.tolist()):
        one = Explained(
            {("row", "text"): targets.row[number : number + 1].double()}, arrays={"row": targets.row[number]}
        )
        if pictures[sample] is not None:
            one.maps = {"layer-1": [PictureMap(0, False, torch.tensor([[1.0, 2.0]]), BOX)]}
            one.captions = {"layer-1": "the <first>"}
        found.append(one)
    return found


def test_samples_are_walked_in_batches_and_the_first_are_drawn(llava: HookedMM, tmp_path: Path) -> None:
    data = ScenesDataModule(task="caption", size=3, batch_size=2)
    made = options(model=SimpleNamespace(name="small"), data=data, output=tmp_path)
    samples = Samples(llava, data, "given")
    found = walk(samples, made, explain)
    batches = [batch for _, batch in samples]
    counts = [int(n) for batch in batches for n in batch.mask("text", "answer").sum(1)]
    assert found.tokens == counts
    assert len(found.about) == 2
    assert len(found.entries) == sum(counts[:2])
    result = write("row", "Rows", "a rule", found, [None], made, ["a note"], ("tokens",))
    (score,) = result.scores
    rows = [
        torch.arange(p - n, p).double().mean() - 1
        for batch in batches
        for p, n in zip([batch.length] * len(batch), batch.mask("text", "answer").sum(1), strict=True)
    ]
    assert score.value == pytest.approx(float(torch.stack(rows).mean()))
    assert (score.rows, score.samples, score.layer) == (sum(counts), 3, None)
    about = read_json(tmp_path, "maps", "maps", "")
    tensors = read_tensors(tmp_path, "maps", about)
    assert tensors["sample-1/answer-0/layer-1/picture-0"].tolist() == [[1, 2]]
    assert about["samples"][1]["boxes"]["sample-1/answer-0/layer-1/picture-0"] == [0, 0, 8, 8]
    page = (tmp_path / "gallery.html").read_text()
    assert "the &lt;first&gt;: 1 to 2" in page
    assert "a note" in page


def test_samples_without_such_a_token_are_counted(llava: HookedMM) -> None:
    data = ScenesDataModule(task="questions", size=2, batch_size=8)
    with pytest.raises(BadInputError, match="no sample has an answer"):
        walk(Samples(llava, data, "given"), options(tokens=[9]), explain)
    with pytest.raises(BadInputError, match="answer=none"):
        walk(Samples(llava, data, "none"), options(answer="none"), explain)


def test_means_are_over_tokens_then_samples() -> None:
    found = SimpleNamespace(tokens=[1, 3], sums={("s", "image"): [torch.tensor([2.0, 1.0]), torch.tensor([12.0, 0.0])]})
    made = scores(found, [0, 5], 10, 0)  # type: ignore[arg-type]
    assert [(one.layer, one.value, one.rows, one.samples) for one in made] == [(0, 3.0, 4, 2), (5, 0.5, 4, 2)]


def test_maps_of_rounding_alone_are_left_out_by_name() -> None:
    flat, full = (PictureMap(0, False, values, BOX) for values in (torch.zeros(2, 2), torch.tensor([[0.0, 1.0]])))
    kept, empty = without_empty({"a": [flat], "b": [flat, full], "c": [full]})
    assert list(kept) == ["b", "c"]
    assert empty == ["a"]


def test_a_batch_of_answers_without_a_word_is_counted_and_not_the_end(
    llava: HookedMM, images: list[Image.Image]
) -> None:
    """Both samples of the first batch say nothing but the answer's end."""
    end = llava.tokenizer.eos_token
    given = [
        Sample(str(number), image, "what place is this ?", said)
        for number, (image, said) in enumerate(zip(images, (end, end, "sea"), strict=False))
    ]
    data = SampleDataModule(given, batch_size=2)
    asked: list[str] = []

    def explain(batch: Batch, targets: Targets, _: object) -> list[Explained]:
        asked.extend(llava.tokenizer.decode([token]) for token in targets.token.tolist())
        return [Explained({("share", "image"): torch.ones(1)}) for _ in range(len(targets))]

    found = walk(Samples(llava, data, "given"), options(samples=0), explain)
    assert (found.unanswered, asked) == (2, ["sea"])
