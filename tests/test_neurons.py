"""Multimodal neurons against gradients by raw hooks, formulas written out, and the model's own drop of the logit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from analyses.neurons import (
    Neuron,
    ablated_logits,
    attributions,
    contributions,
    matched_draws,
    neuron_layers,
    picked_logits,
    receptive_fields,
    silence,
    top_neurons,
    written_words,
)
from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.dataset import SceneDataset, picture
from hooked_mm.testing import miniature, miniature_inputs

ASKED = "what colour is the circle ?"


@pytest.fixture(scope="module")
def batch(llava: HookedMM, images: list[Image.Image]) -> Batch:
    """Four pictures, prompts of several lengths."""
    texts = [ASKED, "what place is this ?", "what colour is the object at the top left ?", ASKED]
    return llava.prepare(images[:4], texts)


def by_raw_hooks(
    model: Any, inputs: dict[str, Tensor], path: str, score: Any, side: str = "input"
) -> tuple[Tensor, Tensor]:
    """What goes into (comes out of) a module, and the gradient of a score of the logits, by PyTorch alone."""
    kept: list[Tensor] = []

    def before(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        kept.append(args[0].detach().requires_grad_())
        return (kept[0], *args[1:])

    def behind(module: Any, args: Any, value: Tensor) -> Tensor:
        kept.append(value.detach().requires_grad_())
        return kept[0]

    inside = model.get_submodule(path)
    handle = inside.register_forward_pre_hook(before) if side == "input" else inside.register_forward_hook(behind)
    try:
        with torch.enable_grad():
            score(model(**inputs).logits).backward()
    finally:
        handle.remove()
    assert kept[0].grad is not None
    return kept[0].detach(), kept[0].grad


def mlp(model: HookedMM, layer: int, part: str) -> str:
    return f"{model.structure.text.blocks[layer].path}.mlp.{part}"


def at_rows(batch: Batch, targets: Tensor) -> Any:
    return lambda logits: sum(
        logits[n, int(row), int(target)]
        for n, (row, target) in enumerate(zip(batch.last_prompt(), targets, strict=True))
    )


def test_contributions_are_value_times_gradient_of_the_down_projections_input(llava: HookedMM, batch: Batch) -> None:
    """Summed over image positions; activity is the mean size there."""
    targets = torch.tensor([18, 70, 4, 30])
    found = attributions(llava, batch, targets, layers=[1, 3])
    image = batch.mask("image")[..., None]
    for layer in (1, 3):
        value, gradient = by_raw_hooks(
            llava.hf_model, batch.inputs, mlp(llava, layer, "down_proj"), at_rows(batch, targets)
        )
        expected = (value.double() * gradient.double() * image).sum(1)
        torch.testing.assert_close(found.scores[layer].double(), expected, rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(found.activity[layer], (value.abs() * image).sum(1) / image.sum(1))
    clean = llava.run_with_hooks(batch)
    assert clean is not None
    torch.testing.assert_close(found.logits, torch.stack([clean[n, -1, int(t)] for n, t in enumerate(targets)]))


def test_neurons_are_not_read_before_the_activation(llava: HookedMM, batch: Batch) -> None:
    """A rival multiplies what the activation function *sees* with its gradient: other numbers, other neurons."""
    targets = torch.tensor([18, 70, 4, 30])
    ours = attributions(llava, batch, targets, layers=[2]).scores[2]
    value, gradient = by_raw_hooks(
        llava.hf_model, batch.inputs, mlp(llava, 2, "gate_proj"), at_rows(batch, targets), side="output"
    )
    theirs = (value * gradient * batch.mask("image")[..., None]).sum(1)
    assert (ours - theirs).norm() > 0.5 * ours.norm()


@pytest.mark.parametrize("rival", ["all words", "all rows"])
def test_the_target_is_one_logit_and_no_sum_of_logits(llava: HookedMM, batch: Batch, rival: str) -> None:
    """Rivals differentiate the sum over the vocabulary, or over all positions."""
    targets = torch.tensor([18, 70, 4, 30])
    ours = attributions(llava, batch, targets, layers=[2]).scores[2]

    def score(logits: Tensor) -> Tensor:
        if rival == "all words":
            return torch.stack([logits[n, row].sum() for n, row in enumerate(batch.last_prompt())]).sum()
        return torch.stack([logits[n, :, target].sum() for n, target in enumerate(targets)]).sum()

    value, gradient = by_raw_hooks(llava.hf_model, batch.inputs, mlp(llava, 2, "down_proj"), score)
    theirs = (value * gradient * batch.mask("image")[..., None]).sum(1)
    assert (ours - theirs).norm() > 0.5 * ours.norm()


def test_a_samples_attribution_does_not_depend_on_its_companions(
    llava: HookedMM, batch: Batch, images: list[Image.Image]
) -> None:
    """Alone, without padding, it is the same."""
    targets = torch.tensor([18, 70, 4, 30])
    together = attributions(llava, batch, targets, layers=[0, 2, 4])
    alone = attributions(llava, llava.prepare(images[0], ASKED), targets[:1], layers=[0, 2, 4])
    for layer in (0, 2, 4):
        torch.testing.assert_close(together.scores[layer][:1], alone.scores[layer], rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(together.activity[layer][:1], alone.activity[layer], rtol=1e-4, atol=1e-6)


def test_the_row_is_the_one_that_predicts_the_target(llava: HookedMM, images: list[Image.Image]) -> None:
    """With the answer behind the prompt, the last row of the prompt still predicts its first token."""
    given = llava.prepare(images[:1], [ASKED], answers=["red"])
    target = torch.tensor([llava.tokenizer(" red", add_special_tokens=False)["input_ids"][0]])
    bare = attributions(llava, llava.prepare(images[:1], [ASKED]), target, layers=[2])
    answered = attributions(llava, given, target, layers=[2])
    torch.testing.assert_close(bare.scores[2], answered.scores[2], rtol=1e-3, atol=1e-7)
    at_itself = attributions(llava, given, target, given.last_prompt() + 1, layers=[2])
    assert (at_itself.scores[2] - bare.scores[2]).norm() > 0.5 * bare.scores[2].norm()


def test_at_the_last_layer_no_image_position_has_a_part(llava: HookedMM, batch: Batch) -> None:
    """Nothing behind it moves between positions: scores are zero there, exactly."""
    last = neuron_layers(llava)[-1]
    assert not attributions(llava, batch, torch.tensor([18, 70, 4, 30]), layers=[last]).scores[last].any()


@pytest.mark.parametrize("family", ["gemma3", "glm4v"])
def test_any_mlp_is_read_by_its_hook_name(family: str, unchecked: None) -> None:
    """A norm behind the MLP; gate and up projection in one matrix."""
    model = HookedMM(miniature(family))
    inputs = miniature_inputs(model.hf_model)
    made = model._batch(inputs)
    targets, layer = torch.full((len(made),), 5), neuron_layers(model)[0]
    down = model.hook_points[f"blocks.{layer}.mlp.hook_post"].module

    def score(logits: Tensor) -> Tensor:
        return logits[:, -1, 5].sum()

    value, gradient = by_raw_hooks(model.hf_model, inputs, down, score)
    found = attributions(model, made, targets, torch.full_like(targets, value.shape[1] - 1), layers=[layer])
    expected = (value * gradient * made.mask("image")[..., None]).sum(1)
    torch.testing.assert_close(found.scores[layer], expected, rtol=1e-4, atol=1e-9)
    words = written_words(model, layer, torch.tensor([0, 3]))
    weights = dict(model.hf_model.named_parameters())
    columns = weights[f"{down}.weight"].double()[:, [0, 3]].T
    block = model.structure.text.blocks[layer].path
    offset = 1 if family == "gemma3" else 0
    behind = weights.get(
        f"{block}.post_feedforward_layernorm.weight", weights.get(f"{block}.post_mlp_layernorm.weight")
    )
    assert behind is not None
    columns = columns * (behind.double() + offset) * (weights[f"{model.structure.final_norm}.weight"].double() + offset)
    unembed = model.hf_model.get_submodule(model.structure.unembed).weight.double()
    torch.testing.assert_close(words.double(), (columns @ unembed.T).detach(), rtol=1e-3, atol=1e-6)


def test_a_neuron_is_decoded_by_what_its_column_writes(llava: HookedMM) -> None:
    """W_U (gain * W_down[:, k]), written out."""
    state = llava.hf_model.state_dict()
    down = state[f"{mlp(llava, 4, 'down_proj')}.weight"].double()
    gain, unembed = state["model.language_model.norm.weight"].double(), state["lm_head.weight"].double()
    expected = torch.stack([unembed @ (gain * down[:, k]) for k in (3, 47)])
    torch.testing.assert_close(written_words(llava, 4, torch.tensor([3, 47])).double(), expected, rtol=1e-4, atol=1e-6)


def test_silent_neurons_are_zero_at_image_positions_alone(llava: HookedMM, batch: Batch) -> None:
    """Each sample has its own set; all else is bit for bit what it was."""
    sets = [[Neuron(1, 5), Neuron(3, 7)], [], [Neuron(3, 0)], [Neuron(1, 5)]]
    point = "blocks.1.mlp.hook_post"
    _, clean = llava.run_with_cache(batch, point)
    with llava.hooks(silence(sets)):
        _, cache = llava.run_with_cache(batch, point)
    expected = clean[point].clone()
    for sample in (0, 3):
        expected[sample, batch.mask("image")[sample], 5] = 0
    assert torch.equal(cache[point], expected)


def test_ablated_logits_are_those_of_raw_hooks(llava: HookedMM, batch: Batch) -> None:
    """Zero and mean ablation of one set, at a row of one's own; and of no neuron, the model's own logits."""
    image, ids = batch.mask("image"), torch.tensor([18, 70])
    rows = batch.last_prompt() - 1
    chosen = [*(Neuron(2, index) for index in range(100, 140)), Neuron(4, 47), Neuron(4, 9)]
    means = {layer: torch.linspace(-1, 1, 256) for layer in (2, 4)}

    def raw(instead: Any) -> Tensor:
        def change(layer: int) -> Any:
            def before(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor]:
                value = args[0].clone()
                for neuron in chosen:
                    if neuron.layer == layer:
                        value[..., neuron.number][image] = float(instead[layer][neuron.number])
                return (value,)

            return before

        handles = [
            llava.hf_model.get_submodule(mlp(llava, layer, "down_proj")).register_forward_pre_hook(change(layer))
            for layer in (2, 4)
        ]
        try:
            with torch.no_grad():
                logits = llava.hf_model(**batch.inputs).logits
        finally:
            for handle in handles:
                handle.remove()
        return logits[torch.arange(4), rows][:, ids]

    zero = {layer: torch.zeros(256) for layer in (2, 4)}
    found = ablated_logits(llava, batch, [[], chosen], ids, rows, size=3)
    torch.testing.assert_close(found[1], raw(zero), rtol=1e-5, atol=2e-5)
    to_means = ablated_logits(llava, batch, [chosen], ids, rows, means=means)
    torch.testing.assert_close(to_means[0], raw(means), rtol=1e-5, atol=2e-5)
    clean = llava.run_with_hooks(batch)
    assert clean is not None
    torch.testing.assert_close(found[0], clean[torch.arange(4), rows][:, ids], rtol=1e-5, atol=2e-5)
    assert (found[1] - found[0]).abs().max() > 1e-3


def test_receptive_fields_are_activations_on_the_grid(llava: HookedMM, batch: Batch) -> None:
    """Row by row, of the sample asked for."""
    _, cache = llava.run_with_cache(batch, ["blocks.2.mlp.hook_post", "blocks.4.mlp.hook_post"])
    (found,) = receptive_fields(cache, [Neuron(4, 47), Neuron(2, 1), Neuron(4, 0)], 1)
    for place, (layer, index) in enumerate([(4, 47), (2, 1), (4, 0)]):
        rows = cache[f"blocks.{layer}.mlp.hook_post"][1][batch.mask("image")[1]][:, index]
        assert torch.equal(found[..., place], rows.reshape(8, 8))


def test_top_neurons_are_those_of_largest_mean_whatever_their_layer() -> None:
    """Means over samples; ties in the order of the layers."""
    scores = {0: torch.tensor([[1.0, 4.0], [1.0, 0.0]]), 2: torch.tensor([[3.0, -9.0], [3.0, 2.0]])}
    assert top_neurons(scores, 3) == [Neuron(2, 0), Neuron(0, 1), Neuron(0, 0)]
    with pytest.raises(BadInputError, match="top 5 of 4"):
        top_neurons(scores, 5)


@given(st.integers(0, 10**6), st.integers(1, 6))
def test_draws_are_of_other_neurons_of_the_same_layers_and_about_as_active(seed: int, count: int) -> None:
    """Each in the pool of the one it stands for, none twice, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    activity = {layer: torch.rand(40, generator=generator) for layer in (0, 1)}
    chosen = [Neuron(n % 2, n) for n in range(count)]
    draws = matched_draws(activity, chosen, 30, pool=8, seed=seed)
    assert draws == matched_draws(activity, chosen, 30, pool=8, seed=seed)
    assert len(draws) == 30
    for drawn in draws:
        assert len(set(drawn)) == count
        assert not set(drawn) & set(chosen)
        for ours, theirs in zip(chosen, drawn, strict=True):
            assert ours.layer == theirs.layer
            values = activity[ours.layer]
            free = [k for k in range(40) if Neuron(ours.layer, k) not in chosen]
            rank = sorted(free, key=lambda k: abs(float(values[k] - values[ours.number])))
            assert theirs.number in rank[:8]
    assert len({tuple(drawn) for drawn in draws}) > 1


