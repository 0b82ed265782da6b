"""A run as a whole: memory that is not enough, answers used again, several processes, kills."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hooked_mm.data import Sample, SampleDataModule
from hooked_mm.errors import BadInputError, StoreError
from hooked_mm.extraction import Extractor
from hooked_mm.extraction_job import extract
from hooked_mm.hooked import HookedMM
from hooked_mm.loading import Prepared
from hooked_mm.reader import Extracted, ModelSource
from hooked_mm.scenes.captions import CAPTION_PROMPT
from hooked_mm.scenes.dataset import SceneDataset, ScenesDataModule
from hooked_mm.selectors import BeforeSpecial, LastPrompt, MeanOver, Selector
from hooked_mm.store import ActivationStore
from hooked_mm.store_command import faults
from hooked_mm.store_format import ROW_COLUMNS, read_manifest
from tests.processes import run_in_processes

HOOKS = ["blocks.1.hook_resid_post", "blocks.4.hook_resid_post"]
ROOT = Path(__file__).parents[1]


def assert_same(store: ActivationStore, other: ActivationStore, tables: bool = True) -> None:
    """The same rows in the same order, values up to 1e-5 of their scale, and the same samples and skips."""
    assert store.rows.select(ROW_COLUMNS).to_pylist() == other.rows.select(ROW_COLUMNS).to_pylist()
    if tables:
        assert store.samples.to_pylist() == other.samples.to_pylist()
        skipped = [sorted(s.skipped.to_pylist(), key=lambda entry: entry["sample"]) for s in (store, other)]
        assert skipped[0] == skipped[1]
    for hook in store.hooks:
        one, two = store.activations(hook), other.activations(hook)
        assert (one - two).abs().max() <= 1e-5 * two.abs().max()


class Hungry(Extractor):
    """Has memory for so many samples only; remembers what it was given."""

    most = 2

    def represent(self, prepared: Prepared) -> Extracted:
        self.given: list[int] = [*getattr(self, "given", []), len(prepared.numbers)]
        if len(prepared.numbers) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().represent(prepared)


def test_a_batch_too_large_for_memory_is_halved(llava: HookedMM, tmp_path: Path) -> None:
    """The run goes on with halves, then tries smaller ones at once, and gives what an easy run gives."""
    data = [Sample(f"s{n}", None, CAPTION_PROMPT) for n in range(20)]
    data[3] = Sample("bad", "nowhere.jpg", CAPTION_PROMPT)
    hungry = Hungry(llava, HOOKS, LastPrompt(), "none")
    got = extract(hungry, SampleDataModule(data, 16), tmp_path / "s")
    assert_same(got, extract(Extractor(llava, HOOKS, LastPrompt(), "none"), SampleDataModule(data, 4), tmp_path / "t"))
    # 15 usable ones of the first 16: 15 are too many, as are 8, 4; from then on two are tried first.
    assert [size for size in hungry.given if size > 2] == [15, 8, 4]
    assert got.skipped.to_pylist() == [
        {"sample": "bad", "reason": "image 'nowhere.jpg' does not exist; check the path"}
    ]


def test_a_sample_too_large_for_memory_is_listed(llava: HookedMM, tmp_path: Path) -> None:
    """Even alone it does not fit: it is listed, or ends the run; another error is no matter of memory."""
    data = SampleDataModule([Sample(f"s{n}", None, CAPTION_PROMPT) for n in range(3)], 2)
    hungry = Hungry(llava, HOOKS, LastPrompt(), "none")
    hungry.most = 0
    got = extract(hungry, data, tmp_path / "s")
    assert (len(got), got.skipped.num_rows) == (0, 3)
    assert set(got.skipped.column("reason").to_pylist()) == {"there is not enough memory for it, even alone"}
    with pytest.raises(BadInputError, match="not enough memory"):
        extract(hungry, data, tmp_path / "t", on_error="stop")


@pytest.mark.parametrize("name", ["llava", "idefics2", "qwen2_vl", "molmo"])
def test_any_batch_any_order_any_neighbours(name: str, tmp_path: Path) -> None:
    """In batches of 1, 3 and 16, shuffled, beside longer and shorter prompts of other sizes of pictures: the same."""
    model = HookedMM.small(name, check=False)
    scenes = [SceneDataset(16)[n] for n in range(16)]
    asked = [Sample(f"s{n}", scenes[n].images, scenes[n].text, scenes[n].answer) for n in range(16)]
    others = [Sample(f"q{n}", None if n % 3 else scenes[n].images, "what place is this ?", "sea") for n in range(16)]
    selectors: dict[str, Selector] = {"end": BeforeSpecial(), "prompt": LastPrompt(), "picture": MeanOver("image")}
    rng = np.random.default_rng(0)
    found: list[tuple[list[int], list[torch.Tensor]]] = []
    for size in (1, 3, 16):
        samples = asked if size == 1 else [[*asked, *others][n] for n in rng.permutation(32)]
        extractor = Extractor(model, HOOKS, selectors, "given", max_positions=None if size == 1 else 700)
        store = extract(extractor, SampleDataModule(samples, size), tmp_path / str(size))
        rows = store.rows.to_pylist()
        order = np.array([n for sample in asked for n, row in enumerate(rows) if row["sample"] == sample.id])
        assert len(order) == 48
        found.append(([rows[n]["position"] for n in order], [store.activations(hook, order) for hook in HOOKS]))
    for positions, values in found[1:]:
        assert positions == found[0][0]
        for one, other in zip(found[0][1], values, strict=True):
            assert (one - other).abs().max() <= 1e-5 * one.abs().max()


def test_several_selectors_in_one_pass(llava: HookedMM, tmp_path: Path) -> None:
    """Rows carry the selector's name; each part is what a run with that selector alone gives."""
    selectors: dict[str, Selector] = {"picture": MeanOver("image"), "end": BeforeSpecial(), "prompt": LastPrompt()}
    data = ScenesDataModule(6, batch_size=4)
    both = extract(Extractor(llava, HOOKS, selectors, "given"), data, tmp_path / "both")
    for name, selector in selectors.items():
        alone = extract(Extractor(llava, HOOKS, {name: selector}, "given"), data, tmp_path / name)
        assert_same(both.where(selector=name), alone)
    assert len(both) == 18


