"""Molmo's tower and connector: crops to image tokens.

    patches (24 x 24)  --tower, blocks -2 and -9 side by side--> 2048  (+ a learned vector where a patch is padding)
        --attention of the mean of 2 x 2 neighbours to these-->  1024  (12 x 12)  --gated MLP-->  3584

Modules are named as the published checkpoint's keys. Facts: the training repository allenai/molmo (olmo/image_vit.py;
`MolmoVisionBackbone` in olmo/model.py).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hooked_mm.molmo.configuration_molmo import MolmoConfig, MolmoVisionConfig


def eager_attention_forward(
    module: Any,
    query: Float[Tensor, "b heads q d"],
    key: Float[Tensor, "b kv_heads k d"],
    value: Float[Tensor, "b kv_heads k d"],
    attention_mask: Tensor | None,
    scaling: float,
    **options: Any,
) -> tuple[Float[Tensor, "b q heads d"], Float[Tensor, "b heads q k"]]:
    """softmax(q k^T * scaling + mask) v, and the pattern; the mask is additive.

    Scores are of float32 at least, as in the original (`float32_attention`) and in fused kernels.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    wide = torch.promote_types(torch.float32, query.dtype)
    scores = torch.matmul(query.to(wide), key.to(wide).transpose(2, 3)) * scaling
    scores = scores if attention_mask is None else scores + attention_mask[..., : key.shape[2]]
    pattern = scores.softmax(dim=-1).to(query.dtype)
    return torch.matmul(pattern, value).transpose(1, 2).contiguous(), pattern


class MolmoVisionAttention(nn.Module):
    """Attention with separate projections, of the tower's blocks and of the connector (whose keys are wider)."""

    def __init__(self, config: MolmoVisionConfig, width_in: int) -> None:
        super().__init__()
        self.config = config
        self.num_heads, self.head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self.scaling, self.is_causal = self.head_dim**-0.5, False
        self.wq, self.wk, self.wv = (nn.Linear(width_in, config.hidden_size) for _ in range(3))
        self.wo = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: Float[Tensor, "n q d_in"], others: Float[Tensor, "n k d_in"] | None = None
    ) -> Float[Tensor, "n q d"]:
        others = hidden_states if others is None else others
        q, k, v = self.wq(hidden_states), self.wk(others), self.wv(others)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
        # Written so, transformers sees that `set_attn_implementation` may change it.
        name = self.config._attn_implementation
        if hasattr(ALL_ATTENTION_FUNCTIONS, "get_interface"):
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        else:
            # transformers 5.0, which looks for this very index to see that the function may be switched.
            attend = eager_attention_forward
            if name != "eager":
                attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        mixed, _ = attend(self, q, k, v, None, scaling=self.scaling, dropout=0.0, is_causal=False)
        return self.wo(mixed.flatten(-2))


class MolmoVisionMLP(nn.Module):
    """A projection, an activation function and a projection."""

    def __init__(self, config: MolmoVisionConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = ACT2FN[config.hidden_act]
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Float[Tensor, "n p d"]) -> Float[Tensor, "n p d"]:
        return self.w2(self.act(self.w1(x)))


class MolmoVisionBlock(nn.Module):
    """x + attention(norm x), then + MLP(norm x)."""

    def __init__(self, config: MolmoVisionConfig) -> None:
        super().__init__()
        self.attention = MolmoVisionAttention(config, config.hidden_size)
        self.feed_forward = MolmoVisionMLP(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.ffn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Float[Tensor, "n p d"]) -> Float[Tensor, "n p d"]:
        hidden_states = hidden_states + self.attention(self.attention_norm(hidden_states))
        return hidden_states + self.feed_forward(self.ffn_norm(hidden_states))


class MolmoVisionBlocks(nn.Module):
    """The tower's blocks, one behind the other."""

    def __init__(self, config: MolmoVisionConfig) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(MolmoVisionBlock(config) for _ in range(config.num_hidden_layers))

    def forward(self, value: Float[Tensor, "n p d"]) -> list[Float[Tensor, "n p d"]]:
        seen = []
        for block in self.resblocks:
            value = block(value)
            seen.append(value)
        return seen


class MolmoVisionTower(PreTrainedModel):
    """CLIP's tower on patches that are rows of pixels, a class token in front; what every block gives."""

    config_class = MolmoVisionConfig
    config: MolmoVisionConfig
    main_input_name = "crops"
    input_modalities = ("image",)
    _no_split_modules = ("MolmoVisionBlock",)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: MolmoVisionConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(config.side**2 + 1, width))
        self.patch_embedding = nn.Linear(3 * config.patch_size**2, width, bias=False)
        self.pre_ln = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.transformer = MolmoVisionBlocks(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MolmoVisionTower):
            init.normal_(module.class_embedding, std=0.02)
            init.normal_(module.positional_embedding, std=0.02)

    def forward(self, crops: Float[Tensor, "n patches pixels"]) -> list[Float[Tensor, "n patches+1 d"]]:
        patches = self.patch_embedding(crops)
        lead = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        value = torch.cat([lead, patches], dim=1) + self.positional_embedding.to(patches.dtype)
        found: list[Tensor] = self.transformer(self.pre_ln(value))
        return found


class MolmoImageProjector(nn.Module):
    """silu(w1 x) * w3 x through w2."""

    def __init__(self, config: MolmoConfig) -> None:
        super().__init__()
        width, inner = config.vision_config.hidden_size, config.intermediate_size // 2
        self.w1, self.w3 = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.w2 = nn.Linear(inner, config.hidden_size, bias=False)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Float[Tensor, "n tokens d_vision"]) -> Float[Tensor, "n tokens d"]:
        return self.w2(self.act(self.w1(x)) * self.w3(x))


class MolmoVisionBackbone(nn.Module):
    """Tower and connector: crops to image tokens."""

    def __init__(self, config: MolmoConfig) -> None:
        super().__init__()
        self.config = config
        width = config.vision_config.hidden_size * len(config.vision_feature_layer)
        self.image_vit = MolmoVisionTower(config.vision_config)
        # Added to patches that are padding (row 0), and to those that are so in part (row 1).
        self.pad_embed = nn.Parameter(torch.zeros(2, width))
        self.image_pooling_2d = MolmoVisionAttention(config.vision_config, width)
        self.image_projector = MolmoImageProjector(config)

    def forward(
        self, crops: Float[Tensor, "n patches pixels"], masks: Float[Tensor, "n patches"]
    ) -> Float[Tensor, "n tokens d"]:
        """Image tokens of crops.

        Args:
            crops: Patches row by row, each a row of its pixels (row, column, channel).
            masks: Which part of each patch is picture and not padding; -1 for a crop of which that is not told.
        """
        seen = self.image_vit(crops)
        value = torch.cat([seen[layer] for layer in self.config.vision_feature_layer], dim=-1)[:, 1:]
        padding = (masks == 0, (masks < 1) & (masks != 0))
        for vector, where in zip(self.pad_embed, padding, strict=True):
            value = value + vector * where[..., None].to(value.dtype)
        side = self.config.vision_config.side // 2
        # Neighbours two by two: (n, rows, 2, cols, 2, d) -> (n * rows * cols, 4, d).
        groups = value.unflatten(1, (side, 2, side, 2)).transpose(2, 3).flatten(3, 4).flatten(0, 2)
        pooled = self.image_pooling_2d(groups.mean(dim=1, keepdim=True), groups)
        return self.image_projector(pooled.reshape(len(crops), side * side, -1))
