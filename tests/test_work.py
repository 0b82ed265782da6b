"""One thread for models: order, stopping, and what is left behind."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from threading import Event

import pytest
import torch
from PIL import Image

from hooked_mm.explorer.work import Running, Stopped, Work, Worker, partial_text
from hooked_mm.hooked import HookedMM


@pytest.fixture
def worker() -> Iterator[Worker]:
    """A worker, closed at the end."""
    made = Worker()
    yield made
    made.close()


def hooks_of(module: torch.nn.Module) -> int:
    """Forward hooks and pre-hooks anywhere in a module."""
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


def held(worker: Worker) -> tuple[Running[None], Event]:
    """Work that runs until an event is set, already begun."""
    begun, free = Event(), Event()

    def do(work: Work) -> None:
        begun.set()
        free.wait(10)

    running = worker.start(do)
    assert begun.wait(10)
    return running, free


def test_work_is_done_one_after_another_in_the_order_it_came(worker: Worker) -> None:
    """Pieces of work from several threads never overlap; those of one thread keep their order."""
    inside, most, done = [0], [0], []

    def piece(name: tuple[int, int]) -> None:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(random.Random(str(name)).random() / 500)
        done.append(name)
        inside[0] -= 1

    runnings: list[Running[None]] = []

    def visitor(number: int) -> None:
        runnings.extend(worker.start(lambda work, name=(number, turn): piece(name)) for turn in range(6))  # type: ignore[misc]

    threads = [threading.Thread(target=visitor, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for running in runnings:
        running.result()
    assert most == [1]
    assert len(done) == 24
    for number in range(4):
        assert [turn for who, turn in done if who == number] == list(range(6))


def test_the_result_and_the_error_reach_the_one_who_waits(worker: Worker) -> None:
    """What it gave; what it raised, the very object; the next work runs all the same."""
    error = KeyError("gone")

    def fails(work: Work) -> None:
        raise error

    first, second = worker.start(fails), worker.start(lambda work: 7)
    assert second.result() == 7
    assert first.wait(0)
    with pytest.raises(KeyError) as caught:
        first.result()
    assert caught.value is error
    first.give_up()  # nothing happens: it has ended


def test_waiting_ends_with_the_work_or_the_time(worker: Worker) -> None:
    """`wait` says whether the work has ended, and takes as long as it is told at most."""
    running, free = held(worker)
    begun = time.monotonic()
    assert not running.wait(0)
    assert not running.wait(0.05)
    assert time.monotonic() - begun < 1
    free.set()
    assert running.wait(10)


def test_work_stopped_while_it_waits_never_begins(worker: Worker) -> None:
    """Stopped before its turn, or given up: it is not run, and does not wait for its turn to be given up."""
    _, free = held(worker)
    ran: list[str] = []
    stopped = worker.start(lambda work: ran.append("stopped"))
    given_up = worker.start(lambda work: ran.append("given up"))
    last = worker.start(lambda work: ran.append("last"))
    stopped.work.stop()
    given_up.give_up()
    assert given_up.wait(0), "it is given up at once, though another's work runs"
    free.set()
    last.result()
    assert ran == ["last"]
    for one in (stopped, given_up):
        with pytest.raises(Stopped):
            one.result()


def test_work_that_runs_is_given_up_when_it_has_ended(worker: Worker) -> None:
    """Only then may the next begin: whoever gives up waits for the end."""
    ended: list[bool] = []
    begun = Event()

    def do(work: Work) -> None:
        begun.set()
        try:
            while True:
                work.step("counting")
                time.sleep(0.002)
        finally:
            time.sleep(0.05)
            ended.append(True)

    running = worker.start(do)
    begun.wait(10)
    running.give_up()
    assert ended == [True]
    with pytest.raises(Stopped):
        running.result()


def test_steps_tell_what_is_done_until_the_work_is_stopped() -> None:
    """The share is known only where a total is; after `stop` every step ends the work and tells nothing."""
    work = Work()
    work.step("loading")
    assert (work.told, work.share) == ("loading", None)
    work.step("layers", 1, 4)
    assert (work.told, work.share) == ("layers", 0.25)
    work.step("layers", 0, 0)
    assert work.share is None
    assert not work.stopped
    work.stop()
    for tell in (work.check, lambda: work.step("more")):
        with pytest.raises(Stopped):
            tell()
    assert work.told == "layers"
    assert work.stopped


def test_a_closed_worker_runs_nothing_that_waits() -> None:
    """Who waits for such work learns that it was stopped; nothing is taken any more."""
    worker = Worker()
    running, free = held(worker)
    waiting = worker.start(lambda work: 1)
    worker.close()
    with pytest.raises(Stopped):
        waiting.result()
    with pytest.raises(Stopped):
        worker.start(lambda work: 2)
    free.set()
    running.result()


def test_no_thread_is_left_behind() -> None:
    """A closed worker's thread ends with the work that ran."""
    before = set(threading.enumerate())
    worker = Worker()
    assert worker.start(lambda work: 3).result() == 3
    own = set(threading.enumerate()) - before
    assert len(own) == 1
    worker.close()
    for thread in own:
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.parametrize("way", ["stopped", "failed", "done"])
def test_watching_leaves_no_hook_behind(way: str) -> None:
    """However the work ends, the module is as it was; a module that is not watched runs on."""
    module, work = torch.nn.Linear(2, 2), Work()
    error = {"stopped": Stopped, "failed": ArithmeticError, "done": None}[way]
    with nullcontext() if error is None else pytest.raises(error), work.watching(module):
        assert hooks_of(module) == 1
        module(torch.zeros(2))
        if way == "failed":
            raise ArithmeticError
        if way == "stopped":
            work.stop()
            module(torch.zeros(2))
    assert hooks_of(module) == 0
    module(torch.zeros(2))


