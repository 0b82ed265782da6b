"""LLaVA in its original layout gives what the transformers model gives that it was written from."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hooked_mm import HookedMM, weight_files
from hooked_mm.errors import BadInputError, UnsupportedModelError
from hooked_mm.llava_originals import load_llava_original
from hooked_mm.placement import Placement
from tests.llava_folders import PREFIX, original_names, source_model, tokenizer, write_original, write_tower
from tests.recording_hub import RecordingHub

VOCABULARY = len(tokenizer())


def picture(width: int = 40, height: int = 25) -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8))


def inputs(processor: Any) -> list[dict[str, Any]]:
    """A batch of texts with a picture each, and one of texts alone."""
    seen = processor(
        images=[picture(), picture(20, 33)],
        text=["what is <image>\nthe colour?", "<image>describe it please"],
        padding=True,
        return_tensors="pt",
    )
    return [dict(seen), dict(processor(text=["where is the snow?", "it"], padding=True, return_tensors="pt"))]


@torch.no_grad()
def same_logits(model: Any, source: Any, processor: Any) -> bool:
    """Bit for bit, for all tokens of the original vocabulary."""
    pairs = [(model(**given).logits, source(**given).logits) for given in inputs(processor)]
    assert all(theirs.std() > 0.1 for _, theirs in pairs)
    return all(torch.equal(ours[..., :VOCABULARY], theirs[..., :VOCABULARY]) for ours, theirs in pairs)


@pytest.mark.parametrize(
    ("decoder", "projector", "inside", "kind", "shards"),
    [
        ("mistral", "mlp2x_gelu", True, "safetensors", 3),
        ("mistral", "mlp2x_gelu", False, "safetensors", 1),
        ("mistral", "linear", True, "bin", 1),
        ("llama", "mlp2x_gelu", False, "bin", 3),
        ("llama", "mlp2x_gelu", True, "bin", 2),
        ("llama", "linear", False, "safetensors", 2),
    ],
)
def test_the_logits_are_those_of_the_model_it_was_written_from(
    tmp_path: Path, decoder: str, projector: str, inside: bool, kind: str, shards: int
) -> None:
    """Text with pictures and text alone, bit for bit: both decoders, both projectors, the tower inside or beside."""
    source = source_model(decoder, projector)
    layout = {"decoder": decoder, "projector": projector, "inside": inside, "kind": kind, "shards": shards}
    model, processor = load_llava_original(write_original(tmp_path / "it", source, **layout))
    assert same_logits(model, source, processor)
    assert (model.config.text_config.model_type, model.dtype, model.training) == (decoder, torch.float32, False)
    # The check tells a difference.
    with torch.no_grad():
        model.model.vision_tower.get_parameter(f"{_inside(model)}pre_layrnorm.bias")[0] += 1e-3
    assert not same_logits(model, source, processor)


def _inside(model: Any) -> str:
    return "vision_model." if hasattr(model.model.vision_tower, "vision_model") else ""


@torch.no_grad()
def test_features_are_spliced_in_where_the_original_splices_them(tmp_path: Path) -> None:
    """The original has no image token: the texts before and behind are embedded, with the features between."""
    source = source_model("llama")
    model, processor = load_llava_original(write_original(tmp_path / "it", source, decoder="llama"))
    given = processor(images=picture(), text="what is <image>\nthe colour?", return_tensors="pt")
    parts = model.model
    states = parts.vision_tower(given["pixel_values"], output_hidden_states=True).hidden_states[-2]
    hidden = torch.nn.functional.gelu(parts.multi_modal_projector.linear_1(states[:, 1:]))
    features = parts.multi_modal_projector.linear_2(hidden)
    embed = parts.language_model.embed_tokens
    before, behind = (
        torch.tensor(tokenizer()(text, add_special_tokens=first).input_ids)[None]
        for text, first in (("what is ", True), ("\nthe colour?", False))
    )
    spliced = torch.cat([embed(before), features, embed(behind)], dim=1)
    expected = model.lm_head(parts.language_model(inputs_embeds=spliced).last_hidden_state)
    torch.testing.assert_close(model(**given).logits, expected, rtol=0, atol=1e-5)


def test_the_towers_class_token_is_kept_where_the_original_keeps_it(tmp_path: Path) -> None:
    """'cls_patch': one image position more."""
    source = source_model()
    source.config.vision_feature_select_strategy = "full"
    model, processor = load_llava_original(
        write_original(tmp_path / "it", source, mm_vision_select_feature="cls_patch", mm_vision_select_layer=-1)
    )
    assert not same_logits(model, source, processor)
    source.config.vision_feature_layer = -1
    assert same_logits(model, source, processor)
    assert int((inputs(processor)[0]["input_ids"][0] == processor.image_token_id).sum()) == 10


def test_a_tower_inside_wins_over_the_one_that_is_named(tmp_path: Path) -> None:
    """Also over one that is asked for; only where there is none inside are those used."""
    source, other = source_model(), source_model(seed=1)
    named = write_tower(tmp_path / "named", original_names(other, "mlp2x_gelu"))
    folder = write_original(tmp_path / "a" / "it", source, mm_vision_tower=str(named))
    model, processor = load_llava_original(folder)
    assert same_logits(model, source, processor)
    model, processor = load_llava_original(folder, vision_tower=named)
    assert same_logits(model, source, processor)

    beside = write_original(tmp_path / "b" / "it", source, inside=False)
    model, processor = load_llava_original(beside)
    assert same_logits(model, source, processor)
    model, processor = load_llava_original(beside, vision_tower=named)
    assert not same_logits(model, source, processor)
    source.model.vision_tower.load_state_dict(other.model.vision_tower.state_dict())
    assert same_logits(model, source, processor)


def test_weights_come_in_the_dtype_asked_for(tmp_path: Path) -> None:
    """bfloat16 as the source in bfloat16; "auto" is what config.json says."""
    source = source_model()
    folder = write_original(tmp_path / "it", source, torch_dtype="float16", kind="bin")
    half, processor = load_llava_original(folder, dtype="bfloat16")
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    assert half.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    source = source.to(torch.bfloat16)
    source.model.language_model.rotary_emb.load_state_dict(half.model.language_model.rotary_emb.state_dict())
    given = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs(processor)[0].items()}
    with torch.no_grad():
        ours, theirs = half(**given).logits, source(**given).logits
    # The source's rotary constants were rounded with the rest, so it is near, not equal.
    assert (ours[..., :VOCABULARY].float() - theirs[..., :VOCABULARY].float()).abs().max() < 0.2
    assert torch.equal(half.lm_head.weight[:VOCABULARY], source.lm_head.weight[:VOCABULARY])
    assert load_llava_original(folder)[0].dtype == torch.float16
    with pytest.raises(BadInputError, match="'int8': weights are of a floating dtype"):
        load_llava_original(folder, dtype="int8")


LAYER = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"without": (LAYER, "lm_head.weight")}, f"lacks 2 of the tensors .*: lm_head.weight, {LAYER}"),
        ({"without": (f"{PREFIX}post_layernorm.bias",)}, "lacks 1 of .*vision_model.post_layernorm.bias"),
        (
            {"extra": {"model.mm_projector.4.weight": torch.ones(2)}},
            "1 tensors .* no place .*model.mm_projector.4.weight",
        ),
        ({"extra": {LAYER: torch.ones(48, 31)}}, rf"other sizes .*{LAYER} is \(48, 31\), not \(48, 32\)"),
        ({"vocab_size": VOCABULARY + 3}, rf"embed_tokens.weight is \({VOCABULARY}, 32\), not \({VOCABULARY + 3}, 32\)"),
        ({"num_hidden_layers": 3}, "lacks 9 of the tensors .* and 1 more"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_before_a_weight_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], said: str
) -> None:
    """Whatever is missing, has no place or another size is named."""
    folder = write_original(tmp_path / "it", source_model(), **change)

    def put(*given: object) -> None:
        raise AssertionError("a weight was put")

    monkeypatch.setattr(Placement, "put", put)
    with pytest.raises(BadInputError, match=said):
        load_llava_original(folder)


def test_a_tower_of_its_own_is_checked_too(tmp_path: Path) -> None:
    """Missing, extra and unknown towers are refused, with the way out."""
    source = source_model()
    folder = write_original(tmp_path / "it", source, inside=False)
    weights = original_names(source, "mlp2x_gelu")
    bad = write_tower(tmp_path / "less", {k: v for k, v in weights.items() if "layers.1.mlp.fc1.bias" not in k})
    with pytest.raises(BadInputError, match=r"tower .*less' lacks 1 .*vision_model.encoder.layers.1.mlp.fc1.bias"):
        load_llava_original(folder, vision_tower=bad)
    more = write_tower(tmp_path / "more", {**weights, f"{PREFIX}head.weight": torch.ones(2)})
    with pytest.raises(BadInputError, match=r"tower .*more' has 1 .*vision_model.head.weight"):
        load_llava_original(folder, vision_tower=more)
    (more / "config.json").write_text(json.dumps({"model_type": "siglip_vision_model"}))
    with pytest.raises(UnsupportedModelError, match="of type 'siglip_vision_model'"):
        load_llava_original(folder, vision_tower=more)
    with pytest.raises(BadInputError, match=r"tower 'no/tower' can't be had.*vision_tower='...'"):
        load_llava_original(folder, vision_tower="no/tower", local_files_only=True)


def test_keys_that_are_known_to_be_unused_do_no_harm(tmp_path: Path) -> None:
    """Rotary constants, position numbers and a newline that only 'anyres' reads."""
    source = source_model()
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        f"{PREFIX}embeddings.position_ids": torch.arange(10)[None],
        "model.image_newline": torch.ones(32),
    }
    model, processor = load_llava_original(write_original(tmp_path / "it", source, extra=extra))
    assert same_logits(model, source, processor)


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("code ran",)


def test_a_pickle_with_more_than_tensors_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Nothing of it runs, and the way out is told."""
    folder = write_original(tmp_path / "it", source_model(), kind="bin")
    held = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save({**held, "evil": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(BadInputError, match=r"would run code that came with it, so it is refused.*safetensors"):
        load_llava_original(folder)
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_one_shard_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """When a tensor is put, no tensor of another file is alive any more; every file is read once."""
    shards = 7
    folder = write_original(tmp_path / "it", source_model(), kind=kind, shards=shards)
    real, put = weight_files.tensors, Placement.put
    alive: dict[str, list[weakref.ref]] = {}
    most, now = 0, ""

    def watched(file: Path, names: Any = None) -> Any:
        nonlocal now
        now = file.name
        assert now not in alive
        alive[now] = []
        for name, value in real(file, names):
            alive[now].append(weakref.ref(value.untyped_storage()))
            yield name, value
            del value

    def counted(self: Placement, name: str, value: torch.Tensor) -> None:
        nonlocal most
        others = [ref for file, refs in alive.items() if file != now for ref in refs if ref() is not None]
        assert not others
        most = max(most, sum(ref() is not None for ref in alive[now]))
        put(self, name, value)

    monkeypatch.setattr("hooked_mm.llava_originals.tensors", watched)
    monkeypatch.setattr(Placement, "put", counted)
    model, _ = load_llava_original(folder)
    assert len(alive) == shards
    assert most == 1
    assert not [ref for refs in alive.values() for ref in refs if ref() is not None]
    assert not any(weight.device.type == "meta" for weight in model.parameters())


def test_parts_may_lie_on_disk(tmp_path: Path) -> None:
    """With a device map and a folder, logits stay as they are."""
    source = source_model()
    folder = write_original(tmp_path / "it", source, shards=2)
    table = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "cpu"}
    parts = ("embed_tokens", "norm", "rotary_emb", "layers.0")
    table |= {f"model.language_model.{part}": "cpu" for part in parts} | {"model.language_model.layers.1": "disk"}
    with pytest.raises(BadInputError, match="offload_folder="):
        load_llava_original(folder, device_map=table)
    model, processor = load_llava_original(folder, device_map=table, offload_folder=tmp_path / "off")
    assert model.get_parameter("model.language_model.layers.1.mlp.up_proj.weight").device.type == "meta"
    assert same_logits(model, source, processor)


def test_it_loads_by_its_name_and_passes_every_check(tmp_path: Path) -> None:
    """`HookedMM.from_pretrained` finds the layout: the checks hold with the original's own prompts, and it answers."""
    source = source_model()
    folder = write_original(tmp_path / "it", source)
    hooked = HookedMM.from_pretrained(folder, dtype=torch.float32, check="full")
    assert hooked.conformance is not None
    assert hooked.conformance.ok
    assert (hooked.cfg.family, hooked.cfg.d_vocab) == ("llava", VOCABULARY + 1)
    batch = hooked.prepare([picture(), None], ["what is the colour?", "where is it?"])
    assert "[INST] <image>" in hooked.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}]
    )
    assert int((batch.modality[0] == batch.modality[0, -1]).sum()) < batch.modality.shape[1]
    logits, _ = hooked.run_with_cache(batch, names_filter="hook_embed")
    with torch.no_grad():
        theirs = source(**batch.inputs).logits
    real = batch.inputs["attention_mask"].bool()
    assert torch.equal(logits[..., :VOCABULARY][real], theirs[..., :VOCABULARY][real])
    said = hooked.generate(batch, max_new_tokens=8)
    with torch.no_grad():
        free = source.generate(
            **batch.inputs, max_new_tokens=8, do_sample=False, suppress_tokens=[VOCABULARY, VOCABULARY + 1]
        )
    assert said.tokens.tolist() == free[:, batch.inputs["input_ids"].shape[1] :].tolist()


