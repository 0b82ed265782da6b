"""Folders to the hub and back: the path that is there comes first, and what is nowhere is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from hooked_mm.errors import BadInputError
from hooked_mm.hub_files import cell, fetch, hub_name, upload
from tests.recording_hub import RecordingHub


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RecordingHub:
    return RecordingHub(tmp_path / "hub").put_in_place(monkeypatch)


def write(folder: Path) -> None:
    for name in ("a.json", "b.bin", "README.md"):
        (folder / name).write_text(name)


def test_what_is_uploaded_is_fetched(recorder: RecordingHub) -> None:
    """All that was written goes up, only what matches comes down; options reach the hub."""
    address = upload(write, "me/x", private=False, revision="dev", commit_message="new", token="t")
    assert address == "https://hub/me/x/commit/1"
    assert recorder.calls == [
        ("token", "t"),
        ("create", "me/x", {"private": False, "exist_ok": True}),
        ("upload", "me/x", {"revision": "dev", "commit_message": "new"}),
    ]
    assert {file.name for file in (recorder.kept / "me/x").iterdir()} == {"a.json", "b.bin", "README.md"}
    folder = fetch("me/x", ("*.json", "none"), "v1", cache_dir="c")
    assert [(file.name, file.read_text()) for file in folder.iterdir()] == [("a.json", "a.json")]
    asked = {"revision": "v1", "allow_patterns": ["*.json", "none"], "cache_dir": "c"}
    assert recorder.calls[-1] == ("download", "me/x", asked)


def test_what_can_not_be_written_makes_no_repository(recorder: RecordingHub) -> None:
    """The hub is not even asked."""

    def fail(folder: Path) -> None:
        raise BadInputError("no")

    with pytest.raises(BadInputError, match="no"):
        upload(fail, "me/x")
    assert recorder.calls == []


def test_a_path_that_is_there_stays_a_path(
    recorder: RecordingHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even one that looks like a repository, which is there too; a revision of it makes no sense."""
    upload(write, "me/x")
    (tmp_path / "me" / "x").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    before = list(recorder.calls)
    assert fetch("me/x", ["*"]) == Path("me/x")
    assert fetch(tmp_path / "me" / "x", ["*"]) == tmp_path / "me" / "x"
    with pytest.raises(BadInputError, match="'me/x' is a folder, which has no revision 'v1'; leave it out"):
        fetch("me/x", ["*"], "v1")
    assert recorder.calls == before


def test_a_repository_without_the_files(recorder: RecordingHub) -> None:
    """The hub's client returns a folder that may not even be there."""
    upload(write, "me/x")
    with pytest.raises(
        BadInputError, match=r"repository 'me/x' of the hub holds no pears: there is no c\.json or \*\.p;"
    ):
        fetch("me/x", ["c.json", "*.p"], what="pears")


@pytest.mark.parametrize("name", ["no/such", "a/b/c", "/no/such/folder", "a b/c", "../no-such"])
def test_what_is_nowhere_is_refused(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By the hub's true client, which is offline; in one line."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInputError, match=r"^'.*' is no folder here, and can't be had from the hub: .+$") as caught:
        fetch(name, ["*"], cache_dir=str(tmp_path / "cache"), local_files_only=True)
    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`owner/name`, never what is a path, be it there or of another machine."""
    (tmp_path / "runs" / "llava").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_name("llava-hf/llava-1.5-7b-hf") == "llava-hf/llava-1.5-7b-hf"
    paths = ["runs/llava", "/llava", "./llava", "../llava", "~/llava", "/home/me/llava", "a/b/c", "C:\\models/llava"]
    for other in [*paths, str(tmp_path / "runs"), "llava/", "small:llava", "llava", "", None, 3]:
        assert hub_name(other) is None, other


def test_a_cell_is_one_cell() -> None:
    """No line break, no bar, no end of code."""
    assert cell("a | b `c`\n d") == "a \\| b 'c' d"
