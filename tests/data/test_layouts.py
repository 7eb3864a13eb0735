"""The layouts in which people keep images and captions: each is read as it is, without code."""

import csv
import json
import os
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import datasets
import pytest
from helpers import png, write_json, write_table, write_tar

from tcl_hf.data.images import open_image
from tcl_hf.data.pairs import DataError, load_pairs
from tcl_hf.data.sources import expand_braces, find_files

CAPTIONS = ["a red door", "two cats, one asleep"]


def pictures_in(folder, names=("0.png", "1.png")):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        (folder / name).write_bytes(png(number))


def read(source, **options) -> list[list[str]]:
    """The captions of a source, all of whose images can be opened."""
    records = list(load_pairs(str(source), **options))
    for record in records:
        with open_image(record["image"]) as image:
            assert image.size == (40, 30)
    return [record["captions"] for record in records]


def table(delimiter, image="image", caption="caption", end="\n", mark="", order=1) -> bytes:
    rows = [(image, caption), *((f"{number}.png", text) for number, text in enumerate(CAPTIONS))]
    lines = [
        delimiter.join(f'"{part}"' if "," in part and delimiter == "," else part for part in row[::order])
        for row in rows
    ]
    return (mark + end.join(lines) + end).encode("utf-8")


LISTS = {
    "captions.csv": table(","),
    "captions.CSV": table(",", "Image", "Caption"),
    "windows.csv": table(",", end="\r\n", mark="\ufeff"),
    "german.csv": table(";", "file_name", "text"),
    "captions.tsv": table("\t", "filepath", "title", order=-1),
    "results.csv": b"image_name| comment_number| comment\n0.png| 0| a red door\n1.png| 0| two cats, one asleep\n",
    "captions.txt": table(","),
    "results_20130124.token": b"0.png#0\ta red door\n1.png#0\ttwo cats, one asleep\n",
    "rows.jsonl": b'{"image": "0.png", "caption": "a red door"}\r\n\r\n'
    b'{"img": "1.png", "text": "two cats, one asleep"}',
    "rows.json": json.dumps([{"img": f"{n}.png", "text": text} for n, text in enumerate(CAPTIONS)]).encode(),
    "MARKED.JSON": "\ufeff".encode()
    + json.dumps([{"image": f"{n}.png", "captions": [t]} for n, t in enumerate(CAPTIONS)]).encode(),
    "captions_val2014.json": json.dumps(
        {
            "info": {},
            "images": [{"id": 7, "file_name": "0.png"}, {"id": 9, "file_name": "1.png"}],
            "annotations": [
                {"image_id": 9, "id": 1, "caption": CAPTIONS[1]},
                {"image_id": 7, "id": 2, "caption": CAPTIONS[0]},
            ],
        }
    ).encode(),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("place", ["", "images", "photos/train2014"])
@pytest.mark.parametrize("name", LISTS)
def test_a_list_is_read_with_its_images_beside_it_or_in_a_folder(name, place, streaming, tmp_path):
    pictures_in(tmp_path / place)
    (tmp_path / name).write_bytes(LISTS[name])
    assert read(tmp_path / name, streaming=streaming) == [[text] for text in CAPTIONS]


@pytest.mark.parametrize("name", LISTS)
def test_a_folder_is_named_in_place_of_its_only_list(name, tmp_path):
    folder = tmp_path / "mine [2024] {a}"  # a name that looks like a pattern
    pictures_in(folder / "images")
    (folder / name).write_bytes(LISTS[name])
    split = "validation" if "val" in name else "train"
    assert read(folder, split=split) == [[text] for text in CAPTIONS]


@pytest.mark.parametrize("name", ["captions.csv", "rows.json", "rows.jsonl"])
def test_images_are_found_below_a_root(name, tmp_path):
    pictures_in(tmp_path / "elsewhere")
    (tmp_path / name).write_bytes(LISTS[name])
    assert read(tmp_path / name, image_root=str(tmp_path / "elsewhere")) == [[text] for text in CAPTIONS]


def test_parquet_holds_paths_or_bytes(tmp_path):
    pictures_in(tmp_path / "elsewhere")
    path = tmp_path / "rows.PARQUET"
    datasets.Dataset.from_dict({"file_name": ["0.png", "1.png"], "caption": CAPTIONS}).to_parquet(path)
    assert read(path, image_root=str(tmp_path / "elsewhere")) == [[text] for text in CAPTIONS]
    (tmp_path / "elsewhere" / "rows.parquet").write_bytes(path.read_bytes())
    for streaming in (False, True):
        assert read(tmp_path / "elsewhere", streaming=streaming) == [[text] for text in CAPTIONS]
    table = {"image": [png(0), png(1)], "caption": CAPTIONS}
    datasets.Dataset.from_dict(table).to_parquet(tmp_path / "bytes.parquet")
    assert read(tmp_path / "bytes.parquet") == [[text] for text in CAPTIONS]


def test_named_columns_count_in_every_list(tmp_path):
    pictures_in(tmp_path)
    rows = [{"picture": f"{n}.png", "caption": "wrong", "words": text} for n, text in enumerate(CAPTIONS)]
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for source in (tmp_path / "rows.csv", tmp_path / "rows.jsonl", write_json(tmp_path, rows)):
        assert read(source, image_column="picture", caption_column="words") == [[text] for text in CAPTIONS]
        with pytest.raises(DataError, match=r"has no caption column among .*looked for sentence"):
            load_pairs(str(source), caption_column="sentence")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("Train_GCC-training.tsv", "a very typical bus station\thttp://lh6.ggpht.com/-IvRtNLNcG8o.jpg\n"),
        ("laion.csv", "url,caption\nhttps://example.org/1.jpg,words\n"),
        ("sbu.json", json.dumps([{"url": "https://example.org/1.jpg", "caption": "words"}])),
        ("mixed.jsonl", json.dumps({"image": "https://example.org/1.jpg", "caption": "words"})),
        ("laion.parquet", None),
    ],
)
def test_a_list_of_addresses_names_the_program_that_downloads_them(name, content, tmp_path):
    if content is None:
        datasets.Dataset.from_dict({"URL": ["https://example.org/1.jpg"], "TEXT": ["words"]}).to_parquet(
            tmp_path / name
        )
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=r"holds addresses of images .*img2dataset --url_list .*--url_col"):
        list(load_pairs(str(tmp_path / name)))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("number", [2, 70])
