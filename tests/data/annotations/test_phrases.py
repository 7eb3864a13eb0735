"""Phrases of a table become records, and errors name file and row."""

import datasets
import pytest
from helpers import PICTURE, TEXT, png, write_table

from tcl_hf.data.annotations.phrases import load_phrases
from tcl_hf.data.pairs import DataError


def phrase_table(file, **changes):
    phrase = {
        "caption_index": 1,
        "start": 2,
        "end": 5,
        "phrase": "red",
        "types": ["other"],
        "boxes": [[0.0, 1.5, 40.5, 30.0]],
    } | changes
    integer = datasets.Value("int32")
    boxes = datasets.List(datasets.List(datasets.Value("float32")))
    kinds = {
        "image_id": TEXT,
        "image": PICTURE,
        "captions": datasets.List(TEXT),
        "width": integer,
        "height": integer,
        "phrases": datasets.List(
            {
                "caption_index": integer,
                "start": integer,
                "end": integer,
                "phrase": TEXT,
                "types": datasets.List(TEXT),
                "boxes": boxes,
            }
        ),
    }
    table = {
        "image_id": ["1"],
        "image": [{"bytes": png(0), "path": None}],
        "captions": [["a dog", "a red cat"]],
        "width": [40],
        "height": [30],
        "phrases": [[phrase]],
    }
    return write_table(file, table, kinds)


def test_phrases_of_a_table_become_records(tmp_path):
    (record,) = load_phrases(phrase_table(tmp_path / "x.parquet"))
    assert record == {
        "image": {"bytes": png(0), "path": None},
        "captions": ["a dog", "a red cat"],
        "image_id": "1",
        "phrases": [
            {
                "caption_index": 1,
                "start": 2,
                "end": 5,
                "types": ["other"],
                "boxes": [[0, 1.5, 40, 30]],
                "phrase_id": "0",
            }
        ],
        "proposals": [],
        "width": 40,
        "height": 30,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": 3}, r"its phrase 0 \('red'\) is not at characters 3 to 5 of caption 1"),
        ({"end": 2, "phrase": None}, r"its phrase 0 \(None\) is not at characters 2 to 2 of caption 1"),
        ({"start": 6, "end": 10, "phrase": "cat"}, r"its phrase 0 \('cat'\) is not at characters 6 to 10 of caption 1"),
        ({"caption_index": 2}, r"its phrase 0 \('red'\) is not at characters 2 to 5 of caption 2"),
        ({"caption_index": None}, "it has no 'caption_index'"),
        ({"boxes": [[0.0, 0.0, 41.0, 30.0]]}, r"its box \[0.0, 0.0, 41.0, 30.0\] lies outside of the image of 40 x 30"),
        ({"boxes": [[-1.0, 0.0, 4.0, 3.0]]}, r"its box \[-1.0, 0.0, 4.0, 3.0\] lies outside"),
        ({"boxes": [[5.0, 0.0, 4.0, 3.0]]}, r"its box \[5.0, 0.0, 4.0, 3.0\] lies outside"),
        ({"boxes": [[0.0, 0.0, 4.0]]}, r"its box \[0.0, 0.0, 4.0\] lies outside"),
        ({"boxes": [[0.0, 0.0, float("nan"), 3.0]]}, r"its box \[0.0, 0.0, nan, 3.0\] lies outside"),
    ],
)
def test_a_bad_phrase_is_named(tmp_path, changes, message):
    with pytest.raises(DataError, match=f"x.parquet, row 1: {message}"):
        load_phrases(phrase_table(tmp_path / "x.parquet", **changes))
