"""The residual stream of a run: what it was added up from, how far each part counts for a logit.

`ResidualViews` is the part of `ActivationCache` that does so; the formulas are pure functions in `attribution` and
`norms`. Names and labels follow TransformerLens's `ActivationCache`. What differs from it: positions are selected by
modality, role, sample and number; gains of norms are not folded into other weights, so `apply_ln` leaves them out and
`logit_attrs` multiplies them into the token's direction; components that do not add up are refused.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mm import attribution
from hooked_mm.access import linear_map
from hooked_mm.attribution import Mode, Tokens, Weights
from hooked_mm.batch import Batch, Modality, Role
from hooked_mm.errors import BadInputError
from hooked_mm.hook_points import HookPoint
from hooked_mm.norms import NormFormula, apply_norm, at_least_float32, norm_of, norm_scale

# Points of the stream's own shape, from which a stack's positions are known.
_STREAM_LIKE = ("hook_embed", "hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")


class Where(TypedDict, total=False):
    """Which positions: as in `ActivationCache.select`; every condition left out admits all but padding."""

    modality: str | Modality | None
    role: str | Role | None
    sample: int | None
    positions: int | Sequence[int] | None


def take(value: Tensor, index: tuple[Tensor, ...] | None) -> Tensor:
    """Rows of a value by one index per leading dimension; None takes it as it is."""
    return value if index is None else value[tuple(i.to(value.device) for i in index)]


class ResidualViews(Mapping[str, Tensor]):
    """What an `ActivationCache` can say about residual streams; it needs the model for norms, heads and logits."""

    _values: dict[str, Tensor]
    _points: Mapping[str, HookPoint]
    _model: Weights | None
    batch: Batch

    @abstractmethod
    def _index(
        self,
        name: str,
        modality: str | Modality | None = None,
        role: str | Role | None = None,
        sample: int | None = None,
        positions: int | Sequence[int] | None = None,
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Where the chosen rows of a point lie, one index per leading dimension, and the sample of each."""

    def _take(self, value: Tensor, index: tuple[Tensor, ...] | None, stack: str) -> Tensor:
        """Rows of a value at (row, place) of its sheet; None takes it as it is."""
        if index is not None and stack.startswith(("vision", "projector")):
            value = self.batch.layout.sheet(value)
        return take(value, index)

    def _weights(self) -> Weights:
        if self._model is None:
            raise BadInputError(
                "this needs the model's weights, which the cache does not have; load it with "
                "ActivationCache.load(path, model=model)"
            )
        return self._model

    def _rows(self, stack: str, where: Where) -> tuple[tuple[Tensor, ...] | None, Tensor | None]:
        """Index and sample of the positions asked for; None if there is no selection."""
        if all(value is None for value in where.values()):
            return None, None
        name = "hook_embed"
        if stack:
            like = (n for n in self if n.startswith(stack) and n.endswith(_STREAM_LIKE))
            name = next(like, f"{stack}blocks.0.hook_resid_pre")
        return self._index(name, **where)

    def _layer(self, layer: int | None, mlp_input: bool, stack: str) -> int:
        resolved = attribution.resolve_layer(layer, attribution.layer_count(self._points, stack), mlp_input)
        if mlp_input and f"{stack}blocks.{resolved}.hook_resid_mid" not in self._points:
            raise BadInputError(f"in layer {resolved} attention and MLP read the same stream; leave mlp_input out")
        return resolved

    def _ran(self, name: str) -> bool:
        """Without images nothing is added by what reads images; all else that exists must have been cached."""
        return name in self._values or self.batch.has_images or not attribution.only_with_images(name, self._points)

    def _component(self, name: str, stack: str) -> Tensor:
        first = f"{stack}blocks.0.hook_resid_pre"
        # What enters block 0 has two names.
        return self[first if name == f"{stack}hook_embed" and name not in self and first in self else name]

    def _after(self, layer: int, stack: str) -> Tensor | None:
        """The stream behind a block, with what is put in between blocks."""
        block = f"{stack}blocks.{layer}."
        post, added = self._values.get(f"{block}hook_resid_post"), f"{block}hook_insert_out"
        if post is None or added not in self._points or not self._ran(added):
            return post
        return post + self._values[added] if added in self._values else None

    def _stream(self, layer: int, mlp_input: bool, stack: str) -> Tensor | None:
        """The stream that enters a layer's attention or MLP, or the final norm; None if it was not cached."""
        block = f"{stack}blocks.{layer}."
        if mlp_input:
            return self._values.get(f"{block}hook_resid_mid")
        found = self._values.get(f"{block}hook_resid_pre")
        if found is None:
            found = self._after(layer - 1, stack) if layer else self._values.get(f"{stack}hook_embed")
        return found

    def _stream_or_refuse(self, layer: int, mlp_input: bool, stack: str) -> Tensor:
        found = self._stream(layer, mlp_input, stack)
        if found is not None:
            return found
        name = f"{stack}blocks.{layer}.hook_resid_{'mid' if mlp_input else 'pre'}"
        # An unknown name, too, is refused by looking it up.
        return self[name if name in self._points or mlp_input else f"{stack}blocks.{layer - 1}.hook_resid_post"]

    def _norm(self, layer: int, mlp_input: bool, stack: str) -> NormFormula | None:
        """The formula of a layer's norm, by running the module; None if there is no final norm."""
        model = self._weights()
        path = attribution.norm_path(model.structure, stack, layer, mlp_input)
        width = attribution.blocks_of(model.structure, stack).d_model
        return None if path is None else norm_of(model.hf_model.get_submodule(path), width)

    def _scale(self, layer: int, mlp_input: bool, stack: str, formula: NormFormula) -> Float[Tensor, "... 1"]:
        final = layer == attribution.layer_count(self._points, stack)
        name = f"{stack}ln_final." if final else f"{stack}blocks.{layer}.ln{2 if mlp_input else 1}."
        stored = self._values.get(f"{name}hook_scale")
        if stored is not None:
            return at_least_float32(stored)
        return norm_scale(self._stream_or_refuse(layer, mlp_input, stack), formula)

    def _aligned(
        self, parts: Tensor, formula: NormFormula | None, layer: int, mlp_input: bool, stack: str, where: Where
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...] | None, Tensor | None]:
        """Components and the norm's scale at the same positions, with index and samples of these."""
        if formula is None:
            scale = torch.ones(*self.batch.modality.shape, 1, device=parts.device)
        else:
            scale = self._scale(layer, mlp_input, stack, formula).to(parts.device)
        whole, given = tuple(scale.shape[:-1]), tuple(parts.shape[1:-1])
        index, samples = self._rows(stack, where)
        chosen = whole if index is None else (len(index[0]),)
        if given not in (whole, chosen):
            raise BadInputError(
                f"a stack of shape {tuple(parts.shape)} fits neither the run's positions {whole} nor the selection's "
                f"{chosen}; pass the selection it was made with"
            )
        if index is not None and given == whole:
            parts = torch.stack([self._take(part, index, stack) for part in parts])
        return parts, self._take(scale, index, stack), index, samples

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        *,
        mode: Mode = "all",
        apply_ln: bool = False,
        incl_embeds: bool = True,
        return_labels: bool = False,
        stack: str = "",
        check: bool = True,
        **where: Unpack[Where],
    ) -> Any:
        """What was added up to the residual stream that enters a layer: embedding, attention, MLP, layer by layer.

        Args:
            layer: Components of the layers before it; None, -1 or n_layers: all, up to the final norm.
            mlp_input: Up to the input of the layer's MLP instead.
            mode: `"attn"` or `"mlp"` leaves the other kind out.
            apply_ln: As the layer's norm sees them: see `apply_ln_to_stack`.
            incl_embeds: Whether `embed`, what enters block 0, is a component.
            return_labels: Also return the labels: `embed`, `0_attn_out`, `0_mlp_out`, ...
            stack: `""`, `"vision."` or `"encoder."`.
            check: Refuse components that do not add up to the stream, where it was cached and all are asked for.
            where: `modality`, `role`, `sample`, `positions` as in `select`.

        Returns:
            (component, b, p, d), or with any selection (component, n, d) in the order of `select`; with `return_labels`
            a pair of it and the labels.

        Raises:
            UnknownHookError: If a component was not cached.
            BadInputError: If there is no such layer, mode or stack, or the components do not add up.
        """
        layer = self._layer(layer, mlp_input, stack)
        listed = attribution.component_names(self._points, layer, mlp_input, mode, incl_embeds, stack)
        named = [(label, name) for label, name in listed if self._ran(name)]
        if not named:
            raise BadInputError(
                f"no {mode} component lies before layer {layer}; ask for a later one or incl_embeds=True"
            )
        index = self._rows(stack, where)[0]
        parts = attribution.stacked(self._take(self._component(name, stack), index, stack) for _, name in named)
        whole = self._stream(layer, mlp_input, stack)
        if check and mode == "all" and incl_embeds and whole is not None:
            attribution.check_sum(parts, self._take(whole, index, stack), f"the residual stream of layer {layer}")
        if apply_ln:
            parts = self.apply_ln_to_stack(parts, layer, mlp_input, stack=stack, **where)
        return (parts, [label for label, _ in named]) if return_labels else parts

    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        mlp_input: bool = False,
        *,
        return_labels: bool = False,
        stack: str = "",
        **where: Unpack[Where],
    ) -> Any:
        """The residual stream as it enters each layer up to `layer`, as for a logit lens.

        Args:
            layer: The last one whose input is returned; None, -1 or n_layers: all, and what enters the final norm.
            incl_mid: Also the streams between attention and MLP.
            apply_ln: Normalised, without gain: into the final norm each stream by its own scale; into an earlier
                layer's norm all by that layer's scale, as TransformerLens does.
            mlp_input: Also the middle of the layer itself.
            return_labels: Also return the labels: `0_pre`, `0_mid`, ..., `final_post`.
            stack: As in `decompose_resid`.
            where: As in `decompose_resid`.

        Returns:
            (stream, b, p, d) or (stream, n, d), with labels as in `decompose_resid`.
        """
        layer, n_layers = self._layer(layer, mlp_input, stack), attribution.layer_count(self._points, stack)
        places = attribution.stream_places(layer, n_layers, incl_mid, mlp_input)
        index = self._rows(stack, where)[0]
        streams = attribution.stacked(
            self._take(self._stream_or_refuse(at, mid, stack), index, stack) for _, at, mid in places
        )
        if apply_ln and layer == n_layers:
            formula = self._norm(layer, mlp_input, stack)
            if formula is not None:
                streams = apply_norm(streams, norm_scale(streams, formula), formula)
        elif apply_ln:
            streams = self.apply_ln_to_stack(streams, layer, mlp_input, stack=stack, **where)
        return (streams, [label for label, _, _ in places]) if return_labels else streams

    def stack_head_results(
        self,
        layer: int | None = None,
        *,
        incl_remainder: bool = False,
        apply_ln: bool = False,
        return_labels: bool = False,
        stack: str = "",
        check: bool = True,
        **where: Unpack[Where],
    ) -> Any:
        """What every attention head before a layer writes into the stream, W_O[h] z[h].

        Made from `attn.hook_z` and the output projection; `hook_attn_out` must be cached too for the check.

        Args:
            layer: As in `decompose_resid`.
            incl_remainder: Add the rest of the stream (embedding, MLPs, biases), so that all add up to it.
            apply_ln: As in `decompose_resid`.
            return_labels: Also return the labels: `L0H0`, ..., `remainder`.
            stack: As in `decompose_resid`.
            check: Refuse heads that, with the projection's bias, do not add up to `hook_attn_out`.
            where: As in `decompose_resid`.

        Returns:
            (layer · heads, b, p, d) or (layer · heads, n, d), with labels as in `decompose_resid`.
        """
        layer = self._layer(layer, False, stack)
        parts: list[Tensor] = []
        labels: list[str] = []
        blocks = attribution.blocks_of(self._weights().structure, stack)
        index = self._rows(stack, where)[0]
        for at in range(layer):
            name = f"{stack}blocks.{at}.attn.hook_z"
            if name not in self._points or not self._ran(name):
                continue
            z = self._take(self[name], index, stack)
            block, modules = blocks.blocks[at], self._weights().hf_model.get_submodule
            out = modules(f"{block.path}.{block.parts['o']}")
            weight, bias = linear_map(out, z.shape[-2] * z.shape[-1])
            heads, bias = attribution.behind_projection(block, modules, attribution.head_results(z, weight), bias)
            if check:
                whole = self._take(self[f"{stack}blocks.{at}.hook_attn_out"], index, stack)
                attribution.check_sum([*heads, bias.to(heads).expand_as(heads[0])], whole, f"attn_out of layer {at}")
            parts += heads
            labels += [f"L{at}H{head}" for head in range(len(heads))]
        if incl_remainder:
            whole = self._take(self._stream_or_refuse(layer, False, stack), index, stack)
            wide = at_least_float32(whole)
            parts.append((wide - sum(at_least_float32(part).to(wide) for part in parts)).to(whole))
            labels.append("remainder")
        if not parts:
            raise BadInputError("no head lies before layer 0; ask for a later one or incl_remainder=True")
        results = attribution.stacked(parts)
        if apply_ln:
            results = self.apply_ln_to_stack(results, layer, stack=stack, **where)
        return (results, labels) if return_labels else results

    def apply_ln_to_stack(
        self,
        residual_stack: Float[Tensor, "c ... d"],
        layer: int | None = None,
        mlp_input: bool = False,
        *,
        stack: str = "",
        **where: Unpack[Where],
    ) -> Float[Tensor, "c ... d"]:
        """Each component's share of a layer's normalised input: all divided by the scale of the whole stream.

        LayerNorm also centres each. The gain is left out, so the shares add up to the norm's output before its gain.
        The scale is that of the run (`hook_scale`), or computed from the cached stream.

        Args:
            residual_stack: (c, b, p, d), or with a selection (c, n, d) too.
            layer: Whose norm: 0 to n_layers; None or -1 means the final norm.
            mlp_input: The norm before the layer's MLP instead of the one before its attention.
            stack: As in `decompose_resid`.
            where: The selection to take of the scale, and of a stack that is not selected yet.

        Returns:
            (c, b, p, d) or (c, n, d), in at least float32; unchanged if the model has no final norm.

        Raises:
            UnknownHookError: If neither the scale nor the stream was cached.
            BadInputError: Without a model, or if the shape does not fit.
        """
        layer = self._layer(layer, mlp_input, stack)
        formula = self._norm(layer, mlp_input, stack)
        parts, scale, _, _ = self._aligned(residual_stack, formula, layer, mlp_input, stack, where)
        return parts if formula is None else apply_norm(parts, scale, formula)

    def logit_attrs(
        self,
        residual_stack: Float[Tensor, "c ... d"],
        tokens: Tokens,
        incorrect_tokens: Tokens | None = None,
        *,
        with_bias: bool = False,
        first_subtoken: bool = False,
        **where: Unpack[Where],
    ) -> Float[Tensor, "c ..."]:
        """What each component of the final residual stream contributes to a logit, or to the difference of two.

        All components (`decompose_resid()`) and the bias add up to what the unembedding gives, which is *before* any
        scale or soft-cap that a model puts on its logits.

        Args:
            residual_stack: Components, not normalised yet: (c, b, p, d), or with a selection (c, n, d) too.
            tokens: An id or a string; one per sample; or ids (b,) or (b, p).
            incorrect_tokens: Subtract the contribution to these.
            with_bias: Add a last component, what the final norm's and the unembedding's bias contribute.
            first_subtoken: Take the first token of a string that is several, instead of refusing it.
            where: As in `apply_ln_to_stack`.

        Returns:
            (c, b, p), or with a selection (c, n), in at least float32.

        Raises:
            UnknownHookError: If neither the final norm's scale nor the last stream was cached.
            BadInputError: Without a model; if the shape does not fit; if a string is not one token of the vocabulary.
        """
        model = self._weights()
        layer = attribution.layer_count(self._points)
        formula = self._norm(layer, False, "")
        parts, scale, index, samples = self._aligned(residual_stack, formula, layer, False, "", where)
        unembed = linear_map(model.hf_model.get_submodule(model.structure.unembed), parts.shape[-1])
        norm = None if formula is None else model.hf_model.get_submodule(model.structure.final_norm)
        total: tuple[Tensor, Tensor] | None = None
        for asked in (tokens, incorrect_tokens):
            if asked is None:
                continue
            tokenizer = None if isinstance(asked, Tensor | int) else model.tokenizer
            shape = (self.batch.modality.shape[0], self.batch.modality.shape[1])
            ids = attribution.token_ids(asked, shape, len(unembed[0]), tokenizer, first_subtoken).to(parts.device)
            if ids.ndim == 1:
                ids = ids[:, None] if samples is None else take(ids, (samples,))
            elif ids.ndim:
                ids = take(ids, index)
            made = attribution.directions(*unembed, norm, ids, parts.device)
            total = made if total is None else (total[0] - made[0], total[1] - made[1])
        assert total is not None
        shares = attribution.attribute(parts, scale, total[0], formula or NormFormula(False, 0.0))
        if not with_bias:
            return shares
        return torch.cat([shares, total[1].to(shares).expand(shares.shape[1:])[None]])