def test_generated_answers_are_used_again(llava: HookedMM, tmp_path: Path) -> None:
    """Text generated once is read at other points, token for token, without being generated again."""
    data = ScenesDataModule(7, batch_size=3)
    first = extract(Extractor(llava, HOOKS[:1], BeforeSpecial(), "generated"), data, tmp_path / "first")
    fresh = extract(Extractor(llava, HOOKS, BeforeSpecial(), "generated"), data, tmp_path / "fresh")
    again = Extractor(llava, HOOKS, BeforeSpecial(), "stored", stored=tmp_path / "first")
    llava_generate, calls = llava.generate, []
    llava.generate = lambda *a, **k: calls.append(a) or llava_generate(*a, **k)  # type: ignore[method-assign]
    try:
        read = extract(again, data, tmp_path / "again")
    finally:
        del llava.generate  # type: ignore[method-assign]
    assert not calls
    assert_same(read, fresh)
    assert all(text.endswith(".") for text in first.samples.column("text").to_pylist())
    other = Extractor(llava, HOOKS, BeforeSpecial(), "stored", answer_prefix="in", stored=tmp_path / "first")
    with pytest.raises(BadInputError, match="answer_prefix=None, this run has 'in'"):
        extract(other, data, tmp_path / "x")
    more = extract(again, ScenesDataModule(8, batch_size=3), tmp_path / "more")
    assert more.skipped.column("reason").to_pylist() == ["the store of answers has none for it"]
    extract(Extractor(llava, HOOKS, LastPrompt(), "none"), data, tmp_path / "mute")
    mute = Extractor(llava, HOOKS, BeforeSpecial(), "stored", stored=tmp_path / "mute")
    with pytest.raises(BadInputError, match="holds no generated answers"):
        extract(mute, data, tmp_path / "y")


