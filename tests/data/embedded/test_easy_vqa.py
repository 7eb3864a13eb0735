"""easy-VQA: splits have different pictures."""

import numpy as np
import pytest
from PIL import Image

from tcl_hf.data.embedded.easy_vqa import load_easy_vqa, load_easy_vqa_classes


def test_easy_vqa_holds_out_whole_pictures():
    pytest.importorskip("easy_vqa", reason="the package that carries the questions is missing")
    train, validation, test = (load_easy_vqa(split) for split in ("train", "validation", "test"))
    assert (len(train) + len(validation), len(test)) == (38575, 9673)
    assert not set(train["image_id"]) & set(validation["image_id"])
    assert len(set(test["image_id"])) == 1000
    assert len({answers[0] for answers in train["answers"]}) == 13
    with pytest.raises(ValueError, match="no split 'dev'"):
        load_easy_vqa("dev")


def test_the_classes_of_easy_vqa_are_the_colours_and_shapes_of_its_pictures():
    """The colour of a picture's shape is looked up in its pixels."""
    pytest.importorskip("easy_vqa", reason="the package that carries the questions is missing")
    table = load_easy_vqa_classes("validation")
    names = table.features["label"].names
    assert len(names) == 24 and set(table["label"]) == set(range(24))
    assert set(table["image_id"]) < set(load_easy_vqa("validation")["image_id"]) and len(set(table["image_id"])) == 357
    shades: dict[str, list] = {}
    for row in table:
        color, shape = (table.features[name].int2str(row[name]) for name in ("color", "shape"))
        assert names[row["label"]] == f"{color} {shape}"
        pixels = np.asarray(Image.open(row["image"]["path"]).convert("RGB"), dtype=float).reshape(-1, 3)
        background = np.median(pixels, axis=0)
        shades.setdefault(color, []).append(pixels[np.abs(pixels - background).sum(1).argmax()])
    means = {color: np.mean(found, axis=0) for color, found in shades.items()}
    for color, found in shades.items():
        for shade in found:
            assert min(means, key=lambda name: np.abs(means[name] - shade).sum()) == color
