"""Two models read the same samples at the same positions; a base is loaded once; what is there is left."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from hooked_mm.adapter_switch import adapters_on
from hooked_mm.data import Sample, SampleDataModule
from hooked_mm.errors import BadInputError, StoreError
from hooked_mm.extraction import Extractor
from hooked_mm.extraction_job import extract
from hooked_mm.hooked import HookedMM
from hooked_mm.loading import Prepared
from hooked_mm.pair_extraction import extract_pair
from hooked_mm.reader import Extracted, ModelSource
from hooked_mm.scenes.captions import CAPTION_PROMPT
from hooked_mm.scenes.dataset import ScenesDataModule
from hooked_mm.selectors import BeforeSpecial, LastPrompt, MeanOver, Selector, TokenOfInterest
from hooked_mm.small import small_adapter_path
from hooked_mm.store import ActivationStore
from hooked_mm.store_format import ROW_COLUMNS

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("unchecked")
ROOT = Path(__file__).parents[1]
HOOKS = ["blocks.2.hook_resid_post", "blocks.4.hook_resid_post"]
SELECTORS: dict[str, Selector] = {"end": BeforeSpecial(), "picture": MeanOver("image"), "prompt": LastPrompt()}
BASE = ModelSource("small:llava", "float32")
TUNED = ModelSource("small:llava", "float32", adapter="place")


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Per load of a model, how many of those loaded before are still in memory."""
    found: list[int] = []
    models: list[weakref.ref] = []
    load = AutoModelForImageTextToText.from_pretrained

    def counted(*args: Any, **options: Any) -> Any:
        found.append(sum(model() is not None for model in models))
        made = load(*args, **options)
        models.append(weakref.ref(made))
        return made

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", counted)
    return found


@pytest.fixture(scope="module")
def adapted() -> HookedMM:
    """The small LLaVA that says where it is and nothing else."""
    return HookedMM.small("llava", "place")


@pytest.fixture(scope="module")
def alone(llava: HookedMM, adapted: HookedMM, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ActivationStore]:
    """What each model gives by itself, of what it says."""
    folder, data = tmp_path_factory.mktemp("alone"), ScenesDataModule(6, batch_size=4)
    models = {"original": llava, "tuned": adapted}
    return {
        name: extract(Extractor(model, HOOKS, SELECTORS, "generated"), data, folder / name)
        for name, model in models.items()
    }


def assert_equal(store: ActivationStore, other: ActivationStore) -> None:
    """The same rows and samples, values bit for bit."""
    assert store.rows.select(ROW_COLUMNS).to_pylist() == other.rows.select(ROW_COLUMNS).to_pylist()
    assert store.samples.to_pylist() == other.samples.to_pylist()
    for hook in HOOKS:
        assert torch.equal(store.activations(hook), other.activations(hook))


def texts(store: ActivationStore) -> list[str]:
    return store.samples.column("text").to_pylist()