@pytest.mark.parametrize("order", ["by sample", "by ending"])
def test_tars_hold_captions_in_json_and_may_be_sorted_by_ending(order, streaming, number, tmp_path):
    captions = [CAPTIONS[n % 2] for n in range(number)]
    contents = [{"JPG": png(n), "json": json.dumps({"caption": text}).encode()} for n, text in enumerate(captions)]
    files = [(f"photos/{n:03d}.{end}", content[end]) for n, content in enumerate(contents) for end in content]
    if order == "by ending":
        files.sort(key=lambda file: file[0].rpartition(".")[2])
    write_tar(tmp_path / "part-00000.tar", files)
    assert read(tmp_path, streaming=streaming) == [[text] for text in captions]


@pytest.mark.parametrize("fields", [{"captions": CAPTIONS}, {"text": CAPTIONS}, {"title": CAPTIONS, "id": 3}])
def test_json_in_a_tar_may_hold_several_captions_and_other_keys(fields, tmp_path):
    write_tar(tmp_path / "0.tar", [("a.png", png(0)), ("a.json", json.dumps(fields).encode())])
    assert read(tmp_path) == [CAPTIONS]


def test_patterns_name_shards_with_leading_zeros(tmp_path):
    for number in (8, 9, 10):
        write_tar(tmp_path / f"{number:05d}.tar", [("a.png", png(0)), ("a.txt", f"text {number}".encode())])
    assert read(f"{tmp_path}/{{00008..00010}}.tar") == [["text 8"], ["text 9"], ["text 10"]]
    assert read(f"{tmp_path}/{{00010,00008}}.tar") == [["text 10"], ["text 8"]]
    assert read(f"{tmp_path}/000[01]*.tar") == [["text 8"], ["text 9"], ["text 10"]]
    assert read(f"file://{tmp_path}/00009.tar") == [["text 9"]]
    with pytest.raises(DataError, match=r"00011\.tar is missing, which .* names"):
        load_pairs(f"{tmp_path}/{{00010..00011}}.tar")
    assert expand_braces("a{1..3}b{x,y}") == ["a1bx", "a1by", "a2bx", "a2by", "a3bx", "a3by"]
    with pytest.raises(DataError, match="write the range as"):
        expand_braces("{9..1}")


