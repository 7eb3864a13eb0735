"""Karpathy's splits and ALBEF's list of COCO give the records of image-text pairs."""

import pytest
from helpers import ANNOTATIONS, image_at, write_json

from tcl_hf.data.pairs import DataError, load_pairs


def test_rows_of_one_image_keep_its_id():
    pairs = load_pairs(str(ANNOTATIONS / "albef_coco_train.json"), image_root="coco")
    assert list(pairs) == [
        {"image": image_at("coco/val2014/COCO_val2014_000000000123.jpg"), "captions": [text], "image_id": "coco_123"}
        for text in ("A tram waits.", "The tram is yellow.")
    ]


@pytest.mark.parametrize("split", ["val", "validation", "dev"])
def test_karpathys_splits_are_read_under_their_usual_names(split):
    file = str(ANNOTATIONS / "karpathy_coco.json")
    assert list(load_pairs(file, "train", image_root="coco")) == [
        {
            "image": image_at("coco/train2014/COCO_train2014_000000000001.jpg"),
            "captions": ["A barn.", "A red barn."],
            "image_id": "1",
        },
        {"image": image_at("coco/val2014/COCO_val2014_000000000002.jpg"), "captions": ["Two geese."], "image_id": "2"},
    ]
    assert load_pairs(file, split)["image_id"] == ["3"]
    with pytest.raises(DataError, match="no pairs in its split 'test'"):
        load_pairs(file, "test")


def test_karpathys_flickr30k_has_no_folders_and_its_own_ids():
    assert list(load_pairs(str(ANNOTATIONS / "karpathy_flickr30k.json"), "test")) == [
        {"image": image_at(ANNOTATIONS / "1001.jpg"), "captions": ["Two boys ."], "image_id": "5"}
    ]


def test_a_broken_karpathy_file_names_the_image(tmp_path):
    file = write_json(tmp_path, {"images": [{"filename": "1.jpg", "split": "train"}]})
    with pytest.raises(
        DataError, match=r"rows.json, image 1, is not as in Karpathy's splits \(KeyError: 'sentences'\)"
    ):
        load_pairs(file)
