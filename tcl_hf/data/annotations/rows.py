"""Rows of annotation files: how they are read, and how their fields and images are found."""

import functools
import glob
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from datasets.utils import tqdm

from ..pairs import IMAGE_COLUMNS, SPLIT_NAMES, DataError, open_source

logger = logging.getLogger(__name__)

# Columns of the records, and what they are called in the files.
FIELDS = {
    "image": IMAGE_COLUMNS,
    "image_0": ("image_0", "left_image"),
    "image_1": ("image_1", "right_image"),
    "images": ("images",),
    "image_id": ("image_id", "Flickr30K_ID", "Flikr30kID", "Flickr30kID"),  # SNLI-VE has had three spellings
    "captions": ("captions", "caption", "sentence2", "hypothesis", "sentence", "text"),
    "label": ("gold_label", "label"),
    "pair_id": ("pair_id", "pairID", "identifier"),
    "question": ("question",),
    "question_id": ("question_id",),
    "answers": ("answers", "answer"),
    "answer_type": ("answer_type",),
    "question_type": ("question_type",),
    "phrases": ("phrases",),
    "proposals": ("proposals",),
    "width": ("width",),
    "height": ("height",),
}

TEXT = datasets.Value("string")


# Rows


@dataclass(frozen=True)
class Row:
    """One row of a source; it knows where it stands, and what the caller calls its fields."""

    source: str
    number: int  # from 1
    fields: dict
    columns: dict[str, str]

    def error(self, what: str) -> DataError:
        return DataError(f"{self.source}, row {self.number}: {what}")

    def missing(self, name: str) -> DataError:
        return self.error(
            f"it has no '{name}' (looked for {', '.join(self._names(name))} among {', '.join(self.fields)}): add it, "
            f"or say what it is called with columns={{'{name}': ...}}."
        )

    def _names(self, name: str) -> tuple[str, ...]:
        return (self.columns[name],) if name in self.columns else FIELDS.get(name, (name,))

    def get(self, name: str) -> Any:
        """A field by the name of its column in the record; None if it is missing or null."""
        if name in self.columns and self.columns[name] not in self.fields:
            raise self.missing(name)
        found = (self.fields[field] for field in self._names(name) if self.fields.get(field) is not None)
        return next(found, None)

    def need(self, name: str) -> Any:
        value = self.get(name)
        if value is None:
            raise self.missing(name)
        return value

    def text(self, name: str) -> str:
        value = self.need(name)
        if not isinstance(value, str):
            raise self.error(f"its '{name}' is {value!r}: it must be a text.")
        return value

    def text_or_none(self, name: str) -> str | None:
        value = self.get(name)
        return None if value is None else str(value)


def read_json(file: str) -> Iterator[tuple[int, dict]]:
    """The rows of a JSON list, of JSON lines, or of the list in VQA's files, with their numbers.

    Texts beside the list in VQA's files, such as "data_subtype", are in every row.
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":  # what follows the first of several lines
                raise
            rows = _json_lines(file, text)
        else:
            shared: dict = {}
            if isinstance(content, dict):
                wrapped = next((content[key] for key in ("questions", "annotations") if key in content), [content])
                shared = {key: value for key, value in content.items() if isinstance(value, str)}
                content = wrapped
            if not isinstance(content, list):
                raise DataError(f"{file} holds no list of rows: give a JSON list or JSON lines.")
            rows = ((number, shared | row if isinstance(row, dict) else row) for number, row in enumerate(content, 1))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{file} could not be read as a JSON list or JSON lines: {error}.") from error
    for number, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{file}, row {number}: it is {row!r:.60}, not an object with named fields.")
        yield number, row


def _json_lines(file: str, text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{file}, row {number}: this line is not JSON: {error}.") from error


# Images


def bare_name(name: str) -> str:
    """The name of a picture without folders and ending."""
    stem, ending = os.path.splitext(os.path.basename(name))
    return stem if ending.lower() in (".jpg", ".jpeg", ".png") else stem + ending


def reference_to(table: str, index: int) -> dict:
    return {"bytes": None, "path": f"{table}#{index}"}


def put_pictures(batch: dict[str, list], tables: dict[str, Dataset]) -> dict[str, list]:
    """A batch of records in which references to rows of tables are replaced by the pictures there."""

    def look_up(image: dict, place: int = 0) -> dict | None:
        table, _, index = image["path"].rpartition("#")
        if table not in tables:
            return image
        (found,) = tables[table][int(index)].values()
        if isinstance(found, list):
            return found[place] if place < len(found) else None
        return found

    if "image" in batch:
        batch["image"] = [look_up(image) for image in batch["image"]]
    if "images" in batch:
        batch["images"] = [[look_up(image, place) for place, image in enumerate(images)] for images in batch["images"]]
    return batch


class Images:
    """Finds the images of rows: in the row's own table, in a table of images by image id, or as a file."""

    def __init__(self, root: str | dict[str, str] | None):
        self.root = root
        self.tables: dict[str, Dataset] = {}
        self._is_folder = functools.cache(os.path.isdir)
        self._rows_of = functools.cache(self._open_root)

    def add(self, table: str, pictures: Dataset) -> None:
        """Keep the one column of a table that holds pictures, or lists of them."""
        (name,) = pictures.column_names
        undecoded = datasets.Image(decode=False)
        is_list = isinstance(pictures.features[name], datasets.List)
        self.tables[table] = pictures.cast_column(name, datasets.List(undecoded) if is_list else undecoded)

    def of(self, row: Row, usual_name: str | None = None, folders: tuple[str, ...] = ()) -> dict:
        """`image` and `image_id` of a row.

        Args:
            usual_name: the file where the row names none; its image id if None.
            folders: folders of the root of which the first that exists holds the file; else the root does.
        """
        image, image_id = row.get("image"), row.get("image_id")
        name = image or usual_name or image_id
        if name is None:
            raise row.missing("image")
        if isinstance(image, dict):
            name = row.number - 1
        image_id = str(name) if image_id is None else str(image_id).removesuffix(".jpg")  # SNLI-VE has both
        wanted = image if isinstance(image, dict) else str(name)
        return {"image": self.find(row, wanted, image_id, folders), "image_id": image_id}

    def find(self, row: Row, image: str | dict, image_id: str | None = None, folders: tuple[str, ...] = ()) -> dict:
        """One undecoded image: `image` itself if it is one, else that of this name."""
        if isinstance(image, dict):
            return image
        root = self._root(row)
        if (rows := self._rows_of(root)) is not None:
            for name in (image_id, image, bare_name(image)):
                if name in rows:
                    return reference_to(root, rows[name])
            raise row.error(
                f"its image '{image_id or image}' is not among the {len(rows)} image ids of {root}: give the images' "
                "source with image_root."
            )
        folder = next((name for name in folders if self._is_folder(os.path.join(root, name))), "")
        file = image if os.path.splitext(image)[1] else f"{image}.jpg"
        return {"bytes": None, "path": os.path.join(root, folder, file)}

    def _root(self, row: Row) -> str:
        if isinstance(self.root, dict):
            name = row.get("dataset") or "vqa"  # VQA v2's own files do not say it
            if name not in self.root:
                raise row.error(f"its dataset {name!r} has no images: image_root names only {', '.join(self.root)}.")
            return self.root[name]
        if self.root is not None:
            return self.root
        return row.source if self._is_folder(row.source) else os.path.dirname(row.source)

    def _open_root(self, root: str) -> dict[str, int] | None:
        """Where each image id stands in a table of images; None if the root is a folder of files."""
        files = root
        if os.path.isdir(root):
            files = os.path.join(glob.escape(root), "*.parquet")
        if not glob.glob(files) if glob.has_magic(files) else not os.path.isfile(files):
            return None
        table = open_source(files, "train")  # one name for all files: an annotation's image may be in any of them
        missing = {"image", "image_id"} - set(table.column_names)
        if missing:
            raise DataError(
                f"{root} has no column {' and '.join(sorted(missing))} among {', '.join(table.column_names)}: images "
                "are found by 'image_id', in 'image'."
            )
        self.add(root, table.select_columns(["image"]))
        return {str(image_id): index for index, image_id in enumerate(table["image_id"])}


