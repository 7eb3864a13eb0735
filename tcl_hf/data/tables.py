"""Records of lists of images and texts: CSV, TSV, JSON lines, JSON lists, and annotation files of public data sets."""

import base64
import binascii
import csv
import io
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

import fsspec

from ..models.tokenization_tcl import encodable
from .captions import caption_texts
from .json_lists import json_rows
from .records import (
    ADDRESS,
    ID_COLUMNS,
    PATH_COLUMNS,
    TEXT_COLUMNS,
    URL_COLUMNS,
    DataError,
    check_addresses,
    find_column,
    only_addresses,
    refuse_outside,
)
from .roots import OUTSIDE, below, is_remote
from .sources import image_beside

_DELIMITERS = ("\t", "|", ";", ",")
# A line of the captions of Flickr8k and Flickr30k.
_TOKEN_LINE = re.compile(r"(?P<image>[^\t]+?)#(?P<number>\d+)\t(?P<caption>.*)")
# The beginning of JPEG, PNG, GIF and WebP in base64, which some tables hold in place of a path.
_BASE64 = re.compile(r"data:image/[\w.+-]+;base64,|/9j/|iVBORw0KGgo|R0lGOD|UklGR")
_LONGEST_PATH = 1024  # characters; a shorter text is a path, whatever it begins with
_LONGEST_FIELD = 2**26  # characters
_TRIED_ROWS = 50  # to learn which columns there are, and in which folder the images are


def list_records(
    files: Sequence[str],
    split_names: Sequence[str],
    image_root: str | None,
    image_column: str | None = None,
    caption_column: str | None = None,
    allow_outside_root: bool = False,
    stamps: Sequence[tuple] = (),
) -> Iterator[dict]:
    """The records of lists, one after another.

    A row without an image or a caption, and a line that is not JSON, stays in: it is skipped and listed when a collator
    comes to it. Rows of one image have the same `image_id`, that of their column or else their path.

    Args:
        files: paths or addresses of the files.
        split_names: which of Karpathy's splits to read; other lists have no splits.
        image_root: folder that the images' paths start from; None for the folder of each file, or a folder in it.
        image_column, caption_column: names of the columns, or of the keys; None for the usual ones.
        allow_outside_root: see `roots.below`.
        stamps: sizes and times of the files. They are not read: `datasets` makes the name of its cache of them.

    Raises:
        DataError: if a file has no such columns, has addresses in place of images, or names images outside of the root.
    """
    for file in files:
        images = _Images(file, image_root, allow_outside_root)
        image_names = (image_column,) if image_column is not None else PATH_COLUMNS
        caption_names = (caption_column,) if caption_column is not None else TEXT_COLUMNS
        rows = map(_in_lower_case, _rows(file, split_names, image_column, caption_column))
        first = list(itertools.islice(rows, _TRIED_ROWS))
        if first:
            _check_columns(file, list({name: None for row in first for name in row}), image_column, caption_column)
            opened = [images.open(_from_base64(_first(row, image_names))) for row in first]
            refuse_outside([image["path"] for image in opened if image], file, images.root)
        for number, row in enumerate(itertools.chain(first, rows)):
            image, caption = _first(row, image_names), _first(row, caption_names)
            image_id = _first(row, ID_COLUMNS)
            image = _from_base64(image)
            path = image.get("path") if isinstance(image, dict) else image
            if isinstance(path, bytes):
                path = None
            yield {
                "image": images.open(image),
                "captions": caption_texts(caption),
                "image_id": encodable(str(image_id if image_id is not None else path or f"{file}:{number}")),
            }


def column_names(
    file: str, split_names: Sequence[str], image_column: str | None = None, caption_column: str | None = None
) -> list[str]:
    """The names of the columns, or of the keys, in the first rows of a list.

    Args:
        file: path or address of the list.
        split_names: names of the split that is wanted, for lists that hold several.
        image_column, caption_column: names that the caller gave, for lists whose first line is not one of names.
    """
    rows = itertools.islice(_rows(file, split_names, image_column, caption_column), _TRIED_ROWS)
    return list({str(name): None for row in rows for name in row})


def _rows(
    file: str, split_names: Sequence[str], image_column: str | None, caption_column: str | None
) -> Iterator[dict]:
    """The rows of a list as dictionaries, by the end of its name."""
    end = os.path.splitext(file)[1].lower()
    with open_text(file) as stream:
        if end == ".json":
            yield from json_rows(stream, split_names, file)
        elif end in (".jsonl", ".ndjson"):
            yield from _json_lines(stream)
        elif end == ".txt" and not is_remote(file) and (image := image_beside(file)):
            yield {"image": os.path.basename(image), "caption": stream.read()}
        else:
            yield from _csv_rows(stream, file, image_column, caption_column)


@contextmanager
def open_text(file: str) -> Iterator[TextIO]:
    """Open a text file, or an address; a byte-order mark is passed over, and bytes that are not UTF-8 become U+FFFD."""
    how: dict[str, Any] = {"encoding": "utf-8-sig", "errors": "replace", "newline": ""}
    if is_remote(file):
        with fsspec.open(file, "rt", **how) as stream:
            yield stream
    else:
        with open(file, **how) as stream:
            yield stream


def _json_lines(stream: TextIO) -> Iterator[dict]:
    for line in stream:
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield row if isinstance(row, dict) else {"image": None, "caption": None}


