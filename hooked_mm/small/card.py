"""The model card of a small model: `python -m hooked_mm.small.card FOLDER` writes `README.md` from what lies there.

| file of the folder | what the card takes from it |
|---|---|
| `config.json`, `model.safetensors`, the processor's | classes and sizes, parameters, image tokens |
| `training.json` | how it was made (`Training`) |
| `accuracy.json` | what it can do (`accuracy.Accuracy`) |
| `accuracy-seed1.json`, ... | the same recipe with another seed, if measured |
| `adapters/*/accuracy.json` | its fine-tuned siblings |
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from hooked_mm.batch import Modality
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.captions import STYLES
from hooked_mm.scenes.questions import QUESTION_TYPES
from hooked_mm.scenes.world import CANVASES, HELD_OUT
from hooked_mm.small import adapters_of
from hooked_mm.small.accuracy import FILE, HELD_OUT_OBJECT, Accuracy, Captions, Share, mean


@dataclass(frozen=True)
class Training:
    """How a model was made.

    Attributes:
        command: What was typed.
        minutes: From nothing to the saved weights.
        device: In words, with the number of cores or the accelerator.
        seed: Of weights, scenes and batches.
        options: The recipe's settings.
    """

    command: str
    minutes: float
    device: str
    seed: int
    options: dict[str, Any]

    def save(self, folder: Path) -> None:
        """Write `training.json`."""
        (folder / "training.json").write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Training:
        """Read what `save` wrote.

        Raises:
            BadInputError: If it is not there.
        """
        path = folder / "training.json"
        if not path.is_file():
            raise BadInputError(f"{str(path)!r} does not exist, which says how the model was made; train writes it")
        return cls(**json.loads(path.read_text()))


@dataclass(frozen=True)
class Facts:
    """What a model is; `owner`: whose class, `image_tokens`: the least and the most that a scene's picture takes."""

    kind: str
    owner: str
    tower: str
    connector: str
    decoder: str
    parameters: int
    megabytes: float
    image_tokens: tuple[int, int]
    tower_layers: int
    layers: int


def facts(folder: Path) -> Facts:
    """Class names and sizes of a saved model, by loading it."""
    model = HookedMM.from_pretrained(folder, check=False)
    structure, cfg, vision = model.structure, model.cfg, model.cfg.vision
    if structure.vision is None or structure.projector is None or vision is None:
        raise BadInputError(f"{str(folder)!r} holds a {cfg.family} without a tower or a projector of its own")

    def kind(path: str) -> str:
        return type(model.hf_model.get_submodule(path)).__name__

    batch = model.prepare([Image.new("RGB", canvas) for canvas in CANVASES], "what place is this ?")
    tokens = batch.modality.eq(int(Modality.IMAGE)).sum(1).tolist()
    return Facts(
        kind=type(model.hf_model).__name__,
        owner=type(model.hf_model).__module__.split(".")[0],
        tower=f"{kind(structure.vision.owner)}, {vision.d_model} x {vision.n_layers}",
        connector=kind(structure.projector),
        decoder=f"{kind(structure.text.owner)}, {cfg.d_model} x {cfg.n_layers}",
        parameters=sum(weight.numel() for weight in model.hf_model.parameters()),
        megabytes=(folder / "model.safetensors").stat().st_size / 1e6,
        image_tokens=(min(tokens), max(tokens)),
        tower_layers=vision.n_layers,
        layers=cfg.n_layers,
    )


SIBLING = ("style followed", "exactly right", "questions", "styles")
"""What is told of an adapter: of what it was taught; then means over types and over styles that it was not."""


def sibling(folder: str | Path, adapter: str) -> dict[str, tuple[float, float]]:
    """Per measure of `SIBLING` the shares without and with an adapter, from its `accuracy.json`.

    Raises:
        BadInputError: If it was not measured.
    """
    path = Path(folder) / "adapters" / adapter / FILE
    try:
        made = json.loads(path.read_text())
        both = [
            [Share(**made[when]["change"][what]).value for what in SIBLING[:2]]
            + [mean({name: Share(**share) for name, share in made[when][what].items()}) for what in SIBLING[2:]]
            for when in ("before", "after")
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInputError(
            f"{str(path)!r} does not say what the adapter does ({type(error).__name__}); make it again: "
            f"python -m hooked_mm.small.adapters {folder} --adapter {adapter}"
        ) from error
    return dict(zip(SIBLING, zip(*both, strict=True), strict=True))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float) -> str:
    return "-" if value != value else f"{value:.3f}"


def question_table(runs: Sequence[Accuracy]) -> str:
    """Shares right per question type; in each cell one number per run."""
    columns = [
        [run.questions["test"] for run in runs],
        [run.questions["unseen"] for run in runs],
        [run.questions[HELD_OUT_OBJECT] for run in runs],
        [run.wrong_image for run in runs],
        [run.chance for run in runs],
    ]
    head = ["question", "test", "unseen", "of the held-out object", "wrong image", "chance"]
    rows = [
        [kind, *(" / ".join(str(run[kind]) if kind in run else "-" for run in column) for column in columns)]
        for kind in QUESTION_TYPES
    ]
    rows.append(["**mean over types**", *(" / ".join(_number(mean(run)) for run in column) for column in columns)])
    return table(head, rows)


