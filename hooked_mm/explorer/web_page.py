"""The explorer's page, in Gradio: what stands where, and which function of the desk each click calls.

What is said and shown reaches the page as HTML of `markup`, in which everything is text. Downloads are handed to the
browser in memory; uploads are deleted within minutes. No event has a name for callers other than the page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

import gradio as gr
from PIL import Image

from hooked_mm.errors import BadInputError, HookedMMError
from hooked_mm.explorer import markup, notices
from hooked_mm.explorer.bundle import conversation_bundle
from hooked_mm.explorer.conversation import Generation
from hooked_mm.explorer.desk import Desk, Question, check_pictures, said, unseen
from hooked_mm.explorer.downloads import SAVE_JS, as_download
from hooked_mm.explorer.edits import edited, opened, squared
from hooked_mm.explorer.memory import give_back
from hooked_mm.explorer.page_layout import MODEL, PICTURE, Layout
from hooked_mm.explorer.tab_area import Shown
from hooked_mm.explorer.visits import Side, Visit
from hooked_mm.scenes.dataset import SceneDataset, picture


class Page(Layout):
    """The page of a desk: `Page(desk).blocks` is what Gradio serves."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self._scenes, self._numbers = SceneDataset(1000, split="test", seed=0), count()
        with gr.Blocks(title="hooked-mm explorer", analytics_enabled=False) as self.blocks:
            super().__init__(desk)
            self._wire()
        self.blocks.queue(max_size=32)

    def _wire(self) -> None:
        model: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
        plain: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
        everything = self.components
        asking = gr.on(
            [self.send.click, self.box.submit],
            self._take,
            [self.editor, self.edit, self.shape],
            self.status,
            trigger_mode="once",
            **plain,
        ).success(
            self._ask,
            [
                self.box,
                self.shape,
                self.length,
                self.temperature,
                self.top_p,
                self.seed,
                self.compare,
                self.other_model,
            ],
            everything,
            show_progress="minimal",
            show_progress_on=self.status,
            **model,
        )
        self.stop.click(self._stop, None, [self.chat, self.status], cancels=[asking], **plain)
        self.clear.click(self._clear, None, everything, cancels=[asking], **plain)
        # Not `change`, which what is set here would call again.
        self.model.input(
            self._switch,
            self.model,
            [*everything, self.model],
            cancels=[asking],
            show_progress="minimal",
            show_progress_on=self.status,
            **model,
        )
        self.compare.change(
            self._compared, self.compare, [self.other_picture, self.other_model, self.other_shown], **plain
        )
        self.other_model.change(self._forget_other, None, None, **plain)
        self.other_picture.upload(self._load_other, self.other_picture, [self.other_shown, self.other_picture], **plain)
        self.scene.click(self._scene, None, [self.editor, self.box], **plain)
        # It is emptied by its value alone: see `uploads.editor`.
        self.add.click(self._add, [self.editor, self.edit, self.shape], self.tray, **plain).success(
            lambda: None, None, self.editor, **plain
        )
        self.save.click(self._save_conversation, None, [self.saved, self.status], **plain).then(
            None, self.saved, self.saved, js=SAVE_JS, **plain
        )
        for number, (shown, none) in enumerate(zip(self.patches, self.no_patches, strict=True)):
            shown.click(self._toggler(number), None, shown, **plain)
            none.click(self._clearer(number), None, shown, **plain)
        for area in self.areas:
            area.wire(self.tokens, self.saved, SAVE_JS)
        self.blocks.load(None, js=markup.SHRINK_JS, **plain)
        self.blocks.unload(self._gone)

    def _visit(self, request: gr.Request) -> Visit:
        return self.desk.visits.of(request.session_hash)

    def _take(self, drawn: Any, edit: str, shape: str, request: gr.Request) -> str:
        """Read the picture at once, whoever is served before."""
        visit = self._visit(request)
        try:
            visit.drawn = _drawn(drawn, edit, shape)
        except HookedMMError as error:
            raise gr.Error(str(error), print_exception=False) from error
        return ""

    def _ask(
        self,
        text: str,
        shape: str,
        length: int,
        temperature: float,
        top_p: float,
        seed: int,
        compare: str,
        other_model: str,
        request: gr.Request,
    ) -> Iterator[Shown]:
        visit = self._visit(request)
        try:
            generation = Generation(length, temperature, top_p, seed)
            pictures = [visit.drawn, None]
            images, other, others = (*visit.tray, *unseen(visit.sent[0], pictures[0])), None, None
            if compare == MODEL:
                other = self.desk.named(other_model)
            elif compare == PICTURE:
                if visit.other is None:
                    raise BadInputError("no other picture to compare with; load one, or compare with nothing")
                other, pictures[1] = visit.sides[0].name, squared(visit.other, shape)
                others = unseen(visit.sent[1], pictures[1])
            question = Question(text, images, generation, other, others)
            sides = self.desk.sides(visit, question)
            for progress in self.desk.ask(visit, question):
                yield {
                    self.chat: _chat(sides, progress.texts),
                    self.status: notices.progress_html(progress.told, progress.share),
                }
        except Exception as error:
            yield {self.chat: _chat(visit.sides), self.status: notices.error_html(said(error))}
            return
        visit.sent, visit.tray = pictures, []
        yield self._answered(visit)

    def _answered(self, visit: Visit, every: bool = False) -> Shown:
        """What is shown once a question was answered, or a conversation begun anew."""
        made: Shown = {self.chat: _chat(visit.sides), self.box: "", self.tray: "", self.status: ""}
        for number in range(2):
            side = visit.sides[number] if number < len(visit.sides) else None
            # Of patches and of tokens.
            for column in self.columns[number::2]:
                made[column] = gr.update(visible=side is not None or not number)
            asked = None if side is None else side.asked
            words = [] if asked is None else zip(asked.words, asked.numbers, strict=True)
            made[self.tokens[number]] = gr.update(
                choices=[(notices.visible(word), token) for word, token in words], value=[]
            )
            made[self.patches[number]] = "" if side is None else _patches(side)
        model = self.desk.model(visit.sides[0].name)
        for area in self.areas:
            made |= area.fresh(model, every)
        return made

    def _clear(self, request: gr.Request) -> Shown:
        visit = self._visit(request)
        visit.halt()
        visit.clear([visit.sides[0].name])
        return self._answered(visit)

    def _switch(self, model: str, request: gr.Request) -> Iterator[Shown]:
        visit = self._visit(request)
        try:
            name = self.desk.named(model)
            for progress in self.desk.switch(visit, name):
                yield {self.status: notices.progress_html(progress.told, progress.share)}
            made = self._answered(visit, every=True)
        except Exception as error:
            yield {self.status: notices.error_html(said(error)), self.model: str(visit.sides[0].name)}
            return
        yield made

    def _stop(self, request: gr.Request) -> Shown:
        visit = self._visit(request)
        visit.halt()
        return {self.chat: _chat(visit.sides), self.status: notices.error_html("stopped")}

    def _gone(self, request: gr.Request) -> None:
        key = request.session_hash
        self.desk.visits.close(key)
        # Gradio would keep what every component showed, pictures included, as long as the server runs.
        held = self.blocks.state_holder
        with held.lock:
            held.session_data.pop(key, None)
            held.time_last_used.pop(key, None)
        give_back()

    def _compared(self, kind: str, request: gr.Request) -> tuple[Any, Any, str]:
        visit = self._visit(request)
        visit.compare_no_more()
        visit.other = None
        return gr.update(visible=kind == PICTURE), gr.update(visible=kind == MODEL), ""

    def _forget_other(self, request: gr.Request) -> None:
        self._visit(request).compare_no_more()

    def _load_other(self, data: bytes, request: gr.Request) -> tuple[str, Any]:
        visit = self._visit(request)
        try:
            visit.other = opened(data)
            visit.compare_no_more()
            return notices.tray_html([visit.other], "the other side sees"), None
        except Exception as error:
            return notices.error_html(said(error)), None

    def _scene(self) -> tuple[Any, str]:
        scene = self._scenes.scene(next(self._numbers) % len(self._scenes))
        return picture(scene), f"what colour is the {scene.objects[0].shape} ?"

    def _add(self, drawn: Any, edit: str, shape: str, request: gr.Request) -> str:
        visit = self._visit(request)
        try:
            shown = _drawn(drawn, edit, shape)
            if shown is None:
                raise BadInputError("the editor is empty; load a picture first")
            check_pictures([*visit.sides[0].conversation.images, *visit.tray, shown])
        except Exception as error:
            raise gr.Error(said(error), print_exception=False) from error
        visit.tray.append(shown)
        return notices.tray_html(visit.tray)

    def _toggler(self, number: int) -> Callable[..., Any]:
        def toggle(event: gr.EventData, request: gr.Request) -> str:
            visit = self._visit(request)
            if number >= len(visit.sides):
                return ""
            side = visit.sides[number]
            try:
                side.toggle(*(_whole(event, name) for name in ("picture", "row", "col")))
            except BadInputError as error:
                return _patches(side) + notices.error_html(said(error))
            return _patches(side)

        return toggle

    def _clearer(self, number: int) -> Callable[..., Any]:
        def clear(request: gr.Request) -> str:
            visit = self._visit(request)
            if number >= len(visit.sides):
                return ""
            visit.sides[number].cells = ()
            return _patches(visit.sides[number])

        return clear

    def _save_conversation(self, request: gr.Request) -> tuple[str, str]:
        asked = [side.asked for side in self._visit(request).sides if side.asked is not None]
        if not asked:
            return "", notices.error_html("there is nothing to download yet; ask first")
        try:
            return as_download("conversation.zip", conversation_bundle(asked)), ""
        except Exception as error:
            return "", notices.error_html(said(error))


def _drawn(drawn: Any, edit: str, shape: str) -> Image.Image | None:
    """The editor's picture as it shall be shown."""
    shown = edited(drawn, edit)
    return None if shown is None else squared(shown, shape)


def _whole(event: gr.EventData, name: str) -> int:
    """A whole number of what was clicked."""
    pick = getattr(event, "pick", None)
    value = pick.get(name) if isinstance(pick, dict) else None
    if not isinstance(value, int) or isinstance(value, bool):
        raise BadInputError("a click on no patch")
    return value


def _chat(sides: Sequence[Side], pending: Sequence[str] = ()) -> str:
    """The conversation of every side; `pending` are the answers so far."""
    parts = [
        markup.conversation_html(side.conversation, pending[place] if place < len(pending) else None)
        for place, side in enumerate(sides)
    ]
    return markup.sides_html(list(zip(notices.side_titles([str(side.name) for side in sides]), parts, strict=True)))


def _patches(side: Side) -> str:
    if side.asked is None:
        return ""
    pictures = [(image, side.asked.patches(number)) for number, image in enumerate(side.asked.images)]
    return markup.patches_html(pictures, side.cells)
