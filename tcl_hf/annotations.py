"""Annotations of the downstream tasks: one `load_...` for each, and one record for all file formats of a task.

A record has `image_id` and an undecoded `image` (for two-image reasoning, `images`). Pictures inside a `datasets`
source stay there: `path` says where, and they are put into a record when it is looked up. Formats are told by content.
Rows count from 1 in messages; those of JSON lines are the lines of the file.
"""

import functools
import glob
import json
import logging
import math
import os
import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import datasets
from datasets import Dataset
from datasets.utils import tqdm

from .data import FEATURES, IMAGE_COLUMNS, SPLIT_NAMES, DataError, open_source
from .modeling_tcl_tasks import ENTAILMENT_LABELS, REASONING_LABELS

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
VISUAL_GENOME_WEIGHT = 0.5  # of an answer from there, as in the paper's code

_TEXT = datasets.Value("string")
_BOXES = datasets.List(datasets.List(datasets.Value("float32")))
_INDEX = datasets.Value("int32")
QUESTION_FEATURES = datasets.Features(
    {
        "image": FEATURES["image"],
        "image_id": _TEXT,
        "question": _TEXT,
        "question_id": _TEXT,
        "answers": datasets.List(_TEXT),
        "weight": datasets.Value("float32"),
        "answer_type": _TEXT,
        "question_type": _TEXT,
    }
)
ENTAILMENT_FEATURES = datasets.Features({**FEATURES, "label": _TEXT, "pair_id": _TEXT})
REASONING_FEATURES = datasets.Features(
    {
        "images": datasets.List(FEATURES["image"]),
        "captions": FEATURES["captions"],
        "image_id": _TEXT,
        "label": _TEXT,
        "pair_id": _TEXT,
    }
)
PHRASE_FEATURES = datasets.Features(
    {
        **FEATURES,
        "phrases": datasets.List(
            {
                "caption_index": _INDEX,
                "start": _INDEX,
                "end": _INDEX,
                "types": datasets.List(_TEXT),
                "boxes": _BOXES,
                "phrase_id": _TEXT,
            }
        ),
        "proposals": _BOXES,
        "width": _INDEX,
        "height": _INDEX,
    }
)


# Rows


@dataclass(frozen=True)
class _Row:
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


def _read_json(file: str) -> Iterator[tuple[int, dict]]:
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


def _bare(name: str) -> str:
    """The name of a picture without folders and ending."""
    stem, ending = os.path.splitext(os.path.basename(name))
    return stem if ending.lower() in (".jpg", ".jpeg", ".png") else stem + ending


def _reference(table: str, index: int) -> dict:
    return {"bytes": None, "path": f"{table}#{index}"}


def _put_pictures(batch: dict[str, list], tables: dict[str, Dataset]) -> dict[str, list]:
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


class _Images:
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

    def of(self, row: _Row, usual_name: str | None = None, folders: tuple[str, ...] = ()) -> dict:
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

    def find(self, row: _Row, image: str | dict, image_id: str | None = None, folders: tuple[str, ...] = ()) -> dict:
        """One undecoded image: `image` itself if it is one, else that of this name."""
        if isinstance(image, dict):
            return image
        root = self._root(row)
        if (rows := self._rows_of(root)) is not None:
            for name in (image_id, image, _bare(image)):
                if name in rows:
                    return _reference(root, rows[name])
            raise row.error(
                f"its image '{image_id or image}' is not among the {len(rows)} image ids of {root}: give the images' "
                "source with image_root."
            )
        folder = next((name for name in folders if self._is_folder(os.path.join(root, name))), "")
        file = image if os.path.splitext(image)[1] else f"{image}.jpg"
        return {"bytes": None, "path": os.path.join(root, folder, file)}

    def _root(self, row: _Row) -> str:
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
class _Source:
    """One source, with what the caller said about it."""

    name: str
    split: str
    columns: dict[str, str]
    annotations: list[str]
    images: _Images

    @property
    def split_names(self) -> tuple[str, ...]:
        return SPLIT_NAMES.get(self.split, (self.split,))

    def rows(self) -> Iterator[_Row]:
        """The rows of a JSON file or of a `datasets` source."""
        if os.path.isfile(self.name) and not self.name.endswith((".parquet", ".tar")):
            for number, fields in _read_json(self.name):
                yield _Row(self.name, number, fields, self.columns)
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
            fields |= {name: _reference(f"{self.name}#{name}", index) for name in pictures}
            yield _Row(self.name, index + 1, fields, self.columns)


