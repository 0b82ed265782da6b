"""What a linear probe can read from a small model, per attribute, position rule and layer: the ceiling to chase.

`python -m hooked_mm.small.probes FOLDER` writes `probes.json` (every number) and `probes.md` (a table).

| rule | a row is | the truth |
|---|---|---|
| `image mean` | a scene: the mean over its image positions | the scene's facts (`colour=red`: some object is red) |
| `last prompt` | a scene: the position from which the answer's first token is predicted | the same |
| `predicts` | a word of the given caption: the position that predicts it | which of its attribute's words it is |

The caption is in the style `full`, where attributes follow the noun, so that no earlier token gives a word away (only
positions are narrowed down, by the order in which objects are named), and
the prompt asks for it. A probe is one direction for one fact: least squares with an L2 penalty on standardised values
(its direction is Fisher's, up to the penalty). On one layer of a half-trained LLaVA its AUROCs were within about .01 of
logistic regression's, for a small part of the time.
Its score is the AUROC on scenes of the split `test`; the penalty is chosen per attribute on scenes of `validation`.

Two controls make a ceiling mean something: the same with shuffled labels (chance), and with the same model untrained
(what the architecture, the picture and the words said so far give away by themselves).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from jsonargparse import ArgumentParser
from scipy.stats import rankdata
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.runner import match_names
from hooked_mm.scenes.captions import STYLES, caption
from hooked_mm.scenes.dataset import SceneDataset, picture
from hooked_mm.scenes.world import Scene, all_facts
from hooked_mm.selectors import LastPrompt, MeanOver, Selector, TokenOfInterest, gather
from hooked_mm.untrained import untrained_copy

HOOKS = ("hook_embed", "blocks.*.hook_resid_post")
PENALTIES = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)
"""Of the squared weights, where the squared error is summed over rows; values have variance 1."""

VALUES: dict[str, tuple[str, ...]] = {}
"""Attribute -> its words."""
for _fact in all_facts():
    _name, _value = _fact.split("=")
    VALUES[_name] = (*VALUES.get(_name, ()), _value)

SPOKEN = {value: name for name, options in VALUES.items() if name != "count" for value in options}
"""Every attribute word of a caption -> its attribute; captions do not count."""

RULES: dict[str, Selector] = {
    "image mean": MeanOver(modality="image"),
    "last prompt": LastPrompt(),
    "predicts": TokenOfInterest(tuple(SPOKEN), where="predicts"),
}

Splits = Mapping[str, Sequence[Scene]]
"""Scenes to fit on (`train`), to choose the penalty on (`validation`) and to score on (`test`)."""


@dataclass(frozen=True)
class Rows:
    """Representations at one position rule and what is true of each for one attribute (columns: its words in order)."""

    values: Float[np.ndarray, "hooks n d"]
    truth: Bool[np.ndarray, "n words"]


Key = tuple[str, str]
"""Attribute and rule."""


@torch.no_grad()
def collect(model: HookedMM, scenes: Sequence[Scene], hooks: Sequence[str], batch_size: int = 64) -> dict[Key, Rows]:
    """The rows of every attribute and rule, from one forward pass per batch.

    Args:
        model: Any hooked model whose tokenizer knows the words of the scenes.
        scenes: At least one.
        hooks: Full names of points of the language model, (b, p, d).
        batch_size: Scenes per pass.
    """
    values: dict[str, list[np.ndarray]] = {rule: [] for rule in RULES}
    facts: dict[str, list[frozenset[str]]] = {rule: [] for rule in RULES}
    for start in tqdm(range(0, len(scenes), batch_size), desc="passes", unit="batch"):
        part = scenes[start : start + batch_size]
        said = [caption(item, "full") for item in part]
        batch = model.prepare([picture(item) for item in part], STYLES["full"].prompt, said)
        _, cache = model.run_with_cache(batch, list(hooks), logits_to_keep=1)
        for rule, selector in RULES.items():
            picks = selector(batch, model.tokenizer)
            values[rule].append(torch.stack([gather(cache[hook], picks) for hook in hooks]).float().cpu().numpy())
            for pick in picks:
                word = frozenset({f"{SPOKEN[pick.word]}={pick.word}"}) if pick.word else None
                facts[rule].append(word or part[pick.sample].facts())
    rows = {}
    for rule in RULES:
        stacked = np.concatenate(values[rule], axis=1)
        for name, options in VALUES.items():
            truth = np.array([[f"{name}={word}" in found for word in options] for found in facts[rule]])
            # Of a scene some value of every attribute holds; a word says nothing of other attributes.
            about = truth.any(axis=1)
            if about.any():
                rows[name, rule] = Rows(stacked[:, about], truth[about])
    return rows


def auroc(scores: Float[np.ndarray, "n k"], truth: Bool[np.ndarray, "n k"]) -> Float[np.ndarray, " k"]:
    """Area under the ROC curve of each column of scores for the same column of truths; ties count half.

    From the rank sum of the positives (Mann and Whitney 1947). NaN where a truth holds for all rows or for none.
    """
    positive = truth.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        above = (rankdata(scores, axis=0) * truth).sum(axis=0) - positive * (positive + 1) / 2
        return above / (positive * (len(truth) - positive))


@dataclass(frozen=True)
class Part:
    """The rows of one split at one hook point."""

    values: Float[np.ndarray, "n d"]
    truth: Bool[np.ndarray, "n words"]


@dataclass(frozen=True)
class Probed:
    """Held-out `auroc` per word, the mean AUROC on the validation rows, and the penalty that was chosen there."""

    auroc: Float[np.ndarray, " words"]
    validation: float
    penalty: float


def probe(train: Part, validation: Part, test: Part, penalties: Sequence[float] = PENALTIES) -> Probed:
    """One linear probe per word, fitted on `train`; the penalty with the best mean AUROC on `validation`.

    Raises:
        BadInputError: If in one of the three a word is true of every row, or of none.
    """
    for name, part in (("train", train), ("validation", validation), ("test", test)):
        same = part.truth.all(axis=0) | ~part.truth.any(axis=0)
        if same.any():
            column = int(same.argmax())
            raise BadInputError(
                f"column {column} of the truth is the same in all {len(part.truth)} rows of {name!r}, so no probe can "
                "be fitted or scored; take more scenes"
            )
    scaler = StandardScaler().fit(train.values)
    inputs = [scaler.transform(part.values) for part in (train, validation, test)]
    tried = []
    for penalty in penalties:
        model = Ridge(alpha=penalty).fit(inputs[0], np.where(train.truth, 1, -1).astype(np.float32))
        scores = [np.asarray(model.predict(values)).reshape(len(values), -1) for values in inputs[1:]]
        tried.append(
            Probed(auroc(scores[1], test.truth), float(auroc(scores[0], validation.truth).mean()), float(penalty))
        )
    return max(tried, key=lambda result: result.validation)


def shuffled(part: Part, rng: np.random.Generator) -> Part:
    """The same rows with every column of the truth in an order of its own."""
    return Part(part.values, rng.permuted(part.truth, axis=0))


@dataclass(frozen=True)
class Ceiling:
    """What probes reach for one attribute, by one rule, at one hook point: AUROCs, means over the attribute's words.

    Attributes:
        attribute: One of `VALUES`.
        rule: One of `RULES`.
        hook: The hook point's name.
        auroc: On the test scenes.
        words: The same for each word.
        validation: On the scenes on which the penalty was chosen.
        shuffled: On the test scenes, when the labels of the others are shuffled.
        penalty: The one chosen.
        rows: Per split, the number of rows.
    """

    attribute: str
    rule: str
    hook: str
    auroc: float
    words: dict[str, float]
    validation: float
    shuffled: float
    penalty: float
    rows: dict[str, int]


def ceilings(model: HookedMM, splits: Splits, seed: int = 0, batch_size: int = 64) -> list[Ceiling]:
    """The ceilings of one model, for every attribute, rule and layer.

    Args:
        model: The model.
        splits: Scenes of `train`, `validation` and `test`; no scene may be in two of them.
        seed: Of the shuffled labels.
        batch_size: Scenes per forward pass.

    Raises:
        BadInputError: If there are so few scenes that a fact is true of all or none.
    """
    hooks = match_names(list(HOOKS), model.hook_names)
    rows = {split: collect(model, scenes, hooks, batch_size) for split, scenes in splits.items()}
    rng = np.random.default_rng(seed)
    found = []
    for name, rule in tqdm(rows["train"], desc="probes", unit="table"):
        held = {split: of[name, rule] for split, of in rows.items()}
        for index, hook in enumerate(hooks):
            train, validation, test = (
                Part(held[split].values[index], held[split].truth) for split in ("train", "validation", "test")
            )
            result = probe(train, validation, test)
            chance = probe(shuffled(train, rng), shuffled(validation, rng), test)
            found.append(
                Ceiling(
                    attribute=name,
                    rule=rule,
                    hook=hook,
                    auroc=float(result.auroc.mean()),
                    words=dict(zip(VALUES[name], result.auroc.tolist(), strict=True)),
                    validation=result.validation,
                    shuffled=float(chance.auroc.mean()),
                    penalty=result.penalty,
                    rows={split: len(part.truth) for split, part in held.items()},
                )
            )
    return found


def best(found: Sequence[Ceiling]) -> Ceiling:
    """The layer that is best on the *validation* scenes, so that its test AUROC is not the luckiest of many."""
    return max(found, key=lambda item: item.validation)


def table(trained: Sequence[Ceiling], untrained: Sequence[Ceiling] | None = None) -> str:
    """A Markdown table: a line per attribute and rule, a column per layer (the best one bold), then the controls."""
    hooks = list(dict.fromkeys(item.hook for item in trained))
    short = [hook.removeprefix("hook_").removeprefix("blocks.").removesuffix(".hook_resid_post") for hook in hooks]
    controls = ["shuffled", *(["untrained"] if untrained else [])]
    lines = ["| attribute | rule | " + " | ".join([*short, *controls]) + " |"]
    lines.append("|---|---|" + "---|" * (len(hooks) + len(controls)))
    for key in dict.fromkeys((item.attribute, item.rule) for item in trained):
        row = [item for item in trained if (item.attribute, item.rule) == key]
        chosen = best(row)
        cells = [f"**{item.auroc:.3f}**" if item is chosen else f"{item.auroc:.3f}" for item in row]
        chance = [item.shuffled for item in row]
        cells.append(f"{np.mean(chance):.2f} ({min(chance):.2f} to {max(chance):.2f})")
        if untrained:
            cells.append(f"{best([item for item in untrained if (item.attribute, item.rule) == key]).auroc:.3f}")
        lines.append(f"| {key[0]} | {key[1]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(
    trained: Sequence[Ceiling], untrained: Sequence[Ceiling] | None, splits: Splits, made_by: Mapping[str, Any]
) -> tuple[dict[str, Any], str]:
    """What `probes.json` and `probes.md` say."""
    numbers = {
        **made_by,
        "scenes": {split: len(scenes) for split, scenes in splits.items()},
        "prompt": STYLES["full"].prompt,
        "penalties": list(PENALTIES),
        "trained": [asdict(item) for item in trained],
        "untrained": None if untrained is None else [asdict(item) for item in untrained],
    }
    counts = ", ".join(f"{len(scenes)} of {split}" for split, scenes in splits.items())
    control = " *untrained*: the same model with random weights, at its own best layer." if untrained else ""
    text = f"""# Linear-probe ceilings

