"""Images with one label each: ImageNet, CIFAR and others, from any source that has such columns."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import datasets
from datasets import ClassLabel, Dataset
from PIL import Image

from ..embedded.easy_vqa import load_easy_vqa_classes
from ..embedded.openmoji import load_openmoji_classes
from ..pairs import SPLIT_NAMES, open_source
from ..records import FEATURES, ID_COLUMNS, IMAGE_COLUMNS, LABEL_COLUMNS, DataError, find_column
from .rows import TEXT, read_json

logger = logging.getLogger(__name__)

ClassNames: TypeAlias = list[str] | dict[str, str]

EMBEDDED = {"easy_vqa": load_easy_vqa_classes, "openmoji": load_openmoji_classes}
ORDER_SEED = 0  # the seed by which the order of the records is drawn
UNLABELLED = (None, "", -1)  # the labels of images without one; -1 stands in test splits on the Hub
_SPLITS = {name for names in SPLIT_NAMES.values() for name in names}
_MAX_NAMED = 5  # class names in an error


def load_classification(
    source: str | list[str],
    split: str = "train",
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    class_names: str | ClassNames | None = None,
) -> Dataset:
    """Load images with labels as records `image`, `image_id`, `captions` (the class's name), `label`, `class_id`.

    `label` is the name of the class, and `class_id` its number among all classes (see `class_names_of`). The records
    come in an order that is drawn with a fixed seed, because sources are often sorted by class: the first ones are then
    of many classes. Images without a label are left out, and a warning gives their number.

    Args:
        source: one or several of
            a folder of class folders, which may stand in a folder for each split (`val/n01440764/1.JPEG`);
            a `datasets` source with columns of images and labels (see `tcl_hf.data.pairs.load_pairs`);
            "openmoji" or "easy_vqa", which are embedded.
        split: the split to load. Single files, and class folders that are not in the folder of a split, have no splits.
        image_column, label_column: names of the columns, if they are not among the usual ones.
        class_names: names for the labels, or a JSON file of them. A dictionary holds the name of each label. In a
            list, the n-th is the name of the label n; if the labels are texts, the list holds those that exist. None
            takes the names that the source gives; labels that are texts are names themselves.

    Raises:
        DataError: naming source, row and remedy, if a column or a name is missing, or labels are not understood.
    """
    sources = [source] if isinstance(source, str) else source
    if not sources:
        raise DataError("No data was named: give a source, for example a folder of class folders.")
    names = None if class_names is None else read_class_names(class_names)
    parts = [_load_source(one, split, image_column, label_column, names) for one in sources]
    for one, part in zip(sources, parts, strict=True):
        if class_names_of(part) != class_names_of(parts[0]):
            raise DataError(f"{one} has other classes than {sources[0]}: evaluate each alone, or name class_names.")
    return datasets.concatenate_datasets(parts).shuffle(seed=ORDER_SEED)


def class_names_of(records: Dataset) -> list[str]:
    """Return the names of all classes of records of classification, in their order; none for other records."""
    kind = records.features.get("class_id")
    return list(kind.names) if isinstance(kind, ClassLabel) else []


# Names of classes


def read_class_names(class_names: str | ClassNames) -> ClassNames:
    """Return the names of classes, as a list or as a dictionary of the name of each label.

    Args:
        class_names: the names, or a JSON file of them; a list of one is taken as the name of a file.

    Raises:
        DataError: if there are none, one is not a text, or one names two classes.
    """
    file = class_names[0] if isinstance(class_names, list) and len(class_names) == 1 else class_names
    place = "class_names"
    if isinstance(file, str):
        if not Path(file).is_file():
            raise DataError(f"class_names: there is no file {file}: name a JSON file, or at least two classes.")
        class_names, place = read_json(file, "a JSON list or object of class names"), file
    if not isinstance(class_names, list | dict) or not class_names:
        raise DataError(f'{place} is not a list or object of names: write ["cat", "dog"] or {{"n02123045": "cat"}}.')
    seen = set()
    for number, name in enumerate(class_names.values() if isinstance(class_names, dict) else class_names, 1):
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"{place}, entry {number}: {name!r:.60} is not the name of a class: write a text.")
        if name in seen:
            raise DataError(f"{place}, entry {number}: '{name}' is the name of two classes: give them different ones.")
        seen.add(name)
    return class_names


@dataclass(frozen=True)
class _Classes:
    """The labels of a source, as texts, and the name of each class, in one order."""

    labels: list[str]
    names: list[str]

    def numbers(self, labels: list[str | None], source: str) -> list[int | None]:
        """The number of the class of each row; None for rows without a label."""
        number_of = {label: number for number, label in enumerate(self.labels)}
        for row, label in enumerate(labels, 1):
            if label is not None and label not in number_of:
                raise DataError(
                    f"{source}, row {row}: its label '{label}' is not among the {len(self.labels)} of class_names "
                    f"({_some(self.labels)}): add it there, or correct it."
                )
        return [None if label is None else number_of[label] for label in labels]


def _read_labels(values: list, kind: Any, source: str, column: str) -> list[str | None]:
    """The labels of all rows as texts, of numbers too; None for rows without a label."""
    if isinstance(kind, ClassLabel):
        return [None if value in UNLABELLED else kind.names[value] for value in values]
    if not isinstance(kind, datasets.Value) or not ("int" in kind.dtype or "string" in kind.dtype):
        raise DataError(
            f"{source}: its column '{column}' holds {values[0]!r:.60}, and a label must be one text or one whole "
            "number: name another column with label_column."
        )
    return [None if value in UNLABELLED else str(value) for value in values]


def _classes_of(kind: Any, labels: list[str | None], class_names: ClassNames | None, source: str) -> _Classes:
    """The classes of a source: those that its feature lists, or else those that `class_names` or its rows have."""
    if isinstance(kind, ClassLabel):
        return _Classes(kind.names, _names_for(kind.names, class_names, source))
    if isinstance(class_names, dict):
        return _Classes(list(class_names), list(class_names.values()))
    if "int" in kind.dtype:
        if class_names is None:
            raise DataError(f"{source}: its labels are numbers without names: give the names with class_names.")
        return _Classes([str(number) for number in range(len(class_names))], class_names)
    names = class_names or sorted({label for label in labels if label is not None})
    return _Classes(names, names)


def _names_for(labels: list[str], class_names: ClassNames | None, source: str) -> list[str]:
    """The names of the classes whose labels a source lists; a dictionary has them by label or by number."""
    if class_names is None:
        return labels
    if isinstance(class_names, list):
        if len(class_names) != len(labels):
            raise DataError(
                f"class_names has {len(class_names)} names, but {source} has {len(labels)} classes ({_some(labels)}): "
                "give one name for each, in this order."
            )
        return class_names
    names = [class_names.get(label, class_names.get(str(number))) for number, label in enumerate(labels)]
    missing = [label for label, name in zip(labels, names, strict=True) if name is None]
    if missing:
        raise DataError(
            f"class_names has no name for {len(missing)} of the {len(labels)} labels of {source} ({_some(missing)}): "
            "add them."
        )
    return [name for name in names if name is not None]


def _some(names: list[str]) -> str:
    return ", ".join(names[:_MAX_NAMED]) + (", ..." if len(names) > _MAX_NAMED else "")


# Sources


def _load_source(
    source: str, split: str, image_column: str | None, label_column: str | None, class_names: ClassNames | None
) -> Dataset:
    """The records of one source, in its order."""
    table = _open(source, split)
    image = find_column(table.column_names, image_column, IMAGE_COLUMNS, "image", source)
    column = find_column(table.column_names, label_column, LABEL_COLUMNS, "label", source)
    values, kind = table.select_columns([column])[:][column], table.features[column]
    labels = _read_labels(values, kind, source, column)
    labelled = [row for row, label in enumerate(labels) if label is not None]
    if not labelled:
        raise DataError(f"{source} has no image with a label in its split '{split}': name another split or source.")
    if len(labelled) < len(labels):
        logger.warning("%s: %d images without a label were left out.", source, len(labels) - len(labelled))
    classes = _classes_of(kind, labels, class_names, source)
    numbers = classes.numbers(labels, source)
    names = [None if number is None else classes.names[number] for number in numbers]
    features = datasets.Features(
        {
            "image_id": FEATURES["image_id"],
            "captions": FEATURES["captions"],
            "label": TEXT,
            "class_id": ClassLabel(names=classes.names),
        }
    )
    texts = {
        "image_id": _image_ids(table),
        "captions": [[name] for name in names],
        "label": names,
        "class_id": numbers,
    }
    # Images are not written anew, because copying them would take long and fill the disk.
    images = table.select_columns([image]).rename_columns({image: "image"}).cast_column("image", FEATURES["image"])
    records = datasets.concatenate_datasets([images, Dataset.from_dict(texts, features=features)], axis=1)
    return records.select(labelled)


def _image_ids(table: Dataset) -> list[str]:
    """The id of each row; its number without a column of ids."""
    column = next((name for name in ID_COLUMNS if name in table.column_names), None)
    if column is None:
        return [str(number) for number in range(len(table))]
    ids = table.select_columns([column])[:][column]
    return [str(number if one is None else one) for number, one in enumerate(ids)]


def _open(source: str, split: str) -> Dataset:
    """A source as a table with the columns that it has."""
    if source in EMBEDDED:
        try:
            return EMBEDDED[source](split)
        except ValueError as error:
            raise DataError(str(error)) from error
    if Path(source).is_dir() and (table := _class_folders(Path(source), split)) is not None:
        return table
    table = open_source(source, split)
    if not len(table):
        raise DataError(f"{source} holds no images in its split '{split}': name another split or source.")
    return table


def _class_folders(folder: Path, split: str) -> Dataset | None:
    """The images in a folder of class folders as a table; None for other folders.

    `datasets` reads such folders too, but takes those without a split's name for training data, and leaves labels out
    if there is one class.

    Raises:
        DataError: if there are only other splits.
    """
    if any(folder.glob("metadata.*")) or any(folder.glob("*/metadata.*")):
        return None  # the labels are in these files
    for name in SPLIT_NAMES.get(split, (split,)):
        if classes := _images_by_folder(folder / name):
            return _table_of_files(folder / name, classes)
    classes = _images_by_folder(folder)
    if classes and classes.keys() <= _SPLITS:
        raise DataError(
            f"{folder} has folders of splits ({', '.join(classes)}), but none of '{split}' with class folders in it: "
            "name another split."
        )
    return _table_of_files(folder, classes) if classes else None


def _images_by_folder(folder: Path) -> dict[str, list[Path]]:
    """The images in each folder of a folder, for those that have any."""
    Image.init()
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    names = sorted(one.name for one in folder.glob("[!.]*") if one.is_dir())
    files = {name: sorted(f for f in (folder / name).rglob("*") if f.suffix.lower() in endings) for name in names}
    return {name: images for name, images in files.items() if images}


def _table_of_files(folder: Path, classes: dict[str, list[Path]]) -> Dataset:
    """A table of images by class; their ids are their paths in the folder."""
    files = [file for images in classes.values() for file in images]
    columns = {
        "image": [{"bytes": None, "path": str(file)} for file in files],
        "image_id": [file.relative_to(folder).as_posix() for file in files],
        "label": [name for name, images in classes.items() for _ in images],
    }
    features = {"image": FEATURES["image"], "image_id": TEXT, "label": ClassLabel(names=list(classes))}
    return Dataset.from_dict(columns, features=datasets.Features(features))
