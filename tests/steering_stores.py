"""A small store of questions about scenes, read by the small LLaVA at the last token of the prompt."""

from __future__ import annotations

import pytest

from hooked_mm.extraction import Extractor
from hooked_mm.extraction_job import extract
from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.dataset import ScenesDataModule
from hooked_mm.selectors import LastPrompt
from hooked_mm.store import ActivationStore

DEEP, SHALLOW = "blocks.3.hook_resid_post", "blocks.2.hook_resid_post"
SIZE = 400
_MADE: list[ActivationStore] = []


def questions_store(model: HookedMM, folders: pytest.TempPathFactory) -> ActivationStore:
    """`SIZE` questions with their answers as columns, at two hooks; made once, whichever test file asks."""
    if not _MADE:
        data = ScenesDataModule(SIZE, "question", seed=5)
        extractor = Extractor(model, [SHALLOW, DEEP], LastPrompt(), answer="none")
        _MADE.append(extract(extractor, data, folders.mktemp("steering") / "questions"))
    return _MADE[0]
