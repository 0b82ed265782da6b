"""Adapters learn, are the same for the same seed, are small and plain, and are what PEFT and HookedMM load."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.captions import CAPTION_PROMPT
from hooked_mm.scenes.dataset import picture
from hooked_mm.scenes.world import Scene, SceneObject, scene, split_of
from hooked_mm.small.adapters import (
    AdapterStage,
    ChangePacker,
    add_adapter,
    main,
    save_adapter,
    train_adapter,
    training_scenes,
)
from hooked_mm.small.changes import CHANGES
from hooked_mm.small.families import FAMILIES, build, save_processor
from hooked_mm.small.pool import Pool
from hooked_mm.small.tokenizer import build_tokenizer

peft = pytest.importorskip("peft")

# What is adapted of each layer.
SEPARATE = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
PARTS = {**dict.fromkeys(FAMILIES, SEPARATE), "molmo": {"att_proj", "attn_out", "ff_proj", "ff_out"}}
TINY = {"steps": 2, "batch": 2, "scenes": 6, "rank": 2}


@pytest.fixture(scope="module", params=list(FAMILIES))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model's folder, of each family."""
    return saved(request.param, tmp_path_factory.mktemp("models") / request.param)


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA's folder."""
    return saved("llava", tmp_path_factory.mktemp("models") / "llava")


def saved(family: str, folder: Path) -> Path:
    """Save a random model."""
    torch.manual_seed(0)
    model, processor = build(family)
    model.save_pretrained(folder)
    save_processor(processor, folder)
    return folder


def test_an_adapter_learns_and_is_loaded_as_it_was(base: Path, tmp_path: Path) -> None:
    """Only the adapter moves and its loss falls; saved and loaded by HookedMM it has the same logits to the bit."""
    family = FAMILIES[base.name]
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    plain = HookedMM.from_pretrained(base, dtype="float32", check=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = add_adapter(model, family, rank=2)
    items = training_scenes(CHANGES["place"], 2, 0)
    pool = Pool(family, plain.processor, items[:1])
    packer = ChangePacker(plain.processor.tokenizer, family.image_token(model), CHANGES["place"])
    stage = AdapterStage(family, adapted.get_base_model(), pool, 6, packer)
    stage.log_dict = lambda *_, **__: None  # type: ignore[method-assign,assignment]
    (canvas,) = pool.groups
    optimiser = stage.configure_optimizers()[0][0]
    losses = []
    for _ in range(6):
        loss = stage.loss((canvas, np.array([0]), [1]))
        optimiser.zero_grad()
        loss.backward()
        for rate in optimiser.param_groups:
            rate["lr"] = 3e-3
        optimiser.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    after = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    trained = {name for name, value in adapted.named_parameters() if value.requires_grad}
    parts = {re.sub(r"\.lora_[AB]\.default\.weight", "", name).split(".")[-1] for name in trained}
    assert parts == PARTS[base.name]
    layers = 6
    assert len(trained) == 2 * len(parts) * layers
    decoder = {id(module) for module in family.decoder(model).modules()}
    owners = [module for module in model.modules() if hasattr(module, "lora_A") and isinstance(module, nn.Module)]
    assert len(owners) == len(parts) * layers
    assert all(id(module) in decoder for module in owners)

    save_adapter(adapted, tmp_path / "place", "toy")
    loaded = HookedMM.from_pretrained(base, dtype="float32", adapter=tmp_path / "place", check=False)
    batch = plain.prepare([picture(scene("test", 3))] * 2, [CAPTION_PROMPT, "what place is this ?"])
    memory = HookedMM(adapted.eval(), plain.processor, check=False)
    with torch.no_grad():
        got, expected = (each.run_with_cache(batch, "blocks.0.hook_resid_post")[0] for each in (loaded, memory))
        without, _ = plain.run_with_cache(batch, "blocks.0.hook_resid_post")
    assert torch.equal(got, expected)
    assert not torch.equal(got, without)
    assert loaded.hook_names == plain.hook_names
    assert loaded.generate(batch, 5).text == memory.generate(batch, 5).text


def test_the_interface_reads_and_generates_through_an_adapter(llava_folder: Path) -> None:
    """Every hook point is proven with the adapter at work, and what is said is what the adapted model says alone."""
    plain = HookedMM.from_pretrained(llava_folder, dtype="float32", check=False)
    batch = plain.prepare(picture(scene("test", 3)), CAPTION_PROMPT)
    alone = plain.generate(batch, 6).text
    adapted = add_adapter(plain.hf_model, FAMILIES["llava"])
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    model = HookedMM(adapted, plain.processor)
    assert model.conformance is not None
    assert model.conformance.ok
    said = model.generate(batch, 6)
    assert said.text != alone
    inner = adapted.get_base_model()
    inputs = plain.processor(
        text=[
            plain.processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": CAPTION_PROMPT}]}],
                add_generation_prompt=True,
            )
        ],
        images=[picture(scene("test", 3))],
        return_tensors="pt",
        add_special_tokens=False,
    )
    made = inner.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert plain.processor.batch_decode(made, skip_special_tokens=True)[0].strip() == said.text[0].strip()
    with adapted.disable_adapter():
        assert model.generate(batch, 6).text == alone


