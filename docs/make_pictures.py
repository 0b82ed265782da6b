"""The pictures of README and docs: scenes, the demo's report and TensorBoard, an explanation, a shift, a lens.

`make pictures`; report and TensorBoard are as headless Chromium shows them and need Debian's chromium (`--scenes`:
the contact sheet alone).
"""

from __future__ import annotations

import argparse
import io
import shlex
import shutil
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from playwright.sync_api import Page, sync_playwright

from analyses.map_pictures import neuron_sheet
from analyses.neurons import Neuron
from concept_dict.dictionary import ConceptDictionary
from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.captions import caption
from hooked_mm.scenes.dataset import SceneDataset
from hooked_mm.scenes.draw import render
from hooked_mm.scenes.language import DESCRIBED, WORD_CLASSES
from hooked_mm.scenes.pairs import ATTRIBUTES, scene_pair
from hooked_mm.scenes.world import HELD_OUT, Scene, scene

ROOT = Path(__file__).parent.parent


CHROMIUM = ("no-sandbox", "disable-background-networking", "use-angle=swiftshader", "enable-unsafe-swiftshader")
"""The last two draw WebGL, which the projector needs, without a graphics card."""

SCALE = 2
CELL = 72 * SCALE + 8
"""Room for the longest side of a canvas, in pixels of the sheet."""


def enlarged(item: Scene, *, outlined: bool = False) -> Image.Image:
    """The scene's picture with every pixel as a square; where asked, the rims of the masks in magenta."""
    pixels, masks = render(item)
    pixels = pixels.repeat(SCALE, 0).repeat(SCALE, 1)
    if outlined:
        covered = (masks > 0.5).any(0).repeat(SCALE, 0).repeat(SCALE, 1)
        padded = np.pad(covered, 1)
        inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        pixels[covered & ~inner] = (255, 0, 200)
    return Image.fromarray(pixels)


