"""Small trained models that ship with the package, their adapters, and the scripts that made them."""

from __future__ import annotations

from pathlib import Path

from hooked_mm.errors import unknown

_HERE = Path(__file__).parent

SMALL_MODELS = tuple(
    name for name in ("llava", "idefics2", "qwen2_vl", "molmo") if (_HERE / name / "model.safetensors").is_file()
)
"""The models whose folders are there."""


def small_model_path(name: str) -> Path:
    """The folder of a shipped model, as `save_pretrained` wrote it.

    Raises:
        BadInputError: For a name that does not exist.
    """
    if name not in SMALL_MODELS:
        raise unknown("small model", name, SMALL_MODELS)
    return _HERE / name


def adapters_of(folder: str | Path) -> tuple[str, ...]:
    """The names of the LoRA adapters in a model's folder, sorted: `FOLDER/adapters/NAME/adapter_config.json`."""
    return tuple(sorted(path.parent.name for path in Path(folder).glob("adapters/*/adapter_config.json")))


def small_adapter_path(name: str, adapter: str) -> Path:
    """The folder of a shipped model's adapter, as PEFT's `save_pretrained` wrote it.

    Raises:
        BadInputError: For a model or an adapter that does not exist.
    """
    folder = small_model_path(name)
    known = adapters_of(folder)
    if adapter not in known:
        raise unknown(f"adapter of {name}", adapter, known)
    return folder / "adapters" / adapter
