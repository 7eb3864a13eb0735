"""The database of an index: one LanceDB table, whose schema says which model its vectors are of."""

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ..data.records import DataError
from ..data.sources import is_remote

if TYPE_CHECKING:
    from lancedb.table import Table

logger = logging.getLogger(__name__)

VERSION = 1  # changes with the columns of the table and with what its schema says
EXACT_BELOW = 50_000  # rows; a scan of so many vectors takes about as long as an approximate search of millions
NUM_PROBES = 128  # partitions that an approximate search reads, which are all below two million rows
REFINE_FACTOR = 10  # times as many candidates as hits are compared by their exact vectors
_ROWS_PER_PARTITION = 16_384
_FEW_DIMENSIONS = 128
_BITS = 3  # for each dimension; of random vectors, one bit finds half of the ten nearest, and three find all
NAME = "images"
DEFAULT_INDEX = "runs/index"  # the index of commands that name none
WRITER = "writer.lock"
# Columns that a person can name in `where`.
FACTS = ("image_id", "path", "name", "source", "caption", "size", "modified", "width", "height", "hash")
_ABOUT = b"tcl_hf"
_FRAGMENTS = 32  # more of them are merged, because each search reads all
_DELETED = 0.25  # share of deleted rows from which on their place is freed
_KEPT_VERSIONS = timedelta(minutes=10)  # for readers in other processes that have not seen the newest one yet


class SearchError(DataError):
    """An index, a query or a model cannot be used as it is. The message names the problem, the place and the remedy."""


@dataclass(frozen=True)
class About:
    """The facts that an index holds about itself.

    Args:
        model: folder or Hub name of the model; empty if it had none.
        weights: hash of the weights that make the vectors of images.
        pixels: the size and normalisation of the images that the model reads, in words.
        dim: dimensions of a vector.
        states: shape (1 + P, width) of the states of an image.
        states_dtype: their type, as a name of PyTorch.
        max_states_bytes: the bytes of states that are kept at most.
        version: the version of the format.
    """

    model: str
    weights: str
    pixels: str
    dim: int
    states: tuple[int, int]
    states_dtype: str
    max_states_bytes: int
    version: int = VERSION


def schema_of(about: About) -> pa.Schema:
    """The columns of the table.

    `path` is empty for a picture that came as bytes, which are then in `bytes`. `modified` is in nanoseconds.
    """
    columns = {name: pa.string() for name in ("image_id", "path", "name", "source", "caption", "hash", "fingerprint")}
    columns |= {"size": pa.int64(), "modified": pa.int64(), "width": pa.int32(), "height": pa.int32()}
    columns |= {"thumbnail": pa.binary(), "bytes": pa.large_binary(), "states": pa.large_binary()}
    columns["vector"] = pa.list_(pa.float32(), about.dim)
    return pa.schema(list(columns.items()), metadata={_ABOUT: json.dumps(asdict(about)).encode()})


@contextmanager
def plain_errors(place: str) -> Iterator[None]:
    """Turn errors of the database into one sentence.

    Args:
        place: the index, for the sentence.

    Raises:
        SearchError: for an error of the database, or a full disk.
    """
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, SearchError):
            raise
        reason = " ".join(str(error).split())
        if re.search(r"no space left|disk quota|os error 28", reason, re.IGNORECASE):
            raise SearchError(
                f"{place} cannot be written, because its disk is full: what was written before stays. Make space, and "
                "run the same command again, which goes on there."
            ) from error
        raise SearchError(f"{place} cannot be read or written: {reason[:400]}") from error


def _connect(uri: str) -> Any:
    try:
        import lancedb
    except ImportError as error:
        raise SearchError("An index needs LanceDB: `pip install tcl_hf[search]`.") from error
    return lancedb.connect(uri, read_consistency_interval=timedelta(seconds=2))


def is_index(uri: str) -> bool:
    """Whether an index is there."""
    if not is_remote(uri):
        return os.path.isdir(os.path.join(uri, f"{NAME}.lance"))
    with plain_errors(uri):
        return NAME in _connect(uri).list_tables().tables