class Sheet:
    """A white page that is filled from top to bottom."""

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (width, height), "white")
        self.pen = ImageDraw.Draw(self.image)
        self.y = 12

    def text(self, x: int, y: int, words: str, size: int = 13, columns: int = 200) -> None:
        """Words in lines of so many letters."""
        lines = "\n".join(textwrap.fill(line, columns) for line in words.split("\n"))
        self.pen.multiline_text((x, y), lines, fill=(30, 30, 30), font=ImageFont.load_default(size), spacing=3)

    def title(self, words: str) -> None:
        """A heading."""
        self.text(12, self.y, words, 18)
        self.y += 34

    def cells(self, entries: list[tuple[list[Image.Image], str]], columns: int, letters: int, height: int) -> None:
        """Pictures with words to the right of them, several entries in a row."""
        width = self.image.width // columns
        for number, (pictures, words) in enumerate(entries):
            x, y = 12 + number % columns * width, self.y + number // columns * height
            for picture in pictures:
                self.image.paste(picture, (x, y))
                x += picture.width + 6
            self.text(x + 2, y, words, columns=letters)
        self.y += -(-len(entries) // columns) * height + 8


def contact_sheet(target: Path) -> None:
    """Scenes with captions, contrast pairs, masks and scenes with held-out pairs."""
    sheet = Sheet(1240, 1900)
    sheet.title("Scenes of the test split, with their captions in full")
    seen = [scene("test", index) for index in range(24)]
    sheet.cells([([enlarged(item)], caption(item)) for item in seen], 4, 22, CELL)
    sheet.title("Contrast pairs: one attribute, the place, or one object fewer; the same question")
    pairs = [(name, scene_pair("test", 5, name)) for name in ATTRIBUTES]
    entries = [
        ([enlarged(pair.one), enlarged(pair.other)], "\n".join([f"[{name}]", pair.question, " / ".join(pair.answers)]))
        for name, pair in pairs
    ]
    sheet.cells(entries, 3, 18, CELL)
    sheet.title("Masks, outlined")
    sheet.cells([([enlarged(scene("test", index), outlined=True)], "") for index in range(24, 32)], 8, 1, CELL)
    sheet.title("Unseen: each shows a pair of shape and colour that is held out from training")
    drawn = [scene("unseen", index) for index in range(60)]
    unseen = [next(i for i in drawn for o in i.objects if (o.shape, o.colour) == pair) for pair in HELD_OUT.items()]
    names = [f"{colour} {shape}" for shape, colour in HELD_OUT.items()]
    sheet.cells([([enlarged(item)], name) for item, name in zip(unseen, names, strict=True)], 5, 10, CELL)
    sheet.image.crop((0, 0, sheet.image.width, sheet.y)).quantize(256, dither=Image.Dither.NONE).save(
        target, optimize=True
    )


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(address: str, seconds: float = 60) -> None:
    """Until the address answers."""
    end = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(address, timeout=2).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


def report_picture(page: Page, report: Path, target: Path) -> None:
    """The overview table and the first cards."""
    page.set_viewport_size({"width": 1180, "height": 1480})
    page.goto(report.resolve().as_uri())
    page.wait_for_load_state("networkidle")
    page.screenshot(path=target)


@contextmanager
def tensorboard(logs: Path) -> Iterator[str]:
    """TensorBoard's address while it runs on these logs."""
    port = free_port()
    program = Path(sys.executable).with_name("tensorboard")
    command = [str(program), "--logdir", logs.name, "--port", str(port), "--host", "127.0.0.1"]
    # From the folder above, so that the page shows a path that is the same on every machine.
    server = subprocess.Popen(command, cwd=logs.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(f"http://127.0.0.1:{port}/data/environment")
        yield f"http://127.0.0.1:{port}/?darkMode=false"
    finally:
        server.terminate()
        server.wait(timeout=20)


def images_picture(page: Page, address: str, target: Path) -> None:
    """The image tab: per concept the most activating pictures, each beside where the concept is in it."""
    page.set_viewport_size({"width": 1380, "height": 940})
    page.goto(f"{address}#images")
    page.wait_for_selector("tf-image-loader img", timeout=60_000)
    # The pictures of the first page are still being loaded.
    page.wait_for_timeout(2500)
    page.screenshot(path=target)


def card_picture(page: Page, address: str, target: Path) -> None:
    """The text tab: the first concepts' cards."""
    page.set_viewport_size({"width": 1380, "height": 900})
    page.goto(f"{address}&tagFilter=concepts#text")
    page.wait_for_selector("tf-markdown-view", timeout=60_000)
    page.wait_for_timeout(2500)
    page.screenshot(path=target)


def projector_picture(page: Page, address: str, target: Path) -> None:
    """The projector: concepts with their pictures."""
    page.set_viewport_size({"width": 1380, "height": 900})
    page.goto(f"{address}#projector")
    page.wait_for_timeout(12_000)
    # One concept found by its word shows its fact, its samples' words and its neighbours.
    page.frames[-1].locator("vz-projector-inspector-panel input").first.fill("red", timeout=20_000)
    page.mouse.move(690, 510)
    for _ in range(5):
        page.mouse.wheel(0, -240)
        page.wait_for_timeout(500)
    page.wait_for_timeout(2500)
    page.screenshot(path=target)


def explained(target: Path, demo: Path) -> None:
    """What fires for one scene, by the demo's dictionary."""
    dictionary = ConceptDictionary.load(demo / "dictionary")
    sample = SceneDataset(20, style="full", seed=3)[4]
    found = dictionary.explain(HookedMM.small("llava"), sample.images, sample.text, count=7)
    found.draw().save(target, optimize=True)


SHIFT = """shift --original.id small:llava --tuned.id small:llava --tuned.adapter colours --data ScenesDataModule
--data.size 400 --hook blocks.3.hook_resid_post --selector TokenOfInterest --k [10] --words 5 --count 3"""
"""What the picture of a shift is of, but for words and output."""


def shift_picture(page: Page, report: Path, target: Path) -> None:
    """The tables of recovery, the plot, and the first card."""
    page.set_viewport_size({"width": 1180, "height": 900})
    page.goto(report.resolve().as_uri())
    page.wait_for_load_state("networkidle")
    parts = [page.locator(".forms-table").first, page.locator("figure.plot").first, page.locator("section").first]
    pictures = [Image.open(io.BytesIO(part.screenshot())).convert("RGB") for part in parts]
    sheet = Image.new("RGB", (max(p.width for p in pictures), sum(p.height + 24 for p in pictures)), "white")
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height + 24
    sheet.save(target, optimize=True)


STEERING = (
    "extract --model.id small:llava --data ScenesDataModule --data.size 200 --data.task questions "
    "--data.split train --hooks '[blocks.1.hook_resid_post, blocks.2.hook_resid_post, blocks.3.hook_resid_post]' "
    "--selector LastPrompt --answer generated --max_new_tokens 4 --output {folder}/questions",
    "steer compute --store {folder}/questions --source '{{text: red}}' --target '{{text: blue}}' "
    "--gate '{{text: red}}' --output {folder}/vectors",
    "steer sweep --model.id small:llava --vectors {folder}/vectors --gated '[false, true]' "
    "--alphas '[0.5, 1, 1.5, 2, 2.5, 3]' --task AnswerTask --task.source red --task.target blue "
    "--task.types '[colour]' --data ScenesDataModule --data.size 50 --data.task questions --data.split validation "
    "--test ScenesDataModule --test.size 100 --test.task questions --max_new_tokens 4 --output {folder}/sweep",
)


def steering_run(folder: Path, program: str) -> Path:
    """The page of a sweep, made first if it is missing."""
    report = folder / "sweep" / "report.html"
    if not report.is_file():
        for command in STEERING:
            # From the folder above, so that the page shows a path that is the same on every machine.
            folder.parent.mkdir(parents=True, exist_ok=True)
            arguments = shlex.split(command.format(folder=folder.name))
            subprocess.run([program, *arguments], cwd=folder.parent, check=True)
    return report


def steering_picture(page: Page, report: Path, target: Path) -> None:
    """What was found, effect against damage, and both against alpha."""
    page.set_viewport_size({"width": 1180, "height": 1620})
    page.goto(report.resolve().as_uri())
    page.wait_for_load_state("networkidle")
    page.screenshot(path=target)


LENS = """analyse logit-lens --model.id small:llava --data ScenesDataModule --data.size 12 --data.style full
--data.seed 3 --answer generated"""
"""What the picture of the lens is of, but for the output."""


def lens_picture(page: Page, sample: Path, target: Path) -> None:
    """A sample's page: a word that was searched for, and a patch that is pointed at."""
    page.set_viewport_size({"width": 1180, "height": 790})
    page.goto(sample.resolve().as_uri())
    page.wait_for_selector("#c0-0")
    page.fill("#search", "star")
    page.evaluate("document.activeElement.blur()")
    box = page.locator("canvas").first.bounding_box()
    page.mouse.move(box["x"] + 0.7 * box["width"], box["y"] + 0.3 * box["height"])
    page.wait_for_timeout(500)
    page.screenshot(path=target)


SEGMENT = """analyse segment --model.id small:llava --model.dtype float32 --data.size 120 --validation.size 60
--random_weights null"""
"""What the sheet of segmentations is of, but for the output."""

NEURONS = (Neuron(2, 122), Neuron(3, 25), Neuron(0, 73), Neuron(4, 147))
"""Of those that the small LLaVA's words have; what they are active at is in docs/words_in_pictures.md."""


def neurons_picture(target: Path) -> None:
    """Neurons with the scenes that they answer to."""
    data = SceneDataset(40, split="test", seed=3)
    pictures = [data[number].images for number in range(len(data))]
    prompt = "what colour is the object ?"
    neuron_sheet(HookedMM.small("llava"), pictures, NEURONS, prompt).save(target, optimize=True)


def main() -> None:
    """Write the pictures of docs/; all but the contact sheet from runs, made first if they are missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=ROOT / "runs" / "demo")
    parser.add_argument("--shift", type=Path, default=ROOT / "runs" / "shift")
    parser.add_argument("--steering", type=Path, default=ROOT / "runs" / "steering")
    parser.add_argument("--lens", type=Path, default=ROOT / "runs" / "lens")
    parser.add_argument("--segment", type=Path, default=ROOT / "runs" / "segment")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--output", type=Path, default=ROOT / "docs")
    parser.add_argument("--scenes", action="store_true", help="only the contact sheet of the scenes")
    options = parser.parse_args()
    contact_sheet(options.output / "scenes.png")
    if options.scenes:
        return
    program = str(Path(sys.executable).with_name("hooked-mm"))
    if not (options.demo / "report.html").is_file():
        subprocess.run([program, "demo", "--output", str(options.demo)], check=True)
    if not (options.shift / "KMeans-k10" / "report.html").is_file():
        words = f"[{','.join(word for name in DESCRIBED for word in WORD_CLASSES[name])}]"
        subprocess.run([program, *SHIFT.split(), "--selector.words", words, "--output", str(options.shift)], check=True)
    if not (options.lens / "index.html").is_file():
        subprocess.run([program, *LENS.split(), "--output", str(options.lens)], check=True)
    if not (options.segment / "pictures.png").is_file():
        subprocess.run([program, *SEGMENT.split(), "--output", str(options.segment)], check=True)
    shutil.copyfile(options.segment / "pictures.png", options.output / "segmentation.png")
    neurons_picture(options.output / "neurons.png")
    steered = steering_run(options.steering, program)
    explained(options.output / "explain.png", options.demo)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=options.chromium,
            args=[
                "--no-sandbox",
                "--disable-background-networking",
                "--use-angle=swiftshader",
                "--enable-unsafe-swiftshader",
            ],
        )
        page = browser.new_page()
        report_picture(page, options.demo / "report.html", options.output / "report.png")
        shift_picture(page, options.shift / "KMeans-k10" / "report.html", options.output / "shift.png")
        steering_picture(page, steered, options.output / "steering.png")
        lens_picture(page, options.lens / "pages" / "00004.html", options.output / "lens.png")
        with tensorboard(options.demo / "tensorboard") as address:
            images_picture(page, address, options.output / "tensorboard.png")
            card_picture(page, address, options.output / "tensorboard_card.png")
            projector_picture(page, address, options.output / "tensorboard_projector.png")
        browser.close()


if __name__ == "__main__":
    main()
