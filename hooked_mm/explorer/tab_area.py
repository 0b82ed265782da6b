"""One tab on the explorer's page: its controls, its buttons, and what they call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gradio as gr

from hooked_mm.explorer import markup, notices
from hooked_mm.explorer.desk import Desk, said
from hooked_mm.explorer.downloads import as_download, seen_zip
from hooked_mm.explorer.tab import Choice, Control, Number, Tab, Text
from hooked_mm.explorer.visits import Visit
from hooked_mm.explorer.work import Stopped
from hooked_mm.hooked import HookedMM

Shown = dict[Any, Any]
"""Component -> what it shows from now on."""

FEW = 4
"""Options of a choice that are shown all at once."""


def component(control: Control, prefix: str) -> Any:
    """The component for a control, `PREFIX-NAME` in the page."""
    common: dict[str, Any] = {
        "label": control.label,
        "value": control.value,
        "info": control.info or None,
        "elem_id": f"{prefix}-{control.name}",
        "min_width": 180,
        "elem_classes": "hm-control",
    }
    if isinstance(control, Choice):
        options = [(str(label), value) for label, value in control.options]
        few = len(options) <= FEW and not control.changing
        return gr.Radio(options, **common) if few else gr.Dropdown(options, **common)
    if isinstance(control, Number):
        return gr.Slider(control.low, control.high, step=control.step, **common)
    return gr.Textbox(max_lines=1, **common) if isinstance(control, Text) else gr.Checkbox(**common)


def changed(control: Control) -> Any:
    """The update that makes a component that of another model's control."""
    if isinstance(control, Choice):
        return gr.update(choices=[(str(label), value) for label, value in control.options], value=control.value)
    if isinstance(control, Number):
        return gr.update(minimum=control.low, maximum=control.high, value=control.value)
    return gr.update(value=control.value)


class TabArea:
    """A tab's part of the page; made where it shall stand.

    Args:
        desk: What does the work.
        tab: The tab.
        model: Whose controls it has at first.
    """

    def __init__(self, desk: Desk, tab: Tab, model: HookedMM) -> None:
        self.desk, self.tab, name = desk, tab, f"hm-{tab.name}"
        gr.HTML(notices.about_html(tab.about))
        with gr.Row(equal_height=False):
            self.controls = {control.name: component(control, name) for control in tab.controls(model)}
        with gr.Row():
            self._look_button = gr.Button(
                "Look", variant="primary", elem_id=f"{name}-look", size="md", min_width=140, scale=0
            )
            self._stop_button = gr.Button("Stop", elem_id=f"{name}-stop", size="md", min_width=80, scale=0)
            self._save_button = gr.Button(
                "Download with its Python", elem_id=f"{name}-save", size="md", min_width=240, scale=0
            )
            # Beside the buttons, where it takes no room of its own.
            with gr.Column(scale=1, min_width=200):
                self.status = gr.HTML(elem_id=f"{name}-status", min_height=24)
        self.result = gr.HTML(notices.HINT, js_on_load=markup.CLICK_JS, elem_id=f"{name}-result")

    @property
    def components(self) -> list[Any]:
        """All that an answer or another model changes here."""
        return [self.result, self.status, *self.controls.values()]

    def wire(self, tokens: Sequence[Any], saved: Any, save_js: str) -> None:
        """Connect the buttons.

        Args:
            tokens: The components in which answer tokens are chosen.
            saved: The component that hands a download on.
            save_js: What the browser does with it.
        """
        inputs = [*tokens, *self.controls.values()]
        model = {
            "concurrency_id": "model",
            "concurrency_limit": 1,
            "api_visibility": "private",
            "show_progress": "minimal",
            "show_progress_on": self.status,
        }
        plain: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
        looking = self._look_button.click(self._look, inputs, self.components, **model)
        picking = self.result.click(self._picked, inputs, self.components, **model)
        self._stop_button.click(self._stop, None, self.status, cancels=[looking, picking], **plain)
        self._save_button.click(self._save, None, [saved, self.status], **plain).then(
            None, saved, saved, js=save_js, **plain
        )

    def fresh(self, model: HookedMM, every: bool = False) -> Shown:
        """What it shows once another question was answered.

        Args:
            model: Who answered. Choices that came with what was shown begin anew.
            every: All controls begin anew, as those of another model.
        """
        made: Shown = {self.result: notices.HINT, self.status: ""}
        for one in self.tab.controls(model):
            if every or (isinstance(one, Choice) and one.changing):
                made[self.controls[one.name]] = changed(one)
        return made

    def _look(self, request: gr.Request, *given: Any) -> Iterator[Shown]:
        tokens, values = given[:2], dict(zip(self.controls, given[2:], strict=True))
        yield from self._looking(self.desk.visits.of(request.session_hash), tokens, values)

    def _picked(self, event: gr.EventData, request: gr.Request, *given: Any) -> Iterator[Shown]:
        tokens, values = given[:2], dict(zip(self.controls, given[2:], strict=True))
        pick = getattr(event, "pick", None)
        wanted = {name: pick[name] for name in values if name in pick} if isinstance(pick, dict) else {}
        if not wanted:
            yield {self.status: ""}
            return
        yield {self.controls[name]: value for name, value in wanted.items()}
        yield from self._looking(self.desk.visits.of(request.session_hash), tokens, values | wanted)

    def _looking(self, visit: Visit, tokens: Sequence[Sequence[int]], values: Mapping[str, Any]) -> Iterator[Shown]:
        try:
            for progress in self.desk.look(visit, self.tab.name, tokens, values):
                yield {self.status: notices.progress_html(progress.told, progress.share)}
            seen = visit.seen.get(self.tab.name, ())
            if not seen:
                raise Stopped("the conversation was begun anew")
            titles = notices.side_titles([str(one.asked.name) for one in seen])
            shown = [notices.view_html(one.view) for one in seen]
            made: Shown = {self.result: markup.sides_html(list(zip(titles, shown, strict=True))), self.status: ""}
        except Exception as error:
            yield {self.status: notices.error_html(said(error))}
            return
        # Of two sides that offer different things, those of the first can be chosen.
        for name, options in seen[0].view.options.items():
            known = [value for _, value in options]
            value = values[name] if values[name] in known else None
            made[self.controls[name]] = gr.update(choices=[(str(label), one) for label, one in options], value=value)
        yield made

    def _stop(self, request: gr.Request) -> str:
        self.desk.visits.of(request.session_hash).halt()
        return notices.error_html("stopped")

    def _save(self, request: gr.Request) -> tuple[str, str]:
        visit, name = self.desk.visits.of(request.session_hash), self.tab.name
        if name not in visit.seen:
            return "", notices.error_html("there is nothing to download yet; press Look first")
        try:
            return as_download(f"{name}.zip", seen_zip(name, visit.seen[name])), ""
        except Exception as error:
            return "", notices.error_html(said(error))
