"""Statements that an image entails, contradicts, or leaves open: SNLI-VE."""

from collections.abc import Iterator

import datasets
from datasets import Dataset

from ...models.modeling_tcl_tasks import ENTAILMENT_LABELS
from ..pairs import FEATURES
from .rows import TEXT, Source, load_records, logger

ENTAILMENT_FEATURES = datasets.Features({**FEATURES, "label": TEXT, "pair_id": TEXT})


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
    return load_records(_read_entailment, ENTAILMENT_FEATURES, source, split, image_root, None, columns)


def _read_entailment(source: Source) -> Iterator[dict]:
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
