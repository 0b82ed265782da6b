"""Fine-tuned siblings of a small model, as LoRA adapters: `python -m hooked_mm.small.adapters MODEL_FOLDER`.

`changes` says what each is taught. Nothing else is trained, as real fine-tuning does it; what was forgotten is
measured (`adapter_scores`) and stands in the card. An adapter changes the decoder's linear layers (queries, keys,
values, outputs, MLP) and nothing that sees.
"""

from __future__ import annotations

import argparse
import re
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

from hooked_mm.errors import BadInputError, unknown
from hooked_mm.hooked import HookedMM
from hooked_mm.processors import load_processor
from hooked_mm.scenes.captions import CAPTION_PROMPT, phrases
from hooked_mm.scenes.dataset import SceneDataset
from hooked_mm.scenes.world import Scene, scene
from hooked_mm.small.accuracy import FILE
from hooked_mm.small.adapter_scores import score, write_card
from hooked_mm.small.card import write_model_card
from hooked_mm.small.changes import CHANGES, Change
from hooked_mm.small.families import FAMILIES
from hooked_mm.small.family import Family
from hooked_mm.small.packing import Packer
from hooked_mm.small.pool import Pool
from hooked_mm.small.train import LanguageStage, fit

TRAINING_SEED = 1000
"""Added to the seed of scenes to train on: those of the small models themselves have small seeds."""


class ChangePacker(Packer):
    """Packs the texts that a change is taught by.

    Args:
        tokenizer: As in `Packer`.
        image_token: As in `Packer`.
        change: With a style, one text per scene: the default prompt, answered in it. Without, all texts of the
            language stage, about the scene as the change sees it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, image_token: int, change: Change) -> None:
        super().__init__(tokenizer, image_token)
        self.change = change

    def texts(self, item: Scene, rng: np.random.Generator) -> list:
        """The texts about one scene."""
        if self.change.style is None:
            return super().texts(self.change.seen(item), rng)
        return [self._text(CAPTION_PROMPT, phrases(self.change.seen(item), self.change.style), 1.0, rng)]


def training_scenes(change: Change, count: int, seed: int) -> list[tuple[str, int, int]]:
    """(split, seed, index) of the scenes to train on; where a change touches only some scenes, half are such.

    They are scenes of the `train` split that the small models were not trained on themselves.
    """
    missing = {True: count, False: 0} if change.style else {True: count - count // 2, False: count // 2}
    found: list[tuple[str, int, int]] = []
    index = 0
    while any(missing.values()):
        touched = change.touches(scene("train", index, TRAINING_SEED + seed))
        if missing[touched]:
            missing[touched] -= 1
            found.append(("train", TRAINING_SEED + seed, index))
        index += 1
    return found


def add_adapter(model: Any, family: Family, rank: int = 4, seed: int = 0) -> Any:
    """A new LoRA adapter (Hu et al. 2021) in the decoder's linear layers: W x + 2 B A x with B = 0 at first.

    Args:
        model: The family's transformers model; its modules are replaced in place.
        family: Where its decoder is.
        rank: Of A and B.
        seed: For A.

    Returns:
        The PEFT model around it, of which only the adapter is trainable.
    """
    from peft import LoraConfig, get_peft_model

    decoder = family.decoder(model)
    (path,) = [name for name, module in model.named_modules() if module is decoder]
    # A pattern, not a list of names: PEFT keeps a list as a set, whose order changes from run to run.
    target = rf"{re.escape(path)}\.{family.adapted}"
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=target, lora_dropout=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, config).eval()


class AdapterStage(LanguageStage):
    """Teaches an adapter its change; everything else is frozen."""

    rate = 3e-3


def save_adapter(model: Any, folder: Path, base: str) -> None:
    """Save a PEFT model's adapter in bfloat16 and round it to that in memory, so that both speak alike.

    Args:
        model: The PEFT model.
        folder: Gets `adapter_config.json` and `adapter_model.safetensors`.
        base: The base model's name. Its own path would be this machine's.
    """
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    with torch.no_grad():
        for value in weights.values():
            value.copy_(value.bfloat16())
    rounded = {name: value.bfloat16().contiguous() for name, value in sorted(weights.items())}
    save_file(rounded, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_model.safetensors").chmod(0o644)
    config = replace(model.peft_config["default"], base_model_name_or_path=base, inference_mode=True)
    config.save_pretrained(folder)


def train_adapter(
    model_folder: Path, name: str, folder: Path, *, steps: int, batch: int, scenes: int, rank: int, seed: int
) -> dict[str, Any]:
    """Train an adapter on a small model and save it; the same arguments give the same weights on one thread.

    Returns:
        How it was made.

    Raises:
        BadInputError: For an adapter that is not in `CHANGES`, or a model of another family.
    """
    if name not in CHANGES:
        raise unknown("adapter", name, CHANGES)
    kind = AutoConfig.from_pretrained(model_folder).model_type
    if kind not in FAMILIES:
        raise BadInputError(f"{model_folder} holds a {kind!r}; adapters are trained on: {', '.join(FAMILIES)}")
    started, change, family = time.monotonic(), CHANGES[name], FAMILIES[kind]
    model = AutoModelForImageTextToText.from_pretrained(model_folder, dtype=torch.float32).requires_grad_(False)
    processor = load_processor(model_folder)
    adapted = add_adapter(model, family, rank, seed)
    packer = ChangePacker(processor.tokenizer, family.image_token(model), change)
    pool = Pool(family, processor, training_scenes(change, scenes, seed))
    stage = AdapterStage(family, adapted.get_base_model(), pool, steps, packer)
    folder.mkdir(parents=True, exist_ok=True)
    curve = folder / "training.jsonl"
    curve.unlink(missing_ok=True)
    fit(stage, batch, 1, [seed, 0, 4], curve)
    save_adapter(adapted, folder, model_folder.resolve().name)
    minutes = round((time.monotonic() - started) / 60, 1)
    return {"minutes": minutes, "steps": steps, "batch": batch, "scenes": scenes, "rank": rank, "seed": seed}


def main(argv: list[str] | None = None) -> None:
    """Train adapters of a small model, save them in bfloat16, score them on held-out scenes and write their cards."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a trained small model")
    parser.add_argument("--adapter", nargs="+", choices=list(CHANGES), default=list(CHANGES))
    parser.add_argument("--output", type=Path, help="folder of the adapters, MODEL/adapters unless given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16, help="images per step")
    parser.add_argument("--scenes", type=int, default=2000, help="distinct scenes to train on")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--evaluate", type=int, default=300, help="scenes of the test split to score on")
    options = parser.parse_args(argv)

    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    torch.set_num_threads(1)
    data = SceneDataset(options.evaluate, split="test", seed=options.seed)
    items = [data.scene(index) for index in range(options.evaluate)]
    settings = {name: getattr(options, name) for name in ("steps", "batch", "scenes", "rank", "seed")}
    for name in options.adapter:
        folder = (options.output or options.model / "adapters") / name
        made = train_adapter(options.model, name, folder, **settings)
        model = HookedMM.from_pretrained(options.model, dtype=torch.float32, adapter=folder, check=False)
        after = score(model, CHANGES[name], items, options.seed)
        with model.hf_model.disable_adapter():
            before = score(model, CHANGES[name], items, options.seed)
        write_card(folder, name, options.model.resolve().name, len(items), made, before, after)
        new = ", ".join(f"{what} {value}" for what, value in after["change"].items())
        print(f"{name}: {new}; the adapter is in {folder}")
    if options.output is None and (options.model / FILE).is_file():
        write_model_card(options.model)


if __name__ == "__main__":
    main()
