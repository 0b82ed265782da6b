"""A sweep of 8 alphas x 4 layers, ours against one setting and one sample after the other.

    python -m benchmarks.steering_speed --models llava idefics2 qwen2_vl --rounds 3

The other way is the field's: for every setting a raw hook on the block, and the model's own `generate` for every sample
by itself. Samples are prepared beforehand for both; rounds are interleaved, ratios are of one round, and every answer
must be the same.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from statistics import median
from typing import Any

import torch
from torch import Tensor

from hooked_mm.data import Sample
from hooked_mm.hooked import HookedMM
from hooked_mm.loading import BatchMaker
from hooked_mm.scenes.dataset import SceneDataset
from hooked_mm.steering_vector import SteeringVector
from steering.setting import Setting
from steering.steered_answers import SteeredAnswers

ALPHAS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
TOKENS = 4


@contextmanager
def raw_hook(block: torch.nn.Module, push: Tensor) -> Iterator[None]:
    """Adds at the last position of every forward pass: the prompt's last, then each generated one."""

    def add(module: Any, inputs: Any, output: Any) -> Any:
        value = output[0] if isinstance(output, tuple) else output
        changed = torch.cat([value[:, :-1], value[:, -1:] + push], dim=1)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = block.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def one_by_one(model: HookedMM, inputs: Sequence[dict[str, Any]], settings: Sequence[Setting]) -> list[list[str]]:
    """Per setting and sample a generation of its own."""
    blocks = model.structure.text.blocks
    said = []
    for setting in settings:
        vector = setting.vector
        assert vector is not None
        assert vector.layer is not None
        block = model.hf_model.get_submodule(blocks[vector.layer].path)
        texts = []
        with raw_hook(block, setting.alpha * vector.values):
            for own in inputs:
                found = model.hf_model.generate(**own, do_sample=False, max_new_tokens=TOKENS)
                new = found[0, own["input_ids"].shape[1] :]
                texts.append(model.tokenizer.decode(new, skip_special_tokens=True).strip())
        said.append(texts)
    return said


def main(argv: Sequence[str] | None = None) -> None:
    """Print a row per model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["llava", "idefics2", "qwen2_vl", "molmo"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=32)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    print("| model | answers | ours, s | one by one, s | ratio (rounds) | same answers |\n|---|---|---|---|---|---|")
    for name in options.models:
        model = HookedMM.small(name)
        data = SceneDataset(options.samples, "question", seed=5)
        samples: list[Sample] = [data[number] for number in range(len(data))]
        chance = torch.Generator().manual_seed(0)
        hooks = [f"blocks.{layer}.hook_resid_post" for layer in range(4)]
        vectors = [SteeringVector(8 * torch.randn(model.cfg.d_model, generator=chance), hook) for hook in hooks]
        settings = [Setting(vector, alpha) for vector, alpha in product(vectors, ALPHAS)]
        prepared = BatchMaker(samples, model, "none")(range(len(samples)))
        # Position ids are left to the model, as whoever steers by hand would.
        alone = [
            {k: v for k, v in model.prepare([one.images], [one.text]).inputs.items() if k != "position_ids"}
            for one in samples
        ]
        SteeredAnswers(model, settings[:1], max_new_tokens=TOKENS).represent(prepared)  # proofs are made once
        ratios, times, same = [], [], 0
        for _ in range(options.rounds):
            start = time.perf_counter()
            ours = SteeredAnswers(model, settings, max_new_tokens=TOKENS).represent(prepared)
            middle = time.perf_counter()
            theirs = one_by_one(model, alone, settings)
            end = time.perf_counter()
            times.append((middle - start, end - middle))
            ratios.append((end - middle) / (middle - start))
            said = [row["steered"] for row in ours.samples]
            same = sum(said[n][s] == theirs[s][n] for s in range(len(settings)) for n in range(len(samples)))
        count = len(settings) * len(samples)
        both = [median(one) for one in zip(*times, strict=True)]
        shown = ", ".join(f"{ratio:.1f}" for ratio in ratios)
        print(
            f"| {name} | {count} | {both[0]:.1f} | {both[1]:.1f} | {median(ratios):.1f} ({shown}) | "
            f"{same} of {count} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