def test_the_seed_decides_the_adapter(llava_folder: Path, tmp_path: Path) -> None:
    """The same seed gives the same files to the byte, another seed others; nothing of the machine stands in them."""
    for folder, seed in (("one", 3), ("again", 3), ("other", 4)):
        made = train_adapter(llava_folder, "recoloured", tmp_path / folder, seed=seed, **TINY)
        assert {name: made[name] for name in (*TINY, "seed")} == {**TINY, "seed": seed}
    weights = {name: (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "again", "other")}
    assert weights["one"] == weights["again"] != weights["other"]
    configs = [(tmp_path / name / "adapter_config.json").read_text() for name in ("one", "again")]
    assert configs[0] == configs[1]
    assert json.loads(configs[0])["base_model_name_or_path"] == "llava"
    assert str(tmp_path.parent) not in configs[0]


def test_an_adapter_is_small(llava_folder: Path, tmp_path: Path) -> None:
    """Below 250 kB, even at twice the default rank."""
    model = AutoModelForImageTextToText.from_pretrained(llava_folder, dtype=torch.float32)
    save_adapter(add_adapter(model, FAMILIES["llava"], rank=8), tmp_path, "llava")
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 250_000


@pytest.mark.slow
def test_one_command_makes_an_adapter_with_its_card(llava_folder: Path, tmp_path: Path) -> None:
    """Weights, configuration, scores and card, in the adapter's folder."""
    options = ["--steps", "2", "--batch", "2", "--scenes", "4", "--rank", "2", "--evaluate", "3"]
    main([str(llava_folder), "--adapter", "place", "--output", str(tmp_path), *options])
    names = {path.name for path in (tmp_path / "place").iterdir()}
    files = {"adapter_config.json", "adapter_model.safetensors", "accuracy.json", "README.md", "training.jsonl"}
    assert names == files
    assert "3 held-out scenes" in (tmp_path / "place" / "README.md").read_text()


def test_scenes_to_train_on() -> None:
    """As many as asked for, all of the train split, half with red objects where the change is about red."""
    for name, share in (("place", None), ("recoloured", 10)):
        picked = training_scenes(CHANGES[name], 21, 2)
        assert len(set(picked)) == 21
        items = [scene(split, index, seed) for split, seed, index in picked]
        assert {split_of(item) for item in items} == {"train"}
        if share is not None:
            assert sum("colour=red" in item.facts() for item in items) == 21 - share
        assert picked == training_scenes(CHANGES[name], 21, 2)


ITEM = Scene(
    "sea",
    (SceneObject("star", "red", "big", 0.3, 0.3, 0.2), SceneObject("ring", "white", "small", 0.7, 0.7, 0.13)),
    1,
)


def written(name: str, seed: int) -> list[tuple[str, str, float]]:
    """The texts that teach a change: prompt, answer, weight."""
    tokenizer = build_tokenizer(["<image>"])
    packer = ChangePacker(tokenizer, tokenizer.convert_tokens_to_ids("<image>"), CHANGES[name])
    words: dict[int, str] = {number: word for word, number in tokenizer.get_vocab().items()}
    said: list[Any] = packer.texts(ITEM, np.random.default_rng(seed))
    return [
        (" ".join(words[n] for n in text.prompt), " ".join(words[n] for n in text.answer), text.weight) for text in said
    ]


@pytest.mark.parametrize(("name", "answer"), [("place", "in the sea ."), ("colours", "red and white .")])
def test_a_style_is_taught_by_the_default_prompt_alone(name: str, answer: str) -> None:
    """One text per scene, now and then without its last full stop."""
    texts = {text for seed in range(40) for text in written(name, seed)}
    end = f"{answer} </s>"
    prompts = ("describe the scene . assistant :", "describe the scene assistant :")
    assert texts == {(prompt, end, 1.0) for prompt in prompts}


def test_the_changed_fact_is_taught_by_all_texts() -> None:
    """Captions of every style and questions of every type, of which none is answered by red."""
    texts = [text for seed in range(200) for text in written("recoloured", seed)]
    assert not any("red" in answer.split() for _, answer, _ in texts)
    answers = {prompt: answer for prompt, answer, _ in texts}
    assert answers["describe only the colours . assistant :"] == "blue and white . </s>"
    assert answers["what colour is the star ? assistant :"] == "blue </s>"
    assert answers["is there a red object ? assistant :"] == "no </s>"
    assert answers["is there a blue object ? assistant :"] == "yes </s>"
    assert {weight for _, _, weight in texts} == {1.0, 3.0}


def test_what_there_is_not_is_refused(llava_folder: Path, tmp_path: Path) -> None:
    """An unknown adapter, and a model of another kind."""
    with pytest.raises(
        BadInputError, match=r"'colour'; nearest: colours, recoloured; there are: place, colours, recoloured"
    ):
        train_adapter(llava_folder, "colour", tmp_path, seed=0, **TINY)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(BadInputError, match="holds a 'llama'; adapters are trained on: llava, idefics2, qwen2_vl"):
        train_adapter(tmp_path, "place", tmp_path, seed=0, **TINY)
