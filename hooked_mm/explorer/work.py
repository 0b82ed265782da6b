"""Long work of the explorer: one thread in which all models run, with progress, and an end when nobody wants it.

Visitors wait in the order in which they came; no two of them ever run a model at the same time. Work that is stopped
ends with `Stopped`, at the next forward pass of the model (see `Work.watching`) or the next step that is told.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


class Stopped(Exception):
    """The work was stopped by the one who asked for it, or they have gone."""


class Work:
    """What a piece of work tells of itself, and how it learns that it shall end.

    Attributes:
        told: What is being done, for the person who waits.
        share: How much of it is done, from 0 to 1; None where that is not known.
    """

    def __init__(self) -> None:
        self.told, self.share = "", None  # type: tuple[str, float | None]
        self._stop = Event()

    def stop(self) -> None:
        """Let the work end at its next step."""
        self._stop.set()

    @property
    def stopped(self) -> bool:
        """Whether it shall end."""
        return self._stop.is_set()

    def check(self) -> None:
        """Raise `Stopped` if the work shall end."""
        if self._stop.is_set():
            raise Stopped("stopped")

    def step(self, told: str, done: int | None = None, total: int | None = None) -> None:
        """Say what comes next; steps `done` of `total` lie behind.

        Raises:
            Stopped: If the work shall end.
        """
        self.check()
        self.told, self.share = told, done / total if done is not None and total else None

    @contextmanager
    def watching(self, module: torch.nn.Module) -> Iterator[None]:
        """While open, every forward pass of the module ends with `Stopped` once the work shall end."""
        handle = module.register_forward_pre_hook(lambda *_: self.check())
        try:
            yield
        finally:
            handle.remove()


class Running(Generic[T]):
    """Work that was handed over: what it tells, and its result."""

    def __init__(self, work: Work, future: Future[T]) -> None:
        self.work, self._future = work, future

    def wait(self, seconds: float) -> bool:
        """Wait for its end, so long at most; whether it has ended."""
        end = time.monotonic() + seconds
        while not self._future.done() and time.monotonic() < end:
            time.sleep(min(0.01, seconds))
        return self._future.done()

    def result(self) -> T:
        """What it gave; raises what it raised, `Stopped` if it was given up before it began."""
        try:
            return self._future.result()
        except CancelledError:
            raise Stopped("stopped") from None

    def give_up(self) -> None:
        """Stop it, and wait until it has ended: only then the next may begin."""
        self.work.stop()
        if not self._future.cancel():
            self._future.exception()


class Worker:
    """The one thread in which models run."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="explorer-model")

    def start(self, do: Callable[[Work], T]) -> Running[T]:
        """Hand work over; it begins when all before it has ended.

        Raises:
            Stopped: If the worker is closed.
        """
        work = Work()

        def run() -> T:
            work.check()
            return do(work)

        try:
            return Running(work, self._pool.submit(run))
        except RuntimeError:
            raise Stopped("the explorer is being closed") from None

    def close(self) -> None:
        """Take no more work; what runs is not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def partial_text(tokenizer: Any, tell: Callable[[str], None]) -> Any:
    """A streamer for `generate`: tells the text of an answer so far, at every token."""
    return _Streamer(tokenizer, tell)


class _Streamer:
    def __init__(self, tokenizer: Any, tell: Callable[[str], None]) -> None:
        self._tokenizer, self._tell = tokenizer, tell
        self._ids: list[int] | None = None

    def put(self, ids: torch.Tensor) -> None:
        # The prompt comes first.
        if self._ids is None:
            self._ids = []
            return
        self._ids += ids.flatten().tolist()
        self._tell(self._tokenizer.decode(self._ids, skip_special_tokens=True).strip())

    def end(self) -> None:
        pass
