"""Final norm and unembedding alone: all that turns directions of a residual stream into words, without the model.

Of a checkpoint in shards only those are read, and on the hub downloaded, that hold these tensors. Which tensors these
are is found on the model built without weights (`skeleton`), and by transformers' own names for them
(`checkpoint_keys`); a tied unembedding is the token embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from hooked_mm.checkpoint import Checkpoint, adapter_tensors, settled_dtype
from hooked_mm.checkpoint_keys import kept_wide, on_meta, places, tied
from hooked_mm.errors import BadInputError, UnsupportedModelError
from hooked_mm.llava_keys import is_llava_original
from hooked_mm.skeleton import readout, skeleton
from hooked_mm.structure import Readout, vocabulary
from hooked_mm.vocabulary import logits_of

_WHOLE = "load the whole model: HookedMM.from_pretrained"


@dataclass(frozen=True)
class UnembeddingConfig:
    """What is known of a model by its ends: width of its stream, number of words, `config.model_type`."""

    d_model: int
    d_vocab: int
    family: str


class Unembedding:
    """What `HookedMM.to_logits` needs of a model, and its tokenizer.

    Args:
        model: Holds final norm and unembedding at their paths.
        end: These paths, and what becomes of the logits.
        family: `config.model_type`.
        checkpoint: What they were read of.
        options: Where its files are.

    Attributes:
        cfg: `d_model`, `d_vocab`, `family`.
        names: The checkpoint's tensors that were read.
        files: The files that hold them; no other was opened.
        bytes_read: Of these tensors, as they are stored.
        total_bytes: Of the whole checkpoint; None where its index does not say.
    """

    def __init__(
        self, model: nn.Module, end: Readout, family: str, checkpoint: Checkpoint, options: Mapping[str, Any]
    ) -> None:
        self._model, self._end, self._options = model, end, dict(options)
        unembed = model.get_submodule(end.unembed)
        self.cfg = UnembeddingConfig(int(unembed.get_parameter("weight").shape[1]), vocabulary(unembed), family)
        if end.words is not None:
            self.cfg = UnembeddingConfig(self.cfg.d_model, end.words, family)
        self.model_id, self.names, self.files = checkpoint.where, checkpoint.names_read, checkpoint.opened
        self.bytes_read, self.total_bytes = checkpoint.bytes_read, checkpoint.total_bytes

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | Path,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "cpu",
        adapter: str | Path | None = None,
        **options: Any,
    ) -> Unembedding:
        """Read the ends of a model from the hub or from a folder.

        Args:
            model_id: Hub id or folder.
            dtype: Of the weights; `"auto"` for the checkpoint's own.
            device: Where they shall be.
            adapter: Hub id or folder of a PEFT adapter that belongs to the model; it must leave its ends alone.
            options: Where the files are: `revision`, `token`, `cache_dir`, `local_files_only`, `subfolder`.

        Raises:
            UnsupportedModelError: If the architecture is not recognised, its ends can't be told from the rest, they are
                not in the checkpoint as they are in the model, or the adapter changes them.
            BadInputError: If there are no weights, or they lack what is needed; it names the tensor.
        """
        written, _ = PretrainedConfig.get_config_dict(str(model_id), **options)
        named = None
        if is_llava_original(written):
            # Imported here, as it brings transformers' LLaVA with it.
            from hooked_mm.llava_originals import config_of_ends

            config, named = config_of_ends(written)
        else:
            config = AutoConfig.from_pretrained(str(model_id), **options)
        checkpoint = Checkpoint(model_id, **options)
        kind = settled_dtype(checkpoint, config, dtype)
        model = on_meta(config, kind)
        parts = skeleton(model)
        end = readout(model, parts)
        wanted = [path for path in (end.collapse, end.final_norm, end.unembed) if path is not None]
        _check_adapter(adapter, wanted, model, {k: v for k, v in options.items() if k not in ("revision", "subfolder")})
        holder = nn.Module()
        if named is None:
            stored = {place.name: name for name, place in sorted(_kept(model, checkpoint).items(), reverse=True)}
        else:
            stored = {own: name for own in model.state_dict() if (name := named(own)) in checkpoint.shards}
        for path in wanted:
            module = model.get_submodule(path)
            _refuse_buffers(module, path)
            values = {}
            for name in module.state_dict():
                own = f"{path}.{name}"
                source = next((stored[other] for other in tied(model, own) if other in stored), None)
                if source is None:
                    raise BadInputError(
                        f"the checkpoint {checkpoint.where!r} holds no tensor for {own!r} of {type(model).__name__}; "
                        f"is it a checkpoint of this model? {_WHOLE} reports what is missing"
                    )
                values[name] = _settled(checkpoint, source, torch.float32 if kept_wide(model, own, kind) else kind)
            try:
                module.load_state_dict({name: value.to(device) for name, value in values.items()}, assign=True)
            except RuntimeError as error:
                raise BadInputError(
                    f"the checkpoint {checkpoint.where!r} does not fit its own config.json at {path!r}: {error}"
                ) from error
            _put(holder, path, module.requires_grad_(False).eval())
        return cls(holder, end, parts.family, checkpoint, options)

    def __repr__(self) -> str:
        share = f" of {self.total_bytes:,}" if self.total_bytes else ""
        return (
            f"Unembedding({self.cfg.family}, {self.cfg.d_model} -> {self.cfg.d_vocab}; read {self.bytes_read:,}{share} "
            f"bytes in {len(self.files)} file{'s' if len(self.files) > 1 else ''})"
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self._model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The unembedding's."""
        return self._model.get_submodule(self._end.unembed).get_parameter("weight").dtype

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer, loaded when it is first asked for."""
        return AutoTokenizer.from_pretrained(self.model_id, **self._options)

    def to_logits(self, resid: Float[Tensor, "... d_model"], *, grad: bool = False) -> Float[Tensor, "... vocab"]:
        """The model's logits for residual-stream values of any layer, as `HookedMM.to_logits`."""
        return logits_of(self._model, self._end, resid, grad=grad)


