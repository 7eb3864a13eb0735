"""The files of RefCOCO and RefCOCO+: rows with the image, the box and the proposals of each ref.

A "ref" is one object of an image with the expressions that refer to it.
"""

import glob
import os
import pickle
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..pairs import DataError
from .rows import Row, read_json
from .sources import Source

IMAGE_FOLDERS = ("train2014",)  # all images are COCO's of this part


def read_refcoco(source: Source) -> Iterator[Row]:
    """Yield a row for each sentence of the refs in the split of a RefCOCO or RefCOCO+ folder.

    Raises:
        DataError: if a file of the folder is missing or broken.
    """
    for row in _read_refs(source.name):
        if row.require("split") in source.split_names:
            for sentence in row.require("sentences"):
                yield replace(row, fields=row.fields | {"text": sentence.get("sent", sentence.get("raw"))})


def join_refcoco(source: Source) -> Iterator[Row]:
    """Yield the rows of a source; rows of ALBEF's RefCOCO+ lists get the fields of the ref that `ref_id` names.

    The refs are in the folders `annotations` of the source, or in the folder `refcoco+` beside it. Without either,
    rows stay as they are.

    Raises:
        DataError: if a ref is not in the folders, or "testA" or "testB" is asked for and there is no folder.
    """
    refs = _refs_by_id(source)
    for row in source.rows():
        ref_id = row.get("ref_id")
        if ref_id is not None and refs:
            row = row.joined(refs, "ref_id", "the RefCOCO folder")
        if ref_id is not None and source.split in ("testA", "testB"):
            if not refs:
                raise row.error(
                    f"the list does not separate '{source.split}': give the RefCOCO folder with annotations."
                )
            if row.require("split") != source.split:
                continue
        yield row


def _refs_by_id(source: Source) -> dict[str, dict]:
    beside = os.path.join(os.path.dirname(source.name), "refcoco+")
    folders = source.annotations or ([beside] if os.path.isfile(source.name) and os.path.isdir(beside) else [])
    return {str(row.require("ref_id")): row.fields for folder in folders for row in _read_refs(folder)}


def _read_refs(folder: str) -> Iterator[Row]:
    """The refs of a RefCOCO folder as rows, joined with their image, box and proposals."""
    file, refs = _read_pickled_refs(folder)
    instances = os.path.join(folder, "instances.json")
    content = _read_object(instances)

    def by_id(name: str) -> dict[int, Row]:
        rows = (Row(instances, number, item) for number, item in enumerate(content.get(name, ()), 1))
        return {row.require("id"): row for row in rows}

    boxes, images, categories = by_id("annotations"), by_id("images"), by_id("categories")
    detected = os.path.join(folder, "dets.json")
    proposals = _read_object(detected) if os.path.exists(detected) else {}
    for number, ref in enumerate(refs, 1):
        row = Row(file, number, ref)
        box, image = boxes.get(row.require("ann_id")), images.get(row.require("image_id"))
        if box is None or image is None:
            raise row.error(
                f"its ann_id {ref['ann_id']} or image_id {ref['image_id']} is not in {instances}: download both again "
                "from their authors."
            )
        category = categories.get(box.get("category_id"))
        joined = {
            "image": image.require("file_name"),
            "width": image.require("width"),
            "height": image.require("height"),
            "boxes": [_to_corners(box.require("bbox"))],
            "types": [] if category is None else [category.require("name")],
            "proposals": [_to_corners(candidate) for candidate in proposals.get(str(ref["image_id"]), ())],
        }
        yield replace(row, fields=ref | joined)


class _PlainUnpickler(pickle.Unpickler):
    """Reads lists, dictionaries, texts and numbers, and refuses everything that would call code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, but only plain data is read")


def _read_pickled_refs(folder: str) -> tuple[str, list[dict]]:
    """The pickle of a RefCOCO folder that holds the refs, UNC's if there are several, and the refs in it."""
    found = sorted(glob.glob(os.path.join(glob.escape(folder), "refs(*).p")))
    if not found:
        raise DataError(f"{folder} has no refs(unc).p: give the folder of RefCOCO or RefCOCO+ as it is distributed.")
    file = next((name for name in found if name.endswith("refs(unc).p")), found[0])
    try:
        with open(file, "rb") as opened:
            refs = _PlainUnpickler(opened, encoding="latin1").load()  # Python 2 wrote it
    except (pickle.UnpicklingError, EOFError, ValueError, LookupError, AttributeError, TypeError, OSError) as error:
        raise DataError(f"{file} could not be read: {error}; download it again from its authors.") from error
    if not isinstance(refs, list) or not all(isinstance(ref, dict) for ref in refs):
        raise DataError(f"{file} is not a list of refs: download it again from its authors.")
    return file, refs


def _read_object(file: str) -> dict:
    content = read_json(file, "a JSON object")
    if not isinstance(content, dict):
        raise DataError(f"{file} is not a JSON object: download it again from its authors.")
    return content


def _to_corners(box: list[float]) -> list[float]:
    """A box of COCO (x, y, width, height, and perhaps more) as x1, y1, x2, y2."""
    x, y, width, height = box[:4]
    return [x, y, x + width, y + height]
