"""Samples become batches or are listed with the reason; how they are put together changes nothing."""

from __future__ import annotations

import struct
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.image_utils import load_image

from hooked_mm.data import Sample
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.loading import Batches, BatchMaker, Prepared, cut, deal

TEXT = "what place is this ?"


def made(model: HookedMM, samples: list[Sample], **options: Any) -> Prepared:
    """One batch of these samples."""
    settings: dict[str, Any] = {"answer": "none", **options}
    return BatchMaker(samples, model, **settings)(range(len(samples)))


def pixels(model: HookedMM, source: Any) -> torch.Tensor:
    """What the model gets of one picture."""
    batch = made(model, [Sample("x", source, TEXT)]).batch
    assert batch is not None
    return batch.inputs["pixel_values"]


def bomb(path: Path) -> None:
    """A PNG of a few bytes that unpacks to 400 megapixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(2501 * 20_000), 9))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + body + chunk(b"IEND", b""))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every kind of file that a large data set has somewhere; all show red over blue."""
    folder = tmp_path_factory.mktemp("pictures")
    whole = Image.new("RGB", (64, 64), "red")
    whole.paste("blue", (0, 32, 64, 64))
    whole.save(folder / "plain.png")
    noise = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "noise.jpg", quality=95)
    data = (folder / "noise.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(data[: len(data) // 2])
    (folder / "cut_in_the_header.jpg").write_bytes(data[:40])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("this is no picture")
    (folder / "folder.jpg").mkdir()
    bomb(folder / "bomb.png")
    whole.convert("CMYK").save(folder / "cmyk.tif")
    whole.convert("P", palette=Image.Palette.ADAPTIVE).save(folder / "palette.png")
    clear = whole.convert("RGBA")
    clear.paste((0, 255, 0, 0), (0, 0, 16, 64))
    clear.quantize(8).save(folder / "clear.png")
    frames = [whole, Image.new("RGB", (64, 64), "green")]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer turns it by a quarter, clockwise
    whole.rotate(90).save(folder / "lying.png", exif=exif)
    Image.fromarray(np.full((64, 64), 32768, np.uint16)).save(folder / "sixteen.png")
    whole.resize((1, 1)).save(folder / "dot.png")
    whole.resize((1, 4000)).save(folder / "line.png")
    return folder


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing.jpg", "does not exist"),
        ("cut.jpg", "broken"),
        ("cut_in_the_header.jpg", "broken"),
        ("empty.jpg", "not an image"),
        ("text.jpg", "not an image"),
        ("folder.jpg", "does not exist"),
        ("bomb.png", "suspiciously large"),
    ],
)
def test_files_that_can_not_be_used_are_listed(llava: HookedMM, pictures: Path, name: str, reason: str) -> None:
    """The sample is named with a reason that names the file; its neighbours are as they are without it."""
    good = [Sample("a", pictures / "plain.png", TEXT), Sample("b", [pictures / "noise.jpg"], TEXT)]
    found = made(llava, [good[0], Sample("bad", str(pictures / name), TEXT), good[1]])
    assert [sample.id for sample in found.samples] == ["a", "b"]
    assert found.numbers == [0, 2]
    ((entry),) = found.skipped
    assert entry["sample"] == "bad"
    assert reason in entry["reason"]
    assert name in entry["reason"]
    without = made(llava, good).batch
    assert found.batch is not None
    assert without is not None
    assert all(torch.equal(value, without.inputs[key]) for key, value in found.batch.inputs.items())


@pytest.mark.parametrize("name", ["cmyk.tif", "palette.png", "moving.gif", "lying.png"])
def test_pictures_are_taken_as_viewers_show_them(llava: HookedMM, pictures: Path, name: str) -> None:
    """Every file that shows red over blue gives the model the same."""
    torch.testing.assert_close(pixels(llava, pictures / name), pixels(llava, pictures / "plain.png"), atol=0.02, rtol=0)


def test_what_is_transparent_is_white(llava: HookedMM, pictures: Path) -> None:
    """Not the colour that the file happens to have there."""
    expected = Image.open(pictures / "plain.png").copy()
    expected.paste("white", (0, 0, 16, 64))
    torch.testing.assert_close(pixels(llava, pictures / "clear.png"), pixels(llava, expected), atol=0.02, rtol=0)