def caption_table(runs: Sequence[Accuracy]) -> str:
    """Exact captions and attribute words per style, on both splits; in each cell one number per run."""

    def exact(split: str, style: str) -> str:
        return " / ".join(str(run.captions[split][style].exact) for run in runs)

    def attributes(captions: Captions) -> str:
        return ", ".join(f"{name} {share}" for name, share in captions.attributes.items())

    rows = []
    for style, described in STYLES.items():
        low, high = runs[0].captions["test"][style].exact.interval
        rows.append(
            [
                style,
                described.prompt,
                f"{exact('test', style)} ({low:.3f} to {high:.3f})",
                exact("unseen", style),
                attributes(runs[0].captions["test"][style]),
            ]
        )
    return table(["style", "prompt", "exact, test (95 %)", "exact, unseen", "attribute words, test"], rows)


def _wordings(found: Captions) -> str:
    return ", ".join(f"{count} of {found.exact.of} in `{name}`" for name, count in found.wordings.items())


def _adapters(folder: Path) -> str:
    names = adapters_of(folder)
    if not names:
        return ""
    rows = [
        [f"[{name}](adapters/{name}/README.md)"]
        + [f"{before:.3f} → {after:.3f}" for before, after in sibling(folder, name).values()]
        for name in names
    ]
    return f"""
## Fine-tuned siblings

LoRA adapters, `HookedMM.small("{folder.name}", adapter="{names[0]}")`: shares without → with the adapter on held-out
scenes. *Style followed*, *exactly right*: its captions, by what it was taught; *questions*, *styles*: by the unchanged
truth, what it kept (means over types and over styles asked for). The cards tell more.

{table(["adapter", *SIBLING], rows)}
"""


def card(folder: Path) -> str:
    """The text of the model card."""
    is_, made, first = facts(folder), Training.load(folder), Accuracy.load(folder)
    others = sorted(folder.glob("accuracy-seed*.json"))
    runs = [first, *(Accuracy.load(folder, path.name) for path in others)]
    seeds = [str(made.seed), *(path.stem.removeprefix("accuracy-seed") for path in others)]
    luck = ""
    if others:
        luck = (
            f"Numbers with a slash between them are {len(runs)} trainings by the same recipe, seeds "
            f"{' and '.join(seeds)}, so that luck shows; the weights here are those of seed {seeds[0]}.\n\n"
        )
    options = ", ".join(f"{name} {value}" for name, value in sorted(made.options.items()))
    held_out = ", ".join(f"{colour} {shape}" for shape, colour in HELD_OUT.items())
    low, high = is_.image_tokens
    sizes = table(
        ["class", "tower", "connector", "image tokens", "decoder", "parameters", "weights"],
        [
            [
                f"`{is_.kind}`",
                is_.tower,
                is_.connector,
                str(low) if low == high else f"{low} to {high}",
                is_.decoder,
                f"{is_.parameters:,}",
                f"{is_.megabytes:.1f} MB, bfloat16",
            ]
        ],
    )
    named = {
        "transformers": "A genuine transformers model",
        "hooked_mm": "A transformers model, of a class that hooked-mm brings,",
    }[is_.owner]
    count = first.questions["test"]["place"].of
    wrong = " / ".join(f"{run.wrong_image_captions.right} of {run.wrong_image_captions.of}" for run in runs)
    return f"""# {folder.name}: a small trained vision-language model

{named} with its processor, trained from nothing on hooked-mm's scenes: pictures of 48 to 72 pixels
with one to three objects (6 shapes, 8 colours, 2 sizes) anywhere in one of 6 places. It exists so that interpretability
methods can be tried and tested on a model that works, whose pictures' truth is known, without downloading anything. It
knows nothing else; words outside the scenes' vocabulary become `<unk>`.

{sizes}

```python
from hooked_mm import HookedMM
from hooked_mm.scenes.dataset import SceneDataset

model = HookedMM.small("{folder.name}")
sample = SceneDataset(1, task="question")[0]
batch = model.prepare(sample.images, sample.text)
print(sample.text, "->", model.generate(batch, 3).text[0], "- right is:", sample.answer)

_, cache = model.run_with_cache(batch, "blocks.*.hook_resid_post")
print(cache["blocks.{is_.layers - 1}.hook_resid_post"].shape)
```

Made by `{made.command}` in {made.minutes:.1f} minutes on {made.device}, seed {made.seed} ({options}).

## What it can do

Shares right, greedy, float32 arithmetic on the bfloat16 weights, on {count} fresh scenes (fewer in other columns; the
counts are in `{FILE}`). No *test* scene's description occurs in training. Every *unseen* scene shows a pair of shape
and colour that was never shown or named in training ({held_out}). *Wrong image*: the questions of *test*, each asked of
another scene's picture (of which captions are right in {wrong} cases); *chance*: the best constant answer to the same
questions. The scenes have seed {first.seed}; the recipe was tuned on those of seed 0.

{luck}{question_table(runs)}

Captions per style, by the prompt that asks for it; *exact*: every word is right. An attribute word counts in its slot
(the second colour word as second colour). The default prompt `any` may be answered in two wordings and is, of the test
scenes: {_wordings(first.captions["test"]["any"])}.

{caption_table(runs)}

Descriptions in `full` and `short` are new in *test*; what the other styles leave of them occurs in training.

What a linear probe can read at every layer: [probes.md](probes.md).
{_adapters(folder)}"""


def write_model_card(folder: Path) -> None:
    """Write `README.md` of a small model.

    Raises:
        BadInputError: If the folder lacks what was measured, or how the model was made.
    """
    (folder / "README.md").write_text(card(folder))


if __name__ == "__main__":
    write_model_card(Path(sys.argv[1]))
