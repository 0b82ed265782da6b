"""What the editor takes, and what it says of what it does not."""

from __future__ import annotations

import io
import struct
import time
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image, ImageDraw

gradio = pytest.importorskip("gradio")

from gradio.components.image_editor import EditorData  # noqa: E402
from gradio.data_classes import FileData  # noqa: E402

from hooked_mm.explorer.uploads import KEPT, MOST_KEPT, PENDING, Sweeper, editor, sweep  # noqa: E402


@pytest.fixture(scope="module")
def made() -> Any:
    """An editor as the page has it."""
    with gradio.Blocks():
        return editor(type="pil", layers=False)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The bytes of a file."""
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says of itself that it is huge."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


def held(folder: Path, data: bytes, name: str = "a.png") -> EditorData:
    """What an editor holds of a file that was uploaded."""
    (folder / name).write_bytes(data)
    file = FileData(path=str(folder / name))
    return EditorData(background=file, layers=[], composite=file)


PLAIN = Image.new("RGB", (60, 40), "red")
BAD = {
    "text": (b"not a picture at all", "no picture that can be read; there are: PNG, JPEG, WEBP, BMP, GIF"),
    "empty": (b"", "no picture that can be read"),
    "truncated": (encoded(Image.effect_noise((200, 200), 50))[:-900], "can't be read as a picture"),
    "torn": (encoded(PLAIN)[:20], "no picture|can't be read as a picture"),
    "bomb": (bomb(60_000, 60_000), "too large"),
    "rather large": (bomb(7000, 6000), "7000 x 6000 pixels, 42 million; at most 40 million"),
    "drawing": (b"<svg xmlns='http://www.w3.org/2000/svg'><image href='/etc/passwd'/></svg>", "no picture"),
    "page": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no picture"),
    "other format": (encoded(PLAIN, "TIFF"), "no picture"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_picture_is_refused_in_words(made: Any, tmp_path: Path, kind: str) -> None:
    """Whatever it is called; the message names no file of the server, and Gradio writes no traceback."""
    data, reason = BAD[kind]
    with pytest.raises(gradio.Error, match=reason) as caught:
        made.preprocess(held(tmp_path, data))
    assert str(tmp_path) not in str(caught.value)
    assert not caught.value.print_exception


def test_a_file_that_has_gone_is_refused_in_words(made: Any, tmp_path: Path) -> None:
    """Kept for minutes only: the visitor may come back later."""
    payload = held(tmp_path, encoded(PLAIN))
    (tmp_path / "a.png").unlink()
    with pytest.raises(gradio.Error, match="can't be read as a picture") as caught:
        made.preprocess(payload)
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_pictures_are_taken_as_they_are(made: Any, tmp_path: Path, kind: str) -> None:
    """Size and colour; in every format that is named."""
    image = PLAIN.copy()
    ImageDraw.Draw(image).rectangle((0, 0, 29, 39), fill="blue")
    found = made.preprocess(held(tmp_path, encoded(image, kind), f"a.{kind.lower()}"))
    assert found["background"].size == (60, 40)
    left, right = (found["background"].convert("RGB").getpixel((at, 20)) for at in (10, 50))
    assert left[2] > 200 > left[0]
    assert right[0] > 200 > right[2]


def test_an_empty_editor_is_empty(made: Any) -> None:
    """Nothing was loaded, or nothing is left of it."""
    assert made.preprocess(None) is None
    assert made.preprocess(EditorData(background=None, layers=[], composite=None))["composite"] is None


def test_what_is_sent_ahead_is_bounded(made: Any) -> None:
    """Pages that are closed before they ask leave at most so many; the oldest goes first, what is renewed stays."""
    pending = made.blob_storage
    for number in range(PENDING):
        pending[f"page {number}"] = SimpleNamespace(background=number)
    pending["page 0"] = SimpleNamespace(background="again")
    for number in range(PENDING, PENDING + 5):
        pending[f"page {number}"] = SimpleNamespace(background=number)
    assert len(pending) == PENDING
    assert pending["page 0"].background == "again"
    assert [f"page {number}" in pending for number in (1, 5, 6, PENDING + 4)] == [False, False, True, True]
    pending.clear()


def test_every_editor_has_its_own_pictures(made: Any) -> None:
    """Those of one page are not another's, and files are looked for before they are old."""
    with gradio.Blocks():
        other = editor(type="pil")
    made.blob_storage["a"] = SimpleNamespace()
    assert "a" not in other.blob_storage
    made.blob_storage.clear()
    assert KEPT[0] < KEPT[1]


def test_old_files_go_whatever_brought_them(tmp_path: Path) -> None:
    """Those of uploads that ended too early too, in any folder; what is young stays and is counted."""
    (tmp_path / "a").mkdir()
    for place, size in (("a/x.png", 30), ("y", 12)):
        (tmp_path / place).write_bytes(bytes(size))
    assert sweep(tmp_path, 60) == 42
    time.sleep(0.02)
    (tmp_path / "z").write_bytes(bytes(5))
    assert sweep(tmp_path, 0.01) == 5
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["z"]


def test_uploads_together_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond so many bytes no more are taken, until some are old."""
    from hooked_mm.explorer import uploads

    sweeper = Sweeper(tmp_path)
    (tmp_path / "x").write_bytes(bytes(10))
    assert not sweeper.full()
    monkeypatch.setattr(uploads, "MOST_KEPT", 9)
    assert sweeper.full()
    monkeypatch.setattr(uploads, "KEPT", (0.01, -1))
    assert not sweeper.full()
    (tmp_path / "x").write_bytes(bytes(10))
    with sweeper:
        end = time.monotonic() + 5
        while (tmp_path / "x").exists() and time.monotonic() < end:
            time.sleep(0.01)
    assert not (tmp_path / "x").exists()
    assert MOST_KEPT > 2**30
