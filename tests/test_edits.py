"""Pictures from visitors: files and their limits, strokes as masks, shapes."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hooked_mm.errors import BadInputError
from hooked_mm.explorer.conversation import Conversation
from hooked_mm.explorer.edits import (
    EDITS,
    FORMATS,
    LONGEST,
    MOST_PIXELS,
    SHAPES,
    bounded,
    check_size,
    edited,
    mean_colour,
    opened,
    squared,
)
from hooked_mm.hooked import HookedMM


def halves(width: int = 8, height: int = 4) -> Image.Image:
    """Left half red, right half blue."""
    image = Image.new("RGB", (width, height), "red")
    image.paste("blue", (width // 2, 0, width, height))
    return image


def strokes(size: tuple[int, int], box: tuple[int, int, int, int], colour: str = "black") -> Image.Image:
    """A layer that is clear but for a rectangle."""
    layer = Image.new("RGBA", size, (0, 0, 0, 0))
    layer.paste(colour, box)
    return layer


def editor(image: Image.Image | None, *layers: Image.Image) -> dict[str, object]:
    """What the editor hands over: all of it RGBA, the composite as a person sees it."""
    size = image.size if image is not None else layers[0].size if layers else (8, 4)
    seen = image.convert("RGBA") if image is not None else Image.new("RGBA", size, "white")
    for layer in layers:
        seen = Image.alpha_composite(seen, layer.resize(size))
    background = None if image is None else image.convert("RGBA")
    return {"background": background, "layers": list(layers), "composite": seen}


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """The bytes of a file."""
    made = io.BytesIO()
    image.save(made, kind, **options)
    return made.getvalue()


def test_what_was_brushed_is_covered_or_kept() -> None:
    """Pixel by pixel: strokes on it, covered by the mean colour, or all else covered."""
    value = editor(halves(), strokes((8, 4), (0, 0, 2, 4), "lime"))
    paint, cover, keep = (np.array(edited(value, how)) for how in EDITS)
    mean = [128, 0, 128]
    assert (paint[:, :2] == [0, 255, 0]).all()
    assert (paint[:, 2:4] == [255, 0, 0]).all()
    assert (cover[:, :2] == mean).all()
    assert (cover[:, 2:] == np.array(halves())[:, 2:]).all()
    assert (keep[:, :2] == [255, 0, 0]).all()
    assert (keep[:, 2:] == mean).all()


def test_several_layers_of_other_sizes_are_one_mask() -> None:
    """A layer is scaled to the picture; faint traces are no stroke."""
    faint = Image.new("RGBA", (8, 4), (0, 0, 0, 60))
    value = editor(halves(), strokes((4, 2), (0, 0, 1, 2)), strokes((8, 4), (7, 0, 8, 4)), faint)
    keep = np.array(edited(value, "keep only the brushed"))
    covered = (keep == [128, 0, 128]).all(-1)
    assert covered.all(0).tolist() == [False, False, True, True, True, True, True, False]


@pytest.mark.parametrize("how", EDITS)
def test_a_picture_without_strokes_is_as_it_is(how: str) -> None:
    """Nothing brushed hides nothing, and a white picture is a picture (the usual test for emptiness drops it)."""
    for image in (halves(), Image.new("RGB", (5, 7), "white")):
        found = edited(editor(image), how)
        assert found is not None
        assert found.mode == "RGB"
        assert found.tobytes() == image.tobytes()


def test_an_empty_editor_has_no_picture() -> None:
    """Nothing loaded, nothing drawn; a drawing on the empty canvas is one."""
    clear = Image.new("RGBA", (8, 4), (0, 0, 0, 0))
    for value in (None, {}, editor(None), editor(None, clear), {"background": None, "layers": None, "composite": None}):
        assert edited(value) is None
    drawn = edited(editor(None, strokes((8, 4), (1, 1, 3, 3))))
    assert drawn is not None
    assert drawn.getpixel((0, 0)) == (255, 255, 255)
    assert drawn.getpixel((1, 1)) == (0, 0, 0)


def test_transparent_pictures_lie_on_white() -> None:
    """As a person sees them, not on black."""
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    for found in (edited(editor(clear)), opened(encoded(clear))):
        assert found is not None
        assert found.getpixel((0, 0)) == (255, 255, 255)


@given(st.integers(1, 40), st.integers(1, 40))
def test_a_squared_picture_is_square(width: int, height: int) -> None:
    """For every shape; the crop is the middle, the padded holds the whole, in its mean colour around it."""
    image = Image.effect_noise((width, height), 90).convert("RGB")
    pixels = np.array(image)
    assert squared(image, "as the model does") is image
    side = min(width, height)
    top, left = (height - side) // 2, (width - side) // 2
    assert (np.array(squared(image, "crop")) == pixels[top : top + side, left : left + side]).all()
    side = max(width, height)
    assert squared(image, "stretch").size == (side, side)
    padded = np.array(squared(image, "pad"))
    top, left = (side - height) // 2, (side - width) // 2
    assert (padded[top : top + height, left : left + width] == pixels).all()
    if width != height:
        corner = padded[0, 0] if top or left else padded[-1, -1]
        assert np.abs(corner - pixels.reshape(-1, 3).mean(0)).max() <= 0.5
    assert np.abs(np.array(mean_colour(image)) - pixels.reshape(-1, 3).mean(0)).max() <= 0.5


def test_unknown_edits_and_shapes_are_refused() -> None:
    """By name, with what there is."""
    with pytest.raises(BadInputError, match=r"no edit 'erase'.*paint"):
        edited(None, "erase")
    with pytest.raises(BadInputError, match=r"no shape 'fold'.*crop"):
        squared(halves(), "fold")
    assert SHAPES[0] == "as the model does"


@pytest.mark.parametrize("kind", FORMATS)
def test_files_of_known_formats_are_opened(kind: str, tmp_path: Path) -> None:
    """From bytes and from a path."""
    (tmp_path / "a.bin").write_bytes(encoded(halves(), kind))
    for source in (tmp_path / "a.bin", str(tmp_path / "a.bin"), encoded(halves(), kind)):
        found = opened(source)
        assert (found.mode, found.size) == ("RGB", (8, 4))


def test_a_turned_photograph_stands_upright_and_a_moving_one_still() -> None:
    """EXIF is followed; of an animation the first frame is shown."""
    exif = Image.Exif()
    exif[0x0112] = 6
    assert opened(encoded(halves(), "JPEG", exif=exif.tobytes())).size == (4, 8)
    frames = [Image.new("RGB", (3, 3), colour) for colour in ("red", "blue")]
    moving = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert opened(moving).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("data", [b"", b"hello", b"<svg/>", b"\x89PNG\r\n\x1a\n", encoded(halves())[:40]])
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    """With a message, whatever is wrong with it."""
    with pytest.raises(BadInputError):
        opened(data)


def test_other_formats_are_refused(tmp_path: Path) -> None:
    """Pillow could read them; fewer readers are fewer holes. An error names no path of the server."""
    for kind in ("TIFF", "PPM", "ICO", "PDF"):
        with pytest.raises(BadInputError, match=r"PNG, JPEG, WEBP, BMP, GIF|can't be read"):
            opened(encoded(Image.new("RGB", (32, 32)), kind))
    with pytest.raises(BadInputError) as caught:
        opened(tmp_path / "secret.png")
    assert str(tmp_path) not in str(caught.value)


def bomb(width: int, height: int) -> bytes:
    """A PNG that says it is huge and holds nothing."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(7000, 7000), (100_000, 100_000), (1, 2**31 - 1)])
