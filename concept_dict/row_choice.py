"""Which of a store's rows a dictionary is of: conditions as `ActivationStore.where` takes them, kept in `made_by`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hooked_mm.store import ActivationStore


def learnt_where(made_by: Mapping[str, Any]) -> dict[str, Any]:
    """The conditions that a dictionary's rows met; none where it does not tell of any."""
    return dict(made_by.get("where") or {})


def selectors_of(store: ActivationStore) -> list[str]:
    """The names of the selectors that chose a store's rows."""
    return sorted({name for name in store.rows.column("selector").unique().to_pylist() if name})


def described(where: Mapping[str, Any], store: ActivationStore) -> str:
    """The choice of rows as a sentence: its conditions, and the selectors if rows of several are among them."""
    said = "; ".join(
        f"{name} is {' or '.join(map(str, value)) if isinstance(value, list | tuple | set) else value}"
        for name, value in where.items()
    )
    names = selectors_of(store)
    mixed = f" (of the selectors {', '.join(names)})" if len(names) > 1 else ""
    return (f"those whose {said}" if said else "all") + mixed
