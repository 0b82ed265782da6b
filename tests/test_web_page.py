"""The explorer's page as its visitors meet it: with a browser, and with requests that no browser would write."""

from __future__ import annotations

import gc
import io
import json
import re
import resource
import socket
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from hooked_mm.explorer.conversation import ModelName
from hooked_mm.explorer.desk import Desk
from hooked_mm.hooked import HookedMM
from tests.browser import chromium
from tests.web_visit import Caller, Visit, serving

EVIL = "<img src=x onerror='window.bad=1'> **b** ${window.bad=1} {{7*7}} <script>window.bad=1</script>"

Served = tuple[str, Desk]


@pytest.fixture(scope="module")
def page(small: Callable[[str], HookedMM]) -> Iterator[Served]:
    """The page with one plain tab."""
    with serving(small) as found:
        yield found


@pytest.fixture
def caller(page: Served, request: pytest.FixtureRequest) -> Iterator[Caller]:
    """A visitor of it, alone in their visit."""
    made = Caller(page[0], request.node.name)
    yield made
    page[1].visits.close(made.session)
    made.http.close()


def png(image: Image.Image) -> bytes:
    """The bytes of a file."""
    made = io.BytesIO()
    image.save(made, "PNG")
    return made.getvalue()


def file_at(path: str, **more: Any) -> dict[str, Any]:
    """A file as the page names one."""
    return {"path": path, "meta": {"_type": "gradio.FileData"}, **more}


def drawn(path: str, **more: Any) -> dict[str, Any]:
    """What the editor sends of a picture."""
    return {"background": file_at(path, **more), "layers": [], "composite": file_at(path, **more), "id": None}


def look(caller: Caller, **changed: Any) -> str:
    """A look of the plain tab with some controls as no page would send them."""
    values = {"way": "left", "word": None, "layer": 0, "long": False, "text": ""} | changed
    return caller.queued(caller.calls["hm-plain-look", "click"], [[], [], *values.values()])


def test_a_visit(page: Served, images: list[Image.Image], tmp_path: Path) -> None:
    """In a browser: open, load a picture, ask, choose a token and a patch, look, click a row, download."""
    (tmp_path / "scene.png").write_bytes(png(images[0]))
    with chromium() as browser:
        visit = Visit(browser, page[0])
        visit.load(tmp_path / "scene.png")
        visit.ask("what colour is the star ?")
        assert visit.page.locator("#hm-chat img").count() == 1
        visit.page.locator("#hm-tokens-0 label").first.click()
        visit.page.locator("[aria-label='picture 1, row 2, column 3']").click()
        visit.page.wait_for_selector("#hm-patches-0 [aria-pressed=true]")
        shown = visit.look("plain")
        assert "tokens\n(0,)" in shown
        assert "points\n((0, " in shown
        visit.page.locator("#hm-plain-result tr.hm-click").first.click()
        visit.page.wait_for_function("document.querySelector('#hm-plain-result').innerText.includes('layer\\n3')")
        names = zipfile.ZipFile(io.BytesIO(visit.download("plain"))).namelist()
        assert {"reproduce-plain.py", "arrays-plain.safetensors", "picture-1.png", "page.html"} <= set(names)
        assert visit.wrong == []


def test_no_file_of_the_server_is_read(caller: Caller, page: Served, tmp_path: Path) -> None:
    """Whatever path a visitor writes into a field: the picture lies outside of the uploads, and no turn shows it."""
    canary, text = tmp_path / "canary.png", tmp_path / "canary.txt"
    canary.write_bytes(png(Image.new("RGB", (40, 30), (1, 2, 3))))
    text.write_text("tweet")
    for path in (str(canary), str(text), "/etc/passwd", f"file://{canary}", f"/proc/self/root{canary}"):
        for told in ({}, {"url": f"/gradio_api/file={path}"}, {"is_stream": True}):
            for answer in (
                caller.at_once("hm-send", "click", [drawn(path, **told), "paint", "as the model does"]),
                caller.at_once("hm-add", "click", [drawn(path, **told), "paint", "as the model does"]),
                caller.at_once("hm-other-picture", "upload", [file_at(path, **told)]),
            ):
                assert "tweet" not in answer.text
                assert "data:image" not in answer.text
                assert str(tmp_path) not in answer.text
        for way in ("file=", "file/", "proxy=", "stream/", "custom_component/"):
            for address in (f"/gradio_api/{way}{path}", f"/gradio_api/{way}../../../..{path}", f"/static/../..{path}"):
                answer = caller.http.get(address)
                assert answer.status_code >= 400, address
                assert "root:" not in answer.text
                assert "tweet" not in answer.text
    visit = page[1].visits.of(caller.session)
    assert not visit.tray
    assert visit.drawn is None
    assert visit.other is None
    assert canary.exists()
    for name in (str(canary), "../canary.png", "/etc/cron.d/x"):
        assert str(tmp_path) not in json.dumps(caller.upload(name, b"hello").json()).replace("\\", "")
    assert not list(tmp_path.glob("**/x"))