def test_a_huge_picture_is_refused_by_its_head(size: tuple[int, int]) -> None:
    """Before a byte of it is unpacked: there is nothing in it to unpack."""
    with pytest.raises(BadInputError, match="million"):
        opened(bomb(*size))


def test_limits() -> None:
    """The largest that is taken, one more, and what is scaled down."""
    check_size((MOST_PIXELS, 1))
    with pytest.raises(BadInputError, match=r"8001 x 5000 pixels, 40 million; at most 40 million"):
        check_size((8001, 5000))
    small, told = bounded(halves())
    assert (small.size, told) == ((8, 4), "")
    large, told = bounded(Image.new("1", (2 * LONGEST, 3)))
    assert large.size == (LONGEST, 2)
    assert told == f"scaled from {2 * LONGEST} x 3 to {LONGEST} x 2 pixels"
    assert opened(encoded(Image.new("L", (5000, 10)))).size == (LONGEST, 8)
    with pytest.raises(BadInputError, match="million"):
        edited({"background": Image.new("1", (8001, 5000)), "layers": [], "composite": None})


def test_a_shape_that_a_processor_can_not_take_is_told(small: Callable[[str], HookedMM]) -> None:
    """A picture 300 times as wide as high: some models see it, of the others the visitor is told why they don't."""
    asked = Conversation().say("what colour is the star ?", (Image.new("RGB", (300, 1), "red"),))
    assert asked.prepare(small("llava")).layout.images
    with pytest.raises(BadInputError, match=r"refused the question or a picture .*aspect ratio"):
        asked.prepare(small("qwen2_vl"))
