"""A fitted decomposition with its provenance: saved as safetensors plus JSON, never pickled.

    dictionary.json         method, parameters, fitted numbers, hook, provenance, checksum of the other file
    dictionary.safetensors  the fitted tensors: `components_` (k, d), `mean_` (d,), and what else the method has

See `hooked_mm.tensor_folder` for how they are written and what is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from concept_dict.decomposition import Decomposition
from concept_dict.explain import Explanation, explain
from concept_dict.grounding import is_signed
from concept_dict.hub import fetch, push_to_hub
from concept_dict.kmeans import KMeans
from concept_dict.non_negative_dictionary import NonNegativeDictionary
from concept_dict.pca import PCA
from concept_dict.semi_nmf import SemiNMF
from concept_dict.top_k_sae import TopKSAE
from concept_dict.top_norm import TopNorm
from hooked_mm.errors import BadInputError, nearest
from hooked_mm.hooked import HookedMM
from hooked_mm.prepare import SampleImages
from hooked_mm.steering_vector import AS_WIDE_AS_THE_STREAM, last_part
from hooked_mm.tensor_folder import read_json, read_tensors, write_folder
from hooked_mm.value_layout import stream_of

METHODS: dict[str, type[Decomposition]] = {
    method.__name__: method for method in (SemiNMF, NonNegativeDictionary, KMeans, PCA, TopNorm, TopKSAE)
}
FORMAT = 1
FILE = "dictionary"
"""Name of both files, without their endings."""


def dictionary_folders(folder: str | Path) -> list[Path]:
    """Where dictionaries lie: the folder itself, or those in it that hold one, as a run of `learn` leaves them."""
    there = Path(folder)
    places = [there] if (there / f"{FILE}.json").is_file() else sorted(there.iterdir()) if there.is_dir() else []
    return [place for place in places if (place / f"{FILE}.json").is_file()]


@dataclass
class ConceptDictionary:
    """Concepts of one hook point of one model.

    Attributes:
        decomposition: The fitted decomposition.
        hook: The hook point its rows came from.
        made_by: The provenance of the rows: an activation store's `made_by`.
    """

    decomposition: Decomposition
    hook: str
    made_by: Mapping[str, Any] = field(default_factory=dict)

    @property
    def signed(self) -> bool:
        """Whether activations can be negative, so that -c_k means something too."""
        fitted = self.decomposition
        return is_signed(fitted.components_, fitted.mean_, fitted.transform)

    @property
    def concepts(self) -> Float[Tensor, "k d"]:
        """C, rows of norm 1."""
        return self.decomposition.components_

    def transform(self, rows: Tensor | np.ndarray) -> Float[Tensor, "n k"]:
        """Activations of rows (n, d)."""
        return self.decomposition.transform(rows)

    def check_model(self, model: HookedMM) -> None:
        """Refuse a model that these are no concepts of.

        Names are compared by their last part, since a folder lies elsewhere on every machine; an adapter may differ.

        Raises:
            BadInputError: If the model's name or revision is another (where both are known), or it lacks the hook, or
                its stream has another width; it names both and the remedy.
        """
        config, owner = model.hf_model.config, self.made_by.get("model")
        own = {"model": getattr(config, "_name_or_path", None), "revision": getattr(config, "_commit_hash", None)}
        remedy = "load that model, or learn a dictionary of this one"
        for what, value in own.items():
            learnt = self.made_by.get(what)
            if learnt and value and last_part(str(learnt)) != last_part(str(value)):
                raise BadInputError(f"the dictionary was learnt on the {what} {learnt!r}, this is {value!r}; {remedy}")
        if self.hook not in model.hook_names:
            near = nearest(self.hook, model.hook_names)
            raise BadInputError(f"the dictionary of {owner!r} is one of {self.hook!r}, which this model has not{near}")
        wide = self.concepts.shape[1]
        if self.hook.endswith(AS_WIDE_AS_THE_STREAM) and stream_of(self.hook) == "text" and wide != model.cfg.d_model:
            raise BadInputError(
                f"concepts of {owner!r} at {self.hook!r} have width {wide}, this model's stream {model.cfg.d_model}; "
                f"{remedy}"
            )

    def save(self, path: str | Path) -> Path:
        """Write `dictionary.safetensors` and `dictionary.json` into a folder, made if needed.

        Raises:
            NotFittedError: If there is nothing to save yet.
        """
        fitted = self.decomposition
        fitted.check_fitted()
        # What is known of single rows belongs to the rows, of which every process has its own.
        values = {name: value for name, value in vars(fitted).items() if name.endswith("_") and name != "labels_"}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        content = {
            "format": FORMAT,
            "method": type(fitted).__name__,
            # A start that was given as a tensor is no setting that a file could repeat.
            "parameters": {name: v for name, v in fitted.get_params().items() if not isinstance(v, Tensor)},
            "fitted": {name: value for name, value in values.items() if isinstance(value, int | float | str | list)},
            "hook": self.hook,
            "made_by": dict(self.made_by),
        }
        return write_folder(path, FILE, tensors, content)

    @classmethod
    def load(cls, path: str | Path) -> ConceptDictionary:
        """Read what `save` wrote.

        Raises:
            BadInputError: If the folder holds no dictionary, or one of an unknown method or format.
        """
        remedy = f"fit a method of {', '.join(METHODS)}, or set its components_ and mean_ yourself, and save that"
        content = read_json(path, FILE, "concept dictionary", remedy)
        if content.get("format") != FORMAT or content.get("method") not in METHODS:
            raise BadInputError(
                f"{str(Path(path) / 'dictionary.json')!r} has format {content.get('format')} and method "
                f"{content.get('method')!r}; this version reads format {FORMAT} and {', '.join(METHODS)}"
            )
        tensors = read_tensors(path, FILE, content)
        method = METHODS[content["method"]]
        known = inspect.signature(method).parameters
        fitted = method(**{name: value for name, value in content["parameters"].items() if name in known})
        for name, value in {**content["fitted"], **tensors}.items():
            setattr(fitted, name, value)
        return cls(fitted, content["hook"], content["made_by"])

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload to the Hugging Face hub with a generated card; see `concept_dict.hub.push_to_hub`."""
        return push_to_hub(self, repo_id, **options)

    @classmethod
    def from_pretrained(
        cls, path_or_repo: str | Path, revision: str | None = None, **options: Any
    ) -> ConceptDictionary:
        """A dictionary from a folder or from the hub; see `concept_dict.hub.fetch`."""
        return cls.load(fetch(path_or_repo, revision, **options))

    def explain(
        self, model: HookedMM, image: SampleImages, text: str, answer: str | None = None, **options: Any
    ) -> Explanation:
        """Which concepts fire for a sample, where, and what they say; see `concept_dict.explain.explain`."""
        return explain(self, model, image, text, answer, **options)
