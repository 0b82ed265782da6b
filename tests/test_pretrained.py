"""A model loads from files as people have them; code and pickles among them run nothing; adapters live and merged."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from hooked_mm import pretrained
from hooked_mm.errors import BadInputError, UnsupportedModelError
from hooked_mm.hooked import HookedMM
from hooked_mm.pretrained import load_auto, load_model, with_adapter
from hooked_mm.resolve import resolve
from hooked_mm.small import small_adapter_path, small_model_path
from hooked_mm.testing.miniatures import miniature, miniature_inputs
from tests.molmo_examples import SIZES
from tests.molmo_published import narrowed, write_published
from tests.placing import alternating

LLAVA = small_model_path("llava")


def copied(folder: Path) -> Path:
    """The small LLaVA without its weights and adapters."""
    return Path(shutil.copytree(LLAVA, folder, ignore=shutil.ignore_patterns("adapters", "*.safetensors")))


class Runs:
    """A pickle that touches a file where it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_a_row_of_the_table_comes_before_the_auto_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layout that says it fits is loaded by its own loader, with everything that was said; others by transformers."""
    folder, asked = LLAVA, []

    def fits(config: dict) -> bool:
        return config["model_type"] == "llava"

    def own(model_id: str, **options: object) -> tuple[object, object]:
        asked.append((model_id, options))
        return load_auto(model_id, **options)

    monkeypatch.setattr(pretrained, "LAYOUTS", ((fits, own),))
    model, processor = load_model(folder, dtype=torch.float32, local_files_only=True)
    told = {"dtype": torch.float32, "device_map": None, "trust_remote_code": False, "local_files_only": True}
    assert asked == [(str(folder), told)]
    assert type(processor).__name__ == "LlavaProcessor"
    assert not model.training
    assert not any(weight.requires_grad for weight in model.parameters())
    other, _ = load_model(small_model_path("idefics2"))
    assert (other.config.model_type, other.dtype, len(asked)) == ("idefics2", torch.bfloat16, 1)


@pytest.mark.parametrize("kind", ["strange", "molmo_next"])
def test_code_beside_the_weights_runs_only_where_it_was_allowed(kind: str, tmp_path: Path) -> None:
    """The configuration names a file of Python code; its first line would leave a mark."""
    marker, folder = tmp_path / "marker", tmp_path / "model"
    folder.mkdir()
    auto = {"AutoConfig": "code.Config", "AutoModelForImageTextToText": "code.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": kind, "auto_map": auto}))
    (folder / "code.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nfrom transformers import Nothing\n")
    with pytest.raises(UnsupportedModelError, match=r"code of its own .code.Config.*pass trust_remote_code=True"):
        load_model(folder)
    with pytest.raises(UnsupportedModelError, match="trust_remote_code=True"):
        HookedMM.from_pretrained(folder)
    assert not marker.exists()
    with pytest.raises(ImportError):
        load_model(folder, trust_remote_code=True)
    assert marker.exists()


def test_a_known_architecture_needs_no_code_and_runs_none(tmp_path: Path) -> None:
    """A checkpoint that also brings code for what transformers knows is loaded by transformers; processor, too."""
    folder, marker = copied(tmp_path / "model"), tmp_path / "marker"
    shutil.copy(LLAVA / "model.safetensors", folder)
    (folder / "code.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    named = {"config.json": ("AutoConfig", "AutoModelForImageTextToText"), "processor_config.json": ("AutoProcessor",)}
    for file, classes in named.items():
        written = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**written, "auto_map": dict.fromkeys(classes, "code.Its")}))
    model, processor = load_model(folder)
    assert (model.config.model_type, type(processor).__name__) == ("llava", "LlavaProcessor")
    assert not marker.exists()


@pytest.mark.parametrize("trusted", [False, True])
def test_molmo_needs_none_of_the_code_that_its_files_name(trusted: bool, tmp_path: Path) -> None:
    """As published: every file names remote code; with or without the flag none of it runs, and nobody is asked."""
    folder, marker = tmp_path / "model", tmp_path / "marker"
    folder.mkdir()
    write_published(folder, SIZES, **narrowed(SIZES))
    for name in ("config_molmo", "modeling_molmo", "image_preprocessing_molmo", "preprocessing_molmo"):
        (folder / f"{name}.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    assert "auto_map" in json.loads((folder / "config.json").read_text())
    model, processor = load_model(folder, trust_remote_code=trusted)
    assert (type(model).__name__, type(processor).__name__) == ("MolmoForCausalLM", "MolmoProcessor")
    assert type(model).__module__.startswith("hooked_mm.")
    assert not marker.exists()


def test_pickled_weights_are_tensors_or_nothing(tmp_path: Path) -> None:
    """A .bin loads the same weights; one that would run something is refused, whatever its format, and runs nothing."""
    folder, marker = copied(tmp_path / "model"), tmp_path / "marker"
    weights = AutoModelForImageTextToText.from_pretrained(LLAVA).state_dict()
    torch.save(weights, folder / "pytorch_model.bin")
    model, _ = load_model(folder)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    bad = "pickle that holds more than tensors.*nothing was run. Use safetensors"
    torch.save({**weights, "more": Runs(marker)}, folder / "pytorch_model.bin")
    with pytest.raises(BadInputError, match=bad):
        load_model(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Runs(marker)))
    with pytest.raises(BadInputError, match=bad):
        load_model(folder)
    with pytest.raises(BadInputError, match="weights_only=False would run"):
        load_model(folder, weights_only=False)
    assert not marker.exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert marker.exists()


def test_a_pickled_adapter_runs_nothing(tmp_path: Path) -> None:
    """The same of an adapter's file; the error names the adapter."""
    pytest.importorskip("peft")
    folder, marker = tmp_path / "adapter", tmp_path / "marker"
    shutil.copytree(small_adapter_path("llava", "recoloured"), folder)
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"more": Runs(marker)}, folder / "adapter_model.bin")
    with pytest.raises(BadInputError, match=r"the weights of '.*adapter' are a pickle"):
        load_model(LLAVA, adapter=folder)
    assert not marker.exists()


