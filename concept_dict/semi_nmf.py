"""Semi-nonnegative matrix factorisation: Z ~ A C with A >= 0 and concepts of any sign.

Minimises ||Z - A C||_F^2 over A >= 0: the objective of Ding, Li, Jordan, "Convex and Semi-Nonnegative Matrix
Factorizations" (2010), eq. 9 (their X ~ F G^T has samples in columns: F is our C transposed, G our A), whose scale is
free and fixed here by unit concepts. See `factorisation` for how.

The objective alone does not say which concepts: on centred rows any concepts with a positive combination near zero
reproduce a whole (k - 1)-dimensional subspace, all activations large and rising together, and a good optimiser ends
there, near PCA in disguise. `NonNegativeDictionary` picks, among factorisations that fit about equally well, the one
with few and small activations, whose concepts can be told apart.
"""

from __future__ import annotations

from torch import Tensor

from concept_dict.factorisation import Factorisation, Init


class SemiNMF(Factorisation):
    """Semi-NMF by HALS.

    Args:
        n_components: Number of concepts k.
        init: Where concepts start: `"kmeans"` centres (as Ding), `"svd"`, both signs of leading singular vectors, or
            concepts (k, d) at hand.
        center: Subtract the mean first. Without it all concepts share the mean and decode to the same words.
        whiten: Multiply rows by S^(-whiten / 2), S their second moments, first: from 0, as they are, to 1, where all
            directions have the same size. With 1/2 a few large ones no longer decide alone (see `whitening`).
        max_iter: Alternations at most.
        tol: Stop when an alternation lowers the objective by less than this share of what concepts explain: of how far
            it lies below ||Z||^2, the objective without concepts.
        random_state: Seed of the k-means start.
    """

    alpha = 0.0

    def __init__(
        self,
        n_components: int = 20,
        *,
        init: Init | Tensor = "kmeans",
        center: bool = True,
        whiten: float = 0.0,
        max_iter: int = 300,
        tol: float = 1e-3,
        random_state: int | None = 0,
    ) -> None:
        self.n_components = n_components
        self.init = init
        self.center = center
        self.whiten = whiten
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state
