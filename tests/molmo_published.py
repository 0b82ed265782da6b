"""Folders in the layout in which Molmo-7B-D-0924 was published, of any small sizes, with random weights.

Names and shapes as in the index of the 7B (`model.safetensors.index.json`), settings as in its config.json and
preprocessor_config.json, a tokenizer of Qwen2's kind, trained here on a few words, with the special tokens at the ids
that the model needs.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from tests.molmo_reference import MEAN, STD, ImageIds, Sizes

END = "<|endoftext|>"
END_ID = 300
"""Bytes and merges of the tokenizer, and so the id of `END`, which ends, begins and pads."""
# olmo/tokenizer.py; in this order they start at the size of the embedding.
IMAGE_TOKENS = ("<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<|image|>")
# Written into every file of the published repository, for code that is not run here.
REMOTE = {
    "AutoConfig": "config_molmo.MolmoConfig",
    "AutoModelForCausalLM": "modeling_molmo.MolmoForCausalLM",
    "AutoImageProcessor": "image_preprocessing_molmo.MolmoImageProcessor",
    "AutoProcessor": "preprocessing_molmo.MolmoProcessor",
}
_WORDS = (
    "User: Assistant: What is in the picture? A photograph of a cat and two dogs, there are three, the answer is yes. "
)
# How Qwen2 cuts text before merging (its tokenizer.json).
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def published_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the checkpoint, by its name."""
    width, tower, both = sizes.hidden, sizes.tower_hidden, sizes.tower_hidden * len(sizes.tower_taken)
    inner, fused = sizes.fused_mlp // 2, width + 2 * sizes.kv_heads * (width // sizes.heads)
    text: dict[str, tuple[int, ...]] = {
        "wte.embedding": (sizes.embedding, width),
        "wte.new_embedding": (sizes.extra, width),
        "ln_f.weight": (width,),
        "ff_out.weight": (sizes.embedding, width),
    }
    for index in range(sizes.layers):
        text |= {
            f"blocks.{index}.attn_norm.weight": (width,),
            f"blocks.{index}.att_proj.weight": (fused, width),
            f"blocks.{index}.att_proj.bias": (fused,),
            f"blocks.{index}.attn_out.weight": (width, width),
            f"blocks.{index}.ff_norm.weight": (width,),
            f"blocks.{index}.ff_proj.weight": (sizes.fused_mlp, width),
            f"blocks.{index}.ff_out.weight": (width, inner),
        }
    vision: dict[str, tuple[int, ...]] = {
        "pad_embed": (2, both),
        "image_vit.class_embedding": (tower,),
        "image_vit.positional_embedding": (1 + sizes.across**2, tower),
        "image_vit.patch_embedding.weight": (tower, 3 * sizes.patch**2),
        "image_vit.pre_ln.weight": (tower,),
        "image_vit.pre_ln.bias": (tower,),
        "image_projector.w1.weight": (inner, tower),
        "image_projector.w2.weight": (width, inner),
        "image_projector.w3.weight": (inner, tower),
    }
    linears = {f"image_pooling_2d.{name}": (tower, both) for name in ("wq", "wk", "wv")}
    linears["image_pooling_2d.wo"] = (tower, tower)
    for index in range(sizes.tower_blocks):
        block = f"image_vit.transformer.resblocks.{index}"
        linears |= {f"{block}.attention.{name}": (tower, tower) for name in ("wq", "wk", "wv", "wo")}
        linears |= {
            f"{block}.feed_forward.w1": (sizes.tower_mlp, tower),
            f"{block}.feed_forward.w2": (tower, sizes.tower_mlp),
        }
        for norm in ("attention_norm", "ffn_norm"):
            vision |= {f"{block}.{norm}.weight": (tower,), f"{block}.{norm}.bias": (tower,)}
    for name, shape in linears.items():
        vision |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return {f"model.transformer.{name}": shape for name, shape in text.items()} | {
        f"model.vision_backbone.{name}": shape for name, shape in vision.items()
    }


