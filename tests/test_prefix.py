"""Prompts that are computed once give what whole runs give, token for token, and where they would not it is noticed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

import hooked_mm.prefix as module
from hooked_mm.batch import Batch
from hooked_mm.conditions import Above, Below
from hooked_mm.data import Sample
from hooked_mm.errors import BadInputError
from hooked_mm.generation import GenerationOutput
from hooked_mm.hooked import HookedMM
from hooked_mm.interventions import Add, HookLike, Intervention, ProjectOut
from hooked_mm.loading import BatchMaker
from hooked_mm.positions import GENERATED, LAST_PROMPT
from hooked_mm.prefix import SharedPrompts, compute, shareable
from tests.processors import processor
from tests.tiny import picture, tiny

SMALL = ("llava", "idefics2", "qwen2_vl", "molmo")
PROMPTS = ["what colour is the circle ?", "describe the scene .", "what ?", "describe the scene ."]
ROWS = [1, 0, 1, 3, 3, 2, 1]
EARLY, LATE = "blocks.1.hook_resid_post", "blocks.3.hook_resid_post"
_MODELS: dict[str, tuple[HookedMM, Batch]] = {}


def loaded_with_batch(name: str, images: Sequence[Image.Image]) -> tuple[HookedMM, Batch]:
    """A shipped model with four prompts, padded on the left, about pictures of four sizes."""
    if name not in _MODELS:
        model = HookedMM.small(name, check=False)
        sizes = ((48, 48), (72, 48), (48, 64), (56, 56))
        shown = [image.resize(size) for image, size in zip(images, sizes, strict=False)]
        _MODELS[name] = (model, model.prepare(shown, PROMPTS))
    return _MODELS[name]


def rand(*shape: int, seed: int = 0) -> Tensor:
    """Seeded normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pushes(width: int, rows: int = len(ROWS)) -> list[HookLike]:
    """Several vectors at two layers, each with a strength per row, one of them 0."""
    alpha = torch.linspace(0, 6, rows)
    return [
        Add(EARLY, rand(rows, width), alpha, at="last_prompt"),
        Add(LATE, rand(width, seed=1), alpha.flip(0), at=LAST_PROMPT | GENERATED)
        + ProjectOut("blocks.*.hook_mlp_out", rand(width, seed=2), at="answer"),
    ]


def whole(model: HookedMM, batch: Batch, hooks: Sequence[HookLike], **options: Any) -> GenerationOutput:
    """What a plain generation gives."""
    with model.hooks(hooks):
        return model.generate(batch, **options)


def assert_same(got: GenerationOutput, expected: GenerationOutput) -> None:
    """Tokens, text, the batch behind them, and logits where they were asked for."""
    assert torch.equal(got.tokens, expected.tokens)
    assert got.text == expected.text
    if expected.logits is not None:
        assert got.logits is not None
        assert (got.logits - expected.logits).abs().max() <= 1e-4 * expected.logits.abs().max()
    assert (got.batch is None) == (expected.batch is None)
    if got.batch is not None and expected.batch is not None:
        assert got.batch.inputs.keys() == expected.batch.inputs.keys()
        assert all(torch.equal(got.batch.inputs[key], value) for key, value in expected.batch.inputs.items())


class Watch:
    """Which way generations went, and how many positions the decoder's first block was given."""

    def __init__(self, model: HookedMM, patch: pytest.MonkeyPatch) -> None:
        self.ways: list[str] = []
        self.positions = self.pictures = 0
        for way, owner in (("_whole", SharedPrompts), ("_continue", module)):
            patch.setattr(owner, way, self._told(way, getattr(owner, way)))
        block = model.hf_model.get_submodule(model.structure.text.blocks[0].path)
        self.handles = [block.register_forward_hook(self._count, with_kwargs=True)]
        if model.structure.vision is not None:
            tower = model.hf_model.get_submodule(model.structure.vision.blocks[0].path)
            self.handles.append(tower.register_forward_hook(self._see, with_kwargs=True))

    def _told(self, way: str, real: Any) -> Any:
        def act(*args: Any, **options: Any) -> Any:
            self.ways.append(way)
            return real(*args, **options)

        return act

    def _count(self, block: Any, args: tuple, options: dict, output: Any) -> None:
        value = args[0] if args else options["hidden_states"]
        self.positions += value.shape[0] * value.shape[1]

    def _see(self, block: Any, args: tuple, options: dict, output: Any) -> None:
        self.pictures += (args[0] if args else options["hidden_states"]).shape[0]


