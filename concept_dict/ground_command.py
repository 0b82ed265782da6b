"""Show what a dictionary's concepts mean (words, samples, where in the picture, metrics): TensorBoard, a page, JSON.

    hooked-mm ground --dictionary runs/dictionary --store runs/fit --held_out runs/test --model.id small:llava \\
        --output runs/grounded --metrics '[facts, reconstruction]'
    tensorboard --logdir runs

Everything can stand in a YAML file (`-c ground.yaml`; `--print_config` writes one). Every output folder is a run of its
own in TensorBoard, so that runs compare side by side by their settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from concept_dict.cards import Report, write_html, write_json, write_tensorboard
from concept_dict.dictionary import ConceptDictionary
from concept_dict.grounding import STOPWORDS, read_words, top_words
from concept_dict.pictures import store_pictures
from concept_dict.report import How, ground
from concept_dict.row_choice import described, learnt_where
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.reader import ModelSource
from hooked_mm.run_output import output_folder
from hooked_mm.store import ActivationStore
from hooked_mm.unembedding import Unembedding

MADE_HERE = ("tensorboard", "report.html", "report.json")


def build_parser() -> ArgumentParser:
    """The options of the command."""
    parser = ArgumentParser(prog="hooked-mm ground", description=(__doc__ or "").split("\n")[0], default_env=False)
    parser.add_argument("-c", "--config", action="config", help="a YAML file with any of these options")
    parser.add_argument("--dictionary", type=str, required=True, help="the dictionary's folder, or its name on the hub")
    parser.add_argument("--store", type=Path, required=True, help="a store with the samples to show concepts by")
    parser.add_argument("--held_out", type=Path | None, help="a store of other samples, to score facts on")
    parser.add_argument(
        "--where",
        type=dict[str, Any] | None,
        help="conditions on rows: {word: [red, blue]}; unless given those that the dictionary was learnt with; {}: all",
    )
    parser.add_class_arguments(ModelSource, "model")
    parser.add_argument("--output", type=Path, required=True, help="folder for TensorBoard, page and JSON")
    parser.add_argument("--title", type=str | None, help="of the report")
    parser.add_argument("--metrics", type=list[str], default=[], help="names of metrics to compute")
    parser.add_argument("--clip", type=Path | None, help="folder of a CLIP, for the metric clip_score")
    parser.add_argument("--bert", type=Path | None, help="folder of a BERT, for the metric bert_score")
    parser.add_argument(
        "--faithfulness_samples",
        type=int,
        default=64,
        help="samples that the metric faithfulness is measured at, a position of each; it costs some 66 passes of them",
    )
    parser.add_argument("--count", type=int, default=6, help="samples per concept")
    parser.add_argument("--words", type=int, default=5, help="words per concept")
    parser.add_argument("--stopwords", type=Path | None, help="a text file of words to leave out, for our own list")
    parser.add_argument("--vocabulary", type=Path | None, help="a text file of the only words to name concepts by")
    parser.add_argument("--in_pictures", type=How, default="auto", help="how concepts are found in pictures")
    parser.add_argument("--device", type=str, default="cpu", help="where the model runs: cpu, cuda, cuda:1, ...")
    parser.add_argument("--seed", type=int, default=0, help="of shuffled labels")
    return parser


def check_output(folder: Path) -> None:
    """Refuse a folder that holds a report already: TensorBoard would show both as one run.

    Raises:
        BadInputError: It names what is there.
    """
    there = [name for name in MADE_HERE if (folder / name).exists()]
    if there:
        raise BadInputError(f"{str(folder)!r} already holds {', '.join(there)}; choose another folder, or remove them")


def scores(
    names: Sequence[str],
    dictionary: ConceptDictionary,
    store: ActivationStore,
    held_out: ActivationStore | None,
    model: HookedMM | Unembedding,
    *,
    words: int = 5,
    clip: Path | None = None,
    bert: Path | None = None,
    faithfulness_samples: int = 64,
    seed: int = 0,
) -> dict[str, float]:
    """The metrics asked for, by `concept_dict.evaluation`: its scores that are single numbers.

    Without held-out samples everything is scored on those of `store`, and what needs two sets is refused.

    Raises:
        BadInputError: As `evaluation.evaluate`; and for `faithfulness_samples` below 1.
    """
    if faithfulness_samples < 1:
        raise BadInputError(f"faithfulness_samples={faithfulness_samples}; it must be at least 1")
    if not names:
        return {}
    # Heavy, and needed only here.
    evaluation: Any = import_module("concept_dict.evaluation")
    evidence: Any = import_module("concept_dict.evidence")
    answers: Any = import_module("concept_dict.answer_rows")
    scored = held_out if held_out is not None else store
    pictures, _ = store_pictures(scored)
    found = top_words(model, dictionary.concepts, words)
    found += top_words(model, -dictionary.concepts, words) if dictionary.signed else []
    rows = None
    whole = None if isinstance(model, Unembedding) else model
    if "faithfulness" in names and pictures is not None and whole is not None:
        rows = answers.stored_rows(whole, scored, pictures, samples=faithfulness_samples, seed=seed)
    images = None
    if "clip_score" in names and pictures is not None:
        images = [pictures(index)[0] for index in range(scored.samples.num_rows)]
    given = evidence.Evidence(
        evidence.Samples.of(scored, dictionary.hook, images),
        fitted=evidence.Samples.of(store, dictionary.hook) if held_out is not None else None,
        words=[[word.text for word in own] for own in found],
        clip=clip,
        bert=bert,
        model=whole,
        answers=rows,
        seed=seed,
    )
    measured = evaluation.evaluate(dictionary, given, list(names))
    return {name: float(value) for name, value in measured.items() if isinstance(value, int | float)}


def speaker(
    source: ModelSource, device: str, store: ActivationStore, where: How, metrics: Sequence[str]
) -> HookedMM | Unembedding:
    """The model; its unembedding alone where only words are asked of it.

    Args:
        source: Where to load it from.
        device: Where it shall be.
        store: Whose samples are shown.
        where: How concepts are to be found in pictures.
        metrics: What is to be scored.
    """
    looks = where != "none" and store_pictures(store)[0] is not None
    return source.load(device) if looks or "faithfulness" in metrics else source.words(device)


def write_all(report: Report, folder: Path) -> None:
    """TensorBoard's files, the page and the JSON."""
    output_folder(folder)
    write_tensorboard(report, folder / "tensorboard")
    write_html(report, folder / "report.html")
    write_json(report, folder / "report.json")


