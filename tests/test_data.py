"""Samples are decoded or listed with the reason why not; nothing is guessed and nothing is lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.image_utils import load_image

from hooked_mm.data import Loaded, Sample, SampleDataModule, load
from hooked_mm.errors import BadInputError


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A JPEG of noise, large enough to be cut."""
    path = tmp_path / "good.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, quality=95)
    return path


def broken(picture: Path, kind: str) -> Path:
    """A path that can't be read as an image, for one of several reasons."""
    path = picture.with_name(f"{kind.replace(' ', '_')}.jpg")
    whole = picture.read_bytes()
    if kind == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "cut in the header":
        path.write_bytes(whole[:40])
    elif kind == "text":
        path.write_text("this is no picture")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "folder":
        path.mkdir()
    return path


@pytest.mark.parametrize("kind", ["missing", "cut", "cut in the header", "text", "empty", "folder"])
def test_pictures_that_can_not_be_read_are_listed(picture: Path, kind: str) -> None:
    """The bad sample is named with a reason that names the file; its neighbours are decoded as they are."""
    bad = broken(picture, kind)
    samples = [
        Sample("a", picture, "what ?"),
        Sample("bad", str(bad), "what ?"),
        Sample("b", [picture, picture], "what ?"),
    ]
    loaded = load(samples)
    assert [sample.id for sample in loaded.samples] == ["a", "b"]
    assert [entry["sample"] for entry in loaded.skipped] == ["bad"]
    assert str(bad) in loaded.skipped[0]["reason"]
    with Image.open(picture) as image:
        expected = np.asarray(image)
    assert [len(pictures) for pictures in loaded.pictures] == [1, 2]
    assert all((np.asarray(image) == expected).all() for pictures in loaded.pictures for image in pictures)


def test_one_bad_picture_of_several_is_enough(picture: Path) -> None:
    """A sample is not used with a part of its pictures."""
    loaded = load([Sample("a", [picture, picture.with_name("none.jpg")], "what ?")])
    assert (loaded.samples, loaded.pictures) == ([], [])
    assert "none.jpg" in loaded.skipped[0]["reason"]


@pytest.mark.parametrize("text", ["", "  ", "\n\t"])
def test_empty_prompts_are_listed(text: str) -> None:
    """There is nothing to ask the model."""
    loaded = load([Sample("a", None, text), Sample("b", None, "what ?")])
    assert [entry["sample"] for entry in loaded.skipped] == ["a"]
    assert "empty" in loaded.skipped[0]["reason"]
    assert [sample.id for sample in loaded.samples] == ["b"]


def test_other_things_than_pictures_are_listed() -> None:
    """An array in place of a picture is refused by its type."""
    loaded = load([Sample("a", [np.zeros((4, 4, 3))], "what ?")])  # type: ignore[list-item]
    assert "ndarray" in loaded.skipped[0]["reason"]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "I;16"])
def test_pictures_of_every_mode_become_rgb(tmp_path: Path, mode: str) -> None:
    """Grey, palette and transparent pictures, open or on disk, are RGB after loading."""
    image = Image.new(mode, (9, 7))
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image.save(path)
    for source in (image, path):
        ((got,),) = load([Sample("a", source, "what ?")]).pictures
        assert (got.mode, got.size) == ("RGB", (9, 7))


def test_photos_stand_upright(tmp_path: Path) -> None:
    """A picture whose EXIF data says that it lies on its side is turned, as transformers' own loader does it."""
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (16, 32, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "x.jpg", exif=exif)
    ((got,),) = load([Sample("a", tmp_path / "x.jpg", "what ?")]).pictures
    assert (np.asarray(got) == np.asarray(load_image(str(tmp_path / "x.jpg")))).all()
    assert got.size == (16, 32)


def test_sixteen_bit_pictures_keep_their_brightness(tmp_path: Path) -> None:
    """Middle grey of 16 bits is middle grey of 8 bits, or the picture is refused; it is not white."""
    Image.fromarray(np.full((4, 4), 32768, np.uint16)).save(tmp_path / "x.png")
    loaded = load([Sample("a", tmp_path / "x.png", "what ?")])
    assert all(
        abs(np.asarray(image).astype(int) - 128).max() <= 1 for pictures in loaded.pictures for image in pictures
    )
    assert len(loaded.pictures) + len(loaded.skipped) == 1


def test_samples_without_pictures() -> None:
    """None means that there is none."""
    assert load([Sample("a", None, "what ?")]).pictures == [[]]


GOOD = [Sample(f"s{number}", None, f"question {number} ?") for number in range(11)]


@given(st.integers(1, 13), st.sets(st.sampled_from([sample.id for sample in GOOD] + ["other"])))
def test_every_sample_is_handed_out_once(batch_size: int, done: set[str]) -> None:
    """Whatever the batch size, and whatever is left out, the rest comes once and in order."""
    module = SampleDataModule(GOOD, batch_size).without(done)
    batches: list[Loaded] = list(module.predict_dataloader())
    expected = [sample for sample in GOOD if sample.id not in done]
    assert [sample for batch in batches for sample in batch.samples] == expected
    assert all(len(batch.samples) == batch_size for batch in batches[:-1])
    assert module.ids() == [sample.id for sample in expected]


def test_worker_processes_hand_out_the_same(picture: Path) -> None:
    """Decoding in another process changes nothing: samples, pictures and what was skipped."""
    samples = [Sample("a", picture, "x"), Sample("bad", picture.with_name("none"), "x"), Sample("b", None, "x")]
    alone, helped = (list(SampleDataModule(samples, 2, workers).predict_dataloader()) for workers in (0, 1))
    for here, there in zip(alone, helped, strict=True):
        assert here.samples == there.samples
        assert here.skipped == there.skipped
        for one, other in zip(here.pictures, there.pictures, strict=True):
            assert [image.tobytes() for image in one] == [image.tobytes() for image in other]


def test_repeated_ids_are_refused() -> None:
    """Two samples of one id could not be told apart in the store; the id is named."""
    with pytest.raises(BadInputError, match="'s3'"):
        SampleDataModule([*GOOD, GOOD[3]]).without(set())


def test_ids_of_a_data_set_are_asked_for_where_it_knows_them() -> None:
    """A data set with `ids()` need not make its samples to name them."""

    class Lazy(list):
        def ids(self) -> list[str]:
            return ["x", "y"]

        def __getitem__(self, index: object) -> Sample:
            raise AssertionError("a sample was made")

    assert SampleDataModule(Lazy("xy")).ids() == ["x", "y"]
    assert len(SampleDataModule(Lazy("xy")).without({"x"}).dataset) == 1  # type: ignore[arg-type]
