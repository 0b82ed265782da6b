"""What TransformerLens does with vision-language models, found by trying: two tables, good and bad alike.

`python -m benchmarks.transformer_lens_limits` (needs TransformerLens 4 and peft). The first table tries every family
that we support, as a miniature with random weights; the second asks one question per row of the small trained LLaVA.
Every verdict is computed from what happened.
"""

from __future__ import annotations

import argparse
import copy
import platform
import re
import subprocess
import warnings
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.bridge import Subject, TransformerBridge, bridge, without_torchvision_check
from benchmarks.models import small_llava
from hooked_mm.architectures import FAMILIES
from hooked_mm.scenes.dataset import SceneDataset
from hooked_mm.small import small_model_path
from hooked_mm.testing.miniatures import miniature, miniature_inputs

Answer = tuple[str, str]
"""What was found in a word (yes, no, partly), and what it was found from."""


def acts(moved: float) -> str:
    """Whether a write did anything."""
    return f"act (logits move by {moved:.1g})" if moved else "are discarded"


def family_row(family: str) -> str:
    """One row of the first table."""
    model = miniature(family)
    with without_torchvision_check(model) as wanted:
        try:
            subject = Subject(model, miniature_inputs(model))
        except Exception as error:  # whatever it is, it is the finding
            return f"| {family} | no: {type(error).__name__}, {str(error).split('.')[0]} | | | | | | |"
    names = list(subject.bridge.hook_dict)
    patterns = [name for name in names if name.endswith("attn.hook_pattern") and name in subject.cache]
    tower = [name for name in names if re.match(r"vision_encoder\.\w+\.1\.", name)]
    place = re.sub(r"\.1\..*", ".{l}", tower[0]) if tower else "none"

    def writes(names: list[str]) -> str:
        return ", ".join({acts(subject.write(name)).split(" (")[0] for name in names}) or "there are none"

    text = [name for name in patterns if ".1." in name and not name.startswith("vision")]
    differ = subject.moved(subject.logits, subject.reference)
    fired = len(names) - len(subject.silent())
    rotated = any(name.endswith("hook_rot_q") and name in subject.cache for name in names)
    return (
        f"| {family} | yes{f' (asks for {wanted})' if wanted else ''} | {differ:.0e} | {fired} of {len(names)} "
        f"| {writes(text)} | {'yes' if rotated else 'no'} | {place} "
        f"| {writes([name for name in patterns if name in tower])} |"
    )


def same_logits(s: Subject) -> Answer:
    """Same logits as transformers, batch of four pictures, left padding"""
    moved = s.moved(s.logits, s.reference)
    return "yes" if moved < 1e-4 else "no", f"largest difference {moved:.0e}"


def batch_independence(s: Subject) -> Answer:
    """A sample alone gives the same as in the padded batch"""
    worst = 0.0
    for row, length in enumerate(s.real.sum(dim=1).tolist()):
        alone = s.bridge(s.ids[row : row + 1, -length:], pixel_values=s.rest["pixel_values"][row : row + 1])
        worst = max(worst, float((alone[0] - s.logits[row, -length:]).abs().max()))
    return "yes" if worst < 1e-4 else "no", f"largest difference {worst:.0e}"


def prepares_batches(s: Subject) -> Answer:
    """Makes a batch from pictures and texts of different lengths"""
    pictures = [SceneDataset(2)[index].images for index in range(2)]
    texts = ["<image> what place is this ?", "<image> describe the scene ."]
    try:
        made = s.bridge.prepare_multimodal_inputs([*texts[:1], texts[1] + " what colour ?"], pictures)
    except ValueError as error:
        one = s.bridge.prepare_multimodal_inputs(texts[0], pictures[0])
        return (
            "one at a time",
            f"two: {type(error).__name__} (asks for padding, which can't be given); one: {', '.join(one)}",
        )
    return "yes", ", ".join(made)


def modality(s: Subject) -> Answer:
    """Knows which positions are image or text, and their role; selects by it"""
    words = ("modal", "image", "role", "position_kind")
    public = {name for owner in (s.bridge, s.cache) for name in dir(owner) if not name.startswith("_")}
    found = sorted(name for name in public if any(word in name.lower() for word in words))
    verdict = "no" if found == ["prepare_multimodal_inputs"] else "perhaps"
    return verdict, f"of {len(public)} public names of model and cache only {', '.join(found)} speaks of it"