def main(argv: Sequence[str] | None = None) -> None:
    """The command `hooked-mm ground`."""
    parser = build_parser()
    made = parser.instantiate(parser.parse_args(None if argv is None else list(argv)))
    check_output(made.output)
    dictionary = ConceptDictionary.from_pretrained(made.dictionary)
    where = learnt_where(dictionary.made_by) if made.where is None else made.where
    store = ActivationStore.open(made.store).where(**where)
    held_out = None if made.held_out is None else ActivationStore.open(made.held_out).where(**where)
    stopwords = STOPWORDS if made.stopwords is None else read_words(made.stopwords)
    vocabulary = None if made.vocabulary is None else read_words(made.vocabulary)
    output_folder(made.output)
    model = speaker(made.model, made.device, store, made.in_pictures, made.metrics)
    own = {name: made[name] for name in ("words", "clip", "bert", "faithfulness_samples", "seed")}
    found = scores(made.metrics, dictionary, store, held_out, model, **own)
    report, _ = ground(
        dictionary,
        store,
        model,
        held_out,
        title=made.title or f"Concepts of {made.dictionary}",
        facts=[("rows", described(where, store))],
        metrics=found,
        count=made.count,
        words=made.words,
        stopwords=stopwords,
        vocabulary=vocabulary,
        where=made.in_pictures,
        seed=made.seed,
    )
    write_all(report, made.output)
    for card in report.cards:
        facts = [f"{end.fact}, {end.held_out:.3f}" for _, _, end in card.ends if end.fact is not None]
        print(f"{card.title}  ({'; '.join(facts)})" if facts else card.title)
    for name, value in report.metrics.items():
        print(f"{name}: {value:.4g}")
    print(f"{made.output / 'report.html'}\ntensorboard --logdir {made.output}")
