"""Downloads as the browser gets them."""

from __future__ import annotations

import base64
import io
import json
import zipfile

from PIL import Image
from safetensors.torch import load

from hooked_mm.explorer.bundle import bundle
from hooked_mm.explorer.conversation import Generation
from hooked_mm.explorer.downloads import SAVE_JS, as_download, seen_zip
from hooked_mm.explorer.notices import view_html
from hooked_mm.explorer.panels import Note
from hooked_mm.explorer.tab import View
from hooked_mm.explorer.visits import Seen
from hooked_mm.hooked import HookedMM
from tests.explored import ask


def files(body: bytes) -> dict[str, bytes]:
    """What is in a zip."""
    with zipfile.ZipFile(io.BytesIO(body)) as made:
        assert made.testzip() is None
        return {name: made.read(name) for name in made.namelist()}


def test_a_file_reaches_the_browser_byte_by_byte() -> None:
    """Its name and bytes survive JSON; nothing of them is read as anything else."""
    body = bytes(range(256)) * 3
    made = json.loads(as_download('a"b</script>.zip', body))
    assert made["name"] == 'a"b</script>.zip'
    assert base64.b64decode(made["body"]) == body
    assert "atob" in SAVE_JS


def test_two_sides_lie_in_folders_of_their_own(llava: HookedMM, images: list[Image.Image]) -> None:
    """Each with all that it alone would be downloaded with; one side alone in no folder."""
    seen = []
    for image in images[:2]:
        asked = ask(llava, "what place is this ?", image, generation=Generation(3))
        python = "arrays = {'logits': model.run_with_hooks(batch)}"
        logits = llava.run_with_hooks(asked.batch)
        assert logits is not None
        seen.append(Seen(asked, View([Note("said")], python, {"logits": logits})))
    alone = [files(bundle(one.asked, {"plain": one.view}, view_html(one.view))) for one in seen]
    assert files(seen_zip("plain", seen[:1])) == alone[0]
    both = files(seen_zip("plain", seen))
    assert both == {f"side-{number + 1}/{name}": data for number, own in enumerate(alone) for name, data in own.items()}
    assert both["side-1/picture-1.png"] != both["side-2/picture-1.png"]
    for number, one in enumerate(seen):
        arrays = load(both[f"side-{number + 1}/arrays-plain.safetensors"])
        assert arrays["logits"].equal(one.view.arrays["logits"])
    assert seen_zip("plain", seen) == seen_zip("plain", seen)