def test_a_visitor_can_not_send_the_server_to_other_machines(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    """No address is fetched, neither for a field nor to be handed on."""
    import safehttpx
    from gradio import route_utils, routes

    asked = []

    async def heard(*given: Any, **_: Any) -> Any:
        asked.append(given)
        raise AssertionError("the server asked another machine")

    monkeypatch.setattr(safehttpx, "get", heard)
    monkeypatch.setattr(route_utils, "secure_url_stream_response", heard)
    monkeypatch.setattr(routes, "secure_url_stream_response", heard)
    # What makes the page's components anew for this visitor.
    caller.at_once("hm-compare-with", "change", ["another picture"])
    caller.at_once("hm-add", "click", [None, "paint", "as the model does"])
    for address in ("http://example.com/a.png", "https://example.com/a.png", "HTTP://example.com/a.png"):
        for told in ({}, {"url": address}):
            caller.at_once("hm-send", "click", [drawn(address, **told), "paint", "as the model does"])
            caller.at_once("hm-other-picture", "upload", [file_at(address, **told)])
            assert "example" not in caller.ask(file_at(address, **told))
        for way in ("file=", "proxy="):
            assert caller.http.get(f"/gradio_api/{way}{address}").status_code in (403, 404)
    assert not asked


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"way": "up"}, "up"),
    ({"way": ["left"]}, ""),
    ({"layer": 99}, "99"),
    ({"layer": "1"}, ""),
    ({"layer": None}, ""),
    ({"layer": {"path": "/etc/passwd"}}, ""),
    ({"layer": 1e300}, ""),
    ({"long": "yes"}, ""),
    ({"text": "x" * 3000}, "2000"),
    ({"text": {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}}, ""),
    ({"word": {"a": 1}}, ""),
]


def test_values_that_no_control_has_are_refused(caller: Caller) -> None:
    """They are told, nothing fails in the model, and the next look is as it should be."""
    caller.ask("what is this ?")
    for changed, told in WRONG:
        answer = look(caller, **changed)
        assert "<section" not in answer or "hm-warning" in answer, changed
        assert told in answer
        assert "root:" not in answer
        assert "Traceback" not in answer
    assert "(0,)" in look(caller)


def test_settings_that_no_page_sends_are_refused(caller: Caller, page: Served) -> None:
    """Other models, huge answers, wrong kinds: told, and nothing is asked."""
    for settings in (
        ("as the model does", 10**9),
        ("as the model does", "8"),
        ("as the model does", 8, -1),
        ("as the model does", 8, 0, 7),
        ("as the model does", 8, 0, 1, -5),
        ("as the model does", 8, 0, 1, 0, "another model", "/etc"),
        ("as the model does", 8, 0, 1, 0, "another model", "hf-internal/evil"),
        ("as the model does", 8, 0, 1, 0, "another picture"),
    ):
        caller.ask("what is this ?", *settings)
        assert page[1].visits.of(caller.session).sides[0].asked is None, settings
    for text in ("", "  \n", "x" * 5000, None):
        caller.ask(text)
        assert page[1].visits.of(caller.session).sides[0].asked is None, text
    assert '"success":true' in caller.ask("what is this ?")
    assert page[1].visits.of(caller.session).sides[0].asked is not None


def test_clicks_on_nothing_choose_nothing(caller: Caller, page: Served) -> None:
    """Whatever a click says, in patches and in panels."""
    caller.ask("what is this ?")
    wrong: list[Any] = [None, [], "x", {}, {"picture": "0", "row": 0, "col": 0}, {"picture": 0, "row": -1, "col": 0}]
    wrong += [{"picture": 9, "row": 0, "col": 0}, {"picture": 0, "row": True, "col": 0}]
    for pick in (*wrong, {"picture": 0, "row": 1e3, "col": {}}):
        for told in ({"pick": pick}, pick):
            caller.at_once("hm-patches-0", "click", told=told)
            assert page[1].visits.of(caller.session).sides[0].cells == ()
        values = [[], [], "left", None, 0, False, ""]
        answer = caller.queued(caller.calls["hm-plain-result", "click"], values, {"pick": {"layer": pick}})
        assert "Traceback" not in answer
    assert "(0,)" in look(caller)


