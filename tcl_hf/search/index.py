"""`ImageIndex`: pictures on disk that are found by text, by picture or by both."""

import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..data.images import IMAGE_ERRORS
from ..data.pairs import load_pairs
from ..data.sources import is_remote
from ..models.modeling_tcl import MATCHES
from ..models.processing_tcl import TCLProcessor
from .encoding import Row, tensor_of
from .indexing import Changes, Indexing
from .pictures import is_picture_folder
from .ranking import EncodedText, SearchModel, read_pixels, read_rgb
from .storage import FACTS, About, SearchError, Storage, approximate, plain_errors, quoted

logger = logging.getLogger(__name__)

MAX_STATES_BYTES = 4 * 2**30


@dataclass
class Hit:
    """A picture that was found.

    Args:
        image_id: its key: the path of a file, or the hash of a picture that came as bytes.
        score: what hits are ordered by: the similarity, or after re-ranking the score of `SearchModel.scores`.
        similarity: cosine of the features of query and picture.
        matching: probability that text and picture match; None without re-ranking.
        path: the file; None for a picture that came as bytes.
        name, source, caption: what its source says of it.
        width, height: pixels of the picture.
        thumbnail: a JPEG whose longer side is that of the pictures that the model reads.
        is_missing: whether the file is there no longer.
    """

    image_id: str
    score: float
    similarity: float
    matching: float | None
    path: str | None
    name: str
    source: str
    caption: str | None
    width: int
    height: int
    thumbnail: bytes = field(repr=False)
    is_missing: bool = False
    _content: Callable[[], bytes | None] = field(default=lambda: None, repr=False)

    def image(self) -> Image.Image:
        """The picture, decoded and in RGB; its thumbnail if the file is there no longer, or is damaged."""
        try:
            content = self._content() if self.path is None else self.path
            return read_rgb(content)
        except IMAGE_ERRORS:
            return read_rgb(self.thumbnail)


@dataclass
class IndexStats:
    """Facts of an index.

    Args:
        rows: number of pictures.
        search: "exact", or "approximate" with an index of the vectors.
        bytes: bytes on disk; None at an address.
        with_states: pictures whose states are kept, which re-ranking need not encode.
        model: folder or name of the model.
        dim: dimensions of a vector.
        sources: pictures of each source.
    """

    rows: int
    search: str
    bytes: int | None
    with_states: int
    model: str
    dim: int
    sources: dict[str, int]


