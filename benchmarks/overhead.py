"""What reading the residual stream costs, as ratios to the model's own forward in the same run.

`python -m benchmarks.overhead --cases small:1 small:8 mid:1 mid:8`

The denominator, *bare forward*, is the model's own forward with `logits_to_keep=1`, sdpa attention and no gradients.
Every round runs every method once, in random order; a ratio pairs a method's time with the bare forward's of the same
round. The table shows the median of the ratios with a 95 % interval (bootstrap over rounds). TransformerLens is
measured where it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.models import LlavaInputs, Size, mid_llava, small_llava
from hooked_mm.batch import batch_from_inputs
from hooked_mm.hooked import HookedMM

Method = Callable[[], object]
SIZES: dict[str, Callable[[], Size]] = {"small": small_llava, "mid": mid_llava}
BARE = "bare forward"
TOWER, DECODER = "tower and projector", "decoder"
OURS, OURS_HALF = "ours, logits_to_keep=1", "ours, stop_at_layer at half depth"


@dataclass(frozen=True)
class Ratio:
    """A median with its 95 % interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def median_ratio(
    above: Float[np.ndarray, " rounds"], below: Float[np.ndarray, " rounds"], draws: int = 2000, seed: int = 0
) -> Ratio:
    """Median of above / below over rounds, and its percentile bootstrap interval."""
    ratios = above / below
    picked = np.random.default_rng(seed).integers(0, len(ratios), (draws, len(ratios)))
    low, high = np.quantile(np.median(ratios[picked], axis=1), [0.025, 0.975])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def time_rounds(
    methods: dict[str, Method], rounds: int, seconds: float, device: str, seed: int = 0
) -> dict[str, Float[np.ndarray, " rounds"]]:
    """Seconds each method took in each round: at least `rounds` rounds, and more until `seconds` have passed."""
    rng = np.random.default_rng(seed)
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    taken: dict[str, list[float]] = {name: [] for name in methods}
    for name in [*methods, *methods]:  # warm-up
        methods[name]()
    began = time.perf_counter()
    while len(taken[BARE]) < rounds or time.perf_counter() - began < seconds:
        for name in rng.permutation(list(methods)):
            wait()
            started = time.perf_counter()
            methods[name]()
            wait()
            taken[name].append(time.perf_counter() - started)
    return {name: np.array(times) for name, times in taken.items()}


def with_raw_hooks(model: Any, inputs: LlavaInputs) -> list[Tensor]:
    """All resid_post by PyTorch hooks, as one would write it by hand."""
    kept: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(keep) for layer in model.model.language_model.layers]
    try:
        model(**inputs, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return kept


def methods(size: Size, inputs: LlavaInputs) -> dict[str, Method]:
    """Every row of the table by name, and the parts of the bare forward that the target of the last row is made of."""
    # The proof at load is not what is measured here.
    model, ours = size.model, HookedMM(size.model, check=False)
    batch = batch_from_inputs(inputs, ours.structure, model.config)
    layers, decoder = ours.cfg.n_layers, model.model.language_model
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(layers)]
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    found: dict[str, Method] = {
        BARE: lambda: model(**inputs, logits_to_keep=1),
        "bare forward, all logits": lambda: model(**inputs),
        "output_hidden_states=True": lambda: model(**inputs, logits_to_keep=1, output_hidden_states=True),
        "PyTorch hooks, all resid_post": lambda: with_raw_hooks(model, inputs),
        "ours, all resid_post, all logits": lambda: ours.run_with_cache(batch, names),
        OURS: lambda: ours.run_with_cache(batch, names, logits_to_keep=1),
        OURS_HALF: lambda: ours.run_with_cache(batch, names[: layers // 2], stop_at_layer=layers // 2),
        TOWER: lambda: model.model.get_image_features(inputs["pixel_values"]),
        DECODER: lambda: decoder(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]),
    }
    if importlib.util.find_spec("transformer_lens"):
        from benchmarks.bridge import bridge

        bridged, rest = bridge(model), {name: value for name, value in inputs.items() if name != "input_ids"}
        found["TransformerLens, all resid_post"] = lambda: bridged.run_with_cache(
            inputs["input_ids"], names_filter=names, logits_to_keep=1, **rest
        )
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=["small:1", "small:8", "mid:1"], help="size:batch")
    parser.add_argument("--pairs", type=int, default=30, help="rounds at least")
    parser.add_argument("--seconds", type=float, default=15, help="of rounds at least, for each case")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rival = importlib.util.find_spec("transformer_lens") is not None
    packages = ["torch", "transformers", "nnsight", *(["transformer-lens"] if rival else [])]
    device = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    print(
        f"{date.today()}, {device}, {options.threads} thread(s), Python {platform.python_version()}, "
        f"{', '.join(f'{name} {version(name)}' for name in packages)}; float32, at least {options.pairs} rounds\n"
    )
    print("| model | batch | method | ms | time / bare [95 % interval] | target |\n|---|---|---|---|---|---|")
    for case in options.cases:
        name, samples = case.split(":")
        size = SIZES[name]()
        size.model.to(options.device)
        with torch.no_grad():
            inputs = size.batch(int(samples))
            taken = time_rounds(methods(size, inputs), options.pairs, options.seconds, options.device)
        half = 1.05 * median_ratio(taken[TOWER] + taken[DECODER] / 2, taken[BARE]).median
        targets = {OURS: "1.05" if name == "mid" else "", OURS_HALF: f"{half:.3f}"}
        for method, times in taken.items():
            print(
                f"| {name} | {samples} | {method} | {1000 * np.median(times):.1f} | "
                f"{median_ratio(times, taken[BARE])} | {targets.get(method, '')} |",
                flush=True,
            )
    print("\nThe target at half depth is 1.05 x (tower and projector + half of the decoder).")
    if not rival:
        print("TransformerLens is not installed here, so its row is missing.")


if __name__ == "__main__":
    main()
