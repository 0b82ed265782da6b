"""Directions between two answers to one question: the derivative is a derivative, the gap is the gap."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from PIL import Image
from torch import Tensor

from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.world import Scene
from steering.answer_directions import answer_direction, own_stream

HOOK = "blocks.2.hook_resid_post"
QUESTION = "what colour is the star ?"


def two(model: HookedMM, image: Image.Image, source: str = "red", target: str = "blue") -> tuple[Batch, Batch]:
    """A question with one and the other answer."""
    return (model.prepare([image], [QUESTION], [source]), model.prepare([image], [QUESTION], [target]))


def log_p(model: HookedMM, batch: Batch, block: int = 2, added: Tensor | None = None) -> float:
    """log p of a one-token answer by transformers alone, in float64, with a vector added behind a block."""

    def add(module: object, args: object, output: Tensor) -> Tensor:
        assert added is not None
        changed = output.clone()
        changed[:, -2] += added.to(changed)
        return changed

    layers = model.hf_model.model.language_model.layers
    handle = layers[block].register_forward_hook(add) if added is not None else None
    try:
        with torch.no_grad():
            logits = model.hf_model(**batch.inputs).logits
    finally:
        if handle is not None:
            handle.remove()
    return float(logits[0, -2].double().log_softmax(-1)[batch.input_ids[0, -1]])


def test_the_first_step_along_the_odds_closes_that_share_of_the_gap(llava: HookedMM, images: list[Image.Image]) -> None:
    """Finite differences through plain transformers: eps of the vector closes eps of the gap, on any picture."""
    for image in images[:3]:
        source, target = two(llava, image)
        vector = answer_direction(llava, source, target, HOOK)
        gap = log_p(llava, source) - log_p(llava, target)
        eps = 1e-2
        ahead, back = (
            log_p(llava, source, added=sign * eps * vector) - log_p(llava, target, added=sign * eps * vector)
            for sign in (1, -1)
        )
        assert (back - ahead) / (2 * eps) == pytest.approx(max(1.0, gap), rel=0.02)


def test_the_shortest_of_all_that_close_it(llava: HookedMM, images: list[Image.Image]) -> None:
    """Any part at right angles to it changes the odds by nothing, to first order."""
    source, target = two(llava, images[0])
    vector = answer_direction(llava, source, target, HOOK).double()
    other = torch.randn(len(vector), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    other -= (other @ vector) / (vector @ vector) * vector
    other *= vector.norm() / other.norm()
    eps = 1e-2
    moved = [
        log_p(llava, source, added=sign * eps * other) - log_p(llava, target, added=sign * eps * other)
        for sign in (1, -1)
    ]
    gap = max(1.0, log_p(llava, source) - log_p(llava, target))
    assert abs(moved[0] - moved[1]) / (2 * eps) < 0.02 * gap


def test_answers_that_begin_alike_are_told_apart_where_they_part(llava: HookedMM, images: list[Image.Image]) -> None:
    """Not at the prompt's end, of which the last layer's first token depends on nothing that differs."""
    source, target = (
        llava.prepare([images[0]], ["describe the image ."], [answer]) for answer in ("a red star", "a blue star")
    )
    last = "blocks.5.hook_resid_post"
    vector = answer_direction(llava, source, target, last)

    # Behind "a" stand two words of each answer: the stream at "a", by a hook of transformers, with the vector added.
    def odds(added: Tensor) -> float:
        def add(module: object, args: object, output: Tensor) -> Tensor:
            changed = output.clone()
            changed[:, -3] += added
            return changed

        handle = llava.hf_model.model.language_model.layers[5].register_forward_hook(add)
        try:
            with torch.no_grad():
                logits = llava.hf_model(**source.inputs).logits[0, -3].double().log_softmax(-1)
        finally:
            handle.remove()
        red, blue = (int(batch.input_ids[0, -2]) for batch in (source, target))
        return float(logits[red] - logits[blue])

    slope = (odds(-0.01 * vector) - odds(0.01 * vector)) / 0.02
    whole = [
        float(
            llava.hf_model(**batch.inputs)
            .logits[0, -4:-1]
            .double()
            .log_softmax(-1)
            .gather(1, batch.input_ids[0, -3:, None])
            .sum()
        )
        for batch in (source, target)
    ]
    assert slope == pytest.approx(max(1.0, whole[0] - whole[1]), rel=0.02)


def test_read_is_the_difference_of_the_streams_at_the_answers_themselves(
    llava: HookedMM, images: list[Image.Image]
) -> None:
    """Against the hidden states that transformers gives."""
    source, target = two(llava, images[0])
    with torch.no_grad():
        rows = [
            llava.hf_model(**batch.inputs, output_hidden_states=True).hidden_states[3][0, -1]
            for batch in (source, target)
        ]
    torch.testing.assert_close(answer_direction(llava, source, target, HOOK, "read"), rows[1] - rows[0])


@pytest.mark.parametrize("name", ["idefics2", "qwen2_vl", "molmo"])
def test_longer_answers_and_every_family(
    small: Callable[[str], HookedMM], name: str, images: list[Image.Image], scenes: list[Scene]
) -> None:
    """The own stream is that of the prompt's last position; answers of several tokens have a direction too."""
    model = small(name)
    prompt = model.prepare([images[0]], [QUESTION])
    batches = [model.prepare([images[0]], [QUESTION], [answer]) for answer in ("a red star", "blue")]
    vector = answer_direction(model, *batches, HOOK)
    assert vector.shape == (model.cfg.d_model,)
    assert bool(vector.isfinite().all())
    assert float(vector.norm()) > 0
    _, cache = model.run_with_cache(prompt, [HOOK])
    torch.testing.assert_close(own_stream(model, prompt, HOOK), cache[HOOK][0, -1])


def test_what_leads_nowhere_is_refused(llava: HookedMM, images: list[Image.Image]) -> None:
    """The same answer twice, an empty one, several samples, an unknown way, points without a vector there."""
    source, target = two(llava, images[0])
    with pytest.raises(BadInputError, match="both answers are the same"):
        answer_direction(llava, source, source, HOOK)
    prompt = llava.prepare([images[0]], [QUESTION])
    with pytest.raises(BadInputError, match="without a token"):
        answer_direction(llava, source, prompt, HOOK)
    several = llava.prepare(images[:2], QUESTION, ["red", "blue"])
    with pytest.raises(BadInputError, match="one question"):
        answer_direction(llava, several, target, HOOK)
    with pytest.raises(BadInputError, match="no way 'guess'"):
        answer_direction(llava, source, target, HOOK, "guess")  # type: ignore[arg-type]
    for hook in ("projector.hook_out", "blocks.2.attn.hook_q"):
        with pytest.raises(BadInputError, match="no vector where the answer is predicted"):
            own_stream(llava, prompt, hook)
        with pytest.raises(BadInputError, match="no vector where the answer is predicted"):
            answer_direction(llava, source, target, hook)
