"""Concept dictionaries on the Hugging Face hub: safetensors and JSON, with a card made from what they say."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from concept_dict.grounding import top_words
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM

if TYPE_CHECKING:
    from concept_dict.dictionary import ConceptDictionary

PATTERNS = ["dictionary.json", "dictionary.safetensors"]


def model_card(dictionary: ConceptDictionary, repo_id: str, model: HookedMM | None = None) -> str:
    """A README.md for the hub: what the dictionary is of, how it was made, how to load it.

    Args:
        dictionary: A fitted dictionary.
        repo_id: Where it will lie.
        model: The model it is of, for the concepts' words; without it the card names none.
    """
    fitted, made_by = dictionary.decomposition, dictionary.made_by
    k, d = dictionary.concepts.shape
    source = made_by.get("model")
    head = ["---", "library_name: hooked-mm", "tags:", "- concept-dictionary", "- interpretability"]
    # A path of one machine would be no model for anybody else.
    if isinstance(source, str) and source.count("/") == 1 and not Path(source).exists():
        head.append(f"base_model: {json.dumps(source)}")
    facts = {
        "method": repr(fitted),
        "concepts": f"{k}, of width {d}",
        "hook": dictionary.hook,
        **{name: made_by[name] for name in ("model", "revision", "family", "answer", "selectors") if made_by.get(name)},
        **{name: value for name, value in sorted(vars(fitted).items()) if name.endswith("_") and _plain(value)},
    }
    lines = [
        *head,
        "---",
        "",
        f"# {_cell(repo_id)}",
        "",
        f"{k} concepts of `{_cell(dictionary.hook)}`: representations Z ~ A C with activations A (n, {k}) and concepts "
        f"C ({k}, {d}), rows of norm 1.",
        "",
        "```python",
        "from concept_dict.dictionary import ConceptDictionary",
        "",
        f"dictionary = ConceptDictionary.from_pretrained({repo_id!r})",
        f"activations = dictionary.transform(rows)  # rows (n, {d}) -> (n, {k})",
        "```",
        "",
        "| | |",
        "|---|---|",
        *(
            f"| {name} | `{_cell(value if isinstance(value, str) else json.dumps(value, default=str))}` |"
            for name, value in facts.items()
        ),
    ]
    if model is not None:
        words = top_words(model, dictionary.concepts)
        lines += ["", "| concept | words |", "|---|---|"]
        lines += [f"| {n} | {_cell(', '.join(word.text for word in found))} |" for n, found in enumerate(words)]
    return "\n".join(lines) + "\n"


def _plain(value: object) -> bool:
    return isinstance(value, int | float | str)


def _cell(text: str) -> str:
    """Text that stays in one cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|").replace("`", "'")


def push_to_hub(
    dictionary: ConceptDictionary,
    repo_id: str,
    *,
    model: HookedMM | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a concept dictionary",
    token: str | None = None,
) -> str:
    """Upload a dictionary and its card; the repository is made if it is not there.

    Args:
        dictionary: A fitted dictionary.
        repo_id: `owner/name`.
        model: The model it is of: the card then lists every concept's words.
        private: Whether a new repository is private; the account's default unless given.
        revision: Branch to commit to; the main one unless given.
        commit_message: First line of the commit.
        token: Of the hub; the one that was logged in with unless given.

    Returns:
        The commit's address.

    Raises:
        NotFittedError: If there is nothing to upload yet.
    """
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        dictionary.save(folder)
        (Path(folder) / "README.md").write_text(model_card(dictionary, repo_id, model), encoding="utf-8")
        api.create_repo(repo_id, private=private, exist_ok=True)
        found = api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message)
    return str(found.commit_url)


def fetch(path_or_repo: str | Path, revision: str | None = None, **options: Any) -> Path:
    """The folder of a dictionary: the path itself if it is there, else downloaded from the hub.

    Args:
        path_or_repo: A folder, or `owner/name`.
        revision: Branch, tag or commit on the hub; not for a folder.
        options: Handed to `huggingface_hub.snapshot_download` (`token`, `cache_dir`, `local_files_only`, ...).

    Raises:
        BadInputError: If there is neither a folder nor a repository of that name, or a revision of a folder is asked.
    """
    folder = Path(path_or_repo)
    if folder.exists():
        if revision is not None:
            raise BadInputError(f"{str(path_or_repo)!r} is a folder, which has no revision {revision!r}; leave it out")
        return folder
    try:
        return Path(snapshot_download(str(path_or_repo), revision=revision, allow_patterns=PATTERNS, **options))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise BadInputError(
            f"{str(path_or_repo)!r} is no folder here, and can't be had from the hub: {str(error).splitlines()[0]}"
        ) from error
