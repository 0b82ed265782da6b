"""Pairs of pictures as a model sees them: clean and corrupt batches whose positions correspond one to one.

    clean      what is asked about is as the first answer says        token    the first answer's
    corrupt    the same but for that: the second answer is right      foil     the second's

Both runs are given the same words, so that every position has its partner; answers that begin alike ("(a)", "(b)") are
compared at the first token in which they differ, what comes before it standing in both prompts. Pairs whose pictures
take other positions, and those which the model does not answer right on both sides, are left out and counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from analyses.image_pairs import ImagePair
from analyses.position_groups import (
    SHARE,
    Groups,
    object_positions,
    patch_positions,
    position_groups,
    subject_positions,
)
from analyses.tail_logits import tail_logits
from analyses.targets import Targets, token_ids
from hooked_mm.batch import Batch, Modality, Role
from hooked_mm.connector import connector_map
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.prepare import load_image

Right = Literal["said", "preferred", "any"]


@dataclass(frozen=True)
class PairBatch:
    """Pairs as two batches whose positions correspond one to one.

    Attributes:
        pairs: Those that are in it.
        pictures: The clean and the corrupt picture of each, loaded.
        clean, corrupt: What the model is given.
        targets: One per pair: the row that tells the answers apart, the clean answer's token, the other's as foil.
        clean_scores, corrupt_scores: The token's logit less its foil's, in each run.
    """

    pairs: list[ImagePair]
    pictures: list[tuple[Image.Image, Image.Image]]
    clean: Batch
    corrupt: Batch
    targets: Targets
    clean_scores: Float[Tensor, " n"]
    corrupt_scores: Float[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.pairs)


@dataclass
class PairBatches:
    """Pairs as batches, and the count of those that were left out.

    Attributes:
        model: Who is asked.
        pairs: All pairs.
        size: Pairs at a time.
        right: Which pairs are kept: those whose answers the model would say (`said`), those where it prefers the right
            one of the two on both sides (`preferred`), or all (`any`).
        left_out: Reason -> ids.
    """

    model: HookedMM
    pairs: Sequence[ImagePair]
    size: int = 16
    right: Right = "said"
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.size < 1 or self.right not in ("said", "preferred", "any"):
            raise BadInputError(
                f"size={self.size}, right={self.right!r}: at least 1 at a time; 'said', 'preferred' or 'any'"
            )

    def __iter__(self) -> Iterator[PairBatch]:
        """Batches of those that are kept; each pass counts anew."""
        self.left_out.clear()
        for start in range(0, len(self.pairs), self.size):
            made = self._made(self.pairs[start : start + self.size])
            if made is not None:
                yield made

    def notes(self) -> list[str]:
        """How many pairs were left out, and why."""
        return [f"{len(ids)} pairs were left out: {why} ({', '.join(ids[:3])})" for why, ids in self.left_out.items()]

    def _made(self, pairs: Sequence[ImagePair]) -> PairBatch | None:
        shown, reasons = [], {}
        for number, pair in enumerate(pairs):
            try:
                shown.append((load_image(pair.clean), load_image(pair.corrupt)))
            except BadInputError:
                reasons[number] = "a picture can't be read"
        pairs = [pairs[number] for number in self._kept(pairs, reasons)]
        if not pairs:
            return None
        clean, corrupt, other = self._prepared(pairs, shown)
        reasons.clear()
        for number, pair in enumerate(pairs):
            if pair.answers[0].split() == pair.answers[1].split():
                reasons[number] = "both answers are the same"
            elif (why := differing(clean, corrupt, number)) is not None:
                reasons[number] = why
            elif first_difference(clean, other, number) is None:
                reasons[number] = "one answer is the beginning of the other"
        kept = self._kept(pairs, reasons)
        if not kept:
            return None
        if reasons:
            # Anew, so that what was left out does not widen the batches.
            pairs, shown = [pairs[number] for number in kept], [shown[number] for number in kept]
            clean, corrupt, other = self._prepared(pairs, shown)
        targets = pair_targets(clean, other)
        with torch.no_grad():
            logits, rows = zip(*(tail_logits(self.model, batch, targets) for batch in (clean, corrupt)), strict=True)
        scores = [own.scores(one).float().cpu() for own, one in zip(rows, logits, strict=True)]
        reasons = {number: why for number, why in enumerate(self._right(logits, rows[0])) if why}
        kept = self._kept(pairs, reasons)
        if not kept:
            return None
        own = targets.take(kept)
        return PairBatch(
            [pairs[number] for number in kept],
            [shown[number] for number in kept],
            clean.take(kept),
            corrupt.take(kept),
            Targets(torch.arange(len(kept)), own.row, own.token, own.foil),
            *(score[kept] for score in scores),
        )

    def _prepared(
        self, pairs: Sequence[ImagePair], shown: Sequence[tuple[Image.Image, Image.Image]]
    ) -> tuple[Batch, Batch, Batch]:
        """Clean and corrupt pictures with the clean answer, and corrupt ones with their own."""
        words = [pair.question for pair in pairs]
        return tuple(  # type: ignore[return-value]
            self.model.prepare([both[side] for both in shown], words, [pair.answers[said] for pair in pairs])
            for side, said in ((0, 0), (1, 0), (1, 1))
        )

    def _kept(self, pairs: Sequence[ImagePair], reasons: dict[int, str]) -> list[int]:
        for number, why in reasons.items():
            self.left_out.setdefault(why, []).append(pairs[number].id)
        return [number for number in range(len(pairs)) if number not in reasons]

    def _right(self, logits: Sequence[Tensor], targets: Targets) -> list[str]:
        """Per pair why it is not kept, empty if it is."""
        wrong = [""] * len(targets)
        assert targets.foil is not None
        both = (("clean", targets.token, targets.foil), ("corrupt", targets.foil, targets.token))
        for values, (side, token, foil) in zip(logits, both, strict=True):
            rows = values[targets.sample, targets.row].cpu()
            preferred = rows.gather(1, token[:, None]) > rows.gather(1, foil[:, None])
            fine = rows.argmax(-1) == token if self.right == "said" else preferred[:, 0]
            for number in (~fine).nonzero()[:, 0].tolist():
                if self.right != "any":
                    wrong[number] = wrong[number] or f"the model does not answer the {side} picture right"
        return wrong


def pair_targets(clean: Batch, other: Batch) -> Targets:
    """Where the answers of two batches of the same prompts first differ: row, token of the one, foil of the other.

    Raises:
        BadInputError: If the answers of a sample do not differ.
    """
    found = []
    for sample in range(len(clean)):
        place = first_difference(clean, other, sample)
        if place is None:
            raise BadInputError("one answer is the beginning of the other, so no token tells them apart", sample)
        found.append((sample, *place))
    sample_, row, token, foil = torch.tensor(found).T
    return Targets(sample_, row, token, foil)


def first_difference(one: Batch, other: Batch, sample: int) -> tuple[int, int, int] | None:
    """The row before the first differing token of two answers to one prompt, in `one`, and both tokens; None if none.

    Only answers are compared: an answer that ends where the other goes on has no token there to hold against it.
    """
    (places, mine), (_, theirs) = _answer(one, sample), _answer(other, sample)
    differing = [number for number, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b]
    if not differing:
        return None
    text = one.decoder or one
    before = (text.modality[sample] != Modality.PAD).nonzero()[:, 0]
    place = places[differing[0]]
    return int(before[before < place][-1]), mine[differing[0]], theirs[differing[0]]


def _answer(batch: Batch, sample: int) -> tuple[list[int], list[int]]:
    """Positions and ids of a sample's answer."""
    text = batch.decoder or batch
    places = (text.role[sample] == Role.ANSWER).nonzero()[:, 0]
    return places.tolist(), token_ids(text)[sample, places].tolist()


