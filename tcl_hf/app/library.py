"""The pictures of the app, in an index for each model that embeds. They are indexed while the app is in use."""

import copy
import logging
import os
import re
import threading
from pathlib import Path

from ..data.pairs import load_pairs
from ..data.records import DataError
from ..recipes.arguments import RecipeError
from ..search import ImageIndex, SearchError, SearchModel
from ..search.pictures import pictures_in
from ..search.storage import is_index
from .heads import Embedder, Heads

logger = logging.getLogger(__name__)

DEMO_PICTURES = "openmoji"
INDEXES = "runs/app"


class Library:
    """Pictures to search.

    An index that `tcl-hf index` has made is opened as it is. For a folder, or a source of `load_pairs`, an index for
    each model is kept below `root`; what is new in a folder is taken over at each start, in a thread, with a copy of
    the model, so that the app answers meanwhile from the pictures that are there.

    Args:
        source: a folder of pictures, an index, or a source; None for the held-out pictures of the demo.
        heads: the models.
        root: folder of the indexes that the app makes.

    Raises:
        RecipeError: if no model embeds.
        SearchError, DataError: if there are no pictures, or the index was made with another model.
    """

    def __init__(self, source: str | None, heads: Heads, root: str = INDEXES):
        if not heads.embedders:
            raise RecipeError(heads.why_absent("embed"))
        self.source, self.split = source or DEMO_PICTURES, "train" if source else "validation"
        self.is_demo = self.source == DEMO_PICTURES
        self.threads: list[threading.Thread] = []
        if is_index(self.source):
            self.indexes = [ImageIndex.open(self.source, heads.embedder.searcher)]
            return
        if os.path.isdir(self.source):
            if not pictures_in(os.path.abspath(self.source)).files:
                raise SearchError(f"{self.source} has no pictures: name a folder that has some, or an index.")
        elif not self.is_demo:
            load_pairs(self.source, self.split)  # raises a DataError for what is not there
        self.indexes = [self._open(embedder, root) for embedder in heads.embedders]

    def __len__(self) -> int:
        return len(self.indexes[0])

    @property
    def is_growing(self) -> bool:
        """Whether pictures are being indexed."""
        return any(thread.is_alive() for thread in self.threads)

    def status(self) -> str:
        """A sentence about the number of pictures."""
        number = len(self)
        more = ", and more are being indexed: search again in a moment" if self.is_growing else ""
        return f"{number:,} picture{'s' * (number != 1)}{more}."

    def wait(self) -> None:
        """Wait until all pictures are indexed."""
        for thread in self.threads:
            thread.join()

    def _open(self, embedder: Embedder, root: str) -> ImageIndex:
        weights, _ = embedder.searcher.fingerprint()
        name = re.sub(r"\W+", "_", os.path.basename(os.path.abspath(self.source)))
        place = Path(root) / f"{name}-{self.split}-{weights[:12]}"
        if is_index(str(place)):
            index = ImageIndex.open(place, embedder.searcher)
            if self.is_demo and len(index) > 0 and (place / "complete").exists():
                return index
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            index = ImageIndex.create(place, embedder.searcher)
        thread = threading.Thread(target=self._grow, args=(embedder, place), daemon=True)
        thread.start()
        self.threads.append(thread)
        return index

    def _grow(self, embedder: Embedder, place: Path) -> None:
        """Take pictures into an index, with a model of this thread's own."""
        opened = embedder.opened
        try:
            index = ImageIndex.open(place, SearchModel(copy.deepcopy(opened.model), opened.processor))
            changes = index.sync(self.source) if os.path.isdir(self.source) else index.add(self.source, self.split)
            (place / "complete").touch()
            logger.info("%s: %s", self.source, changes)
        except (SearchError, DataError, OSError) as error:
            logger.error("%s cannot be indexed: %s", self.source, error)
