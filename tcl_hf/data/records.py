"""A record is one sample as a dictionary, before it becomes tensors: `image`, `captions` and `image_id`.

The image is not decoded yet: it is a dictionary with its bytes, its path, or both. The captions are a list.
"""

import os
import re
from functools import partial

import datasets
from datasets import Dataset, IterableDataset

from .captions import TEXT_COLUMNS, caption_texts
from .roots import OUTSIDE, below

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "img", "pixel_values")
# Further names, of columns that hold the paths of images, and of texts in lists.
PATH_COLUMNS = (
    *IMAGE_COLUMNS,
    *("file_name", "filename", "image_path", "img_path", "image_file", "filepath", "file_path", "image_name", "path"),
    *("file", "photo", "picture"),
)
_LONGEST_NAME = 40  # characters of a column's name that a message shows, because a file without a header has no names
ADDRESS = re.compile(r"https?://", re.IGNORECASE)
URL_COLUMNS = ("url", "image_url", "img_url", "photo_url", "imageurl")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "cls", "target")
ID_COLUMNS = ("image_id", "__key__", "id", "key", "cocoid", "imgid", "filename")
FEATURES = datasets.Features(
    {
        "image": datasets.Image(decode=False),
        "captions": datasets.List(datasets.Value("string")),
        "image_id": datasets.Value("string"),
    }
)


class DataError(ValueError):
    """The data cannot be used as it is. The message names the problem, the place, and the remedy."""


def find_column(columns: list[str], name: str | None, usual_names: tuple[str, ...], kind: str, source: str) -> str:
    """The column with the given name, or the first that has one of the usual names, alone or behind a dot.

    Args:
        columns: names of the columns that the source has.
        name: the column that the user asked for; None looks for the usual names.
        kind: "image", "caption" or "label", for the message.
        source: where the columns come from, for the message.

    Raises:
        DataError: if there is no such column.
    """
    candidates = (name,) if name is not None else usual_names
    in_lower_case = {column.strip().lower(): column for column in reversed(columns)}
    for candidate in candidates:
        if candidate in columns:
            return candidate
        if candidate.lower() in in_lower_case:
            return in_lower_case[candidate.lower()]
    # Fields of tars may have a name in front of their ending, such as `input.jpg`.
    dotted = [column for column in columns if "." in column and column.lower().rpartition(".")[2] in usual_names]
    if name is None and len(dotted) == 1:
        return dotted[0]
    shown = ", ".join(column if len(column) <= _LONGEST_NAME else f"{column[:_LONGEST_NAME]}..." for column in columns)
    raise DataError(
        f"{source} has no {kind} column among {shown} (looked for {', '.join(candidates)}): name it with {kind}_column."
    )


def check_addresses(columns: list[str], image_column: str | None, source: str) -> None:
    """Refuse a source that has addresses of images and no images, as CC3M, SBU and LAION do.

    Raises:
        DataError: with the command that downloads them.
    """
    names = {name.strip().lower(): name for name in columns}
    urls = [names[name] for name in URL_COLUMNS if name in names]
    if image_column is None and urls and not names.keys() & {*PATH_COLUMNS}:
        raise only_addresses(source, f"the column {urls[0]}", urls[0])


def only_addresses(source: str, place: str, column: str = "url") -> DataError:
    """The error of a source that has addresses of images and no images, with the command that downloads them.

    Args:
        place: where the addresses are.
        column: the column of the addresses.
    """
    kinds = {".csv": "csv", ".tsv": "tsv", ".json": "json", ".jsonl": "jsonl", ".parquet": "parquet"}
    kind = kinds.get(os.path.splitext(source)[1].lower(), "parquet" if os.path.isdir(source) else "tsv")
    return DataError(
        f"{source} holds addresses of images ({place}), and no images: download them once with `pip install "
        f"img2dataset` and `img2dataset --url_list {source} --input_format {kind} --url_col {column} --caption_col "
        "caption --output_format webdataset --output_folder FOLDER`, and name FOLDER as the data."
    )


def refuse_outside(paths: list[str | None], source: str, root: str) -> None:
    """Refuse a source of which each of the given images leaves the root.

    Raises:
        DataError: with the arguments that read it.
    """
    named = [path for path in paths if path]
    if named and all(path.startswith(OUTSIDE) for path in named):
        raise DataError(
            f"{source} names images outside of {root or 'its folder'}, such as {named[0].removeprefix(OUTSIDE)}: name "
            "the folder that holds them with image_root, or set allow_outside_root to true if you trust the list."
        )


def as_records(
    dataset: Dataset | IterableDataset,
    source: str,
    image_column: str | None,
    caption_column: str | None,
    image_root: str | None = None,
    allow_outside_root: bool = False,
) -> Dataset | IterableDataset:
    """Rename the columns of a data set to those of a record, leave images undecoded, and make captions lists.

    Args:
        image_root: folder that images start from where they are paths.
        allow_outside_root: see `below`.

    Raises:
        DataError: if there are no such columns, or addresses in place of images.
    """
    # A stream may learn its columns from its first row.
    columns = list(next(iter(dataset))) if dataset.column_names is None else dataset.column_names
    check_addresses(columns, image_column, source)
    image = find_column(columns, image_column, PATH_COLUMNS, "image", source)
    caption = find_column(columns, caption_column, TEXT_COLUMNS, "caption", source)
    if image_root is not None and _holds_paths(dataset, image):
        start_from_root = partial(_below, column=image, root=image_root, allow_outside_root=allow_outside_root)
        dataset = dataset.map(start_from_root, features=dataset.features)
    image_id = next((name for name in ID_COLUMNS if name in columns), None)
    record_of = partial(_record_of, image=image, caption=caption, image_id=image_id)
    dataset = dataset.cast_column(image, datasets.Image(decode=False))
    if isinstance(dataset, IterableDataset):
        numbered = partial(record_of, number_mark="#")
        return dataset.map(numbered, with_indices=True, remove_columns=columns, features=FEATURES)
    # Only captions and ids are written anew, because copying the images would take long and fill the disk.
    others = dataset.remove_columns([name for name in columns if name not in (caption, image_id)])
    texts = others.map(
        record_of,
        with_indices=True,
        remove_columns=others.column_names,
        features=datasets.Features({name: FEATURES[name] for name in ("captions", "image_id")}),
        desc="Reading captions",
    )
    images = dataset.select_columns([image]).rename_columns({image: "image"})
    return datasets.concatenate_datasets([images, texts], axis=1)


def _holds_paths(dataset: Dataset | IterableDataset, image: str) -> bool:
    """Whether a column is one of texts, which are then paths of images."""
    kind = (dataset.features or {}).get(image)
    return isinstance(kind, datasets.Value) and kind.dtype in ("string", "large_string")


def _below(row: dict, column: str, root: str, allow_outside_root: bool) -> dict:
    """A row whose image is a path, with the path below a root.

    Raises:
        DataError: if it is an address.
    """
    path = row[column]
    if path and ADDRESS.match(path):
        raise only_addresses(path, f"the column {column}", column)
    return {column: below(root, path, allow_outside_root) if path else None}


def _record_of(row: dict, number: int, image: str, caption: str, image_id: str | None, number_mark: str = "") -> dict:
    """The record of a row with named columns; without an id, the row's number is its id.

    In a stream, rows are numbered within their shard. Such numbers get a mark, so that `StreamLoader` can put the
    shard's number in front.
    """
    given_id = row.get(image_id) if image_id else None
    record = {
        "captions": caption_texts(row[caption]),
        "image_id": f"{number_mark}{number}" if given_id is None else str(given_id),
    }
    return record | {"image": row[image]} if image in row else record