def test_sixteen_bits_keep_their_brightness(llava: HookedMM, pictures: Path) -> None:
    """Middle grey is middle grey, not white."""
    grey = pixels(llava, Image.new("RGB", (64, 64), (128, 128, 128)))
    torch.testing.assert_close(pixels(llava, pictures / "sixteen.png"), grey, atol=0.02, rtol=0)


def test_photos_stand_upright(llava: HookedMM, pictures: Path) -> None:
    """As transformers' own loader turns them."""
    turned = load_image(str(pictures / "lying.png"))
    assert torch.equal(pixels(llava, pictures / "lying.png"), pixels(llava, turned))


@pytest.mark.parametrize("family", ["llava", "idefics2", "qwen2_vl", "molmo"])
def test_very_thin_and_very_small_pictures(pictures: Path, family: str) -> None:
    """They are taken, or listed because the processor refuses them; the sample beside them stays."""
    model = HookedMM.small(family, check=False)
    names = ("plain", "dot", "line")
    found = made(model, [Sample(name, pictures / f"{name}.png", TEXT) for name in names])
    kept = [sample.id for sample in found.samples]
    assert "plain" in kept
    assert sorted([*kept, *(entry["sample"] for entry in found.skipped)]) == sorted(names)
    assert all("the processor refused it (" in entry["reason"] for entry in found.skipped)
    assert found.batch is not None
    assert len(found.batch) == len(kept)


def test_other_bad_samples(llava: HookedMM, pictures: Path) -> None:
    """Half of the pictures, no prompt, no answer, an array for a picture: each with its reason."""
    plain = pictures / "plain.png"
    samples = [
        Sample("half", [plain, pictures / "none.jpg"], TEXT, "sea"),
        Sample("mute", None, " \n", "sea"),
        Sample("silent", plain, TEXT),
        Sample("array", [np.zeros((4, 4, 3))], TEXT, "sea"),  # type: ignore[list-item]
        Sample("good", plain, TEXT, "sea"),
    ]
    found = made(llava, samples, answer="given")
    assert [sample.id for sample in found.samples] == ["good"]
    reasons = {entry["sample"]: entry["reason"] for entry in found.skipped}
    for name, part in {"half": "none.jpg", "mute": "empty", "silent": "no answer", "array": "ndarray"}.items():
        assert part in reasons[name]
    with pytest.raises(BadInputError, match=r"'mute': the prompt is empty.*on_error='skip'"):
        made(llava, samples[1:], on_error="stop")


def test_an_answer_begins_with_its_prefix(llava: HookedMM, pictures: Path) -> None:
    """Given answers stand behind it; without them the prompt ends with it. All of it has the role of an answer."""
    samples = [Sample("x", pictures / "plain.png", TEXT, "sea .")]
    for answer, said in (("given", ["in", "the", "sea", "."]), ("generated", ["in", "the"])):
        batch = made(llava, samples, answer=answer, answer_prefix="in the").batch
        assert batch is not None
        assert [t for t, r in zip(batch.tokens[0], batch.mask(role="answer")[0], strict=True) if r] == said


def test_one_picture_of_many_samples(llava: HookedMM, pictures: Path) -> None:
    """It is told which image of the batch shows which distinct picture, by path or by object; else nothing is told."""
    shown = Image.open(pictures / "plain.png").copy()
    noise = pictures / "noise.jpg"
    found = made(llava, [Sample(f"s{n}", source, TEXT) for n, source in enumerate([noise, shown, str(noise), shown])])
    assert found.picture_of == (0, 1, 0, 1)
    assert found.batch is not None
    assert found.pictures is not None
    values = found.pictures.inputs["pixel_values"]
    assert torch.equal(values[list(found.picture_of)], found.batch.inputs["pixel_values"])
    assert made(llava, [Sample("a", noise, TEXT), Sample("b", shown, TEXT)]).pictures is None


ROWS = st.lists(st.tuples(st.integers(1, 60), st.sampled_from([None, "x", "y"])), max_size=40)