def test_an_added_token_is_the_mean_and_is_never_said(tmp_path: Path) -> None:
    """Its logit is the mean of the others."""
    model, processor = load_llava_original(write_original(tmp_path / "it", source_model("llama"), decoder="llama"))
    assert processor.image_token_id == VOCABULARY == len(processor.tokenizer) - 1
    given = inputs(processor)[1]
    with torch.no_grad():
        logits = model(**given).logits
        torch.testing.assert_close(logits[..., VOCABULARY], logits[..., :VOCABULARY].mean(-1), rtol=0, atol=1e-5)
        # Were it the likeliest by far, it would still not be said.
        model.lm_head.weight[VOCABULARY] = 100 * model.model.language_model(**given).last_hidden_state[0, -1]
        assert int(model(**given).logits[0, -1].argmax()) == VOCABULARY
        said = model.generate(**given, max_new_tokens=2, do_sample=False)
        assert said[:, -2:].max() < VOCABULARY
        model.generation_config.suppress_tokens = None
        said = model.generate(**given, max_new_tokens=2, do_sample=False)
        assert said[0, -2] == VOCABULARY


@pytest.mark.parametrize(
    ("setting", "kind", "said"),
    [
        ({"mm_projector_type": "mlp3x_gelu"}, UnsupportedModelError, "mm_projector_type='mlp3x_gelu'; loaded are"),
        ({"image_aspect_ratio": "anyres"}, UnsupportedModelError, "LLaVA-1.6, whose conversions"),
        ({"mm_resampler_type": "perceiver"}, UnsupportedModelError, "no resampler"),
        ({"mm_vision_select_feature": "cls"}, UnsupportedModelError, "knows these two"),
        ({"mm_vision_select_layer": None}, BadInputError, "mm_vision_select_layer=None; it must be the number"),
        ({"mm_vision_tower": None}, BadInputError, "names no vision tower"),
        ({"mm_use_im_start_end": True}, BadInputError, "<im_start> and <im_end> around pictures"),
    ],
)
def test_settings_that_transformers_has_not_are_refused(
    tmp_path: Path, setting: dict[str, Any], kind: type[Exception], said: str
) -> None:
    """By their names, with the reason."""
    folder = write_original(tmp_path / "it", source_model())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **setting}))
    with pytest.raises(kind, match=said):
        load_llava_original(folder)


