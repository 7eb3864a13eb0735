"""Groups are held out whole."""

import pytest
from datasets import Dataset
from helpers import picture

from tcl_hf.data.held_out import cut_off, held_out_groups, hold_out, one_record_per_image
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


@pytest.mark.parametrize(("share", "number"), [(0.0, 0), (0.1, 0), (0.3, 3), (0.5, 5)])
def test_a_share_of_the_images_is_held_out_with_all_their_rows(share, number):
    """Of 10 rows of 10 images; a tenth of the 9 rows of the groups would be less than one."""
    ids = [str(n) for n in range(10 if share != 0.1 else 9)]
    rest, held_out = hold_out(rows_of(ids), share)
    assert len(held_out) == number
    assert not set(rest["image_id"]) & set(held_out["image_id"])
    ids = ["x", "y", "x", "z", "y", "x"]
    rest, held_out = hold_out(rows_of(["all"] * 6, ids, column="split"), 0.2)
    assert sorted([*rest["image_id"], *held_out["image_id"]]) == sorted(ids)
    assert not set(rest["image_id"]) & set(held_out["image_id"]) and len(held_out)


def test_the_rows_of_an_image_become_one_record_and_ids_that_collide_do_not():
    rows = [
        {"image": picture(0), "captions": ["a"], "image_id": "0"},
        {"image": picture(1), "captions": ["b"], "image_id": "1"},
        {"image": picture(0), "captions": ["c", "d"], "image_id": "0"},
        {"image": picture(2), "captions": ["e"], "image_id": "0"},  # another source begins its numbers again
    ]
    joined = one_record_per_image(Dataset.from_list(rows))
    assert joined["captions"] == [["a", "c", "d"], ["b"], ["e"]]
    assert [record["image"]["bytes"] for record in joined] == [picture(n)["bytes"] for n in range(3)]
    assert joined["image_id"] == ["0", "1", "0"] and joined.column_names == ["image", "captions", "image_id"]
    distinct = Dataset.from_list(rows[:2])
    assert one_record_per_image(distinct) is distinct