@pytest.mark.parametrize("answer", ["none", "generated"])
def test_pictures_asked_about_many_times(llava: HookedMM, tmp_path: Path, answer: Any, scenes: Any) -> None:
    """The tower sees each picture of a batch once, and every row is what it is without that."""
    images = [SceneDataset(3)[n].images for n in range(3)]
    prompts = ("what place is this ?", "how many objects are there ?", CAPTION_PROMPT)
    samples = [Sample(f"s{n}", images[n // 3], prompts[n % 3]) for n in range(9)]
    seen: list[int] = []
    tower = llava.hf_model.model.vision_tower
    handle = tower.register_forward_pre_hook(lambda _, args, kwargs: seen.append(len(args[0])), with_kwargs=True)
    try:
        plain = Extractor(llava, HOOKS, LastPrompt(), answer, share_pictures=False)
        alone = extract(plain, SampleDataModule(samples, 6), tmp_path / "alone")
        shown, seen[:] = sum(seen), []
        once = Extractor(llava, HOOKS, LastPrompt(), answer)
        got = extract(once, SampleDataModule(samples, 6), tmp_path / "once")
    finally:
        handle.remove()
    assert_same(got, alone)
    assert shown == 9 * (1 if answer == "none" else 2)
    # The first batch proves it: its six samples once more, and its two pictures twice.
    assert sum(seen) == 3 + 6 + 2


SCRIPT = """
    import sys
    sys.path.insert(0, {root!r})
    from pathlib import Path
    from hooked_mm import Extractor, LastPrompt, MeanOver, Sample, SampleDataModule, extract
    from hooked_mm.reader import ModelSource
    from hooked_mm.scenes.dataset import SceneDataset
    path, processes, seconds = sys.argv[1:4]
    samples = [SceneDataset(60)[n] for n in range(60)]
    samples[7] = Sample("bad", "nowhere.jpg", "what ?")
    extractor = Extractor(
        ModelSource("small:llava", "float32"), {hooks!r}, {{"a": LastPrompt(), "b": MeanOver("image")}}, "none"
    )
    settings = {{}} if processes == "1" else {{"strategy": "ddp", "devices": int(processes)}}
    if len(sys.argv) > 4:
        settings["num_nodes"] = int(sys.argv[4])
    resume = Path(path, "manifest.json").exists()
    extract(
        extractor, SampleDataModule(samples, 4), path, resume=resume, seconds_per_shard=float(seconds), **settings
    )
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that extracts: path, processes, seconds per shard."""
    file = tmp_path_factory.mktemp("script") / "run.py"
    file.write_text(textwrap.dedent(SCRIPT.format(root=str(ROOT), hooks=HOOKS)))
    return file


def extract_as_the_script(model: HookedMM | ModelSource, path: Path, **options: Any) -> ActivationStore:
    """What the program extracts, in this process."""
    samples = [SceneDataset(60)[n] for n in range(60)]
    samples[7] = Sample("bad", "nowhere.jpg", "what ?")
    extractor = Extractor(model, HOOKS, {"a": LastPrompt(), "b": MeanOver("image")}, "none")
    return extract(extractor, SampleDataModule(samples, 4), path, **options)


@pytest.fixture(scope="module")
def expected(llava: HookedMM, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """What it extracts, by one undisturbed process."""
    return extract_as_the_script(llava, tmp_path_factory.mktemp("expected") / "s")


def start(command: Sequence[Any], **environment: str) -> subprocess.Popen:
    """A program in a session of its own, so that it is killed with all its processes."""
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def finish(process: subprocess.Popen) -> None:
    """It must end well."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output


def assert_made_by_all(path: Path, expected: ActivationStore, processes: int) -> None:
    """Shards of all processes, rows in the order of the data set, values as by one process."""
    assert_same(ActivationStore.open(path), expected)
    assert {int(shard.name[:3]) for shard in (path / "shards").iterdir()} == set(range(processes))


def one_of_several(rank: int, count: int, port: int, path: Path) -> None:
    """Extract as one of several processes that were started from outside, as by torchrun."""
    torch.set_num_threads(1)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(value) for name, value in {**ranks, **meeting}.items()})
    source = ModelSource("small:llava", "float32")
    extract_as_the_script(source, path, seconds_per_shard=0, strategy="ddp", devices=count)


def test_two_processes_make_the_same_store(expected: ActivationStore, tmp_path: Path) -> None:
    """Started from outside, which is quick; a program that starts them itself is tested among the slow."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_in_processes(one_of_several, 2, port, tmp_path / "s")
    assert_made_by_all(tmp_path / "s", expected, 2)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_a_program_starts_several_processes(
    script: Path, expected: ActivationStore, tmp_path: Path, processes: int
) -> None:
    """It starts the others itself."""
    finish(start([script, tmp_path / "s", processes, 0]))
    assert_made_by_all(tmp_path / "s", expected, processes)


@pytest.mark.slow
@pytest.mark.longest
def test_killed_at_any_moment_and_resumed_on_another_number_of_processes(
    script: Path, expected: ActivationStore, tmp_path: Path
) -> None:
    """By SIGKILL at random moments, the number of processes changing between one, two and three.

    The number of kills is kept small for a run of all tests; `HOOKED_MM_KILLS=25` makes it thorough.
    """
    rng = np.random.default_rng(0)
    wanted = int(os.environ.get("HOOKED_MM_KILLS", "5"))
    kills, path, run = 0, tmp_path / "0", 0
    while kills < wanted:
        process = start([script, path, 1 + run % 3, 0])
        run += 1
        until = time.monotonic() + 120
        # Loading takes most of a run's time, so mostly the clock starts with the first shard that is new.
        before = len(list(path.glob("shards/*"))) if rng.random() < 0.8 else -1
        while process.poll() is None and len(list(path.glob("shards/*"))) == before and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3) if before >= 0 else rng.uniform(0, 8))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate()
        if (path / "manifest.json").exists() and read_manifest(path)["complete"]:
            assert_same(ActivationStore.open(path), expected)
            path = tmp_path / str(run)
            continue
        assert process.returncode == -signal.SIGKILL
        with pytest.raises(StoreError):
            ActivationStore.open(path)
        if (path / "shards").exists():
            assert faults(path) == ["it is unfinished: run the extraction again with --resume"]
    finish(start([script, path, 2, 0]))
    assert_same(ActivationStore.open(path), expected)


@pytest.mark.slow
def test_two_machines_make_the_same_store(script: Path, expected: ActivationStore, tmp_path: Path) -> None:
    """Two groups of processes under torchrun, as on two machines with a common disk."""
    common = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"]
    meeting = [f"--rdzv-endpoint=localhost:{29500 + os.getpid() % 1000}", "--rdzv-id=test"]
    groups = [start([*common, *meeting, script, tmp_path / "s", 1, 0, 2]) for _ in range(2)]
    for group in groups:
        finish(group)
    assert_same(ActivationStore.open(tmp_path / "s"), expected)


def test_a_store_is_written_by_one_run_at_a_time(llava: HookedMM, tmp_path: Path) -> None:
    """A second run is refused while the first goes on, and leaves it in peace."""
    data = ScenesDataModule(6, batch_size=2)
    refused: list[Exception] = []

    class Disturbed(Extractor):
        def represent(self, prepared: Prepared) -> Extracted:
            if not refused:
                with pytest.raises(StoreError, match="is being written by another run") as error:
                    extract(Extractor(llava, HOOKS, LastPrompt(), "none"), data, tmp_path / "s", resume=True)
                refused.append(error.value)
            return super().represent(prepared)

    got = extract(Disturbed(llava, HOOKS, LastPrompt(), "none"), data, tmp_path / "s")
    assert refused
    assert len(got) == 6


def test_the_summary_lists_what_was_skipped(llava: HookedMM, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Each with its reason; many of them by reason."""
    image = Image.new("RGB", (48, 48))
    few = [Sample("good", image, "what ?"), Sample("bad", image, " ")]
    extract(Extractor(llava, HOOKS, LastPrompt(), "none"), SampleDataModule(few), tmp_path / "few")
    printed = capsys.readouterr().out
    assert "1 of 2 samples skipped:\n  bad: the prompt is empty" in printed
    many = [few[0], *(Sample(f"bad{n}", image, " ") for n in range(30))]
    extract(Extractor(llava, HOOKS, LastPrompt(), "none"), SampleDataModule(many), tmp_path / "many")
    printed = capsys.readouterr().out
    assert "  30 x the prompt is empty" in printed
    assert "bad3" not in printed
