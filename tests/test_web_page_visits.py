"""Visits of the explorer in a browser: every tab, two at once, wrong files, closed pages, texts that look like tags."""

from __future__ import annotations

import io
import runpy
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file

from hooked_mm.explorer.conversation import ModelName
from hooked_mm.explorer.desk import Desk
from hooked_mm.explorer.tab import load_tabs
from hooked_mm.hooked import HookedMM
from tests.browser import chromium
from tests.explored import assert_same
from tests.web_visit import PlainTab, Visit, serving

pytestmark = pytest.mark.slow

EVIL = "<img src=x onerror='window.bad=1'>**b** ${window.bad=1} {{7*7}}<script>window.bad=1</script>"

TABS = ("attention", "relevancy", "gradcam", "causal", "lens", "concepts", "steering", "geometry")


@pytest.fixture(scope="module")
def page(small: Callable[[str], HookedMM]) -> Iterator[tuple[str, Desk]]:
    """The page with all tabs and a plain one, of two models."""
    with serving(small, [PlainTab(), *load_tabs()], ("llava", "qwen2_vl")) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One browser for this file."""
    with chromium() as running:
        yield running


@pytest.fixture
def visit(browser: Any, page: tuple[str, Desk]) -> Iterator[Visit]:
    """A page that was just opened."""
    made = Visit(browser, page[0])
    yield made
    made.context.close()


@pytest.fixture
def scene(images: list[Image.Image], tmp_path: Path) -> Path:
    """A file with a picture."""
    images[0].save(tmp_path / "scene.png")
    return tmp_path / "scene.png"


def free(desk: Desk, seconds: float = 10) -> bool:
    """Whether the models' thread takes new work within so many seconds."""
    return desk.worker.start(lambda _: None).wait(seconds)


