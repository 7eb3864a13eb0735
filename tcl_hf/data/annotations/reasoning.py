"""Statements about two images, true or false: NLVR2."""

import os
from collections.abc import Iterator

import datasets
from datasets import Dataset

from ...models.modeling_tcl_tasks import REASONING_LABELS
from ..pairs import FEATURES
from .images import image_stem
from .rows import TEXT, Row
from .sources import Source, load_records

REASONING_FEATURES = datasets.Features(
    {
        "images": datasets.List(FEATURES["image"]),
        "captions": FEATURES["captions"],
        "image_id": TEXT,
        "label": TEXT,
        "pair_id": TEXT,
    }
)


def load_reasoning(
    source: str | list[str],
    split: str = "train",
    *,
    image_root: str | None = None,
    allow_outside_root: bool = False,
) -> Dataset:
    """Load sentences about two images as records `images`, `image_id` (of the left), `captions`, `label`, `pair_id`.

    `label` is "True" or "False"; `pair_id` is NLVR2's identifier, None where a file does not have it.

    Args:
        source: one or several of
            NLVR2's JSON lines. Images are `dev-1-2-img0.png` and `dev-1-2-img1.png`, in training under their
            "directory"; all are in the folder `images/train`, `dev` or `test1` of `image_root` if it has one,
            otherwise in `image_root` itself;
            ALBEF's JSON list of `sentence`, `label` and `images`, two paths;
            a `datasets` source with `image_0` and `image_1`, or `images`.
        split, image_root, allow_outside_root: as in `load_records`.

    Raises:
        DataError: naming file, row and remedy, if a field or an image is missing or a label is not one of the two.
    """
    return load_records(
        _read_reasoning, REASONING_FEATURES, source, split, image_root, allow_outside_root=allow_outside_root
    )


def _read_reasoning(source: Source) -> Iterator[dict]:
    for row in source.rows():
        label = str(row.require("label")).strip().capitalize()
        if label not in REASONING_LABELS:
            raise row.error(f"its label is {row.get('label')!r}: it must be one of {', '.join(REASONING_LABELS)}.")
        images, folders = _two_images(row)
        image_id = row.text_or_none("image_id")
        if image_id is None:
            image_id = str(row.number - 1) if isinstance(images[0], dict) else image_stem(images[0])
        yield {
            "images": [source.images.find(row, image, folders=folders) for image in images],
            "captions": [row.text("captions")],
            "image_id": image_id,
            "label": label,
            "pair_id": row.text_or_none("pair_id"),
        }


def _two_images(row: Row) -> tuple[list, tuple[str, ...]]:
    """The names of a row's two images, or references to them, and the folders that may hold the files."""
    images = row.get("images")
    if isinstance(images, dict):  # one reference to a table, whose row holds both
        return [images, images], ()
    if images is not None:
        if not isinstance(images, list) or len(images) != 2 or not all(isinstance(name, str) for name in images):
            raise row.error(f"its images are {images!r:.80}: there must be two paths.")
        return images, ()
    if row.get("image_0") is not None:
        return [row.get("image_0"), row.require("image_1")], ()
    if row.get("pair_id") is None:
        raise row.missing("images")
    return _nlvr2_images(row)


def _nlvr2_images(row: Row) -> tuple[list[str], tuple[str, ...]]:
    """NLVR2's files of an identifier such as "dev-1-2-0" (the last number is that of the sentence), and folders."""
    pair, _, _ = row.text("pair_id").rpartition("-")
    split, directory = pair.partition("-")[0], row.get("directory")
    names = [os.path.join("" if directory is None else str(directory), f"{pair}-img{side}.png") for side in (0, 1)]
    return names, (f"images/{split}", split)
