"""The shipped models: small, plain, found by name; their adapters, loaded by PEFT."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForImageTextToText

from hooked_mm import small
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.pretrained import with_adapter
from hooked_mm.processors import load_processor
from hooked_mm.reader import ModelSource
from hooked_mm.scenes.captions import CAPTION_PROMPT
from hooked_mm.scenes.dataset import SceneDataset, picture
from hooked_mm.scenes.world import Scene
from hooked_mm.small import SMALL_MODELS, adapters_of, small_adapter_path, small_model_path
from hooked_mm.small.accuracy import HELD_OUT_OBJECT, Accuracy, mean
from hooked_mm.small.card import card, sibling
from hooked_mm.small.changes import CHANGES
from hooked_mm.small.families import FAMILIES, build


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_shipped_models_are_small_and_in_bfloat16(name: str) -> None:
    """At most 4 MB of weights, all of them bfloat16, and nothing in the folder that needs pickle."""
    folder = small_model_path(name)
    assert (folder / "model.safetensors").stat().st_size <= 4_000_000
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        names = list(tensors.keys())
        assert {tensors.get_slice(key).get_dtype() for key in names} == {"BF16"}
        # Weights that could not have come out of training would be worth nothing.
        assert all(torch.isfinite(tensors.get_tensor(key)).all() for key in names)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".jsonl", ".jinja", ".safetensors", ".md"}
    assert json.loads((folder / "config.json").read_text())["dtype"] == FAMILIES[name].dtype


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_they_load_as_commands_load_them(name: str) -> None:
    """In the dtype that their configuration says: every hook point means its name there, too."""
    model = ModelSource(f"small:{name}").load("cpu")
    assert model.dtype == getattr(torch, FAMILIES[name].dtype)
    assert model.conformance is not None
    assert model.conformance.ok


def test_all_four_ship() -> None:
    """In the order of their age, each found where the package lies."""
    assert SMALL_MODELS == ("llava", "idefics2", "qwen2_vl", "molmo")


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_transformers_alone_loads_and_asks_it(name: str, images: list[Image.Image], scenes: list[Scene]) -> None:
    """Load, ask where each picture was taken, and get it right nearly always: pictures of several sizes in one batch.

    None of our code runs but that which loads a processor without its video part, where torchvision is missing.
    """
    folder = small_model_path(name)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = load_processor(folder)
    # transformers has all but Molmo, which it learns of by an import.
    assert type(model).__module__.startswith("hooked_mm.molmo." if name == "molmo" else f"transformers.models.{name}.")
    content = [{"type": "image"}, {"type": "text", "text": "what place is this ?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(
        text=[prompt] * 24,
        images=[[image] for image in images],
        return_tensors="pt",
        add_special_tokens=False,
        padding=True,
        padding_side="left",
    )
    made = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    said = processor.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert sum(text.strip() == item.place for text, item in zip(said, scenes, strict=True)) >= 23


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_they_see_what_they_were_made_to_see(name: str) -> None:
    """What lies in the folder says so: questions, exact captions, held-out pairs; without the picture near chance."""
    for file in sorted(small_model_path(name).glob("accuracy*.json")):
        found = Accuracy.load(small_model_path(name), file.name)
        assert mean(found.questions["test"]) >= 0.95
        assert min(share.value for share in found.questions["test"].values()) >= 0.90
        assert mean(found.questions["unseen"]) >= 0.88
        assert mean(found.questions[HELD_OUT_OBJECT]) >= 0.88
        assert min(found.captions["test"][style].exact.value for style in ("any", "full", "short")) >= 0.93
        assert mean(found.wrong_image) <= mean(found.chance) + 0.05
        assert found.wrong_image_captions.value <= 0.02


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_they_answer_questions_of_every_type(name: str) -> None:
    """Asked here and now, about scenes that nobody has looked at: nearly always right."""
    model, data = HookedMM.small(name, check=False), SceneDataset(60, "question", seed=12)
    samples = [data[number] for number in range(60)]
    assert len({sample.columns["question_type"] for sample in samples}) >= 9
    batch = model.prepare([sample.images for sample in samples], [sample.text for sample in samples])
    said = model.generate(batch, 3).text
    assert sum(text == sample.answer for text, sample in zip(said, samples, strict=True)) >= 56


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_their_adapters_do_what_they_were_taught(name: str) -> None:
    """All three ship; each follows its style nearly always by its own file, and on three scenes here and now."""
    names = adapters_of(small_model_path(name))
    assert names == ("colours", "place", "recoloured")
    data = SceneDataset(100, seed=12)
    items = [item for item in (data.scene(n) for n in range(100)) if "colour=red" in item.facts()][:3]
    for adapter in names:
        told = sibling(small_model_path(name), adapter)
        assert told["style followed"][1] >= 0.95
        assert told["exactly right"][1] >= 0.93 > told["exactly right"][0]
        model = HookedMM.small(name, adapter=adapter, check=False)
        batch = model.prepare([picture(item) for item in items], [CAPTION_PROMPT] * 3)
        said = model.generate(batch, 48).text
        right = [text in CHANGES[adapter].right(item) for text, item in zip(said, items, strict=True)]
        assert sum(right) >= 2


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_their_cards_are_up_to_date(name: str) -> None:
    """Written of what lies in the folder now."""
    assert card(small_model_path(name)) == (small_model_path(name) / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL_MODELS)
def test_every_point_of_theirs_is_proven(name: str) -> None:
    """Full conformance: every block, in float32."""
    report = HookedMM.small(name, check="full").conformance
    assert report is not None
    assert report.ok
    assert report.layers["text"] == tuple(range(6))


def test_unknown_names_are_refused() -> None:
    """The nearest and all names are offered."""
    with pytest.raises(BadInputError, match=r"'lava'; nearest: llava; there are: llava"):
        small_model_path("lava")


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_the_path_is_a_folder_of_the_package(name: str) -> None:
    """Where `from_pretrained` finds everything it needs."""
    folder = small_model_path(name)
    assert isinstance(folder, Path)
    needed = {
        "config.json",
        "generation_config.json",
        "processor_config.json",
        "tokenizer.json",
        # As published, Molmo's template is in its code, and its picture settings are in a file of their own.
        "preprocessor_config.json" if name == "molmo" else "chat_template.jinja",
        "README.md",
    }
    assert needed <= {path.name for path in folder.iterdir()}


@pytest.fixture
def adapted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A random LLaVA in the place of the shipped one, with an adapter that changes what it says."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model, processor = build("llava")
    folder = tmp_path / "llava"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    config = peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(folder / "adapters" / "loud")
    monkeypatch.setattr(small, "_HERE", tmp_path)
    return folder


def test_a_sibling_is_the_model_with_its_adapter(adapted: Path, images: list[Image.Image]) -> None:
    """Its logits are those of PEFT's own way to load it, and not the model's."""
    peft = pytest.importorskip("peft")
    assert adapters_of(adapted) == ("loud",)
    sibling, plain = (HookedMM.small("llava", name, check=False) for name in ("loud", None))
    batch = plain.prepare(images[:2], "what place is this ?")
    base = AutoModelForImageTextToText.from_pretrained(adapted, dtype=torch.float32)
    expected = peft.PeftModel.from_pretrained(base, str(adapted / "adapters" / "loud")).eval()
    with torch.no_grad():
        logits = expected(**batch.inputs).logits
    got, other = sibling.run_with_hooks(batch), plain.run_with_hooks(batch)
    assert got is not None
    assert other is not None
    torch.testing.assert_close(got, logits)
    assert (got - other).abs().max() > 0.01
    assert not any(weight.requires_grad for weight in sibling.hf_model.parameters())


def test_adapters_that_are_not_there(adapted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The nearest and all names are offered; without PEFT the remedy."""
    with pytest.raises(BadInputError, match=r"no adapter of llava 'lout'; nearest: loud; there are: loud"):
        small_adapter_path("llava", "lout")
    with pytest.raises(BadInputError, match=r"no small model 'lava'"):
        small_adapter_path("lava", "loud")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(BadInputError, match=r"needs PEFT, which is not installed; pip install peft"):
        HookedMM.small("llava", adapter="loud", check=False)
    model = torch.nn.Linear(1, 1)
    assert with_adapter(model, None) is model
