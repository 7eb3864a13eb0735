"""Image-text pairs as a data set: `load_pairs` loads every kind of source as records, map-style or as a stream."""

import glob
import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, IterableDataset

from .embedded.openmoji import load_openmoji
from .json_lists import json_records
from .records import CAPTION_COLUMNS, FEATURES, IMAGE_COLUMNS, DataError, as_records, find_column
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
) -> Dataset | IterableDataset:
    """Load image-text pairs as records `image`, `captions`, `image_id`.

    Args:
        source: the data to load, or a list of sources. A source is one of these:
            "openmoji", the embedded default;
            an ALBEF-style JSON list of `{"image": path, "caption": text or list of texts}`;
            the JSON file of Karpathy's splits;
            WebDataset tars or parquet files: a file, a pattern, or a folder of them;
            a folder of images with `metadata.csv` or `metadata.jsonl`;
            a folder saved by `datasets`;
            the name of a data set on the Hub.
        split: the split to load. In a folder, these are the files whose names begin with it; if none does, "train"
            is all files whose names do not begin with the name of another split. A single file has no splits, except
            Karpathy's: there "train" includes "restval", and "validation", "val" and "dev" mean the same.
        streaming: read the data while training instead of before.
        image_root: folder that the paths in a JSON list start from; None for the folder of the list.
        image_column, caption_column: names of the columns, if they are not among the usual ones.

    Raises:
        DataError: if the source does not exist, has no samples, or lacks an image or caption column.
    """
    options: dict[str, Any] = {"image_column": image_column, "caption_column": caption_column}
    if isinstance(source, list):
        parts = [load_pairs(one, split, streaming=streaming, image_root=image_root, **options) for one in source]
        if not parts:
            raise DataError("No data was named: give a source, for example openmoji.")
        if len(parts) == 1:
            return parts[0]
        return datasets.concatenate_datasets([part.select_columns(list(FEATURES)) for part in parts])
    if source == "openmoji":
        dataset = load_openmoji(split)
        return _as_stream(dataset) if streaming else dataset
    tars = [file for file in _files(source, split) if file.endswith(".tar")]
    if tars:
        with _load_errors(source, split):
            return _read_tars(source, tars, streaming, **options)
    dataset = open_source(source, split, streaming=streaming, image_root=image_root)
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise DataError(f"{source} holds no pairs in its split '{split}': name another split or source.")
    if dataset.features == FEATURES and image_column is None and caption_column is None:
        return dataset  # These are records already, for instance those of a JSON list.
    return as_records(dataset, source, **options)


def open_source(
    source: str, split: str, *, streaming: bool = False, image_root: str | None = None
) -> Dataset | IterableDataset:
    """Open files, a folder or a data set on the Hub, with the columns that it has.

    Raises:
        DataError: if the source does not exist or cannot be read.
    """
    with _load_errors(source, split):
        files = _files(source, split)
        kinds = {Path(file).suffix for file in files}
        is_folder = os.path.isdir(source)
        dataset: Dataset | None = None
        if kinds == {".json"}:
            names = SPLIT_NAMES.get(split, (split,))
            dataset = _read(json_records, files, False, split_names=names, image_root=image_root)
        elif is_folder and os.path.exists(os.path.join(source, "dataset_dict.json")):
            dataset = datasets.load_from_disk(source)[split]
        elif is_folder and os.path.exists(os.path.join(source, "state.json")):
            dataset = datasets.load_from_disk(source)
        if dataset is not None:
            return _as_stream(dataset) if streaming else dataset
        for kind, builder in ((".tar", "webdataset"), (".parquet", "parquet")):
            if kinds == {kind}:
                return datasets.load_dataset(builder, data_files={split: files}, split=split, streaming=streaming)
        if is_folder:
            return datasets.load_dataset("imagefolder", data_dir=source, split=split, streaming=streaming)
        if os.path.exists(source) or glob.has_magic(source) or source.startswith((".", "/", "~")):
            raise DataError(
                f"{source} cannot be read as data: give a JSON list, tar or parquet files, a folder of them, or the "
                "name of a data set on the Hub."
            )
        return datasets.load_dataset(source, split=split, streaming=streaming)


def captions_of(dataset: Any) -> Iterator[str]:
    """All captions of a data set, read without its images."""
    for record in dataset.select_columns(["captions"]):
        yield from record["captions"] or ()


@contextmanager
def _load_errors(source: str, split: str) -> Iterator[None]:
    """Turn errors of loading into a `DataError` of one sentence."""
    try:
        yield
    except (OSError, KeyError, ValueError, tarfile.TarError, datasets.exceptions.DatasetsError) as error:
        cause = error
        if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
            cause = error.__cause__
        if isinstance(cause, DataError):
            raise cause from None
        reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        raise DataError(f"{source} could not be loaded (split '{split}'): {reason}") from error


def _files(source: str, split: str) -> list[str]:
    """The files that a source names: a file, those that match a pattern, or the tars or parquet files of a folder."""
    if os.path.isfile(source):
        return [source]
    if glob.has_magic(source):
        return sorted(glob.glob(source))
    for pattern in ("*.tar", "*.parquet"):
        found = sorted(glob.glob(os.path.join(glob.escape(source), pattern)))
        chosen = [file for file in found if Path(file).name.startswith(split)]
        if not chosen and split == "train":
            chosen = [file for file in found if not Path(file).name.startswith(("val", "dev", "test"))]
        if found and not chosen:
            raise DataError(f"{source} has no files of a split '{split}': their names must begin with it.")
        if chosen:
            return chosen
    return []


def _read_tars(
    source: str, files: list[str], streaming: bool, image_column: str | None, caption_column: str | None
) -> Dataset | IterableDataset:
    """Read WebDataset tars with our own reader.

    The reader of `datasets` gives up a whole tar when one text is not UTF-8, or when one of its first samples lacks a
    field that the others have.
    """
    fields = fields_of(files[0])
    find_column(fields, image_column, IMAGE_COLUMNS, "image", source)
    find_column(fields, caption_column, CAPTION_COLUMNS, "caption", source)
    image_fields = (image_column,) if image_column is not None else IMAGE_COLUMNS
    caption_fields = (caption_column,) if caption_column is not None else CAPTION_COLUMNS
    return _read(tar_records, files, streaming, image_fields=image_fields, caption_fields=caption_fields)


def _read(generator: Callable[..., Iterator[dict]], files: list[str], streaming: bool, **options: Any):
    """The records that a generator makes of files, as a stream or as a table in the cache of `datasets`."""
    if streaming:
        return IterableDataset.from_generator(generator, features=FEATURES, gen_kwargs={"files": files, **options})
    # With sizes and times in the name of the cache, a file that has changed is read again.
    stamps = tuple((stat.st_size, stat.st_mtime_ns) for stat in map(os.stat, files))
    options = {"files": tuple(map(os.path.abspath, files)), "stamps": stamps, **options}
    if next(generator(**options), None) is None:
        return Dataset.from_dict({name: [] for name in FEATURES}, features=FEATURES)
    return Dataset.from_generator(generator, features=FEATURES, gen_kwargs=options)


def _as_stream(dataset: Dataset) -> IterableDataset:
    """A table as a stream, in shards that processes and workers can divide among themselves."""
    return dataset.to_iterable_dataset(num_shards=min(max(len(dataset) // 1000, 1), 1024))
