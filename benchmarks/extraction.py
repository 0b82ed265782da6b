"""What extraction costs, as ratios to the model's own forward over the same batches, and to the rivals' way.

`python -m benchmarks.extraction`, then `--rivals`, then `--memory`

| method | what runs |
|---|---|
| bare forward | the model's own forward, `logits_to_keep=1`, over batches that lie ready |
| prepare, forward | the same with the pictures and prompts of each batch through the processor first |
| tower | its tower and projector alone, over the same |
| one layer, all layers | `extract` of the last prompt token at the last, at every `resid_post`, from files to store |
| half depth | the same at the block in the middle: blocks above it do not run |
| rivals | batch 1, 50 tokens generated, all hidden states of every step and position kept in memory |
| rivals, given text | batch 1, one forward, all hidden states of every position kept in memory |
| ours, given; generated | `extract` of the mean over the answer at one layer; the text at hand, or 50 tokens |

Every round runs every method once, in random order; ratios pair times of one round. `--memory` runs 500 and 5,000
samples in processes of their own and compares their peak memory.
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
from functools import cached_property
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
from hooked_mm.loading import Batches, BatchMaker
from hooked_mm.selectors import LastPrompt, MeanOver

BATCH = 8
NEW_TOKENS = 50
BARE, PREPARED, TOWER, HALF = "bare forward", "prepare, forward", "tower", "half depth"
RIVALS, RIVALS_GIVEN = "rivals", "rivals, given text"
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

    def __init__(self, samples: int, folder: Path, batch: int = BATCH) -> None:
        self.batch = batch
        size = mid_llava()
        size.model.generation_config.eos_token_id = None  # every generation has its full length
        size.model.generation_config.pad_token_id = 0
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = HookedMM(size.model.to(self.device), processor_of(size.model.config), check=False)
        self.folder, self.samples = folder, samples_of(samples, folder)
        self.layers = self.model.cfg.n_layers
        self.batches = Batches(BatchMaker(self.samples, self.model, "none"), range(samples), batch)

    @cached_property
    def inputs(self) -> list[dict[str, Any]]:
        """Batches that lie ready."""
        return [made.batch.to(self.device).inputs for made in self.batches if made.batch is not None]

    @torch.no_grad()
    def bare(self) -> None:
        """The model's own forward."""
        for inputs in self.inputs:
            self.model.hf_model(**inputs, logits_to_keep=1)
        self.wait()

    @torch.no_grad()
    def prepared(self) -> None:
        """What one would write by hand for the same samples, if nothing were kept."""
        for made in self.batches:
            assert made.batch is not None
            self.model.hf_model(**made.batch.to(self.device).inputs, logits_to_keep=1)
        self.wait()

    @torch.no_grad()
    def tower(self) -> None:
        """The part of it before the decoder."""
        for inputs in self.inputs:
            self.model.hf_model.model.get_image_features(inputs["pixel_values"])
        self.wait()

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def ours(self, hooks: str, **settings: Any) -> Callable[[], None]:
        """An extraction into a fresh store."""

        def run() -> None:
            path = self.folder / "store"
            shutil.rmtree(path, ignore_errors=True)
            options: dict[str, Any] = {"selector": LastPrompt(), "answer": "none", **settings}
            accelerator = {"cuda": "gpu"}.get(self.device, "cpu")
            extract(
                Extractor(self.model, hooks, **options),
                SampleDataModule(self.samples, self.batch),
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

    def methods(self, rivals: bool) -> dict[str, Callable[[], None]]:
        """What is timed, by name."""
        last, middle = self.layers - 1, self.layers // 2 - 1
        answer = {"selector": MeanOver(role="answer")}
        one = f"blocks.{last}.hook_resid_post"
        if rivals:
            return {
                BARE: self.bare,
                RIVALS: self.rivals(generate=True),
                RIVALS_GIVEN: self.rivals(generate=False),
                "ours, given": self.ours(one, answer="given", **answer),
                "ours, generated": self.ours(one, answer="generated", max_new_tokens=NEW_TOKENS, **answer),
            }
        return {
            BARE: self.bare,
            PREPARED: self.prepared,
            TOWER: self.tower,
            "one layer": self.ours(one),
            "all layers": self.ours("blocks.*.hook_resid_post"),
            HALF: self.ours(f"blocks.{middle}.hook_resid_post"),
        }


def table(times: dict[str, np.ndarray], samples: int) -> str:
    """Rates and ratios, method by method."""
    rivals = [name for name in (RIVALS, RIVALS_GIVEN) if name in times]
    lines = ["| method | samples/s | time / bare forward |" + "".join(f" time of {name} / this |" for name in rivals)]
    lines.append("|---" * (3 + len(rivals)) + "|")
    for name, values in times.items():
        over = "".join(f" {median_ratio(times[r], values) if name.startswith('ours') else ''} |" for r in rivals)
        rate = samples / float(np.median(values))
        lines.append(f"| {name} | {rate:.1f} | {median_ratio(values, times[BARE])} |{over}")
    if HALF in times:
        bound = times[TOWER] + (times[BARE] - times[TOWER]) / 2
        lines.append(f"\nhalf depth / (tower + half the decoder): {median_ratio(times[HALF], bound)}")
    return "\n".join(lines)


def peak_memory(samples: int) -> float:
    """Peak resident memory in MB of a process that extracts so many samples, in shards of 0.2 MB."""
    command = [sys.executable, "-m", "benchmarks.extraction", "--peak", str(samples)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["peak"])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--rivals", action="store_true", help="compare with the rivals' way instead")
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
        bench = Bench(options.samples, Path(folder), options.batch)
        methods = bench.methods(options.rivals)
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
    print(f"{options.samples} samples, batches of {options.batch}, {options.rounds} rounds\n")
    print(table({name: np.array(values) for name, values in taken.items()}, options.samples))


if __name__ == "__main__":
    main()
