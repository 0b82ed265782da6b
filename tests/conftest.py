"""What most tests need: the small LLaVA, loaded once, and pictures with known truth."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

# Before torch is imported: tests run in one process per core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image

from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.dataset import SceneDataset, picture
from hooked_mm.scenes.world import Scene

torch.set_num_threads(1)
# Forward passes take as long as the machine is slow; a failing example must be the same everywhere.
settings.register_profile(
    "house", deadline=None, max_examples=12, derandomize=True, suppress_health_check=list(HealthCheck)
)
settings.load_profile("house")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: no process is left alone with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("longest") is None)


@pytest.fixture(scope="session")
def llava() -> HookedMM:
    """The shipped small LLaVA, float32."""
    return HookedMM.small("llava")


@pytest.fixture(scope="session")
def small(llava: HookedMM) -> Callable[[str], HookedMM]:
    """The shipped small models by name, each loaded once per process and without the check, which has its own tests."""
    kept = {"llava": llava}

    def get(name: str) -> HookedMM:
        if name not in kept:
            kept[name] = HookedMM.small(name, check=False)
        return kept[name]

    return get


@pytest.fixture
def loaded(llava: HookedMM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks for the small LLaVA by its name gets `llava`, not loaded and checked again; other models are loaded."""
    real = HookedMM.small

    def small(name: str = "llava", adapter: str | None = None, **options: Any) -> HookedMM:
        return llava if (name, adapter) == ("llava", None) else real(name, adapter, **options)

    monkeypatch.setattr(HookedMM, "small", small)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are loaded without the check, where something else is tested."""
    monkeypatch.setattr(HookedMM, "_check_on", lambda *_: None)


@pytest.fixture(scope="session")
def scenes() -> list[Scene]:
    """Twenty-four scenes of the test split."""
    data = SceneDataset(24, split="test", seed=7)
    return [data.scene(index) for index in range(len(data))]


@pytest.fixture(scope="session")
def images(scenes: list[Scene]) -> list[Image.Image]:
    """Their pictures."""
    return [picture(item) for item in scenes]
