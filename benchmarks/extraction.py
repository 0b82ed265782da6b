"""What extraction costs, as ratios to the model's own forward over the same samples, and to the rivals' way.

`python -m benchmarks.extraction --samples 64 --rounds 5`

| method | what runs |
|---|---|
| bare forward | pictures and prompts through the processor, then the model's own forward, `logits_to_keep=1` |
| one layer, all layers | `extract` of the last prompt token at the last, at every `resid_post`, into a store on disk |
| half depth | the same at the block in the middle: blocks above it do not run |
| rivals, given | batch 1: one forward with all hidden states of every position, kept in memory until the end |
| rivals, generated | batch 1: 50 tokens generated, all hidden states of every step and position kept |
| ours, given; generated | `extract` of the mean over the answer at one layer; the same text, or 50 tokens |

Every round runs every method once, in random order; ratios pair times of one round. `--memory` runs 500 and 5,000
samples in processes of their own and prints their peak memory.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlavaImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from benchmarks.models import mid_llava
from benchmarks.overhead import median_ratio
from hooked_mm.data import Sample, SampleDataModule
from hooked_mm.extraction import Extractor
from hooked_mm.extraction_job import extract
from hooked_mm.hooked import HookedMM
from hooked_mm.selectors import LastPrompt, MeanOver

BATCH = 8
NEW_TOKENS = 50
BARE, RIVALS_GIVEN, RIVALS_GENERATED = "bare forward", "rivals, given", "rivals, generated"
TEMPLATE = (
    "{% for m in messages %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image> {% else %}{{ p['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} answer {% endif %}"
)


def processor_of(config: Any) -> LlavaProcessor:
    """A real processor that fits the mid-size model: a word is a token."""
    words = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "<image>", "answer"])}
    words |= {f"w{number}": number for number in range(len(words), config.get_text_config().vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    side = config.vision_config.image_size
    size = {"height": side, "width": side}
    return LlavaProcessor(
        image_processor=LlavaImageProcessorPil(size={"shortest_edge": side}, crop_size=size),
        tokenizer=fast,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
        image_token="<image>",
    )


def samples_of(count: int, folder: Path, seed: int = 0) -> list[Sample]:
    """Questions of 10 to 40 words about JPEG photographs of noise, each with an answer of 8 words."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        path = folder / f"{number % 64:04d}.jpg"
        if not path.exists():
            Image.fromarray(rng.integers(0, 256, (240, 320, 3), dtype=np.uint8)).save(path)
        words = [f"w{n}" for n in rng.integers(10, 8000, int(rng.integers(10, 41)))]
        answer = " ".join(f"w{n}" for n in rng.integers(10, 8000, 8))
        made.append(Sample(f"s{number}", path, " ".join(words), answer))
    return made


