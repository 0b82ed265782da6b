"""Attention that can be looked into: queries and keys as they are compared, and the pattern, to read and to write.

No module of transformers holds these values. While a run asks for them, the configuration names an attention function
of ours instead of the model's own, which calls *taps*: modules that do nothing, and whose values nnsight reads and
writes like any other's. Only blocks whose pattern is asked for compute it eagerly; all others run the function that the
model was loaded with. Afterwards everything is as before.

Whoever needs some rows of a pattern only gets them from a row tap: the block goes on running the function that the
model was loaded with, and no more than those rows is computed (`attention_rows`).

Eager attention needs a full additive mask where SDPA may do with none, so the mask function is registered together
with the attention function (a private "eager" setting of single layers would leave them without a mask at all).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hooked_mm.attention_own import watched
from hooked_mm.pattern import PatternRows, block_mask, causal, eager_attention, row_patterns, rows_of

TapName = Literal["q", "k", "pattern", "rows"]
_PREFIX = "hooked_mm_"
# transformers hands all images of a packed tower over in one call, with their bounds, to functions named so.
_EAGER, _PACKED = f"{_PREFIX}eager", f"{_PREFIX}flash_like"
# With SDPA's own masks, so that rows which see nothing (padding) add what SDPA makes of them: nothing.
_LIKE_SDPA = f"{_PREFIX}eager_like_sdpa"


class Tap(nn.Identity):
    """A place to read and write a value that no module of the model holds."""


class AttentionTaps(nn.Module):
    """The taps of one attention module, all (batch, heads, pos, ...).

    `rows`, if set, is called once a pass with what gives rows of the pattern that acts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.pattern = Tap(), Tap(), Tap()
        self.rows: Callable[[PatternRows], None] | None = None


@dataclass
class _Active:
    """What a run wants of one attention module."""

    taps: AttentionTaps
    wanted: frozenset[str]


# Attention module -> what the current run wants of it; configuration -> the function its model was loaded with.
# transformers' functions get nothing but the module, so this can't be an argument. Empty outside runs.
_ACTIVE: dict[int, _Active] = {}
_ORIGINAL: dict[int, str] = {}


def _per_image(
    function: Callable[..., Any], bounds: Tensor, module: nn.Module, tensors: list[Tensor], options: dict
) -> Any:
    """Run a function that knows no bounds on each image by itself."""
    parts = zip(*(torch.split(t, (bounds[1:] - bounds[:-1]).tolist(), dim=2) for t in tensors), strict=True)
    return torch.cat([function(module, *part, attention_mask=None, **options)[0] for part in parts], dim=1), None


_BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Stands in for the model's attention function during a run that looks inside."""
    active = _ACTIVE.get(id(module))
    wanted = active.wanted if active else frozenset()
    if active and "q" in wanted:
        query = active.taps.q(query)
    if active and "k" in wanted:
        key = active.taps.k(key)
    original = _ORIGINAL[id(module.config)]
    implementation = module.config._attn_implementation
    bounds = options.get("cu_seq_lens_q") if implementation == _PACKED else None
    if active is not None and "pattern" in wanted:
        mixed, pattern = _eager(active.taps.pattern, module, query, key, value, attention_mask, bounds, options)
        if active.taps.rows is not None:
            active.taps.rows(rows_of(pattern))
        return mixed, pattern
    if active is not None and active.taps.rows is not None:
        take = partial(row_patterns, module, query, key, attention_mask, bounds, options)
        active.taps.rows(PatternRows((*query.shape[:3], key.shape[2]), take))
    # The additive mask of eager attention is one that SDPA takes and flash attention does not.
    name = "sdpa" if implementation == _EAGER and "flash" in original else original
    function = _own_eager(module) if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
    if bounds is not None and "flash" not in original:
        plain = {name: option for name, option in options.items() if name not in _BOUNDS}
        return _per_image(function, bounds, module, [query, key, value], plain)
    return function(module, query, key, value, attention_mask, **options)


