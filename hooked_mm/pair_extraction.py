"""The same samples by two models, an original and a fine-tuned one, into two stores whose rows belong together.

    PATH/original, PATH/tuned

Where the fine-tuned model is the original with an adapter, the base is loaded once, and the original is read with the
adapter switched off. Otherwise one model is loaded after the other, when the first is gone.
"""

from __future__ import annotations

import gc
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_only

from hooked_mm.adapter_switch import adapters_on, lasting, read_config
from hooked_mm.data import SampleDataModule
from hooked_mm.errors import BadInputError, StoreError, UnknownHookError
from hooked_mm.extraction import Extractor
from hooked_mm.extraction_job import extract
from hooked_mm.hooked import HookedMM
from hooked_mm.loading import OnError
from hooked_mm.reader import ModelSource
from hooked_mm.runner import match_names
from hooked_mm.selectors import Selector
from hooked_mm.small import small_adapter_path
from hooked_mm.steering_vector import last_part
from hooked_mm.store import ActivationStore
from hooked_mm.store_format import done, read_manifest
from hooked_mm.unembedding import Unembedding

logger = logging.getLogger(__name__)

Texts = Literal["original", "tuned", "own"]


@dataclass(frozen=True)
class Once(ModelSource):
    """A source that is loaded once, whoever asks for it how often."""

    loaded: list[HookedMM] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def of(cls, source: ModelSource) -> Once:
        """The same model, loaded once."""
        return source if isinstance(source, Once) else cls(**_plain(source))

    def load(self, device: torch.device | str) -> HookedMM:
        """The model; wherever it was first asked for."""
        if not self.loaded:
            self.loaded.append(super().load(device))
        return self.loaded[0]

    def words(self, device: torch.device | str) -> HookedMM | Unembedding:
        """The model itself if it is loaded already."""
        return self.loaded[0] if self.loaded else super().words(device)


def extract_pair(
    original: HookedMM | ModelSource,
    tuned: HookedMM | ModelSource,
    data: SampleDataModule,
    hooks: str | list[str],
    selector: Selector | dict[str, Selector],
    path: str | Path,
    *,
    answer: Literal["generated", "given", "none"] = "given",
    texts: Texts = "original",
    max_new_tokens: int = 40,
    answer_prefix: str | None = None,
    max_positions: int | None = None,
    share_pictures: bool = True,
    resume: bool = False,
    on_error: OnError = "skip",
    megabytes_per_shard: float = 256,
    seconds_per_shard: float = 300,
    **trainer_options: Any,
) -> tuple[ActivationStore, ActivationStore]:
    """Extract the same samples, in the same order, by two models; in a run of many processes, every one calls this.

    Args:
        original: The model before, or where to load it from.
        tuned: The model after. The same `HookedMM` as `original`, with an adapter in it, is read with the adapter off
            and on.
        data: The samples.
        hooks: As in `Extractor`, as are `selector`, `max_new_tokens`, `answer_prefix`, `max_positions`,
            `share_pictures`.
        selector: As in `Extractor`.
        path: Folder of both stores.
        answer: `"given"` by the samples, `"none"`, or `"generated"`.
        texts: Which text both read where answers are generated: what the `"original"` or the `"tuned"` model says, or
            each its `"own"`, whose rows can only be paired by word.
        max_new_tokens: As in `Extractor`.
        answer_prefix: As in `Extractor`.
        max_positions: As in `Extractor`.
        share_pictures: As in `Extractor`.
        resume: Leave what is complete there, go on with what was cut off.
        on_error: As in `extract`, as are `megabytes_per_shard`, `seconds_per_shard` and `trainer_options`.
        megabytes_per_shard: As in `extract`.
        seconds_per_shard: As in `extract`.
        trainer_options: For the `lightning.Trainer` of each (`accelerator`, `devices`, `strategy`, ...).

    Returns:
        The stores of the original and of the fine-tuned model. Samples that one of them had to skip are in its
        `skipped`; `paired_rows` finds the rows that both have.

    Raises:
        StoreError: If a store there is in the way, or was made otherwise (it names what differs).
        BadInputError: For settings that do not fit each other or the models, and as `extract`.
    """
    if answer not in ("generated", "given", "none"):
        raise BadInputError(f"answer={answer!r}; for two models it must be 'generated', 'given' or 'none'")
    if texts not in ("original", "tuned", "own"):
        raise BadInputError(f"texts={texts!r}; it must be 'original', 'tuned' or 'own'")
    if "trainer" in trainer_options:
        raise BadInputError("a Trainer can't be given, since each model is run by one of its own; give its options")
    folder = Path(path)
    sources, off = _sources(original, tuned)
    # What the other reads must be there first.
    order = ["tuned", "original"] if (answer, texts) == ("generated", "tuned") else ["original", "tuned"]
    extractors: dict[str, Extractor] = {}
    for place, name in enumerate(order):
        reads = answer == "generated" and texts != "own" and place == 1
        extractors[name] = Extractor(
            sources.pop(name),
            hooks,
            selector,
            "stored" if reads else answer,
            max_new_tokens,
            answer_prefix,
            stored=folder / order[0] if reads else None,
            max_positions=max_positions,
            share_pictures=share_pictures,
            stored_by="another" if reads else "itself",
            adapter_off=off and name == "original",
        )
    # Before anything runs, so that all processes of a run decide alike.
    for name in [name for name in order if _complete(folder / name, extractors[name], data, resume)]:
        del extractors[name]
    for name in order:
        if name in extractors:
            # With its extractor goes a model that nobody else holds, before the next one comes.
            extract(
                extractors.pop(name),
                data,
                folder / name,
                resume=resume,
                on_error=on_error,
                megabytes_per_shard=megabytes_per_shard,
                seconds_per_shard=seconds_per_shard,
                **trainer_options,
            )
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    stores = ActivationStore.open(folder / "original"), ActivationStore.open(folder / "tuned")
    _tell(*stores)
    return stores