def test_unknown_options_and_missing_files_are_refused(tmp_path: Path) -> None:
    """With the way out."""
    folder = write_original(tmp_path / "it", source_model())
    with pytest.raises(BadInputError, match=r"not loaded with quantization_config.*save_pretrained"):
        load_llava_original(folder, quantization_config=object())
    (folder / "model.safetensors").unlink()
    with pytest.raises(BadInputError, match="holds no weights"):
        load_llava_original(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(BadInputError, match=r"config.json can't be read"):
        load_llava_original(folder)


def test_from_the_hub_only_what_is_needed_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint at the revision asked for, the tower at its own, and no file that is not used."""
    hub = RecordingHub(tmp_path / "hub").put_in_place(monkeypatch)
    source = source_model()
    folder = write_original(
        hub.kept / "me/llava", source, inside=False, kind="bin", shards=2, mm_vision_tower="me/clip"
    )
    (folder / "mm_projector.bin").write_bytes(b"left over from training")
    (folder / "README.md").write_text("x")
    model, processor = load_llava_original("me/llava", revision="v1", token="t")
    assert same_logits(model, source, processor)
    revisions = {(call[1], call[2].get("revision")) for call in hub.calls}
    assert revisions == {("me/llava", "v1"), ("me/clip", None)}
    assert {call[2]["token"] for call in hub.calls} == {"t"}
    there = {path.name for path in (hub.kept / "snapshots/me/llava").iterdir()}
    assert {name for name in there if name.endswith((".bin", ".md"))} == {
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model-00002-of-00002.bin",
    }


@torch.no_grad()
@pytest.mark.parametrize("decoder", ["llama", "mistral"])
def test_its_ends_alone_can_be_read(tmp_path: Path, decoder: str) -> None:
    """Final norm and unembedding: the source's logits for the original vocabulary, of the shards that hold them."""
    source = source_model(decoder)
    folder = write_original(tmp_path / "it", source, decoder=decoder, projector="mlp2x_gelu", shards=9)
    ends = HookedMM.unembedding(folder)
    for file in folder.glob("*.safetensors"):
        if file.name not in ends.files:
            file.unlink()
    assert set(HookedMM.unembedding(folder).names) == {"model.norm.weight", "lm_head.weight"}
    assert (ends.cfg.d_model, ends.cfg.d_vocab, ends.bytes_read) == (32, VOCABULARY, 4 * 32 * (VOCABULARY + 1))
    x = torch.randn(5, 32)
    torch.testing.assert_close(ends.to_logits(x), source.lm_head(source.model.language_model.norm(x))[:, :VOCABULARY])
    assert ends.tokenizer.get_vocab() == tokenizer().get_vocab()