@pytest.fixture
def fresh() -> Iterator[None]:
    """Nothing proven so far."""
    kept = [dict(module._continues), dict(module._reuses)]
    module._continues.clear()
    module._reuses.clear()
    yield
    for store, old in zip((module._continues, module._reuses), kept, strict=True):
        store.clear()
        store.update(old)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SMALL)
def test_continued_equals_whole(name: str, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy with logits, beams, several answers, sampling; the cache stays as it was, whatever ran before."""
    model, batch = loaded_with_batch(name, images)
    hooks = pushes(model.cfg.d_model)
    shared = SharedPrompts(model, batch)
    shared.generate([0], max_new_tokens=1)
    watch = Watch(model, monkeypatch)
    for options in (
        {"return_logits": True},
        {"num_beams": 2},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2, "top_k": 0},
        {"return_logits": True},
    ):
        torch.manual_seed(1)
        expected = whole(model, batch.take(ROWS), hooks, max_new_tokens=8, **options)
        torch.manual_seed(1)
        assert_same(shared.generate(ROWS, hooks, 8, **options), expected)
    assert watch.ways == ["_continue"] * 5
    assert shared._prefix is not None
    anew = compute(model, batch, shared._start)
    for old, new in zip(shared._prefix.layers, anew.layers, strict=True):
        assert torch.equal(old.keys, new.keys)
        assert torch.equal(old.values, new.values)
    # The push acts.
    assert shared.generate(ROWS, (), 8).text != shared.generate(ROWS, hooks, 8).text


RULES = st.sampled_from(["last_prompt", "generated", "answer", LAST_PROMPT | GENERATED, "image", "question", "all", -1])


@settings(max_examples=15)
@given(
    rows=st.lists(st.integers(0, 3), min_size=1, max_size=5),
    rules=st.lists(st.tuples(RULES, st.integers(0, 4), st.floats(-6, 6)), max_size=3),
    judged=st.sampled_from([None, "any", "mean", "position"]),
)
def test_any_hooks(images: list[Image.Image], rows: list[int], rules: list, judged: Any) -> None:
    """Wherever they act, with conditions or without; continued or not, it is the same."""
    model, batch = loaded_with_batch("llava", images)
    hooks: list[HookLike] = []
    for at, layer, alpha in rules:
        push: Intervention = Add(f"blocks.{layer}.hook_resid_post", rand(len(rows), 128), alpha, at=at)
        if judged:
            look = Above if layer % 2 else Below
            push = push.when(look(rand(128, seed=3), 0.0, f"blocks.{layer}.hook_resid_pre", judged, at))
        hooks.append(push)
    expected = whole(model, batch.take(rows), hooks, max_new_tokens=4, return_logits=True)
    assert_same(SharedPrompts(model, batch).generate(rows, hooks, 4, return_logits=True), expected)


@pytest.mark.parametrize("over", ["any", "mean", "position"])
@pytest.mark.parametrize("name", SMALL)
def test_conditions_judged_at_the_last_prompt_position(
    name: str, over: Any, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some rows pass and others do not; the answer holds for the generation."""
    model, batch = loaded_with_batch(name, images)
    direction = rand(model.cfg.d_model, seed=5)
    _, cache = model.run_with_cache(batch, EARLY)
    values = cache[EARLY][:, -1] @ (direction / direction.norm())
    threshold = float(values.sort().values[1:3].mean())
    condition = Above(direction, threshold, EARLY, over=over, at="last_prompt")
    at = "last_prompt" if over == "position" else LAST_PROMPT | GENERATED
    hooks = [Add(LATE, rand(model.cfg.d_model, seed=6), 8.0, at=at).when(condition)]
    shared = SharedPrompts(model, batch)
    shared.generate([0], max_new_tokens=1)
    watch = Watch(model, monkeypatch)
    got = shared.generate(ROWS, hooks, 6, return_logits=True)
    assert watch.ways == ["_continue"]
    assert_same(got, whole(model, batch.take(ROWS), hooks, max_new_tokens=6, return_logits=True))
    plain = shared.generate(ROWS, (), 6, return_logits=True)
    assert got.logits is not None
    assert plain.logits is not None
    changed = (got.logits[:, 0] - plain.logits[:, 0]).abs().amax(dim=1) > 1e-3
    assert changed.tolist() == (values > threshold)[ROWS].tolist()


def test_begun_answers_are_continued(images: list[Image.Image], monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of different lengths are given: several positions are left, each with its role."""
    for name in SMALL:
        model, _ = loaded_with_batch(name, images)
        begun = ["a", None, "a big red", "there is"]
        batch = model.prepare(images[:4], PROMPTS, answer_prefix=begun)
        shared = SharedPrompts(model, batch)
        assert batch.length - shared._start > 1
        hooks = [*pushes(model.cfg.d_model), Add(EARLY, rand(model.cfg.d_model, seed=8), 4.0, at="answer")]
        with monkeypatch.context() as patch:
            watch = Watch(model, patch)
            got = shared.generate(ROWS, hooks, 6, return_logits=True)
        assert "_whole" not in watch.ways
        assert_same(got, whole(model, batch.take(ROWS), hooks, max_new_tokens=6, return_logits=True))


@pytest.mark.parametrize("name", SMALL)
def test_fallback_is_right(name: str, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch) -> None:
    """What acts earlier, what can't be told, unknown options, active hooks: the rows run whole."""
    model, batch = loaded_with_batch(name, images)
    vector, rows = rand(model.cfg.d_model, seed=9), [1, 0, 1]
    late, image = pushes(model.cfg.d_model, 3), Add(EARLY, vector, 3.0, at="image")
    function = (EARLY, lambda value, hook: value + vector if hook.step == 0 else None)
    tower = ("vision.blocks.0.hook_resid_post", lambda value, hook: value * 1.5)
    embedded = ("hook_embed", lambda value, hook: value * 1.1)
    shared, chosen = SharedPrompts(model, batch), batch.take(rows)
    watch = Watch(model, monkeypatch)
    for hooks, options in (
        ([*late, image], {"return_logits": True}),
        ([embedded, image], {"num_beams": 2}),
        ([function], {"return_logits": True}),
        ([tower], {"return_logits": True}),
        (late, {"use_cache": False}),
    ):
        expected = whole(model, chosen, hooks, max_new_tokens=3, **options)
        assert_same(shared.generate(rows, hooks, 3, **options), expected)
    with model.hooks([image]):
        got = shared.generate(rows, late, 3)
    assert_same(got, whole(model, chosen, [image, *late], max_new_tokens=3))
    assert watch.ways == ["_whole"] * 6


def test_what_is_computed(images: list[Image.Image], monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts once and one position per row and step; whole runs see every picture once."""
    model, batch = loaded_with_batch("llava", images)
    shared = SharedPrompts(model, batch)
    rows = [0, 1, 2, 3] * 5
    hooks = [Add(EARLY, rand(128), 1.0, at="last_prompt")]
    shared.generate([0, 1], hooks, 1)
    watch = Watch(model, monkeypatch)
    shared.generate(rows, hooks, 1)
    assert (watch.positions, watch.pictures) == (len(rows), 0)
    anew = SharedPrompts(model, batch)
    anew.generate(rows, hooks, 1)
    assert (watch.positions, watch.pictures) == (2 * len(rows) + 4 * (batch.length - 1), 4)
    early = [Add(EARLY, rand(128), 1.0, at="image")]
    for runs in (1, 2):
        # Proven before, so encoded once for both runs.
        module._reuses[model] = True
        anew.generate(rows, early, 1)
        assert watch.pictures == 8
        assert watch.positions == 2 * len(rows) + 4 * (batch.length - 1) + runs * len(rows) * batch.length


def test_pictures_that_samples_share(images: list[Image.Image], monkeypatch: pytest.MonkeyPatch) -> None:
    """As data modules prepare them: two pictures, five questions; the tower sees two."""
    model, _ = loaded_with_batch("llava", images)
    shown = [images[0], images[1], images[0], images[0], images[1]]
    asked = zip(shown, [*PROMPTS, "why ?"], strict=True)
    samples = [Sample(str(number), image, text) for number, (image, text) in enumerate(asked)]
    made = BatchMaker(samples, model, "none")(range(5))
    assert made.batch is not None
    shared = SharedPrompts(model, made.batch, made.pictures, made.picture_of)
    hooks = pushes(128, 6)
    module._reuses[model] = True
    shared._can_continue(made.batch.take([0] * 6), hooks, {})
    watch = Watch(model, monkeypatch)
    got = shared.generate([4, 3, 2, 1, 0, 0], hooks, 5, return_logits=True)
    assert watch.pictures == 2
    assert_same(got, whole(model, made.batch.take([4, 3, 2, 1, 0, 0]), hooks, max_new_tokens=5, return_logits=True))
    with pytest.raises(BadInputError, match="picture_of has 2 entries for 5 images"):
        SharedPrompts(model, made.batch, made.pictures, [0, 1])


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("fault", ["rows", "values", "short", "raises"])
def test_a_wrong_cache_is_seen(
    fault: str, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Keys of another sample, of another value, too few of them: not proven, said once, and the rows run whole."""
    model, batch = loaded_with_batch("llava", images)
    assert shareable(model, batch)
    expand, real = module._expanded, compute

    def broken(cache: Any, rows: Tensor) -> Any:
        if fault == "raises":
            raise RuntimeError("no such\ncache")
        made = expand(cache, rows.roll(1) if fault == "rows" else rows)
        if fault == "values":
            made.layers[2].values *= 1.01
        return made

    monkeypatch.setattr(module, "_expanded", broken)
    if fault == "short":
        monkeypatch.setattr(module, "compute", lambda model, batch, start, *rest: real(model, batch, start - 1, *rest))
    hooks = pushes(128)
    expected = whole(model, batch.take(ROWS), hooks, max_new_tokens=4, return_logits=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert_same(SharedPrompts(model, batch).generate(ROWS, hooks, 4, return_logits=True), expected)
    said = [record.message for record in caplog.records if "computed anew" in record.message]
    assert len(said) == 1
    assert {"rows": "differ by", "values": "differ by", "short": "positions of", "raises": "no such"}[fault] in said[0]
    if fault in ("rows", "values"):
        # Were it not looked at, the answers would be others.
        module._continues[model] = {(True, False): True}
        got = SharedPrompts(model, batch).generate(ROWS, hooks, 4, return_logits=True)
        with pytest.raises(AssertionError):
            assert_same(got, expected)


@pytest.mark.parametrize(
    ("family", "way"),
    [
        *((name, "_continue") for name in ("qwen2_5_vl", "qwen3_vl", "gemma3", "llava_onevision", "internvl")),
        *((name, "_whole") for name in ("mllama", "blip-2", "florence2")),
    ],
)
def test_families(family: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows, other rotary positions, bidirectional images, crops; those that can't be continued run whole."""
    model = HookedMM(tiny(family), processor(family), check=False)
    pictures = [[picture(40, 24, 1)], [picture(24, 24, 2)], [picture(20, 48, 3)], [picture(48, 16, 5)]]
    batch = model.prepare(pictures, ["what is it?", "where", "and the colour of this one?", "how many"])
    rows = [2, 0, 2, 1, 3, 3]
    hooks = [
        Add("blocks.0.hook_resid_post", rand(6, model.cfg.d_model), torch.linspace(0, 2, 6), at="last_prompt"),
        Add("blocks.1.hook_resid_post", rand(model.cfg.d_model, seed=1), 0.5, at="generated"),
    ]
    watch = Watch(model, monkeypatch)
    got = SharedPrompts(model, batch).generate(rows, hooks, 6, return_logits=True)
    assert watch.ways[-1] == way
    assert_same(got, whole(model, batch.take(rows), hooks, max_new_tokens=6, return_logits=True))


def test_text_alone(images: list[Image.Image], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pictures, and with pictures in some samples only."""
    for name in SMALL:
        model, _ = loaded_with_batch(name, images)
        for pictures in (None, [images[0], None, [images[1], images[2]], None]):
            batch = model.prepare(pictures, PROMPTS)
            for rows in (ROWS, [1, 1, 3, 1, 3, 3, 1]):
                hooks = pushes(model.cfg.d_model)
                with monkeypatch.context() as patch:
                    watch = Watch(model, patch)
                    got = SharedPrompts(model, batch).generate(rows, hooks, 5, return_logits=True)
                assert "_whole" not in watch.ways
                assert_same(got, whole(model, batch.take(rows), hooks, max_new_tokens=5, return_logits=True))


@pytest.mark.usefixtures("fresh")
def test_the_proof_is_made_with_a_picture(images: list[Image.Image]) -> None:
    """Also where only the last sample has one, of middling length."""
    model, _ = loaded_with_batch("llava", images)
    batch = model.prepare([None] * 5 + [images[0]], ["what ?"] * 4 + ["describe the scene . " * 40, "what ?"])
    few = batch.take(module._few_rows(batch))
    assert few.has_images
    assert len(few) == module.PROOF_ROWS


def test_bad_batches_are_refused(images: list[Image.Image]) -> None:
    """Padded on the right; rows that do not exist."""
    model, batch = loaded_with_batch("llava", images)
    with pytest.raises(BadInputError, match="padded on the right"):
        SharedPrompts(model, model.prepare(images[:4], PROMPTS, padding_side="right"))
    with pytest.raises(BadInputError, match="sample 4 asked of a batch of 4"):
        SharedPrompts(model, batch).generate([4])