@given(ROWS, st.integers(1, 7), st.one_of(st.none(), st.integers(1, 200)))
def test_cut(rows: list[tuple[int, str | None]], batch_size: int, most: int | None) -> None:
    """Every row once; no batch is larger than allowed; what shares a picture stands in sequence."""
    lengths, keys = [length for length, _ in rows], [key for _, key in rows]
    batches = cut(lengths, keys, batch_size, most)
    order = [row for batch in batches for row in batch]
    assert sorted(order) == list(range(len(rows)))
    for batch in batches:
        assert 1 <= len(batch) <= batch_size
        assert most is None or len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= most
    for key in ("x", "y"):
        places = [place for place, row in enumerate(order) if keys[row] == key]
        assert places == list(range(places[0], places[-1] + 1)) if places else True
    if set(keys) <= {None}:
        assert [lengths[row] for row in order] == sorted(lengths)


def test_questions_about_one_picture_share_a_batch() -> None:
    """Where that costs no more than a quarter of the batch before."""
    keys = [number // 5 for number in range(30)]
    assert [len(rows) for rows in cut([9] * 30, keys, 12)] == [10, 10, 10]
    assert [len(rows) for rows in cut([9] * 30, keys, 8)] == [8, 7, 8, 7]


@given(st.lists(st.integers(), unique=True, max_size=70), st.integers(1, 5), st.integers(1, 20))
def test_samples_are_dealt_out_in_blocks(numbers: list[int], processes: int, block: int) -> None:
    """Every one to one process; none is idle while there is enough for all, and shares differ by a block at most."""
    shares = [deal(numbers, rank, processes, block) for rank in range(processes)]
    assert sorted(number for share in shares for number in share) == sorted(numbers)
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= block
    assert min(sizes) > 0 or len(numbers) < processes
    place = {number: index for index, number in enumerate(numbers)}
    for share in shares:
        breaks = sum(place[b] != place[a] + 1 for a, b in pairwise(share))
        assert breaks <= len(share) // max(1, min(block, len(numbers) // processes))


@given(st.sets(st.integers(0, 200), max_size=90), st.integers(1, 3))
def test_every_sample_is_handed_out_once(llava: HookedMM, numbers: set[int], batch_size: int) -> None:
    """Those asked for, in batches of the size allowed."""
    data = [Sample(f"s{number}", None, "what " * (1 + number % 7) + "?") for number in range(201)]
    batches = list(Batches(BatchMaker(data, llava, "none"), sorted(numbers), batch_size))
    assert sorted(number for batch in batches for number in batch.numbers) == sorted(numbers)
    assert all(len(batch.numbers) <= batch_size for batch in batches)
    assert all(sample.id == f"s{n}" for b in batches for n, sample in zip(b.numbers, b.samples, strict=True))


def test_worker_processes_hand_out_the_same(llava: HookedMM, pictures: Path) -> None:
    """Two workers share the windows: the same samples with the same tensors."""
    data = [Sample(f"s{n}", pictures / ("none" if n == 30 else "plain.png"), TEXT) for n in range(70)]
    batches = Batches(BatchMaker(data, llava, "none"), range(70), 2)
    loader = torch.utils.data.DataLoader(batches, batch_size=None, num_workers=2)
    alone, helped = ({tuple(b.numbers): b for b in source} for source in (batches, loader))
    assert alone.keys() == helped.keys()
    for key, one in alone.items():
        assert one.skipped == helped[key].skipped
        assert one.batch is not None
        other = helped[key].batch
        assert other is not None
        assert all(torch.equal(value, other.inputs[name]) for name, value in one.batch.inputs.items())


def test_batches_shrink_from_the_next_window_on(llava: HookedMM) -> None:
    """After memory was not enough, later batches are smaller; never larger again, never empty."""
    data = [Sample(f"s{n}", None, "what ?") for n in range(200)]
    batches = Batches(BatchMaker(data, llava, "none"), range(200), 8)
    sizes = []
    for batch in batches:
        sizes.append(len(batch.numbers))
        if len(sizes) == 3:
            batches.shrink(2)
    assert sizes[:16] == [8] * 16
    assert set(sizes[16:]) == {2}
    batches.shrink(0)
    assert batches.batch_size == 1