def test_where_files_are_reaches_model_processor_and_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Revision and subfolder are a repository's: the adapter has its own. All else is said to everybody."""
    said: dict[str, Any] = {}

    class Loads:
        @staticmethod
        def from_pretrained(name: str, **options: Any) -> Any:
            said["model"] = options
            return torch.nn.Linear(1, 1)

    def adapt(model: Any, adapter: Any, **options: Any) -> Any:
        said["adapter"] = options
        return model

    def described(name: str, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        said["config"] = options
        return {"model_type": "llava"}, {}

    monkeypatch.setattr(pretrained, "AutoModelForImageTextToText", Loads)
    monkeypatch.setattr(pretrained, "load_processor", lambda name, **options: said.setdefault("processor", options))
    monkeypatch.setattr(pretrained, "with_adapter", adapt)
    monkeypatch.setattr(pretrained.PretrainedConfig, "get_config_dict", described)
    everywhere = {"local_files_only": True, "token": "secret", "cache_dir": "/cache"}
    own = {"revision": "abc", "subfolder": "inner"}
    load_model(
        "a/model", adapter="an/adapter", adapter_options={"revision": "v2"}, offload_folder="x", **everywhere, **own
    )
    untrusted = {"trust_remote_code": False}
    assert said["config"] == everywhere | own
    assert said["processor"] == everywhere | own | untrusted
    assert said["model"] == everywhere | own | untrusted | {"dtype": "auto", "device_map": None, "offload_folder": "x"}
    assert said["adapter"] == everywhere | {"merge": False, "revision": "v2"}


def test_what_is_missing_is_named_with_a_remedy(tmp_path: Path) -> None:
    """No folder, no weights, no network: what it is about, and what to do."""
    with pytest.raises(BadInputError, match=r"nothing' can't be loaded: .* there is no such folder"):
        load_model(tmp_path / "nothing")
    folder = copied(tmp_path / "model")
    with pytest.raises(BadInputError, match=r"no file named model.safetensors.* Remedy: a model's folder holds config"):
        load_model(folder)
    for options in ({}, {"local_files_only": True}):
        with pytest.raises(BadInputError, match=r"'owner/model' can't be loaded: .* `hf download owner/model` puts it"):
            load_model("owner/model", **options)
    pytest.importorskip("peft")
    with pytest.raises(BadInputError, match="'owner/adapter' is no folder here, and can't be had from the hub"):
        load_model(LLAVA, adapter="owner/adapter")
    with pytest.raises(BadInputError, match=r"holds no adapter: there is no adapter_config.json"):
        load_model(LLAVA, adapter=folder)


def test_an_adapter_alone_brings_its_base_model(tmp_path: Path) -> None:
    """Given as the model, its folder says whose it is; one in a subfolder, too; one that does not say it is refused."""
    pytest.importorskip("peft")
    folder = tmp_path / "deep" / "adapter"
    shutil.copytree(small_adapter_path("llava", "recoloured"), folder)
    file = folder / "adapter_config.json"
    written = json.loads(file.read_text())
    file.write_text(json.dumps({**written, "base_model_name_or_path": str(LLAVA)}))
    found, processor = load_model(folder.parent, subfolder="adapter")
    known = load_model(LLAVA, adapter=small_adapter_path("llava", "recoloured"))[0].state_dict()
    assert all(torch.equal(value, known[name]) for name, value in found.state_dict().items())
    assert type(processor).__name__ == "LlavaProcessor"
    file.write_text(json.dumps({**written, "base_model_name_or_path": None}))
    with pytest.raises(BadInputError, match="an adapter alone, and it names no base model"):
        load_model(folder)


def _adapted(kind: str) -> Any:
    """The miniature LLaVA with an adapter whose every weight is random, so that it changes something."""
    import peft

    everywhere = [r"q_proj", r"v_proj", r"o_proj", r"out_proj", "down_proj", "fc1"]
    plain: dict[str, Any] = {"r": 3, "target_modules": everywhere, "init_lora_weights": False}
    torch.manual_seed(0)
    match kind:
        case "dora":
            config: Any = peft.LoraConfig(**plain, use_dora=True)
        case "biased":
            # PEFT merges biases into biases alone.
            config = peft.LoraConfig(**{**plain, "target_modules": ["out_proj", "fc1"]}, lora_bias=True)
        case "embeddings":
            config = peft.LoraConfig(**{**plain, "target_modules": ["embed_tokens", "lm_head", "linear_1"]})
        case "ia3":
            config = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
        case _:
            config = peft.LoraConfig(**plain)
    model = peft.get_peft_model(miniature("llava"), config)
    if kind == "several":
        model.add_adapter("second", peft.LoraConfig(**{**plain, "target_modules": ["k_proj", "up_proj"]}))
        model.base_model.set_adapter(["default", "second"])
    for name, weight in model.named_parameters():
        if "lora_B" in name or "ia3_" in name:
            weight.data += 0.1 * torch.randn_like(weight)
    return model.requires_grad_(False).eval()


@pytest.mark.parametrize("kind", ["lora", "dora", "biased", "several", "embeddings", "ia3"])
def test_adapters_live_and_merged_have_the_same_names_and_values(kind: str) -> None:
    """In tower and decoder: every check holds, no name tells of PEFT, merged weights give the live adapter's values."""
    pytest.importorskip("peft")
    plain = HookedMM(miniature("llava"), check=False)
    inputs = miniature_inputs(plain.hf_model)
    live = HookedMM(_adapted(kind))
    logits, cache = live.run_with_cache(inputs, "*")
    assert live.conformance is not None
    assert live.conformance.ok
    assert live.hook_names == plain.hook_names
    assert not any(word in name for name in live.hook_names for word in ("lora", "base_layer", "default"))
    merged = HookedMM(_adapted(kind).merge_and_unload(), check=False)
    known, other = merged.run_with_cache(inputs, "*")
    torch.testing.assert_close(logits, known, atol=2e-4, rtol=1e-3)
    for name in cache:
        torch.testing.assert_close(cache[name], other[name], atol=2e-4, rtol=1e-3)
    assert (logits - plain.run_with_hooks(inputs)).abs().max() > 0.01
    last = f"blocks.{live.cfg.n_layers - 1}.hook_resid_post"
    torch.testing.assert_close(live.to_logits(cache[last]), merged.to_logits(other[last]), atol=2e-4, rtol=1e-3)


def test_merging_at_load(images: list[Any]) -> None:
    """The shipped adapter: merged it is a plain transformers model with the live one's logits."""
    pytest.importorskip("peft")
    adapter = small_adapter_path("llava", "recoloured")
    live = HookedMM.from_pretrained(LLAVA, dtype="float32", adapter=adapter, check=False)
    merged = HookedMM.from_pretrained(LLAVA, dtype="float32", adapter=adapter, merge_adapter=True)
    assert type(merged.hf_model).__module__.startswith("transformers.")
    assert merged.hook_names == live.hook_names
    batch = live.prepare(images[:2], "what is on the picture ?")
    torch.testing.assert_close(merged.run_with_hooks(batch), live.run_with_hooks(batch), atol=1e-4, rtol=1e-4)


def test_adapters_of_prompts_are_refused(tmp_path: Path) -> None:
    """By their configuration alone; also where the model was wrapped before."""
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    config.save_pretrained(str(tmp_path))
    with pytest.raises(UnsupportedModelError, match="adapter of kind PROMPT_TUNING puts learned tokens"):
        load_model(LLAVA, adapter=tmp_path)
    model = miniature("llava")
    model.peft_config = {"default": config}
    with pytest.raises(UnsupportedModelError, match="Use one that changes modules"):
        resolve(model)


def test_an_adapter_beside_weights_that_are_elsewhere(tmp_path: Path, images: list[Any]) -> None:
    """Live on a model that is partly on disk it gives what it gives on the plain one; to merge it there is refused."""
    pytest.importorskip("peft")
    adapter = small_adapter_path("llava", "recoloured")
    plain = HookedMM.from_pretrained(LLAVA, dtype="float32", adapter=adapter, check=False)
    options: dict[str, Any] = {"dtype": "float32", "adapter": adapter, "offload_folder": tmp_path}
    device_map = alternating(AutoModelForImageTextToText.from_pretrained(LLAVA))
    away = HookedMM.from_pretrained(LLAVA, device_map=device_map, check=False, **options)
    assert sum(weight.is_meta for weight in away.hf_model.parameters()) > 20
    assert away.hf_model.hf_device_map == device_map
    batch = plain.prepare(images[:2], "what is on the picture ?")
    hooks = ("blocks.3.hook_resid_post", "blocks.2.attn.hook_q", "vision.blocks.1.hook_resid_post", "hook_logits")
    got, wanted = (each.run_with_cache(batch, hooks)[1] for each in (away, plain))
    assert all(torch.equal(got[name], wanted[name]) for name in hooks)
    with pytest.raises(BadInputError, match=r"can't be merged into weights that are partly offloaded.*leave it live"):
        load_model(LLAVA, device_map=device_map, merge_adapter=True, **options)


def test_no_adapter_leaves_the_model_alone() -> None:
    """The very same object."""
    model = torch.nn.Linear(1, 1)
    assert with_adapter(model, None) is model
