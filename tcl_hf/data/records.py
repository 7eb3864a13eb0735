"""A record is one sample as a dictionary, before it becomes tensors: `image`, `captions` and `image_id`.

The image is not decoded yet: it is a dictionary with its bytes, its path, or both. The captions are a list.
"""

from functools import partial

import datasets
from datasets import Dataset, IterableDataset

from .captions import caption_texts

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "img", "pixel_values")
CAPTION_COLUMNS = ("captions", "caption", "text", "txt", "sentences", "sentence", "json")
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
    """The column with the given name, or the first that has one of the usual names.

    Args:
        columns: names of the columns that the source has.
        name: the column that the user asked for; None looks for the usual names.
        kind: "image", "caption" or "label", for the message.
        source: where the columns come from, for the message.

    Raises:
        DataError: if there is no such column.
    """
    candidates = (name,) if name is not None else usual_names
    for candidate in candidates:
        if candidate in columns:
            return candidate
    raise DataError(
        f"{source} has no {kind} column among {', '.join(columns)} (looked for {', '.join(candidates)}): "
        f"name it with {kind}_column."
    )


def as_records(
    dataset: Dataset | IterableDataset, source: str, image_column: str | None, caption_column: str | None
) -> Dataset | IterableDataset:
    """Rename the columns of a data set to those of a record, leave images undecoded, and make captions lists."""
    # A stream may learn its columns from its first row.
    columns = list(next(iter(dataset))) if dataset.column_names is None else dataset.column_names
    image = find_column(columns, image_column, IMAGE_COLUMNS, "image", source)
    caption = find_column(columns, caption_column, CAPTION_COLUMNS, "caption", source)
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
