"""Steering vectors on the hub: what is pushed comes back, with a card that says what it is."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard

import hooked_mm
from hooked_mm.errors import BadInputError
from hooked_mm.reader import ModelSource
from hooked_mm.steering_vector import SteeringVector, save_vectors
from hooked_mm.vector_hub import push_vectors, vector_card, vectors_from_hub
from steering.command_options import given, new_parser
from tests.recording_hub import RecordingHub

HOOK = "blocks.3.hook_resid_post"
SEA = SteeringVector(
    torch.tensor([3.0, 4.0]), HOOK, "shift", "sea | `a`", ["last"], "someone/llava", "abc", made_from={"rows": 3}
)
SNOW = SteeringVector(torch.tensor([0.0, 5.0, 12.0]), "blocks.1.hook_q", model="someone/llava")
FILES = ["steering_vectors.json", "steering_vectors.safetensors"]


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RecordingHub:
    return RecordingHub(tmp_path / "hub").put_in_place(monkeypatch)


def assert_same(found: list[SteeringVector], expected: list[SteeringVector]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        mine, theirs = vars(one).copy(), vars(other).copy()
        assert torch.equal(mine.pop("values"), theirs.pop("values"))
        assert mine == theirs


def test_what_is_pushed_comes_back(recorder: RecordingHub) -> None:
    """In order, with all that they know; the repository is made if needed, and gets three files."""
    address = push_vectors([SEA, SNOW], "me/vectors", private=True, token="t", revision="main", commit_message="new")
    assert address == "https://hub/me/vectors/commit/1"
    assert recorder.calls == [
        ("token", "t"),
        ("create", "me/vectors", {"private": True, "exist_ok": True}),
        ("upload", "me/vectors", {"revision": "main", "commit_message": "new"}),
    ]
    assert sorted(file.name for file in (recorder.kept / "me/vectors").iterdir()) == ["README.md", *FILES]
    assert_same(vectors_from_hub("me/vectors", revision="v1", token="t"), [SEA, SNOW])
    last = {"revision": "v1", "allow_patterns": FILES, "token": "t"}
    assert recorder.calls[-1] == ("download", "me/vectors", last)
    assert (hooked_mm.push_vectors, hooked_mm.vectors_from_hub) == (push_vectors, vectors_from_hub)


def test_one_alone(recorder: RecordingHub, tmp_path: Path) -> None:
    """A vector pushes itself and is made from its repository or folder; of several it is told what to use."""
    assert SEA.push_to_hub("me/sea", private=True) == "https://hub/me/sea/commit/1"
    assert recorder.calls[1] == ("create", "me/sea", {"private": True, "exist_ok": True})
    assert_same([SteeringVector.from_pretrained("me/sea", "v1", token="t")], [SEA])
    assert recorder.calls[-1][2]["revision"] == "v1"
    assert_same([SteeringVector.from_pretrained(SNOW.save(tmp_path / "snow"))], [SNOW])
    push_vectors([SEA, SNOW], "me/both")
    with pytest.raises(BadInputError, match="'me/both' holds 2 steering vectors, not one; use vectors_from_hub"):
        SteeringVector.from_pretrained("me/both")


def test_a_folder_needs_no_hub(recorder: RecordingHub, tmp_path: Path) -> None:
    """A path that is there is read as it is."""
    folder = save_vectors([SNOW, SEA], tmp_path / "mine")
    assert_same(vectors_from_hub(folder), [SNOW, SEA])
    assert_same(vectors_from_hub(str(folder)), [SNOW, SEA])
    assert recorder.calls == []


def test_refusals(recorder: RecordingHub, tmp_path: Path) -> None:
    """What is nowhere, what holds something else, and nothing at all."""
    with pytest.raises(
        BadInputError, match=r"'no/such' is no folder here, and can't be had from the hub: no such thing$"
    ):
        vectors_from_hub("no/such")
    (recorder.kept / "me/dictionary").mkdir(parents=True)
    (recorder.kept / "me/dictionary/dictionary.json").write_text("{}")
    with pytest.raises(BadInputError, match=r"'me/dictionary' of the hub holds no steering vectors: there is no steer"):
        vectors_from_hub("me/dictionary")
    recorder.calls.clear()
    with pytest.raises(BadInputError, match="0 vectors for 'me/none'"):
        push_vectors([], "me/none")
    assert recorder.calls == []


def test_the_card() -> None:
    """Valid metadata, a row for every vector with its own norm, and how to load them."""
    text = vector_card([SEA, SNOW], "me/vectors")
    data = ModelCard(text).data
    assert (data.library_name, data.base_model) == ("hooked-mm", "someone/llava")
    assert "steering-vector" in data.tags
    assert "vectors_from_hub('me/vectors')" in text
    assert "--vectors me/vectors" in text
    # Lengths of (3, 4) and (0, 5, 12).
    assert text.splitlines()[-2:] == [
        f"| 0 | `sea \\| 'a'` | `shift` | `{HOOK}` | 5 |",
        "| 1 |  |  | `blocks.1.hook_q` | 13 |",
    ]


@pytest.mark.parametrize(
    ("models", "base", "told"),
    [
        (["/home/me/llava"], None, "`llava`"),
        (["/llava"], None, "`llava`"),
        (["~/llava"], None, "`llava`"),
        (["small:llava"], None, "`llava`"),
        ([None], None, "a model that they do not name"),
        (["/home/me/llava", "a/b", "a/b"], "a/b", "`llava`, `a/b`"),
        (["a/b", "c/d"], ["a/b", "c/d"], "`a/b`, `c/d`"),
    ],
)
def test_base_models_have_a_name_on_the_hub(models: list[str | None], base: str | list[str] | None, told: str) -> None:
    """No path of one machine, which the card does not mention at all; several models are several."""
    text = vector_card([SteeringVector(SEA.values, HOOK, model=model) for model in models], "me/v")
    assert ModelCard(text).data.base_model == base
    assert f"activations of {told}:" in text
    assert "/home" not in text


def test_a_folder_that_is_there_is_no_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much its name looks like one of the hub."""
    monkeypatch.chdir(tmp_path)
    vector = SteeringVector(SEA.values, HOOK, model="runs/llava")
    assert ModelCard(vector_card([vector], "me/v")).data.base_model == "runs/llava"
    (tmp_path / "runs" / "llava").mkdir(parents=True)
    assert ModelCard(vector_card([vector], "me/v")).data.base_model is None


def test_commands_take_hub_names(recorder: RecordingHub, tmp_path: Path) -> None:
    """One, or several among folders; a name that is nowhere is refused."""
    push_vectors([SEA], "me/sea")
    folder = str(SNOW.save(tmp_path / "snow"))
    parser = new_parser("apply", "text")

    def parsed(vectors: str) -> SimpleNamespace:
        made = parser.parse_args(["--model.id", "someone/llava", "--vectors", vectors])
        told = {name: made[name] for name in ("vectors", "hooks", "names", "kinds", "gates")}
        return SimpleNamespace(**told, model=ModelSource("someone/llava"), force=False)

    assert_same(given(parsed("me/sea")).vectors, [SEA])
    assert_same(given(parsed(folder)).vectors, [SNOW])
    assert_same(given(parsed(f"[{folder}, me/sea]")).vectors, [SNOW, SEA])
    with pytest.raises(BadInputError, match="'me/none' is no folder here, and can't be had from the hub"):
        given(parsed(f"[{folder}, me/none]"))