# Sources


@dataclass(frozen=True)
class Source:
    """One source, with what the caller said about it."""

    name: str
    split: str
    columns: dict[str, str]
    annotations: list[str]
    images: Images

    @property
    def split_names(self) -> tuple[str, ...]:
        return SPLIT_NAMES.get(self.split, (self.split,))

    def rows(self) -> Iterator[Row]:
        """The rows of a JSON file or of a `datasets` source."""
        if os.path.isfile(self.name) and not self.name.endswith((".parquet", ".tar")):
            for number, fields in read_json(self.name):
                yield Row(self.name, number, fields, self.columns)
            return
        table = open_source(self.name, self.split)
        names = {name for field in FIELDS if field.startswith("image") for name in FIELDS[field]}
        names |= {name for field, name in self.columns.items() if field.startswith("image")}
        # A text or a number there is the path or the id of an image.
        pictures = [n for n, feature in table.features.items() if n in names and type(feature) is not datasets.Value]
        for name in pictures:
            self.images.add(f"{self.name}#{name}", table.select_columns([name]))
        labels = {n: feature for n, feature in table.features.items() if isinstance(feature, datasets.ClassLabel)}
        for index, fields in enumerate(table.remove_columns(pictures)):
            for name, feature in labels.items():
                fields[name] = "-" if fields[name] in (None, -1) else feature.int2str(fields[name])
            fields |= {name: reference_to(f"{self.name}#{name}", index) for name in pictures}
            yield Row(self.name, index + 1, fields, self.columns)


def load_records(
    read: Callable[[Source], Iterator[dict]],
    features: datasets.Features,
    source: str | list[str],
    split: str,
    image_root: str | dict[str, str] | None,
    annotations: str | list[str] | None,
    columns: dict[str, str] | None,
) -> Dataset:
    names = [source] if isinstance(source, str) else source
    if not names:
        raise DataError("No data was named: give a source, for example a JSON file of annotations.")
    unknown = set(columns or {}) - set(FIELDS)
    if unknown:
        raise DataError(f"There is no column {' or '.join(sorted(unknown))} to name: columns are {', '.join(FIELDS)}.")
    files = [annotations] if isinstance(annotations, str) else annotations or []
    images = Images(image_root)
    sources = [Source(name, split, columns or {}, files, images) for name in names]
    records = iter(tqdm((record for one in sources for record in read(one)), desc="Reading annotations", unit=" rows"))
    parts = []
    while part := list(islice(records, 10_000)):  # far smaller as a table than as dictionaries
        parts.append(Dataset.from_list(part, features=features))
    if not parts:
        raise DataError(f"{' and '.join(names)} holds no records in its split '{split}'.")
    loaded = datasets.concatenate_datasets(parts)
    return loaded.with_transform(functools.partial(put_pictures, tables=images.tables)) if images.tables else loaded
