"""A 7B-shaped model in bfloat16 through reading, steered generation and attention patterns, beside the bare model.

`python -m benchmarks.seven_b` needs a GPU with 24 GB: LLaVA-1.5-7B's configuration with random weights, made on the
GPU, nothing is downloaded. `--size mid` runs the same on a CPU, where peaks are of resident memory in one process and
say less (freed blocks may stay). Peaks are above what was allocated before, weights included there; rates are medians.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, GenerationConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from benchmarks.models import LlavaInputs, Size, llava_batch, mid_llava
from benchmarks.pattern_memory import MEBI, last_logits, peak_of
from hooked_mm.hooked import HookedMM
from hooked_mm.interventions import Add
from hooked_mm.runner import Hook

TOKENS = 20
"""Generated per sample."""


def seven_b(device: str = "cuda", seed: int = 0) -> Size:
    """LLaVA-1.5-7B's configuration, bfloat16, random weights made on the device; 40 text positions a prompt."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
            projection_dim=768,
        ),
        text_config=LlamaConfig(
            vocab_size=32064,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
            max_position_embeddings=4096,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
        ),
        image_token_id=32000,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=576,
        tie_word_embeddings=False,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(seed)
            model = LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    return Size("7B-shaped", model.requires_grad_(False).eval(), 40)


class Cases:
    """What is measured; each returns what it would hand on, and is run on tensors that are there already.

    Args:
        size: The model.
        samples: In the batch that is read and answered.
        positions: Of the one sample whose patterns are read.
    """

    def __init__(self, size: Size, samples: int, positions: int) -> None:
        model, device = size.model, size.model.device
        # Steps are counted, so no token ends an answer.
        model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=None)
        self.model, self.hooked = model, HookedMM(model, check=False)
        made = llava_batch(model.config, samples, size.text_positions)
        one = llava_batch(model.config, 1, positions - model.config.image_seq_length)
        self.batch, self.long = (self._on(inputs, device, model.dtype) for inputs in (made, one))
        layers = self.hooked.cfg.n_layers
        self.read_layers = [f"blocks.{layer}.hook_resid_post" for layer in range(0, layers, max(1, layers // 4))]
        self.patterns = [f"blocks.{layer}.attn.hook_pattern" for layer in (1, layers // 2, layers - 1)]
        direction = torch.randn(self.hooked.cfg.d_model, generator=torch.Generator().manual_seed(0))
        self.push = Add(f"blocks.{layers // 2}.hook_resid_post", direction, alpha=4.0, at="generated")

    @staticmethod
    def _on(inputs: LlavaInputs, device: torch.device, dtype: torch.dtype) -> LlavaInputs:
        return {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in inputs.items()}

    def bare(self) -> object:
        return self.model(**self.batch, logits_to_keep=1).logits

    def read(self) -> object:
        """The stream of every fourth part of the layers at all positions, brought to the CPU."""
        _, cache = self.hooked.run_with_cache(last_logits(self.batch), self.read_layers)
        return {name: cache[name].to("cpu") for name in self.read_layers}

    def answer(self) -> object:
        return self.model.generate(**self.batch, max_new_tokens=TOKENS, do_sample=False)

    def steered(self) -> object:
        with self.hooked.hooks([self.push]):
            return self.hooked.generate(self.batch, TOKENS).tokens

    def long_bare(self) -> object:
        return self.model(**self.long, logits_to_keep=1).logits

    def whole_patterns(self) -> object:
        return self.hooked.run_with_cache(last_logits(self.long), self.patterns)

    def last_rows(self) -> object:
        """Of each pattern what the last position attends to."""
        rows: dict[str, Tensor] = {}

        def keep(value: Tensor, hook: Hook) -> None:
            rows[hook.name] = value[:, :, -1].clone()

        self.hooked.run_with_hooks(last_logits(self.long), [(self.patterns, keep)])
        return rows

    def table(self) -> list[tuple[str, str, Callable[[], object], int, str]]:
        """(what, beside what, how, how many of the unit one run makes, the unit)."""
        samples, length = self.batch["input_ids"].shape
        long, unit = self.long["input_ids"].shape[1], "positions/s"
        answers, beside = (samples * TOKENS, "tokens/s"), f"bare forward, {long} positions"
        return [
            ("bare forward", "", self.bare, samples * length, unit),
            (f"stream of {len(self.read_layers)} layers", "bare forward", self.read, samples * length, unit),
            ("bare generation", "", self.answer, *answers),
            ("generation with steering", "bare generation", self.steered, *answers),
            (beside, "", self.long_bare, long, unit),
            ("patterns of 3 layers, last rows", beside, self.last_rows, long, unit),
            ("patterns of 3 layers, whole", beside, self.whole_patterns, long, unit),
        ]


def seconds_of(run: Callable[[], object], rounds: int, device: str) -> float:
    """The median of so many runs."""
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def main() -> None:
    """Print the table, a row at a time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=["7b", "mid"], default="7b")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--positions", type=int, help="of the sample whose patterns are read (2900; mid: 500)")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.size == "7b" and device == "cpu":
        sys.exit("a 7B-shaped model needs a GPU with 24 GB, and there is none; --size mid runs the same on a CPU")
    size = seven_b() if options.size == "7b" else mid_llava()
    size.model.to(device)
    name = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    weights = sum(weight.numel() * weight.element_size() for weight in size.model.parameters())
    print(
        f"{date.today()}, {name}, Python {platform.python_version()}, torch {version('torch')}, transformers "
        f"{version('transformers')}; {size.name} model, {str(size.model.dtype).removeprefix('torch.')}, weights "
        f"{weights / MEBI:,.0f} MiB, {options.samples} samples, {options.rounds} rounds\n"
    )
    print("| what | peak MiB above weights | rate | of the bare rate |\n|---|--:|--:|--:|")
    rates: dict[str, float] = {}
    cases = Cases(size, options.samples, options.positions or (2900 if options.size == "7b" else 500))
    with torch.no_grad():
        for what, beside, run, count, unit in cases.table():
            peak = peak_of(run, device)
            rates[what] = count / seconds_of(run, options.rounds, device)
            share = f"{rates[what] / rates[beside]:.2f}" if beside else ""
            print(f"| {what} | {peak / MEBI:,.1f} | {rates[what]:,.0f} {unit} | {share} |", flush=True)


if __name__ == "__main__":
    main()