def test_folders_of_splits_and_names_of_splits(tmp_path):
    features = {"image": datasets.Image(), "caption": datasets.Value("string")}
    for place in (
        "data/train-00000-of-00002",
        "data/train-00001-of-00002",
        "data/validation-00000-of-00001",
        "data/test-0",
    ):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        write_table(
            tmp_path / f"{place}.parquet", {"image": [{"bytes": png(0), "path": None}], "caption": [place]}, features
        )
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "README.md").write_text("A data set of the Hub.")
    assert read(tmp_path) == [["data/train-00000-of-00002"], ["data/train-00001-of-00002"]]
    assert read(tmp_path, split="validation") == [["data/validation-00000-of-00001"]]
    for place in ("train", "val", "valley"):
        pictures_in(tmp_path / "photos" / place)
        (tmp_path / "photos" / place / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": place}))
    assert read(tmp_path / "photos") == [["train"]]
    assert read(tmp_path / "photos", split="val") == read(tmp_path / "photos", split="validation") == [["val"]]


def test_several_lists_of_a_split_are_refused(tmp_path):
    pictures_in(tmp_path)
    for name in ("one.csv", "two.csv"):
        (tmp_path / name).write_bytes(LISTS["captions.csv"])
    with pytest.raises(DataError, match=r"holds 2 lists for 'train' \(one\.csv, two\.csv\): name one of them"):
        load_pairs(str(tmp_path))
    assert find_files(str(tmp_path / "one.csv"), "validation").paths == (str(tmp_path / "one.csv"),)


def test_a_row_that_cannot_be_used_spoils_no_other(tmp_path):
    pictures_in(tmp_path)
    lines = [
        '{"image": "0.png", "caption": "half \\ud800 of a character"}',
        "{broken",
        '{"image": "1.png", "caption": "good"}',
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    captions = [record["captions"] for record in load_pairs(str(tmp_path / "rows.jsonl"))]
    assert captions == [["half \ufffd of a character"], [], ["good"]]
    (tmp_path / "inch.tsv").write_text('image\tcaption\n0.png\t"6" pipe\n1.png\tgood\n')
    assert read(tmp_path / "inch.tsv") == [['"6" pipe'], ["good"]]


def test_rows_of_one_image_have_one_id(tmp_path):
    pictures_in(tmp_path)
    (tmp_path / "rows.csv").write_text("image,caption\n0.png,first\n0.png,second\n1.png,third\n")
    dataset = load_pairs(str(tmp_path / "rows.csv"))
    assert dataset["image_id"] == ["0.png", "0.png", "1.png"]
    assert os.path.isabs(dataset[0]["image"]["path"])


def test_addresses_are_read_without_a_copy(tmp_path):
    write_tar(tmp_path / "00000.tar", [("a.png", png(0)), ("a.txt", b"words")])
    features = {"image": datasets.Image(), "caption": datasets.Value("string")}
    write_table(tmp_path / "rows.parquet", {"image": [{"bytes": png(0), "path": None}], "caption": ["words"]}, features)
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        assert read(f"{address}/{{00000..00000}}.tar", streaming=True) == [["words"]]
        assert read(f"{address}/rows.parquet", streaming=True) == [["words"]]
        with pytest.raises(DataError, match=r"rows\.tar could not be loaded \(split 'train'\): "):
            load_pairs(f"{address}/rows.tar")
        server.shutdown()
