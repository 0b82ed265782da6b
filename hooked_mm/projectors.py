"""Finds the part between tower and text: by exception, by configuration, by name, or as what belongs to nothing else.

Some models run it once per image, so that a pass has no one value of it; that is told by its owner's source.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from hooked_mm.architectures import POOLING_NAMES, PROJECTOR_NAMES, Oddity
from hooked_mm.attention_own import by_interface, by_softmax
from hooked_mm.blocks import first
from hooked_mm.sources import source_of
from hooked_mm.structure import ConnectorAttention, submodule
from hooked_mm.vocabulary import contains

_LOOPS = (ast.For, ast.AsyncFor, ast.While, ast.ListComp, ast.GeneratorExp, ast.SetComp, ast.DictComp)


def leftover(core: nn.Module, claimed: list[nn.Module | None]) -> list[nn.Module]:
    """The largest modules with weights that contain none of these and lie in none of these."""
    known = {id(module) for module in claimed if module is not None}
    found: list[nn.Module] = []
    for child in core.children():
        if id(child) in known or not any(True for _ in child.parameters()):
            continue
        if contains(child, known):
            found += leftover(child, claimed)
        else:
            found.append(child)
    return found


def layered(config: Any) -> tuple[tuple[int, int], ...]:
    """(tower layer, text layer) of the projectors whose features enter a text layer each (Granite 4 Vision)."""
    return tuple((int(tower), int(text)) for tower, text in getattr(config, "deepstack_layer_map", None) or ())


def find_projector(
    core: nn.Module, claimed: list[nn.Module | None], config: Any, exception: Oddity
) -> nn.Module | None:
    """By exception, by configuration, by name, or the one part that belongs to nothing else; None where unclear.

    Of projectors that feed a text layer each it is the one of the first layer.
    """
    entering = [index for index, (_, text) in enumerate(layered(config)) if text == 0]
    several = getattr(core, "layerwise_projectors", None)
    if entering and isinstance(several, nn.ModuleList):
        return several[entering[0]]
    name = exception.projector or first(core, PROJECTOR_NAMES)
    if name is not None:
        found: nn.Module = submodule(core, name)
        return found
    rest = [module for module in leftover(core, claimed) if runs(module)]
    if len(rest) > 1 and (steps := steps_behind(core, claimed)):
        return steps[0]
    return rest[0] if len(rest) == 1 else None


def runs(module: nn.Module) -> bool:
    """Whether a module has a forward of its own: a tokenizer of pictures (VQ-VAE) is asked for something else."""
    return type(module).forward is not nn.Module.forward


def steps_behind(core: Any, claimed: list[nn.Module | None]) -> list[nn.Module]:
    """The modules that a model calls one behind the other to make image tokens of a tower's features (Muse)."""
    if not hasattr(core, "get_image_features"):
        return []
    source = source_of(type(core).get_image_features)
    called = [getattr(core, name, None) for name in re.findall(r"self\.(\w+)\(", source)]
    known = {id(module) for module in claimed if module is not None}
    found = [module for module in called if isinstance(module, nn.Module)]
    towers = [place for place, module in enumerate(found) if id(module) in known]
    return found[towers[-1] + 1 :] if towers else []


def image_tokens_field(
    core: nn.Module, tower: nn.Module | None, projector: nn.Module | None, vision_config: Any, exception: Oddity
) -> tuple[nn.Module, str] | None:
    """Module and field that hold the image tokens in the picture's order, where that is not the projector's own.

    A tower that sorts patches by window merges them in that order; its last step puts the merged tokens back. A
    projector of several steps gives them in its last one's output, which is no field.
    """
    if exception.projector_out is not None:
        path, name = exception.projector_out
        return submodule(core, path), name
    if (steps := steps_behind(core, [tower])) and steps[0] is projector and len(steps) > 1:
        return steps[-1], ""
    if tower is not None and projector is not None and contains(tower, {id(projector)}):
        return (tower, "pooler_output") if hasattr(vision_config, "window_size") else None
    return None


def connector_attention(
    core: nn.Module, projector: nn.Module | None, paths: Mapping[int, str]
) -> tuple[ConnectorAttention, ...]:
    """The attention modules of what stands before the projector, known by its name, and inside the projector.

    They are called in the order in which these list them.
    """
    name = first(core, POOLING_NAMES)
    before = None if name is None else submodule(core, name)
    found = [
        ConnectorAttention(paths[id(module)], owner is before, not by_interface(module))
        for owner in (before, projector)
        for module in (() if owner is None else owner.modules())
        if by_interface(module) or by_softmax(module)
    ]
    return tuple(found)


def runs_in_a_loop(owner: nn.Module, name: str) -> bool:
    """Whether a module's own code calls this child inside a loop."""
    tree = ast.parse(source_of(type(owner)))
    loops = [node for node in ast.walk(tree) if isinstance(node, _LOOPS)]
    calls = (node.func for loop in loops for node in ast.walk(loop) if isinstance(node, ast.Call))
    return any(
        isinstance(call, ast.Attribute)
        and call.attr == name
        and isinstance(call.value, ast.Name)
        and call.value.id == "self"
        for call in calls
    )
