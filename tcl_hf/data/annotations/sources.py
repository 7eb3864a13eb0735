"""From sources of annotations (files, folders, tables) to rows, and from rows to a table of records."""

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import datasets
from datasets import Dataset
from datasets.utils import tqdm

from ..pairs import SPLIT_NAMES, DataError, open_source
from ..records import refuse_outside
from .images import ImageFinder, look_up_images, table_reference
from .rows import COLUMN_NAMES, Row, read_json_rows

_TABLE_ROWS = 10_000  # records that become a table together: as dictionaries they take far more memory


@dataclass(frozen=True)
class Source:
    """One source of annotations; the fields are the arguments of `load_records`."""

    name: str
    split: str
    annotations: list[str]
    images: ImageFinder

    @property
    def split_names(self) -> tuple[str, ...]:
        """The names that files of published data sets give to the split."""
        return SPLIT_NAMES.get(self.split, (self.split,))

    def rows(self) -> Iterator[Row]:
        """Yield the rows of a JSON file or of a `datasets` source."""
        if os.path.isfile(self.name) and not self.name.endswith((".parquet", ".tar")):
            yield from read_json_rows(self.name)
            return
        table = open_source(self.name, self.split)
        image_names = {name for column, names in COLUMN_NAMES.items() if column.startswith("image") for name in names}
        # A text or a number in such a column is the path or the id of an image.
        images = [n for n, kind in table.features.items() if n in image_names and type(kind) is not datasets.Value]
        for name in images:
            self.images.add_table(f"{self.name}#{name}", table.select_columns([name]))
        labels = {name: kind for name, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)}
        for index, fields in enumerate(table.remove_columns(images)):
            for name, kind in labels.items():
                fields[name] = "-" if fields[name] in (None, -1) else kind.int2str(fields[name])
            fields |= {name: table_reference(f"{self.name}#{name}", index) for name in images}
            yield Row(self.name, index + 1, fields)


def load_records(
    read: Callable[[Source], Iterator[dict]],
    features: datasets.Features,
    source: str | list[str],
    split: str,
    image_root: str | dict[str, str] | None = None,
    annotations: str | list[str] | None = None,
    allow_outside_root: bool = False,
) -> Dataset:
    """Load one or several sources as one table of records.

    Args:
        read: yields the records of a source.
        features: the columns of the records.
        source: JSON files, folders, or `datasets` sources (see `tcl_hf.data.pairs.load_pairs`); which formats are
            understood depends on `read`.
        split: the split of a `datasets` source. A JSON file does not have splits, unless `read` finds them in it.
        image_root: a folder to which image paths are relative, or parquet files or a folder of them with `image_id`
            and `image`, of whatever splits. The folder of the annotations if None. A dictionary gives one such place
            for each value of the field `dataset`.
        annotations: further files or folders with the annotations that belong to the source.
        allow_outside_root: open images by absolute paths or `../` outside of `image_root`, see `roots.below`.

    Raises:
        DataError: naming file, row and remedy, if there is nothing to read, or a field or an image is missing.
    """
    names = [source] if isinstance(source, str) else source
    if not names:
        raise DataError("No data was named: give a source, for example a JSON file of annotations.")
    files = [annotations] if isinstance(annotations, str) else annotations or []
    images = ImageFinder(image_root, allow_outside_root)
    records = (record for name in names for record in read(Source(name, split, files, images)))
    records = iter(tqdm(records, desc="Reading annotations", unit=" rows"))
    parts: list[Dataset] = []
    while part := list(islice(records, _TABLE_ROWS)):
        if not parts:
            found = (image for record in part for image in record.get("images") or [record.get("image")])
            refuse_outside([image["path"] for image in found if image], " and ".join(names), "image_root")
        parts.append(Dataset.from_list(part, features=features))
    if not parts:
        raise DataError(f"{' and '.join(names)} holds no records in its split '{split}'.")
    table = datasets.concatenate_datasets(parts)
    if not images.tables:
        return table
    return table.with_transform(functools.partial(look_up_images, tables=images.tables))
