"""A hub that only records: what is uploaded lies in a folder, and every call is kept."""

from __future__ import annotations

import shutil
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from hooked_mm import hub_files


class RecordingHub:
    """Keeps what is uploaded, and every call."""

    def __init__(self, kept: Path) -> None:
        self.kept, self.calls = kept, []

    def put_in_place(self, monkeypatch: pytest.MonkeyPatch) -> RecordingHub:
        """Take the place of the true one."""
        monkeypatch.setattr(hub_files, "HfApi", self.api)
        monkeypatch.setattr(hub_files, "snapshot_download", self.snapshot_download)
        return self

    def api(self, token: str | None = None) -> RecordingHub:
        self.calls.append(("token", token))
        return self

    def create_repo(self, repo_id: str, **options: Any) -> None:
        self.calls.append(("create", repo_id, options))

    def upload_folder(self, *, repo_id: str, folder_path: str, **options: Any) -> SimpleNamespace:
        self.calls.append(("upload", repo_id, options))
        shutil.copytree(folder_path, self.kept / repo_id)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def snapshot_download(self, repo_id: str, *, allow_patterns: list[str], **options: Any) -> str:
        """A copy of what matches; no folder at all where nothing does, as with the true one."""
        self.calls.append(("download", repo_id, {**options, "allow_patterns": allow_patterns}))
        if not (self.kept / repo_id).is_dir():
            raise LocalEntryNotFoundError("no such thing\nand more")
        snapshot = self.kept / "snapshots" / repo_id
        for file in (self.kept / repo_id).iterdir():
            if any(fnmatchcase(file.name, pattern) for pattern in allow_patterns):
                snapshot.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, snapshot)
        return str(snapshot)