def _kept(model: Any, checkpoint: Checkpoint) -> dict[str, Any]:
    """Checkpoint's tensor -> place, of those that go into the model as they are."""
    return {name: place for name, place in places(model, checkpoint.shards).items() if not place.merged}


def _settled(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> Tensor:
    """A tensor of the checkpoint in this dtype; quantised ones are refused."""
    value = checkpoint.read(name)
    if value.dtype.itemsize < 2 or not value.is_floating_point():
        raise UnsupportedModelError(
            f"{name!r} of {checkpoint.where!r} is quantised ({value.dtype}), and means nothing by itself; {_WHOLE}"
        )
    return value.to(dtype)


def _refuse_buffers(module: nn.Module, path: str) -> None:
    """What no checkpoint holds can't be read of one."""
    computed = sorted({name for name, _ in module.named_buffers()} - set(module.state_dict()))
    if computed:
        raise UnsupportedModelError(
            f"{path!r} ({type(module).__name__}) computes {', '.join(computed)} when it is made; {_WHOLE}"
        )


def _put(holder: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a dotted path."""
    *owners, last = path.split(".")
    for owner in owners:
        if owner not in dict(holder.named_children()):
            holder.add_module(owner, nn.Module())
        holder = holder.get_submodule(owner)
    holder.add_module(last, module)


def _check_adapter(adapter: str | Path | None, paths: list[str], model: Any, options: Mapping[str, Any]) -> None:
    """Refuse an adapter that changes the ends of the model, by the names of its tensors.

    Raises:
        UnsupportedModelError: It names the tensors.
    """
    if adapter is None:
        return
    owners = {name.rpartition(".")[0] for path in paths for name in _with_tied(model, path)}
    named = {name: name.removeprefix("base_model.model.") for name in adapter_tensors(adapter, **options)}
    places_of = places(model, named.values())
    # Also where PEFT calls a module as the model did in an older version.
    found = [
        name
        for name, bare in named.items()
        if any(f"{places_of[bare].name}.".startswith(f"{owner}.") for owner in owners)
        or bare.startswith(paths[-1].rpartition(".")[2])
    ]
    if found:
        raise UnsupportedModelError(
            f"the adapter {str(adapter)!r} changes the final norm or the unembedding ({', '.join(found[:3])}); "
            f"{_WHOLE}(..., adapter=...)"
        )


def _with_tied(model: Any, path: str) -> list[str]:
    """The parameters below a path, and those that are one with them."""
    return [other for name in model.get_submodule(path).state_dict() for other in tied(model, f"{path}.{name}")]