def test_too_few_neurons_to_draw_from_are_refused() -> None:
    """With their number."""
    with pytest.raises(BadInputError, match="layer 0 has 3 neurons besides"):
        matched_draws({0: torch.rand(5)}, [Neuron(0, 0), Neuron(0, 1)], 2, pool=4)


@pytest.mark.parametrize(
    ("rows", "targets", "said"),
    [([0, 1], [1, 2, 3], "rows"), ([0, 9, 0], [1, 2, 3], "rows"), ([0, 0, 0], [1, -2, 3], "targets")],
)
def test_rows_and_targets_that_do_not_fit_are_refused(rows: list[int], targets: list[int], said: str) -> None:
    """One of each per sample, within bounds."""
    with pytest.raises(BadInputError, match=f"{said} .* are not 3 numbers"):
        picked_logits(torch.zeros(3, 4, 5), torch.tensor(rows), torch.tensor(targets))


def test_what_has_no_image_or_no_neurons_is_refused(llava: HookedMM, batch: Batch) -> None:
    """A prompt without a picture; sets for another batch; a mixture of experts."""
    with pytest.raises(BadInputError, match="has no position of"):
        attributions(llava, llava.prepare(None, "what place is this ?"), torch.tensor([3]), layers=[0])
    with pytest.raises(BadInputError, match="1 sets of neurons were given for a batch of 4"):
        llava.run_with_hooks(batch, silence([[Neuron(0, 1)]]))


