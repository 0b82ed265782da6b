"""Steered answers: each equals a plain loop of PyTorch hooks, one sample at a time; a run goes on where it was cut."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from concept_dict.kmeans import KMeans
from hooked_mm.conditions import Above
from hooked_mm.data import Sample, SampleDataModule
from hooked_mm.errors import BadInputError, HookedMMError, StoreError
from hooked_mm.hooked import HookedMM
from hooked_mm.loading import BatchMaker
from hooked_mm.positions import LAST_PROMPT
from hooked_mm.reader import ModelSource
from hooked_mm.scenes.dataset import SceneDataset
from hooked_mm.steering_vector import SteeringVector
from hooked_mm.store_format import read_manifest
from steering.gate import ConceptAbove, Gate, learn_gate
from steering.setting import Setting
from steering.steered_answers import Answers, SteeredAnswers, answer

LAYERS = {
    "llava": "model.language_model.layers.{}",
    "idefics2": "model.text_model.layers.{}",
    "qwen2_vl": "model.language_model.layers.{}",
}
"""Where transformers keeps the decoder's layers, by hand."""
NEW = 6
SIZES = ((48, 48), (72, 48), (48, 64), (56, 56))


def samples(images: Sequence[Image.Image]) -> list[Sample]:
    """Questions and captions about pictures of several sizes, of several lengths; two share their picture."""
    pictures = [image.resize(size) for image, size in zip(images, SIZES, strict=False)]
    asked = [
        (0, "what colour is the circle ?"),
        (1, "describe the scene ."),
        (2, "what place is this ?"),
        (0, "is there a red object ?"),
        (3, "how many objects are there ?"),
    ]
    return [Sample(f"s{number}", pictures[which], text, "red") for number, (which, text) in enumerate(asked)]


def vector(model: HookedMM, layer: int, seed: int, length: float = 100.0) -> SteeringVector:
    """A random direction behind a block, about as long as what is there."""
    drawn = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(seed))
    return SteeringVector(
        length * drawn / drawn.norm(), f"blocks.{layer}.hook_resid_post", "coarse", f"v{layer}-{seed}"
    )


