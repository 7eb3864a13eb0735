"""Statements about two images in every format give the same records, and errors name file and row."""

import datasets
import pytest
from helpers import ANNOTATIONS, PICTURE, TEXT, image_at, png, write_json, write_table

from tcl_hf.data.annotations.reasoning import load_reasoning
from tcl_hf.data.pairs import DataError


def test_nlvr2_images_are_in_its_folders(tmp_path):
    files = [str(ANNOTATIONS / name) for name in ("nlvr2_dev.json", "nlvr2_train.json")]
    records = list(load_reasoning(files, image_root=str(tmp_path)))
    assert records == [
        {
            "images": [image_at(tmp_path / "dev-12-0-img0.png"), image_at(tmp_path / "dev-12-0-img1.png")],
            "captions": ["Both pictures show a bridge."],
            "image_id": "dev-12-0-img0",
            "label": "True",
            "pair_id": "dev-12-0-1",
        },
        {
            "images": [image_at(tmp_path / "dev-12-3-img0.png"), image_at(tmp_path / "dev-12-3-img1.png")],
            "captions": ["The left bridge is red."],
            "image_id": "dev-12-3-img0",
            "label": "False",
            "pair_id": "dev-12-3-0",
        },
        {
            "images": [
                image_at(tmp_path / "57" / "train-34-2-img0.png"),
                image_at(tmp_path / "57" / "train-34-2-img1.png"),
            ],
            "captions": ["One picture shows an owl."],
            "image_id": "train-34-2-img0",
            "label": "False",
            "pair_id": "train-34-2-0",
        },
    ]
    for folder in ("dev", "images/train"):
        (tmp_path / folder).mkdir(parents=True)
    records = load_reasoning(files, image_root=str(tmp_path))
    assert records[0]["images"][1] == image_at(tmp_path / "dev" / "dev-12-0-img1.png")
    assert records[2]["images"][1] == image_at(tmp_path / "images" / "train" / "57" / "train-34-2-img1.png")


def test_albefs_list_and_all_spellings_of_labels_are_read(tmp_path):
    assert list(load_reasoning(str(ANNOTATIONS / "albef_nlvr.json"), image_root="nlvr2")) == [
        {
            "images": [image_at("nlvr2/dev/dev-5-0-img0.png"), image_at("nlvr2/dev/dev-5-0-img1.png")],
            "captions": ["There are two owls."],
            "image_id": "dev-5-0-img0",
            "label": "True",
            "pair_id": None,
        }
    ]
    spellings = [True, "false", " TRUE ", False]
    rows = [{"sentence": "a", "label": label, "images": ["0.png", "1.png"]} for label in spellings]
    assert load_reasoning(write_json(tmp_path, rows))["label"] == ["True", "False", "True", "False"]


@pytest.mark.parametrize("together", [False, True])
def test_a_table_has_two_images_in_one_column_or_in_two(tmp_path, together):
    left, right = ({"bytes": png(n), "path": None} for n in (0, 1))
    if together:
        table, features = {"images": [[left, right]]}, {"images": datasets.List(PICTURE)}
    else:
        table, features = {"image_0": [left], "image_1": [right]}, {"image_0": PICTURE, "image_1": PICTURE}
    table |= {"sentence": ["a"], "label": [True]}
    features |= {"sentence": TEXT, "label": datasets.Value("bool")}
    records = load_reasoning(write_table(tmp_path / "x.parquet", table, features))
    assert list(records) == [
        {"images": [left, right], "captions": ["a"], "image_id": "0", "label": "True", "pair_id": None}
    ]


def test_images_of_nlvr2_are_joined_by_id(tmp_path):
    table = {
        "image": [{"bytes": png(n), "path": None} for n in range(2)],
        "image_id": [f"dev-5-0-img{n}" for n in (0, 1)],
    }
    root = write_table(tmp_path / "images.parquet", table, {"image": PICTURE, "image_id": TEXT})
    (record,) = load_reasoning(str(ANNOTATIONS / "albef_nlvr.json"), image_root=root)
    assert [image["bytes"] for image in record["images"]] == [png(0), png(1)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": "maybe"}, "its label is 'maybe': it must be one of False, True"),
        ({"label": "True", "images": ["0.png"]}, r"its images are \['0.png'\]: there must be two paths"),
        ({"label": "True", "image_0": "0.png"}, "it has no 'image_1'"),
        ({"label": "True"}, "it has no 'images'"),
    ],
)
def test_a_bad_row_of_two_images_is_named(tmp_path, row, message):
    with pytest.raises(DataError, match=f"rows.json, row 1: {message}"):
        load_reasoning(write_json(tmp_path, [{"sentence": "a", **row}]))
