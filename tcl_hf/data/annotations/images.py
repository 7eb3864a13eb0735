"""Where the images of annotations are found: in the annotations themselves, in a table by image id, or as files.

An image that is in a table is not copied into the record. The record holds a reference to its place in the table
(`table_reference`), and `look_up_images` replaces the reference when the record is read.
"""

import functools
import glob
import os

import datasets
from datasets import Dataset

from ..pairs import DataError, open_source
from ..roots import below
from .rows import Row


def image_stem(name: str) -> str:
    """Return the name of an image file without folders and without an image ending."""
    stem, ending = os.path.splitext(os.path.basename(name))
    return stem if ending.lower() in (".jpg", ".jpeg", ".png") else stem + ending


def table_reference(table: str, index: int) -> dict:
    """Return an undecoded image that stands for row `index` of a table, see `look_up_images`."""
    return {"bytes": None, "path": f"{table}#{index}"}


def look_up_images(batch: dict[str, list], tables: dict[str, Dataset]) -> dict[str, list]:
    """Replace the references of a batch of records by the images in the tables.

    A row of a table may hold a list of images: the n-th image of a record then refers to the n-th image of the list.
    """

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


class ImageFinder:
    """Finds the images of rows: in the row's own table, in a table of images by image id, or as a file.

    Args:
        root: a folder of image files, parquet files with `image_id` and `image` or a folder of them, or one such place
            for each value of a row's `dataset`. The folder of the annotations if None.
        allow_outside_root: see `roots.below`.
    """

    def __init__(self, root: str | dict[str, str] | None, allow_outside_root: bool = False):
        self.root, self.allow_outside_root = root, allow_outside_root
        self.tables: dict[str, Dataset] = {}
        self._is_folder = functools.cache(os.path.isdir)
        self._index_of_root = functools.cache(self._open_root)

    def add_table(self, name: str, images: Dataset) -> None:
        """Keep a table whose one column holds images, or lists of images."""
        (column,) = images.column_names
        undecoded = datasets.Image(decode=False)
        is_list = isinstance(images.features[column], datasets.List)
        self.tables[name] = images.cast_column(column, datasets.List(undecoded) if is_list else undecoded)

    def image_and_id(self, row: Row, usual_name: str | None = None, folders: tuple[str, ...] = ()) -> dict:
        """Return `image` and `image_id` of a row.

        Args:
            usual_name: name of the file if the row does not give one; the image id if None.
            folders: folders of the root, of which the first that exists holds the file. The root does if none exists.

        Raises:
            DataError: if the row names no image, or one that is not there.
        """
        image, image_id = row.get("image"), row.get("image_id")
        name = image or usual_name or image_id
        if name is None:
            raise row.missing("image")
        if isinstance(image, dict):
            name = row.number - 1
        image_id = str(name) if image_id is None else str(image_id).removesuffix(".jpg")  # SNLI-VE has both
        found = self.find(row, image if isinstance(image, dict) else str(name), image_id, folders)
        return {"image": found, "image_id": image_id}

    def find(self, row: Row, image: str | dict, image_id: str | None = None, folders: tuple[str, ...] = ()) -> dict:
        """Return one undecoded image.

        Args:
            row: the row that names it, for the error.
            image: the image itself, which is returned, or the name of its file.
            image_id: its id in the source of images; the name if None.
            folders: folders of the root, of which the first that exists holds the file.

        Raises:
            DataError: if it is not there.
        """
        if isinstance(image, dict):
            return image
        root = self._root_of(row)
        if (index := self._index_of_root(root)) is not None:
            for name in (image_id, image, image_stem(image)):
                if name in index:
                    return table_reference(root, index[name])
            raise row.error(
                f"its image '{image_id or image}' is not among the {len(index)} image ids of {root}: give the source "
                "of its images with image_root."
            )
        folder = next((name for name in folders if self._is_folder(os.path.join(root, name))), "")
        file = image if os.path.splitext(image)[1] else f"{image}.jpg"
        start = os.path.join(root, folder)
        return {"bytes": None, "path": below(root, file, self.allow_outside_root, start)}

    def _root_of(self, row: Row) -> str:
        if isinstance(self.root, dict):
            name = row.get("dataset") or "vqa"  # the files of VQA v2 do not have this field
            if name not in self.root:
                raise row.error(
                    f"its dataset {name!r} has no images: image_root names only {', '.join(self.root)}; add it there."
                )
            return self.root[name]
        if self.root is not None:
            return self.root
        return row.source if self._is_folder(row.source) else os.path.dirname(row.source)

    def _open_root(self, root: str) -> dict[str, int] | None:
        """Return the row of each image id in a table of images; None if the root is a folder of files."""
        files = os.path.join(glob.escape(root), "*.parquet") if os.path.isdir(root) else root
        if not glob.glob(files) if glob.has_magic(files) else not os.path.isfile(files):
            return None
        table = open_source(files, "train")  # under one split, because an image may be in the files of any split
        missing = {"image", "image_id"} - set(table.column_names)
        if missing:
            raise DataError(
                f"{root} has no column {' and '.join(sorted(missing))} among {', '.join(table.column_names)}: images "
                "are looked up by 'image_id' and read from 'image'."
            )
        self.add_table(root, table.select_columns(["image"]))
        return {str(image_id): index for index, image_id in enumerate(table["image_id"])}
