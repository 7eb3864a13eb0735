"""How pictures come into an index: what is new, moved or gone, encoded by one process or several, written by one."""

import logging
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any, Protocol

import pyarrow as pa
import torch
import torch.distributed as dist
from tqdm.auto import tqdm

from ..data.records import DataError
from ..data.skipped import SkippedSamples
from ..data.sources import is_remote
from ..models.distributed import is_distributed
from .encoding import AHEAD, Committer, Decoded, any_left, decode, encode_rows, facts_of, gathered, in_threads
from .pictures import Folder, Picture, captions_beside, file_picture, pictures_in, pictures_of
from .ranking import NUM_READERS, SearchModel
from .storage import About, SearchError, Storage, plain_errors, quoted, schema_of

logger = logging.getLogger(__name__)

SKIPPED = "skipped.jsonl"
_KEYS = ("image_id", "path", "size", "modified", "hash", "caption")
_NAMED = 5  # skipped pictures in a warning
_KNOWN = 256  # pictures of known content in a batch


@dataclass
class Changes:
    """The number of pictures that an index has taken, by what became of them."""

    new: int = 0
    changed: int = 0
    moved: int = 0
    deleted: int = 0
    unchanged: int = 0
    skipped: int = 0

    def __str__(self) -> str:
        return ", ".join(f"{number:,} {name}" for name, number in vars(self).items() if number or name == "new")


@dataclass
class Known:
    """A row of the index before the run."""

    path: str | None
    size: int
    modified: int
    hash: str
    caption: str | None


class HasModel(Protocol):
    """Opens its model when it is asked for it first."""

    @property
    def model(self) -> SearchModel:
        """The model."""


