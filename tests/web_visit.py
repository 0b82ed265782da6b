"""The explorer's page served for a test, and visitors of it: one with a browser, one who writes requests by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hooked_mm.explorer import markup, notices
from hooked_mm.explorer.asked import Asked
from hooked_mm.explorer.conversation import ModelName
from hooked_mm.explorer.desk import Desk
from hooked_mm.explorer.panels import Facts, Note, Table, Texts
from hooked_mm.explorer.serving import served
from hooked_mm.explorer.tab import Choice, Control, Number, Tab, Text, Toggle, View
from hooked_mm.explorer.work import Work
from hooked_mm.hooked import HookedMM


class PlainTab:
    """A tab with a control of every kind, which shows what it was asked."""

    name, title, about, order = "plain", "Plain", "What was asked.", 1

    def controls(self, model: HookedMM) -> Sequence[Control]:
        """One of every kind."""
        return [
            Choice("way", "Way", [("left", "left"), ("right", "right")], "left"),
            Choice("word", "Word", [], changing=True),
            Number("layer", "Layer", 0, model.cfg.n_layers - 1, 0),
            Toggle("long", "Take long"),
            Text("text", "Text"),
        ]

    def look(self, asked: Asked, values: Mapping[str, Any], work: Work) -> View:
        """The values, the chosen tokens and places, the texts; `long` takes a thousand passes."""
        for number in range(1000 if values["long"] else 1):
            work.step("passing", number, 1000)
            logits, _ = asked.model.run_with_cache(asked.batch, names_filter=[])
        facts = Facts([*values.items(), ("tokens", asked.tokens), ("points", asked.points)])
        table = Table(["layer", "said"], [[3, asked.answer], [4, asked.question]], picks=[{"layer": 3}, {"layer": 4}])
        said = Texts([(asked.question, asked.answer)])
        python = "arrays = {'logits': model.run_with_cache(batch, names_filter=[])[0]}"
        words = {"word": [(word, word) for word in asked.words]}
        return View([Note(values["text"]), facts, table, said], python, {"logits": logits}, words)


@contextmanager
def serving(
    small: Callable[[str], HookedMM],
    tabs: Sequence[Tab] | None = None,
    names: Sequence[str] = ("llava",),
    password: str | None = None,
) -> Iterator[tuple[str, Desk]]:
    """The page at a free port, with small models that are loaded already: its address, and the desk behind it."""
    pytest.importorskip("gradio")
    from hooked_mm.explorer.web_page import Page

    loaded = {name: small(name) for name in names}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HookedMM, "small", lambda name="llava", **_: loaded[name])
        desk = Desk([ModelName("small", name) for name in names], [PlainTab()] if tabs is None else tabs)
        with served(Page(desk), password=password, css=markup.CSS + notices.CSS) as address:
            yield address.rstrip("/"), desk


class Caller:
    """A visitor who writes the page's requests by hand, and writes into them what no page would.

    Args:
        address: Of the page.
        session: Of the visit.
    """

    def __init__(self, address: str, session: str) -> None:
        self.http = pytest.importorskip("httpx").Client(base_url=address, timeout=60)
        self.session = session
        config = self.http.get("/config").json()
        names = {part["id"]: part["props"].get("elem_id") for part in config["components"]}
        self.ids = {name: number for number, name in names.items()}
        self.calls = {
            (names.get(target), event): call["id"]
            for call in config["dependencies"]
            for target, event in call["targets"]
            if call["backend_fn"]
        }
        after = {call["trigger_after"]: call["id"] for call in config["dependencies"]}
        self.ask_call = after[self.calls["hm-send", "click"]]

    def at_once(self, target: str, event: str, data: Sequence[Any] = (), told: Any = None) -> Any:
        """An event that does not wait for the model: the answer, whatever its status."""
        body = {"data": data, "fn_index": self.calls[target, event], "session_hash": self.session, "event_data": told}
        return self.http.post("/gradio_api/run/predict", json=body)

    def queued(self, call: int, data: Sequence[Any], told: Any = None) -> str:
        """An event that waits for the model: all that comes back, as text."""
        body = {"data": data, "fn_index": call, "session_hash": self.session, "event_data": told}
        joined = self.http.post("/gradio_api/queue/join", json=body)
        if joined.status_code != 200:
            return joined.text
        found = []
        with self.http.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.session}) as stream:
            for line in stream.iter_lines():
                if line.startswith("data:"):
                    found.append(line)
                    if json.loads(line[5:])["msg"] in ("process_completed", "close_stream"):
                        break
        return "\n".join(found)

    def ask(self, text: Any, *settings: Any) -> str:
        """A question; settings other than the usual ones come behind it."""
        usual = ["as the model does", 8, 0, 1, 0, "nothing", "small:llava"]
        return self.queued(self.ask_call, [text, *settings, *usual[len(settings) :]])

    def upload(self, name: str, data: bytes) -> Any:
        """A file."""
        return self.http.post("/gradio_api/upload", files={"files": (name, data)})

    def ahead(self, kind: str, index: str, name: str, data: bytes) -> Any:
        """A part of an edited picture, as the editor sends it ahead of the question that has its name."""
        body = {"type": kind, "index": index, "id": name, "component_id": str(self.ids["hm-editor"])}
        body |= {"session_hash": self.session, "fn_name": "accept_blobs"}
        return self.http.post("/gradio_api/component_server", data=body, files={"file": ("a.png", data)})


class Visit:
    """A browser's page of the explorer.

    Args:
        browser: The browser.
        address: Of the page.
    """

    def __init__(self, browser: Any, address: str) -> None:
        self.context = browser.new_context(viewport={"width": 1300, "height": 900}, accept_downloads=True)
        self.page = self.context.new_page()
        self.page.set_default_timeout(30_000)
        self.wrong: list[str] = []
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on(
            "request",
            lambda one: None if one.url.startswith((address, "data:", "blob:")) else self.wrong.append(one.url),
        )
        self.page.goto(address, wait_until="domcontentloaded")
        self.page.wait_for_selector("#hm-send")
        self.page.wait_for_selector("#hm-editor canvas")

    def load(self, path: Path) -> None:
        """Load a picture into the editor, which keeps it in the browser until a question is sent."""
        self.page.locator("#hm-editor input[type=file]").first.set_input_files(path)
        self.page.wait_for_timeout(1000)

    def load_other(self, path: Path) -> str:
        """Load a picture to compare with: what the page says of it."""
        if not self.page.locator("#hm-compare-with").is_visible():
            self.page.click("#hm-compare > button")
        self.page.locator("#hm-compare-with").get_by_text("another picture").click()
        with self.page.expect_file_chooser() as waiting:
            self.page.click("#hm-other-picture")
        waiting.value.set_files(path)
        self.page.wait_for_selector("#hm-other-shown .hm-error, #hm-other-shown img")
        return self.page.inner_text("#hm-other-shown")

    def send(self, text: str) -> None:
        """Send a question."""
        self.page.fill("#hm-question textarea", text)
        self.page.click("#hm-send")

    def ask(self, text: str) -> str:
        """Ask, and wait for the answer."""
        before = self.page.locator("#hm-chat .hm-model").count()
        self.send(text)
        self.page.wait_for_function(
            "before => document.querySelectorAll('#hm-chat .hm-model').length > before"
            " && !document.querySelector('#hm-chat .hm-cursor')",
            arg=before,
        )
        # The tokens and patches come with the same message.
        self.page.wait_for_timeout(200)
        return self.page.locator("#hm-chat .hm-model .hm-pre").last.inner_text()

    def look(self, name: str) -> str:
        """Press a tab's button, and wait for what it shows."""
        self.page.click(f"#hm-{name}-look")
        self.page.wait_for_selector(f"#hm-{name}-result .hm-panel")
        self.page.wait_for_function(f"!document.querySelector('#hm-{name}-status progress')")
        return self.page.inner_text(f"#hm-{name}-result")

    def settle(self, name: str) -> None:
        """Wait until a tab has done what it was asked."""
        self.page.wait_for_timeout(400)
        self.page.wait_for_function(f"!document.querySelector('#hm-{name}-status progress')")

    def titles(self) -> dict[str, str]:
        """The title of every tab, by its name."""
        tabs = self.page.locator("#hm-tabs button[role=tab]")
        found = {one.get_attribute("aria-controls"): one.inner_text() for one in tabs.all()}
        return {key.removeprefix("hm-"): title.strip() for key, title in found.items() if key}

    def download(self, name: str) -> bytes:
        """What a tab hands out."""
        with self.page.expect_download() as waiting:
            self.page.click(f"#hm-{name}-save")
        return Path(waiting.value.path()).read_bytes()
