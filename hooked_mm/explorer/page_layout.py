"""What stands where on the explorer's page: every component that `web_page` connects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from hooked_mm.explorer import markup, notices
from hooked_mm.explorer.conversation import MOST_TOKENS, Conversation
from hooked_mm.explorer.desk import Desk
from hooked_mm.explorer.edits import EDITS, SHAPES
from hooked_mm.explorer.tab_area import TabArea
from hooked_mm.explorer.uploads import editor

NOTHING, PICTURE, MODEL = "nothing", "another picture", "another model"


class Layout:
    """The components of a desk's page; made inside a `gr.Blocks`.

    Pictures stand on the left, the conversation and below it the tabs on the right. Of what two sides have each, there
    are two; the second is shown when there is a second side.

    Args:
        desk: Its models can be chosen, its tabs are shown.
    """

    def __init__(self, desk: Desk) -> None:
        names, first = list(desk.names), desk.model(next(iter(desk.names.values())))
        with gr.Row(elem_id="hm-head"):
            with gr.Column(scale=4, min_width=340):
                gr.HTML(notices.HEAD, elem_id="hm-title")
            with gr.Column(scale=1, min_width=220):
                self.model = gr.Dropdown(
                    names, value=names[0], show_label=False, elem_id="hm-model", interactive=len(names) > 1
                )
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=320):
                self._lay_out_pictures(names)
            with gr.Column(scale=8, min_width=480):
                self._lay_out_conversation()
                self.areas: list[TabArea] = []
                with gr.Tabs(elem_id="hm-tabs"):
                    for tab in desk.tabs.values():
                        with gr.Tab(tab.title, elem_id=f"hm-{tab.name}"):
                            self.areas.append(TabArea(desk, tab, first))
        self.saved = gr.Textbox(visible=False)

    def _lay_out_pictures(self, names: Sequence[str]) -> None:
        self.editor = editor(
            type="pil",
            label="Picture",
            elem_id="hm-editor",
            sources=["upload", "clipboard"],
            transforms=["crop"],
            brush=gr.Brush(default_size="auto", colors=["#000000", "#ffffff", "#ff3030", "#30c030", "#3060ff"]),
            layers=gr.LayerOptions(allow_additional_layers=False),
            height=340,
        )
        with gr.Row():
            self.scene = gr.Button("A made scene", size="sm", elem_id="hm-scene", min_width=100)
            self.add = gr.Button("One picture more", size="sm", elem_id="hm-add", min_width=100)
        self.tray = gr.HTML(elem_id="hm-tray")
        self._lay_out_patches()
        self._lay_out_settings(names)

    def _lay_out_conversation(self) -> None:
        self.chat = gr.HTML(markup.conversation_html(Conversation()), elem_id="hm-chat")
        self.box = gr.Textbox(
            placeholder="Ask about the picture, then press Enter",
            show_label=False,
            max_lines=6,
            elem_id="hm-question",
            autofocus=True,
        )
        with gr.Row():
            self.send = gr.Button("Ask", variant="primary", elem_id="hm-send", size="md", min_width=80)
            self.stop = gr.Button("Stop", elem_id="hm-stop", size="md", min_width=80)
            self.clear = gr.Button("New chat", elem_id="hm-clear", size="md", min_width=80)
            self.save = gr.Button("Download", elem_id="hm-save", size="md", min_width=80)
        self.status = gr.HTML(elem_id="hm-status", min_height=24)
        self._lay_out_tokens()

    def _lay_out_patches(self) -> None:
        """Patches of the pictures, of one side or two."""
        self.patches, self.no_patches, self.columns = [], [], []
        with gr.Row(equal_height=False):
            for number in range(2):
                with gr.Column(visible=not number, min_width=150) as column, gr.Accordion("Patches to look from"):
                    self.patches.append(gr.HTML(js_on_load=markup.CLICK_JS, elem_id=f"hm-patches-{number}"))
                    self.no_patches.append(gr.Button("No patches", size="sm", elem_id=f"hm-no-patches-{number}"))
                self.columns.append(column)

    def _lay_out_tokens(self) -> None:
        """Tokens of the answer, of one side or two."""
        self.tokens = []
        with gr.Row(equal_height=False):
            for number in range(2):
                with gr.Column(visible=not number, min_width=200) as column:
                    self.tokens.append(
                        gr.CheckboxGroup(
                            [],
                            label="Answer tokens" + (" of the other side" if number else ""),
                            info="Those to look at; none chosen means all.",
                            elem_id=f"hm-tokens-{number}",
                            elem_classes="hm-tokens",
                        )
                    )
                self.columns.append(column)

    def _lay_out_settings(self, names: Sequence[str]) -> None:
        with gr.Accordion("Picture and generation", open=False, elem_id="hm-settings"):
            self.edit = gr.Radio(list(EDITS), value=EDITS[0], label="Brush strokes", elem_id="hm-edit")
            self.shape = gr.Radio(list(SHAPES), value=SHAPES[0], label="Shape of the picture", elem_id="hm-shape")
            with gr.Row():
                self.length = gr.Slider(1, MOST_TOKENS, 32, step=1, label="New tokens at most", elem_id="hm-length")
                self.seed = gr.Number(0, precision=0, minimum=0, maximum=2**31, label="Seed", elem_id="hm-seed")
            with gr.Row():
                self.temperature = gr.Slider(
                    0, 2, 0, step=0.1, label="Temperature", info="0: the likeliest token", elem_id="hm-temperature"
                )
                self.top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top p", elem_id="hm-top-p")
        with gr.Accordion("Compare", open=False, elem_id="hm-compare"):
            kinds = [NOTHING, PICTURE] + ([MODEL] if len(names) > 1 else [])
            self.compare = gr.Radio(kinds, value=NOTHING, label="Ask the same of", elem_id="hm-compare-with")
            self.other_picture = gr.UploadButton(
                "Load the other picture",
                type="binary",
                file_types=["image"],
                size="sm",
                visible=False,
                elem_id="hm-other-picture",
            )
            self.other_shown = gr.HTML(elem_id="hm-other-shown")
            self.other_model = gr.Dropdown(
                list(names), value=names[-1], label="The other model", visible=False, elem_id="hm-other-model"
            )

    @property
    def components(self) -> list[Any]:
        """All that an answer changes."""
        areas = [one for area in self.areas for one in area.components]
        return [self.chat, self.box, self.tray, self.status, *self.columns, *self.tokens, *self.patches, *areas]