def test_two_visits_know_nothing_of_each_other(page: Served) -> None:
    """What one has said, shown and chosen is in nothing that the other gets; without a session there is no visit."""
    one, other = Caller(page[0], "one"), Caller(page[0], "other")
    one.ask("where is the secret treasure ?")
    assert "treasure" in look(one, text="mine")
    for answer in (look(other), other.ask("what is this ?"), look(other)):
        assert "treasure" not in answer
        assert "mine" not in answer
    assert "treasure" not in other.at_once("hm-save", "click").text
    nobody = Caller(page[0], "")
    assert "treasure" not in nobody.at_once("hm-save", "click").text
    assert "treasure" in one.queued(
        one.ask_call, ["and now ?", "as the model does", 8, 0, 1, 0, "nothing", "small:llava"]
    )
    for visitor in (one, other):
        page[1].visits.close(visitor.session)


def test_uploads_have_limits(caller: Caller, page: Served) -> None:
    """A file that is too long, one that is no picture, and one that says it is huge."""
    assert caller.upload("a.png", bytes(21 * 2**20)).status_code >= 400
    head = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    bomb = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts
    )
    for name, data in (("a.png", b"no picture"), ("b.png", bomb), ("c.svg", b"<svg onload='window.bad=1'/>")):
        path = caller.upload(name, data).json()[0]
        answer = caller.at_once("hm-send", "click", [drawn(path), "paint", "as the model does"])
        assert answer.status_code >= 400
        answer = caller.at_once("hm-other-picture", "upload", [file_at(path)])
        assert page[1].visits.of(caller.session).other is None
        assert path not in answer.text
    visit = page[1].visits.of(caller.session)
    assert visit.drawn is None
    good = caller.upload("a.png", png(Image.new("RGB", (9, 9)))).json()[0]
    assert caller.at_once("hm-send", "click", [drawn(good), "paint", "as the model does"]).status_code == 200
    assert visit.drawn is not None


def test_what_the_editor_refuses_it_refuses_for_ever(caller: Caller, page: Served) -> None:
    """Also after an event that failed, and of what was sent ahead of a question under a name."""
    made = io.BytesIO()
    Image.new("RGB", (9, 9)).save(made, "TIFF")
    path = caller.upload("a.png", made.getvalue()).json()[0]
    assert caller.at_once("hm-add", "click", [None, "paint", "as the model does"]).status_code >= 400
    answer = caller.at_once("hm-send", "click", [drawn(path), "paint", "as the model does"])
    assert "no picture that can be read" in answer.text
    assert caller.ahead("background", "", "mine", made.getvalue()).status_code == 200
    sent = {"background": None, "layers": [], "composite": None, "id": "mine"}
    answer = caller.at_once("hm-send", "click", [sent, "paint", "as the model does"])
    assert "no picture that can be read" in answer.text
    assert page[1].visits.of(caller.session).drawn is None
    assert caller.ahead("background", "", "mine", png(Image.new("RGB", (9, 9)))).status_code == 200
    assert caller.at_once("hm-send", "click", [sent, "paint", "as the model does"]).status_code == 200
    assert page[1].visits.of(caller.session).drawn is not None


def test_a_number_does_not_fill_the_memory(caller: Caller) -> None:
    """The number of a layer, of a picture that is sent ahead, is how long the server's list of them becomes."""
    for number in ("10000000000", "-1", "x", "8"):
        assert caller.ahead("layer", number, "many", b"x").status_code >= 400
    assert caller.ahead("layer", "0", "many", b"x").status_code == 200


def test_pictures_that_wait_are_bounded(caller: Caller, page: Served) -> None:
    """Nobody fills the memory by pressing a button."""
    path = caller.upload("a.png", png(Image.new("RGB", (9, 9)))).json()[0]
    for number in range(18):
        answer = caller.at_once("hm-add", "click", [drawn(path), "paint", "as the model does"])
        assert (answer.status_code == 200) == (number < 16)
    assert "at most 16" in answer.text
    assert len(page[1].visits.of(caller.session).tray) == 16


