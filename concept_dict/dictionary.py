"""A fitted decomposition with its provenance: saved as safetensors plus JSON, never pickled."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from concept_dict.decomposition import Decomposition
from concept_dict.kmeans import KMeans
from concept_dict.non_negative_dictionary import NonNegativeDictionary
from concept_dict.pca import PCA
from concept_dict.semi_nmf import SemiNMF
from concept_dict.top_k_sae import TopKSAE
from concept_dict.top_norm import TopNorm
from hooked_mm.errors import BadInputError

METHODS: dict[str, type[Decomposition]] = {
    method.__name__: method for method in (SemiNMF, NonNegativeDictionary, KMeans, PCA, TopNorm, TopKSAE)
}
FITTED = ("components_", "mean_", "cluster_centers_", "encoder_", "bias_", "explained_variance_ratio_")
FORMAT = 1


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
    def concepts(self) -> Float[Tensor, "k d"]:
        """C, rows of norm 1."""
        return self.decomposition.components_

    def transform(self, rows: Tensor | np.ndarray) -> Float[Tensor, "n k"]:
        """Activations of rows (n, d)."""
        return self.decomposition.transform(rows)

    def save(self, path: str | Path) -> Path:
        """Write `dictionary.safetensors` and `dictionary.json` into a folder, made if needed.

        Raises:
            NotFittedError: If there is nothing to save yet.
        """
        fitted = self.decomposition
        fitted.check_fitted()
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: getattr(fitted, name).contiguous().cpu() for name in FITTED if hasattr(fitted, name)}
        save_file(tensors, folder / "dictionary.safetensors")
        numbers = {
            name: value for name, value in vars(fitted).items() if name.endswith("_") and isinstance(value, int | float)
        }
        content = {
            "format": FORMAT,
            "method": type(fitted).__name__,
            "parameters": fitted.get_params(),
            "fitted": numbers,
            "hook": self.hook,
            "made_by": dict(self.made_by),
        }
        (folder / "dictionary.json").write_text(json.dumps(content, indent=2) + "\n")
        return folder

    @classmethod
    def load(cls, path: str | Path) -> ConceptDictionary:
        """Read what `save` wrote.

        Raises:
            BadInputError: If the folder holds no dictionary, or one of an unknown method or format.
        """
        folder = Path(path)
        file = folder / "dictionary.json"
        if not file.is_file():
            raise BadInputError(f"{str(folder)!r} holds no concept dictionary: there is no dictionary.json")
        content = json.loads(file.read_text())
        if content.get("format") != FORMAT or content.get("method") not in METHODS:
            raise BadInputError(
                f"{str(file)!r} has format {content.get('format')} and method {content.get('method')!r}; this version "
                f"reads format {FORMAT} and {', '.join(METHODS)}"
            )
        method = METHODS[content["method"]]
        known = inspect.signature(method).parameters
        fitted = method(**{name: value for name, value in content["parameters"].items() if name in known})
        for name, value in {**content["fitted"], **load_file(folder / "dictionary.safetensors")}.items():
            setattr(fitted, name, value)
        return cls(fitted, content["hook"], content["made_by"])