def _load(
    read: Callable[[_Source], Iterator[dict]],
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
    images = _Images(image_root)
    sources = [_Source(name, split, columns or {}, files, images) for name in names]
    records = iter(tqdm((record for one in sources for record in read(one)), desc="Reading annotations", unit=" rows"))
    parts = []
    while part := list(islice(records, 10_000)):  # far smaller as a table than as dictionaries
        parts.append(Dataset.from_list(part, features=features))
    if not parts:
        raise DataError(f"{' and '.join(names)} holds no records in its split '{split}'.")
    loaded = datasets.concatenate_datasets(parts)
    return loaded.with_transform(functools.partial(_put_pictures, tables=images.tables)) if images.tables else loaded


# Question answering


def load_questions(
    source: str | list[str],
    split: str = "train",
    *,
    image_root: str | dict[str, str] | None = None,
    annotations: str | list[str] | None = None,
    columns: dict[str, str] | None = None,
) -> Dataset:
    """Load questions about images as records `image`, `image_id`, `question`, `question_id`, `answers`, `weight`.

    `answers` are as given, with repeats (ten in VQA v2), and empty for a test question; `weight` is their share of the
    loss together: 1.0, or 0.5 for Visual Genome's. `answer_type` and `question_type` are None where a file has none.

    Args:
        source: one or several of
            VQA v2's questions, with `annotations` (images are `COCO_val2014_000000000042.jpg` in the folder `val2014`
            of `image_root` if it has one, else in `image_root` itself; so for every "data_subtype");
            ALBEF's JSON list of `question_id`, `question`, `answer`, `image` and `dataset` ("vqa" or "vg");
            a `datasets` source with `image`, `question` and `answer` or `answers`, or with `image` and `qa`, a list of
            `question` and `answer`, each of which makes a record.
        split: the split of a `datasets` source; a file has none.
        image_root: a folder to which paths are relative (the source's own if None), or parquet files or a folder of
            them with `image_id` and `image`, whatever their splits; or one for each `dataset` of ALBEF's lists.
        annotations: files with the answers to VQA v2's questions.
        columns: what the source calls a column of the records, where the name is not a usual one.

    Raises:
        DataError: naming file, row and remedy, if a field or an image is missing or a question has no annotation.
    """
    return _load(_read_questions, QUESTION_FEATURES, source, split, image_root, annotations, columns)


def _read_questions(source: _Source) -> Iterator[dict]:
    answers = {}
    for file in source.annotations:
        for number, fields in _read_json(file):
            answers[str(_Row(file, number, fields, {}).need("question_id"))] = fields
    for row in source.rows():
        if answers:
            question_id = str(row.need("question_id"))
            if question_id not in answers:
                raise row.error(
                    f"its question '{question_id}' is not in {' and '.join(source.annotations)}: give the annotations "
                    "that belong to the questions."
                )
            row = replace(row, fields=answers[question_id] | row.fields)
        pairs = row.get("qa")
        if pairs is None:
            yield _question(row, source.images)
            continue
        image_id = row.get("image_id") or row.number
        for number, pair in enumerate(pairs):
            fields = row.fields | {"question_id": f"{image_id}-{number}"} | pair
            yield _question(replace(row, fields=fields), source.images)


def _question(row: _Row, images: _Images) -> dict:
    subtype, coco_id = row.get("data_subtype"), row.get("image_id")
    if subtype is None or coco_id is None:
        record = images.of(row)
    else:
        subtype = subtype.replace("test-dev", "test")  # a part of the questions about the images of test2015
        record = images.of(row, f"COCO_{subtype}_{coco_id:0>12}.jpg", (subtype,))
    answers = row.get("answers")
    answers = answers if isinstance(answers, list) else [] if answers is None else [answers]
    answers = [answer.get("answer") if isinstance(answer, dict) else answer for answer in answers]
    if not all(isinstance(answer, str) for answer in answers):
        raise row.error(f"its answers are {answers!r:.80}: each must be a text.")
    return record | {
        "question": row.text("question"),
        "question_id": row.text_or_none("question_id") or f"{record['image_id']}-{row.number}",
        "answers": answers,
        "weight": VISUAL_GENOME_WEIGHT if row.get("dataset") == "vg" else 1.0,
        "answer_type": row.text_or_none("answer_type"),
        "question_type": row.text_or_none("question_type"),
    }


def read_answer_list(path: str) -> list[str]:
    """The answers a model chooses from, in the order of the JSON list at `path`.

    Raises:
        DataError: if the file is not a list of texts, naming the first other entry.
    """
    try:
        answers = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} could not be read as a JSON list of answers: {error}.") from error
    if not isinstance(answers, list) or not answers:
        raise DataError(f'{path} is not a JSON list of answers: write it as ["yes", "no", ...].')
    for number, answer in enumerate(answers, 1):
        if not isinstance(answer, str):
            raise DataError(f"{path}, row {number}: {answer!r:.60} is not a text: write every answer in quotes.")
    return answers