def _own_eager(module: nn.Module) -> Callable[..., Any]:
    """The eager attention of the module's own file, which may differ from ours in rounding."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", _plain_eager)


def _eager(
    tap: nn.Module | None,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bounds: Tensor | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    if bounds is not None:
        mask = block_mask(bounds, key.shape[2], key.device)
    if mask is None and query.shape[2] > 1 and causal(module, options):
        # What SDPA does of itself when there is no mask.
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    scaling = options.get("scaling")
    pattern = eager_attention(
        query,
        key,
        mask,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        options.get("softcap"),
        options.get("s_aux"),
        options.get("position_bias"),
    )
    pattern = tap(pattern) if tap is not None else pattern
    mixed = torch.matmul(pattern, value)
    if mask is not None and mask.dtype == torch.bool:
        mixed = mixed.masked_fill(~mask[..., : key.shape[2]].any(dim=-1, keepdim=True), 0)
    return mixed.transpose(1, 2).contiguous(), pattern


def _plain_eager(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    return _eager(None, module, query, key, value, attention_mask, None, options)


def _register(name: str, mask_function: Any) -> None:
    AttentionInterface.register(name, _attention)
    AttentionMaskInterface.register(name, mask_function)


_register(_EAGER, eager_mask)
_register(_PACKED, eager_mask)
_register(_LIKE_SDPA, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


class _StandIn(str):
    """The name of a function of ours, which also equals the name that it stands in for.

    Models whose attention picks some of the keys put that choice into the mask only `if config._attn_implementation in
    ("eager", "sdpa")`, and would attend to everything under another name. Its hash is its own, so tables of functions
    are not misled.
    """

    original: str

    def __new__(cls, name: str, original: str = "") -> _StandIn:
        made = super().__new__(cls, name)
        made.original = original
        return made

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) or other == self.original

    def __ne__(self, other: object) -> bool:
        # Older versions look for a function by its name only `if config._attn_implementation != "eager"`.
        return str.__ne__(self, other)

    __hash__ = str.__hash__


def _stand_in(original: str, patterns: bool, packed: bool) -> str:
    """Name of our function, with the mask that the blocks of this configuration need."""
    if packed:
        return _PACKED
    if patterns:
        return _StandIn(_LIKE_SDPA if original == "sdpa" else _EAGER, original)
    name = f"{_PREFIX}{original}"
    if name not in AttentionInterface()._global_mapping:
        known = original in ALL_MASK_ATTENTION_FUNCTIONS
        _register(name, ALL_MASK_ATTENTION_FUNCTIONS[original] if known else eager_mask)
    return _StandIn(name, original)


@dataclass(frozen=True)
class AttentionSite:
    """One attention module of a model, with its taps.

    `configs`: every configuration object that decides how this module attends and how its mask is made; `own`: it
    computes its pattern itself; `heads`: how many it has, which such patterns may have flattened into their samples.
    """

    module: nn.Module
    taps: AttentionTaps
    configs: tuple[Any, ...]
    packed: bool
    own: bool = False
    heads: int = 1


# Taps of what a softmax gives, which needs a mask that says what may be seen.
_SEEN = frozenset({"pattern", "rows"})


def _own_tap(site: AttentionSite, names: frozenset[str]) -> Callable[[Tensor], Tensor]:
    """What the pattern of a module that computes it itself goes through."""

    def through(pattern: Tensor) -> Tensor:
        pattern = site.taps.pattern(pattern) if "pattern" in names else pattern
        if site.taps.rows is not None:
            site.taps.rows(rows_of(pattern.unflatten(0, (-1, site.heads)) if pattern.ndim == 3 else pattern))
        return pattern

    return through


@contextmanager
def tapped(wanted: Iterable[tuple[AttentionSite, frozenset[str]]]) -> Iterator[None]:
    """While open, these attention modules call their taps (`"q"`, `"k"`, `"pattern"`, `"rows"`); undone at the end."""
    every = list(wanted)
    own = [(site.module, _own_tap(site, names)) for site, names in every if site.own and names & _SEEN]
    rows = [(site, names) for site, names in every if not site.own]
    patterns: dict[int, bool] = {}
    configs: dict[int, tuple[Any, bool]] = {}
    for site, names in rows:
        for config in site.configs:
            configs[id(config)] = (config, site.packed)
            patterns[id(config)] = patterns.get(id(config), False) or bool(names & _SEEN)
    originals = {key: config._attn_implementation_internal for key, (config, _) in configs.items()}
    modules = [id(site.module) for site, _ in rows]
    try:
        for key, (config, packed) in configs.items():
            original = originals[key] or "eager"
            _ORIGINAL[key] = original
            # Only this configuration: the property would hand the name on to configurations of other parts.
            config._attn_implementation_internal = _stand_in(original, patterns[key], packed)
        for site, names in rows:
            _ACTIVE[id(site.module)] = _Active(site.taps, names)
        with watched(own):
            yield
    finally:
        for key, (config, _) in configs.items():
            config._attn_implementation_internal = originals[key]
            _ORIGINAL.pop(key, None)
        for key in modules:
            _ACTIVE.pop(key, None)


def configurations(owner: nn.Module, blocks: Iterable[nn.Module]) -> tuple[Any, ...]:
    """The configuration objects that name the attention function of these blocks and of the module that runs them."""
    found: dict[int, Any] = {}
    for module in (owner, *(inner for block in blocks for inner in block.modules())):
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            found[id(config)] = config
    return tuple(found.values())
