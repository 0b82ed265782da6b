"""Peak memory of attention views of a 20-token answer at 2,900 positions, two layers, against keeping all attention.

`python -m benchmarks.attention_memory`. Every variant runs in a fresh process, measured as in `pattern_memory`: the
peak of resident memory during a pass above what was resident before it. *Keeping all attention* is what
`output_attentions=True` does, in one pass over prompt and answer, or while the answer is generated (LVLM-Interpret's
way), or the pattern of every layer in a cache of ours. The views are `answer_attention`: the rows that predict the 20
tokens. Each variant's heads x layers means over the image are held against the first one's.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from analyses.attention_views import answer_attention, column_mean
from benchmarks.models import LlavaInputs, Size, long_llava
from benchmarks.pattern_memory import MALLOC, MEBI, peak_of
from hooked_mm.batch import Batch, Role
from hooked_mm.hooked import HookedMM

ANSWER = 20
LAYERS = (5, 10)
ALL = "output_attentions=True, one pass"


def _batch(model: HookedMM, inputs: LlavaInputs) -> Batch:
    """The inputs with roles: the last tokens are the answer."""
    made = model._batch(inputs)
    role = torch.full_like(made.role, int(Role.QUESTION)).masked_fill(made.modality != 1, int(Role.NONE))
    role[:, -ANSWER:] = int(Role.ANSWER)
    return replace(made, role=role)


def _prompt(inputs: LlavaInputs) -> LlavaInputs:
    """The inputs without the answer."""
    return {name: value[:, :-ANSWER] if value.ndim == 2 else value for name, value in inputs.items()}


def _means(rows: list[Tensor], inputs: LlavaInputs) -> Tensor:
    """Means over the image's columns, (tokens, layers, heads), of rows (tokens, heads, keys) per layer."""
    image = (inputs["input_ids"][0] == 4).expand(ANSWER, -1)
    return torch.stack([column_mean(layer, image[:, : layer.shape[-1]]) for layer in rows], dim=1)


def bare(size: Size, inputs: LlavaInputs) -> object:
    """The model's own forward."""
    return size.model(**inputs, logits_to_keep=1)


def all_attentions(size: Size, inputs: LlavaInputs) -> object:
    """Every pattern of every layer, as transformers gives them."""
    size.model.set_attn_implementation("eager")
    found = size.model(**inputs, logits_to_keep=1, output_attentions=True).attentions
    return found, _means([found[layer][0, :, -ANSWER - 1 : -1].transpose(0, 1) for layer in LAYERS], inputs)


def while_generating(size: Size, inputs: LlavaInputs) -> object:
    """All attention of all steps of a generation."""
    size.model.set_attn_implementation("eager")
    options = {"max_new_tokens": ANSWER, "min_new_tokens": ANSWER, "do_sample": False}
    return size.model.generate(**_prompt(inputs), **options, output_attentions=True, return_dict_in_generate=True)


def whole_patterns(size: Size, inputs: LlavaInputs) -> object:
    """The patterns of all layers, in a cache of ours."""
    model = HookedMM(size.model, check=False)
    _, cache = model.run_with_cache(inputs, "blocks.*.attn.hook_pattern", logits_to_keep=1)
    found = [cache[f"blocks.{layer}.attn.hook_pattern"][0, :, -ANSWER - 1 : -1].transpose(0, 1) for layer in LAYERS]
    return cache, _means(found, inputs)


def views(size: Size, inputs: LlavaInputs) -> object:
    """The rows that predict the answer, two layers."""
    model = HookedMM(size.model, check=False)
    found = answer_attention(model, _batch(model, inputs), layers=LAYERS)
    return found, found.by_head("image")


def generated_views(size: Size, inputs: LlavaInputs) -> object:
    """A generation, and then the views of what it said."""
    model = HookedMM(size.model, check=False)
    tokens = model.generate(_prompt(inputs), ANSWER, min_new_tokens=ANSWER).tokens
    answered = {**inputs, "input_ids": torch.cat([inputs["input_ids"][:, :-ANSWER], tokens], dim=1)}
    return answer_attention(model, _batch(model, answered), layers=LAYERS)


VARIANTS: dict[str, Callable[[Size, LlavaInputs], object]] = {
    "bare forward": bare,
    ALL: all_attentions,
    "output_attentions=True, while generating": while_generating,
    "ours, hook_pattern of all layers": whole_patterns,
    "ours, views of 2 layers": views,
    "ours, generation and views of 2 layers": generated_views,
}


def measure(variant: str, file: Path) -> None:
    """Print a variant's peak in bytes; write its means, if it has any."""
    size = long_llava()
    inputs = size.batch(1)
    kept: list[object] = []

    def run() -> object:
        kept[:] = [VARIANTS[variant](size, inputs)]
        return kept[0]

    with torch.no_grad():
        print(peak_of(run, "cpu"))
    if isinstance(kept[0], tuple):
        save_file({"means": kept[0][1].contiguous()}, file)


def main() -> None:
    """Print the table, or (with --variant) measure one row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--means", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        measure(options.variant, options.means)
        return
    print(
        f"{date.today()}, {platform.processor() or platform.machine()} CPU ({os.cpu_count()} cores), Python "
        f"{platform.python_version()}, torch {version('torch')}, transformers {version('transformers')}\n"
    )
    print("| variant | peak MiB | of output_attentions | means differ by |\n|---|---|---|---|")
    peaks: dict[str, int] = {}
    first: Tensor | None = None
    with tempfile.TemporaryDirectory() as folder:
        for number, variant in enumerate(VARIANTS):
            file = Path(folder) / f"{number}.safetensors"
            command = [sys.executable, "-m", "benchmarks.attention_memory", "--variant", variant, "--means", str(file)]
            made = subprocess.run(command, env={**os.environ, **MALLOC}, capture_output=True, text=True, check=False)
            if made.returncode:
                print(f"| {variant} | not measured: {made.stderr.strip().splitlines()[-1]} | | |")
                continue
            peaks[variant] = int(made.stdout.split()[-1])
            means = load_file(file)["means"] if file.exists() else None
            first = means if first is None else first
            apart = "" if means is None or first is None else f"{float((means - first).abs().max() / first.max()):.0e}"
            share = f"{peaks[variant] / peaks[ALL]:.3f}" if ALL in peaks else ""
            print(f"| {variant} | {peaks[variant] / MEBI:.1f} | {share} | {apart} |", flush=True)


if __name__ == "__main__":
    main()
