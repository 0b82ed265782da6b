"""Models whose weights are elsewhere until a module runs: accelerate's own calls, and device maps by module."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import cpu_offload, disk_offload
from torch import nn
from transformers import AutoModelForImageTextToText

How = Literal["memory", "disk", "map"]
HOWS: tuple[How, ...] = ("memory", "disk", "map")


def alternating(model: nn.Module) -> dict[str, str]:
    """A device map that puts neighbours apart: every other block, every other part, on disk.

    What has weights of its own is not cut, and parts that share a weight stay together: accelerate asks for both.
    """
    found: list[str] = []
    places: dict[str, str] = {}
    shared: dict[int, str] = {}

    def walk(path: str, module: nn.Module) -> None:
        dot = f"{path}." if path else ""
        whole = next(module.parameters(recurse=False), None) is not None
        if path and (whole or not any(isinstance(inner, nn.ModuleList) for inner in module.modules())):
            found.append(path)
            return
        for name, child in module.named_children():
            if isinstance(module, nn.ModuleList):
                found.append(f"{dot}{name}")
            else:
                walk(f"{dot}{name}", child)

    walk("", model)
    for index, path in enumerate(found):
        weights = [id(weight) for weight in model.get_submodule(path).parameters()]
        known = (shared[weight] for weight in weights if weight in shared)
        places[path] = next(known, ("disk", "cpu")[index % 2])
        shared |= dict.fromkeys(weights, places[path])
    return places


def placed_elsewhere(model: Any, how: How, folder: Path) -> Any:
    """The same model with weights that are there only while their module runs.

    Args:
        model: From `miniature`; `"memory"` and `"disk"` change it.
        how: `"memory"`, `"disk"`: accelerate's calls on the model; `"map"`: saved, and loaded with a device map.
        folder: An empty one.
    """
    if how == "memory":
        return cpu_offload(model, execution_device=torch.device("cpu"))
    if how == "disk":
        disk_offload(model, str(folder / "off"), execution_device=torch.device("cpu"))
        return model
    model.save_pretrained(folder / "model")
    device_map = alternating(model)
    loaded = AutoModelForImageTextToText.from_pretrained(
        folder / "model", dtype=torch.float32, device_map=device_map, offload_folder=folder / "off"
    )
    return loaded.requires_grad_(False).eval()
