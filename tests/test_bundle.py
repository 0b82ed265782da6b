"""Downloads: the program in them finds the same arrays again, and nothing in them is more than what was shown."""

from __future__ import annotations

import ast
import io
import json
import os
import runpy
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hooked_mm.explorer.asked import Asked
from hooked_mm.explorer.bundle import bundle, conversation_bundle, conversation_script, script
from hooked_mm.explorer.conversation import Conversation, Generation, ModelName
from hooked_mm.explorer.markup import panels_html
from hooked_mm.explorer.panels import Note, Picture, Pictures
from hooked_mm.explorer.tab import View
from hooked_mm.hooked import HookedMM
from tests.browser import chromium, opened
from tests.explored import ask, assert_same, made_again

EVIL = "<script>x</script>\"\"\"\n'''\\\nimport os; {arrays} %s \u2028 \ud800"

PYTHON = """\
import torch

logits, cache = model.run_with_cache(batch)
arrays = {
    "logits": logits,
    "middle": cache["blocks.1.hook_resid_post"][0].T,
    "tokens": torch.tensor(tokens),
    "places": torch.tensor(points) + len(images),
    "prompt": prompt.inputs["input_ids"],
}"""


@pytest.fixture
def asked(llava: HookedMM, images: list[Image.Image]) -> Asked:
    """A second turn, drawn at random, with a token and two places chosen."""
    before = Conversation().say("what color is the star ?", (images[0],)).answered('it\'s "red"\n')
    how = Generation(max_new_tokens=5, temperature=1.5, top_p=0.9, seed=3)
    return ask(
        llava,
        "describe the image .",
        images[1],
        before=before,
        generation=how,
        tokens=[1],
        points=[(0, 1.5, 2), (1, 3, 4)],
    )


def view_of(asked: Asked) -> View:
    """What a tab would show."""
    view = View([Note("word"), Pictures([Picture("a", asked.images[0]), Picture("b", asked.images[1])])], PYTHON)
    return replace(view, arrays=made_again(replace(view, arrays={}), asked))


def unzipped(data: bytes, folder: Path) -> list[str]:
    """All files of a zip, in a folder."""
    with zipfile.ZipFile(io.BytesIO(data)) as whole:
        whole.extractall(folder)
        return whole.namelist()


@pytest.mark.usefixtures("loaded")
def test_what_is_downloaded_finds_the_same_arrays(asked: Asked, tmp_path: Path) -> None:
    """Bit for bit: the pictures from their files, the turns, the drawn answer, what was chosen."""
    torch.manual_seed(99)
    view = view_of(asked)
    names = unzipped(bundle(asked, {"lens": view}, panels_html(view.panels)), tmp_path)
    assert names == sorted(
        ["about.json", "arrays-lens.safetensors", "page.html", "picture-1.png", "picture-2.png", "reproduce-lens.py"]
        + ["shown/lens-2-1.png", "shown/lens-2-2.png"]
    )
    torch.manual_seed(7)
    found = runpy.run_path(str(tmp_path / "reproduce-lens.py"))
    assert found["generated"].text == [asked.answer]
    again, shown = load_file(tmp_path / "again-lens.safetensors"), load_file(tmp_path / "arrays-lens.safetensors")
    assert_same(dict(sorted(again.items())), dict(sorted(view.arrays.items())))
    assert_same(dict(sorted(again.items())), dict(sorted(shown.items())))
    with Image.open(tmp_path / "shown/lens-2-2.png") as picture:
        assert picture.tobytes() == asked.images[1].tobytes()


@pytest.mark.slow
def test_it_runs_where_nothing_else_is(asked: Asked, tmp_path: Path) -> None:
    """As a program of its own, in another folder than its own."""
    view = view_of(asked)
    unzipped(bundle(asked, {"lens": view}, ""), tmp_path / "here")
    (tmp_path / "there").mkdir()
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(tmp_path / "here/reproduce-lens.py")]
    subprocess.run(command, cwd=tmp_path / "there", env=os.environ | {"PYTHONPATH": path}, check=True)
    again = load_file(tmp_path / "here/again-lens.safetensors")
    assert_same(dict(sorted(again.items())), dict(sorted(view.arrays.items())))
    assert not list((tmp_path / "there").iterdir())