class Bench:
    """The mid-size model, its samples, and what is timed."""

    def __init__(self, samples: int, folder: Path) -> None:
        size = mid_llava()
        size.model.generation_config.eos_token_id = None  # every generation has its full length
        size.model.generation_config.pad_token_id = 0
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = HookedMM(size.model.to(self.device), processor_of(size.model.config), check=False)
        self.folder, self.samples = folder, samples_of(samples, folder)
        self.layers = self.model.cfg.n_layers

    def bare(self) -> None:
        """The model's own forward."""
        for start in range(0, len(self.samples), BATCH):
            part = self.samples[start : start + BATCH]
            batch = self.model.prepare([s.images for s in part], [s.text for s in part])
            with torch.no_grad():
                self.model.hf_model(**batch.inputs, logits_to_keep=1)

    def ours(self, hooks: str, **settings: Any) -> Callable[[], None]:
        """An extraction into a fresh store."""

        def run() -> None:
            path = self.folder / "store"
            shutil.rmtree(path, ignore_errors=True)
            options: dict[str, Any] = {"selector": LastPrompt(), "answer": "none", **settings}
            accelerator = {"cuda": "gpu"}.get(self.device, "cpu")
            extract(
                Extractor(self.model, hooks, **options),
                SampleDataModule(self.samples, BATCH),
                path,
                accelerator=accelerator,
            )

        return run

    def rivals(self, generate: bool) -> Callable[[], None]:
        """One sample at a time, everything kept."""

        def run() -> None:
            kept = []
            for sample in self.samples:
                answer = None if generate else [sample.answer]
                batch = self.model.prepare([sample.images], [sample.text], answer)
                with torch.no_grad():
                    if generate:
                        out = self.model.hf_model.generate(
                            **batch.inputs,
                            max_new_tokens=NEW_TOKENS,
                            do_sample=False,
                            output_hidden_states=True,
                            return_dict_in_generate=True,
                        )
                        kept.append([[layer.cpu() for layer in step] for step in out.hidden_states])
                    else:
                        out = self.model.hf_model(**batch.inputs, output_hidden_states=True)
                        kept.append([layer.cpu() for layer in out.hidden_states])

        return run

    def methods(self) -> dict[str, Callable[[], None]]:
        """What is timed, by name."""
        last, middle = self.layers - 1, self.layers // 2 - 1
        answer = {"selector": MeanOver(role="answer")}
        one = f"blocks.{last}.hook_resid_post"
        return {
            BARE: self.bare,
            "one layer": self.ours(one),
            "all layers": self.ours("blocks.*.hook_resid_post"),
            "half depth": self.ours(f"blocks.{middle}.hook_resid_post"),
            RIVALS_GIVEN: self.rivals(generate=False),
            "ours, given": self.ours(one, answer="given", **answer),
            RIVALS_GENERATED: self.rivals(generate=True),
            "ours, generated": self.ours(one, answer="generated", max_new_tokens=NEW_TOKENS, **answer),
        }


def peak_memory(samples: int) -> float:
    """Peak resident memory in MB of a process that extracts so many samples, in shards of 8 MB."""
    command = [sys.executable, "-m", "benchmarks.extraction", "--peak", str(samples)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["peak"])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="compare the peaks of 500 and 5,000 samples instead")
    parser.add_argument("--peak", type=int, help="extract so many samples and print this process's peak memory")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.peak:
            bench = Bench(options.peak, Path(folder))
            path = Path(folder) / "store"
            extractor = Extractor(bench.model, "blocks.0.hook_resid_post", LastPrompt(), "none")
            extract(extractor, SampleDataModule(bench.samples, BATCH), path, megabytes_per_shard=0.2)
            print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
            return
        if options.memory:
            few, many = peak_memory(500), peak_memory(5000)
            print(f"peak memory: {few:.0f} MB for 500 samples, {many:.0f} MB for 5,000: {many / few:.3f}")
            return
        bench = Bench(options.samples, Path(folder))
        methods = bench.methods()
        taken: dict[str, list[float]] = {name: [] for name in methods}
        methods[BARE]()
        rng = np.random.default_rng(0)
        for _ in range(options.rounds):
            for name in rng.permutation(list(methods)):
                started = time.perf_counter()
                methods[name]()
                taken[name].append(time.perf_counter() - started)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "nnsight", "lightning"))
    print(f"{date.today()}, {device}, Python {platform.python_version()}, {packages}")
    print(f"{options.samples} samples, batches of {BATCH}, {options.rounds} rounds\n")
    print("| method | samples/s | time / bare forward | rivals' time / this |\n|---|---|---|---|")
    times = {name: np.array(values) for name, values in taken.items()}
    for name, values in times.items():
        rival = {"ours, given": RIVALS_GIVEN, "ours, generated": RIVALS_GENERATED}.get(name)
        faster = str(median_ratio(times[rival], values)) if rival else ""
        rate = options.samples / float(np.median(values))
        print(f"| {name} | {rate:.1f} | {median_ratio(values, times[BARE])} | {faster} |")


if __name__ == "__main__":
    main()
