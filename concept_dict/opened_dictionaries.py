"""Dictionaries of folders that the one who starts the explorer opened, with the samples they were learnt on.

A folder holds a dictionary, or dictionaries in folders of its own, as `hooked-mm learn` and `demo` leave them.
The samples are those of the activation store beside the dictionary, if there is one (`activations`, as of the demo), or
of a store in a folder that was opened too and holds the dictionary's hook of the same model. Folders are looked at when
the page starts, and read when the first visitor looks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from concept_dict.dictionary import FILE, ConceptDictionary, dictionary_folders
from concept_dict.grounding import top_samples
from concept_dict.on_the_spot import Shown
from concept_dict.pictures import store_pictures
from concept_dict.report import Pooled, pool_store
from concept_dict.row_choice import learnt_where
from hooked_mm.errors import BadInputError, HookedMMError
from hooked_mm.steering_vector import last_part
from hooked_mm.store import ActivationStore

STORE = "manifest.json"
BESIDE = "activations"
"""Where a store lies beside its dictionary."""


def is_store(folder: Path) -> bool:
    """Whether a folder holds an activation store."""
    return (folder / STORE).is_file()


class OpenedDictionary:
    """A dictionary of a folder, and its samples; each read once, when first wanted.

    Args:
        folder: Of the dictionary.
        stores: Folders of stores that were opened too.
    """

    def __init__(self, folder: Path, stores: Sequence[Path] = ()) -> None:
        self.folder, self._stores = folder, [folder.parent / BESIDE, *stores]
        self.label = f"{folder.parent.name}/{folder.name}".removeprefix("/")
        self._dictionary: ConceptDictionary | None = None
        self._samples: Samples | None = None
        self._looked = False

    @property
    def dictionary(self) -> ConceptDictionary:
        """It.

        Raises:
            BadInputError: If it can't be read.
        """
        if self._dictionary is None:
            self._dictionary = ConceptDictionary.load(self.folder)
        return self._dictionary

    @property
    def samples(self) -> Samples | None:
        """The samples it was learnt on, or others of its model and hook; None where there are none."""
        if not self._looked:
            self._looked = True
            for folder in self._stores:
                if is_store(folder) and (store := _fitting(folder, self.dictionary)) is not None:
                    self._samples = Samples(folder, store, pool_store(self.dictionary, store))
                    break
        return self._samples


def _fitting(folder: Path, dictionary: ConceptDictionary) -> ActivationStore | None:
    """The store's rows as the dictionary's were chosen, if it is one of its hook and its model."""
    try:
        store = ActivationStore.open(folder)
        owner, own = store.made_by.get("model"), dictionary.made_by.get("model")
        if dictionary.hook not in store.hooks or (owner and own and last_part(str(owner)) != last_part(str(own))):
            return None
        return store.where(**learnt_where(dictionary.made_by))
    except HookedMMError:
        # A store of others, of which nothing was promised.
        return None


class Samples:
    """Samples of a store and how a dictionary's concepts fire for them.

    Args:
        folder: Of the store.
        store: The rows that were looked at.
        pooled: Activations by sample.
    """

    def __init__(self, folder: Path, store: ActivationStore, pooled: Pooled) -> None:
        self.folder, self.store, self.pooled = folder, store, pooled

    def strongest(self, concept: int, count: int = 6, sign: int = 1) -> list[Shown]:
        """Those that activate a concept most, strongest first; only such whose picture can be had.

        Args:
            concept: Which.
            count: How many at most.
            sign: -1 for the other end of a signed concept.
        """
        values = self.pooled.high if sign > 0 else -self.pooled.low
        pictures, _ = store_pictures(self.store)
        if pictures is None:
            return []
        columns = self.store.samples.column_names
        names = [name for name in ("text", "answer", "sample") if name in columns]
        found = []
        for number in top_samples(values[:, [concept]], count)[0]:
            try:
                images = pictures(number)
            except BadInputError:
                continue
            told = [self.store.samples.column(name)[number].as_py() for name in names]
            if images:
                text = next((str(one) for one in told if one), "")
                found.append(Shown(number, sign * float(values[number, concept]), images[0], text))
        return found


def open_dictionaries(folders: Sequence[Path]) -> list[OpenedDictionary]:
    """Dictionaries of folders, in order; nothing of them is read.

    Raises:
        BadInputError: If a folder holds neither a dictionary nor a store.
    """
    stores = [folder for folder in folders if is_store(folder)]
    found = []
    for folder in folders:
        places = dictionary_folders(folder)
        if not places and folder not in stores:
            raise BadInputError(
                f"{str(folder)!r} holds neither a concept dictionary ({FILE}.json) nor an activation store ({STORE}); "
                "open what `hooked-mm learn` or `hooked-mm demo` has written"
            )
        found += [OpenedDictionary(place, stores) for place in places]
    return found
