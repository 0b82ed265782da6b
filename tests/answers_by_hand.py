"""Answers of plain PyTorch hooks in a plain loop, one sample at a time, and samples and settings to ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hooked_mm.conditions import Above
from hooked_mm.data import Sample, SampleDataModule
from hooked_mm.hooked import HookedMM
from hooked_mm.loading import BatchMaker
from hooked_mm.positions import LAST_PROMPT
from hooked_mm.reader import ModelSource
from hooked_mm.steering_vector import SteeringVector
from steering.gate import Gate
from steering.setting import Setting
from steering.steered_answers import Answers, SteeredAnswers, answer

LAYERS = {
    "llava": "model.language_model.layers.{}",
    "idefics2": "model.text_model.layers.{}",
    "qwen2_vl": "model.language_model.layers.{}",
}
"""Where transformers keeps the decoder's layers, by hand."""
NEW = 6
POINT = "blocks.2.hook_resid_post"
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


def run(
    model: HookedMM | ModelSource, data: Sequence[Sample], settings: Sequence[Setting], path: Path, **options: Any
) -> Answers:
    """`answer`, in batches of two, every batch a shard of its own."""
    module = SampleDataModule(list(data), batch_size=2)
    more = {"max_new_tokens": NEW, **options.pop("options", {})}
    return answer(model, module, settings, path, options=more, seconds_per_shard=0, **options)