def _sources(
    original: HookedMM | ModelSource, tuned: HookedMM | ModelSource
) -> tuple[dict[str, HookedMM | ModelSource], bool]:
    """Where each model comes from, and whether the original is the fine-tuned one with its adapter off."""
    if isinstance(original, HookedMM) and isinstance(tuned, HookedMM):
        if original is tuned:
            return {"original": original, "tuned": tuned}, bool(adapters_on(tuned.hf_model))
        shared = {id(weight) for weight in original.hf_model.parameters()}
        if any(id(weight) in shared for weight in tuned.hf_model.parameters()):
            raise BadInputError(
                "the two models share weights: PEFT has put its adapter into the original one too; give the adapted "
                "model as both, and the original is read with the adapter off"
            )
    elif isinstance(original, ModelSource) and isinstance(tuned, ModelSource) and same_base(original, tuned):
        once = Once.of(tuned)
        return {"original": once, "tuned": once}, original.adapter != tuned.adapter
    return {"original": original, "tuned": tuned}, False


def _plain(source: ModelSource) -> dict[str, Any]:
    return {f.name: getattr(source, f.name) for f in fields(ModelSource)}


def same_base(original: ModelSource, tuned: ModelSource) -> bool:
    """Whether one loaded model can be both: the same, or the fine-tuned one with its adapter on and off."""
    one, other = _plain(original), _plain(tuned)
    adapters = one.pop("adapter"), other.pop("adapter")
    if one != other or adapters[0] not in (None, adapters[1]):
        return False
    why = _traces(tuned) if adapters[0] != adapters[1] else None
    if why is not None:
        logger.warning("the base model is loaded without the adapter and with it: %s", why)
    return why is None


def _traces(source: ModelSource) -> str | None:
    """Why the adapter of a source can't be switched off without a trace."""
    assert source.adapter is not None
    if source.id.startswith("small:"):
        return lasting(read_config(small_adapter_path(source.id.removeprefix("small:"), source.adapter)))
    return lasting(read_config(source.adapter))


def _complete(folder: Path, extractor: Extractor, data: SampleDataModule, resume: bool) -> bool:
    """Whether a store is there and complete, and what this run would make."""
    if not (folder / "manifest.json").exists():
        return False
    if not resume:
        raise StoreError(f"{str(folder)!r} already holds a store; pass resume=True to go on, or choose another path")
    manifest = read_manifest(folder)
    if not manifest["complete"]:
        # Whether it can go on is seen by its writer.
        return False
    changed = _changed(manifest["made_by"], extractor, data)
    if done(folder) != set(data.ids()):
        changed.append("samples")
    if changed:
        raise StoreError(
            f"the store {str(folder)!r} is complete, but was made otherwise ({', '.join(changed)} differ); use the "
            "same settings or another path"
        )
    return True


def _changed(old: Mapping[str, Any], extractor: Extractor, data: SampleDataModule) -> list[str]:
    """What a manifest says otherwise than a run would, as far as that is known without loading a model."""
    told = {**extractor.settings(), "data": data.describe()}
    # Folders may have been moved.
    told.pop("stored")
    told = json.loads(json.dumps(told, default=str))
    changed = [name for name, value in told.items() if old.get(name) != value]
    source = extractor.source
    if isinstance(source, HookedMM):
        now = extractor.made_by()
        changed += [name for name in ("revision", "adapter", "dtype", "hooks") if old.get(name) != now[name]]
        model = now["model"]
    else:
        model = source.id
        commit = source.revision if re.fullmatch("[0-9a-f]{40}", source.revision or "") else None
        dtype = None if source.dtype == "auto" else str(source.dtype).removeprefix("torch.")
        known = {"revision": commit, "dtype": dtype}
        changed += [name for name, value in known.items() if value is not None and old.get(name) != value]
        if old.get("adapter") != (None if extractor.adapter_off else source.adapter):
            changed.append("adapter")
        try:
            if sorted(match_names(extractor.hooks, old["hooks"])) != sorted(old["hooks"]):
                changed.append("hooks")
        except UnknownHookError:
            changed.append("hooks")
    return changed + (["model"] if last_part(str(old.get("model"))) != last_part(str(model)) else [])


@rank_zero_only
def _tell(original: ActivationStore, tuned: ActivationStore) -> None:
    """How many samples both have, and how many only one."""
    one, other = (set(store.samples.column("sample").to_pylist()) for store in (original, tuned))
    print(
        f"{len(one & other)} samples by both models; {len(one - other)} by the original only, {len(other - one)} by "
        "the fine-tuned only"
    )
