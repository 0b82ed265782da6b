"""Decomposition of the residual stream and attribution of logits to its parts, as pure functions on tensors.

Notation: x (..., d) a residual stream, x = Σ_c x_c its components; n, s, g and β of a norm as in `norms`;
W_U (vocab, d) and b_U (vocab,) the unembedding.

    logit_t = W_U[t] · (g ⊙ n(x) + β) + b_U[t]

The divisor s is not linear in x. With s *of the whole stream* held fixed the rest is, so each component has a share and
the shares sum to the whole. This is direct logit attribution as TransformerLens does it, where g is folded into W_U;
models are left as they are here, so g is multiplied into the direction instead.

Labels follow TransformerLens: `embed`, `0_attn_out`, `0_mlp_out`, ..., `L0H3`; `0_pre`, `0_mid`, ..., `final_post`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_mm.errors import BadInputError, nearest
from hooked_mm.norms import NormFormula, apply_norm, at_least_float32, norm_gain, norm_of, norm_scale
from hooked_mm.structure import PREFIXES, scale_factor

Mode = Literal["all", "attn", "mlp"]
Tokens = int | str | Sequence[int] | Sequence[str] | Tensor

# What a block adds to the stream: point -> which mode it belongs to. The first three lie before `hook_resid_mid`.
_ADDED = {
    **dict.fromkeys(("hook_attn_out", "hook_mixer_out", "hook_xattn_out"), "attn"),
    "hook_mlp_out": "mlp",
    **dict.fromkeys(("hook_extra_out", "hook_rescale_out", "hook_insert_out"), "rest"),
}
_STACKS = {prefix: stream for stream, prefix in PREFIXES.items()}
_BEFORE_MID = ("hook_attn_out", "hook_mixer_out", "hook_xattn_out")


class Weights(Protocol):
    """What the cache uses of a `HookedMM`."""

    structure: Any
    hf_model: Any

    @property
    def tokenizer(self) -> Any:
        """Makes ids of strings."""


def layer_count(names: Iterable[str], stack: str = "") -> int:
    """How many blocks the hook names of a stack (`""`, `"vision."`, `"encoder."`) tell of.

    Raises:
        BadInputError: If there is no such stack.
    """
    known = list(names)
    found = [int(match[1]) for name in known if (match := re.match(rf"{re.escape(stack)}blocks\.(\d+)\.", name))]
    if not found:
        stacks = sorted({match[1] for name in known if (match := re.match(r"(.*?)blocks\.\d+\.", name))})
        raise BadInputError(f"this model has no stack {stack!r}; it has {', '.join(map(repr, stacks))}")
    return max(found) + 1


def resolve_layer(layer: int | None, n_layers: int, mlp_input: bool = False) -> int:
    """The layer whose input is meant, 0 to n_layers; None and -1 mean what goes into the final norm, n_layers.

    Raises:
        BadInputError: If there is no such layer, or the MLP input of the final norm is asked for.
    """
    resolved = n_layers if layer is None or layer == -1 else layer
    if not 0 <= resolved <= n_layers:
        raise BadInputError(f"layer={layer} is outside 0 to {n_layers} (or None for what goes into the final norm)")
    if mlp_input and resolved == n_layers:
        raise BadInputError(f"mlp_input=True needs a layer from 0 to {n_layers - 1}: the final norm feeds no MLP")
    return resolved


def component_names(
    names: Iterable[str],
    layer: int,
    mlp_input: bool = False,
    mode: Mode = "all",
    incl_embeds: bool = True,
    stack: str = "",
) -> list[tuple[str, str]]:
    """Label and hook name of everything that is added up to the input of a layer, in execution order.

    Args:
        names: The model's hook names, in execution order.
        layer: Components of the layers before it are listed.
        mlp_input: Also what attention adds in the layer itself.
        mode: `"attn"` or `"mlp"` leaves out the other kind and what is neither.
        incl_embeds: Whether to begin with what enters block 0.
        stack: `""`, `"vision."`, `"encoder."`.

    Raises:
        BadInputError: For an unknown mode, or if no points tell what one of these blocks adds.
    """
    if mode not in ("all", "attn", "mlp"):
        raise BadInputError(f"mode={mode!r}{nearest(str(mode), ['all', 'attn', 'mlp'])}; it is 'all', 'attn' or 'mlp'")
    chosen = [("embed", f"{stack}hook_embed")] if incl_embeds else []
    telling: set[int] = set()
    for name in names:
        match = re.fullmatch(rf"{re.escape(stack)}blocks\.(\d+)\.(hook_\w+)", name)
        if match is None or match[2] not in _ADDED:
            continue
        at, point = int(match[1]), match[2]
        telling.add(at)
        reached = at < layer or (mlp_input and at == layer and point in _BEFORE_MID)
        if reached and mode in ("all", _ADDED[point]):
            chosen.append((f"{at}_{point.removeprefix('hook_')}", name))
    if silent := [at for at in range(layer) if at not in telling]:
        raise BadInputError(
            f"what block {silent[0]} of this model adds to the stream is no sum of points (several streams side by "
            "side, or a wiring of its own), so the stream can't be taken apart; the streams themselves can be read"
        )
    return chosen


def stream_places(
    layer: int, n_layers: int, incl_mid: bool = False, mlp_input: bool = False
) -> list[tuple[str, int, bool]]:
    """Label, layer and whether it is the middle, of every stream up to the input of a layer."""
    places = []
    for at in range(layer + 1):
        places.append((f"{at}_pre" if at < n_layers else "final_post", at, False))
        if (incl_mid and at < layer) or (mlp_input and at == layer):
            places.append((f"{at}_mid", at, True))
    return places


def only_with_images(name: str, names: Collection[str]) -> bool:
    """Whether a point runs for images alone: cross-attention, deepstack, blocks that only cross-attend."""
    if name.endswith(("hook_xattn_out", "hook_insert_out")):
        return True
    block = re.sub(r"(blocks\.\d+)\..*", r"\1", name)
    return f"{block}.hook_xattn_out" in names and f"{block}.hook_attn_out" not in names


def check_sum(parts: Iterable[Float[Tensor, "... d"]], whole: Float[Tensor, "... d"], what: str) -> None:
    """Refuse components that do not add up to what they are said to be components of.

    The distance is measured against the sum of the components' norms, of which rounding takes its share:
    1e-4 are allowed, 2e-2 in half precision.

    Raises:
        BadInputError: With the distance and the two known causes.
    """
    total = torch.zeros_like(at_least_float32(whole))
    size = torch.zeros((), dtype=total.dtype, device=total.device)
    for part in parts:
        total += part.to(total)
        size += part.to(total).norm()
    distance = float((total - whole).norm() / size.clamp_min(1e-30))
    if distance > (2e-2 if whole.dtype in (torch.float16, torch.bfloat16) else 1e-4):
        raise BadInputError(
            f"the components do not add up to {what}: they miss it by {distance:.1e} of their size. Either this "
            "model normalises or scales between a component and the stream, or a hook wrote into the stream in this "
            "run; pass check=False to have the components all the same"
        )


def stacked(parts: Iterable[Float[Tensor, "..."]]) -> Float[Tensor, "c ..."]:
    """Values side by side, where the first one is: layers of a model may lie on several devices."""
    found = list(parts)
    return torch.stack([part.to(found[0].device) for part in found])


def blocks_of(structure: Any, stack: str) -> Any:
    """The `Stack` that a prefix names: `""`, `"vision."` or `"encoder."`.

    Raises:
        BadInputError: If the model has none.
    """
    blocks = getattr(structure, _STACKS.get(stack, "no stack"), None)
    if blocks is None:
        raise BadInputError(f"this model has no stack {stack!r}; stacks are {', '.join(map(repr, _STACKS))}")
    return blocks


def norm_path(structure: Any, stack: str, layer: int, mlp_input: bool) -> str | None:
    """Module path of the norm that a layer's attention or MLP reads through; past the last layer, the final norm.

    Args:
        structure: The model's `Structure`.
        stack: As in `blocks_of`.
        layer: 0 to n_layers.
        mlp_input: The norm before the MLP instead of the one before attention.

    Returns:
        The path; None if the model has no final norm.

    Raises:
        BadInputError: If the stack has no such norm.
    """
    blocks = blocks_of(structure, stack)
    if layer == blocks.n_layers:
        if stack:
            raise BadInputError(f"the stack {stack!r} has no final norm that is known; give layer= below {layer}")
        return structure.final_norm
    block, name = blocks.blocks[layer], "ln2" if mlp_input else "ln1"
    # A parallel block's MLP stands on the one norm that there is.
    name = "ln1" if name not in block.parts and block.wiring == "parallel" else name
    if block.wiring not in ("pre", "parallel") or name not in block.parts:
        raise BadInputError(
            f"block {layer} of stack {stack!r} normalises after the sum or in another place, so nothing is normalised "
            f"before its {'MLP' if mlp_input else 'attention'}; pass apply_ln=False"
        )
    return f"{block.path}.{block.parts[name]}"


def head_results(
    z: Float[Tensor, "... heads d_head"], weight: Float[Tensor, "d heads*d_head"]
) -> Float[Tensor, "heads ... d"]:
    """What each head writes, W_O[h] z[h]; their sum and the projection's bias are attention's output."""
    heads, d_head = z.shape[-2:]
    per_head = weight.to(z).unflatten(1, (heads, d_head))
    return torch.stack([z[..., head, :] @ per_head[:, head].T for head in range(heads)])


def behind_projection(
    block: Any, module: Any, heads: Float[Tensor, "heads ... d"], bias: Float[Tensor, " d"]
) -> tuple[Float[Tensor, "heads ... d"], Float[Tensor, "... d"]]:
    """What is added to the stream by each head and by the bias, after the norm or factor that a block puts behind.

    A norm's divisor is that of their sum; its own bias counts as bias.

    Args:
        block: From the model's `Structure`.
        module: Path inside the transformers model -> module.
        heads: What the projection makes of each head.
        bias: The projection's.
    """
    if "attn_after" in block.parts:
        norm = module(f"{block.path}.{block.parts['attn_after']}")
        formula, (gain, beta) = norm_of(norm, heads.shape[-1]), norm_gain(norm, heads.shape[-1])
        scale = norm_scale(heads.sum(0) + bias, formula)
        heads = apply_norm(heads, scale, formula) * gain.to(heads)
        bias = apply_norm(bias.to(heads), scale, formula) * gain.to(heads) + beta.to(heads)
    if "attn" in block.scales:
        factor = scale_factor(module(block.path), block.scales["attn"]).detach().to(heads)
        return heads * factor, bias * factor
    return heads, bias


def attribute(
    parts: Float[Tensor, "c ... d"],
    scale: Float[Tensor, "... 1"],
    directions: Float[Tensor, "*rows d"],
    formula: NormFormula,
) -> Float[Tensor, "c ..."]:
    """Each component's share of u · n(x), in at least float32.

    Args:
        parts: Components x_c.
        scale: s of the whole stream.
        directions: u = g ⊙ W_U[t] (or a difference of two), one for all or one per row.
        formula: The final norm's.
    """
    # (x_c - mean(x_c)) · u = x_c · (u - mean(u)): centring the direction spares a copy of the stack.
    u = directions - directions.mean(dim=-1, keepdim=True) if formula.centred else directions
    return torch.stack([(at_least_float32(part) * u).sum(dim=-1) / scale[..., 0] for part in parts])


def directions(
    weight: Float[Tensor, "vocab d"],
    bias: Float[Tensor, " vocab"],
    norm: nn.Module | None,
    ids: Int[Tensor, "*rows"],
    device: torch.device,
) -> tuple[Float[Tensor, "*rows d"], Float[Tensor, "*rows"]]:
    """A token's direction g ⊙ W_U[t] in the normalised stream, and W_U[t] · β + b_U[t], what needs no stream.

    Args:
        weight: W_U.
        bias: b_U.
        norm: The final norm; None if there is none.
        ids: t.
        device: Where the result shall be; it is of at least float32.
    """
    at = ids.to(weight.device)
    rows, offset = at_least_float32(weight[at]).to(device), at_least_float32(bias[at]).to(device)
    if norm is None:
        return rows, offset
    gain, beta = (value.to(rows) for value in norm_gain(norm, weight.shape[1]))
    return rows * gain, rows @ beta + offset


def token_ids(
    tokens: Tokens, shape: tuple[int, int], d_vocab: int, tokenizer: Any = None, first_subtoken: bool = False
) -> Int[Tensor, "..."]:
    """Token ids, 0-d (one for all), (b,) or (b, p), from ids or strings.

    Args:
        tokens: An id or a string; one per sample; or a tensor of ids, 0-d, (b,) or (b, p).
        shape: (b, p) of the batch.
        d_vocab: Ids lie below it.
        tokenizer: For strings. They are taken as they are: a leading space counts.
        first_subtoken: Take the first token of a string that is several; otherwise it is refused.

    Raises:
        BadInputError: If a string is not one token or not in the vocabulary, an id is outside it, or the shape fits
            neither the samples nor the positions.
    """
    if isinstance(tokens, Tensor):
        ids = tokens.long()
    else:
        listed: Sequence[Any] = [tokens] if isinstance(tokens, str | int) else tokens
        read = [_one_token(t, tokenizer, first_subtoken) if isinstance(t, str) else int(t) for t in listed]
        ids = torch.tensor(read[0] if isinstance(tokens, str | int) else read)
    if ids.ndim and tuple(ids.shape) not in ((shape[0],), shape):
        raise BadInputError(
            f"tokens of shape {tuple(ids.shape)} fit neither samples ({shape[0]},) nor positions {shape}"
        )
    wrong = ids[(ids < 0) | (ids >= d_vocab)]
    if wrong.numel():
        raise BadInputError(f"token id {int(wrong[0])} is outside the vocabulary of {d_vocab}")
    return ids


def _one_token(text: str, tokenizer: Any, first_subtoken: bool) -> int:
    if tokenizer is None:
        raise BadInputError(f"the token {text!r} is a string, which needs a tokenizer; give ids, or pass model=")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = tokenizer.convert_ids_to_tokens(ids)
    if not ids or (len(ids) > 1 and not first_subtoken):
        raise BadInputError(
            f"the string {text!r} is {len(ids)} tokens {pieces}, not one; give one of them, its id, or pass "
            "first_subtoken=True"
        )
    if ids[0] == getattr(tokenizer, "unk_token_id", None) and text != tokenizer.unk_token:
        raise BadInputError(
            f"the string {text!r} is not in the vocabulary (it becomes {pieces[0]!r}); use another word"
        )
    return int(ids[0])