class Indexing:
    """One addition to an index, by one process or several.

    Args:
        storage: the database.
        owner: has the model, which is not opened if nothing has to be encoded.
        batch_size, num_workers, progress: as for `ImageIndex.add`.
    """

    def __init__(self, storage: Storage, owner: HasModel, batch_size: int, num_workers: int | None, progress: bool):
        if batch_size < 1:
            raise SearchError(f"batch_size must be at least 1, got {batch_size}.")
        self.storage, self.owner = storage, owner
        self.batch_size, self.num_workers = batch_size, num_workers or NUM_READERS
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)
        self.progress = progress and self.rank == 0
        self.changes = Changes()
        self.reasons: list[tuple[str, str]] = []
        self.old: dict[str, Known] = {}  # the rows before the run, by id
        self.ids_of: dict[str, list[str]] = {}  # their ids by content
        self.gone: set[str] = set()  # ids of files that are there no longer
        self.written: set[str] = set()

    @property
    def about(self) -> About:
        """The facts that the index holds about itself."""
        return self.storage.about

    def sync(self, folder: str, deletes: bool) -> Changes:
        """Take the files of a folder, see `ImageIndex.sync`.

        Args:
            deletes: remove files from the index that are there no longer.
        """
        with self._as_writer():
            found = pictures_in(folder, without=self.storage.uri)
            self._check_any(folder, found)
            captions = _captions(folder)
            self.gone = self._gone(folder, found) if deletes else set()
            todo = [path for path, facts in found.files.items() if not self._is_unchanged(path, facts, captions)]
            self.changes.unchanged = len(found.files) - len(todo)
            if self.rank == 0:
                self.reasons += found.unreadable.items()
            mine = todo[self.rank :: self.world_size]
            self._encode(self._files(mine, folder, captions), len(todo))
            if self.rank == 0 and self.gone:
                self.storage.delete(sorted(self.gone))
            self.changes.deleted = len(self.gone) - self.changes.moved
            return self._end()

    def add(self, source: Any, name: str, total: int | None) -> Changes:
        """Take images or records, see `ImageIndex.add`.

        Args:
            name: what rows call the source.
            total: number of images, if it is known.
        """
        with self._as_writer():
            mine = islice(source, self.rank, None, self.world_size)
            self._encode(self._new(pictures_of(mine, name)), total)
            self.changes.unchanged = sum(gathered([self.changes.unchanged]))
            return self._end()

    # The rows before the run, and what differs from them

    @contextmanager
    def _as_writer(self) -> Iterator[None]:
        """The first process writes, and every process reads what is there before it does."""
        with self._alone():
            self.storage.refresh()  # in every process
            rows = self.storage.rows(_KEYS)
            columns = [rows[name].to_pylist() for name in _KEYS]
            self.old = {image_id: Known(*facts) for image_id, *facts in zip(*columns, strict=True)}
            for image_id, known in self.old.items():
                self.ids_of.setdefault(known.hash, []).append(image_id)
            if is_distributed():
                dist.barrier()
            yield

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the lock in the first process; all processes stop if it is another's."""
        if not is_distributed():
            with self.storage.writing():
                yield
            return
        refused: list[SearchError | None] = [None]
        lock = self.storage.writing()
        if self.rank == 0:
            try:
                lock.__enter__()
            except SearchError as error:
                refused = [error]
        dist.broadcast_object_list(refused)
        if refused[0] is not None:
            raise refused[0]
        try:
            yield
        finally:
            if self.rank == 0:
                lock.__exit__(None, None, None)

    def _check_any(self, folder: str, found: Folder) -> None:
        """Refuse a folder without pictures, which may be a disk that is not mounted."""
        if not found.files and not any(map(os.path.isdir, found.unreadable)):
            raise SearchError(
                f"{folder} holds no pictures: name the folder that they are in. (Pictures of it that are in the index "
                "stay there; `ImageIndex.remove(folder=...)` removes them.)"
            )

    def _gone(self, folder: str, found: Folder) -> set[str]:
        """The ids of files that were in a folder, and are there no longer."""
        start = folder.rstrip(os.sep) + os.sep
        hidden = tuple(place.rstrip(os.sep) + os.sep for place in found.unreadable)  # They may still be there.
        return {
            image_id
            for image_id, known in self.old.items()
            if known.path
            and known.path.startswith(start)
            and known.path not in found.files
            and not known.path.startswith(hidden)
        }

    def _is_unchanged(self, path: str, facts: tuple[int, int], captions: dict[str, str]) -> bool:
        old = self.old.get(path)
        return old is not None and (old.size, old.modified) == facts and captions.get(path, old.caption) == old.caption

    def _files(self, paths: list[str], folder: str, captions: dict[str, str]) -> Iterator[Picture]:
        for path in paths:
            try:
                yield file_picture(path, folder, captions.get(path), os.path.relpath(path, folder))
            except OSError as error:
                self.reasons.append((path, error.strerror or str(error)))

    def _new(self, pictures: Iterable[Picture | tuple[str, str]]) -> Iterator[Picture]:
        """The pictures that are not in the index; those that cannot be used are noted."""
        for picture in pictures:
            if not isinstance(picture, Picture):
                self.reasons.append(picture)
                continue
            old = self.old.get(picture.image_id)
            if old is not None and (old.size, old.modified) == (picture.size, picture.modified):
                self.changes.unchanged += 1
            else:
                yield picture

    # Decoding, encoding, writing

    def _encode(self, pictures: Iterator[Picture], total: int | None) -> None:
        """Decode, encode and commit pictures."""
        first = next(pictures, None)
        if not any_left(first is not None):
            return
        model = self.owner.model
        pictures = pictures if first is None else chain([first], pictures)
        states_left = self._states_left()
        committer = Committer(self._commit)
        read = partial(decode, is_known=self.ids_of.__contains__, model=model)
        with (
            ThreadPoolExecutor(self.num_workers) as threads,
            tqdm(total=total, desc="Indexing", unit="picture", disable=not self.progress) as bar,
        ):
            try:
                for batch, num_read in self._batches(in_threads(read, pictures, threads, AHEAD * self.batch_size)):
                    new = [one for one in batch if one.pixels is not None]
                    rows: list[Any] = encode_rows(new, model, states_left) if new else []
                    states_left -= len(rows) * self.world_size
                    committer.add(gathered(rows + [one for one in batch if one.pixels is None]))
                    bar.update(num_read * self.world_size)
            finally:
                threads.shutdown(wait=False, cancel_futures=True)
                committer.close()

    def _batches(self, decoded: Iterator[Decoded]) -> Iterator[tuple[list[Decoded], int]]:
        """Batches of pictures that can be used, with the number of those that were read for it.

        All processes get equally many, of which the last may be empty.
        """
        while True:
            batch: list[Decoded] = []
            num_read = 0
            for one in decoded:
                num_read += 1
                if one.reason is not None:
                    self.reasons.append((one.picture.path or one.picture.name, one.reason))
                    continue
                batch.append(one)
                num_new = sum(other.pixels is not None for other in batch[-self.batch_size :])
                if num_new == self.batch_size or len(batch) == _KNOWN:
                    break
            if not any_left(num_read > 0):
                return
            yield batch, num_read

    def _states_left(self) -> int:
        """The number of pictures whose states may still be kept."""
        tokens, width = self.about.states
        size = tokens * width * getattr(torch, self.about.states_dtype).itemsize
        return max(self.about.max_states_bytes // size - self.storage.number_of_states(), 0)

    def _commit(self, rows: list[Any]) -> None:
        """Write rows that were encoded, and rows of known content that are made from those that are there."""
        known: dict[str, Decoded] = {}
        encoded: dict[str, dict] = {}
        for row in rows:
            image_id = row.picture.image_id if isinstance(row, Decoded) else row["image_id"]
            if image_id not in self.written:  # A source may have a picture twice.
                self.written.add(image_id)
                (known if isinstance(row, Decoded) else encoded)[image_id] = row  # type: ignore[index]
        schema, tables = schema_of(self.about), []
        if encoded:
            columns: dict[str, list] = {
                name: [row[name] for row in encoded.values()] for name in schema.names if name != "fingerprint"
            }
            tables.append(pa.table(columns | {"fingerprint": [self.about.weights] * len(encoded)}, schema=schema))
        if known:
            tables.append(self._from_known(list(known.values()), schema))
        if tables:
            self.storage.write(pa.concat_tables(tables), {*known, *encoded} & self.old.keys())
        for image_id in encoded:
            self._count("changed" if image_id in self.old else "new")
        for image_id, one in known.items():
            self._count(self._became(image_id, one.hash))

    def _became(self, image_id: str, digest: str) -> str:
        """How a picture of known content differs: the name of a field of `Changes`."""
        if image_id in self.old:
            return "unchanged" if self.old[image_id].hash == digest else "changed"
        left = [other for other in self.ids_of[digest] if other in self.gone]
        if not left:
            return "new"
        self.ids_of[digest].remove(left[0])  # so that one file counts as moved once
        return "moved"

    def _count(self, name: str) -> None:
        setattr(self.changes, name, getattr(self.changes, name) + 1)

    def _from_known(self, known: list[Decoded], schema: pa.Schema) -> pa.Table:
        """Rows for pictures whose content is in the index, with what follows from the content."""
        hashes = sorted({one.hash for one in known})
        rows = self.storage.rows(schema.names, f"hash IN ({', '.join(map(quoted, hashes))})")
        place_of = {digest: place for place, digest in enumerate(rows["hash"].to_pylist())}
        taken = rows.select(schema.names).take([place_of[one.hash] for one in known])
        facts = [facts_of(one.picture, one.hash) for one in known]
        for name in facts[0]:
            column = pa.array([fact[name] for fact in facts], schema.field(name).type)
            taken = taken.set_column(schema.names.index(name), schema.field(name), column)
        return taken.cast(schema)

    def _end(self) -> Changes:
        """List what was skipped, tidy the database, and return the numbers, which are those of all processes."""
        self.reasons = gathered(self.reasons)
        if self.rank == 0:
            self.changes.skipped = len(self.reasons)
            with plain_errors(self.storage.uri):
                self._list_skipped()
            self.storage.tidy(len(self.gone))
        if is_distributed():
            changes = [self.changes]
            dist.broadcast_object_list(changes)
            self.changes = changes[0]
        return self.changes

    def _list_skipped(self) -> None:
        """List the pictures that were skipped in this run, and name some in a warning."""
        path = None if is_remote(self.storage.uri) else os.path.join(self.storage.uri, SKIPPED)
        if path is not None and os.path.exists(path):
            os.remove(path)
        if not self.reasons:
            return
        skipped = SkippedSamples(path)
        for image_id, reason in self.reasons:
            skipped.add(image_id, reason)
        logger.warning(
            "%d pictures or folders cannot be read and are left out%s: %s",
            len(self.reasons),
            "" if path is None else f" (all are listed in {path})",
            "; ".join(f"{image_id} ({reason})" for image_id, reason in self.reasons[:_NAMED]),
        )


def _captions(folder: str) -> dict[str, str]:
    """The captions of files by path, if the folder has a list of them that can be read."""
    found = {}
    try:
        for record in captions_beside(folder) or ():
            texts = [text for text in record["captions"] or () if isinstance(text, str) and text.strip()]
            path = (record["image"] or {}).get("path")
            if path and texts:
                found[os.path.abspath(path)] = "\n".join(texts)
    except DataError as error:
        logger.info("No captions are read: %s", error)
    return found
