"""Samples that are held out in whole groups, so that those which remain show nothing of a group that is held out."""

import random
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

from datasets import Dataset, Features, concatenate_datasets

from .images import identity_of
from .records import FEATURES, DataError

CAPTIONS = FEATURES["captions"]
CUT_SEED = 1  # not that of OpenMoji's split, so that the two orders of groups are independent


def held_out_groups(groups: Sequence[str], number: float, seed: int) -> set[str]:
    """Groups of a seeded order, the first ones until they have at least `number` samples together.

    Args:
        groups: the group of each sample.
    """
    sizes = Counter(groups)
    order = sorted(sizes)
    random.Random(seed).shuffle(order)
    samples_before = accumulate(sizes[group] for group in ["", *order[:-1]])
    return {group for group, before in zip(order, samples_before, strict=True) if before < number}


def cut_off(dataset: Dataset, number: int) -> tuple[Dataset, Dataset]:
    """Split a data set into the samples to train on and those to tune on, which have at least `number` rows.

    Whole groups are cut off: rows with the same `group` where the data has that column, else rows with the same
    `image_id`. Of an image that has several rows, the second part has the first row only, as an evaluation needs.

    Raises:
        DataError: if nothing would be left to train on.
    """
    rest, cut = _rows_by_group(dataset, number)
    if not rest:
        raise DataError(
            f"tuning_images={number} leaves nothing of {len(dataset)} samples to train on: choose a smaller number."
        )
    ids = dataset.select_columns(["image_id"])["image_id"]
    first_rows: dict[str, int] = {}
    for row in cut:
        first_rows.setdefault(ids[row], row)
    return dataset.select(rest), dataset.select(list(first_rows.values()))


def _rows_by_group(dataset: Dataset, number: float) -> tuple[list[int], list[int]]:
    """The rows that stay, and at least `number` of them in whole groups, or else in whole images."""
    column = "group" if "group" in dataset.column_names else "image_id"
    groups = [str(group) for group in dataset.select_columns([column])[column]]
    chosen = held_out_groups(groups, number, CUT_SEED)
    rows: dict[bool, list[int]] = {False: [], True: []}
    for row, group in enumerate(groups):
        rows[group in chosen].append(row)
    return rows[False], rows[True]


def hold_out(dataset: Dataset, share: float) -> tuple[Dataset, Dataset]:
    """Split a data set into the samples to train on and a share of them to evaluate on, by image.

    Whole groups are held out, as in `cut_off`, with all rows of their images. The second part is empty if the share is
    less than one image.
    """
    if not {"group", "image_id"}.intersection(dataset.column_names):
        return dataset, dataset.select([])
    rest, held_out = _rows_by_group(dataset, int(share * len(dataset)))
    return (dataset.select(rest), dataset.select(held_out)) if rest else (dataset, dataset.select([]))


def one_record_per_image(dataset: Dataset) -> Dataset:
    """Join the records of an image to one with all their captions, in the place of the first.

    Records belong together if their `image_id` and their image are the same. Where an image stood in several records,
    its copies would be mistaken for one another in an evaluation.
    """
    ids = dataset.select_columns(["image_id"])["image_id"]
    repeated = {one for one, times in Counter(ids).items() if times > 1}
    if not repeated:
        return dataset
    firsts: dict[tuple[str, str], int] = {}
    captions: dict[int, list[str]] = {}
    for row, image_id in enumerate(ids):
        image = identity_of(dataset[row]["image"]) if image_id in repeated else ""
        first = firsts.setdefault((image_id, image), row)
        captions.setdefault(first, []).extend(dataset[row]["captions"] or ())
    joined = Dataset.from_dict({"captions": list(captions.values())}, features=Features(captions=CAPTIONS))
    others = dataset.select(list(captions)).remove_columns("captions")
    return concatenate_datasets([others, joined], axis=1).select_columns(dataset.column_names)