@pytest.mark.parametrize("name", TABS)
def test_a_whole_visit_of_a_tab(visit: Visit, scene: Path, name: str, tmp_path: Path) -> None:
    """Upload, ask, click a token and a patch, look, click into what is shown, download, run what was downloaded."""
    visit.load(scene)
    visit.ask("describe the image .")
    visit.page.locator("#hm-tokens-0 label").first.click()
    visit.page.locator("#hm-patches-0 [aria-label='picture 1, row 3, column 4']").click()
    visit.page.wait_for_selector("#hm-patches-0 [aria-pressed=true]")
    visit.page.get_by_role("tab", name=visit.titles()[name], exact=True).click()
    visit.look(name)
    result = visit.page.locator(f"#hm-{name}-result")
    assert result.locator(".hm-panel").count() > 0
    assert "hm-error" not in visit.page.inner_html(f"#hm-{name}-status")
    clicks = result.locator("button[data-pick]")
    if clicks.count():
        clicks.nth(clicks.count() // 2).click()
        visit.settle(name)
    files = zipfile.ZipFile(io.BytesIO(visit.download(name)))
    files.extractall(tmp_path / "found")
    # The models that it loads are the ones that are open here.
    runpy.run_path(str(tmp_path / f"found/reproduce-{name}.py"))
    again = load_file(tmp_path / f"found/again-{name}.safetensors")
    assert_same(again, load_file(tmp_path / f"found/arrays-{name}.safetensors"))
    assert visit.wrong == []


def test_two_visitors_at_once(browser: Any, page: tuple[str, Desk], scene: Path) -> None:
    """They ask at the same moment: both are answered, neither sees a word or a picture of the other."""
    one, other = Visit(browser, page[0]), Visit(browser, page[0])
    one.load(scene)
    one.send("what colour is the star ?")
    other.send("where is the secret treasure ?")
    for visit in (one, other):
        visit.page.wait_for_selector("#hm-chat .hm-model")
        visit.page.wait_for_function("!document.querySelector('#hm-chat .hm-cursor')")
    assert (one.page.locator("#hm-chat img").count(), other.page.locator("#hm-chat img").count()) == (1, 0)
    shown = one.look("plain"), other.look("plain")
    assert ["treasure" in text for text in shown] == [False, True]
    assert ["star" in text for text in shown] == [True, False]
    for visit in (one, other):
        visit.context.close()


def test_a_wrong_file_is_told(visit: Visit, tmp_path: Path, scene: Path) -> None:
    """A text that is named like a picture: the page says so, and goes on."""
    (tmp_path / "wrong.png").write_text("hello")
    assert "no picture that can be read" in visit.load_other(tmp_path / "wrong.png")
    visit.page.locator("#hm-compare-with").get_by_text("nothing").click()
    visit.load(tmp_path / "wrong.png")
    visit.load(scene)
    assert visit.ask("what colour is the star ?")


def test_a_huge_picture_is_told(visit: Visit, tmp_path: Path) -> None:
    """Refused by its head, in no time; one that is merely large is taken."""
    Image.new("RGB", (8000, 6000), "red").save(tmp_path / "huge.png")
    start = time.monotonic()
    assert "at most 40 million pixels" in visit.load_other(tmp_path / "huge.png")
    assert time.monotonic() - start < 20


def test_another_picture_is_compared_side_by_side(visit: Visit, tmp_path: Path, scene: Path) -> None:
    """The same question of a small and a large one: two answers, two grids."""
    Image.linear_gradient("L").resize((4000, 3000)).convert("RGB").save(tmp_path / "large.jpg")
    visit.load(scene)
    assert "the other side sees" in visit.load_other(tmp_path / "large.jpg")
    visit.send("what colour is the star ?")
    visit.page.wait_for_function("document.querySelectorAll('#hm-chat .hm-model').length == 2")
    visit.page.wait_for_selector("#hm-patches-1 button")
    visit.look("plain")
    assert visit.page.locator("#hm-plain-result .hm-side").count() == 2


@pytest.mark.parametrize(("size", "seen"), [((4000, 3000), "2048 × 1536"), ((1, 300), "1 × 300"), ((3, 3), "3 × 3")])
def test_a_picture_of_any_size_is_answered(visit: Visit, tmp_path: Path, size: tuple[int, int], seen: str) -> None:
    """Through the editor, as a visitor loads it; what would bring the editor to a halt is scaled down before."""
    Image.linear_gradient("L").resize(size).convert("RGB").save(tmp_path / "odd.png")
    visit.load(tmp_path / "odd.png")
    visit.ask("what is this ?")
    alt = visit.page.locator("#hm-chat img").get_attribute("alt")
    assert alt is not None
    assert f"{seen} pixels" in alt


def test_a_page_that_is_closed_ends_its_work(
    browser: Any, page: tuple[str, Desk], small: Callable[[str], HookedMM]
) -> None:
    """In the middle of an answer, and of a look: soon the model is free for others, and the visit is forgotten."""
    desk, before = page[1], len(page[1].visits)
    passes = []

    def slowly(*_: Any) -> None:
        passes.append(time.sleep(0.25))

    for looks in (False, True):
        visit = Visit(browser, page[0])
        if looks:
            visit.ask("what is this ?")
            visit.page.locator("#hm-plain-long input").click()
        handle = small("llava").hf_model.register_forward_pre_hook(slowly)
        if looks:
            visit.page.click("#hm-plain-look")
            visit.page.wait_for_selector("#hm-plain-status progress")
        else:
            visit.send("describe the image .")
            visit.page.wait_for_selector("#hm-chat .hm-cursor")
        passes.clear()
        visit.context.close()
        assert free(desk)
        handle.remove()
        assert len(passes) < 30
        end = time.monotonic() + 10
        while len(desk.visits) > before and time.monotonic() < end:
            time.sleep(0.1)
        assert len(desk.visits) <= before


def test_stop_ends_an_answer(visit: Visit, page: tuple[str, Desk], small: Callable[[str], HookedMM]) -> None:
    """The conversation is as it was, and the next question is answered."""
    handle = small("llava").hf_model.register_forward_pre_hook(lambda *_: time.sleep(0.25))
    visit.send("describe the image .")
    visit.page.wait_for_selector("#hm-chat .hm-cursor")
    visit.page.click("#hm-stop")
    assert free(page[1])
    handle.remove()
    visit.page.wait_for_function("!document.querySelector('#hm-chat .hm-cursor')")
    assert visit.page.locator("#hm-chat .hm-turn").count() == 0
    assert visit.ask("what is this ?")


def test_two_models_are_compared_side_by_side(visit: Visit, scene: Path) -> None:
    """One question, two answers, tokens and patches of each, two views; a click chooses on its own side."""
    visit.load(scene)
    visit.page.click("#hm-compare > button")
    visit.page.locator("#hm-compare-with").get_by_text("another model").click()
    visit.page.wait_for_timeout(500)
    visit.send("what colour is the star ?")
    visit.page.wait_for_function("document.querySelectorAll('#hm-chat .hm-model').length == 2")
    visit.page.wait_for_function("!document.querySelector('#hm-chat .hm-cursor')")
    heads = visit.page.locator("#hm-chat h3").all_inner_texts()
    assert heads == [str(ModelName("small", "llava")), str(ModelName("small", "qwen2_vl"))]
    visit.page.locator("#hm-patches-1 [aria-label='picture 1, row 1, column 1']").click()
    visit.page.wait_for_selector("#hm-patches-1 [aria-pressed=true]")
    assert visit.page.locator("#hm-patches-0 [aria-pressed=true]").count() == 0
    visit.look("plain")
    assert visit.page.locator("#hm-plain-result .hm-side").count() == 2
    names = zipfile.ZipFile(io.BytesIO(visit.download("plain"))).namelist()
    assert {"side-1/reproduce-plain.py", "side-2/reproduce-plain.py"} <= set(names)


def test_texts_that_look_like_tags_are_text(
    visit: Visit, scene: Path, small: Callable[[str], HookedMM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the user and of the model, on the chat, the tokens and every tab that runs: nothing is executed."""
    tokenizer = small("llava").tokenizer
    monkeypatch.setattr(type(tokenizer), "decode", lambda *_, **__: EVIL)
    visit.load(scene)
    visit.ask(EVIL)
    assert visit.page.inner_text("#hm-chat").count(EVIL) == 2
    assert EVIL in visit.page.inner_text("#hm-tokens-0")
    for name, title in visit.titles().items():
        visit.page.get_by_role("tab", name=title, exact=True).click()
        visit.look(name)
        assert visit.page.locator(f"#hm-{name}-result script").count() == 0
    assert EVIL in visit.page.inner_text("#hm-plain-result") or visit.page.locator("#hm-plain-result").count()
    assert visit.page.evaluate("window.bad") is None
    assert visit.wrong == []
