"""What one block is made of: its parts by their names, and by the flow of data where names leave something open.

One block of each build is run once: if what its parts compute adds up to what the block does (`flow`), that decides,
and names (`architectures.PART_NAMES`) only say what lies inside attention and MLP. Where nothing can be run or nothing
adds up (factors, gates, several streams), names are taken as they are if they explain the whole block: every role that
its wiring needs, and every child that has weights. What neither explains is `opaque`: its ends and inner parts can be
read, sums over it can't.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor, nn

from hooked_mm.architectures import (
    FUSED_BY_HEAD,
    PART_NAMES,
    QUERY_KEY_NORMS,
    RENAMED,
    ROTARY_ARGUMENTS,
    ROW_MASKS,
    SCALES,
    STREAM_SCALES,
)
from hooked_mm.attention_own import by_softmax
from hooked_mm.errors import UnsupportedModelError
from hooked_mm.flow import Wired, looked_into
from hooked_mm.structure import Block, Wiring, inner_linear, submodule

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "groups")


NOTHING: Mapping[str, str] = MappingProxyType({})
Flow = Callable[[nn.Module, Mapping[str, str]], Wired | None]


def first(module: nn.Module, names: Iterable[str]) -> str | None:
    """The first of these attribute paths that leads to a module."""
    return next((name for name in names if isinstance(submodule(module, name), nn.Module)), None)


def named_parts(block: nn.Module) -> dict[str, str]:
    """Role -> path, by names alone."""
    found = {role: name for role, names in PART_NAMES.items() if (name := first(block, names)) is not None}
    if "attn" in found and recurrent(submodule(block, found["attn"])):
        # What it mixes has no pattern, and its heads give no mix of values.
        found = {role: path for role, path in found.items() if not f"{path}.".startswith(f"{found['attn']}.")} | {
            "mixer": found["attn"]
        }
    return found | {role: name for name, role, other in RENAMED if first(block, (name,)) and first(block, (other,))}


def recurrent(module: nn.Module) -> bool:
    """Whether what is called attention carries a state along the sequence behind a convolution (linear attention)."""
    return not looked_into(module) and any(isinstance(inner, nn.Conv1d) for inner in module.children())


def named_wiring(block: nn.Module, parts: Mapping[str, str]) -> Wiring | None:
    """The wiring that the names speak for; None if roles are missing or children with weights stay unexplained."""
    mixes = any(role in parts for role in ("attn", "xattn", "mixer"))
    if {"attn_mix", "mlp_mix", "mlp"} <= set(parts):
        return "streams"
    if unexplained(block, parts):
        return None
    if not mixes or not {"ln1", "ln2", "mlp"} <= set(parts):
        return None
    return "gated" if {"attn_join", "mlp_join"} <= set(parts) else "pre"


def unexplained(block: nn.Module, parts: Mapping[str, str]) -> list[str]:
    """Children with weights, and weights of the block itself, that belong to no role."""
    paths = [path for role, path in parts.items() if path and role not in ("block",)]
    factors = {name for rows in SCALES.values() for name, _ in rows}

    def known(name: str) -> bool:
        return any(name == path or path.startswith(f"{name}.") or name.startswith(f"{path}.") for path in paths)

    children = [name for name, child in block.named_children() if any(True for _ in child.parameters())]
    own = [name for name, _ in block.named_parameters(recurse=False) if name not in factors]
    return [name for name in children if not known(name)] + own


def _width(module: nn.Module, side: Literal["in_features", "out_features"]) -> int:
    module = inner_linear(module)
    size = getattr(module, side, None)
    if size is None and getattr(module, "nf", None) is not None:
        # transformers' Conv1D keeps its weight the other way round.
        size = module.get_parameter("weight").shape[0 if side == "in_features" else 1]
    if size is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} has no {side}, so the sizes of this block can't be told; it must be linear"
        )
    return int(size)


def _heads(module: nn.Module, width: int, config: Any, what: str) -> int:
    heads = next((getattr(module, name) for name in _HEADS if isinstance(getattr(module, name, None), int)), None)
    head_dim = getattr(module, "head_dim", None)
    if heads is None:
        own = getattr(module, "config", None) or config
        named = next((n for name in _HEADS if isinstance(n := getattr(own, name, None), int)), None)
        heads = width // head_dim if head_dim else named
    if not heads:
        raise UnsupportedModelError(f"the attention {type(module).__name__} of the {what} does not say how many heads")
    return int(heads)


def find_block(
    block: nn.Module, path: str, what: str, config: Any, flow: Flow, told: Mapping[str, str] = NOTHING
) -> Block:
    """What a block is made of.

    Args:
        block: The module.
        path: Of it in the transformers model.
        what: The stack that it belongs to, for messages.
        config: The configuration of that stack.
        flow: Block and its parts by name -> what flows through it, or None.
        told: Role -> path that an exception says; it stands above names and flow.

    Raises:
        UnsupportedModelError: If neither names nor the flow of data say where its parts are.
    """
    there = {role: path for role, path in told.items() if first(block, (path,))}
    parts = named_parts(block) | there
    found = flow(block, parts)
    by_name = named_wiring(block, parts)
    if found is not None and found.wiring == "single" and by_name is not None:
        # A part whose output happens to be zero (a projection that was never trained) adds nothing that flows.
        found = None
    if found is not None:
        parts, wiring = {**found.parts, **there}, found.wiring
    else:
        wiring = by_name or _alone(block, parts, what)
    return _described(block, path, what, config, parts, wiring)


def _alone(block: nn.Module, parts: dict[str, str], what: str) -> Wiring:
    """The wiring where the flow says nothing; a block without anything known is refused."""
    if any(role in parts for role in ("attn", "xattn", "mixer", "mlp")):
        for role in ("attn_after", "mlp_after", "attn_add", "xattn_add"):
            parts.pop(role, None)
        return "opaque"
    missing = ", ".join(role for role in ("ln1", "attn", "ln2", "mlp") if role not in parts)
    raise UnsupportedModelError(
        f"a block of the {what} ({type(block).__name__}) has no recognised {missing}; it has "
        f"{', '.join(child for child, _ in block.named_children())}, and what flows through them is no sum of two "
        "parts. Add the names to PART_NAMES in hooked_mm/architectures.py"
    )


def _described(block: nn.Module, path: str, what: str, config: Any, parts: dict[str, str], wiring: Wiring) -> Block:
    module = submodule(block, parts.get("attn", parts.get("xattn", ""))) if _attends(parts) else None
    out = submodule(block, parts[next(r for r in ("o", "xo") if r in parts)]) if {"o", "xo"} & set(parts) else None
    width = _width(out, "in_features") if out is not None else 0
    heads = _heads(module, width, config, what) if module is not None else 0
    d_head = width // heads if heads else 0
    key = parts.get("k", parts.get("xk"))
    kv_heads = _width(submodule(block, key), "out_features") // d_head if key and d_head else heads
    if not key and "qkv" not in parts:
        # Keys of an earlier block.
        kv_heads = heads // (getattr(module, "num_key_value_groups", None) or 1)
    if "qkv" in parts and d_head:
        kv_heads = (_width(submodule(block, parts["qkv"]), "out_features") - width) // (2 * d_head)
    scales = {
        role: next(row for row in rows if getattr(block, row[0], None) is not None)
        for role, rows in SCALES.items()
        if role in parts and any(getattr(block, name, None) is not None for name, _ in rows)
    }
    layer_type = getattr(module, "layer_type", None) or ("sliding" if getattr(module, "is_sliding", False) else None)
    arguments = inspect.signature(type(module).forward).parameters if module is not None else {}
    normed = [getattr(module, name.format(letter), None) for name in QUERY_KEY_NORMS for letter in "qk"]
    masks = inspect.signature(type(block).forward).parameters
    mlp_down = submodule(block, parts["mlp_down"]) if "mlp_down" in parts else None
    kind = type(block).__name__ + (f" ({layer_type})" if layer_type else "")
    if (mixing := next((role for role in ("attn", "mixer", "xattn") if role in parts), None)) == "mixer":
        kind += f" ({type(submodule(block, parts['mixer'])).__name__})"
    if mixing is None or mlp_down is None:
        kind += f" ({', '.join(type(submodule(block, parts[r])).__name__ for r in ('attn', 'mlp') if r in parts)})"
    # Segment Anything's blocks cut and join windows themselves, so attention's output lies in windows.
    windows = int(getattr(block, "window_size", 0)) if hasattr(block, "window_unpartition") else 0
    kind += f" (windows of {windows})" if windows else ""
    return Block(
        path=path,
        parts=MappingProxyType(parts),
        kind=kind,
        wiring=wiring,
        scales=MappingProxyType(scales),
        n_heads=heads,
        n_kv_heads=kv_heads,
        d_head=d_head,
        d_model=_width(out, "out_features") if out is not None else _norm_width(block, parts),
        # An MLP of no known parts (a mixture of experts) has no neurons of its own.
        d_mlp=0 if mlp_down is None else _width(mlp_down, "in_features"),
        rotary=any(name in arguments for name in ROTARY_ARGUMENTS)
        or (module is not None and key is None and "qkv" not in parts)
        or hasattr(module, "rotary_emb")
        or any(norm is not None and not isinstance(norm, nn.Identity) for norm in normed),
        row_mask=next((role for name, role in ROW_MASKS.items() if name in masks and "xattn" in parts), ""),
        fused_by_head=parts.get("qkv", "").endswith(FUSED_BY_HEAD),
        rescaled=next((name for name in STREAM_SCALES if hasattr(block, name)), ""),
        map="conv1" in parts,
        windows=windows,
        patterns=module is not None and (looked_into(module) or by_softmax(module)),
        own_softmax=module is not None and by_softmax(module),
        gated_q="q" in parts
        and "q_a" not in parts
        and _width(submodule(block, parts["q"]), "out_features") == 2 * width,
    )


def with_cross_blocks(owner: nn.Module, blocks: list[nn.Module]) -> list[nn.Module]:
    """Blocks with those that only cross-attend, of a shorter list beside theirs, in front of every n-th."""
    for child in owner.children():
        other = list(child) if isinstance(child, nn.ModuleList) else []
        if not other or any(block is other[0] for block in blocks) or len(blocks) % len(other):
            continue
        if all(first(block, PART_NAMES["xattn"]) and not first(block, PART_NAMES["attn"]) for block in other):
            step = len(blocks) // len(other)
            return [
                each for i, block in enumerate(blocks) for each in ([block] if i % step else [other[i // step], block])
            ]
    return blocks


def _attends(parts: Mapping[str, str]) -> bool:
    return "attn" in parts or "xattn" in parts


def _norm_width(block: nn.Module, parts: Mapping[str, str]) -> int:
    """The width of the stream where no projection tells it: that of the first norm."""
    norm = submodule(block, parts["ln1"]) if "ln1" in parts else None
    weight = getattr(norm, "weight", None)
    return int(weight.shape[-1]) if isinstance(weight, Tensor) else 0
