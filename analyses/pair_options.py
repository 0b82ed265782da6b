"""Options of commands that run on pairs of pictures: where the pairs come from, and which of them count."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser

from analyses.image_pairs import ImagePair, mmvp_pairs, own_pair, scene_pairs
from analyses.pair_batches import PairBatches, Right
from analyses.position_groups import SHARE
from hooked_mm.datasets.mmvp import Mmvp
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.reader import ModelSource

Attribute = Literal["colour", "shape", "size", "position", "place", "count"]
OWN = ("clean", "corrupt", "question", "clean_answer", "corrupt_answer")
"""Options of a pair of one's own pictures."""


def add_pairs(parser: ArgumentParser) -> None:
    """Options for a model and pairs of pictures: scenes, MMVP, or two pictures of one's own.

    Args:
        parser: Of the command.
    """
    parser.add_argument("--model", type=ModelSource, required=True, help="the model to look into")
    pairs = parser.add_argument_group("pairs: scenes, MMVP, or two pictures")
    pairs.add_argument("--attribute", type=Attribute | None, help="scenes that differ in this alone")
    pairs.add_argument("--size", type=int, default=32, help="pairs of scenes")
    pairs.add_argument("--split", type=str, default="test", help="of the scenes")
    pairs.add_argument("--objects", type=int | None, help="only scenes with so many objects")
    pairs.add_argument("--mmvp", type=Path | None, help="the folder of MMVP, whose pairs are taken")
    pairs.add_argument("--clean", type=Path | None, help="a picture, of which the first answer is right")
    pairs.add_argument("--corrupt", type=Path | None, help="another, of which the second is right")
    pairs.add_argument("--question", type=str | None, help="asked of both")
    # Two options, as a list of `yes` and `no` would be read as true and false.
    pairs.add_argument("--clean_answer", type=str | None, help="right of the first picture")
    pairs.add_argument("--corrupt_answer", type=str | None, help="right of the second picture")
    pairs.add_argument("--right", type=Right, default="said", help="keep pairs that are answered right; preferred; any")
    pairs.add_argument("--share", type=float, default=SHARE, help="of a patch an object covers more to be its own")
    parser.add_argument("--batch_size", type=int, default=16, help="pairs at a time")
    parser.add_argument("--layers", type=list[int] | None, help="only these; all unless given")
    parser.add_argument("--device", type=str, default="cpu", help="where the model runs: cuda, cuda:1, ...")
    parser.add_argument("--name", type=str | None, help="what to call the model in tables and plots")
    parser.add_argument("--draws", type=int, default=1000, help="of the bootstrap, over pairs")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes and the bootstrap")


def pairs_of(made: Any) -> tuple[list[ImagePair], list[str]]:
    """The pairs that the options name, and what a reader must know of them.

    Raises:
        BadInputError: If none or several sources are named, or the two pictures lack a question or answers.
    """
    own = [made[name] for name in OWN]
    given = [made.attribute is not None, made.mmvp is not None, any(item is not None for item in own)]
    if sum(given) != 1:
        raise BadInputError(
            f"give one of --attribute (scenes), --mmvp (its folder), or two pictures: --{', --'.join(OWN)}"
        )
    if made.attribute is not None:
        return scene_pairs(made.attribute, made.size, made.split, made.seed, objects=made.objects), []
    if made.mmvp is not None:
        data = Mmvp(made.mmvp).dataset
        return mmvp_pairs([data[number] for number in range(len(data))])  # type: ignore[arg-type]
    if missing := [name for name, item in zip(OWN, own, strict=True) if item is None]:
        raise BadInputError(f"a pair of pictures needs {', '.join(f'--{name}' for name in missing)}, too")
    return [own_pair(made.clean, made.corrupt, made.question, (made.clean_answer, made.corrupt_answer))], []


def batches_of(made: Any, model: HookedMM) -> tuple[PairBatches, list[str]]:
    """Those pairs as batches for the model, and notes."""
    pairs, notes = pairs_of(made)
    return PairBatches(model, pairs, made.batch_size, made.right), notes


def settings_of(made: Any, *more: str) -> dict[str, Any]:
    """What a result says it was made with."""
    names = ("attribute", "size", "split", "objects", "mmvp", *OWN)
    values = {name: made[name] for name in (*names, "right", "share", "layers", "draws", "seed", *more)}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def refuse_none(kept: int, batches: PairBatches, notes: list[str]) -> None:
    """Refuse to go on without pairs, with the reasons.

    Raises:
        BadInputError: If none is left.
    """
    if not kept:
        why = "; ".join([*notes, *batches.notes()]) or "there are none"
        raise BadInputError(f"no pair is left ({why}); take more, others, or --right any")


def rounded(model: HookedMM) -> list[str]:
    """What a reader of small differences of logits must know of the model's dtype."""
    if model.dtype not in (torch.float16, torch.bfloat16):
        return []
    return ["logits are rounded to half precision; --model.dtype float32 tells smaller effects apart"]