# Visual entailment


def load_entailment(
    source: str | list[str],
    split: str = "train",
    *,
    image_root: str | None = None,
    columns: dict[str, str] | None = None,
) -> Dataset:
    """Load hypotheses about images as records `image`, `image_id`, `captions` (the hypothesis), `label`, `pair_id`.

    `label` is "entailment", "neutral" or "contradiction"; `pair_id` is None where a file has none. Rows without a
    gold label ("-") are left out, and counted in a warning.

    Args:
        source: one or several of SNLI-VE's JSON lines; ALBEF's JSON list or other JSON lines of `image` or `image_id`,
            `sentence` and `label` (to a name without an ending, ".jpg" is added); a `datasets` source of such columns.
        split: the split of a `datasets` source; a file has none.
        image_root: a folder to which paths are relative (the source's own if None), or parquet files or a folder of
            them with `image_id` and `image`, whatever their splits.
        columns: what the source calls a column of the records, where the name is not a usual one.

    Raises:
        DataError: naming file, row and remedy, if a field or an image is missing or a label is another.
    """
    return _load(_read_entailment, ENTAILMENT_FEATURES, source, split, image_root, None, columns)


def _read_entailment(source: _Source) -> Iterator[dict]:
    unlabelled = 0
    for row in source.rows():
        label = row.need("label")
        name = str(label).strip().lower()
        if name == "-":
            unlabelled += 1
            continue
        if name not in ENTAILMENT_LABELS:
            raise row.error(f"its label is {label!r}: it must be one of {', '.join(ENTAILMENT_LABELS)}.")
        yield source.images.of(row) | {
            "captions": [row.text("captions")],
            "label": name,
            "pair_id": row.text_or_none("pair_id"),
        }
    if unlabelled:
        logger.warning("%s: %d rows without a gold label ('-') were left out.", source.name, unlabelled)


# Two-image reasoning


def load_reasoning(
    source: str | list[str],
    split: str = "train",
    *,
    image_root: str | None = None,
    columns: dict[str, str] | None = None,
) -> Dataset:
    """Load sentences about two images as records `images`, `image_id` (the left's), `captions`, `label`, `pair_id`.

    `label` is "True" or "False"; `pair_id` is NLVR2's identifier, None where a file has none.

    Args:
        source: one or several of NLVR2's JSON lines (images are `dev-1-2-img0.png` and `dev-1-2-img1.png`, in training
            under their "directory"; all in the folder `images/train`, `dev` or `test1` of `image_root` if it has
            one, else in `image_root` itself); ALBEF's JSON list of `sentence`, `label` and `images`, two paths; a
            `datasets` source with `image_0` and `image_1`, or `images`.
        split: the split of a `datasets` source; a file has none.
        image_root: a folder to which paths are relative (the source's own if None), or parquet files or a folder of
            them with `image_id` and `image`, whatever their splits.
        columns: what the source calls a column of the records, where the name is not a usual one.

    Raises:
        DataError: naming file, row and remedy, if a field or an image is missing or a label is another.
    """
    return _load(_read_reasoning, REASONING_FEATURES, source, split, image_root, None, columns)


def _read_reasoning(source: _Source) -> Iterator[dict]:
    for row in source.rows():
        label = str(row.need("label")).strip().capitalize()
        if label not in REASONING_LABELS:
            raise row.error(f"its label is {row.get('label')!r}: it must be one of {', '.join(REASONING_LABELS)}.")
        names, folders = _two_images(row)
        image_id = row.text_or_none("image_id")
        if image_id is None:
            image_id = str(row.number - 1) if isinstance(names[0], dict) else _bare(names[0])
        yield {
            "images": [source.images.find(row, name, folders=folders) for name in names],
            "captions": [row.text("captions")],
            "image_id": image_id,
            "label": label,
            "pair_id": row.text_or_none("pair_id"),
        }