def test_half_precision_is_multiplied_in_float32() -> None:
    """Products of small numbers do not vanish."""
    value = torch.tensor([2e-5], dtype=torch.float16)
    assert contributions(value, value)[0] > 0


def questions(word: str, split: Any, count: int) -> tuple[list[Image.Image], list[str]]:
    """Questions whose right answer is a colour."""
    data, found = SceneDataset(10**4, task="question", split=split, seed=5), []
    for index in range(len(data)):
        asked = data.asked(index)
        if asked.type == "colour" and asked.answer == word:
            found.append((picture(data.scene(index)), asked.text))
        if len(found) == count:
            break
    return [image for image, _ in found], [text for _, text in found]


def drops(logits: Tensor) -> Tensor:
    """Mean over samples of what the logit of each set (but the first, of no neuron) lost."""
    return (logits[0] - logits[1:])[..., 0].mean(1)


@pytest.mark.slow
@pytest.mark.parametrize("word", ["red", "blue"])
def test_the_neurons_of_a_colour_word_matter_more_than_others_as_active(llava: HookedMM, word: str) -> None:
    """Found on scenes of training, silenced on others: the logit drops more than in 99 of 100 draws of 200."""
    token = llava.tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0]
    found = attributions(llava, llava.prepare(*questions(word, "train", 64)), torch.full((64,), token))
    top = top_neurons(found.scores, 10)
    activity = {layer: value.mean(0) for layer, value in found.activity.items()}
    sets: list[Sequence[Neuron]] = [[], top, *matched_draws(activity, top, 200)]
    held_out = llava.prepare(*questions(word, "test", 16))
    lost = drops(ablated_logits(llava, held_out, sets, torch.tensor([token])))
    assert lost[0] > 3 * lost[1:].quantile(0.99)
    assert lost[0] > lost[1:].max()
