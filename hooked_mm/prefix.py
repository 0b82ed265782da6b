"""Prompts computed once and continued many times: under other vectors, strengths, layers, whatever acts late enough.

What acts from the last prompt position on leaves the keys and values of all positions before it as they are. So these
are computed once, unsteered, and every continuation starts from them, expanded to its rows:

    shared = SharedPrompts(model, batch)
    rows = [sample for sample in range(len(batch)) for _ in alphas]
    push = Add("blocks.3.hook_resid_post", vector, torch.tensor(alphas).repeat(len(batch)), at="last_prompt")
    output = shared.generate(rows, [push])     # = model.generate(batch.take(rows)) within model.hooks([push])

Where that can't be (hooks that act or look earlier, plain functions, an encoder-decoder, layers of cross-attention, a
model for which the proof fails), the rows are generated as a whole; pictures are then still encoded only once, where
`image_reuse` proves that to be the same.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache

from hooked_mm.batch import Batch, Modality
from hooked_mm.batch_rows import taken
from hooked_mm.errors import BadInputError
from hooked_mm.first_change import first_changed, start_of
from hooked_mm.generation import GenerationOutput, check_left_padding
from hooked_mm.hooked import HookedMM
from hooked_mm.image_reuse import Features, encode, proven, without_pictures, write_features
from hooked_mm.interventions import Add, HookLike, expand
from hooked_mm.layout_source import pictures as pictures_of
from hooked_mm.runner import match_names
from hooked_mm.value_layout import stream_of

logger = logging.getLogger(__name__)

PER_POSITION = ("input_ids", "attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")
KNOWN_OPTIONS = frozenset(
    {
        *("return_logits", "do_sample", "num_beams", "num_return_sequences", "temperature", "top_k", "top_p", "min_p"),
        *("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "length_penalty", "early_stopping"),
        *("min_new_tokens", "eos_token_id", "pad_token_id", "suppress_tokens", "output_scores"),
    }
)
"""Options of a generation that do not touch its cache."""
PROOF_ROWS = 4

_continues: WeakKeyDictionary[HookedMM, dict[tuple[bool, bool], bool]] = WeakKeyDictionary()
"""Per model, whether prompts are proven to go on right: with images or not, with one position left or several."""
_reuses: WeakKeyDictionary[HookedMM, bool] = WeakKeyDictionary()
"""Per model, whether a picture's features are proven to be all that the prompt gets of it."""


