"""Folders on the Hugging Face hub, both ways: what dictionaries and steering vectors share."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from hooked_mm.errors import BadInputError


def fetch(
    path_or_repo: str | Path, patterns: Sequence[str], revision: str | None = None, what: str = "files", **options: Any
) -> Path:
    """A folder: the path itself if it is there, else downloaded from the hub.

    Args:
        path_or_repo: A folder, or `owner/name`.
        patterns: The files to download, as globs.
        revision: Branch, tag or commit on the hub; not for a folder.
        what: What they are, for errors: "steering vectors".
        options: Handed to `huggingface_hub.snapshot_download` (`token`, `cache_dir`, `local_files_only`, ...).

    Raises:
        BadInputError: If there is neither a folder nor a repository of that name, the repository has none of the files,
            or a revision of a folder is asked.
    """
    folder = Path(path_or_repo)
    if folder.exists():
        if revision is not None:
            raise BadInputError(f"{str(path_or_repo)!r} is a folder, which has no revision {revision!r}; leave it out")
        return folder
    try:
        found = Path(snapshot_download(str(path_or_repo), revision=revision, allow_patterns=list(patterns), **options))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise BadInputError(
            f"{str(path_or_repo)!r} is no folder here, and can't be had from the hub: {str(error).splitlines()[0]}"
        ) from error
    # Where no file matches, the hub's client succeeds all the same.
    if not any(file for pattern in patterns for file in found.glob(pattern)):
        raise BadInputError(
            f"the repository {str(path_or_repo)!r} of the hub holds no {what}: there is no {' or '.join(patterns)}; "
            "check name and revision"
        )
    return found


def upload(
    write: Callable[[Path], object],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload",
    token: str | None = None,
) -> str:
    """Upload a folder; the repository is made if it is not there.

    Args:
        write: Fills the empty folder that it is given, README.md included; if it fails, nothing has been made.
        repo_id: `owner/name`.
        private: Whether a new repository is private; the account's default unless given.
        revision: Branch to commit to; the main one unless given.
        commit_message: First line of the commit.
        token: Of the hub; the one that was logged in with unless given.

    Returns:
        The commit's address.
    """
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        found = api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message)
    return str(found.commit_url)


def hub_name(model: object) -> str | None:
    """A model's `owner/name` on the hub, None for a path of one machine, which would be no model for anybody else."""
    if not isinstance(model, str) or model.count("/") != 1 or Path(model).exists():
        return None
    try:
        validate_repo_id(model)
    except HFValidationError:
        return None
    return model


def cell(text: str) -> str:
    """Text that stays in one cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|").replace("`", "'")
