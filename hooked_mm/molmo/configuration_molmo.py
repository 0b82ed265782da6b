"""Molmo's configuration: the published file's names, with what it leaves to its code as defaults."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from hooked_mm.errors import UnsupportedModelError


class MolmoVisionConfig(PreTrainedConfig):
    """The tower: OpenAI's CLIP ViT-L/14 at 336 pixels, of whose 24 blocks the checkpoint holds the first 23.

    Args:
        hidden_size: Width of the stream.
        intermediate_size: Neurons of an MLP.
        num_hidden_layers: Blocks.
        num_attention_heads: Heads of a block, and of the connector's attention.
        image_size: Side of a crop in pixels.
        patch_size: Side of a patch in pixels.
        layer_norm_eps: Of every norm.
        hidden_act: Activation function of the MLPs.
    """

    model_type = "molmo_vision"
    base_config_key = "vision_config"

    def __init__(
        self,
        hidden_size: int = 1024,
        intermediate_size: int = 4096,
        num_hidden_layers: int = 23,
        num_attention_heads: int = 16,
        image_size: int = 336,
        patch_size: int = 14,
        layer_norm_eps: float = 1e-5,
        hidden_act: str = "quick_gelu",
        **options: Any,
    ) -> None:
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.image_size, self.patch_size = image_size, patch_size
        self.layer_norm_eps, self.hidden_act = layer_norm_eps, hidden_act
        super().__init__(**options)
        if image_size % (2 * patch_size):
            raise UnsupportedModelError(
                f"crops of {image_size} pixels in patches of {patch_size} have {image_size / patch_size:g} patches in "
                "a row; neighbours are pooled two by two, so there must be an even number"
            )

    @property
    def side(self) -> int:
        """Patches in a row of a crop."""
        return int(self.image_size) // int(self.patch_size)


# What the published configuration may say of the decoder -> the only value that is built here.
BUILT = {
    "layer_norm_type": "rms",
    "attention_layer_norm": False,
    "norm_after": False,
    "clip_qkv": None,
    "weight_tying": False,
    "use_position_ids": True,
}


class MolmoConfig(PreTrainedConfig):
    """A decoder of OLMo's plan with Qwen2's sizes, the tower, and what lies between them.

    Args:
        vocab_size: Words that the model can say.
        embedding_size: Rows of the main token embedding; those of `vocab_size` if not given.
        additional_vocab_size: Rows of the second token embedding, whose ids follow the first's; never said.
        hidden_size: Width of the stream.
        intermediate_size: Outputs of an MLP's fused projection, *twice* its neurons.
        num_hidden_layers: Blocks.
        num_attention_heads: Heads.
        num_key_value_heads: Heads of keys and values; as many as heads if not given.
        max_position_embeddings: Longest sequence of training.
        layer_norm_eps: Of every norm.
        rope_theta: Base of the rotary embedding.
        qkv_bias: Whether queries, keys and values have a bias.
        vision_config: The tower's sizes; the published model's if not given, as in its own file.
        vision_feature_layer: The tower's blocks, counted from its end, whose outputs are what the connector reads.
        image_patch_id: The token at whose positions image features are added; the published tokenizer's.
        options: Everything else that a configuration may have.

    Raises:
        UnsupportedModelError: If the decoder is built otherwise than Molmo-7B-D's and 72B's (as 7B-O's, of OLMo).
    """

    model_type = "molmo"
    # Older versions of transformers know the first name only.
    sub_configs = {"vision_config": MolmoVisionConfig}  # noqa: RUF012
    sub_configs_defaults = {"vision_config": MolmoVisionConfig}  # noqa: RUF012
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        vocab_size: int = 152064,
        embedding_size: int | None = None,
        additional_vocab_size: int = 128,
        hidden_size: int = 3584,
        intermediate_size: int = 37888,
        num_hidden_layers: int = 28,
        num_attention_heads: int = 28,
        num_key_value_heads: int | None = 4,
        max_position_embeddings: int = 4096,
        layer_norm_eps: float = 1e-6,
        rope_theta: float | None = None,
        qkv_bias: bool = True,
        vision_config: dict[str, Any] | MolmoVisionConfig | None = None,
        vision_feature_layer: Sequence[int] = (-2, -9),
        image_patch_id: int = 152066,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        **options: Any,
    ) -> None:
        self.vocab_size, self.additional_vocab_size = vocab_size, additional_vocab_size
        self.embedding_size = vocab_size if embedding_size is None else embedding_size
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.max_position_embeddings, self.layer_norm_eps = max_position_embeddings, layer_norm_eps
        self.qkv_bias, self.initializer_range, self.use_cache = qkv_bias, initializer_range, use_cache
        rope: dict[str, Any] = options.pop("rope_parameters", None) or {"rope_type": "default"}
        self.rope_parameters = {"rope_theta": 1e6, **rope} | ({} if rope_theta is None else {"rope_theta": rope_theta})
        if isinstance(vision_config, dict):
            vision_config = MolmoVisionConfig(**vision_config)
        self.vision_config = MolmoVisionConfig() if vision_config is None else vision_config
        self.vision_feature_layer = list(vision_feature_layer)
        self.image_patch_id = image_patch_id
        self.hidden_act = "silu"
        for name, only in BUILT.items():
            if (value := options.setdefault(name, only)) != only:
                raise UnsupportedModelError(
                    f"a Molmo decoder with {name}={value!r} is not built here, only with {only!r}, as Molmo-7B-D-0924 "
                    "and Molmo-72B-0924 have it"
                )
        options["tie_word_embeddings"] = False
        # The published files say nothing of these; the tokenizer's end-of-text token is its padding, too.
        options = {"eos_token_id": 151643, "pad_token_id": 151643, **options}
        super().__init__(**options)

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return int(self.hidden_size) // int(self.num_attention_heads)
