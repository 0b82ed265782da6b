"""Non-negative sparse coding with a learnt dictionary: Z ~ A C, few and small activations A >= 0, unit concepts.

Minimises 1/2 ||Z - A C||_F^2 + lambda ||A||_1 over A >= 0, ||c_k|| <= 1, lambda = alpha * rms row norm of Z (Mairal et
al., "Online learning for matrix factorization and sparse coding", 2010, eq. 4, with non-negative codes): what XL-VLMs
calls "snmf", there by scikit-learn's `DictionaryLearning` with a fixed lambda of 1, whatever the rows' scale. See
`factorisation` for how.
"""

from __future__ import annotations

from torch import Tensor

from concept_dict.factorisation import Factorisation, Init


class NonNegativeDictionary(Factorisation):
    """A dictionary with non-negative sparse codes.

    Args:
        n_components: Number of concepts k.
        alpha: Price of activations, relative to the rows' root mean square norm; `penalty_` is lambda.
        init: Where concepts start: `"kmeans"` centres, `"svd"`, both signs of leading singular vectors, or concepts
            (k, d) at hand.
        center: Subtract the mean first. Without it all concepts share the mean and decode to the same words.
        whiten: Multiply rows by S^(-whiten / 2), S their second moments, first: from 0, as they are, to 1, where all
            directions have the same size. With 1/2 a few large ones no longer decide alone (see `whitening`).
        max_iter: Alternations at most.
        tol: Stop when an alternation lowers the objective by less than this share of what concepts explain: of how far
            it lies below ||Z||^2, the objective without concepts.
        random_state: Seed of the k-means start.
    """

    def __init__(
        self,
        n_components: int = 20,
        *,
        alpha: float = 0.01,
        init: Init | Tensor = "kmeans",
        center: bool = True,
        whiten: float = 0.0,
        max_iter: int = 300,
        tol: float = 1e-6,
        random_state: int | None = 0,
    ) -> None:
        self.n_components = n_components
        self.alpha = alpha
        self.init = init
        self.center = center
        self.whiten = whiten
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state