def _two_images(row: _Row) -> tuple[list, tuple[str, ...]]:
    """Names of a row's two images (or references to them), and the folders where they may be."""
    images = row.get("images")
    if isinstance(images, dict):  # one place of a table holds both
        return [images, images], ()
    if images is not None:
        if not isinstance(images, list) or len(images) != 2 or not all(isinstance(name, str) for name in images):
            raise row.error(f"its images are {images!r:.80}: there must be two paths.")
        return images, ()
    if row.get("image_0") is not None:
        return [row.get("image_0"), row.need("image_1")], ()
    if row.get("pair_id") is None:
        raise row.missing("images")
    pair, _, _ = row.text("pair_id").rpartition("-")
    split, directory = pair.partition("-")[0], row.get("directory")
    names = [os.path.join("" if directory is None else str(directory), f"{pair}-img{side}.png") for side in (0, 1)]
    return names, (f"images/{split}", split)


# Grounding


def load_phrases(
    source: str | list[str],
    split: str = "train",
    *,
    image_root: str | None = None,
    annotations: str | list[str] | None = None,
    columns: dict[str, str] | None = None,
) -> Dataset:
    """Load phrases and their boxes as records `image`, `image_id`, `captions`, `phrases`, `proposals`, size.

    A phrase has `caption_index`, its characters from `start` up to before `end`, `types`, `boxes` and `phrase_id`.
    Boxes are x1, y1, x2, y2, the outer edges in pixels of the image file. `proposals` are boxes to choose from, if
    any; `width` and `height` are those of the image, 0 if not known. A box may leave the image by less than a pixel
    and is cut to it.

    Args:
        source: one or several of
            a RefCOCO or RefCOCO+ folder with `refs(unc).p` (or those of another author), `instances.json` and perhaps
            the proposals `dets.json`: a record is a sentence, the phrase all of it, its id that of the ref (images
            are in the folder `train2014` of `image_root` if it has one, else in `image_root` itself);
            ALBEF's JSON list of `image`, `text` and `ref_id`, which gets boxes and proposals from the folder
            `annotations`, and has none without;
            a Flickr30k Entities folder with `Sentences`, `Annotations` and `train.txt`, `val.txt`, `test.txt`: a
            record is an image, a phrase's id that of its chain (pixels count from 1 there: a box of xmin to xmax is
            from xmin - 1 to xmax here);
            a `datasets` source with `image`, `captions` and `phrases`.
        split: the split. "test" is RefCOCO's "testA" and "testB" together; either can be chosen, also in ALBEF's list.
        image_root: a folder to which paths are relative (the source's own if None), or parquet files or a folder of
            them with `image_id` and `image`, whatever their splits.
        annotations: the RefCOCO folder of ALBEF's list; its folder `refcoco+`, if it has one, if None.
        columns: what the source calls a column of the records, where the name is not a usual one.

    Raises:
        DataError: naming file, row and remedy, if something is missing, a phrase is not where it is said to be, a box
            lies outside of the image, or a pickle holds more than plain data (it is not executed).
    """
    return _load(_read_phrases, PHRASE_FEATURES, source, split, image_root, annotations, columns)


def _read_phrases(source: _Source) -> Iterator[dict]:
    if os.path.exists(os.path.join(source.name, "instances.json")):
        for row in _read_refs(source.name):
            if row.need("split") in source.split_names:
                for sentence in row.need("sentences"):
                    text = {"text": sentence.get("sent", sentence.get("raw"))}
                    yield _phrases(replace(row, fields=row.fields | text), source.images, ("train2014",))
    elif os.path.isdir(os.path.join(source.name, "Sentences")):
        yield from _read_flickr_entities(source)
    else:
        refs = _refs_of(source)
        for row in source.rows():
            ref_id = row.get("ref_id")
            if refs and ref_id is not None:
                if ref_id not in refs:
                    raise row.error(
                        f"its ref_id {ref_id!r} is not in the RefCOCO folder: give its own with annotations."
                    )
                row = replace(row, fields=refs[ref_id] | row.fields)
            if ref_id is not None and source.split in ("testA", "testB"):
                if not refs:
                    raise row.error(f"it does not tell '{source.split}': give the RefCOCO folder with annotations.")
                if row.need("split") != source.split:
                    continue
            yield _phrases(row, source.images)


