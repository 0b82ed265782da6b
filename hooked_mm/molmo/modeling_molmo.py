"""Molmo's model: modules named as the published checkpoint's keys, so that it loads without a table of names.

Image features are *added* to the embeddings of the image positions. A picture is shown as crops, of which the first is
the whole picture made small; crops overlap, and `image_input_idx` says where each pooled patch of each crop belongs,
negative where it belongs nowhere. Facts: the training repository allenai/molmo (olmo/model.py).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hooked_mm.errors import BadInputError
from hooked_mm.molmo.configuration_molmo import MolmoConfig
from hooked_mm.molmo.vision_molmo import MolmoVisionBackbone, eager_attention_forward

Rotary = tuple[Float[Tensor, "b 1 p d_head"], Float[Tensor, "b 1 p d_head"]]
"""Cosines and sines."""


def rotary(
    position_ids: Int[Tensor, "b p"], width: int, theta: float, dtype: torch.dtype = torch.float32
) -> tuple[Float[Tensor, "b 1 p width"], Float[Tensor, "b 1 p width"]]:
    """Cosines and sines of p * theta^(-2i / width), the width's two halves alike (Su et al. 2021, by halves)."""
    steps = torch.arange(0, width, 2, device=position_ids.device, dtype=dtype) / width
    angles = position_ids[..., None].to(dtype) / theta**steps
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos(), angles.sin()


def rotate(x: Float[Tensor, "b heads p d"], cos: Tensor, sin: Tensor) -> Float[Tensor, "b heads p d"]:
    """Queries or keys turned by their position, in float32 at least."""
    wide = x.to(torch.promote_types(torch.float32, x.dtype))
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