@contextmanager
def plain_hook(model: HookedMM, name: str, layer: int, function: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """A PyTorch hook behind a decoder layer."""

    def act(_: Any, __: Any, output: Any) -> Any:
        value = output[0] if isinstance(output, tuple) else output
        new = function(value)
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = model.hf_model.get_submodule(LAYERS[name].format(layer)).register_forward_hook(act)
    try:
        yield
    finally:
        handle.remove()


def by_hand(model: HookedMM, name: str, sample: Sample, setting: Setting) -> str:
    """transformers' `generate` on one sample, `alpha v` added by hand where the rule of positions says."""
    inputs = dict(model.prepare([sample.images], [sample.text]).inputs)

    def generate() -> str:
        with torch.no_grad():
            ids = model.hf_model.generate(**inputs, do_sample=False, max_new_tokens=NEW)
        return model.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    steer = setting.vector
    if steer is None:
        return generate()
    if setting.gate is not None:
        seen: list[Tensor] = []
        gate = setting.gate.condition
        assert gate.point is not None
        with plain_hook(model, name, int(gate.point.split(".")[1]), lambda value: seen.append(value[0, -1].clone())):
            generate()
        if not float(seen[0] @ gate.direction) > gate.threshold:
            return generate()

    def push(value: Tensor) -> Tensor:
        # The prompt comes in one piece, then token by token.
        prompt = value.shape[1] > 1
        added = setting.alpha * steer.values
        if setting.at == "all":
            return value + added
        if setting.at == ("generated" if prompt else "last_prompt"):
            return value
        return torch.cat([value[:, :-1], value[:, -1:] + added], dim=1)

    assert steer.layer is not None
    with plain_hook(model, name, steer.layer, push):
        return generate()


def said(
    model: HookedMM, data: Sequence[Sample], settings: Sequence[Setting], numbers: Sequence[int] = (), **options: Any
) -> dict[str, list[str]]:
    """Per sample, the answers of one batch: unsteered, then under each setting."""
    reader = SteeredAnswers(model, settings, max_new_tokens=NEW, **options)
    prepared = BatchMaker(list(data), model, "none")(list(numbers) or range(len(data)))
    found = reader.represent(prepared)
    return {row["sample"]: [row["text"], *row["steered"]] for row in found.samples}


def some_settings(model: HookedMM, alphas: Sequence[float] = (-1.0, 0.5, 2.0)) -> list[Setting]:
    """Alphas, layers and rules of positions, and a gate that opens for some."""
    ats = ("last_prompt+generated", "last_prompt", "generated")
    made = [Setting(vector(model, layer, layer), alpha, at) for layer in (1, 3) for alpha in alphas for at in ats]
    return [*made, Setting(vector(model, 2, 5), 0.5, "all")]


def check_by_hand(model: HookedMM, name: str, data: Sequence[Sample], settings: Sequence[Setting]) -> None:
    """Every answer is that of the loop; steering changes some and leaves some."""
    found = said(model, data, settings)
    changed = []
    for sample in data:
        expected = [by_hand(model, name, sample, setting) for setting in (Setting(), *settings)]
        assert found[sample.id] == expected, sample
        changed += [text != expected[0] for text in expected[1:]]
    assert 0 < sum(changed) < len(changed)


def gate_between(model: HookedMM, data: Sequence[Sample], point: str = "blocks.1.hook_resid_post") -> Gate:
    """A gate that opens for half of the samples."""
    batch = model.prepare([sample.images for sample in data], [sample.text for sample in data])
    _, cache = model.run_with_cache(batch, point)
    direction = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(3))
    along = (cache[point][:, -1] @ (direction / direction.norm())).sort().values
    middle = float(along[len(along) // 2 - 1 : len(along) // 2 + 1].mean())
    return Gate(Above(direction, middle, point, "mean", LAST_PROMPT), "half")


def test_answers_are_those_of_plain_hooks_at_batch_one(llava: HookedMM, images: list[Image.Image]) -> None:
    """Batched, padded on the left, continued from a shared cache: token for token a plain loop.

    As XL-VLMs at best: it steers one sample at a time.
    """
    data = samples(images)
    settings = [
        *some_settings(llava, (0.5, 2.0))[::2],
        Setting(vector(llava, 3, 9), 2.0, gate=gate_between(llava, data)),
    ]
    check_by_hand(llava, "llava", data, settings)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(LAYERS))
def test_answers_are_those_of_plain_hooks_for_every_small_model(name: str, images: list[Image.Image]) -> None:
    """All settings, and gates, on every architecture that ships."""
    model = HookedMM.small(name, check=False)
    data = samples(images)
    gate = gate_between(model, data)
    gated = [Setting(vector(model, 3, 9), alpha, gate=gate) for alpha in (0.5, 2.0)]
    check_by_hand(model, name, data, [*some_settings(model), *gated])


@given(
    order=st.permutations(range(5)),
    cut=st.integers(1, 5),
    rows=st.integers(1, 40),
    which=st.lists(st.integers(0, 8), min_size=1, max_size=5),
)
def test_answers_do_not_depend_on_their_company(
    llava: HookedMM, images: list[Image.Image], order: list[int], cut: int, rows: int, which: list[int]
) -> None:
    """On the samples of the batch, their order, the number of settings beside, how many rows a generation takes."""
    data = samples(images)
    pool = some_settings(llava, (0.5, 2.0))[:9]
    if not _WHOLE:
        _WHOLE.update(said(llava, data, pool))
    for part in (order[:cut], order[cut:]):
        if part:
            for name, texts in said(llava, data, [pool[n] for n in which], part, rows=rows).items():
                assert texts == [_WHOLE[name][0], *(_WHOLE[name][1 + n] for n in which)]


_WHOLE: dict[str, list[str]] = {}


def test_xl_vlms_fault_one_alpha_for_all(llava: HookedMM, images: list[Image.Image], monkeypatch: Any) -> None:
    """Many alphas, layers and samples share generations; the store keeps them apart, in the order they came in."""
    calls: list[int] = []
    real = HookedMM.generate

    def counted(self: HookedMM, batch: Any, *args: Any, **options: Any) -> Any:
        calls.append(len(batch))
        return real(self, batch, *args, **options)

    monkeypatch.setattr(HookedMM, "generate", counted)
    settings = [Setting(vector(llava, layer, 1), alpha) for alpha in (0.0, 0.5, 1.0, 2.0) for layer in (1, 2, 3)]
    data = samples(images)
    found = said(llava, data, settings)
    # The proof that prompts can be shared takes two generations at most.
    assert calls.count(5 * 13) == 1
    assert len(calls) <= 3
    for texts in found.values():
        # alpha 0 is the model as it is.
        assert texts[1:4] == [texts[0]] * 3


def test_xl_vlms_fault_the_vector_at_padding_or_pictures(llava: HookedMM, images: list[Image.Image]) -> None:
    """What is said is steered, and nothing that was asked: no position of a prompt but its last, no padding."""
    data = samples(images)
    batch = llava.prepare([sample.images for sample in data], [sample.text for sample in data])
    assert not bool(batch.inputs["attention_mask"].all())
    from steering.setting import side_by_side

    hook, seen = "blocks.2.hook_resid_post", []
    hooks = side_by_side([Setting(vector(llava, 2, 0), 2.0)] * len(data))
    before = llava.run_with_cache(batch, hook)[1][hook]
    with llava.hooks([*hooks, (hook, lambda value, _: seen.append(value.clone()))]):
        llava.generate(batch, 3)
    moved = (seen[0] - before).norm(dim=-1) > 1e-3
    expected = torch.zeros_like(moved)
    expected[:, -1] = True
    assert torch.equal(moved, expected)


def test_xl_vlms_fault_hooks_that_stay_after_an_error(
    llava: HookedMM, images: list[Image.Image], monkeypatch: Any
) -> None:
    """A generation that ends in an error leaves the model as it was."""
    data = samples(images)
    settings = [Setting(vector(llava, 2, 0), 3.0)]
    plain = said(llava, data, settings)
    block = llava.hf_model.get_submodule(LAYERS["llava"].format(4))
    hooks = len(block._forward_hooks)

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle of it")

    handle = block.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        said(llava, data, settings)
    handle.remove()
    assert llava._active == []
    assert len(block._forward_hooks) == hooks
    for sample in data:
        assert by_hand(llava, "llava", sample, Setting()) == plain[sample.id][0]


@pytest.mark.parametrize(
    ("made", "match"),
    [
        (SteeringVector(torch.ones(64), "blocks.2.hook_resid_post", name="narrow"), "has length 64"),
        (SteeringVector(torch.ones(1), "blocks.2.hook_resid_post", name="scalar"), "has length 1,"),
        (SteeringVector(torch.ones(128), "blocks.9.hook_resid_post", name="deep"), "blocks.9"),
        (SteeringVector(torch.ones(128), "blocks.2.hook_resid_post", name="v", model="other"), "one of the model"),
    ],
)
def test_xl_vlms_fault_vectors_of_another_model(llava: HookedMM, made: SteeringVector, match: str) -> None:
    """Refused before anything is said, not broadcast; also as what acts beside another."""
    own = SteeringVector(torch.ones(128), "blocks.2.hook_resid_post")
    settings = [Setting(made), Setting(own, also=(Setting(made),))]
    if made.hook == own.hook:
        settings.append(Setting(own, operation="rotate", second=made))
    for setting in settings:
        with pytest.raises(BadInputError, match=match):
            SteeredAnswers(llava, [setting])


def test_what_can_not_be_answered_is_refused(llava: HookedMM) -> None:
    """No settings, no rows."""
    for settings, rows in (([], 8), ([Setting()], 0)):
        with pytest.raises(BadInputError, match="at least one of each"):
            SteeredAnswers(llava, settings, rows=rows)


def own_log_probabilities(model: HookedMM, sample: Sample, text: str) -> tuple[Tensor, int]:
    """log p in float64 of the tokens of an answer and its end, of one sample in one pass of transformers; the prompt's
    length."""
    inputs = dict(model.prepare([sample.images], [sample.text]).inputs)
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    ends = model.hf_model.generation_config.eos_token_id
    ids = [*ids, ends[0] if isinstance(ends, list) else ends][:NEW]
    new = torch.tensor([ids])
    count = inputs["input_ids"].shape[1]
    longer = {name: inputs[name] for name in inputs if inputs[name].shape[:2] != (1, count)}
    longer |= {
        "input_ids": torch.cat([inputs["input_ids"], new], dim=1),
        "attention_mask": torch.ones(1, count + len(ids), dtype=torch.long),
    }
    if "mm_token_type_ids" in inputs:
        longer["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(new)], dim=1)
    with torch.no_grad():
        logits = model.hf_model(**longer).logits[0, count - 1 : -1].double()
    return logits.log_softmax(-1)[torch.arange(len(ids)), new[0]], count


def check_side_effects(model: HookedMM, name: str, data: Sequence[Sample]) -> None:
    """kl and nll of every answer, from separate passes of transformers in float64."""
    settings = [Setting(vector(model, 3, 1), 0.5), Setting(vector(model, 1, 2), 1.0), Setting(vector(model, 3, 1), 0.0)]
    reader = SteeredAnswers(model, settings, max_new_tokens=NEW, side_effects=True, surprise=True, rows=11)
    rows = {
        row["sample"]: row for row in reader.represent(BatchMaker(list(data), model, "none")(range(len(data)))).samples
    }
    for sample in data:
        row = rows[sample.id]
        inputs = dict(model.prepare([sample.images], [sample.text]).inputs)
        before: Tensor | None = None
        for place, setting in enumerate((Setting(), *settings)):
            steer, alpha = setting.vector, setting.alpha

            def push(value: Tensor, steer: Any = steer, alpha: float = alpha) -> Tensor:
                return value if steer is None else torch.cat([value[:, :-1], value[:, -1:] + alpha * steer.values], 1)

            with torch.no_grad(), plain_hook(model, name, 0 if steer is None else steer.layer or 0, push):
                own = model.hf_model(**inputs).logits[0, -1].double().log_softmax(-1)
            before = own if before is None else before
            expected = float((before.exp() * (before - own)).sum())
            assert row["kl"][place] == pytest.approx(expected, rel=1e-3, abs=1e-5), (sample, place)
            text = row["text"] if not place else row["steered"][place - 1]
            spelt = own_log_probabilities(model, sample, text)[0]
            assert row["nll"][place] == pytest.approx(-float(spelt.mean()), rel=1e-3, abs=1e-4), (sample, text)
        assert row["kl"][0] == 0
        assert row["kl"][3] == pytest.approx(0, abs=1e-6)
    assert max(max(row["kl"]) for row in rows.values()) > 0.01


def test_side_effects_are_measured_where_they_are_asked_for(
    llava: HookedMM, images: list[Image.Image], tmp_path: Path
) -> None:
    """One, the other, both or none: with the same numbers, and the same answers."""
    data, settings = samples(images)[:2], [Setting(vector(llava, 3, 1), 2.0)]
    found = {
        (kl, nll): run(llava, data, settings, tmp_path / f"{kl}{nll}", options={"side_effects": kl, "surprise": nll})
        for kl in (False, True)
        for nll in (False, True)
    }
    both = found[True, True]
    assert both.kl is not None
    assert both.nll is not None
    for (kl, nll), one in found.items():
        assert one.texts == both.texts
        assert (one.kl is not None, one.nll is not None) == (kl, nll)
        assert one.kl is None or torch.allclose(one.kl, both.kl)
        assert one.nll is None or torch.allclose(one.nll, both.nll)


def test_side_effects_are_those_of_separate_passes(llava: HookedMM, images: list[Image.Image]) -> None:
    """How far the next token's distribution moves, and how odd the unsteered model finds what is said."""
    check_side_effects(llava, "llava", samples(images))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(LAYERS))
def test_side_effects_on_every_small_model(name: str, images: list[Image.Image]) -> None:
    """Pictures whose inputs have other names are there in the second pass too."""
    check_side_effects(HookedMM.small(name, check=False), name, samples(images))


POINT = "blocks.2.hook_resid_post"


def last_rows(model: HookedMM, data: Sequence[Sample]) -> Tensor:
    """Activations at the last prompt position."""
    batch = model.prepare([sample.images for sample in data], [sample.text for sample in data])
    return model.run_with_cache(batch, POINT, stop_at_layer=3)[1][POINT][:, -1]


def test_samples_that_a_gate_is_shut_for_stay_token_for_token(llava: HookedMM) -> None:
    """All of them, by a learnt gate and by a concept of a dictionary; the others change."""
    learn, judged = (SceneDataset(120, "question", seed=seed) for seed in (0, 1))
    old, new = ([data[number] for number in range(len(data))] for data in (learn, judged))
    rows = last_rows(llava, old)
    places = torch.tensor([sample.columns["question_type"] == "place" for sample in old])
    learnt = learn_gate(rows[places], rows[~places], POINT, "places")
    fitted = KMeans(8, random_state=0).fit(rows)
    active = fitted.transform(rows)
    concept = int(active[places].sum(0).argmax())
    by_concept = Gate(
        ConceptAbove(fitted=fitted, concept=concept, threshold=0.5, point=POINT, over="mean", at=LAST_PROMPT), "concept"
    )
    steer = vector(llava, 3, 0, 400.0)
    found = said(llava, new, [Setting(steer, gate=learnt), Setting(steer, gate=by_concept), Setting(steer)])
    rows = last_rows(llava, new)
    opened = torch.stack(
        [rows @ learnt.condition.direction > learnt.condition.threshold, fitted.transform(rows)[:, concept] > 0.5]
    )
    asked = torch.tensor([sample.columns["question_type"] == "place" for sample in new])
    assert float((opened[0] == asked).double().mean()) >= 0.99
    assert bool((opened.sum(dim=1) >= 5).all())
    for place, sample in enumerate(new):
        plain, *gated, always = found[sample.id]
        for gate in range(2):
            assert gated[gate] == (always if opened[gate, place] else plain)
    for gate in range(2):
        moved = [found[sample.id][3] != found[sample.id][0] for at, sample in enumerate(new) if opened[gate, at]]
        assert sum(moved) >= 0.5 * len(moved)


def run(
    model: HookedMM | ModelSource, data: Sequence[Sample], settings: Sequence[Setting], path: Path, **options: Any
) -> Answers:
    """`answer`, in batches of two, every batch a shard of its own."""
    module = SampleDataModule(list(data), batch_size=2)
    more = {"max_new_tokens": NEW, **options.pop("options", {})}
    return answer(model, module, settings, path, options=more, seconds_per_shard=0, **options)


def test_a_run_keeps_the_order_of_samples_and_settings(
    llava: HookedMM, images: list[Image.Image], tmp_path: Path
) -> None:
    """Whatever batches were made of them; the data's own columns stay beside."""
    data = samples(images)
    settings = some_settings(llava, (0.5, 2.0))[:4]
    found = run(llava, data, settings, tmp_path / "a", options={"side_effects": True, "surprise": True})
    expected = said(llava, data, settings)
    assert [row["sample"] for row in found.samples] == [sample.id for sample in data]
    assert [row["prompt"] for row in found.samples] == [sample.text for sample in data]
    assert found.texts == [list(texts) for texts in zip(*(expected[sample.id] for sample in data), strict=True)]
    assert found.kl is not None
    assert found.nll is not None
    assert found.kl.shape == found.nll.shape == (5, 5)
    assert found.kl[0].tolist() == [0] * 5
    assert float(found.kl[1:].max()) > 0.01


def test_a_run_that_was_cut_off_goes_on(
    llava: HookedMM, images: list[Image.Image], tmp_path: Path, monkeypatch: Any
) -> None:
    """What it has said is not asked again; then a complete one is read, and the model asked for nothing."""
    data, settings = samples(images), some_settings(llava, (0.5, 2.0))[:2]
    whole = run(llava, data, settings, tmp_path / "whole")
    asked: list[int] = []
    real = SteeredAnswers.represent

    def cut(self: SteeredAnswers, prepared: Any) -> Any:
        if len(asked) == cut_at:
            raise KeyboardInterrupt
        asked.extend(prepared.numbers)
        return real(self, prepared)

    monkeypatch.setattr(SteeredAnswers, "represent", cut)
    cut_at = 4
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(llava, data, settings, tmp_path / "cut")
    with pytest.raises(StoreError, match="resume=True"):
        run(llava, data, settings, tmp_path / "cut")
    cut_at = -1
    found = run(llava, data, settings, tmp_path / "cut", resume=True)
    assert sorted(asked) == list(range(5))
    assert found.texts == whole.texts
    again = run(llava, data, settings, tmp_path / "cut", resume=True)
    assert again.texts == whole.texts
    assert again.samples == whole.samples
    assert sorted(asked) == list(range(5))
    with pytest.raises(StoreError, match="complete"):
        run(llava, data, settings, tmp_path / "cut")


def reversed_vector(v: SteeringVector) -> SteeringVector:
    """Another vector of the same name, length and sum."""
    return SteeringVector(v.values.flip(0), v.hook, v.kind, v.name)


def a_gate(values: Tensor, threshold: float = 0.0, **options: Any) -> Gate:
    """A gate called "g"."""
    return Gate(Above(values, threshold, POINT, options.pop("over", "mean"), options.pop("at", LAST_PROMPT)), "g")


def test_a_complete_run_of_other_settings_is_refused(
    llava: HookedMM, images: list[Image.Image], tmp_path: Path
) -> None:
    """It names what differs: other numbers of the same name, gates, options, samples, models."""
    data = samples(images)[:2]
    v, eye = vector(llava, 3, 0), torch.eye(128)
    one = [Setting(v, 1.0, gate=a_gate(eye[0]))]
    run(llava, data, one, tmp_path / "a")
    run(llava, data, [Setting(v, 1.0, gate=a_gate(eye[0].clone()))], tmp_path / "a", resume=True)
    for other in (
        [Setting(reversed_vector(v), 1.0, gate=a_gate(eye[0]))],
        [Setting(v, 1.5, gate=a_gate(eye[0]))],
        [Setting(v, 1.0, "generated", gate=a_gate(eye[0]))],
        [Setting(v, 1.0, operation="set", gate=a_gate(eye[0]))],
        [Setting(v, 1.0)],
        [Setting(v, 1.0, gate=a_gate(eye[1]))],
        [Setting(v, 1.0, gate=a_gate(eye[0], 1.0))],
        [Setting(v, 1.0, gate=a_gate(eye[0], over="any"))],
        [Setting(v, 1.0, gate=a_gate(eye[0], at="all"))],
        [Setting(v, 1.0, gate=a_gate(eye[0]), also=(Setting(v),))],
        [*one, *one],
    ):
        with pytest.raises(StoreError, match="settings differ"):
            run(llava, data, other, tmp_path / "a", resume=True)
    with pytest.raises(StoreError, match="max_new_tokens differ"):
        run(llava, data, one, tmp_path / "a", resume=True, options={"max_new_tokens": 3})
    with pytest.raises(StoreError, match="answer_prefix, side_effects differ"):
        run(llava, data, one, tmp_path / "a", resume=True, options={"answer_prefix": "a", "side_effects": True})
    with pytest.raises(StoreError, match="data differ"):
        run(llava, data[:1], one, tmp_path / "a", resume=True)
    others = [Sample(f"other{number}", sample.images, sample.text) for number, sample in enumerate(data)]
    with pytest.raises(StoreError, match="samples differ"):
        run(llava, others, one, tmp_path / "a", resume=True)


def test_a_model_that_is_not_loaded_yet_is_known_by_its_name(
    llava: HookedMM, images: list[Image.Image], tmp_path: Path
) -> None:
    """Another one, its adapter, or another dtype is refused before it is loaded."""
    data, settings = samples(images)[:2], [Setting(vector(llava, 3, 0))]
    made = run(llava, data, settings, tmp_path / "a")
    assert run(ModelSource("small:llava"), data, settings, tmp_path / "a", resume=True).texts == made.texts
    for other, what in (
        (ModelSource("small:idefics2"), "model"),
        (ModelSource("small:llava", adapter="colour"), "adapter"),
        (ModelSource("small:llava", dtype="bfloat16"), "dtype"),
    ):
        with pytest.raises(StoreError, match=f"{what} differ"):
            run(other, data, settings, tmp_path / "a", resume=True)


def test_bad_samples_are_left_out_and_a_store_of_none_is_refused(
    llava: HookedMM, images: list[Image.Image], tmp_path: Path
) -> None:
    """With their reasons in the store; a store of something else holds no answers."""
    good, bad = samples(images)[0], Sample("bad", images[0], "   ")
    settings = [Setting(vector(llava, 3, 0))]
    found = run(llava, [bad, good], settings, tmp_path / "a")
    assert [row["sample"] for row in found.samples] == [good.id]
    assert run(llava, [bad, good], settings, tmp_path / "a", resume=True).texts == found.texts
    with pytest.raises(BadInputError, match="no steered answers"):
        run(llava, [bad], settings, tmp_path / "b")
    with pytest.raises(HookedMMError, match="bad"):
        run(llava, [bad, good], settings, tmp_path / "c", on_error="stop")
    manifest = read_manifest(tmp_path / "a")["made_by"]
    assert json.loads(json.dumps(manifest))["settings"][0]["vector"] == "v3-0"
