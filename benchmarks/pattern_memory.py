"""Peak memory of reading attention patterns of three layers, last row only, against `output_attentions=True`.

`python -m benchmarks.pattern_memory`. Every variant runs in a fresh process: one pass to warm up, then one measured.
On a CPU the figure is the peak of resident memory during the measured pass above what was resident before it (Linux,
`/proc/self`; malloc is told to give freed blocks back at once, so that the warm-up hides nothing); on CUDA the peak of
allocated memory above what was allocated before.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.models import LlavaInputs, Size, mid_llava, small_llava
from hooked_mm.hooked import HookedMM
from hooked_mm.runner import Hook

SIZES: dict[str, Callable[[], Size]] = {"small": small_llava, "mid": mid_llava}
LAYERS = (1, 4, 5)
NAMES = [f"blocks.{layer}.attn.hook_pattern" for layer in LAYERS]
MEBI = 2**20
# Blocks from 64 KiB on are mapped, and so unmapped when freed.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def bare(size: Size, inputs: LlavaInputs) -> object:
    """The model's own forward."""
    return size.model(**inputs, logits_to_keep=1)


def all_attentions(size: Size, inputs: LlavaInputs) -> object:
    """Every pattern of every layer, as transformers gives them."""
    size.model.set_attn_implementation("eager")
    return size.model(**inputs, logits_to_keep=1, output_attentions=True).attentions


def whole_patterns(size: Size, inputs: LlavaInputs) -> object:
    """Three layers by name."""
    return HookedMM(size.model, check=False).run_with_cache(last_logits(inputs), NAMES)


def last_rows(size: Size, inputs: LlavaInputs) -> object:
    """Three layers, and of those only what the last position attends to."""
    rows: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Hook) -> None:
        rows[hook.name] = value[:, :, -1].clone()

    HookedMM(size.model, check=False).run_with_hooks(last_logits(inputs), [(NAMES, keep)])
    if list(rows) != NAMES:
        raise RuntimeError(f"read {list(rows)} instead of {NAMES}")
    return rows


def last_logits(inputs: LlavaInputs) -> LlavaInputs:
    """The same inputs with logits for the last position only, as in the other variants."""
    return {**inputs, "logits_to_keep": torch.tensor([-1], device=inputs["input_ids"].device)}


VARIANTS: dict[str, Callable[[Size, LlavaInputs], object]] = {
    "bare forward": bare,
    "output_attentions=True, all layers": all_attentions,
    "ours, 3 layers, whole patterns": whole_patterns,
    "ours, 3 layers, last row": last_rows,
}


def resident(field: str) -> int:
    """Bytes from /proc/self/status: `VmRSS` now, `VmHWM` at most since the last reset."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_of(run: Callable[[], object], device: str) -> int:
    """Bytes at the peak of `run` above those before it; what it returns is alive at the end."""
    run()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
        kept = run()
        peak = resident("VmHWM")
    del kept
    return peak - before


def main() -> None:
    """Print the table, or (with --variant) measure one row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="mid")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        size = SIZES[options.size]()
        size.model.to(options.device)
        inputs = size.batch(options.batch)
        missing = set(NAMES) - set(HookedMM(size.model, check=False).hook_names)
        if missing and options.variant.startswith("ours"):
            sys.exit(f"this version has no hook points {', '.join(sorted(missing))}")
        with torch.no_grad():
            print(peak_of(lambda: VARIANTS[options.variant](size, inputs), options.device))
        return
    device = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    print(
        f"{date.today()}, {device}, Python {platform.python_version()}, torch {version('torch')}, "
        f"transformers {version('transformers')}; {options.size} model, batch {options.batch}, float32\n"
    )
    print("| variant | peak MiB | above bare forward | of output_attentions |\n|---|---|---|---|")
    peaks: dict[str, int] = {}
    for variant in VARIANTS:
        command = [sys.executable, "-m", "benchmarks.pattern_memory", "--variant", variant]
        command += ["--size", options.size, "--batch", str(options.batch), "--device", options.device]
        made = subprocess.run(command, env={**os.environ, **MALLOC}, capture_output=True, text=True, check=False)
        if made.returncode:
            print(f"| {variant} | not measured: {made.stderr.strip().splitlines()[-1]} | | |")
            continue
        peaks[variant] = int(made.stdout.split()[-1])
        above = peaks[variant] - peaks["bare forward"]
        share = ""
        if "output_attentions=True, all layers" in peaks:
            share = f"{above / (peaks['output_attentions=True, all layers'] - peaks['bare forward']):.2f}"
        print(f"| {variant} | {peaks[variant] / MEBI:.1f} | {above / MEBI:.1f} | {share} |", flush=True)


if __name__ == "__main__":
    main()
