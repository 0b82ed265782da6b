"""A vision-language model that nobody has seen: LLaVA's plan in other words, at other places, of modules of its own.

Nothing in it is called as any model of transformers calls it: not the tower, the projector, the decoder, its blocks,
nor what these are made of. Attention is written out, without transformers' interface.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

VOCABULARY, PICTURE = 90, 7
SEEING = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
TELLING = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": VOCABULARY}


class Plain(PretrainedConfig):
    """Sizes of one half."""

    model_type = "made_up_half"


class MadeUpConfig(PretrainedConfig):
    """Sizes of both halves."""

    model_type = "made_up"
    sub_configs: ClassVar[dict[str, type]] = {"vision_config": Plain, "text_config": Plain}

    def __init__(self, **options: Any) -> None:
        self.vision_config = Plain(**SEEING)
        self.text_config = Plain(**TELLING)
        self.image_token_id = PICTURE
        super().__init__(**options)


class Weigh(nn.Module):
    """Divides by the root of the mean square."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


class Glance(nn.Module):
    """Attention with heads, causal or not."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.num_heads, self.causal = heads, causal
        self.ask, self.offer, self.give = (nn.Linear(width, width) for _ in range(3))
        self.gather = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for f in (self.ask, self.offer, self.give))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.gather(mixed.transpose(1, 2).flatten(-2))


class Ponder(nn.Module):
    """A gated MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.widen, self.open = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)
        self.narrow, self.bend = nn.Linear(3 * width, width), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.bend(self.open(x)) * self.widen(x))


class Floor(nn.Module):
    """A block."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.calm, self.steady = (Weigh(width) for _ in range(2))
        self.ponder, self.glance = Ponder(width), Glance(width, heads, causal=causal)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.glance(self.calm(x))
        return x + self.ponder(self.steady(x))


class House(PreTrainedModel):
    """A stack of blocks."""

    config_class = Plain

    def __init__(self, config: Plain, *, causal: bool) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.floors = nn.ModuleList(
            Floor(width, config.num_attention_heads, causal=causal) for _ in range(config.num_hidden_layers)
        )


class Seer(House):
    """The tower."""

    def __init__(self, config: Plain) -> None:
        super().__init__(config, causal=False)
        self.cutter = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size)

    def forward(self, picture: Tensor) -> Tensor:
        x = self.cutter(picture).flatten(2).transpose(1, 2)
        for floor in self.floors:
            x = floor(x)
        return x


class Teller(House):
    """The decoder."""

    def __init__(self, config: Plain) -> None:
        super().__init__(config, causal=True)
        self.words, self.last_word = nn.Embedding(VOCABULARY, config.hidden_size), Weigh(config.hidden_size)

    def forward(self, thoughts: Tensor) -> Tensor:
        x = thoughts
        for floor in self.floors:
            x = floor(x)
        return self.last_word(x)


class MadeUp(PreTrainedModel):
    """The whole, nested one floor deeper than usual."""

    config_class = MadeUpConfig

    def __init__(self, config: MadeUpConfig) -> None:
        super().__init__(config)
        self.head = nn.Module()
        self.head.eyes, self.head.mouth = Seer(config.vision_config), Teller(config.text_config)
        self.bridge = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 48))
        self.speak = nn.Linear(48, VOCABULARY, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.head.mouth.words

    def get_output_embeddings(self) -> nn.Module:
        return self.speak

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor | None = None, attention_mask: Tensor | None = None, **_: Any
    ) -> CausalLMOutput:
        x = self.head.mouth.words(input_ids)
        if pixel_values is not None:
            seen = self.bridge(self.head.eyes(pixel_values))
            x = x.masked_scatter((input_ids == PICTURE)[..., None], seen)
        return CausalLMOutput(logits=self.speak(self.head.mouth(x)))


def made_up() -> MadeUp:
    """The model with random weights, in evaluation mode."""
    torch.manual_seed(0)
    model = MadeUp(MadeUpConfig())
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1)
    return model.eval().requires_grad_(False)


def asked(samples: int = 2) -> dict[str, Tensor]:
    """A picture and a few words per sample."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(8, VOCABULARY, (samples, 5), generator=generator)
    ids = torch.cat([words[:, :2], torch.full((samples, 16), PICTURE), words[:, 2:]], dim=1)
    return {"input_ids": ids, "pixel_values": torch.randn(samples, 3, 32, 32, generator=generator)}
