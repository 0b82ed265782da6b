"""Downloads that never lie in a file on the server: a zip handed to the browser, which makes a file of it."""

from __future__ import annotations

import base64
import io
import json
import zipfile
from collections.abc import Sequence

from hooked_mm.explorer.bundle import bundle
from hooked_mm.explorer.notices import view_html
from hooked_mm.explorer.visits import Seen

SAVE_JS = """
(data) => {
  if (!data) return "";
  const {name, body} = JSON.parse(data);
  const bytes = Uint8Array.from(atob(body), (one) => one.charCodeAt(0));
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([bytes], {type: "application/zip"}));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  return "";
}
"""
"""Makes a file of what `as_download` wrote."""


def as_download(name: str, body: bytes) -> str:
    """A file's name and bytes, for `SAVE_JS`."""
    return json.dumps({"name": name, "body": base64.b64encode(body).decode()})


def seen_zip(name: str, seen: Sequence[Seen]) -> bytes:
    """What a tab shows, as a zip; of two sides each in a folder of its own.

    Args:
        name: Of the tab.
        seen: What was asked and what it showed, per side.
    """
    parts = [bundle(one.asked, {name: one.view}, view_html(one.view)) for one in seen]
    if len(parts) == 1:
        return parts[0]
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as whole:
        for number, part in enumerate(parts):
            with zipfile.ZipFile(io.BytesIO(part)) as own:
                for item in own.infolist():
                    # With its own date, so that two downloads of the same are the same.
                    named = zipfile.ZipInfo(f"side-{number + 1}/{item.filename}", item.date_time)
                    whole.writestr(named, own.read(item), zipfile.ZIP_DEFLATED)
    return made.getvalue()