AUROC of linear probes on scenes of the split `test`, mean over an attribute's words (scenes: {counts}; seed
{made_by["seed"]}). `embed` is what enters the decoder, a number the residual stream after that layer. Bold: the layer
that is best on the validation scenes, where the penalty was chosen too. *shuffled*: labels shuffled before fitting,
mean and range over layers.{control}

- *image mean*, *last prompt*: is it a fact of the scene (for colour "red": some object is red)?
- *predicts*: which word is it, where the given caption's next word is one of the attribute's? Captions do not count.

{table(trained, untrained)}
"""
    return numbers, text


def measure(
    folder: str | Path,
    train: int = 1500,
    validation: int = 400,
    test: int = 700,
    seed: int = 1,
    untrained: bool = True,
    batch_size: int = 64,
) -> tuple[dict[str, Any], str]:
    """The ceilings of the saved model in a folder, through its real processor; what the two files say.

    Args:
        folder: As `save_pretrained` wrote it.
        train: Scenes to fit on; the probes' scenes are other ones than the model's own as long as the seeds differ.
        validation: Scenes to choose the penalty and the best layer on.
        test: Scenes to score on.
        seed: Of the scenes, of the shuffled labels and of the untrained model.
        untrained: Also measure the same architecture with random weights.
        batch_size: Scenes per forward pass.

    Raises:
        BadInputError: If there are so few scenes that a fact is true of all or none.
    """
    model = HookedMM.from_pretrained(folder, dtype="float32")
    splits: dict[str, list[Scene]] = {}
    for split, size in (("train", train), ("validation", validation), ("test", test)):
        data = SceneDataset(size, split=split, seed=seed)  # type: ignore[arg-type]
        splits[split] = [data.scene(index) for index in range(size)]
    trained = ceilings(model, splits, seed, batch_size)
    control = ceilings(untrained_copy(model, seed), splits, seed, batch_size) if untrained else None
    packages = ("hooked-mm", "torch", "transformers", "scikit-learn", "numpy")
    made_by = {
        "model": Path(folder).name,
        "family": model.cfg.family,
        "seed": seed,
        "versions": {name: version(name) for name in packages},
    }
    return report(trained, control, splits, made_by)


def main(argv: Sequence[str] | None = None) -> None:
    """The command: measure, and write `probes.json` and `probes.md`."""
    parser = ArgumentParser(prog="python -m hooked_mm.small.probes", description=(__doc__ or "").split("\n")[0])
    parser.add_function_arguments(measure, as_positional=True)
    parser.add_argument("--output", type=str, help="where to write; the model's own folder if not given")
    chosen = vars(parser.parse_args(None if argv is None else list(argv)).as_flat())
    output = Path(chosen.pop("output") or chosen["folder"])
    numbers, text = measure(**chosen)
    output.mkdir(parents=True, exist_ok=True)
    (output / "probes.json").write_text(json.dumps(numbers, indent=1) + "\n")
    (output / "probes.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
