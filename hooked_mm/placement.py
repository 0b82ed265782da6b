"""A model that was built without memory for its weights, filled tensor by tensor where each shall lie.

The device of every module is settled first, as transformers does with `device_map`; each tensor goes straight to its
device in the model's dtype; hooks that move data between devices come last, when every weight is in its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory, offload_weight, save_offload_index
from torch import Tensor, nn

from hooked_mm.errors import BadInputError

BALANCED = ("auto", "balanced", "balanced_low_0", "sequential")
"""Device maps that are worked out from the memory at hand."""


class Placement:
    """Where each weight of a model goes.

    Args:
        model: With its parameters on the meta device, and its buffers made.
        device_map: None for the CPU, a device, one of BALANCED, or a table of modules and devices ("cpu", "disk", ...).
        dtype: Of all weights.
        max_memory: For BALANCED, as in accelerate.
        offload_folder: Where weights go whose device is "disk".

    Raises:
        BadInputError: If the device map is none, leaves a weight without device, or needs a folder that was not given.
    """

    def __init__(
        self,
        model: Any,
        device_map: Any = None,
        *,
        dtype: torch.dtype,
        max_memory: dict[int | str, int | str] | None = None,
        offload_folder: str | Path | None = None,
    ) -> None:
        self.model, self.dtype = model, dtype
        self.device_map = _settled(model, device_map, dtype, max_memory)
        self.folder = None if offload_folder is None else str(offload_folder)
        self._offloaded: dict[str, Any] = {}
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        devices = [self.device(name) for name in self._parameters]
        if "disk" in devices:
            if self.folder is None:
                raise BadInputError("the device map puts weights on disk; say where: offload_folder='...'")
            Path(self.folder).mkdir(parents=True, exist_ok=True)

    def device(self, name: str) -> str | int | torch.device:
        """Of a weight: that of the nearest module around it in the device map."""
        part = name
        while part not in self.device_map:
            if not part:
                raise BadInputError(f"the device map gives no device for {name}; add it, or a module around it")
            part = part.rpartition(".")[0]
        return self.device_map[part]

    def put(self, name: str, value: Tensor) -> None:
        """A copy of `value` becomes the weight of that name.

        Raises:
            BadInputError: If its sizes are not the weight's.
        """
        weight = self._parameters[name]
        if value.shape != weight.shape:
            raise BadInputError(f"{name} is {tuple(value.shape)}; the model has {tuple(weight.shape)}")
        device = self.device(name)
        if device == "disk":
            self._offloaded = offload_weight(value.to(self.dtype), name, self.folder, self._offloaded)
            return
        module, _, leaf = name.rpartition(".")
        kept = value.to(device=device, dtype=self.dtype, copy=True)
        setattr(self.model.get_submodule(module), leaf, nn.Parameter(kept, requires_grad=False))

    def finish(self) -> None:
        """Tie what is tied, move buffers, and set up the traffic between devices.

        Raises:
            RuntimeError: If a weight was never put.
        """
        self.model.tie_weights()
        empty = [
            name
            for name, weight in self.model.named_parameters()
            if weight.device.type == "meta" and name not in self._offloaded
        ]
        if empty:
            raise RuntimeError(f"weights that were never put: {empty}")
        places = set(self.device_map.values())
        if len(places) == 1 and "disk" not in places:
            self.model.to(places.pop())
            self.model.hf_device_map = self.device_map
            return
        if self._offloaded:
            save_offload_index(self._offloaded, self.folder)
        dispatch_model(self.model, self.device_map, offload_dir=self.folder, skip_keys="past_key_values")


def _settled(model: Any, device_map: Any, dtype: torch.dtype, max_memory: Any) -> dict[str, Any]:
    if device_map is None:
        return {"": "cpu"}
    if isinstance(device_map, Mapping):
        inside = [(a, b) for a in device_map for b in device_map if a != b and (not a or b.startswith(f"{a}."))]
        if inside:
            raise BadInputError(
                f"the device map has both {inside[0][0]!r} and its part {inside[0][1]!r}; give a device to each of the "
                "parts and none to the whole, since accelerate moves a whole with all its parts"
            )
        return dict(device_map)
    if device_map in BALANCED:
        # A block's sum needs both its terms on one device. Older versions of transformers know this as a list.
        whole = list(model._no_split_modules or ())
        if device_map != "sequential":
            max_memory = get_balanced_memory(
                model, max_memory, whole, dtype=dtype, low_zero=device_map == "balanced_low_0"
            )
        return dict(infer_auto_device_map(model, max_memory, whole, dtype=dtype))
    try:
        return {"": torch.device(device_map)}
    except (RuntimeError, TypeError) as error:
        raise BadInputError(
            f"device_map={device_map!r}: it must be a device, a table of modules and devices, or one of {BALANCED}"
        ) from error
