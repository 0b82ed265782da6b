"""causal-learn's FCI (https://causal-learn.readthedocs.io, Tetrad's in Python), asked under an order.

As it comes, its tiers write `a --> b` on every edge between tiers and refuse arrowheads at the earlier node: an order
is taken for the absence of common causes. `as_arrowheads` replaces the two functions that do so; search and rules stay
the library's. Run as a script with the library at hand, this writes `golden_pags.json`:

    python -m tests.causal_learn
"""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analyses.pag_orientation import Mark, Pag
from tests.ancestral import Dag, random_dag

GOLDEN = Path(__file__).parent / "golden_pags.json"
COUNT = 80


@contextlib.contextmanager
def as_arrowheads(library: Any) -> Iterator[None]:
    """While open, an order only says that a later node does not cause an earlier one."""
    from causallearn.graph.Edge import Edge
    from causallearn.graph.Endpoint import Endpoint

    orient, allowed = library.fci_orient_bk, library.is_arrow_point_allowed

    def arrowheads(knowledge: Any, graph: Any) -> None:
        for edge in graph.get_graph_edges() if knowledge is not None else ():
            first, second = edge.get_node1(), edge.get_node2()
            if knowledge.is_forbidden(first, second):
                first, second = second, first
            if knowledge.is_forbidden(second, first):
                graph.remove_edge(edge)
                graph.add_edge(Edge(first, second, Endpoint.CIRCLE, Endpoint.ARROW))

    library.fci_orient_bk = arrowheads
    library.is_arrow_point_allowed = lambda a, b, graph, knowledge: allowed(a, b, graph, None)
    try:
        yield
    finally:
        library.fci_orient_bk, library.is_arrow_point_allowed = orient, allowed


def fci(dag: Dag, tiers: Sequence[int] | None = None) -> Pag:
    """What the library learns from a graph's d-separations; it uses networkx for these."""
    import networkx
    from causallearn.graph.GraphNode import GraphNode
    from causallearn.search.ConstraintBased import FCI
    from causallearn.utils.PCUtils.BackgroundKnowledge import BackgroundKnowledge

    truth = networkx.DiGraph(dag.edges)
    truth.add_nodes_from(range(dag.observed))
    knowledge = None
    if tiers is not None:
        knowledge = BackgroundKnowledge()
        for node, tier in enumerate(tiers):
            knowledge.add_node_to_tier(GraphNode(f"X{node + 1}"), tier)
    data = np.random.default_rng(0).standard_normal((dag.observed + 2, dag.observed))
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), as_arrowheads(FCI):
        warnings.simplefilter("ignore")
        graph, _ = FCI.fci(
            data, "d_separation", alpha=0.5, true_dag=truth, background_knowledge=knowledge, show_progress=False
        )
    marks = np.zeros((dag.observed, dag.observed), dtype=np.int8)
    for edge in graph.get_graph_edges():
        a, b = (int(node.get_name()[1:]) - 1 for node in (edge.get_node1(), edge.get_node2()))
        marks[b, a], marks[a, b] = (Mark[end.name] for end in (edge.get_endpoint1(), edge.get_endpoint2()))
    return Pag(marks)


def told(pag: Pag) -> str:
    """A graph as text."""
    return ", ".join(f"{a} {sign} {b}" for a, b, sign in pag.edges())


def golden() -> list[dict[str, Any]]:
    """What the library learned when the file was written."""
    return json.loads(GOLDEN.read_text(encoding="utf-8"))["graphs"]


def main() -> None:
    """Write the file."""
    graphs = []
    for seed in range(COUNT):
        dag = random_dag(seed)
        graphs.append(
            {
                "observed": dag.observed,
                "dag": dag.edges,
                "ordered": told(fci(dag, range(dag.observed))),
                "free": told(fci(dag)),
            }
        )
    about = "causal-learn 0.1.4.8, FCI from d-separation; ordered: with the nodes' order, as tests/causal_learn.py says"
    rows = ",\n".join(f"    {json.dumps(graph)}" for graph in graphs)
    GOLDEN.write_text(f'{{\n  "made_by": "{about}",\n  "graphs": [\n{rows}\n  ]\n}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