def published_state(sizes: Sizes, seed: int = 0) -> dict[str, Tensor]:
    """Random float32 weights under the published names.

    Matrices keep the size of what they act on, norms and biases are not the neutral 1 and 0: an operation left out
    shows.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
        values = torch.randn(shape, generator=generator)
        if "norm.weight" in name or "ln.weight" in name or "ln_f.weight" in name:
            return 1 + 0.2 * values
        if len(shape) == 1:
            return 0.3 * values
        return values if "embed" in name and not name.endswith(".weight") else values / shape[1] ** 0.5

    return {name: drawn(name, shape) for name, shape in published_shapes(sizes).items()}


def published_config(sizes: Sizes) -> dict[str, Any]:
    """config.json. It says nothing of the tower or the extra rows: those were constants of the remote code."""
    return {
        "architectures": ["MolmoForCausalLM"],
        "attention_layer_norm": False,
        "auto_map": {name: REMOTE[name] for name in ("AutoConfig", "AutoModelForCausalLM")},
        "clip_qkv": None,
        "embedding_size": sizes.embedding,
        "hidden_size": sizes.hidden,
        "initializer_range": 0.02,
        "intermediate_size": sizes.fused_mlp,
        "layer_norm_eps": sizes.rms_eps,
        "layer_norm_type": "rms",
        "max_position_embeddings": sizes.max_positions,
        "model_type": "molmo",
        "norm_after": False,
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": sizes.kv_heads,
        "qkv_bias": True,
        "rope_theta": sizes.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.43.3",
        "use_cache": True,
        "use_position_ids": True,
        "vocab_size": sizes.embedding,
        "weight_tying": False,
    }


def narrowed(sizes: Sizes) -> dict[str, Any]:
    """What the port's config.json has to say besides, for sizes other than the published model's."""
    tower = {
        "hidden_size": sizes.tower_hidden,
        "intermediate_size": sizes.tower_mlp,
        "num_hidden_layers": sizes.tower_blocks,
        "num_attention_heads": sizes.tower_heads,
        "image_size": sizes.side,
        "patch_size": sizes.patch,
    }
    ids = {"image_patch_id": image_ids(sizes).patch, "eos_token_id": END_ID, "pad_token_id": END_ID}
    return {"vision_config": tower, "additional_vocab_size": sizes.extra, **ids}


def published_preprocessor(sizes: Sizes) -> dict[str, Any]:
    """preprocessor_config.json."""
    return {
        "auto_map": {name: REMOTE[name] for name in ("AutoImageProcessor", "AutoProcessor")},
        "base_image_input_size": [sizes.side, sizes.side],
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_padding_mask": True,
        "image_patch_size": sizes.patch,
        "image_processor_type": "MolmoImageProcessor",
        "image_std": list(STD),
        "image_token_length_h": sizes.cells,
        "image_token_length_w": sizes.cells,
        "max_crops": sizes.max_crops,
        "overlap_margins": list(sizes.margins),
        "processor_class": "MolmoProcessor",
    }


def image_ids(sizes: Sizes) -> ImageIds:
    """The ids of the image tokens: they follow the embedding, in the rows of `new_embedding`."""
    return ImageIds(*range(sizes.embedding, sizes.embedding + 4))


@functools.cache
def _merged() -> str:
    """A byte-level tokenizer as JSON, before the special tokens: 256 bytes and some merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=END_ID, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([_WORDS] * 4, trainer)
    return str(tokenizer.to_str())


def published_tokenizer(sizes: Sizes) -> dict[str, Any]:
    """The tokenizer's files by name, ready for JSON but for merges.txt, which is text.

    The ids between the vocabulary and the size of the embedding are filled with tokens that mean nothing, so that the
    image tokens come behind it (`pad_tokenizer_to`, olmo/tokenizer.py).
    """
    base = json.loads(_merged())
    vocab, merges = base["model"]["vocab"], base["model"]["merges"]
    names = [END, "<|im_start|>", "<|im_end|>"]
    fill = sizes.embedding - len(vocab) - len(names)
    if fill < 0:
        raise ValueError(f"an embedding of {sizes.embedding} rows is too small: {len(vocab) + len(names)} are needed")
    more = [f"|<EXTRA_TOKENS_{index}>|" for index in range(fill)] + list(IMAGE_TOKENS)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = {len(vocab) + index: {"content": name, **plain} for index, name in enumerate(names + more)}
    base["added_tokens"] = [{"id": index, **token} for index, token in added.items()]
    settings = {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(index): token for index, token in added.items()},
        "additional_special_tokens": more,
        "auto_map": {"AutoProcessor": REMOTE["AutoProcessor"]},
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": END,
        "processor_class": "MolmoProcessor",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    return {
        "tokenizer.json": base,
        "tokenizer_config.json": settings,
        "vocab.json": vocab,
        "merges.txt": "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges),
        "added_tokens.json": {token["content"]: index for index, token in added.items()},
        "special_tokens_map.json": {"additional_special_tokens": more, "eos_token": END, "pad_token": END},
    }


def write_published(
    folder: Path, sizes: Sizes, state: dict[str, Tensor] | None = None, shards: int = 1, **config: Any
) -> dict[str, Tensor]:
    """Writes a folder as it was published and returns its weights; with several shards there is an index.

    Args:
        folder: where; must exist
        sizes: of the model
        state: weights; random if not given
        shards: number of safetensors files, filled in the order of the names, so that neighbours are apart
        config: what else config.json says (`narrowed`)
    """
    state = state if state is not None else published_state(sizes)
    files = {
        "config.json": published_config(sizes) | config,
        "preprocessor_config.json": published_preprocessor(sizes),
        "processor_config.json": {
            "auto_map": {"AutoProcessor": REMOTE["AutoProcessor"]},
            "processor_class": "MolmoProcessor",
        },
        "generation_config.json": {"_from_model_config": True, "transformers_version": "4.43.3"},
        **published_tokenizer(sizes),
    }
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content, indent=2))
    names = [f"model-{index + 1:05d}-of-{shards:05d}.safetensors" for index in range(shards)]
    names = names if shards > 1 else ["model.safetensors"]
    where = {key: names[index % shards] for index, key in enumerate(sorted(state))}
    for name in names:
        save_file(
            {key: state[key].contiguous() for key in state if where[key] == name}, folder / name, {"format": "pt"}
        )
    if shards > 1:
        total = sum(value.numel() * value.element_size() for value in state.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return state
