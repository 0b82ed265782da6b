"""The whole path on a model that ships with the package: pictures to named concepts, in two minutes.

Scenes -> full captions by the model -> representations of attribute words -> concepts -> words, pictures and a score
against the scenes' truth -> TensorBoard, HTML, JSON.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from concept_dict.cards import ConceptCard
from concept_dict.dictionary import ConceptDictionary
from concept_dict.evaluation import evaluate
from concept_dict.evidence import Evidence, Samples
from concept_dict.ground_command import write_all
from concept_dict.non_negative_dictionary import NonNegativeDictionary
from concept_dict.report import ground
from hooked_mm.errors import BadInputError
from hooked_mm.extraction import Extractor
from hooked_mm.extraction_job import extract
from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.dataset import ScenesDataModule
from hooked_mm.scenes.language import DESCRIBED, WORD_CLASSES
from hooked_mm.selectors import TokenOfInterest
from hooked_mm.small import SMALL_MODELS

STYLE = "full"
"""Attributes after the noun: where one is predicted, no earlier word of the caption gives it away."""
MADE_HERE = ("activations", "held_out", "tensorboard", "dictionary", "report.html", "report.json")


def _clear(folder: Path) -> None:
    """Remove what an earlier demo left, and nothing else."""
    for name in MADE_HERE:
        target = folder / name
        if target.is_dir():
            shutil.rmtree(target)
        elif target.exists():
            target.unlink()


def print_table(cards: Sequence[ConceptCard], scores: Mapping[str, Any]) -> None:
    """Concept, words, best fact, held-out AUROC, shuffled labels; then the means, and those of a random dictionary."""
    ends = [card.end for card in cards]
    words = [", ".join(word.text for word in end.words[:4]) for end in ends]
    width = max(map(len, words))

    def line(name: Any, text: str, fact: str, held: str, shuffled: str) -> str:
        return f"{name:>7}  {text:<{width}}  {fact:<22}  {held:>14}  {shuffled:>15}"

    print(f"\n{'concept':>7}  {'top words':<{width}}  {'best-matching fact':<22}  held-out AUROC  shuffled labels")
    for card, end, text in zip(cards, ends, words, strict=True):
        print(line(card.index, text, end.fact or "", f"{end.held_out:.3f}", f"{end.shuffled:.3f}"))
    for name, about, ending in (("mean", "", ""), ("random", "(random directions instead)", "_random")):
        facts = f"{scores[f'concepts/different_facts{ending}']:.0f} different facts"
        shuffled = "" if ending else f"{scores['concepts/auroc_shuffled']:.3f}"
        print(line(name, about, facts, f"{scores[f'concepts/auroc{ending}']:.3f}", shuffled))


def load(model: str) -> HookedMM:
    """A shipped small model by its name, or one in a folder.

    Raises:
        BadInputError: For a name that does not exist.
    """
    if model not in SMALL_MODELS and Path(model).is_dir():
        return HookedMM.from_pretrained(model, dtype="float32")
    return HookedMM.small(model)


def demo(
    model: str = "llava",
    output: Path = Path("runs/demo"),
    samples: int = 800,
    held_out: int = 400,
    n_components: int = 26,
    layer: int = -1,
    batch_size: int = 100,
    seed: int = 0,
) -> None:
    """Learn and ground concepts of a shipped small model on scenes, and say where to look.

    Args:
        model: Name of a small model, or the folder of one that was trained on scenes.
        output: Folder for the results; an earlier demo's are replaced.
        samples: Scenes to learn from.
        held_out: Other scenes to score on.
        n_components: Number of concepts.
        layer: Layer whose residual stream is read (`resid_post`); negative counts from the end.
        batch_size: Scenes per batch.
        seed: Seed of the scenes and of the decomposition.
    """
    started = time.monotonic()
    hooked = load(model)
    n_layers = hooked.cfg.n_layers
    if not -n_layers <= layer < n_layers:
        raise BadInputError(f"layer={layer} is outside this model's {n_layers} layers")
    hook = f"blocks.{layer % n_layers}.hook_resid_post"
    words = tuple(word for name in DESCRIBED for word in WORD_CLASSES[name])
    print(f"1. {hooked}")
    _clear(output)
    print(f"2. captions of {samples} scenes and of {held_out} held out; {hook} where an attribute word is predicted")
    extractor = Extractor(hooked, hook, TokenOfInterest(words, where="predicts"))
    data = ScenesDataModule(samples, "caption", "test", seed, STYLE, batch_size=batch_size)
    fitted = extract(extractor, data, output / "activations")
    held_data = ScenesDataModule(held_out, "caption", "test", seed + 1, STYLE, batch_size=batch_size)
    held = extract(extractor, held_data, output / "held_out")
    print(f"3. {n_components} concepts of {len(fitted)} representations")
    decomposition = NonNegativeDictionary(n_components, random_state=seed).fit(fitted.activations(hook))
    dictionary = ConceptDictionary(decomposition, hook, fitted.made_by)
    dictionary.save(output / "dictionary")
    print("4. grounding: words, pictures, and the scenes' truth")
    evidence = Evidence(Samples.of(held, hook), fitted=Samples.of(fitted, hook), seed=seed)
    scores = evaluate(dictionary, evidence, ["concepts"])
    report, _ = ground(
        dictionary,
        fitted,
        hooked,
        held,
        title=f"Concepts of the small {Path(model).name}",
        facts=[
            ("rows", "where a caption's attribute words are predicted"),
            ("fit", f"{decomposition.n_iter_} iterations, {decomposition.n_dead_} dead concepts"),
            ("scenes", f"{samples} to learn and choose the best fact, {held_out} others for the AUROC"),
        ],
        metrics={"AUROC of random directions": float(scores["concepts/auroc_random"])},
        seed=seed,
    )
    write_all(report, output)
    print_table(report.cards, scores)
    print(
        f"\nDone in {time.monotonic() - started:.0f} s. Look at\n"
        f"  {output / 'report.html'}   (words, pictures and scores of every concept; open it in a browser)\n"
        f"  tensorboard --logdir {output / 'tensorboard'}   (then http://localhost:6006)\n"
        f"  {output / 'activations'}, {output / 'dictionary'}   (to go on with in Python)"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of the demo."""
    auto_cli(demo, args=None if argv is None else list(argv), prog="hooked-mm demo", as_positional=False)
