"""From samples to prepared batches, in worker processes: pictures decoded, prompts of like length side by side.

The data set is taken in windows. Within a window, samples that show the same picture go together, then those of like
length, so that little is padded. What a sample gives does not depend on any of this.
"""

from __future__ import annotations

import os
from collections.abc import Container, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any, Literal

import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from hooked_mm.batch import Batch
from hooked_mm.data import Sample
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.prepare import ImageSource, SampleImages, load_image, prepare, sources

AnswerSource = Literal["generated", "given", "none", "stored"]
OnError = Literal["skip", "stop"]

WINDOW = 16
"""Batches whose samples are sorted together."""


@dataclass(frozen=True)
class Prepared:
    """A batch ready for the model.

    Attributes:
        numbers: Of its samples, in the data set.
        samples: Without their pictures; a picture's path stays.
        batch: None if no sample could be used.
        skipped: `{"sample": id, "reason": why}` of those that could not.
        pictures: One sample for each distinct picture, if pictures occur more than once.
        picture_of: Per image of `batch`, which of `pictures` it is.
    """

    numbers: list[int]
    samples: list[Sample]
    batch: Batch | None
    skipped: list[dict[str, str]]
    pictures: Batch | None = None
    picture_of: tuple[int, ...] = ()


class BatchMaker:
    """Makes `Prepared` batches of samples by their numbers; runs in workers, so it holds no weights it would need.

    Args:
        dataset: Of `Sample`.
        model: Whose prompts, processor and layout to use.
        answer: `"given"` puts the samples' answers behind their prompts; otherwise these end where the answer begins.
        answer_prefix: The beginning of every answer, given or generated.
        on_error: What a sample that can't be used does: is listed, or ends the run.
        answered: Ids of the samples whose answers are stored; others can't be used. None if none need be.
    """

    def __init__(
        self,
        dataset: Any,
        model: HookedMM,
        answer: AnswerSource,
        answer_prefix: str | None = None,
        on_error: OnError = "skip",
        answered: Container[str] | None = None,
    ) -> None:
        self.dataset, self.model, self.answered = dataset, model, answered
        self.answer, self.answer_prefix, self.on_error = answer, answer_prefix, on_error
        self.dtype = model.dtype

    def __call__(self, numbers: Sequence[int], samples: Sequence[Sample] | None = None) -> Prepared:
        """The batch of these samples.

        Args:
            numbers: In the data set.
            samples: The same, if they are at hand.

        Raises:
            BadInputError: For a bad sample, where that ends the run.
        """
        made = [self.dataset[number] for number in numbers] if samples is None else samples
        good: list[tuple[int, Sample, list[Image.Image]]] = []
        skipped: list[dict[str, str]] = []
        decoded: dict[Hashable, Image.Image] = {}
        for number, sample in zip(numbers, made, strict=True):
            try:
                good.append((number, sample, self._check(sample, decoded)))
            except BadInputError as error:
                skipped.append(self.skip(sample, error.reason))
        batch = None
        while good and batch is None:
            try:
                batch = self._prepare([entry[1] for entry in good], [entry[2] for entry in good])
            except BadInputError as error:
                if error.sample is None:
                    raise
                skipped.append(self.skip(good.pop(error.sample)[1], error.reason))
            except Exception as error:
                # A processor does not say which of the samples it could not take.
                kept, lost = self._one_by_one(good)
                if not lost:
                    raise
                good = kept
                skipped += [self.skip(sample, reason) for sample, reason in lost]
                del error
        seen = [picture for _, _, pictures in good for picture in pictures]
        order = list({id(picture): picture for picture in seen}.values())
        pictures: Batch | None = None
        picture_of: tuple[int, ...] = ()
        if batch is not None and len(order) < len(seen):
            place = {id(picture): number for number, picture in enumerate(order)}
            picture_of = tuple(place[id(picture)] for picture in seen)
            # What is asked does not matter: it stands behind the picture and is not read.
            pictures = self._raw([[picture] for picture in order], ["what is this ?"] * len(order), None)
        plain = [replace(sample, images=path_of(sample.images)) for _, sample, _ in good]
        return Prepared([number for number, _, _ in good], plain, batch, skipped, pictures, picture_of)

    def _check(self, sample: Sample, decoded: dict[Hashable, Image.Image]) -> list[Image.Image]:
        """Its pictures, each decoded once; refuses what is missing."""
        if not sample.text.strip():
            raise BadInputError(f"the prompt is empty ({sample.text!r}); write a question or an instruction")
        if self.answer == "given" and sample.answer is None:
            raise BadInputError("has no answer, but given answers were asked for")
        if self.answered is not None and sample.id not in self.answered:
            raise BadInputError("the store of answers has none for it")
        pictures = []
        for source in sources(sample.images):
            key = _name(source)
            if key not in decoded:
                decoded[key] = load_image(source)
            pictures.append(decoded[key])
        return pictures

    def skip(self, sample: Sample, reason: str) -> dict[str, str]:
        """What is written down of a sample that can't be used; ends the run where that was asked for."""
        if self.on_error == "stop":
            raise BadInputError(f"{sample.id!r}: {reason}. With on_error='skip' it would be listed and left out")
        return {"sample": sample.id, "reason": reason}

    def _prepare(self, samples: Sequence[Sample], pictures: Sequence[list[Image.Image]]) -> Batch:
        answers = [sample.answer for sample in samples] if self.answer == "given" else None
        return self._raw(pictures, [sample.text for sample in samples], answers)

    def _raw(
        self, pictures: Sequence[list[Image.Image]], text: list[str], answers: Sequence[str | None] | None
    ) -> Batch:
        prefix = self.answer_prefix.strip() if self.answer_prefix else None
        said = [prefix] * len(text) if answers is None else [" ".join(filter(None, (prefix, a))) for a in answers]
        model = self.model
        return prepare(
            model.processor,
            model.structure,
            model.hf_model.config,
            pictures,
            text,
            said,
            template=True,
            padding_side="left",
            dtype=self.dtype,
        )

    def _one_by_one(
        self, entries: list[tuple[int, Sample, list[Image.Image]]]
    ) -> tuple[list[tuple[int, Sample, list[Image.Image]]], list[tuple[Sample, str]]]:
        """Those that can be prepared alone, and the others with the reason."""
        kept, lost = [], []
        for entry in entries:
            try:
                self._prepare([entry[1]], [entry[2]])
            except Exception as error:
                lost.append((entry[1], f"the processor refused it ({type(error).__name__}: {error})"))
            else:
                kept.append(entry)
        return kept, lost

    def positions(self, sample: Sample) -> int:
        """About how many positions it takes; a wrong guess costs time and nothing else."""
        text = sample.text + (sample.answer or "") * (self.answer == "given")
        return len(text) // 4 + sum(map(self._image_tokens, sources(sample.images)))

    def _image_tokens(self, source: ImageSource) -> int:
        count = getattr(self.model.processor, "_get_num_multimodal_tokens", None)
        if count is None:
            return 0
        try:
            if isinstance(source, Image.Image):
                size = source.size
            else:
                with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as picture:
                    size = picture.size
            return int(count(image_sizes=[size[::-1]]).num_image_tokens[0])
        except Exception:
            # Whatever is wrong with the picture is told when it is decoded.
            return 0


