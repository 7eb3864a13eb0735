"""Records of JSON files: ALBEF-style lists of images with captions, and Karpathy's splits."""

import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import TextIO

from .captions import caption_texts
from .records import DataError

_PIECE = 2**20  # characters that are read at once
_LONGEST_ROW = 2**26  # characters; if these do not hold a complete row, the file is broken
_WHITE_SPACE = re.compile(r"\s*")


def json_records(
    files: Sequence[str],
    split_names: Sequence[str],
    image_root: str | None,
    stamps: Sequence[tuple[int, int]] = (),
) -> Iterator[dict]:
    """The records of JSON lists, one after another.

    A row without an image or a caption stays in: it is skipped and listed when a collator comes to it.

    Args:
        files: paths of the files.
        split_names: which of Karpathy's splits to read; lists have no splits.
        image_root: folder that the images' paths start from; None for the folder of each file.
        stamps: sizes and times of the files. They are not read: `datasets` makes the name of its cache of them.

    Raises:
        DataError: if a file is neither such a list nor has Karpathy's format.
    """
    for file in files:
        root = image_root if image_root is not None else os.path.dirname(file)
        for number, row in enumerate(_rows(file, split_names)):
            path = row.get("image")
            yield {
                "image": {"bytes": None, "path": os.path.join(root, path)} if path else None,
                "captions": caption_texts(row.get("caption")),
                "image_id": str(row.get("image_id", path or f"{file}:{number}")),
            }


def _rows(file: str, split_names: Sequence[str]) -> Iterator[dict]:
    """The objects of a JSON list, one by one, or the images of some of Karpathy's splits.

    Bytes that are not UTF-8 become U+FFFD, so that one bad caption does not spoil the whole file.
    """
    with open(file, encoding="utf-8-sig", errors="replace") as stream:
        pieces = _Pieces(stream)
        if pieces.peek() == "[":
            yield from _list_rows(pieces, file)
        else:
            yield from _karpathy_rows(pieces, split_names, file)


class _Pieces:
    """The text of a file, read piece by piece, and a position in the piece at hand."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.text, self.position = "", 0

    def peek(self) -> str:
        """Move to the next character that is not white space, and return it; empty at the end of the file."""
        while True:
            self.position = _WHITE_SPACE.match(self.text, self.position).end()
            if self.position < len(self.text):
                return self.text[self.position]
            self.text, self.position = self.stream.read(_PIECE), 0
            if not self.text:
                return ""

    def decode_object(self) -> dict:
        """Decode the object that begins at the position, and move behind it.

        Raises:
            json.JSONDecodeError: if the text is not JSON.
        """
        decoder = json.JSONDecoder()
        while True:
            try:
                decoded, self.position = decoder.raw_decode(self.text, self.position)
                return decoded
            except json.JSONDecodeError:  # The object may only be incomplete, because the piece ends within it.
                more = self.stream.read(max(_PIECE, len(self.text) - self.position))
                self.text, self.position = self.text[self.position :] + more, 0
                if not more or len(self.text) > _LONGEST_ROW:
                    raise


def _list_rows(pieces: _Pieces, file: str) -> Iterator[dict]:
    """The objects of a list whose opening bracket comes next, one by one."""
    pieces.position += 1
    for number in itertools.count(1):
        character = pieces.peek()
        if character == "]":
            return
        if number > 1:
            if character != ",":
                raise DataError(f"{file} is not a JSON list: after row {number - 1} a comma or the end is missing.")
            pieces.position += 1
            character = pieces.peek()
        if character and character != "{":
            raise DataError(f"{file} is not a list of objects with 'image' and 'caption': see row {number}.")
        try:
            yield pieces.decode_object()
        except json.JSONDecodeError as error:
            raise DataError(f"{file} is not a JSON list: row {number}: {error}.") from error


def _karpathy_rows(pieces: _Pieces, split_names: Sequence[str], file: str) -> Iterator[dict]:
    """The images of some of Karpathy's splits, as rows of an ALBEF-style list."""
    try:
        content = json.loads(pieces.text + pieces.stream.read())
    except json.JSONDecodeError as error:
        raise DataError(f"{file} is not a JSON list: {error}.") from error
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise DataError(f"{file} is not a list of objects with 'image' and 'caption'.")
    for number, image in enumerate(content["images"], 1):
        try:
            if image["split"] in split_names:
                path = os.path.join(image.get("filepath", ""), image["filename"])
                captions = [sentence["raw"] for sentence in image["sentences"]]
                image_id = image.get("cocoid", image.get("imgid", path))
                yield {"image": path, "caption": captions, "image_id": image_id}
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{file}, image {number}, is not as in Karpathy's splits "
                f"({type(error).__name__}: {error}): it needs 'filename', 'split' and 'sentences' with 'raw'."
            ) from error