class ImageIndex:
    """Pictures with their features in a database on disk, see `create`, `open`, `add`, `sync` and `search`.

    Args:
        storage: the database.
        model: the model, or None to open the one that the index names when it is needed first.
        device: device of a model that is opened.
    """

    def __init__(self, storage: Storage, model: SearchModel | None, device: torch.device | str | None = None):
        self._storage, self._model, self._device = storage, model, device
        self.uri, self.about = storage.uri, storage.about

    @classmethod
    def create(
        cls,
        path: str | os.PathLike,
        model: Any,
        processor: TCLProcessor | None = None,
        *,
        device: torch.device | str | None = None,
        max_states_bytes: int = MAX_STATES_BYTES,
    ) -> "ImageIndex":
        """Make an empty index.

        Args:
            path: a folder that is not there or has no index, or an address such as `s3://bucket/index`.
            model: a folder, a name on the Hub, a loaded model, or a `SearchModel`.
            processor: that of a loaded model.
            device: device to compute on.
            max_states_bytes: bytes of states of images to keep at most, so that re-ranking need not encode them again;
                of further pictures none are kept.

        Raises:
            SearchError: if there is an index already, or the model cannot be searched with.
        """
        searcher = model if isinstance(model, SearchModel) else SearchModel(model, processor, device)
        weights, pixels = searcher.fingerprint()
        size = searcher.processor.image_processor.size
        blank = torch.zeros(1, 3, int(size["height"]), int(size["width"]))
        states, features = searcher.encode_images(blank)
        shape = (states.shape[1], states.shape[2])
        dtype = str(states.dtype).removeprefix("torch.")
        about = About(searcher.name, weights, pixels, features.shape[-1], shape, dtype, max_states_bytes)
        return cls(Storage.create(_place(path), about), searcher)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike,
        model: Any = None,
        processor: TCLProcessor | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> "ImageIndex":
        """Open an index.

        Args:
            path: its folder or address.
            model: as for `create`; None for the one that the index names, which is opened when it is needed first.
            processor: that of a loaded model.
            device: device to compute on.

        Raises:
            SearchError: if there is no index, it is of another version, or its vectors are those of another model.
        """
        storage = Storage.open(_place(path))
        if model is None:
            return cls(storage, None, device)
        searcher = model if isinstance(model, SearchModel) else SearchModel(model, processor, device)
        _check_model(storage, searcher)
        return cls(storage, searcher)

    @property
    def model(self) -> SearchModel:
        """The model, which is opened when it is needed first.

        Raises:
            SearchError: if the index names none, or its weights have changed since.
        """
        if self._model is None:
            if not self.about.model:
                raise SearchError(f"{self.uri} was made with a model that had no name: give the model to open it with.")
            searcher = SearchModel(self.about.model, device=self._device)
            _check_model(self._storage, searcher)
            self._model = searcher
        return self._model

    def __len__(self) -> int:
        return self._storage.table.count_rows()

    def add(
        self,
        source: Any,
        split: str = "train",
        *,
        batch_size: int = 32,
        num_workers: int | None = None,
        progress: bool = True,
        **options: Any,
    ) -> Changes:
        """Add the pictures of a source that are not in the index. One that is there is not read again.

        Args:
            source: a folder of pictures, a source of `load_pairs`, or an iterable of images (paths, bytes, PIL images,
                arrays, or records with `image`, `captions` and `image_id`).
            split, options: as for `load_pairs`.
            batch_size: images in a forward.
            num_workers: threads that decode; as many as cores, up to 8, if None.
            progress: show a progress bar.

        Raises:
            SearchError: if another process writes, or the disk is full.
            DataError: if the source cannot be loaded.
        """
        run = Indexing(self._storage, self, batch_size, num_workers, progress)
        if isinstance(source, str | os.PathLike) and is_picture_folder(source):
            return run.sync(os.path.abspath(source), deletes=False)
        if isinstance(source, str | os.PathLike):
            records: Any = load_pairs(os.fspath(source), split, **options)
            return run.add(records, os.fspath(source), _length(records))
        return run.add(source, "", _length(source))

    def sync(
        self,
        folder: str | os.PathLike,
        *,
        batch_size: int = 32,
        num_workers: int | None = None,
        progress: bool = True,
    ) -> Changes:
        """Make the index equal to the picture files in a folder: new, changed, moved and deleted ones.

        A file of the same size and time of change is not read. Another one is hashed, and encoded only if its content
        is not in the index. Files that cannot be read are skipped, and listed in `skipped.jsonl` of the index.

        Args:
            folder: the folder; pictures in the index from elsewhere stay.
            batch_size, num_workers, progress: as for `add`.

        Raises:
            SearchError: if the folder has no pictures, another process writes, or the disk is full.
        """
        return Indexing(self._storage, self, batch_size, num_workers, progress).sync(
            os.path.abspath(folder), deletes=True
        )

    def remove(
        self,
        image_ids: Iterable[str] | None = None,
        *,
        folder: str | os.PathLike | None = None,
        where: str | None = None,
    ) -> int:
        """Remove pictures from the index, by their ids, by folder, or by a filter; return how many.

        Raises:
            SearchError: if nothing says which, the filter is wrong, or another process writes.
        """
        conditions = []
        if image_ids is not None:
            ids = [image_ids] if isinstance(image_ids, str) else list(image_ids)
            conditions.append(f"image_id IN ({', '.join(map(quoted, ids))})" if ids else "FALSE")
        if folder is not None:
            conditions.append(below(os.path.abspath(folder)))
        if where is not None:
            self._check_filter(where)
            conditions.append(f"({where})")
        if not conditions:
            raise SearchError("remove() needs image_ids, a folder or a filter, which say what to remove.")
        condition = " AND ".join(conditions)
        with self._storage.writing():
            self._storage.refresh()
            number = self._storage.table.count_rows(condition)
            self._storage.table.delete(condition)
            self._storage.tidy(number)
        return number

    def stats(self) -> IndexStats:
        """Facts of the index."""
        with plain_errors(self.uri):
            sources: dict[str, int] = {}
            for source in self._storage.rows(["source"])["source"].to_pylist():
                sources[source] = sources.get(source, 0) + 1
            files = [] if is_remote(self.uri) else [path for path in Path(self.uri).rglob("*") if path.is_file()]
            return IndexStats(
                rows=len(self),
                search="approximate" if self._storage.is_approximate() else "exact",
                bytes=None if is_remote(self.uri) else sum(path.stat().st_size for path in files),
                with_states=self._storage.number_of_states(),
                model=self.about.model,
                dim=self.about.dim,
                sources=sources,
            )

    def search(
        self,
        text: str | EncodedText | None = None,
        image: Any = None,
        k: int = 10,
        rerank: int | None = 32,
        where: str | None = None,
    ) -> list[Hit]:
        """The pictures that fit a text, a picture, or both, best first.

        Candidates come by similarity. With a text and a model that matches, `max(k, rerank)` of them are ranked anew by
        `SearchModel.scores`. A query of both compares with the sum of both features, and is ranked anew by its text.

        Args:
            text: what the pictures show; also as `SearchModel.encode_texts` returns it, for several queries at once.
            image: a picture that they resemble: a path, bytes, or a PIL image.
            k: number of hits; all pictures if the index has fewer.
            rerank: number of candidates to rank anew; 0 or None for similarity alone.
            where: a filter in SQL over the columns `FACTS`, such as `caption LIKE '%dog%' AND width > 500`.

        Raises:
            SearchError: if there is no query, it cannot be read, or the filter is wrong.
        """
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise SearchError(f"k must be a whole number of at least 1, got {k!r}.")
        vector, encoded = self._query(text, image)
        reranks = bool(rerank) and encoded is not None and self.model.can_match
        if where is not None:
            self._check_filter(where)
        number = max(k, rerank or 0) if reranks else k
        rows = self._candidates(vector, number, where, with_states=reranks)
        if not rows:
            return []
        similarity = torch.stack([torch.tensor(row["vector"]) for row in rows]) @ vector.cpu()
        scores, matching = similarity, None
        if reranks:
            assert encoded is not None
            logits = self.model.matching_logits(encoded, self._states_of(rows)).cpu()
            scores, matching = self.model.scores(similarity, logits), logits.softmax(-1)[:, MATCHES]
        order = scores.argsort(descending=True, stable=True).tolist()[:k]
        return [
            self._hit(rows[row], scores[row], similarity[row], None if matching is None else matching[row])
            for row in order
        ]

    def _query(self, text: str | EncodedText | None, image: Any) -> tuple[Tensor, EncodedText | None]:
        """The vector (D,) to compare with, and the text after its encoder."""
        if text is None and image is None:
            raise SearchError("The query is empty: give a text, a picture, or both.")
        encoded, parts = None, []
        if text is not None:
            encoded = self.model.encode_text(text) if not isinstance(text, EncodedText) else text
            parts.append(encoded.features)
        if image is not None:
            parts.append(self.model.encode_images(read_pixels(self.model, [image]))[1][0])
        return F.normalize(torch.stack(parts).sum(0), dim=0) if len(parts) > 1 else parts[0], encoded

    def _candidates(self, vector: Tensor, number: int, where: str | None, with_states: bool) -> list[Row]:
        """The rows that are most similar to a vector."""
        columns = [*FACTS, "thumbnail", "vector", *(["states"] if with_states else [])]
        with plain_errors(self.uri):
            query: Any = self._storage.table.search(vector.cpu().numpy(), vector_column_name="vector")
            query = approximate(query.distance_type("cosine")).select([*columns, "_distance"]).limit(number)
            if where is not None:
                query = query.where(where, prefilter=True)
            return query.to_list()

    def _check_filter(self, where: str) -> None:
        """Refuse a filter that the database does not understand."""
        try:
            self._storage.table.search().where(where).select(["image_id"]).limit(1).to_arrow()
        except (ValueError, RuntimeError, OSError) as error:
            reason = " ".join(str(error).split())
            raise SearchError(
                f"where={where!r} cannot be used: {reason[:200]}. The columns are {', '.join(FACTS)}, and texts stand "
                "in single quotes."
            ) from error

    def _states_of(self, rows: list[Row]) -> Tensor:
        """States (N, 1 + P, width) of rows: those that are kept, and of other pictures new ones, made in one batch."""
        dtype, shape = getattr(torch, self.about.states_dtype), self.about.states
        states: list[Tensor | None] = [row["states"] and tensor_of(row["states"], dtype, shape) for row in rows]
        missing = [place for place, one in enumerate(states) if one is None]
        if missing:
            pixels = read_pixels(self.model, [self._picture_of(rows[place]) for place in missing])
            encoded, _ = self.model.encode_images(pixels)
            for place, one in zip(missing, encoded.to("cpu", dtype), strict=True):
                states[place] = one
        return torch.stack([one for one in states if one is not None])

    def _picture_of(self, row: Row) -> Any:
        """The picture of a row as it was indexed: its file if that is unchanged, its bytes, or else its thumbnail."""
        if row["path"] is None:
            return self._bytes_of(row["image_id"]) or row["thumbnail"]
        try:
            status = os.stat(row["path"])
            if (status.st_size, status.st_mtime_ns) == (row["size"], row["modified"]):
                return row["path"]
        except OSError:
            pass
        logger.warning("%s was changed or deleted since it was indexed: its thumbnail is ranked.", row["path"])
        return row["thumbnail"]

    def _bytes_of(self, image_id: str) -> bytes | None:
        """The bytes of a picture that came as bytes."""
        rows = self._storage.rows(["bytes"], f"image_id = {quoted(image_id)}", 1)
        return rows["bytes"][0].as_py() if len(rows) else None

    def _hit(self, row: Row, score: Tensor, similarity: Tensor, matching: Tensor | None) -> Hit:
        names = ("image_id", "path", "name", "source", "caption", "width", "height", "thumbnail")
        return Hit(
            **{name: row[name] for name in names},
            score=float(score),
            similarity=float(similarity),
            matching=None if matching is None else float(matching),
            is_missing=row["path"] is not None and not os.path.exists(row["path"]),
            _content=partial(self._bytes_of, row["image_id"]),
        )


def _place(path: str | os.PathLike) -> str:
    """The address of an index, or the absolute path of its folder."""
    place = os.fspath(path)
    return place if is_remote(place) else os.path.abspath(os.path.expanduser(place))


def _length(source: Any) -> int | None:
    try:
        return len(source)
    except TypeError:
        return None


def below(folder: str) -> str:
    """The filter for files in a folder and the folders in it."""
    return f"starts_with(path, {quoted(folder.rstrip(os.sep) + os.sep)})"


def _check_model(storage: Storage, searcher: SearchModel) -> None:
    """Refuse the vectors of another model.

    Raises:
        SearchError: if they are.
    """
    weights, pixels = searcher.fingerprint()
    made_with, given = storage.about.model or "a model without a name", searcher.name or "the model given"
    if weights != storage.about.weights:
        raise SearchError(
            f"{storage.uri} holds vectors of other weights: it was made with {made_with}, not with {given}. "
            "Open it with the model that it was made with, or index the pictures again into another folder."
        )
    if pixels != storage.about.pixels:
        raise SearchError(
            f"{storage.uri} was made of pictures with {storage.about.pixels}, and {given} reads {pixels}: open it with "
            "the processor that it was made with, or index the pictures again into another folder."
        )