def test_the_base_is_loaded_once(
    llava: HookedMM, adapted: HookedMM, tmp_path: Path, loads: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Both stores are, bit for bit, those of each model loaded by itself, and each says whose it is."""
    data = ScenesDataModule(6, batch_size=4)
    stores = extract_pair(BASE, TUNED, data, HOOKS, SELECTORS, tmp_path / "pair")
    assert len(loads) == 1
    assert "6 samples by both models; 0 by the original only, 0 by" in capsys.readouterr().out
    for store, model, adapter in zip(stores, (llava, adapted), (None, "place"), strict=True):
        by_itself = extract(Extractor(model, HOOKS, SELECTORS, "given"), data, tmp_path / str(adapter))
        assert_equal(store, by_itself)
        assert store.made_by == {**by_itself.made_by, "adapter": adapter}
    rows = [store.rows.select(ROW_COLUMNS).to_pylist() for store in stores]
    assert rows[0] == rows[1]
    assert (stores[0].activations(HOOKS[1]) - stores[1].activations(HOOKS[1])).abs().max() > 0.1


@pytest.mark.parametrize("who", ["original", "tuned", "own"])
def test_generated_texts(who: Any, tmp_path: Path, loads: list[int], alone: dict[str, ActivationStore]) -> None:
    """Both read what one of them says, at the same positions, or each its own; the base is still loaded once."""
    data = ScenesDataModule(6, batch_size=4)
    loads.clear()
    pair = extract_pair(BASE, TUNED, data, HOOKS, SELECTORS, tmp_path / "pair", answer="generated", texts=who)
    assert len(loads) == 1
    assert texts(alone["original"]) != texts(alone["tuned"])
    for name, adapter, store in zip(("original", "tuned"), (None, "place"), pair, strict=True):
        speaker = name if who == "own" else who
        assert store.made_by["adapter"] == adapter
        assert texts(store) == texts(alone[speaker])
        assert store.samples.column("answer_tokens") == alone[speaker].samples.column("answer_tokens")
        if speaker == name:
            assert_equal(store, alone[name])
            assert store.made_by["answer"] == "generated"
        else:
            assert (store.made_by["answer"], store.made_by["stored_by"]) == ("stored", "another")
            assert store.made_by["answers_of"]["adapter"] == (None if who == "original" else "place")
            positions = [s.rows.select(ROW_COLUMNS).to_pylist() for s in pair]
            assert positions[0] == positions[1]


def test_models_of_their_own_come_one_after_the_other(tmp_path: Path, loads: list[int]) -> None:
    """Where the base's dtype differs it is another load, and then the first model is gone."""
    data = ScenesDataModule(3, batch_size=3)
    half = ModelSource("small:llava", "bfloat16", adapter="place")
    stores = extract_pair(BASE, half, data, HOOKS, LastPrompt(), tmp_path / "pair")
    assert loads == [0, 0]
    assert [store.made_by["dtype"] for store in stores] == ["float32", "bfloat16"]


def test_an_adapter_that_changes_the_base_is_not_switched(
    tmp_path: Path, loads: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Then the base is loaded by itself, and it is said why."""
    monkeypatch.setattr("hooked_mm.pair_extraction.lasting", lambda config: "it has changed biases")
    extract_pair(BASE, TUNED, ScenesDataModule(2), HOOKS, LastPrompt(), tmp_path / "pair")
    assert loads == [0, 0]
    assert "the base model is loaded without the adapter and with it: it has changed biases" in caplog.text


def test_loaded_models(llava: HookedMM, adapted: HookedMM, tmp_path: Path, loads: list[int]) -> None:
    """An adapted model given twice is read off and on; a plain one twice is the same twice; weights shared in secret
    are refused."""
    data = ScenesDataModule(4, batch_size=4)
    same = extract_pair(llava, llava, data, HOOKS, LastPrompt(), tmp_path / "same")
    assert_equal(*same)
    loads.clear()
    off, on = extract_pair(adapted, adapted, data, HOOKS, LastPrompt(), tmp_path / "switched")
    assert_equal(off, same[0])
    assert [store.made_by["adapter"] for store in (off, on)] == [None, ["default"]]
    assert not torch.equal(off.activations(HOOKS[1]), on.activations(HOOKS[1]))
    assert not loads
    plain = HookedMM(adapted.hf_model.get_base_model(), adapted.processor, check=False)
    with pytest.raises(BadInputError, match="share weights: PEFT has put its adapter into the original one too"):
        extract_pair(plain, adapted, data, HOOKS, LastPrompt(), tmp_path / "shared")


def test_on_again_after_an_error(adapted: HookedMM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that dies leaves the adapter on, and its store to be resumed; what was complete is left as it is."""
    data = ScenesDataModule(6, batch_size=2)
    settings: tuple[Any, ...] = (adapted, adapted, data, HOOKS, SELECTORS, tmp_path / "pair")
    represent, died = Extractor._represent, []

    def dying(self: Extractor, prepared: Prepared) -> Extracted:
        # In the second batch of the original, later of the fine-tuned.
        if self.adapter_off == (not died) and 2 in prepared.numbers:
            assert adapters_on(adapted.hf_model) == ([] if self.adapter_off else ["default"])
            died.append(prepared)
            raise RuntimeError("power cut")
        return represent(self, prepared)

    monkeypatch.setattr(Extractor, "_represent", dying)
    for attempt, (first, second) in enumerate([(False, None), (True, False)]):
        with pytest.raises(RuntimeError, match="power cut"):
            extract_pair(*settings, resume=bool(attempt))
        assert adapters_on(adapted.hf_model) == ["default"]
        for name, complete in (("original", first), ("tuned", second)):
            file = tmp_path / "pair" / name / "manifest.json"
            assert (json.loads(file.read_text())["complete"] if file.exists() else None) is complete
    monkeypatch.undo()
    before = (tmp_path / "pair" / "original" / "manifest.json").stat().st_mtime_ns
    stores = extract_pair(*settings, resume=True)
    assert (tmp_path / "pair" / "original" / "manifest.json").stat().st_mtime_ns == before
    fresh = extract_pair(*settings[:5], tmp_path / "fresh")
    for store, other in zip(stores, fresh, strict=True):
        assert_equal(store, other)
    with pytest.raises(StoreError, match=r"original' already holds a store; pass resume=True"):
        extract_pair(*settings)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tuned": ModelSource("small:llava", "float32", adapter="colours")}, r"tuned' is .*\(adapter differ\)"),
        ({"original": ModelSource("small:qwen2_vl", "float32")}, r"original' is .*\(model differ\)"),
        ({"original": ModelSource("small:llava", "bfloat16")}, r"original' is .*\(dtype differ\)"),
        ({"selector": MeanOver("image")}, r"original' is complete, but was made otherwise \(selectors differ\)"),
        ({"hooks": HOOKS[:1]}, r"\(hooks differ\)"),
        ({"hooks": "blocks.5.hook_resid_post"}, r"\(hooks differ\)"),
        ({"answer": "generated"}, r"\(answer differ\)"),
        ({"answer_prefix": "in"}, r"\(answer_prefix differ\)"),
        ({"data": ScenesDataModule(3)}, r"\(data, samples differ\)"),
        ({"data": ScenesDataModule(2, seed=5)}, r"\(data.* differ\)"),
    ],
)
def test_a_complete_store_made_otherwise_is_refused(
    change: dict[str, Any], named: str, tmp_path_factory: pytest.TempPathFactory, loads: list[int]
) -> None:
    """What differs is named, before any model is loaded; with nothing different both are left as they are."""
    path = tmp_path_factory.getbasetemp() / "complete"
    settings = {"original": BASE, "tuned": TUNED, "data": ScenesDataModule(2), "hooks": HOOKS, "selector": LastPrompt()}
    if not path.exists():
        extract_pair(**settings, path=path)
    loads.clear()
    moved = Path(".") / path
    extract_pair(**settings, path=moved, resume=True)
    extract_pair(**{**settings, "hooks": "blocks.[24].hook_resid_post"}, path=path, resume=True)
    with pytest.raises(StoreError, match=named):
        extract_pair(**{**settings, **change}, path=path, resume=True)
    assert not loads


