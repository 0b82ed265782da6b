"""What a fine-tuning did to a model's concepts: shift vectors, and how well they recover the fine-tuned model's.

    hooked-mm shift --original.id small:llava --tuned.id small:llava --tuned.adapter place \\
        --data ScenesDataModule --data.size 1000 --hook blocks.3.hook_resid_post --selector LastPrompt \\
        --k '[10, 20]' --output runs/shift
    tensorboard --logdir runs/shift

Extracts both models with the same samples and positions (a base with an adapter is loaded once), or takes two stores
(`--original_store`, `--tuned_store`); learns the original's dictionary, or takes one (`--dictionary`). Samples are
dealt into parts: those that scores are measured on computed neither shifts nor that dictionary. Everything can stand in
a YAML file (`-c shift.yaml`; `--print_config` writes one).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser
from sklearn.base import clone

import hooked_mm.datasets
import hooked_mm.scenes.dataset  # noqa: F401  (data modules are offered by name)
from concept_dict.decomposition import Decomposition
from concept_dict.dictionary import ConceptDictionary
from concept_dict.grounding import STOPWORDS, Decode, read_words
from concept_dict.pictures import store_pictures
from concept_dict.row_choice import described, learnt_where
from concept_dict.shift_cards import build_report
from concept_dict.shift_report import write_html, write_tensorboard
from concept_dict.shift_run import (
    LEARN,
    MEASURE,
    SHARES,
    SHIFT,
    Dealt,
    circular,
    deal,
    decoder,
    places_of,
    shift_steering_vectors,
    spelled,
    texts_of,
)
from concept_dict.shift_study import Settings, ShiftStudy, study
from concept_dict.shift_tables import table, write_tables
from hooked_mm.adapter_switch import adapters_off
from hooked_mm.data import SampleDataModule
from hooked_mm.errors import BadInputError
from hooked_mm.extract_command import instantiated
from hooked_mm.extraction_job import quiet
from hooked_mm.loading import OnError
from hooked_mm.pair_extraction import Once, Texts, extract_pair, same_base
from hooked_mm.paired_rows import By, pair_rows
from hooked_mm.processes import goes_on_alone
from hooked_mm.reader import ModelSource
from hooked_mm.run_output import output_folder
from hooked_mm.selectors import Selector
from hooked_mm.steering_vector import last_part, save_vectors
from hooked_mm.store import ActivationStore
from hooked_mm.unembedding import Unembedding

SHOWN = 5
"""Words of a concept in tables."""

TABLES = ("concepts.csv", "forms.csv", "comparisons.csv", "shift.json")


def build_parser() -> ArgumentParser:
    """The options of the command."""
    parser = ArgumentParser(prog="hooked-mm shift", description=(__doc__ or "").split("\n")[0], default_env=False)
    parser.add_argument("-c", "--config", action="config", help="a YAML file with any of these options")
    models = parser.add_argument_group("models: to extract from, and to decode words with")
    models.add_argument("--original", type=ModelSource | None, help="the model before the fine-tuning")
    models.add_argument("--tuned", type=ModelSource | None, help="the model after it; an adapter is --tuned.adapter")
    models.add_argument("--device", type=str, default="cpu", help="where words are decoded, and models not extracted")
    rows = parser.add_argument_group("rows: two stores, or what to extract")
    rows.add_argument("--original_store", type=Path | None, help="a store of the original model")
    rows.add_argument("--tuned_store", type=Path | None, help="a store of the fine-tuned model, of the same samples")
    parser.add_subclass_arguments(SampleDataModule, "data", required=False)
    rows.add_argument("--selector", type=Selector | dict[str, Selector] | None, help="which positions are rows")
    rows.add_argument("--answer", type=Literal["generated", "given", "none"], default="given")
    rows.add_argument(
        "--texts", type=Texts, default="original", help="whose generated answers both read, or each its own"
    )
    rows.add_argument("--max_new_tokens", type=int, default=40, help="of generated answers")
    rows.add_argument("--answer_prefix", type=str | None, help="how every answer begins")
    rows.add_argument("--max_positions", type=int | None, help="about so many positions in a batch at most")
    rows.add_argument("--on_error", type=OnError, default="skip", help="list a bad sample and go on, or stop")
    rows.add_argument("--resume", action="store_true", help="go on with an extraction that was cut off")
    rows.add_argument("--trainer", type=dict[str, Any], default={}, help="of the extraction: {devices: 8, ...}")
    rows.add_argument("--by", type=By | Literal["auto"], default="auto", help="what rows are paired by")
    rows.add_argument("--where", type=dict[str, Any] | None, help="conditions on rows of both: {word: [red, blue]}")
    concepts = parser.add_argument_group("concepts: a dictionary of the original, or how to learn one")
    concepts.add_argument("--hook", type=str | None, help="the hook point; that of the dictionary if one is given")
    concepts.add_argument("--dictionary", type=list[str], default=[], help="of the original: folders or hub names")
    concepts.add_argument("--tuned_dictionary", type=str | None, help="of the fine-tuned model; learnt unless given")
    parser.add_subclass_arguments(
        Decomposition, "method", skip={"n_components", "random_state"}, default="KMeans", required=False
    )
    concepts.add_argument("--k", type=list[int], default=[20], help="numbers of concepts to learn")
    concepts.add_argument("--shares", type=list[float] | None, help="of samples: [learn,] shift, measure")
    parser.add_class_arguments(Settings, None)
    shown = parser.add_argument_group("what is shown")
    shown.add_argument("--words", type=int, default=10, help="words per concept, compared and shown")
    shown.add_argument("--count", type=int, default=6, help="samples shown per concept and form")
    shown.add_argument("--stopwords", type=Path | None, help="a text file of words to leave out, for our own list")
    shown.add_argument("--vocabulary", type=Path | None, help="a text file of the only words to name concepts by")
    parser.add_argument("--output", type=Path, required=True, help="folder for stores, dictionaries, tables, pages")
    return parser


def check_options(made: Any) -> None:
    """Refuse what can't be before anything runs.

    Raises:
        BadInputError: It says what is missing, superfluous or in the way.
    """
    stores = [name for name in ("original_store", "tuned_store") if made[name] is not None]
    models = [name for name in ("original", "tuned") if made[name] is not None]
    for given in (stores, models):
        if len(given) == 1:
            raise BadInputError(f"only --{given[0]} is given; give both models, both stores, or all four")
    if not stores and (not models or made.data is None or made.selector is None):
        raise BadInputError(
            "nothing to compare: give two stores (--original_store, --tuned_store), or --original, --tuned, --data and "
            "--selector"
        )
    if stores and made.data is not None:
        raise BadInputError("--data is given beside two stores, whose samples are used; leave one of them out")
    if not made.dictionary and made.hook is None:
        raise BadInputError("give --hook, or a --dictionary, which knows its own")
    parts = 2 if made.dictionary else 3
    if made.shares is not None and len(made.shares) != parts:
        raise BadInputError(f"shares={made.shares}; there are {parts} parts: {', '.join([*SHARES][-parts:])}")
    names = [Path(name).name for name in made.dictionary]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise BadInputError(f"two dictionaries are called {twice[0]!r}, as their studies would be; rename a folder")
    there = [name for name in ("extracted", *TABLES) if (made.output / name).exists()]
    if there and not made.resume:
        raise BadInputError(
            f"{str(made.output)!r} already holds {', '.join(there)}; pass --resume to keep what is extracted and make "
            "the rest anew, or choose another folder"
        )


def stores_of(made: Any, tuned: ModelSource | None, hook: str) -> tuple[ActivationStore, ActivationStore]:
    """The two stores, extracted if they are not given."""
    if made.original_store is not None:
        return ActivationStore.open(made.original_store), ActivationStore.open(made.tuned_store)
    assert tuned is not None
    names = ("answer", "texts", "max_new_tokens", "answer_prefix", "max_positions", "resume", "on_error")
    options = {**{name: made[name] for name in names}, **made.trainer}
    return extract_pair(made.original, tuned, made.data, hook, made.selector, made.output / "extracted", **options)


def decoders(original: ModelSource, tuned: ModelSource, made: Any) -> tuple[Decode, Decode]:
    """What directions decode to in the two models: by their unembeddings alone, unless a model is there already.

    One whole model is loaded if its adapter makes the difference.
    """
    stopwords = STOPWORDS if made.stopwords is None else read_words(made.stopwords)
    vocabulary = None if made.vocabulary is None else read_words(made.vocabulary)
    theirs = tuned.words(made.device)
    tuned_decode = decoder(theirs, made.words, stopwords, vocabulary)
    if isinstance(theirs, Unembedding):
        return decoder(original.words(made.device), made.words, stopwords, vocabulary), tuned_decode
    if not same_base(original, tuned):
        return decoder(original.load(made.device), made.words, stopwords, vocabulary), tuned_decode
    if original.adapter == tuned.adapter:
        return tuned_decode, tuned_decode
    off = partial(adapters_off, theirs.hf_model)
    return decoder(theirs, made.words, stopwords, vocabulary, off), tuned_decode


def the_hook(made: Any, given: Mapping[str, ConceptDictionary]) -> str:
    """The hook point of the rows.

    Raises:
        BadInputError: If dictionaries are of several, or of another than is asked for.
    """
    found = {made.hook} - {None} | {dictionary.hook for dictionary in given.values()}
    if len(found) > 1:
        raise BadInputError(f"the rows would be of several hook points, {', '.join(sorted(found))}; give one")
    return found.pop()


def jobs(made: Any, given: Mapping[str, ConceptDictionary]) -> dict[str, Decomposition]:
    """By name the dictionaries that are given, or those to learn."""
    if given:
        return {name: dictionary.decomposition for name, dictionary in given.items()}
    found = {}
    for k in made.k:
        method = clone(made.method).set_params(n_components=k)
        if "random_state" in method.get_params():
            method.set_params(random_state=made.seed)
        found[f"{type(method).__name__}-k{k}"] = method
    return found


def keep(
    found: ShiftStudy,
    folder: Path,
    stores: tuple[ActivationStore, ActivationStore],
    dealt: Dealt,
    hook: str,
    decode: tuple[Decode, Decode] | None,
    facts: Sequence[tuple[str, str]],
    words: Sequence[Sequence[str]],
    made: Any,
) -> None:
    """Write dictionaries, shift vectors, the page and TensorBoard's files of one study."""
    original, tuned = stores
    about = {part: getattr(made, part) for part in ("shares", "seed")}
    if not made.dictionary:
        ConceptDictionary(found.fitted, hook, {**original.made_by, "part": {"name": LEARN, **about}}).save(
            folder / "dictionary"
        )
    if made.tuned_dictionary is None:
        ConceptDictionary(found.tuned_fitted, hook, {**tuned.made_by, "part": {"name": MEASURE, **about}}).save(
            folder / "tuned_dictionary"
        )
    save_vectors(shift_steering_vectors(found, original, tuned, hook, words), folder / "vectors")
    samples = dealt.samples[MEASURE]
    pictures, source = store_pictures(original)
    places = places_of(original, samples)
    report = build_report(
        found,
        dealt.parts[MEASURE],
        decoders=decode,
        pictures=None if pictures is None else lambda number: pictures(places[number]),
        texts=(texts_of(original, samples), texts_of(tuned, samples)),
        facts=[*facts, ("pictures", source)],
        hook=hook,
        models=(model_name(original.made_by), model_name(tuned.made_by)),
        count=made.count,
    )
    write_html(report, folder / "report.html")
    # A run that was cut off has left its own there, which would be shown as the same run.
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    write_tensorboard(report, folder / "tensorboard")