class Batches(IterableDataset):
    """Some samples of a data set as prepared batches.

    Args:
        make: Makes a batch.
        numbers: The samples, in the order of the data set.
        batch_size: At most so many in a batch; `shrink` lowers it while the run goes on.
        max_positions: At most about so many positions in a batch, padding counted.
    """

    def __init__(
        self, make: BatchMaker, numbers: Sequence[int], batch_size: int, max_positions: int | None = None
    ) -> None:
        self.make, self.numbers, self.max_positions = make, list(numbers), max_positions
        # In shared memory, so that workers hear of it.
        self._size = torch.tensor([batch_size]).share_memory_()

    @property
    def batch_size(self) -> int:
        """The largest batch allowed now."""
        return int(self._size)

    def shrink(self, batch_size: int) -> None:
        """Allow smaller batches only, from the next window on."""
        self._size.fill_(min(self.batch_size, max(1, batch_size)))

    def __iter__(self) -> Iterator[Prepared]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        size = self.batch_size * WINDOW
        for start in range(first * size, len(self.numbers), step * size):
            numbers = self.numbers[start : start + size]
            samples = [self.make.dataset[number] for number in numbers]
            for part in cut(
                [self.make.positions(sample) for sample in samples],
                [_key(sample.images) for sample in samples],
                self.batch_size,
                self.max_positions,
            ):
                yield self.make([numbers[row] for row in part], [samples[row] for row in part])


def cut(
    lengths: Sequence[int], keys: Sequence[Hashable], batch_size: int, max_positions: int | None = None
) -> list[list[int]]:
    """Batches of a window: rows with the same key (picture) in sequence, groups sorted by their longest row.

    A group is kept in one batch where that leaves the batch before it at least three quarters full.

    Args:
        lengths: Positions of each row.
        keys: What rows should share a batch by; None for nothing.
        batch_size: Rows per batch at most.
        max_positions: Rows times the longest of them at most, as long as a batch has more than one row.

    Returns:
        Rows of each batch, every row once.
    """
    groups: dict[Hashable, list[int]] = {}
    for row, key in enumerate(keys):
        groups.setdefault(("alone", row) if key is None else ("key", key), []).append(row)
    batches: list[list[int]] = []
    longest = 0
    for rows in sorted(groups.values(), key=lambda rows: (max(lengths[row] for row in rows), rows[0])):
        filled = len(batches[-1]) if batches else batch_size
        apart = filled + len(rows) > batch_size >= len(rows) and 4 * filled >= 3 * batch_size
        for row in rows:
            longest = max(longest, lengths[row])
            full = not batches or len(batches[-1]) == batch_size
            if max_positions is not None and not full:
                full = (len(batches[-1]) + 1) * longest > max_positions
            if full or apart:
                batches.append([])
                longest = lengths[row]
                apart = False
            batches[-1].append(row)
    return batches


def deal(numbers: Sequence[int], rank: int, processes: int, block: int) -> list[int]:
    """The samples of one process: blocks of neighbours in turn, since neighbours often show one picture.

    Args:
        numbers: Of all samples.
        rank: Which process.
        processes: How many there are.
        block: Samples in a block; fewer where otherwise some process would have nothing.
    """
    block = max(1, min(block, len(numbers) // processes))
    starts = range(rank * block, len(numbers), processes * block)
    return [number for start in starts for number in numbers[start : start + block]]


def path_of(images: SampleImages) -> Any:
    """What of a sample's pictures can be written down: the path, or a list of paths."""
    paths = [str(source) for source in sources(images) if isinstance(source, str | os.PathLike)]
    return paths[0] if len(paths) == 1 else paths or None


def _key(images: SampleImages) -> Hashable:
    found = sources(images)
    return _name(found[0]) if found else None


def _name(source: ImageSource) -> Hashable:
    """What two mentions of one picture have in common."""
    if isinstance(source, bytes):
        return source
    return str(source) if isinstance(source, str | os.PathLike) else id(source)
