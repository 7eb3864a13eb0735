"""One row of an annotation file: its fields under any of their usual names, and its place for error messages."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import datasets

from ...models.tokenization_tcl import encodable
from ..pairs import IMAGE_COLUMNS, DataError

# The columns of records, and the names that annotation files give them.
COLUMN_NAMES = {
    "image": IMAGE_COLUMNS,
    "image_0": ("image_0", "left_image"),
    "image_1": ("image_1", "right_image"),
    "images": ("images",),
    "image_id": ("image_id", "Flickr30K_ID", "Flikr30kID", "Flickr30kID"),  # SNLI-VE has had three spellings
    "captions": ("captions", "caption", "sentence2", "hypothesis", "sentence", "text"),
    "label": ("gold_label", "label"),
    "pair_id": ("pair_id", "pairID", "identifier"),
    "answers": ("answers", "answer"),
}

TEXT = datasets.Value("string")


@dataclass(frozen=True)
class Row:
    """One row of an annotation file or table.

    Args:
        source: the file or table, for error messages.
        number: the row's number in it, counted from 1.
        fields: the row's values under the names of the source.
    """

    source: str
    number: int
    fields: dict

    def error(self, problem: str) -> DataError:
        """Return an error that names the source and the row; the caller raises it."""
        return DataError(f"{self.source}, row {self.number}: {problem}")

    def joined(self, others: dict[str, dict], column: str, place: str) -> Self:
        """Return the row with the further fields that `others` has for its value of `column`.

        Raises:
            DataError: if `others` does not have that value; it names the `place` of the others.
        """
        key = str(self.require(column))
        if key not in others:
            raise self.error(f"its {column} '{key}' is not in {place}: give the annotations that belong to these rows.")
        return replace(self, fields=others[key] | self.fields)

    def missing(self, column: str) -> DataError:
        """The error for a column that the row lacks."""
        names = ", ".join(COLUMN_NAMES.get(column, (column,)))
        return self.error(
            f"it has no '{column}' (looked for {names} among {', '.join(self.fields)}): add it, or rename its field."
        )

    def get(self, column: str) -> Any:
        """Return the field for a column of the record; None if it is missing or null."""
        names = COLUMN_NAMES.get(column, (column,))
        return next((self.fields[name] for name in names if self.fields.get(name) is not None), None)

    def require(self, column: str) -> Any:
        """The value of a column.

        Raises:
            DataError: if the row lacks it.
        """
        value = self.get(column)
        if value is None:
            raise self.missing(column)
        return value

    def text(self, column: str) -> str:
        """The text of a column.

        Raises:
            DataError: if the row lacks it, or it is not a text.
        """
        value = self.require(column)
        if not isinstance(value, str):
            raise self.error(f"its '{column}' is {value!r}: it must be a text.")
        return value

    def text_or_none(self, column: str) -> str | None:
        """The text of a column; None if the row lacks it."""
        value = self.get(column)
        return None if value is None else str(value)


# JSON


def _decoded(text: str) -> Any:
    """The value of a JSON text, whose texts can be encoded as UTF-8, as tables need."""
    value = json.loads(text)
    return _encodable(value) if "\\ud" in text.lower() else value  # Halves of characters come from such escapes alone.


def _encodable(value: Any) -> Any:
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, list):
        return [_encodable(one) for one in value]
    if isinstance(value, dict):
        return {encodable(name): _encodable(one) for name, one in value.items()}
    return value


def read_json(file: str, kind: str) -> Any:
    """Read what a JSON file holds.

    Raises:
        DataError: if it cannot be read; it names the `kind` of file that was expected.
    """
    try:
        return _decoded(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} could not be read as {kind}: {error}; repair it or download it again.") from error


def read_json_rows(file: str) -> Iterator[Row]:
    """Yield the rows of a JSON list, of JSON lines, or of the list in a file of VQA v2.

    Texts beside that list, such as "data_subtype", become fields of every row.

    Raises:
        DataError: if the file is neither, or one of its rows is not an object.
    """
    shared: dict[str, str] = {}
    try:
        text = Path(file).read_text(encoding="utf-8")
        content = _decoded(text)
    except (OSError, ValueError, RecursionError) as error:
        if not str(error).startswith("Extra data"):  # json raises this at the second of several lines
            raise DataError(f"{file} could not be read as a JSON list or JSON lines: {error}.") from error
        rows: Iterable[tuple[int, Any]] = _read_json_lines(file, text)
    else:
        if isinstance(content, dict):
            shared = {name: value for name, value in content.items() if isinstance(value, str)}
            content = next((content[name] for name in ("questions", "annotations") if name in content), [content])
        if not isinstance(content, list):
            raise DataError(f"{file} does not hold a list of rows: give a JSON list or JSON lines.")
        rows = enumerate(content, 1)
    for number, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{file}, row {number}: it is {row!r:.60}, not an object with named fields.")
        yield Row(file, number, shared | row)


def _read_json_lines(file: str, text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, _decoded(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{file}, row {number}: this line is not JSON: {error}.") from error