def _phrases(row: _Row, images: _Images, folders: tuple[str, ...] = ()) -> dict:
    """A record of a row with `phrases`, or with captions that are the phrases."""
    captions = row.need("captions")
    captions = captions if isinstance(captions, list) else [captions]
    if not all(isinstance(caption, str) for caption in captions):
        raise row.error(f"its captions are {captions!r:.80}: each must be a text.")
    width, height = row.get("width") or 0, row.get("height") or 0
    phrases = row.get("phrases")
    if phrases is None:
        same = {name: row.get(name) for name in ("types", "boxes")}
        same["phrase_id"] = row.get("ref_id")
        phrases = [
            {"caption_index": n, "start": 0, "end": len(text), **same} for n, text in enumerate(captions) if text
        ]
    checked = []
    for number, phrase in enumerate(phrases):
        inner = replace(row, fields=phrase, columns={})
        index, start, end = (inner.need(name) for name in ("caption_index", "start", "end"))
        said = inner.get("phrase")
        inside = 0 <= index < len(captions) and 0 <= start < end <= len(captions[index])
        if not inside or said not in (None, captions[index][start:end]):
            raise row.error(
                f"its phrase {number} ({said!r}) is not at characters {start} to {end} of caption {index} of "
                f"{captions!r:.200}: spans count characters from 0, the end not included."
            )
        phrase_id = inner.get("phrase_id")
        checked.append(
            {
                "caption_index": index,
                "start": start,
                "end": end,
                "types": inner.get("types") or [],
                "boxes": _within(row, inner.get("boxes") or [], width, height),
                "phrase_id": str(number if phrase_id is None else phrase_id),
            }
        )
    return images.of(row, folders=folders) | {
        "captions": captions,
        "phrases": checked,
        "proposals": _within(row, row.get("proposals") or [], width, height),
        "width": width,
        "height": height,
    }


def _within(row: _Row, boxes: list, width: int, height: int) -> list[list[float]]:
    """Boxes cut to the image, which they may leave by less than a pixel."""
    right, bottom = width or math.inf, height or math.inf
    cut = []
    for box in boxes:
        x1, y1, x2, y2 = box if len(box) == 4 else [math.nan] * 4
        if not (-1 < x1 <= x2 < right + 1 and -1 < y1 <= y2 < bottom + 1):
            size = f"the image of {width} x {height}" if width and height else "an image"
            raise row.error(f"its box {list(box)} lies outside of {size}: give x1, y1, x2, y2 in pixels of the file.")
        cut.append([max(x1, 0), max(y1, 0), min(x2, right), min(y2, bottom)])
    return cut