class Storage:
    """The table of an index, and who may write to it.

    Args:
        uri: the folder or address of the index.
        table: its table.
        about: the facts that it holds about itself.
    """

    def __init__(self, uri: str, table: "Table", about: About):
        self.uri, self.table, self.about = uri, table, about

    @classmethod
    def create(cls, uri: str, about: About) -> "Storage":
        """Make an index.

        Raises:
            SearchError: if there is one already, or the place cannot be written.
        """
        if is_index(uri):
            raise SearchError(f"{uri} holds an index already: open it, or name another folder.")
        with plain_errors(uri):
            return cls(uri, _connect(uri).create_table(NAME, schema=schema_of(about)), about)

    @classmethod
    def open(cls, uri: str) -> "Storage":
        """Open an index.

        Raises:
            SearchError: if there is none, or it is of another version.
        """
        if not is_index(uri):
            raise SearchError(f"{uri} holds no index: make one with `tcl-hf index FOLDER --index {uri}`.")
        with plain_errors(uri):
            table = _connect(uri).open_table(NAME)
            content = json.loads((table.schema.metadata or {}).get(_ABOUT, b"{}"))
        if content.get("version") != VERSION:
            raise SearchError(
                f"{uri} is an index of version {content.get('version')}, and this tcl_hf reads version {VERSION}: "
                "index the pictures again into another folder."
            )
        return cls(uri, table, About(**content | {"states": tuple(content["states"])}))

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Be the only writer.

        Writers of an index at an address (`s3://...`) do not see each other, and are the user's to keep apart.

        Raises:
            SearchError: if another process writes to the index.
        """
        if is_remote(self.uri):
            yield
            return
        from filelock import FileLock, Timeout

        lock = FileLock(Path(self.uri) / WRITER)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise SearchError(
                f"{self.uri} is being written by another process: wait until it has ended, and run this again. "
                "Searching works meanwhile."
            ) from error
        except OSError as error:
            raise SearchError(f"{self.uri} cannot be written ({error.strerror or error}).") from error
        try:
            yield
        finally:
            lock.release()

    def refresh(self) -> None:
        """Read what other processes have written."""
        with plain_errors(self.uri):
            self.table.checkout_latest()

    def rows(self, columns: Sequence[str], where: str | None = None, limit: int | None = None) -> pa.Table:
        """Some columns of all rows, or of those that a filter in SQL selects."""
        with plain_errors(self.uri):
            query = self.table.search().select(list(columns))
            if where is not None:
                query = query.where(where)
            return (query if limit is None else query.limit(limit)).to_arrow()

    def number_of_states(self) -> int:
        """The number of rows that have states."""
        with plain_errors(self.uri):
            return self.table.count_rows("states IS NOT NULL")

    def write(self, rows: pa.Table, replaces: Iterable[str] = ()) -> None:
        """Write rows in one commit each for those that replace a row, by `image_id`, and for the others."""
        replaced = pa.array(set(replaces), pa.string())
        is_old = pa.compute.is_in(rows["image_id"], replaced)
        new, old = rows.filter(pa.compute.invert(is_old)), rows.filter(is_old)
        with plain_errors(self.uri):
            if len(new):
                self.table.add(new)
            if len(old):
                self.table.merge_insert("image_id").when_matched_update_all().when_not_matched_insert_all().execute(old)

    def delete(self, image_ids: Sequence[str]) -> None:
        """Delete rows."""
        with plain_errors(self.uri):
            for start in range(0, len(image_ids), 1000):
                self.table.delete(f"image_id IN ({', '.join(map(quoted, image_ids[start : start + 1000]))})")

    def is_approximate(self) -> bool:
        """Whether searches go through an approximate index of the vectors."""
        return any("vector" in index.columns for index in self.table.list_indices())

    def tidy(self, num_deleted: int = 0) -> None:
        """Merge small files, free the place of deleted rows, and make or extend the approximate index when it pays.

        Args:
            num_deleted: rows that were deleted since the last call.
        """
        with plain_errors(self.uri):
            self._tidy(num_deleted)

    def _tidy(self, num_deleted: int) -> None:
        number = self.table.count_rows()
        indexed = next((index for index in self.table.list_indices() if "vector" in index.columns), None)
        if indexed is None and number >= EXACT_BELOW:
            make_vector_index(self.table, number)
        statistics: Any = self.table.stats()
        fragments = statistics["fragment_stats"]["num_fragments"]
        waiting = 0
        if indexed is not None:
            found = self.table.index_stats(indexed.name)
            waiting = found.num_unindexed_rows if found is not None else 0
        if fragments > _FRAGMENTS or waiting >= EXACT_BELOW or num_deleted > _DELETED * number:
            self.table.optimize(cleanup_older_than=_KEPT_VERSIONS)


def make_vector_index(table: "Table", number: int) -> None:
    """Make the approximate index over the vectors of so many rows.

    RaBitQ keeps a few bits of each dimension, and compares millions of vectors within a tenth of a second. So all
    partitions are read up to two million rows, and recall does not depend on what a partition holds. Of few dimensions
    it would keep too little, and such vectors are compared as they are.
    """
    from lancedb.index import IvfFlat, IvfRq

    dim = table.schema.field("vector").type.list_size
    partitions = max(round(number / _ROWS_PER_PARTITION), 1)
    kind: Any = IvfRq if dim >= _FEW_DIMENSIONS and dim % 8 == 0 else IvfFlat
    bits = {"num_bits": _BITS} if kind is IvfRq else {}
    config = kind(distance_type="cosine", num_partitions=partitions, max_iterations=10, sample_rate=64, **bits)
    table.create_index("vector", config=config, replace=True)


def approximate(query: Any) -> Any:
    """A query of a table, with the settings of the approximate index if it has one."""
    return query.nprobes(NUM_PROBES).refine_factor(REFINE_FACTOR)


def quoted(text: str) -> str:
    """A text as SQL writes it."""
    return "'" + text.replace("'", "''") + "'"
