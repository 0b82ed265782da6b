"""Concept dictionaries on the Hugging Face hub: safetensors and JSON, with a card made from what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from concept_dict.grounding import top_words
from hooked_mm import hub_files
from hooked_mm.hooked import HookedMM
from hooked_mm.hub_files import cell, hub_name
from hooked_mm.unembedding import Unembedding

if TYPE_CHECKING:
    from concept_dict.dictionary import ConceptDictionary

PATTERNS = ["dictionary.json", "dictionary.safetensors"]


def model_card(dictionary: ConceptDictionary, repo_id: str, model: HookedMM | Unembedding | None = None) -> str:
    """A README.md for the hub: what the dictionary is of, how it was made, how to load it.

    Args:
        dictionary: A fitted dictionary.
        repo_id: Where it will lie.
        model: The model it is of, for the concepts' words; without it the card names none.
    """
    fitted, made_by = dictionary.decomposition, dictionary.made_by
    k, d = dictionary.concepts.shape
    source = hub_name(made_by.get("model"))
    head = ["---", "library_name: hooked-mm", "tags:", "- concept-dictionary", "- interpretability"]
    if source:
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
        f"# {cell(repo_id)}",
        "",
        f"{k} concepts of `{cell(dictionary.hook)}`: representations Z ~ A C with activations A (n, {k}) and concepts "
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
            f"| {name} | `{cell(value if isinstance(value, str) else json.dumps(value, default=str))}` |"
            for name, value in facts.items()
        ),
    ]
    if model is not None:
        words = top_words(model, dictionary.concepts)
        lines += ["", "| concept | words |", "|---|---|"]
        lines += [f"| {n} | {cell(', '.join(word.text for word in found))} |" for n, found in enumerate(words)]
    return "\n".join(lines) + "\n"


def _plain(value: object) -> bool:
    return isinstance(value, int | float | str)


def push_to_hub(
    dictionary: ConceptDictionary,
    repo_id: str,
    *,
    model: HookedMM | Unembedding | None = None,
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

    def write(folder: Path) -> None:
        dictionary.save(folder)
        (folder / "README.md").write_text(model_card(dictionary, repo_id, model), encoding="utf-8")

    return hub_files.upload(
        write, repo_id, private=private, revision=revision, commit_message=commit_message, token=token
    )


def fetch(path_or_repo: str | Path, revision: str | None = None, **options: Any) -> Path:
    """The folder of a dictionary: the path itself if it is there, else downloaded from the hub.

    Args:
        path_or_repo: A folder, or `owner/name`.
        revision: Branch, tag or commit on the hub; not for a folder.
        options: Handed to `huggingface_hub.snapshot_download` (`token`, `cache_dir`, `local_files_only`, ...).

    Raises:
        BadInputError: If there is neither a folder nor a repository of that name, or a revision of a folder is asked.
    """
    return hub_files.fetch(path_or_repo, PATTERNS, revision, "concept dictionary", **options)
