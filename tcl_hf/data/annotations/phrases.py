"""Phrases and their boxes, for grounding: RefCOCO, RefCOCO+ and Flickr30k Entities."""

import math
import os
from collections.abc import Iterator
from dataclasses import replace

import datasets
from datasets import Dataset

from ..pairs import FEATURES
from .flickr_entities import read_flickr_entities
from .images import ImageFinder
from .refcoco import IMAGE_FOLDERS, join_refcoco, read_refcoco
from .rows import TEXT, Row
from .sources import Source, load_records

_BOXES = datasets.List(datasets.List(datasets.Value("float32")))
_INDEX = datasets.Value("int32")
PHRASE_FEATURES = datasets.Features(
    {
        **FEATURES,
        "phrases": datasets.List(
            {
                "caption_index": _INDEX,
                "start": _INDEX,
                "end": _INDEX,
                "types": datasets.List(TEXT),
                "boxes": _BOXES,
                "phrase_id": TEXT,
            }
        ),
        "proposals": _BOXES,
        "width": _INDEX,
        "height": _INDEX,
    }
)


def load_phrases(
    source: str | list[str],
    split: str = "train",
    *,
    image_root: str | None = None,
    annotations: str | list[str] | None = None,
    allow_outside_root: bool = False,
) -> Dataset:
    """Load phrases and their boxes as records `image`, `image_id`, `captions`, `phrases`, `proposals`, size.

    A phrase has `caption_index`, its characters from `start` up to but not including `end`, `types`, `boxes` and
    `phrase_id`. Boxes are x1, y1, x2, y2: the outer edges, in pixels of the image file. `proposals` are boxes to choose
    from, if there are any. `width` and `height` are those of the image, 0 if they are not known. A box may leave the
    image by less than a pixel, and is then cut to the image.

    Args:
        source: one or several of
            a RefCOCO or RefCOCO+ folder with `refs(unc).p` (or the refs of another author), `instances.json` and
            perhaps the proposals `dets.json`. A record is a sentence; its phrase is the whole sentence and has the id
            of the ref. Images are in the folder `train2014` of `image_root` if it has one, otherwise in `image_root`
            itself;
            ALBEF's JSON list of `image`, `text` and `ref_id`; boxes and proposals come from the folder `annotations`,
            and are empty without it;
            a Flickr30k Entities folder with `Sentences`, `Annotations` and `train.txt`, `val.txt`, `test.txt`. A
            record is an image; a phrase has the id of its chain. (Pixels count from 1 in these files: a box from xmin
            to xmax becomes one from xmin - 1 to xmax);
            a `datasets` source with `image`, `captions` and `phrases`.
        split: as in `load_records`. "test" is RefCOCO's "testA" and "testB" together; either can be chosen, also for
            ALBEF's list.
        annotations: the RefCOCO folder of ALBEF's list; if None, the folder `refcoco+` beside the list, if it exists.
        image_root, allow_outside_root: as in `load_records`.

    Raises:
        DataError: naming file, row and remedy, if something is missing, a phrase is not at its characters, a box
            lies outside the image, or a pickle holds more than plain data (it is not executed).
    """
    return load_records(_read_phrases, PHRASE_FEATURES, source, split, image_root, annotations, allow_outside_root)


def _read_phrases(source: Source) -> Iterator[dict]:
    folders: tuple[str, ...] = ()
    if os.path.exists(os.path.join(source.name, "instances.json")):
        rows, folders = read_refcoco(source), IMAGE_FOLDERS
    elif os.path.isdir(os.path.join(source.name, "Sentences")):
        rows = read_flickr_entities(source)
    else:
        rows = join_refcoco(source)
    for row in rows:
        yield _phrase_record(row, source.images, folders)


def _phrase_record(row: Row, images: ImageFinder, folders: tuple[str, ...]) -> dict:
    """The record of a row with `phrases`, or of one whose whole captions are the phrases."""
    captions = row.require("captions")
    captions = captions if isinstance(captions, list) else [captions]
    if not all(isinstance(caption, str) for caption in captions):
        raise row.error(f"its captions are {captions!r:.80}: each must be a text.")
    width, height = row.get("width") or 0, row.get("height") or 0
    phrases = row.get("phrases")
    if phrases is None:
        same = {"types": row.get("types"), "boxes": row.get("boxes"), "phrase_id": row.get("ref_id")}
        phrases = [
            {"caption_index": n, "start": 0, "end": len(text), **same} for n, text in enumerate(captions) if text
        ]
    return images.image_and_id(row, folders=folders) | {
        "captions": captions,
        "phrases": [_check_phrase(row, n, phrase, captions, width, height) for n, phrase in enumerate(phrases)],
        "proposals": _cut_boxes(row, row.get("proposals") or [], width, height),
        "width": width,
        "height": height,
    }


def _check_phrase(row: Row, number: int, phrase: dict, captions: list[str], width: int, height: int) -> dict:
    """Phrase `number` of a row, if its characters and boxes are right; its words may stand in `phrase`."""
    fields = replace(row, fields=phrase)
    index, start, end = (fields.require(name) for name in ("caption_index", "start", "end"))
    words, phrase_id = fields.get("phrase"), fields.get("phrase_id")
    inside = 0 <= index < len(captions) and 0 <= start < end <= len(captions[index])
    if not inside or words not in (None, captions[index][start:end]):
        raise row.error(
            f"its phrase {number} ({words!r}) is not at characters {start} to {end} of caption {index} of "
            f"{captions!r:.200}: spans count characters from 0 and do not include the end."
        )
    return {
        "caption_index": index,
        "start": start,
        "end": end,
        "types": fields.get("types") or [],
        "boxes": _cut_boxes(row, fields.get("boxes") or [], width, height),
        "phrase_id": str(number if phrase_id is None else phrase_id),
    }


def _cut_boxes(row: Row, boxes: list, width: int, height: int) -> list[list[float]]:
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
