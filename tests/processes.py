"""Several processes for a test."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

PRELOADED = ["tests.test_extraction_job", "tests.test_rows"]
"""Imported once, in the process that all others are copies of."""


def run_in_processes(target: Callable[..., None], count: int, *arguments: Any) -> None:
    """Call `target(rank, count, *arguments)` in `count` processes; all must end well."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    workers = [context.Process(target=target, args=(rank, count, *arguments)) for rank in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(300)
    ends = [worker.exitcode for worker in workers]
    for worker in workers:
        worker.kill()
    assert ends == [0] * count