class _PlainUnpickler(pickle.Unpickler):
    """Reads lists, dictionaries, texts and numbers; whatever would call code is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, but only plain data is read")


def _read_refs(folder: str) -> Iterator[_Row]:
    """The refs of a RefCOCO folder as rows, joined with their image, box and proposals."""
    found = sorted(glob.glob(os.path.join(glob.escape(folder), "refs(*).p")))
    if not found:
        raise DataError(f"{folder} has no refs(unc).p: give the folder of RefCOCO or RefCOCO+ as it is distributed.")
    file = next((name for name in found if name.endswith("refs(unc).p")), found[0])
    try:
        with open(file, "rb") as opened:
            refs = _PlainUnpickler(opened, encoding="latin1").load()  # written by Python 2
    except (pickle.UnpicklingError, EOFError, ValueError, LookupError, AttributeError, TypeError, OSError) as error:
        raise DataError(f"{file} could not be read: {error}; download it again from its authors.") from error
    if not isinstance(refs, list) or not all(isinstance(ref, dict) for ref in refs):
        raise DataError(f"{file} is not a list of refs: download it again from its authors.")
    instances = os.path.join(folder, "instances.json")
    content = _read_object(instances)
    boxes, images, categories = (
        {
            row.need("id"): row
            for row in (_Row(instances, n, item, {}) for n, item in enumerate(content.get(name, ()), 1))
        }
        for name in ("annotations", "images", "categories")
    )
    detected = os.path.join(folder, "dets.json")
    proposals = _read_object(detected) if os.path.exists(detected) else {}
    for number, ref in enumerate(refs, 1):
        row = _Row(file, number, ref, {})
        box, image = boxes.get(row.need("ann_id")), images.get(row.need("image_id"))
        if box is None or image is None:
            raise row.error(f"its ann_id {ref['ann_id']} or image_id {ref['image_id']} is not in {instances}.")
        category = categories.get(box.get("category_id"))
        joined = {
            "image": image.need("file_name"),
            "width": image.need("width"),
            "height": image.need("height"),
            "boxes": [_corners(box.need("bbox"))],
            "types": [] if category is None else [category.need("name")],
            "proposals": [_corners(candidate) for candidate in proposals.get(str(ref["image_id"]), ())],
        }
        yield replace(row, fields=ref | joined)


def _refs_of(source: _Source) -> dict[int, dict]:
    """The refs to which an ALBEF-style list belongs, by ref id; none if no folder of them is at hand."""
    beside = os.path.join(os.path.dirname(source.name), "refcoco+")
    folders = source.annotations or ([beside] if os.path.isfile(source.name) and os.path.isdir(beside) else [])
    return {row.need("ref_id"): row.fields for folder in folders for row in _read_refs(folder)}


def _corners(box: list[float]) -> list[float]:
    """(x1, y1, x2, y2) of (x, y, width, height, ...)."""
    x, y, width, height = box[:4]
    return [x, y, x + width, y + height]


def _read_object(file: str) -> dict:
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{file} could not be read: {error}.") from error
    if not isinstance(content, dict):
        raise DataError(f"{file} is not a JSON object: download it again from its authors.")
    return content


_ENTITY = re.compile(r"\[/EN#(\d+)((?:/\w+)+) ([^\]]+)\]")


def _read_flickr_entities(source: _Source) -> Iterator[dict]:
    folder = Path(source.name)
    lists = [folder / f"{name}.txt" for name in source.split_names]
    chosen = next((file for file in lists if file.exists()), None)
    if chosen is None:
        raise DataError(f"{folder} has no {lists[0].name}: a split of Flickr30k Entities is a list of image ids there.")
    for place, image_id in enumerate(chosen.read_text(encoding="utf-8").split(), 1):
        width, height, boxes = _read_chains(folder / "Annotations" / f"{image_id}.xml")
        file = folder / "Sentences" / f"{image_id}.txt"
        if not file.exists():
            raise DataError(f"{file} is missing: {chosen.name} names it; extract all of Flickr30k Entities.")
        captions: list[str] = []
        phrases: list[dict] = []
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            caption, spans = _read_sentence(line.strip())
            if "[/EN" in caption:
                raise DataError(f"{file}, row {number}: a phrase is not as '[/EN#12/people Two boys]': {caption!r}.")
            phrases += [
                span | {"caption_index": len(captions), "boxes": boxes.get(span["phrase_id"])} for span in spans
            ]
            captions.append(caption)
        fields = {"image_id": image_id, "captions": captions, "phrases": phrases, "width": width, "height": height}
        yield _phrases(_Row(str(chosen), place, fields, {}), source.images)


def _read_sentence(line: str) -> tuple[str, list[dict]]:
    """The caption of a line of Flickr30k Entities, and the phrases in it."""
    caption, phrases, done = "", [], 0
    for match in _ENTITY.finditer(line):
        chain, types, words = match.groups()
        caption += line[done : match.start()]
        span = {"start": len(caption), "end": len(caption) + len(words), "phrase": words}
        phrases.append(span | {"types": types[1:].split("/"), "phrase_id": chain})
        caption += words
        done = match.end()
    return caption + line[done:], phrases


def _read_chains(file: Path) -> tuple[int, int, dict[str, list]]:
    """Width and height of an image of Flickr30k Entities, and the boxes of its chains by their ids."""
    boxes: dict[str, list] = {}
    try:
        root = ElementTree.parse(file).getroot()
        width, height = (int(root.findtext(f"size/{side}", "")) for side in ("width", "height"))
        for item in root.iter("object"):
            corners = item.find("bndbox")
            if corners is None:  # the whole scene, or not in sight
                continue
            x1, y1, x2, y2 = (float(corners.findtext(name, "")) for name in ("xmin", "ymin", "xmax", "ymax"))
            for name in item.iter("name"):  # one object may belong to several chains
                boxes.setdefault(name.text or "", []).append([x1 - 1, y1 - 1, x2, y2])
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise DataError(f"{file} could not be read: {error}; extract all of Flickr30k Entities.") from error
    return width, height, boxes
