"""Statements that an image entails, contradicts, or leaves open: SNLI-VE."""

import logging
from collections.abc import Iterator

import datasets
from datasets import Dataset

from ...models.modeling_tcl_tasks import ENTAILMENT_LABELS
from ..pairs import FEATURES
from .rows import TEXT
from .sources import Source, load_records

logger = logging.getLogger(__name__)

ENTAILMENT_FEATURES = datasets.Features({**FEATURES, "label": TEXT, "pair_id": TEXT})


def load_entailment(
    source: str | list[str],
    split: str = "train",
    *,
    image_root: str | None = None,
    allow_outside_root: bool = False,
) -> Dataset:
    """Load hypotheses about images as records `image`, `image_id`, `captions` (the hypothesis), `label`, `pair_id`.

    `label` is "entailment", "neutral" or "contradiction"; `pair_id` is None where a file does not have it. Rows
    without a gold label ("-") are left out, and a warning gives their number.

    Args:
        source: one or several of SNLI-VE's JSON lines; ALBEF's JSON list or other JSON lines of `image` or `image_id`,
            `sentence` and `label` (".jpg" is added to a name without an ending); a `datasets` source of such columns.
        split, image_root, allow_outside_root: as in `load_records`.

    Raises:
        DataError: naming file, row and remedy, if a field or an image is missing or a label is not one of the three.
    """
    return load_records(
        _read_entailment, ENTAILMENT_FEATURES, source, split, image_root, allow_outside_root=allow_outside_root
    )


def _read_entailment(source: Source) -> Iterator[dict]:
    unlabelled = 0
    for row in source.rows():
        label = row.require("label")
        name = str(label).strip().lower()
        if name == "-":
            unlabelled += 1
            continue
        if name not in ENTAILMENT_LABELS:
            raise row.error(f"its label is {label!r}: it must be one of {', '.join(ENTAILMENT_LABELS)}.")
        yield source.images.image_and_id(row) | {
            "captions": [row.text("captions")],
            "label": name,
            "pair_id": row.text_or_none("pair_id"),
        }
    if unlabelled:
        logger.warning("%s: %d rows without a gold label ('-') were left out.", source.name, unlabelled)