def embed(s: Subject) -> Answer:
    """`hook_embed` is what enters block 0"""
    apart = (s.cache["hook_embed"] - s.cache["blocks.0.hook_resid_pre"]).abs().amax(dim=-1) > 1e-3
    image = s.ids == s.model.config.image_token_id
    what = "exactly at image positions" if torch.equal(apart, image) else f"at {int(apart.sum())} positions"
    return "no" if apart.any() else "yes", f"it is before the pictures are merged in: differs {what}"


def tower(s: Subject) -> Answer:
    """Reads the vision tower"""
    prefix = "vision_encoder.encoder_layers.1."
    inner = [name.removeprefix(prefix) for name in s.bridge.hook_dict if name.startswith(prefix) and name in s.cache]
    wanted = [
        "hook_resid_pre",
        "hook_resid_mid",
        "hook_resid_post",
        "attn.hook_q",
        "attn.hook_pattern",
        "mlp.hook_post",
    ]
    missing = [name for name in wanted if name not in inner]
    return "yes" if not missing else "mostly", f"{len(inner)} hooks a block; missing: {', '.join(missing) or 'none'}"


def dead_names(s: Subject) -> Answer:
    """Every hook that is listed fires"""
    fired = set(s.cache)
    # The switch for attention's input excludes the one for split inputs.
    for switches in (("attn_result", "split_qkv_input", "hook_mlp_in"), ("attn_in",)):
        switched = bridge(s.model)
        for switch in switches:
            getattr(switched, f"set_use_{switch}")(True)
        fired |= set(switched.run_with_cache(s.ids, **s.rest)[1])
    dead = [name for name in s.bridge.hook_dict if name not in fired]
    kinds = sorted({re.sub(r"\.\d+\.", ".{l}.", name) for name in dead})
    return "yes" if not s.silent() else "no", (
        f"{len(s.silent())} of {len(s.bridge.hook_dict)} do not; {len(dead)} do not under any switch for inputs and "
        f"results either, among them {', '.join(kinds[-3:])}"
    )


def asks_for_dead_name(s: Subject) -> Answer:
    """Asking for a hook that never fires is refused"""
    dead = "vision_projector.hook_projected"
    cache = s.bridge.run_with_cache(s.ids, names_filter=[dead], **s.rest)[1]
    return "no" if not len(
        cache
    ) else "yes", f"{dead}: no error, {len(cache)} values; a write moves logits by {s.write(dead)}"


def misspelt(s: Subject) -> Answer:
    """A misspelt name is refused"""
    try:
        s.bridge.run_with_cache(s.ids, names_filter="blocks.1.hook_resid_pst", **s.rest)
    except KeyError as error:
        return "yes", f"{type(error).__name__}: {str(error)[1:66]}..."
    return "no", "nothing is said"


def resid_mid(s: Subject) -> Answer:
    """A write at `hook_resid_mid` moves the residual stream"""
    new, seen = torch.zeros_like(s.cache["blocks.2.hook_resid_mid"]), {}
    hooks: list[Any] = [("blocks.2.hook_resid_mid", lambda value, hook: new)]
    hooks += [
        (name, lambda value, hook: seen.update({hook.name: value}))
        for name in ("blocks.2.hook_mlp_out", "blocks.2.hook_out")
    ]
    moved = s.moved(s.bridge.run_with_hooks(s.ids, fwd_hooks=hooks, **s.rest))
    off = float((seen["blocks.2.hook_out"] - seen["blocks.2.mlp.hook_out"] - new)[s.real].abs().max())
    found = (
        f"the MLP sees it (logits move by {moved:.1g}), but resid_post - mlp_out is off the written value by {off:.0f}"
    )
    return "no" if off > 1e-3 else "yes", found


def text_patterns(s: Subject) -> Answer:
    """Writes to attention patterns, text"""
    moved = s.write("blocks.2.attn.hook_pattern")
    return "yes" if moved else "no", f"{acts(moved)}; per family above"


def tower_patterns(s: Subject) -> Answer:
    """Writes to attention patterns, tower"""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        moved = s.write("vision_encoder.encoder_layers.1.attn.hook_pattern")
    said = any("discarded" in str(warning.message) for warning in told)
    return "yes" if moved else "no", acts(moved) + (", with a warning" if said else "")


def generation(s: Subject) -> Answer:
    """Hooks in generation, prefill and every step, equal to raw PyTorch hooks"""
    shapes, tokens = hooked_generation(s, "generate")
    same = torch.equal(tokens, raw_generation(s))
    return "yes" if same else "no", f"batch of 4, left padding: called with (rows, positions) {shapes}"