class MolmoRMSNorm(nn.Module):
    """x / sqrt(mean x^2 + eps), computed in float32 at least, times a gain."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = eps

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        wide = x.to(torch.promote_types(torch.float32, x.dtype))
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)


class MolmoEmbedding(nn.Module):
    """Token embeddings in two tables: words, and behind them tokens that Molmo added."""

    def __init__(self, words: int, added: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(words, width))
        self.new_embedding = nn.Parameter(torch.zeros(added, width))

    @property
    def num_embeddings(self) -> int:
        """Rows of both tables."""
        return len(self.embedding) + len(self.new_embedding)

    @property
    def weight(self) -> Float[Tensor, "rows d"]:
        """Both tables as one."""
        return torch.cat([self.embedding, self.new_embedding])

    def forward(self, ids: Int[Tensor, "b p"]) -> Float[Tensor, "b p d"]:
        # The tables are never joined: the first has half a billion numbers in the large model.
        words = len(self.embedding)
        old = nn.functional.embedding(ids.clamp_max(words - 1), self.embedding)
        new = nn.functional.embedding((ids - words).clamp_min(0), self.new_embedding)
        return torch.where((ids < words)[..., None], old, new)


class MolmoAttention(nn.Module):
    """Attention of projected queries, keys and values; it has no weights of its own."""

    def __init__(self, config: MolmoConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True

    def forward(
        self,
        query: Float[Tensor, "b q d"],
        key: Float[Tensor, "b q d_kv"],
        value: Float[Tensor, "b q d_kv"],
        position_embeddings: Rotary,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **options: Any,
    ) -> tuple[Float[Tensor, "b q d"], Tensor | None]:
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in (query, key, value))
        q, k = rotate(q, *position_embeddings), rotate(k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        # Written so, transformers sees that `set_attn_implementation` may change it.
        name = self.config._attn_implementation
        if hasattr(ALL_ATTENTION_FUNCTIONS, "get_interface"):
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        else:
            # transformers 5.0, which looks for this very index to see that the function may be switched.
            attend = eager_attention_forward
            if name != "eager":
                attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        mixed, pattern = attend(self, q, k, v, attention_mask, scaling=self.scaling, dropout=0.0, **options)
        return mixed.flatten(-2), pattern


class MolmoBlock(nn.Module):
    """x + attention(norm x), then + silu(gate) * up through a projection; all projections that can be fused are."""

    def __init__(self, config: MolmoConfig, layer_idx: int) -> None:
        super().__init__()
        width, keys = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.fused = (width, keys, keys)
        self.att_proj = nn.Linear(width, sum(self.fused), bias=config.qkv_bias)
        self.attn = MolmoAttention(config, layer_idx)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.ff_proj = nn.Linear(width, config.intermediate_size, bias=False)
        self.ff_out = nn.Linear(config.intermediate_size // 2, width, bias=False)
        self.attn_norm = MolmoRMSNorm(width, config.layer_norm_eps)
        self.ff_norm = MolmoRMSNorm(width, config.layer_norm_eps)
        self.act = ACT2FN[config.hidden_act]

    def forward(
        self,
        hidden_states: Float[Tensor, "b p d"],
        position_embeddings: Rotary,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **options: Any,
    ) -> Float[Tensor, "b p d"]:
        query, key, value = self.att_proj(self.attn_norm(hidden_states)).split(self.fused, dim=-1)
        mixed, _ = self.attn(query, key, value, position_embeddings, attention_mask, past_key_values, **options)
        hidden_states = hidden_states + self.attn_out(mixed)
        # The fused projection holds the up projection first, then the gate.
        up, gate = self.ff_proj(self.ff_norm(hidden_states)).chunk(2, dim=-1)
        return hidden_states + self.ff_out(self.act(gate) * up)


class MolmoDecoder(nn.Module):
    """The decoder's blocks, with both ends of the vocabulary (`wte`, `ff_out`), where the checkpoint has them."""

    def __init__(self, config: MolmoConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = MolmoEmbedding(config.embedding_size, config.additional_vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(MolmoBlock(config, layer) for layer in range(config.num_hidden_layers))
        self.ln_f = MolmoRMSNorm(config.hidden_size, config.layer_norm_eps)
        self.ff_out = nn.Linear(config.hidden_size, config.embedding_size, bias=False)

    def forward(
        self,
        inputs_embeds: Float[Tensor, "b p d"],
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "b p"] | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        **options: Any,
    ) -> BaseModelOutputWithPast:
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past, length = 0 if past_key_values is None else past_key_values.get_seq_length(), inputs_embeds.shape[1]
        if position_ids is None:
            position_ids = _positions(attention_mask, past, length, inputs_embeds.device)
        mask = _causal_mask(self.config, inputs_embeds, attention_mask, past_key_values, position_ids)
        wide = torch.promote_types(torch.float32, inputs_embeds.dtype)
        turned = rotary(position_ids, self.config.head_dim, self.config.rope_parameters["rope_theta"], wide)
        value, seen = inputs_embeds, []
        for block in self.blocks:
            seen.append(value)
            value = block(value, turned, mask, past_key_values)
        value = self.ln_f(value)
        return BaseModelOutputWithPast(
            last_hidden_state=value,
            past_key_values=past_key_values,
            hidden_states=(*seen, value) if output_hidden_states else None,
        )


def _positions(mask: Tensor | None, past: int, length: int, device: torch.device) -> Int[Tensor, "b p"]:
    """Positions counted from the first token that is not padding."""
    if mask is None or mask.ndim != 2:
        return torch.arange(past, past + length, device=device)[None]
    return (mask.long().cumsum(dim=1) - 1).clamp_min(0)[:, -length:]


def _causal_mask(
    config: MolmoConfig, embeds: Tensor, mask: Tensor | None, past: Cache | None, position_ids: Tensor
) -> Tensor | None:
    """transformers' mask; older versions call the embeddings otherwise and want to be told where they begin."""
    takes = inspect.signature(create_causal_mask).parameters
    known = {"config": config, "attention_mask": mask, "past_key_values": past, "position_ids": position_ids}
    known["inputs_embeds" if "inputs_embeds" in takes else "input_embeds"] = embeds
    if "cache_position" in takes:
        begin = 0 if past is None else past.get_seq_length()
        known["cache_position"] = torch.arange(begin, begin + embeds.shape[1], device=embeds.device)
    found: Tensor | None = create_causal_mask(**known)
    return found


class MolmoModel(nn.Module):
    """Everything under the checkpoint's `model.`."""

    def __init__(self, config: MolmoConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = MolmoDecoder(config)
        self.vision_backbone = MolmoVisionBackbone(config)

    def forward(
        self,
        input_ids: Int[Tensor, "b p"] | None = None,
        images: Float[Tensor, "b crops patches pixels"] | None = None,
        image_masks: Float[Tensor, "b crops patches"] | None = None,
        image_input_idx: Int[Tensor, "b crops tokens"] | None = None,
        inputs_embeds: Float[Tensor, "b p d"] | None = None,
        logits_to_keep: int | Tensor = 0,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        if inputs_embeds is None:
            if input_ids is None:
                raise BadInputError("Molmo was given neither input_ids nor inputs_embeds; give one of them")
            inputs_embeds = self.transformer.wte(input_ids)
        if images is not None:
            if image_input_idx is None:
                raise BadInputError("`images` say nothing without `image_input_idx`: where each image token belongs")
            inputs_embeds = self.with_images(inputs_embeds, images, image_masks, image_input_idx)
        found = self.transformer(inputs_embeds=inputs_embeds, **options)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutputWithPast(
            logits=self.transformer.ff_out(found.last_hidden_state[:, kept]),
            past_key_values=found.past_key_values,
            hidden_states=found.hidden_states,
        )

    def with_images(
        self,
        embeds: Float[Tensor, "b p d"],
        images: Float[Tensor, "b crops patches pixels"],
        masks: Float[Tensor, "b crops patches"] | None,
        where: Int[Tensor, "b crops tokens"],
    ) -> Float[Tensor, "b p d"]:
        """Embeddings with image tokens added to them.

        Only crops that belong somewhere go through the tower; the others fill samples up to the same number.
        """
        if images.shape[:2] != where.shape[:2]:
            raise BadInputError(
                f"images of {tuple(images.shape[:2])} (samples, crops) do not fit image_input_idx of "
                f"{tuple(where.shape[:2])}; make both with the model's own processor"
            )
        real: Bool[Tensor, "b crops"] = (where >= 0).any(dim=-1)
        if not bool(real.any()):
            return embeds
        masks = torch.ones_like(images[..., 0]) if masks is None else masks
        tokens = self.vision_backbone(images[real], masks[real]).to(embeds.device)
        where, sample = where[real], real.nonzero()[:, :1].expand(-1, where.shape[-1])
        used = where >= 0
        at = sample[used].to(embeds.device), where[used].to(embeds.device)
        # Out of place: what the embedding gave stays as it was.
        return embeds.index_put(at, tokens[used.to(tokens.device)].to(embeds.dtype), accumulate=True)


class MolmoPreTrainedModel(PreTrainedModel):
    """What transformers has to know of Molmo's modules."""

    config_class = MolmoConfig
    config: MolmoConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    _no_split_modules = ("MolmoBlock", "MolmoVisionBlock")
    _skip_keys_device_placement = ("past_key_values",)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        spread = self.config.initializer_range
        if isinstance(module, MolmoEmbedding):
            init.normal_(module.embedding, std=spread)
            init.normal_(module.new_embedding, std=spread)
        elif isinstance(module, MolmoVisionBackbone):
            init.zeros_(module.pad_embed)
        elif isinstance(module, MolmoRMSNorm):
            init.ones_(module.weight)


class MolmoForCausalLM(MolmoPreTrainedModel, GenerationMixin):
    """Molmo, under the name that the published configuration gives.

    Its forward takes what `MolmoProcessor` makes: `input_ids` (b, p), `attention_mask` (b, p), `images`
    (b, crops, patches, pixels), `image_masks` (b, crops, patches) and `image_input_idx` (b, crops, tokens), the
    position of every image token, negative for none; samples with fewer crops are filled up with such.
    """

    def __init__(self, config: MolmoConfig) -> None:
        super().__init__(config)
        self.model = MolmoModel(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The two tables of token embeddings."""
        return self.model.transformer.wte

    def get_output_embeddings(self) -> nn.Module:
        """The projection to the words."""
        return self.model.transformer.ff_out

    def get_decoder(self) -> nn.Module:
        """The decoder's blocks."""
        return self.model.transformer

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """The tower; the model itself unless asked for images, or if its tower was left out."""
        tower: nn.Module | None = getattr(self.model.vision_backbone, "image_vit", None)
        return self if modality != "image" or tower is None else tower

    def forward(
        self,
        input_ids: Int[Tensor, "b p"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "b p"] | None = None,
        images: Float[Tensor, "b crops patches pixels"] | None = None,
        image_masks: Float[Tensor, "b crops patches"] | None = None,
        image_input_idx: Int[Tensor, "b crops tokens"] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "b p d"] | None = None,
        labels: Int[Tensor, "b p"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        found = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            images=images,
            image_masks=image_masks,
            image_input_idx=image_input_idx,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=self.config.use_cache if use_cache is None else use_cache,
            logits_to_keep=logits_to_keep,
            output_hidden_states=bool(output_hidden_states),
        )
        if labels is not None:
            found.loss = self.loss_function(logits=found.logits, labels=labels, vocab_size=self.config.embedding_size)
        return found

    def adjust_generation_fn(self, *args: Any, **options: Any) -> None:
        """As transformers does; where the generation's file does not say what ends a text, the configuration does."""
        super().adjust_generation_fn(*args, **options)
        for name in ("eos_token_id", "pad_token_id"):
            if getattr(self.generation_config, name) is None:
                setattr(self.generation_config, name, getattr(self.config, name))

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """As transformers does; pictures are shown in the first step only, after which the cache knows them."""
        made: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs)
        past = made.get("past_key_values")
        if past is not None and past.get_seq_length() > 0:
            made |= dict.fromkeys(("images", "image_masks", "image_input_idx"))
        return made
