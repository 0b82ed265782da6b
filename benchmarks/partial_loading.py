"""Time, peak memory and bytes of loading only what a job needs, against loading the whole model.

`python -m benchmarks.partial_loading`. A LLaVA of random weights (bfloat16, by default 380 million parameters) is saved
in shards; every variant then loads it in a fresh process and computes: words' logits of 20 directions, or the logits of
16 tokens of text. Seconds are medians, imports not counted; memory is the peak of resident memory above that before
loading (Linux, `/proc/self`), pages of mapped files included.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig

from benchmarks.pattern_memory import MEBI, resident
from hooked_mm.hooked import HookedMM
from hooked_mm.without_tower import without_tower

WIDTH, WORDS = 1024, 32064
Found = tuple[Tensor, int]


def directions() -> Tensor:
    """Twenty of them."""
    return torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(0))


def tokens() -> Tensor:
    """A text of sixteen."""
    return torch.arange(100, 116)[None]


def size_of(folder: Path) -> int:
    """Bytes of all tensors."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return int(index["metadata"]["total_size"])


def whole_words(folder: Path) -> Found:
    model = HookedMM(AutoModelForImageTextToText.from_pretrained(folder), check=False)
    return model.to_logits(directions()), size_of(folder)


def unembedding_words(folder: Path) -> Found:
    found = HookedMM.unembedding(folder)
    return found.to_logits(directions()), found.bytes_read


def whole_text(folder: Path) -> Found:
    model = AutoModelForImageTextToText.from_pretrained(folder)
    return model(input_ids=tokens()).logits, size_of(folder)


def text_without_tower(folder: Path) -> Found:
    model, checkpoint = without_tower(folder)
    return model(input_ids=tokens()).logits, checkpoint.bytes_read


VARIANTS: dict[str, Callable[[Path], Found]] = {
    "words, whole model": whole_words,
    "words, `HookedMM.unembedding`": unembedding_words,
    "text, whole model": whole_text,
    "text, `tower=False`": text_without_tower,
}


def save(folder: Path, layers: int) -> None:
    """A random LLaVA in shards."""
    heads = {"num_hidden_layers": layers, "num_attention_heads": 16, "hidden_size": WIDTH}
    config = LlavaConfig(
        text_config=LlamaConfig(**heads, intermediate_size=2816, vocab_size=WORDS),
        vision_config=CLIPVisionConfig(**heads, intermediate_size=4096, image_size=336, patch_size=14),
        image_token_index=WORDS - 1,
    )
    AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="80MB")


def measure(variant: str, folder: Path) -> dict[str, object]:
    """Of this process: seconds, bytes at the peak, bytes read, and a sum of the logits to compare by."""
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
    begun = time.perf_counter()
    with torch.no_grad():
        logits, read = VARIANTS[variant](folder)
    seconds = time.perf_counter() - begun
    return {
        "seconds": seconds,
        "peak": resident("VmHWM") - before,
        "read": read,
        "sum": float(logits.double().abs().sum()),
    }


def main() -> None:
    """Print the table, or (with --variant) measure one row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12, help="of the text and of the tower")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        print(json.dumps(measure(options.variant, options.folder)))
        return
    print(
        f"{date.today()}, {platform.machine()}, Python {platform.python_version()}, torch {version('torch')}, "
        f"transformers {version('transformers')}; {options.layers} layers, bfloat16, {options.rounds} rounds\n"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(folder, options.layers)
        shards = len(list(folder.glob("*.safetensors")))
        runs: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
        for _ in range(options.rounds):
            for variant, found in runs.items():
                command = [sys.executable, "-m", "benchmarks.partial_loading", "--variant", variant]
                made = subprocess.run(
                    [*command, "--folder", name], capture_output=True, text=True, check=True
                ).stdout.splitlines()[-1]
                found.append(json.loads(made))
        print(f"{shards} shards, {size_of(folder) / MEBI:.0f} MiB\n")
    print("| job | MiB read | peak MiB | seconds | same logits |\n|---|---|---|---|---|")
    whole: dict[str, float] = {}
    for variant, found in runs.items():
        job = variant.split(",")[0]
        whole.setdefault(job, found[0]["sum"])
        peak, seconds = (statistics.median(one[part] for one in found) for part in ("peak", "seconds"))
        same = "yes" if all(one["sum"] == whole[job] for one in found) else "no"
        print(f"| {variant} | {found[0]['read'] / MEBI:.1f} | {peak / MEBI:.0f} | {seconds:.2f} | {same} |", flush=True)


if __name__ == "__main__":
    main()