def beams(s: Subject) -> Answer:
    """Beam search with hooks"""
    greedy, tokens = hooked_generation(s, "generate", num_beams=3)
    ignored = greedy[0][0] == len(s.ids) and torch.equal(tokens, hooked_generation(s, "generate")[1])
    whole, tokens = hooked_generation(s, "hf_generate", num_beams=3)
    same = torch.equal(tokens, raw_generation(s, num_beams=3))
    return "by hf_generate" if same else "no", (
        f"hf_generate(num_beams=3) equals raw hooks ({whole[1][0]} rows)"
        + ("; generate(num_beams=3) says nothing and searches greedily" if ignored else "")
    )


def hooked_generation(s: Subject, method: str, **options: Any) -> tuple[list[tuple[int, int]], Tensor]:
    """The shapes a hook was called with, and the new tokens."""
    shapes: list[tuple[int, int]] = []

    def change(value: Tensor, hook: Any) -> Tensor:
        shapes.append((value.shape[0], value.shape[1]))
        return value.flip(-1)

    with s.bridge.hooks(fwd_hooks=[("blocks.2.hook_resid_post", change)]):
        shared = {"max_new_tokens": 4, "do_sample": False, "stop_at_eos": False, "return_type": "tokens"}
        if method == "generate":
            shared["verbose"] = False
        tokens = getattr(s.bridge, method)(s.ids, **shared, **s.rest, **options)
    return shapes, tokens[:, -4:]


def raw_generation(s: Subject, **options: Any) -> Tensor:
    """The new tokens with the same change by a PyTorch hook."""
    layer = s.plain.model.language_model.layers[2]
    handle = layer.register_forward_hook(
        lambda module, args, output: (output[0].flip(-1), *output[1:]) if isinstance(output, tuple) else output.flip(-1)
    )
    try:
        return s.plain.generate(**s.inputs, max_new_tokens=4, do_sample=False, eos_token_id=None, **options)[:, -4:]
    finally:
        handle.remove()


def generation_cache(s: Subject) -> Answer:
    """Cache of a generation with pictures"""
    try:
        s.bridge.generate(
            s.ids[:1], max_new_tokens=2, return_cache=True, verbose=False, pixel_values=s.rest["pixel_values"][:1]
        )
    except NotImplementedError as error:
        return "no", f"{type(error).__name__}: {str(error).split('.')[0]}"
    return "yes", ""


def stops(s: Subject) -> Answer:
    """`stop_at_layer` with pictures"""
    out, _ = s.bridge.run_with_cache(s.ids, stop_at_layer=3, **s.rest)
    same = torch.equal(out, s.cache["blocks.3.hook_resid_pre"])
    return (
        "yes" if same else "no",
        "gives the residual stream before that block, bit for bit" if same else "other values",
    )


def gradients(s: Subject) -> Answer:
    """Gradients at hooks, from the loss to the projector"""
    names = ["vision_projector.hook_out", "blocks.2.hook_resid_post"]
    with torch.enable_grad():
        model = copy.deepcopy(s.model).requires_grad_(True)
        found = bridge(model).run_with_cache(s.ids, return_type="loss", incl_bwd=True, names_filter=names, **s.rest)[1]
    got = [name for name in names if float(found[f"{name}_grad"].abs().max()) > 0]
    return "yes" if got == names else "no", f"`incl_bwd=True`: {', '.join(got)}"


def heads(s: Subject) -> Answer:
    """Per-head results and logit attribution"""
    parts = s.cache.stack_head_results(layer=-1, incl_remainder=False)
    whole = sum(s.cache[f"blocks.{layer}.hook_attn_out"] for layer in range(len(s.bridge.blocks)))
    off = float((parts.sum(dim=0) - whole)[s.real].abs().max())
    scores = s.cache.logit_attrs(parts, tokens=5)
    return (
        "yes" if off < 1e-4 else "no",
        f"heads sum to what attention adds within {off:.0e}; scores {tuple(scores.shape)}",
    )


def decomposition(s: Subject) -> Answer:
    """Components of the residual stream sum to it"""
    total = s.cache.decompose_resid(layer=-1).sum(dim=0)
    off = (total - s.cache[f"blocks.{len(s.bridge.blocks) - 1}.hook_resid_post"]).abs().amax(dim=-1)
    image = s.ids == s.model.config.image_token_id
    text, picture = float(off[s.real & ~image].max()), float(off[image].max())
    verdict = {(True, True): "yes", (True, False): "at text positions"}.get((text < 1e-3, picture < 1e-3), "no")
    return verdict, f"decompose_resid: off by {text:.0e} at text positions, by {picture:.0f} at image positions"


