"""`load_pairs` gives the same records for every kind of source."""

import io
import json
import os
import time

import datasets
import pytest
from helpers import png, write_json, write_tar
from PIL import Image

from tcl_hf.data.images import open_image
from tcl_hf.data.pairs import DataError, captions_of, load_pairs


def assert_records(dataset, expected):
    records = list(dataset)
    assert [record["captions"] for record in records] == expected
    for number, record in enumerate(records):
        with open_image(record["image"]) as image:
            assert image.size == (40, 30)
            assert image.convert("RGB").tobytes() == Image.open(io.BytesIO(png(number))).convert("RGB").tobytes()
        assert record["image_id"] is not None


def test_json_lists_of_the_original(pictures):
    rows = [
        {"image": "0.png", "caption": "one text"},
        {"image": "1.png", "caption": ["first", "second"], "image_id": 17},
    ]
    dataset = load_pairs(write_json(pictures, rows))
    assert_records(dataset, [["one text"], ["first", "second"]])
    assert dataset["image_id"] == ["0.png", "17"]


def test_json_lists_with_an_image_root_and_several_files(pictures, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    files = [write_json(elsewhere, [{"image": f"{n}.png", "caption": f"text {n}"}], f"{n}.json") for n in range(2)]
    assert_records(load_pairs(files, image_root=str(pictures)), [["text 0"], ["text 1"]])


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet(tmp_path, streaming):
    table = {"image": [{"bytes": png(n), "path": None} for n in range(2)], "caption": [["a", "b"], ["c"]]}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.List(datasets.Value("string"))})
    datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "train-0.parquet")
    for source in (str(tmp_path), str(tmp_path / "train-0.parquet"), str(tmp_path / "*.parquet")):
        dataset = load_pairs(source, streaming=streaming)
        assert isinstance(dataset, datasets.IterableDataset if streaming else datasets.Dataset)
        assert_records(dataset, [["a", "b"], ["c"]])


@pytest.mark.parametrize("streaming", [False, True])
def test_webdataset_tars_as_img2dataset_writes_them(tmp_path, streaming):
    contents = [{"png": png(number), "txt": f"text {number}".encode(), "json": b"{}"} for number in range(3)]
    files = [(f"{number:05d}.{suffix}", file[suffix]) for number, file in enumerate(contents) for suffix in file]
    write_tar(tmp_path / "00000.tar", files)
    dataset = load_pairs(str(tmp_path), streaming=streaming)
    assert_records(dataset, [["text 0"], ["text 1"], ["text 2"]])
    assert [record["image_id"] for record in dataset] == ["00000", "00001", "00002"]


def test_folder_of_images_with_metadata(tmp_path):
    (tmp_path / "train").mkdir()
    lines = []
    for number in range(2):
        (tmp_path / "train" / f"{number}.png").write_bytes(png(number))
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"text {number}"}))
    (tmp_path / "train" / "metadata.jsonl").write_text("\n".join(lines))
    assert_records(load_pairs(str(tmp_path)), [["text 0"], ["text 1"]])


def test_dataset_saved_to_disk_and_unusual_columns(tmp_path):
    table = {"snapshot": [{"bytes": png(0), "path": None}], "words": ["hello"]}
    features = datasets.Features({"snapshot": datasets.Image(), "words": datasets.Value("string")})
    datasets.Dataset.from_dict(table, features=features).save_to_disk(tmp_path)
    with pytest.raises(DataError, match="no image column among snapshot, words"):
        load_pairs(str(tmp_path))
    dataset = load_pairs(str(tmp_path), image_column="snapshot", caption_column="words")
    assert_records(dataset, [["hello"]])


@pytest.mark.parametrize("streaming", [False, True])
def test_sources_of_different_kinds_are_joined(pictures, tmp_path_factory, streaming):
    folder = tmp_path_factory.mktemp("parquet")
    kinds = {"image": datasets.Image(), "text": datasets.Value("string"), "id": datasets.Value("int64")}
    table = {"image": [{"bytes": png(1), "path": None}], "text": ["text 1"], "id": [7]}
    datasets.Dataset.from_dict(table, features=datasets.Features(kinds)).to_parquet(folder / "train.parquet")
    sources = [write_json(pictures, [{"image": "0.png", "caption": "text 0"}]), str(folder)]
    dataset = load_pairs(sources, streaming=streaming)
    assert_records(dataset, [["text 0"], ["text 1"]])
    assert [record["image_id"] for record in dataset] == ["0.png", "7"]


def test_captions_may_be_null_or_wrapped_and_a_named_column_counts(tmp_path):
    table = {
        "image": [{"bytes": png(n), "path": None} for n in range(2)],
        "captions": ["wrong", "wrong"],
        "sentences": [[{"raw": "first"}, {"raw": None}], None],
    }
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "captions": datasets.Value("string"),
            "sentences": datasets.List({"raw": datasets.Value("string")}),
        }
    )
    datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "train.parquet")
    for streaming in (False, True):
        dataset = load_pairs(str(tmp_path), caption_column="sentences", streaming=streaming)
        assert_records(dataset, [["first"], []])
        assert list(captions_of(dataset)) == ["first"]


def test_several_sources_are_joined(pictures):
    sources = [write_json(pictures, [{"image": f"{n}.png", "caption": f"text {n}"}], f"{n}.json") for n in range(2)]
    assert_records(load_pairs(sources), [["text 0"], ["text 1"]])


def test_splits_of_a_folder_follow_from_the_names_of_its_files(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    for name in ("train-0", "train-1", "validation-0"):
        table = {"image": [{"bytes": png(0), "path": None}], "caption": [name]}
        datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / f"{name}.parquet")
    captions = [record["captions"][0] for record in load_pairs(str(tmp_path))]
    assert captions == ["train-0", "train-1"]
    assert [record["captions"][0] for record in load_pairs(str(tmp_path), "validation")] == ["validation-0"]
    with pytest.raises(DataError, match="no files of a split 'test'"):
        load_pairs(str(tmp_path), "test")
    (tmp_path / "train-0.parquet").rename(tmp_path / "part.parquet")
    (tmp_path / "train-1.parquet").unlink()
    assert [record["captions"][0] for record in load_pairs(str(tmp_path))] == ["train-0"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "nobody/no-such-data",
            "nobody/no-such-data is neither a file nor a folder, and loading it from the Hub failed",
        ),
        ([], "No data was named"),
        ("./nowhere", "./nowhere cannot be read as data"),
        ("nothing/*.tar", r"nothing/\*.tar cannot be read as data"),
    ],
)
def test_missing_data_is_reported_in_one_sentence(source, message):
    with pytest.raises(DataError, match=message):
        load_pairs(source)


def test_a_changed_list_is_read_again(pictures):
    for text in ("before", "after!"):
        file = write_json(pictures, [{"image": "0.png", "caption": text}])
        os.utime(file, ns=(time.time_ns(), time.time_ns()))
        assert load_pairs(file)[0]["captions"] == [text]
