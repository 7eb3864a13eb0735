"""easy-VQA: splits have different pictures."""

import pytest

from tcl_hf.data.embedded.easy_vqa import load_easy_vqa


def test_easy_vqa_holds_out_whole_pictures():
    pytest.importorskip("easy_vqa", reason="the package that carries the questions is missing")
    train, validation, test = (load_easy_vqa(split) for split in ("train", "validation", "test"))
    assert (len(train) + len(validation), len(test)) == (38575, 9673)
    assert not set(train["image_id"]) & set(validation["image_id"])
    assert len(set(test["image_id"])) == 1000
    assert len({answers[0] for answers in train["answers"]}) == 13
    with pytest.raises(ValueError, match="no split 'dev'"):
        load_easy_vqa("dev")
