"""Rows of JSON files: ALBEF-style lists of images with captions, Karpathy's splits, and COCO's captions."""

import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from .records import DataError

_PIECE = 2**20  # characters that are read at once
_LONGEST_ROW = 2**26  # characters; if these do not hold a complete row, the file is broken
_WHITE_SPACE = re.compile(r"\s*")


def json_rows(stream: TextIO, split_names: Sequence[str], file: str) -> Iterator[dict]:
    """The objects of a JSON list, one by one, or the images of some of Karpathy's splits, or COCO's captions.

    Args:
        stream: the text of the file.
        split_names: which of Karpathy's splits to read; lists have no splits.
        file: the file's name, for errors.

    Raises:
        DataError: if the file has none of these forms.
    """
    pieces = _Pieces(stream)
    if pieces.peek() == "[":
        yield from _list_rows(pieces, file)
    else:
        yield from _object_rows(pieces, split_names, file)


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
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file} is not a JSON list: row {number}: {error}.") from error


def _object_rows(pieces: _Pieces, split_names: Sequence[str], file: str) -> Iterator[dict]:
    """The images of some of Karpathy's splits, or of COCO's captions, as rows of an ALBEF-style list."""
    try:
        content = json.loads(pieces.text + pieces.stream.read())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not a JSON list: {error}.") from error
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise DataError(f"{file} is not a list of objects with 'image' and 'caption'.")
    if isinstance(content.get("annotations"), list):
        yield from _coco_rows(content, file)
        return
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


def _coco_rows(content: dict, file: str) -> Iterator[dict]:
    """The images of COCO's `captions_*.json` with all their captions, as rows of an ALBEF-style list."""
    captions: dict[Any, list[str]] = {}
    try:
        for annotation in content["annotations"]:
            captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
        for image in content["images"]:
            yield {"image": image["file_name"], "caption": captions.get(image["id"], []), "image_id": image["id"]}
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{file} is not as COCO's captions ({type(error).__name__}: {error}): 'images' need 'id' and 'file_name', "
            "'annotations' need 'image_id' and 'caption'."
        ) from error
