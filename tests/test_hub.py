"""Dictionaries on the hub: what is uploaded is what loads, offline by a hub that only records."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from concept_dict.dictionary import ConceptDictionary
from concept_dict.hub import model_card
from concept_dict.semi_nmf import SemiNMF
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from tests.recording_hub import RecordingHub

HOOK = "blocks.3.hook_resid_post"
MADE_BY = {"model": "someone/llava", "selectors": {"LastPrompt": {"selector": "LastPrompt"}}, "text": "a | b `c`\nd"}


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RecordingHub:
    return RecordingHub(tmp_path / "hub").put_in_place(monkeypatch)


@pytest.fixture(scope="module")
def fitted() -> ConceptDictionary:
    rows = np.random.default_rng(0).standard_normal((60, 128)) + 2
    return ConceptDictionary(SemiNMF(3, max_iter=5).fit(rows), HOOK, MADE_BY)


def test_what_is_pushed_comes_back(recorder: RecordingHub, fitted: ConceptDictionary) -> None:
    """The repository is made if needed, gets three files, and loads at the revision asked for."""
    address = fitted.push_to_hub("me/concepts", private=True, token="t", revision="main", commit_message="new")
    assert address == "https://hub/me/concepts/commit/1"
    assert recorder.calls == [
        ("token", "t"),
        ("create", "me/concepts", {"private": True, "exist_ok": True}),
        ("upload", "me/concepts", {"revision": "main", "commit_message": "new"}),
    ]
    names = {path.name for path in (recorder.kept / "me/concepts").iterdir()}
    assert names == {"README.md", "dictionary.json", "dictionary.safetensors"}
    loaded = ConceptDictionary.from_pretrained("me/concepts", revision="v1", token="t")
    assert torch.equal(loaded.concepts, fitted.concepts)
    assert loaded.made_by == MADE_BY
    last = {"revision": "v1", "allow_patterns": ["dictionary.json", "dictionary.safetensors"], "token": "t"}
    assert recorder.calls[-1] == ("download", "me/concepts", last)


def test_a_folder_needs_no_hub(recorder: RecordingHub, fitted: ConceptDictionary, tmp_path: Path) -> None:
    """A path that is there is read as it is; a revision of it makes no sense."""
    fitted.save(tmp_path / "mine")
    assert torch.equal(ConceptDictionary.from_pretrained(tmp_path / "mine").concepts, fitted.concepts)
    assert recorder.calls == []
    with pytest.raises(BadInputError, match="is a folder, which has no revision 'v1'"):
        ConceptDictionary.from_pretrained(tmp_path / "mine", revision="v1")


def test_what_is_nowhere_is_refused(recorder: RecordingHub) -> None:
    """One line that says both."""
    with pytest.raises(
        BadInputError, match=r"'no/such' is no folder here, and can't be had from the hub: no such thing$"
    ):
        ConceptDictionary.from_pretrained("no/such")


def test_the_card(fitted: ConceptDictionary, llava: HookedMM) -> None:
    """Valid metadata, a base model only if it has a name on the hub, facts in cells, words if a model is given."""
    text = model_card(fitted, "me/concepts")
    card = ModelCard(text)
    assert card.data.library_name == "hooked-mm"
    assert card.data.base_model == "someone/llava"
    assert "ConceptDictionary.from_pretrained('me/concepts')" in text
    assert f"| hook | `{HOOK}` |" in text
    assert "| concept | words |" not in text
    local = ConceptDictionary(fitted.decomposition, HOOK, {"model": "/home/me/llava"})
    assert ModelCard(model_card(local, "me/concepts")).data.base_model is None
    words = model_card(fitted, "me/concepts", llava).split("| concept | words |\n|---|---|\n")[1].splitlines()
    assert [line.split(" | ")[0] for line in words] == ["| 0", "| 1", "| 2"]
    for line in model_card(fitted, "a|b`c").splitlines():
        assert not line.startswith("| ") or line.replace("\\|", "").count("|") == 3
