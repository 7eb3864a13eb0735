"""Statements about an image in every format give the same records, and errors name file and row."""

import logging

import datasets
import pytest
from helpers import ANNOTATIONS, TEXT, image_at, png, write_json, write_table

from tcl_hf.data.annotations.entailment import load_entailment
from tcl_hf.data.pairs import DataError


def test_snli_ve_rows_without_a_gold_label_are_left_out(caplog):
    with caplog.at_level(logging.WARNING):
        records = list(load_entailment(str(ANNOTATIONS / "snli_ve.jsonl"), image_root="flickr30k"))
    assert records == [
        {
            "image": image_at("flickr30k/1001.jpg"),
            "captions": ["The boys are brothers."],
            "image_id": "1001",
            "label": "neutral",
            "pair_id": "1001.jpg#0r1n",
        },
        {
            "image": image_at("flickr30k/1002.jpg"),
            "captions": ["Somebody cooks."],
            "image_id": "1002",
            "label": "entailment",
            "pair_id": "1002.jpg#2r2e",
        },
    ]
    assert "snli_ve.jsonl: 1 rows without a gold label ('-') were left out." in caplog.text


def test_albefs_list_and_plain_json_lines_become_records():
    files = [str(ANNOTATIONS / name) for name in ("albef_ve.json", "entailment.jsonl")]
    none = {"pair_id": None}
    assert list(load_entailment(files, image_root="flickr30k")) == [
        {
            "image": image_at("flickr30k/1001.jpg"),
            "captions": ["Nobody is there."],
            "image_id": "1001",
            "label": "contradiction",
            **none,
        },
        {
            "image": image_at("flickr30k/1001.jpg"),
            "captions": ["The boat is carried ."],
            "image_id": "1001",
            "label": "entailment",
            **none,
        },
        {
            "image": image_at("flickr30k/1002.jpg"),
            "captions": ["The cook sleeps ."],
            "image_id": "1002",
            "label": "contradiction",
            **none,
        },
    ]


def test_labels_of_a_table_may_be_numbers_with_names(tmp_path):
    table = {
        "image": [{"bytes": png(n), "path": None} for n in range(3)],
        "hypothesis": ["a", "b", "c"],
        "label": [1, -1, 0],
    }
    labels = datasets.ClassLabel(names=["entailment", "neutral", "contradiction"])
    file = write_table(tmp_path / "x.parquet", table, {"image": datasets.Image(), "hypothesis": TEXT, "label": labels})
    records = list(load_entailment(file))
    assert [(record["captions"], record["label"]) for record in records] == [(["a"], "neutral"), (["c"], "entailment")]
    assert [record["image"]["bytes"] for record in records] == [png(0), png(2)]


@pytest.mark.parametrize("label", ["entails", "", 2])
def test_an_unknown_label_is_named(tmp_path, label):
    rows = [{"image": "1", "sentence": "a", "label": "neutral"}, {"image": "1", "sentence": "a", "label": label}]
    message = rf"rows.json, row 2: its label is {label!r}: it must be one of contradiction, neutral, entailment\."
    with pytest.raises(DataError, match=message):
        load_entailment(write_json(tmp_path, rows))