@pytest.mark.usefixtures("loaded")
def test_a_conversation_is_downloaded_alone(asked: Asked, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One in the zip itself, two in a folder each; the program prints the answer."""
    unzipped(conversation_bundle([asked]), tmp_path)
    runpy.run_path(str(tmp_path / "reproduce.py"))
    assert capsys.readouterr().out == asked.answer + "\n"
    names = unzipped(conversation_bundle([asked, asked]), tmp_path)
    assert {name.split("/")[0] for name in names} == {"side-1", "side-2"}
    assert (tmp_path / "side-2/reproduce.py").read_bytes() == (tmp_path / "reproduce.py").read_bytes()


def test_without_pictures_and_turns_nothing_is_opened(llava: HookedMM) -> None:
    """The program is as short as the question."""
    text = script(ask(llava, "what is this ?"), "arrays = {}")
    assert "images = []" in text
    assert "Image.open" not in text
    assert "history = None" in text
    assert "do_sample=False" in text


def texts(found: Any) -> Iterator[str]:
    """All texts that stand in a program as literals."""
    return (node.value for node in ast.walk(found) if isinstance(node, ast.Constant) and isinstance(node.value, str))


def test_texts_of_visitors_are_literals(asked: Asked, tmp_path: Path) -> None:
    """Whatever they or the model wrote can't leave its quotation marks; the program's shape is that of any other."""
    said = Conversation().say(EVIL, asked.images[:1]).answered(EVIL).say(EVIL, asked.images[1:]).answered(EVIL)
    plain = Conversation().say("a", asked.images[:1]).answered("b").say("c", asked.images[1:]).answered("d")
    for maker in (conversation_script, lambda one: script(one, "arrays = {}")):
        evil, tame = (ast.parse(maker(replace(asked, conversation=one))) for one in (said, plain))
        assert list(texts(evil)).count(EVIL) == 3
        assert [type(node) for node in ast.walk(evil)] == [type(node) for node in ast.walk(tame)]
    names = unzipped(bundle(replace(asked, conversation=said), {}, panels_html([Note(EVIL)])), tmp_path)
    assert "page.html" in names
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;x&lt;/script&gt;") == 5


def test_the_page_runs_nothing_and_asks_for_nothing(asked: Asked, tmp_path: Path) -> None:
    """In a browser: its pictures are there, and a script that was smuggled into it is not run."""
    unzipped(
        bundle(asked, {}, panels_html([Note("what was shown")]) + "<script>document.title='run'</script>"), tmp_path
    )
    with chromium() as browser:
        page, wrong = opened(browser, tmp_path / "page.html")
        assert page.get_by_text("what was shown").is_visible()
        assert page.title() == "small:llava"
        assert page.evaluate("[...document.images].every(one => one.naturalWidth > 0) && document.images.length") == 2
        assert all("Content Security Policy" in one for one in wrong)


def test_about_says_how_it_came_about(asked: Asked, tmp_path: Path) -> None:
    """Versions, settings, the conversation, what was chosen; no way on this machine, no time."""
    unzipped(bundle(asked, {}, ""), tmp_path)
    about = json.loads((tmp_path / "about.json").read_text())
    assert about["versions"]["torch"] == torch.__version__
    assert about["model"] == {"name": "small:llava", "python": "HookedMM.small('llava')"}
    assert about["generation"] == {"max_new_tokens": 5, "temperature": 1.5, "top_p": 0.9, "seed": 3}
    assert [turn["pictures"] for turn in about["conversation"]] == [["picture-1.png"], ["picture-2.png"]]
    assert about["conversation"][1]["model"] == asked.answer
    assert about["chosen_tokens"] == [1]
    assert about["chosen_points"] == [[0, 1.5, 2], [1, 3, 4]]


def test_the_same_is_downloaded_as_the_same_bytes(asked: Asked) -> None:
    """No time and no order of the moment is in it."""
    view = view_of(asked)
    assert bundle(asked, {"lens": view}, "x") == bundle(asked, {"lens": view}, "x")


def test_no_way_on_the_server_is_told(asked: Asked, tmp_path: Path) -> None:
    """Of a model in a folder only the folder's own name; ids of the hub and small models are as they are."""
    for name in (str(tmp_path), "/srv/secret/model", "C:\\secret\\model"):
        data = bundle(replace(asked, name=ModelName("id", name, (("dtype", "float32"),))), {}, "")
        with zipfile.ZipFile(io.BytesIO(data)) as whole:
            everything = b"".join(whole.read(one) for one in whole.namelist())
        assert b"secret" not in everything
        assert str(tmp_path.parent).encode() not in everything


def test_what_a_camera_wrote_is_not_handed_on(asked: Asked) -> None:
    """Places and times beside a photograph's pixels stay with the visitor."""
    image = asked.images[0].copy()
    image.info["Comment"] = "taken at home"
    with zipfile.ZipFile(io.BytesIO(bundle(replace(asked, images=(image,)), {}, ""))) as whole:
        assert b"taken at home" not in whole.read("picture-1.png")