class SharedPrompts:
    """Prompts of a batch, to be answered many times under different interventions; what these leave unchanged is
    computed once. In half precision, where sums over other shapes round differently, a near tie of two tokens may fall
    otherwise than in a whole run.

    Args:
        model: Used as it is; hooks that are active on it make everything run as a whole.
        batch: Prompts padded on the left.
        pictures: One sample for each distinct picture, where pictures occur more than once (see `loading.Prepared`).
        picture_of: Per image of `batch`, which of `pictures` it is.

    Raises:
        BadInputError: If a prompt is padded on the right, or `picture_of` has not one entry per image.
    """

    def __init__(
        self, model: HookedMM, batch: Batch, pictures: Batch | None = None, picture_of: Sequence[int] = ()
    ) -> None:
        check_left_padding(batch)
        images = len(batch.image_sample)
        if pictures is not None and len(picture_of) != images:
            raise BadInputError(f"picture_of has {len(picture_of)} entries for {images} images; give one per image")
        self.model, self.batch, self.pictures = model, batch, pictures
        self.picture_of = list(range(images)) if pictures is None else list(picture_of)
        self._start = 0 if batch.decoder is not None else start_of(batch)
        self._prefix: DynamicCache | None = None
        self._features: Features | None = None

    def generate(
        self, rows: Sequence[int], hooks: Sequence[HookLike] = (), max_new_tokens: int = 20, **options: Any
    ) -> GenerationOutput:
        """Answers of these samples: what `model.generate(batch.take(rows), ...)` gives within `model.hooks(hooks)`.

        Args:
            rows: Which sample of the batch each row is; a sample may come many times, in any order. Hooks see the batch
                `batch.take(rows)`, so vectors and strengths may be one per row.
            hooks: Interventions or functions.
            max_new_tokens: As in `HookedMM.generate`.
            options: As in `HookedMM.generate`.

        Raises:
            BadInputError: As `Batch.take` and `HookedMM.generate`.
        """
        chosen = self.batch.take(rows)
        if self._can_continue(chosen, hooks, options):
            copies = _copies(self.model, options)
            cache = _expanded(self._computed(), torch.tensor(list(rows)).repeat_interleave(copies))
            output = _continue(self.model, chosen, cache, hooks, max_new_tokens, options)
            return _with_pictures(output, chosen)
        return self._whole(chosen, rows, hooks, max_new_tokens, options)

    def _can_continue(self, chosen: Batch, hooks: Sequence[HookLike], options: dict[str, Any]) -> bool:
        model, batch = self.model, self.batch
        if model._active or model._active_backward or not self._start or not set(options) <= KNOWN_OPTIONS:
            return False
        if bool((batch.modality[:, self._start :] == Modality.IMAGE).any()):
            return False
        if first_changed(hooks, model, chosen) == "prompt":
            return False
        known, kind = _continues.setdefault(model, {}), (batch.has_images, batch.length - self._start > 1)
        if kind not in known:
            known[kind] = shareable(model, batch.take(_few_rows(batch)), self._start)
        return known[kind]

    def _computed(self) -> DynamicCache:
        """Keys and values of every sample's positions before the start."""
        if self._prefix is None:
            features = self._encoded() if self.pictures is not None else None
            write = None if features is None else (features, self.picture_of)
            self._prefix = compute(self.model, self.batch, self._start, write)
        return self._prefix

    def _encoded(self) -> Features | None:
        """The features of the pictures, where they are proven to be all that matters; None elsewhere."""
        model, batch = self.model, self.batch
        if not batch.has_images or batch.decoder is not None:
            return None
        pictures = batch if self.pictures is None else self.pictures
        if model not in _reuses:
            rows = _few_rows(batch)
            few, images = batch.take(rows), taken(batch.layout, rows).images.tolist()
            last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
            shown = [self.picture_of[image] for image in images]
            try:
                _reuses[model] = proven(model, few, pictures, shown, [last])
            except Exception as error:
                # As in `shareable`: a forward pass that wants its pictures, say.
                logger.warning("pictures of %s are encoded for every setting: %s", model.cfg.family, _line(error))
                _reuses[model] = False
        if _reuses[model] and self._features is None:
            self._features = encode(model, pictures)
        return self._features if _reuses[model] else None

    def _whole(
        self,
        chosen: Batch,
        rows: Sequence[int],
        hooks: Sequence[HookLike],
        max_new_tokens: int,
        options: dict[str, Any],
    ) -> GenerationOutput:
        """The rows from their beginning, pictures encoded once where nothing touches tower or projector."""
        model = self.model
        plain = not chosen.has_images or bool(model._active or model._active_backward) or _touches_tower(model, hooks)
        features = None if plain else self._encoded()
        if features is None:
            with model.hooks(hooks):
                return model.generate(chosen, max_new_tokens, **options)
        copies = [row for row in rows for _ in range(_copies(model, options))]
        images = taken(self.batch.layout, copies).images.tolist()
        write = write_features(self.batch.take(copies), features, [self.picture_of[image] for image in images])
        with model.hooks([write, *hooks]):
            return _with_pictures(model.generate(without_pictures(chosen), max_new_tokens, **options), chosen)


def compute(
    model: HookedMM, batch: Batch, start: int, written: tuple[Features, Sequence[int]] | None = None
) -> DynamicCache:
    """Keys and values of all positions before `start`, no hooks at work.

    Args:
        model: The model.
        batch: Prompts padded on the left.
        start: How many columns are computed.
        written: Features of pictures and which image has which, instead of the pictures themselves.
    """
    head = _head(batch, start)
    hooks = []
    if written is not None:
        hooks.append(write_features(head, *written))
        head = without_pictures(head)
    cache = DynamicCache(config=model._config.get_text_config(decoder=True))
    # As a generation, which has its own way of counting positions; its one token is not run.
    options = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "max_new_tokens": 1}
    model._runner.generate(head, hooks, {**options, "past_key_values": cache})
    return cache