def model_name(made_by: Mapping[str, Any]) -> str:
    """What a store's model is called: its name without its folder, with its adapter."""
    adapter = made_by.get("adapter")
    name = Path(str(made_by.get("model", ""))).name
    return f"{name} with {Path(adapter).name if isinstance(adapter, str) else ', '.join(adapter)}" if adapter else name


def doubts(
    made: Any, stores: tuple[ActivationStore, ActivationStore], given: Mapping[str, ConceptDictionary]
) -> Iterator[tuple[str, str]]:
    """What is to be said of dictionaries and models that may not be what they should."""
    for name, dictionary in given.items():
        if circular(dictionary.made_by, stores[0]):
            yield name, "learnt from samples of these data: scores may be in sample; give others"
    for source, store in zip((made.original, made.tuned), stores, strict=True):
        owner = str(store.made_by.get("model") or "")
        if source is not None and owner and last_part(source.id) != last_part(owner):
            yield "words", f"decoded by {source.id!r}, but the store names {owner!r} as its model"


def main(argv: Sequence[str] | None = None) -> None:
    """The command `hooked-mm shift`."""
    quiet()
    made = instantiated(build_parser(), argv)
    check_options(made)
    output_folder(made.output)
    given = {Path(name).name: ConceptDictionary.from_pretrained(name) for name in made.dictionary}
    theirs = None if made.tuned_dictionary is None else ConceptDictionary.from_pretrained(made.tuned_dictionary)
    hook = the_hook(made, {**given, **({"tuned": theirs} if theirs else {})})
    tuned_source = None if made.tuned is None else Once.of(made.tuned)
    stores = stores_of(made, tuned_source, hook)
    if not goes_on_alone():
        return
    first = next(iter(given.values()), None)
    where = made.where if made.where is not None else learnt_where(first.made_by) if first is not None else {}
    original, tuned = (store.where(**where) for store in stores)
    pairs = pair_rows(original, tuned, made.by)
    facts = [("chosen rows", described(where, original)), ("pairs", pairs.describe()), *doubts(made, stores, given)]
    names = [*SHARES] if not given else [SHIFT, MEASURE]
    shares = made.shares or ([*SHARES.values()] if not given else [0.5, 0.5])
    dealt = deal(original, tuned, pairs, hook, dict(zip(names, shares, strict=True)), made.seed)
    for fact in facts:
        print(": ".join(fact))
    decode = None if made.original is None or tuned_source is None else decoders(made.original, tuned_source, made)
    settings = Settings(**{name: made[name] for name in Settings.__dataclass_fields__})
    studies: dict[str, ShiftStudy] = {}
    called: dict[str, list[str]] = {}
    for name, method in jobs(made, given).items():
        studies[name] = study(
            method,
            dealt.parts[SHIFT],
            dealt.parts[MEASURE],
            learn=dealt.parts.get(LEARN),
            tuned=None if theirs is None else theirs.decomposition,
            words=None if decode is None else (spelled(decode[0]), spelled(decode[1])),
            settings=settings,
        )
        folder = output_folder(made.output / name)
        found = decode[0](studies[name].original.directions) if decode else []
        words = [[word.text for word in own] for own in found]
        called |= {name: [", ".join(own[:SHOWN]) for own in words]} if decode else {}
        write_tables(studies, made.output, called or None)
        keep(studies[name], folder, (original, tuned), dealt, hook, decode, facts, words, made)
        print(f"\n{name}\n{table(studies[name])}\n{folder / 'report.html'}")
    print(f"\n{made.output / TABLES[0]}, ...\ntensorboard --logdir {made.output}")