def test_only_this_machine_reaches_it(page: Served) -> None:
    """By default it listens at 127.0.0.1 and nowhere else, and names no functions for callers."""
    port = int(page[0].rsplit(":", 1)[1])
    assert page[0] == f"http://127.0.0.1:{port}"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        own = probe.getsockname()[0]
    if not own.startswith("127."):
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((own, port), timeout=5)
    caller = Caller(page[0], "names")
    named = caller.http.get("/gradio_api/info").json()
    assert named.get("named_endpoints") == {}


def test_a_password_keeps_others_out(small: Callable[[str], HookedMM]) -> None:
    """Nothing but the form to enter it is shown; the wrong one opens nothing."""
    httpx = pytest.importorskip("httpx")
    with serving(small, password="sesame") as (address, _), httpx.Client(base_url=address) as http:
        body = {"data": [], "fn_index": 0, "session_hash": "x"}
        for way in (
            "/config",
            "/gradio_api/info",
            "/gradio_api/queue/data?session_hash=x",
            "/gradio_api/file=/etc/passwd",
        ):
            assert http.get(way).status_code in (401, 403), way
        for way in ("/gradio_api/queue/join", "/gradio_api/run/predict"):
            assert http.post(way, json=body).status_code == 401
        assert http.post("/gradio_api/upload", files={"files": ("a.png", b"x")}).status_code == 401
        assert "hm-send" not in http.get("/").text
        assert http.post("/login", data={"username": "a", "password": "sesam"}).status_code >= 400
        assert http.get("/config").status_code == 401
        assert http.post("/login", data={"username": "a", "password": "sesame"}).status_code == 200
        assert "hm-send" in http.get("/config").text


def test_nothing_is_left_behind(small: Callable[[str], HookedMM]) -> None:
    """The folder of uploads is deleted with the page, and all visits are closed."""
    with serving(small) as (address, desk):
        caller = Caller(address, "guest")
        path = Path(caller.upload("a.png", png(Image.new("RGB", (9, 9)))).json()[0])
        assert path.exists()
        caller.ask("what is this ?")
        assert len(desk.visits) == 1
    assert not path.exists()
    assert not path.parent.parent.exists()
    assert len(desk.visits) == 0


def test_text_is_text_in_every_field(caller: Caller) -> None:
    """A question of tags comes back escaped wherever it is shown."""
    answer = json.loads(caller.ask(EVIL).splitlines()[-1][5:])["output"]["data"]
    answer += json.loads(look(caller, text=EVIL).splitlines()[-1][5:])["output"]["data"]
    html = [part for part in answer if isinstance(part, str) and "hm" in part]
    assert sum("&lt;img src=x" in part for part in html) == 2
    assert not re.search(r"<(img|script)[^>]*(onerror|bad)", "".join(html))


def test_nothing_of_a_closed_page_stays_with_gradio(small: Callable[[str], HookedMM]) -> None:
    """It holds what every component showed for each session, for hours: pictures and texts of people who have gone."""
    from hooked_mm.explorer.web_page import Page

    name = ModelName("small", "llava")
    desk = Desk([name], [])
    desk._loaded[name] = small("llava")
    made = Page(desk)
    held = made.blocks.state_holder
    for key in ("gone", "stays"):
        held[key][made.chat._id] = made.chat
        desk.visits.of(key)
    made._gone(SimpleNamespace(session_hash="gone"))
    assert set(held.session_data) == set(held.time_last_used) == set(desk.visits._open) == {"stays"}
    desk.close()


@pytest.mark.slow
def test_fifty_visits_take_no_more_memory_than_five(page: Served) -> None:
    """Each with a large picture of its own, an answer, patches and a look; closed as the browser closes it."""
    sizes = {}
    for number in range(50):
        caller = Caller(page[0], f"visit-{number}")
        image = Image.effect_noise((1600, 1200), 60 + number).convert("RGB")
        made = io.BytesIO()
        image.save(made, "JPEG")
        path = caller.upload("a.jpg", made.getvalue()).json()[0]
        assert caller.at_once("hm-send", "click", [drawn(path), "paint", "as the model does"]).status_code == 200
        assert "hm-patched" in caller.ask("what is this ?")
        assert "points" in look(caller)
        page[1].visits.close(caller.session)
        caller.http.close()
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        sizes[number + 1] = pages * resource.getpagesize()
    assert sizes[50] < 1.1 * sizes[5], {n: size >> 20 for n, size in sizes.items() if n % 5 == 0}