def shareable(model: HookedMM, batch: Batch, start: int | None = None) -> bool:
    """Whether prompts continued from their keys and values give the logits of prompts run as a whole: proven.

    Two tokens are generated in both ways with a vector added at the last prompt position. Logits may differ by 1e-4 of
    the largest in float32, by 3 % in half precision, where other shapes of a batch already make such differences.

    Args:
        model: The model, without active hooks.
        batch: Some prompts, best of different lengths.
        start: The column from which they are continued; None for the last prompt position's.
    """
    implementation = getattr(model.hf_model.generation_config, "cache_implementation", None)
    if batch.decoder is not None or batch.layout.kind == "cross" or implementation is not None:
        kind = f"a cache of the kind {implementation!r}" if implementation else "cross-attention"
        return _anew(model, f"it has {kind}")
    start = start_of(batch) if start is None else start
    vector = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    hooks = [Add(f"blocks.{model.cfg.n_layers // 2}.hook_resid_post", vector, 0.1, relative=True, at="last_prompt")]
    with model.hooks(hooks):
        direct = model.generate(batch, 2, return_logits=True)
    try:
        cache = compute(model, batch, start)
        if cache.get_seq_length() != start:
            raise BadInputError(f"its cache has {cache.get_seq_length()} positions of {start}")
        cache = _expanded(cache, torch.arange(len(batch)))
        other = _continue(model, batch, cache, hooks, 2, {"return_logits": True})
    except Exception as error:
        # Whatever a family's forward pass can't do with a cache that is given, running it as a whole is right.
        return _anew(model, _line(error))
    worst, scale = _difference(direct, other)
    allowed = 1e-4 if model.dtype in (torch.float32, torch.float64) else 3e-2
    if worst <= allowed * scale:
        return True
    return _anew(model, f"continued from a cache, logits differ by {worst:.1e}, where the largest is {scale:.1e}")


def _anew(model: HookedMM, why: str) -> bool:
    logger.warning("prompts of %s are computed anew for every setting: %s", model.cfg.family, why)
    return False


def _difference(one: GenerationOutput, other: GenerationOutput) -> tuple[float, float]:
    """The largest difference of the first step's logits and, where tokens agree, of the second's; and the scale."""
    assert one.logits is not None
    assert other.logits is not None
    a, b = one.logits.float(), other.logits.float().to(one.logits.device)
    gap = (a[:, 0] - b[:, 0]).abs().max()
    same = one.tokens[:, 0] == other.tokens[:, 0].to(one.tokens.device)
    if min(a.shape[1], b.shape[1]) > 1 and bool(same.any()):
        gap = torch.maximum(gap, (a[:, 1] - b[:, 1])[same].abs().max())
    return float(gap.nan_to_num(torch.inf)), float(a.abs().max())


def _continue(
    model: HookedMM,
    batch: Batch,
    cache: DynamicCache,
    hooks: Sequence[HookLike],
    max_new_tokens: int,
    options: dict[str, Any],
) -> GenerationOutput:
    """Generate from the cache on, which is used up."""
    for module in model.hf_model.modules():
        # Rotary offsets behind images (Qwen-VL), left by whatever ran before: None has them made for these rows.
        if getattr(module, "rope_deltas", None) is not None:
            module.rope_deltas = None
    with model.hooks(hooks):
        return model.generate(without_pictures(batch), max_new_tokens, past_key_values=cache, **options)


def _expanded(cache: DynamicCache, rows: Int[Tensor, " r"]) -> DynamicCache:
    """A cache of these rows of another, which stays as it is."""
    made = copy.copy(cache)
    made.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in made.layers:
        layer.batch_select_indices(rows)
    return made


def _copies(model: HookedMM, options: dict[str, Any]) -> int:
    """Rows that a generation makes of each sample."""
    config = model.hf_model.generation_config
    return max(options.get(name, getattr(config, name, None)) or 1 for name in ("num_beams", "num_return_sequences"))


def _head(batch: Batch, count: int) -> Batch:
    """The first `count` columns of a batch."""
    layout = replace(
        batch.layout, image_index=batch.image_index[:, :count], separator=batch.layout.separator[:, :count]
    )
    inputs = {name: v[..., :count] if name in PER_POSITION else v for name, v in batch.inputs.items()}
    return replace(
        batch,
        inputs=inputs,
        modality=batch.modality[:, :count],
        role=batch.role[:, :count],
        layout=layout,
        tokens=[row[:count] for row in batch.tokens],
    )


def _few_rows(batch: Batch) -> list[int]:
    """A sample with a picture, where there are any, the shortest and the longest prompt, and some more."""
    lengths = (batch.modality != Modality.PAD).sum(dim=1)
    rows = [*batch.image_sample[:1].tolist(), int(lengths.argmin()), int(lengths.argmax()), *range(len(batch))]
    return list(dict.fromkeys(rows))[:PROOF_ROWS]


def _touches_tower(model: HookedMM, hooks: Sequence[HookLike]) -> bool:
    points = [names for names, _ in expand(hooks)]
    return any(stream_of(name) == "tower" for point in points for name in match_names(point, model.hook_points))


def _with_pictures(output: GenerationOutput, batch: Batch) -> GenerationOutput:
    """The output's batch can be run again, so it has the pictures."""
    if output.batch is None or not batch.has_images:
        return output
    return replace(output, batch=output.batch.with_inputs({**output.batch.inputs, **pictures_of(batch.inputs)}))


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