def test_loaded_models_are_compared_with_complete_stores(llava: HookedMM, tmp_path: Path) -> None:
    """As sources are: the same is left, another adapter is refused."""
    data = ScenesDataModule(2)
    extract_pair(llava, llava, data, HOOKS, LastPrompt(), tmp_path / "pair")
    extract_pair(llava, BASE, data, HOOKS, LastPrompt(), tmp_path / "pair", resume=True)
    with pytest.raises(StoreError, match=r"tuned' is .*\(adapter differ\)"):
        extract_pair(llava, TUNED, data, HOOKS, LastPrompt(), tmp_path / "pair", resume=True)
    with pytest.raises(StoreError, match=r"original' is .*\(hooks differ\)"):
        extract_pair(llava, llava, data, HOOKS[1:], LastPrompt(), tmp_path / "pair", resume=True)


def test_samples_that_one_must_skip(llava: HookedMM, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bad picture is skipped by both; what is in one store only is counted."""
    scenes = ScenesDataModule(3)
    samples = [*(scenes.dataset[n] for n in range(3)), Sample("bad", "nowhere.jpg", CAPTION_PROMPT, "a red star .")]
    data = SampleDataModule(samples)
    stores = extract_pair(llava, llava, data, HOOKS, TokenOfInterest(word_class="colours"), tmp_path / "pair")
    assert [store.skipped.column("sample").to_pylist() for store in stores] == [["bad"], ["bad"]]
    assert "3 samples by both models; 0 by the original only, 0 by the fine-tuned only" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"answer": "stored"}, "it must be 'generated', 'given' or 'none'"),
        ({"texts": "both"}, "'original', 'tuned' or 'own'"),
        ({"trainer": object()}, "give its options"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    """The allowed ones are named."""
    with pytest.raises(BadInputError, match=message):
        extract_pair(BASE, TUNED, ScenesDataModule(2), HOOKS, LastPrompt(), tmp_path, **settings)


def test_answers_of_another_are_read_on_purpose_only(llava: HookedMM, adapted: HookedMM, tmp_path: Path) -> None:
    """Without saying so it is refused, as are tokens that spell something else."""
    data = ScenesDataModule(2)
    said = tmp_path / "said"
    store = extract(Extractor(adapted, HOOKS, LastPrompt(), "generated"), data, said)
    with pytest.raises(BadInputError, match=r"adapter=\['default'\], this run has None; .*stored_by='another'"):
        extract(Extractor(llava, HOOKS, LastPrompt(), "stored", stored=said), data, tmp_path / "x")
    read = Extractor(llava, HOOKS, LastPrompt(), "stored", stored=said, stored_by="another")
    assert texts(extract(read, data, tmp_path / "y")) == texts(store)
    made = llava.tokenizer
    decode = made.decode
    made.decode = lambda ids, **options: decode([number + 1 for number in ids], **options)
    try:
        with pytest.raises(BadInputError, match=r"but its tokens spell .* for this model"):
            Extractor(llava, HOOKS, LastPrompt(), "stored", stored=said, stored_by="another").load("cpu")
    finally:
        del made.decode
    with pytest.raises(BadInputError, match="'itself' or 'another'"):
        Extractor(llava, HOOKS, LastPrompt(), stored_by="us")  # type: ignore[arg-type]


SCRIPT = """
    import sys
    sys.path.insert(0, {root!r})
    from hooked_mm import BeforeSpecial, ModelSource
    from hooked_mm.pair_extraction import extract_pair
    from hooked_mm.scenes.dataset import ScenesDataModule
    base = ModelSource("small:llava", "float32")
    tuned = ModelSource("small:llava", "float32", adapter="place")
    for resume in (False, True):
        pair = extract_pair(
            base, tuned, ScenesDataModule(10, batch_size=2), {hooks!r}, BeforeSpecial(), sys.argv[1],
            answer="generated", resume=resume, strategy="ddp", devices=2,
        )
    assert [len(store) for store in pair] == [10, 10]
"""


@pytest.mark.slow
def test_two_processes_make_the_same_pair(adapted: HookedMM, tmp_path: Path) -> None:
    """Each process loads the base once and calls `extract_pair`; rows as by one process."""
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(SCRIPT.format(root=str(ROOT), hooks=HOOKS)))
    ran = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "two")], capture_output=True, text=True, timeout=300, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count("samples by both models") == 2
    data = ScenesDataModule(10, batch_size=2)
    pair = extract_pair(adapted, adapted, data, HOOKS, BeforeSpecial(), tmp_path / "one", answer="generated")
    for name, expected in zip(("original", "tuned"), pair, strict=True):
        got = ActivationStore.open(tmp_path / "two" / name)
        assert {shard.name[:3] for shard in (got.path / "shards").iterdir()} == {"000", "001"}
        assert got.rows.select(ROW_COLUMNS).to_pylist() == expected.rows.select(ROW_COLUMNS).to_pylist()
        assert texts(got) == texts(expected)
        for hook in HOOKS:
            one, two = got.activations(hook), expected.activations(hook)
            assert (one - two).abs().max() <= 1e-5 * two.abs().max()


def test_an_adapter_by_its_folder(tmp_path: Path, loads: list[int]) -> None:
    """Ids and folders of the hub's kind share a base too."""
    folder = str(Path(small_adapter_path("llava", "place")).parents[1])
    base = ModelSource(folder, "float32")
    tuned = ModelSource(folder, "float32", adapter=str(small_adapter_path("llava", "place")))
    stores = extract_pair(base, tuned, ScenesDataModule(2), HOOKS, LastPrompt(), tmp_path / "pair")
    assert len(loads) == 1
    assert [store.made_by["adapter"] for store in stores] == [None, tuned.adapter]