@pytest.mark.parametrize("name", ["llava", "idefics2", "qwen2_vl", "molmo"])
def test_a_generation_is_stopped_in_its_middle(
    small: Callable[[str], HookedMM], images: list[Image.Image], name: str
) -> None:
    """It ends at the next token with `Stopped` itself; afterwards the model answers as it did before."""
    model = small(name)
    batch = model.prepare(images[:1], "describe the scene in full .")
    whole, before = model.generate(batch, 8), hooks_of(model.hf_model)
    work, heard = Work(), []

    def tell(text: str) -> None:
        heard.append(text)
        if len(heard) == 3:
            work.stop()

    with pytest.raises(Stopped), work.watching(model.hf_model):
        model.generate(batch, 8, streamer=partial_text(model.tokenizer, tell))
    assert len(heard) == 3
    assert hooks_of(model.hf_model) == before
    again: list[str] = []
    output = model.generate(batch, 8, streamer=partial_text(model.tokenizer, again.append))
    assert torch.equal(output.tokens, whole.tokens)
    assert again[:3] == heard
    assert again[-1] == output.text[0] == whole.text[0]


def test_a_pass_is_not_begun_once_stopped(llava: HookedMM, images: list[Image.Image]) -> None:
    """`Stopped` comes out of our own passes as it is, cached or with hooks; the next pass gives what it always gave."""
    batch = llava.prepare(images[:1], "describe the scene in full .")
    before, count = llava.run_with_hooks(batch), hooks_of(llava.hf_model)
    work = Work()
    work.stop()
    with work.watching(llava.hf_model):
        with pytest.raises(Stopped):
            llava.run_with_cache(batch, "blocks.*.hook_resid_post")
        with pytest.raises(Stopped):
            llava.run_with_hooks(batch, [("blocks.1.hook_resid_post", lambda value, hook: value * 2)])
        with pytest.raises(Stopped):
            llava.run_with_cache(batch, "blocks.0.hook_resid_pre", stop_at_layer=1)
    after = llava.run_with_hooks(batch)
    assert before is not None
    assert after is not None
    assert torch.equal(after, before)
    assert hooks_of(llava.hf_model) == count


def test_the_answer_so_far_has_no_marks_and_no_prompt(llava: HookedMM) -> None:
    """The first that a streamer is given is the prompt; special tokens are no text."""
    told: list[str] = []
    streamer, tokenizer = partial_text(llava.tokenizer, told.append), llava.tokenizer
    streamer.put(tokenizer("what is it ?", return_tensors="pt")["input_ids"])
    for token in tokenizer("a red star", add_special_tokens=False)["input_ids"]:
        streamer.put(torch.tensor([token]))
    streamer.put(torch.tensor([tokenizer.eos_token_id]))
    streamer.end()
    assert told == ["a", "a red", "a red star", "a red star"]


@pytest.mark.slow
def test_an_interrupted_program_ends_though_work_runs() -> None:
    """Ctrl-C while a model runs: once its work is told to stop, no thread holds the interpreter."""
    # A shell lets programs in the background ignore Ctrl-C, and those that they start.
    program = """
import signal, time
from hooked_mm.explorer.work import Worker
signal.signal(signal.SIGINT, signal.default_int_handler)
def do(work):
    while True:
        work.check()
        time.sleep(.01)
worker = Worker()
running = worker.start(do)
waiting = [worker.start(do) for _ in range(3)]
print("begun", flush=True)
try:
    time.sleep(60)
finally:
    running.work.stop()
    worker.close()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(2)
        _, errors = process.communicate(timeout=20)
    assert errors.strip().endswith("KeyboardInterrupt")
