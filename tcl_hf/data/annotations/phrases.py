"""Phrases and their boxes: RefCOCO+ and Flickr30k Entities."""

import glob
import json
import math
import os
import pickle
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import datasets
from datasets import Dataset

from ..pairs import FEATURES, DataError
from .rows import TEXT, Images, Row, Source, load_records

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
    return load_records(_read_phrases, PHRASE_FEATURES, source, split, image_root, annotations, columns)


def _read_phrases(source: Source) -> Iterator[dict]:
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


def _phrases(row: Row, images: Images, folders: tuple[str, ...] = ()) -> dict:
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


def _within(row: Row, boxes: list, width: int, height: int) -> list[list[float]]:
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


def _read_refs(folder: str) -> Iterator[Row]:
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
            for row in (Row(instances, n, item, {}) for n, item in enumerate(content.get(name, ()), 1))
        }
        for name in ("annotations", "images", "categories")
    )
    detected = os.path.join(folder, "dets.json")
    proposals = _read_object(detected) if os.path.exists(detected) else {}
    for number, ref in enumerate(refs, 1):
        row = Row(file, number, ref, {})
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


def _refs_of(source: Source) -> dict[int, dict]:
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


def _read_flickr_entities(source: Source) -> Iterator[dict]:
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
        yield _phrases(Row(str(chosen), place, fields, {}), source.images)


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
