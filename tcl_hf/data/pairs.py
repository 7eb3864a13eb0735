"""Image-text pairs as a data set: `load_pairs` loads every kind of source as records, map-style or as a stream."""

import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import datasets
import fsspec
from datasets import Dataset, IterableDataset

from .captions import CAPTION_COLUMNS, TEXT_COLUMNS
from .embedded.openmoji import load_openmoji
from .records import FEATURES, IMAGE_COLUMNS, PATH_COLUMNS, DataError, as_records, find_column
from .roots import is_remote
from .sources import Files, find_files, has_pattern
from .tables import column_names, list_records
from .webdataset import fields_of, tar_records

_VALIDATION = ("validation", "val", "dev")
# The names that some data sets use for a split. Karpathy's "restval" are validation images of COCO used for training.
SPLIT_NAMES = {
    **dict.fromkeys(_VALIDATION, _VALIDATION),
    "train": ("train", "restval"),
    "test": ("test", "testA", "testB"),
}


def load_pairs(
    source: str | list[str],
    split: str = "train",
    *,
    streaming: bool = False,
    image_root: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    allow_outside_root: bool = False,
) -> Dataset | IterableDataset:
    """Load image-text pairs as records `image`, `captions`, `image_id`.

    Args:
        source: the data to load, or a list of sources. A source is one of these:
            "openmoji", the embedded default;
            a list of images and captions: CSV, TSV, JSON lines, an ALBEF-style JSON list, Flickr's `.token` file,
            COCO's `captions_*.json`, or Karpathy's splits;
            WebDataset tars or parquet files: a file, an address of fsspec, a pattern such as `{000..123}.tar`, or a
            folder of them;
            a folder of images with such a list (`metadata.csv`, `captions.txt`, ...), or with a text beside each
            image (`1.png`, `1.txt`);
            a folder saved by `datasets`;
            the name of a data set on the Hub, `name` or `name:configuration`.
        split: the split to load, see `sources.find_files`. A single file has no splits, except Karpathy's: there
            "train" includes "restval", and "validation", "val" and "dev" mean the same.
        streaming: read the data while training instead of before.
        image_root: folder that the paths of images start from; None for the folder of the list, or one in it.
        image_column, caption_column: names of the columns, if they are not among the usual ones.
        allow_outside_root: open images that a list or table names by absolute paths or `../` outside of `image_root`.
            Otherwise they are samples that cannot be used.

    Raises:
        DataError: if the source does not exist, has no samples, names only images outside of their root, or lacks an
            image or caption column.
    """
    options: dict[str, Any] = {"image_column": image_column, "caption_column": caption_column}
    if isinstance(source, list):
        given = {"image_root": image_root, "allow_outside_root": allow_outside_root, **options}
        parts = [load_pairs(one, split, streaming=streaming, **given) for one in source]
        if not parts:
            raise DataError("No data was named: give a source, for example openmoji.")
        if len(parts) == 1:
            return parts[0]
        return datasets.concatenate_datasets([part.select_columns(list(FEATURES)) for part in parts])
    if not source.strip():
        raise DataError("The name of the data is empty: give a source, for example openmoji.")
    if source == "openmoji":
        dataset = load_openmoji(split)
        return _as_stream(dataset) if streaming else dataset
    with _load_errors(source, split):
        files = find_files(source, split)
        if files is not None and files.kind == "tar":
            return _read_tars(source, files.paths, streaming, **options)
        if files is not None and files.kind in ("json", "table"):
            roots = {"image_root": image_root, "allow_outside_root": allow_outside_root}
            dataset = _read_lists(files.paths, split, streaming, **roots, **options)
            return _with_rows(dataset, source, split)
        dataset = _with_rows(_open(source, split, files, streaming), source, split)
    if dataset.features == FEATURES and image_column is None and caption_column is None:
        return dataset  # These are records already.
    root = image_root
    if root is None and files is not None:
        root = os.path.dirname(files.paths[0])
    return as_records(dataset, source, image_root=root, allow_outside_root=allow_outside_root, **options)


def open_source(source: str, split: str, *, streaming: bool = False) -> Dataset | IterableDataset:
    """Open files, a folder or a data set on the Hub, with the columns that it has.

    Raises:
        DataError: if the source does not exist or cannot be read.
    """
    with _load_errors(source, split):
        return _open(source, split, find_files(source, split), streaming)


def _open(source: str, split: str, files: Files | None, streaming: bool) -> Dataset | IterableDataset:
    """Open a source as `open_source` does, given its files."""
    is_folder = os.path.isdir(source)
    if is_folder and os.path.exists(os.path.join(source, "dataset_dict.json")):
        dataset = datasets.load_from_disk(source)[split]
        return _as_stream(dataset) if streaming else dataset
    if is_folder and os.path.exists(os.path.join(source, "state.json")):
        dataset = datasets.load_from_disk(source)
        return _as_stream(dataset) if streaming else dataset
    if files is not None and files.kind == "json":
        return _read_lists(files.paths, split, streaming)
    for kind, builder in (("tar", "webdataset"), ("parquet", "parquet")):
        if files is not None and files.kind == kind:
            paths = list(files.paths)
            return datasets.load_dataset(builder, data_files={split: paths}, split=split, streaming=streaming)
    if is_folder:
        return datasets.load_dataset("imagefolder", data_dir=source, split=split, streaming=streaming)
    if os.path.exists(source) or has_pattern(source) or source.startswith((".", "/", "~")):
        raise DataError(
            f"{source} cannot be read as data: give a CSV, TSV or JSON list, tar or parquet files, a folder of "
            "them, or the name of a data set on the Hub."
        )
    name, _, config = source.partition(":")
    try:
        return datasets.load_dataset(name, config or None, split=split, streaming=streaming)
    except (FileNotFoundError, ConnectionError) as error:
        raise DataError(
            f"{source} is neither a file nor a folder, and loading it from the Hub failed (split '{split}'): "
            + " ".join(str(error).split())
        ) from error


