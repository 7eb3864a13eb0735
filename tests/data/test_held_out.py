"""Groups are held out whole."""

import pytest
from datasets import Dataset
from helpers import picture

from tcl_hf.data.held_out import cut_off, held_out_groups
from tcl_hf.data.records import DataError

GROUPS = ["a", "b", "c", "b", "d", "b", "e", "e", "f"]


def rows_of(groups, ids=None, column="group") -> Dataset:
    ids = ids or [str(number) for number in range(len(groups))]
    rows = [
        {"image": picture(0), "captions": [f"text {number}"], "image_id": one, column: group}
        for number, (one, group) in enumerate(zip(ids, groups, strict=True))
    ]
    return Dataset.from_list(rows)


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_held_out_until_they_reach_the_number(seed):
    for number in range(1, len(GROUPS) + 1):
        chosen = held_out_groups(GROUPS, number, seed)
        sizes = [GROUPS.count(group) for group in chosen]
        assert sum(sizes) >= number > sum(sizes) - max(sizes)
    assert held_out_groups(GROUPS, 0, seed) == set()


def test_whole_groups_are_cut_off():
    rest, tuning = cut_off(rows_of(GROUPS), 4)
    assert len(tuning) >= 4 and len(rest) + len(tuning) == len(GROUPS)
    assert not set(rest["group"]) & set(tuning["group"])
    assert cut_off(rows_of(GROUPS), 4)[1]["image_id"] == tuning["image_id"]


def test_rows_of_one_image_stay_together_and_the_image_is_tuned_on_once():
    ids = ["x", "y", "x", "z", "y", "x"]
    rest, tuning = cut_off(rows_of(["all"] * 6, ids, column="split"), 2)
    assert not set(rest["image_id"]) & set(tuning["image_id"])
    assert len(set(tuning["image_id"])) == len(tuning)
    first_texts = {"x": "text 0", "y": "text 1", "z": "text 3"}
    assert [row["captions"] for row in tuning] == [[first_texts[one]] for one in tuning["image_id"]]


def test_something_is_left_to_train_on():
    with pytest.raises(DataError, match="tuning_images=9 leaves nothing of 9 samples"):
        cut_off(rows_of(GROUPS), 9)