def differing(clean: Batch, corrupt: Batch, sample: int) -> str | None:
    """Why the positions of a sample's two runs do not correspond; None if they do."""
    sides = []
    for batch in (clean, corrupt):
        text = batch.decoder or batch
        real = batch.modality[sample] != Modality.PAD
        images = (batch.layout.image_sample == sample).nonzero()[:, 0].tolist()
        grids = [
            tuple(None if value is None else tuple(value.shape) for value in vars(batch.layout.images[image]).values())
            for image in images
        ]
        kinds = batch.modality[sample][real].tolist()
        sides.append((kinds, grids, token_ids(text)[sample][text.modality[sample] != Modality.PAD].tolist()))
    if sides[0][:2] != sides[1][:2]:
        return "the pictures are cut into other patches"
    return None if sides[0] == sides[1] else "the prompts are not the same tokens"


def pair_groups(model: HookedMM, pairs: PairBatch, share: float = SHARE) -> Groups:
    """The groups of positions of pairs, the same in both runs: `object` is where the pictures differ.

    A resampler's latents are the object's by what they take from its patches in the clean picture. Of an
    encoder-decoder, whose question and picture are the encoder's, only the decoder's positions are grouped.

    Args:
        model: Who is asked.
        pairs: Where one has no mask, the image stays one group.
        share: A patch is the object's if the mask covers more than this share of it.
    """
    if pairs.clean.decoder is not None:
        return position_groups(pairs.clean, pairs.targets.row)
    masks = [pair.mask for pair in pairs.pairs]
    layout, objects = pairs.clean.layout, None
    if layout.kind not in ("none", "cross", "runs") and all(mask is not None for mask in masks):
        shown = [clean for clean, _ in pairs.pictures]
        connector = connector_map(model, pairs.clean) if layout.kind == "resampled" else None
        objects = object_positions(model, pairs.clean, shown, masks, share, connector)
    subjects = subject_positions(pairs.clean, model.tokenizer, [pair.subject for pair in pairs.pairs])
    return position_groups(pairs.clean, pairs.targets.row, objects=objects, subjects=subjects)


def pair_patches(model: HookedMM, pairs: PairBatch, share: float = SHARE) -> Groups:
    """The same of the tower's patches, as masks over its rows: `object` and `other patches`, or `image` without masks.

    Args:
        model: Who is asked.
        pairs: As in `pair_groups`.
        share: As in `pair_groups`.

    Raises:
        BadInputError: If the model has no tower, or it is not known which patch is where.
    """
    point = next((name for name in model.hook_names if name.startswith("vision.blocks.0.hook_resid")), None)
    if point is None:
        raise BadInputError(f"this {model.cfg.family} model has no blocks of a vision tower; group positions instead")
    with torch.no_grad():
        _, cache = model.run_with_cache(pairs.clean, point, stop_at_layer=0)
    shape, masks = cache[point].shape, [pair.mask for pair in pairs.pairs]
    sheet = pairs.clean.layout.sheet(cache[point]).shape[:2]
    image = pairs.clean.layout.owners(sheet[0], sheet[1]) >= 0
    if any(mask is None for mask in masks):
        return {"image": image}
    objects = patch_positions(model, pairs.clean, [clean for clean, _ in pairs.pictures], masks, shape, share)
    objects = objects.to(image.device)
    return {"object": image & objects, "other patches": image & ~objects}