def _with_rows(dataset: Dataset | IterableDataset, source: str, split: str) -> Dataset | IterableDataset:
    """The data set, unless it is a table without rows."""
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise DataError(f"{source} holds no pairs in its split '{split}': name another split or source.")
    return dataset


def recognised_columns(
    source: str, split: str, image_column: str | None = None, caption_column: str | None = None
) -> dict[str, str]:
    """The columns of a source, or the fields or keys, from which images and captions are read.

    Args:
        source, split, image_column, caption_column: as for `load_pairs`.

    Raises:
        DataError: as `load_pairs`.
    """
    if source == "openmoji":
        return {"image": "image", "caption": "captions"}
    with _load_errors(source, split):
        files = find_files(source, split)
        if files is not None and files.kind in ("json", "table"):
            names = SPLIT_NAMES.get(split, (split,))
            columns = column_names(files.paths[0], names, image_column, caption_column)
        elif files is not None and files.kind == "tar":
            columns = fields_of(files.paths[0])
        else:
            dataset = open_source(source, split)
            columns = list(dataset.column_names or next(iter(dataset)))
    return {
        "image": find_column(columns, image_column, PATH_COLUMNS, "image", source),
        "caption": find_column(columns, caption_column, TEXT_COLUMNS, "caption", source),
    }


def captions_of(dataset: Any) -> Iterator[str]:
    """All captions of a data set, read without its images."""
    for record in dataset.select_columns(["captions"]):
        yield from record["captions"] or ()


@contextmanager
def _load_errors(source: str, split: str) -> Iterator[None]:
    """Turn errors of loading into a `DataError` of one sentence."""
    try:
        yield
    except (OSError, KeyError, ValueError, ImportError, tarfile.TarError, datasets.exceptions.DatasetsError) as error:
        cause = error
        if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
            cause = error.__cause__
        if isinstance(cause, DataError):
            raise cause from None
        reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        raise DataError(f"{source} could not be loaded (split '{split}'): {reason}") from error


def _read_lists(files: Sequence[str], split: str, streaming: bool, **options: Any) -> Dataset | IterableDataset:
    """Read CSV, TSV and JSON lists with our own reader, which finds their columns and their images."""
    options = {"image_root": None, **options}
    return _read(list_records, list(files), streaming, split_names=SPLIT_NAMES.get(split, (split,)), **options)


def _read_tars(
    source: str, files: Sequence[str], streaming: bool, image_column: str | None, caption_column: str | None
) -> Dataset | IterableDataset:
    """Read WebDataset tars with our own reader.

    The reader of `datasets` gives up a whole tar when one text is not UTF-8, or when one of its first samples lacks a
    field that the others have.
    """
    fields = fields_of(files[0])
    image = find_column(fields, image_column, IMAGE_COLUMNS, "image", source)
    caption = find_column(fields, caption_column, CAPTION_COLUMNS, "caption", source)
    image_fields = (image_column,) if image_column is not None else (image, *IMAGE_COLUMNS)
    caption_fields = (caption_column,) if caption_column is not None else (caption, *CAPTION_COLUMNS)
    return _read(tar_records, list(files), streaming, image_fields=image_fields, caption_fields=caption_fields)


def _read(generator: Callable[..., Iterator[dict]], files: list[str], streaming: bool, **options: Any):
    """The records that a generator makes of files, as a stream or as a table in the cache of `datasets`."""
    if streaming:
        return IterableDataset.from_generator(generator, features=FEATURES, gen_kwargs={"files": files, **options})
    # With sizes and times in the name of the cache, a file that has changed is read again.
    stamps = tuple(map(_stamp, files))
    files = [file if is_remote(file) else os.path.abspath(file) for file in files]
    options = {"files": tuple(files), "stamps": stamps, **options}
    if next(generator(**options), None) is None:
        return Dataset.from_dict({name: [] for name in FEATURES}, features=FEATURES)
    return Dataset.from_generator(generator, features=FEATURES, gen_kwargs=options)


def _stamp(file: str) -> tuple:
    """The size of a file and the time of its last change, or what an address says of it."""
    if is_remote(file):
        system, path = fsspec.core.url_to_fs(file)
        information = system.info(path)
        return tuple(str(information.get(name)) for name in ("size", "ETag", "etag", "LastModified", "mtime"))
    status = os.stat(file)
    return (status.st_size, status.st_mtime_ns)


def _as_stream(dataset: Dataset) -> IterableDataset:
    """A table as a stream, in shards that processes and workers can divide among themselves."""
    return dataset.to_iterable_dataset(num_shards=min(max(len(dataset) // 1000, 1), 1024))