def _csv_rows(stream: TextIO, file: str, image_column: str | None, caption_column: str | None) -> Iterator[dict]:
    """The rows of a table with a header, whatever separates its columns, or of a `.token` file of Flickr."""
    first = stream.readline().rstrip("\r\n")
    if _TOKEN_LINE.fullmatch(first):
        for line in (first, *stream):
            found = _TOKEN_LINE.fullmatch(line.rstrip("\r\n"))
            if found:
                yield {"image": found["image"], "caption": found["caption"]}
        return
    if ADDRESS.search(first):
        raise only_addresses(file, "a list without a header")
    delimiter, names = _header(first, image_column, caption_column)
    csv.field_size_limit(_LONGEST_FIELD)
    lines = (line.replace("\0", "") for line in stream)
    # Between tabs and bars a quotation mark is part of the text, such as an inch mark.
    quoting: Any = csv.QUOTE_MINIMAL if delimiter in (",", ";") else csv.QUOTE_NONE
    try:
        for fields in csv.reader(lines, delimiter=delimiter, quoting=quoting):
            if fields:
                yield dict(zip(names, (field.strip() for field in fields), strict=False))
    except csv.Error as error:
        raise DataError(f"{file} is not a table that can be read: {error}.") from error


def _header(line: str, image_column: str | None, caption_column: str | None) -> tuple[str, list[str]]:
    """The separator of columns that shows most of those that are needed, and the names of all columns."""
    wanted_images = (image_column,) if image_column is not None else (*PATH_COLUMNS, *URL_COLUMNS)
    wanted_texts = (caption_column,) if caption_column is not None else TEXT_COLUMNS

    def names_by(delimiter: str) -> list[str]:
        return [name.strip(' "') for name in next(csv.reader(io.StringIO(line), delimiter=delimiter), [])]

    def score(delimiter: str) -> tuple[int, int]:
        names = {name.lower() for name in names_by(delimiter)}
        found = [any(str(name).lower() in names for name in wanted) for wanted in (wanted_images, wanted_texts)]
        return sum(found), len(names)

    best = max(_DELIMITERS, key=score)
    return best, names_by(best)


def _check_columns(file: str, columns: list[str], image_column: str | None, caption_column: str | None) -> None:
    """Refuse a list whose first rows have no image or no caption."""
    check_addresses(columns, image_column, file)
    find_column(columns, image_column, PATH_COLUMNS, "image", file)
    find_column(columns, caption_column, TEXT_COLUMNS, "caption", file)


def _in_lower_case(row: dict) -> dict[str, Any]:
    """A row with its names in lower case and without space around them."""
    return {str(name).strip().lower(): value for name, value in row.items()}


def _first(row: dict[str, Any], names: Sequence[str]) -> Any:
    """The value of the first name that a row has, and that is not empty."""
    for name in names:
        value = row.get(str(name).lower())
        if value is not None and value != "":
            return value
    return None


def _from_base64(image: Any) -> Any:
    """The bytes of an image in base64; anything else as it is."""
    if not isinstance(image, str) or not _BASE64.match(image):
        return image
    if len(image) <= _LONGEST_PATH and not image.startswith("data:"):
        return image
    try:
        return base64.b64decode(image.partition(",")[2] if image.startswith("data:") else image)
    except binascii.Error:
        return None  # It is skipped and listed, like any image that is broken.


class _Images:
    """Finds the images of a list: below a root, or below one of the folders beside the list."""

    def __init__(self, file: str, image_root: str | None, allow_outside_root: bool):
        self.file, self.image_root, self.allow_outside_root = file, image_root, allow_outside_root
        self.root = image_root if image_root is not None else os.path.dirname(file)
        self.folder = self.root  # in the root, from which paths start
        self.tried, self.is_found = 0, False
        self.foreign = ""  # the beginning of absolute paths, which the root stands for

    def open(self, image: Any) -> dict[str, Any] | None:
        """The image of a row as the image of a record.

        Raises:
            DataError: if it is an address.
        """
        if isinstance(image, dict):
            if isinstance(image.get("bytes"), bytes):
                content, path = image["bytes"], image.get("path")
                return {"bytes": content, "path": None if path is None else encodable(str(path))}
            image = image.get("path")
        if isinstance(image, bytes):
            return {"bytes": image, "path": None}
        if not isinstance(image, str) or not image or "\0" in image:
            return None
        image = encodable(image)
        if ADDRESS.match(image):
            raise only_addresses(self.file, image[:80])
        if "\\" in image and not os.path.exists(os.path.join(self.root, image)):
            image = image.replace("\\", "/")  # a list from Windows
        if not self.is_found and self.tried < _TRIED_ROWS and not is_remote(self.root):
            self._look_for(image)
        return {"bytes": None, "path": self._path_of(image)}

    def _path_of(self, image: str) -> str:
        if self.foreign and image.startswith(self.foreign):
            image = image[len(self.foreign) :]
        return below(self.root, image, self.allow_outside_root, self.folder)

    def _look_for(self, image: str) -> None:
        """Let paths start from the folder beside the list in which an image is, unless they start from the root.

        Of an absolute path outside of the root, because the list comes from another machine, the longest end that is
        found counts.
        """
        self.tried += 1
        if _is_there(self._path_of(image)):
            self.is_found = True
            return
        places = [self.root or ".", *_folders_in(self.root or ".")]
        starts = [0] if not os.path.isabs(image) else [mark.end() for mark in re.finditer("/+", image)]
        for start in starts:
            for place in places:
                if _is_there(below(self.root, image[start:], self.allow_outside_root, place)):
                    self.folder, self.foreign, self.is_found = place, image[:start], True
                    return


def _is_there(path: str) -> bool:
    return not path.startswith(OUTSIDE) and os.path.exists(path)


def _folders_in(folder: str) -> list[str]:
    """The folders in a folder, and those in them."""
    try:
        found = sorted(entry.path for entry in os.scandir(folder) if entry.is_dir())
        return found + [entry.path for one in found for entry in os.scandir(one) if entry.is_dir()]
    except OSError:
        return []