def leaves_model(s: Subject) -> Answer:
    """Leaves the model it is given as it was"""
    model = copy.deepcopy(s.model)
    keys, before = list(model.state_dict()), model.config._attn_implementation
    TransformerBridge.boot_transformers(str(small_model_path("llava")), hf_model=model, device="cpu")
    layer = type(model.model.language_model.layers[0]).__name__
    same = keys == list(model.state_dict())
    return "yes" if same else "no", (
        f"its layers become {layer}, {'' if same else 'names of weights change, '}attention {before} becomes "
        f"{model.config._attn_implementation}"
    )


def peft(s: Subject) -> Answer:
    """Takes a PEFT-wrapped model"""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(copy.deepcopy(s.model), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    expected = adapted(**s.inputs).logits
    found = {}
    for name, model in {"wrapped": adapted, "its base model": adapted.get_base_model()}.items():
        try:
            made = bridge(model)
            found[name] = f"logits differ by {s.moved(made(s.ids, **s.rest), expected):.0e}"
        except Exception as error:  # whatever it is, it is the finding
            found[name] = f"{type(error).__name__}: {error}"
    verdict = "no" if "Error" in found["wrapped"] else "yes"
    return verdict, "; ".join(f"{name}: {what}" for name, what in found.items())


def installs(s: Subject) -> Answer:
    """Loading changes nothing outside the model"""
    tokenizer = AutoTokenizer.from_pretrained(small_model_path("llava"))
    with mock.patch.object(subprocess, "check_call", side_effect=OSError("not allowed here")) as call:
        TransformerBridge.boot_transformers(
            "nowhere", hf_model=copy.deepcopy(s.model), tokenizer=tokenizer, device="cpu"
        )
    commands = [" ".join(args[0][0][1:]) for args in call.call_args_list]
    found = (
        f"where a processor can't be loaded and torchvision is missing, it runs `python {commands[0]}`"
        if commands
        else ""
    )
    return "no" if commands else "yes", found


QUESTIONS: tuple[Callable[[Subject], Answer], ...] = (
    *(same_logits, batch_independence, prepares_batches, modality, embed, tower, dead_names, asks_for_dead_name),
    *(misspelt, resid_mid, text_patterns, tower_patterns, generation, beams, generation_cache, stops, gradients),
    *(heads, decomposition, leaves_model, peft, installs),
)


def packed_tower() -> Answer:
    """Packed tower (Qwen2.5-VL): values by picture, q, k, v by head"""
    model = miniature("qwen2_5_vl")
    with without_torchvision_check(model):
        s = Subject(model, miniature_inputs(model))
    parts = [
        name for name in ("qkv.hook_out", "hook_q", "hook_pattern") if f"vision_encoder.blocks.1.attn.{name}" in s.cache
    ]
    shape = tuple(s.cache["vision_encoder.blocks.1.hook_resid_post"].shape)
    grids = s.inputs["image_grid_thw"].prod(dim=1).tolist()
    packed = shape[0] == sum(grids) and parts == ["qkv.hook_out"]
    found = f"resid_post is {shape} for pictures of {grids} patches, with no index of pictures; attention has "
    return "no" if packed else "yes", found + ", ".join(parts)


def main() -> None:
    """Print both tables."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.set_grad_enabled(False)
    packages = ("transformer-lens", "transformers", "torch")
    print(f"{date.today()}, Python {platform.python_version()}, {', '.join(f'{p} {version(p)}' for p in packages)}\n")
    print(
        "| family | loads | logits differ from transformers by | hooks that fire | writes to text patterns "
        "| rotated q and k | tower's blocks | writes to tower patterns |\n|---|---|---|---|---|---|---|---|"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for family in FAMILIES:
            print(family_row(family), flush=True)
        size = small_llava()
        subject = Subject(size.model, size.batch(4))
        print("\n| can it? | TransformerLens | found |\n|---|---|---|")
        for question in QUESTIONS:
            verdict, found = question(subject)
            print(f"| {(question.__doc__ or '').strip()} | {verdict} | {found} |", flush=True)
        verdict, found = packed_tower()
        print(f"| {(packed_tower.__doc__ or '').strip()} | {verdict} | {found} |")


if __name__ == "__main__":
    main()
