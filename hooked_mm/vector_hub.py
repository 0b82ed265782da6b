"""Steering vectors on the Hugging Face hub: safetensors and JSON, with a card made from what they say.

push_vectors([sea, snow], "owner/name")
sea, snow = vectors_from_hub("owner/name")
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hooked_mm.errors import BadInputError
from hooked_mm.hub_files import cell, fetch, hub_name, upload
from hooked_mm.steering_vector import FILE, SteeringVector, last_part, load_vectors, save_vectors

PATTERNS = [f"{FILE}.json", f"{FILE}.safetensors"]


def vector_card(vectors: Sequence[SteeringVector], repo_id: str) -> str:
    """A README.md for the hub: what vectors there are, of which models, how to load them.

    Args:
        vectors: At least one.
        repo_id: Where they will lie.
    """
    owners = list(dict.fromkeys(vector.model for vector in vectors if vector.model))
    on_hub = [name for name in map(hub_name, owners) if name]
    head = ["---", "library_name: hooked-mm", "tags:", "- steering-vector", "- interpretability"]
    if on_hub:
        head.append(f"base_model: {json.dumps(on_hub[0] if len(on_hub) == 1 else on_hub)}")
    told = ", ".join(_code(hub_name(owner) or last_part(owner)) for owner in owners)
    rows = (
        f"| {n} | {_code(v.name)} | {_code(v.kind)} | {_code(v.hook)} | {v.norm:.4g} |" for n, v in enumerate(vectors)
    )
    lines = [
        *head,
        "---",
        "",
        f"# {cell(repo_id)}",
        "",
        f"Directions in the activations of {told or 'a model that they do not name'}: x + alpha v at a vector's hook "
        "steers what the model says.",
        "",
        "```python",
        "from hooked_mm import vectors_from_hub",
        "",
        f"vectors = vectors_from_hub({repo_id!r})",
        "with model.hooks([vectors[0].intervention(alpha=1.0, model=model)]):  # a HookedMM",
        "    model.generate(batch)",
        "```",
        "",
        f"Or on the command line: `hooked-mm steer apply --vectors {cell(repo_id)} ...`",
        "",
        "| | name | kind | hook | norm |",
        "|---|---|---|---|---|",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def _code(text: str) -> str:
    """As it is, whatever Markdown would read into it."""
    return f"`{cell(text)}`" if text.strip() else ""


def push_vectors(
    vectors: Sequence[SteeringVector],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload steering vectors",
    token: str | None = None,
) -> str:
    """Upload vectors, in place of what vectors were there, and their card; the repository is made if it is not there.

    Args:
        vectors: Of any hooks and widths; controls and gates too.
        repo_id: `owner/name`.
        private: Whether a new repository is private; the account's default unless given.
        revision: Branch to commit to; the main one unless given.
        commit_message: First line of the commit.
        token: Of the hub; the one that was logged in with unless given.

    Returns:
        The commit's address.

    Raises:
        BadInputError: If there are no vectors.
    """
    if not vectors:
        raise BadInputError(f"there are 0 vectors for {repo_id!r}, which nobody could steer with; give at least one")

    def write(folder: Path) -> None:
        save_vectors(vectors, folder)
        (folder / "README.md").write_text(vector_card(vectors, repo_id), encoding="utf-8")

    return upload(write, repo_id, private=private, revision=revision, commit_message=commit_message, token=token)


def vectors_from_hub(path_or_repo: str | Path, revision: str | None = None, **options: Any) -> list[SteeringVector]:
    """Steering vectors of a folder, or of a repository of the hub, in the order in which they were saved.

    Args:
        path_or_repo: A folder, or `owner/name`.
        revision: Branch, tag or commit on the hub; not for a folder.
        options: Handed to `huggingface_hub.snapshot_download` (`token`, `cache_dir`, `local_files_only`, ...).

    Raises:
        BadInputError: If there is neither, or it holds no steering vectors; see `load_vectors`.
    """
    return load_vectors(fetch(path_or_repo, PATTERNS, revision, "steering vectors", **options))
