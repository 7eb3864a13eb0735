"""Images with labels: every kind of source gives records with the names of their classes."""

import json
from pathlib import Path

import datasets
import pytest
from datasets import ClassLabel, Dataset, Value
from helpers import PICTURE, TEXT, picture, png, write_json, write_table, write_tar

from tcl_hf.data.annotations.classification import class_names_of, load_classification
from tcl_hf.data.images import open_image, why_unusable
from tcl_hf.data.pairs import DataError


def table(folder: Path, labels: list, kind, column: str = "label", name: str = "test.parquet") -> str:
    """A parquet file of pictures, of which number n has the pixels `png(n)`."""
    columns = {"image": [picture(n) for n in range(len(labels))], column: labels}
    return write_table(folder / name, columns, {"image": datasets.Image(), column: kind})


def class_folders(folder: Path, files: list[str]) -> str:
    for number, file in enumerate(files):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(png(number))
    return str(folder)


def by_id(records: Dataset) -> dict[str, str]:
    return {record["image_id"]: record["label"] for record in records}


# Sources


def test_records_have_the_names_of_a_class_label(tmp_path):
    records = load_classification(table(tmp_path, [1, 0, 1], ClassLabel(names=["cat", "dog", "cow"])))
    assert class_names_of(records) == ["cat", "dog", "cow"]
    assert by_id(records) == {"0": "dog", "1": "cat", "2": "dog"}
    for record in records:
        assert record["captions"] == [record["label"]] and why_unusable(record) is None
        assert record["image"]["bytes"] == png(int(record["image_id"]))
        assert record["class_id"] == {"cat": 0, "dog": 1}[record["label"]]


def test_labels_that_are_texts_are_names(tmp_path):
    records = load_classification(table(tmp_path, ["dog", "cat", "dog"], TEXT))
    assert class_names_of(records) == ["cat", "dog"]
    assert by_id(records) == {"0": "dog", "1": "cat", "2": "dog"}


def test_columns_with_unusual_names_are_named(tmp_path):
    columns = {"photo": [picture(0), picture(1)], "species": ["dog", "cat"], "id": ["x", "y"]}
    file = write_table(tmp_path / "a.parquet", columns, {"photo": PICTURE, "species": TEXT, "id": TEXT})
    records = load_classification(file, image_column="photo", label_column="species")
    assert by_id(records) == {"x": "dog", "y": "cat"}


def test_class_folders_are_read_with_or_without_folders_of_splits(tmp_path):
    files = ["n2/a.png", "n1/b.JPEG", "n1/more/c.png", "n1/notes.txt"]
    for folder in ("plain", "split/val"):
        class_folders(tmp_path / folder, files)
    class_folders(tmp_path / "split/train", ["n1/d.png"])
    expected = {"n2/a.png": "n2", "n1/b.JPEG": "n1", "n1/more/c.png": "n1"}
    for folder, split in (("plain", "validation"), ("plain", "test"), ("split", "validation"), ("split/val", "train")):
        records = load_classification(str(tmp_path / folder), split)
        assert by_id(records) == expected and class_names_of(records) == ["n1", "n2"]
        assert all(open_image(record["image"]).size == (40, 30) for record in records)
    one_class = load_classification(str(tmp_path / "split"), "train")
    assert by_id(one_class) == {"n1/d.png": "n1"} and class_names_of(one_class) == ["n1"]


@pytest.mark.parametrize(("folder", "split"), [(".", "train"), ("val", "validation")])
def test_a_folder_of_images_with_metadata_is_read_by_its_metadata(tmp_path, folder, split):
    class_folders(tmp_path / folder, ["part/a.png", "part/b.png"])
    (tmp_path / folder / "metadata.csv").write_text("file_name,label\npart/a.png,cat\npart/b.png,dog\n")
    assert sorted(by_id(load_classification(str(tmp_path), split)).values()) == ["cat", "dog"]


def test_saved_data_and_tars_are_read(tmp_path):
    features = datasets.Features({"img": datasets.Image(), "fine_label": ClassLabel(names=["cat", "dog"])})
    saved = Dataset.from_list([{"img": picture(0), "fine_label": 1}], features=features)
    datasets.DatasetDict({"test": saved}).save_to_disk(tmp_path / "saved")
    assert by_id(load_classification(str(tmp_path / "saved"), "test")) == {"0": "dog"}
    write_tar(tmp_path / "x.tar", [("a.png", png(0)), ("a.cls", b"1"), ("b.png", png(1)), ("b.cls", b"0")])
    records = load_classification(str(tmp_path / "x.tar"), class_names=["cat", "dog"])
    assert by_id(records) == {"a": "dog", "b": "cat"}


def test_several_sources_with_the_same_classes_are_joined(tmp_path):
    kind = ClassLabel(names=["cat", "dog"])
    files = [table(tmp_path, [0], kind, name="a.parquet"), table(tmp_path, [1], kind, name="b.parquet")]
    assert sorted(load_classification(files)["label"]) == ["cat", "dog"]
    other = table(tmp_path, [1], ClassLabel(names=["cat", "cow"]), name="c.parquet")
    with pytest.raises(DataError, match=r"c\.parquet has other classes than .*a\.parquet: evaluate each alone"):
        load_classification([files[0], other])


def test_the_first_records_of_a_sorted_source_are_of_several_classes(tmp_path):
    file = table(tmp_path, [n // 20 for n in range(80)], ClassLabel(names=list("abcd")))
    records = load_classification(file)
    assert set(records.select(range(20))["label"]) == set("abcd")
    assert records["image_id"] == load_classification(file)["image_id"]


def test_images_without_a_label_are_left_out_and_counted(tmp_path, caplog):
    file = table(tmp_path, [-1, 1, None], ClassLabel(names=["cat", "dog"]))
    assert by_id(load_classification(file)) == {"1": "dog"}
    assert "test.parquet: 2 images without a label were left out." in caplog.text


# Names of classes


@pytest.mark.parametrize(
    ("labels", "kind", "names", "expected"),
    [
        ([1, 0], ClassLabel(names=["n1", "n2"]), ["tench", "goldfish"], ["goldfish", "tench"]),
        ([1, 0], ClassLabel(names=["n1", "n2"]), {"n2": "goldfish", "n1": "tench", "n3": "x"}, ["goldfish", "tench"]),
        ([1, 0], ClassLabel(names=["n1", "n2"]), {"1": "goldfish", "0": "tench"}, ["goldfish", "tench"]),
        ([1, 0], Value("int64"), ["tench", "goldfish", "shark"], ["goldfish", "tench"]),
        ([7, 3], Value("int64"), {"3": "tench", "7": "goldfish"}, ["goldfish", "tench"]),
        (["n2", "n1"], TEXT, {"n1": "tench", "n2": "goldfish"}, ["goldfish", "tench"]),
        (["goldfish", "tench"], TEXT, ["tench", "goldfish", "shark"], ["goldfish", "tench"]),
    ],
)
def test_class_names_replace_labels(tmp_path, labels, kind, names, expected):
    file = table(tmp_path, labels, kind)
    for given in (names, write_json(tmp_path, names), [write_json(tmp_path, names)]):
        records = load_classification(file, class_names=given)
        assert by_id(records) == {"0": expected[0], "1": expected[1]}
        assert set(class_names_of(records)) >= set(expected)


def test_all_classes_that_are_named_can_be_chosen_though_no_image_has_them(tmp_path):
    file = table(tmp_path, ["dog"], TEXT)
    assert class_names_of(load_classification(file, class_names=["cat", "dog", "cow"])) == ["cat", "dog", "cow"]


# Bad input


@pytest.mark.parametrize(
    ("labels", "kind", "options", "message"),
    [
        (["a"], TEXT, {"label_column": "kind"}, r"test\.parquet has no label column among image, label .*label_column"),
        (["a", "b"], TEXT, {"class_names": ["a", "c"]}, r"row 2: its label 'b' is not among the 2 .* \(a, c\): add it"),
        (["a", "b"], TEXT, {"class_names": {"a": "x"}}, r"row 2: its label 'b' is not among the 1 of class_names"),
        ([0, 5], Value("int64"), {"class_names": ["a", "c"]}, r"row 2: its label '5' is not among the 2"),
        ([0, 5], Value("int64"), {}, r"its labels are numbers without names: give the names with class_names"),
        ([0.5], Value("float32"), {}, r"its column 'label' holds 0\.5, and a label must be one text or one whole"),
        ([[0, 1]], datasets.List(Value("int64")), {}, r"its column 'label' holds \[0, 1\], and a label must be one"),
        ([0], ClassLabel(names=["n1", "n2"]), {"class_names": ["a", "b", "c"]}, r"has 3 names, but .* has 2 classes"),
        ([0], ClassLabel(names=["n1", "n2"]), {"class_names": {"n1": "a"}}, r"no name for 1 of the 2 labels .*\(n2\)"),
        ([-1, -1], ClassLabel(names=["a"]), {}, r"has no image with a label in its split 'train'"),
        (["a"], TEXT, {"class_names": []}, r"class_names is not a list or object of names"),
        (["a"], TEXT, {"class_names": {}}, r"class_names is not a list or object of names"),
        (["a"], TEXT, {"class_names": ["a", "a"]}, r"class_names, entry 2: 'a' is the name of two classes"),
        (["a"], TEXT, {"class_names": ["a", " "]}, r"class_names, entry 2: ' ' is not the name of a class"),
        (["a"], TEXT, {"class_names": ["a"]}, r"there is no file a: name a JSON file, or at least two classes"),
    ],
)
def test_bad_labels_and_names_are_refused_with_the_place(tmp_path, labels, kind, options, message):
    with pytest.raises(DataError, match=message):
        load_classification(table(tmp_path, labels, kind), **options)


@pytest.mark.parametrize(("content", "message"), [("[]", "is not a list or object"), ("{", "could not be read as")])
def test_a_bad_file_of_names_is_named(tmp_path, content, message):
    (tmp_path / "names.json").write_text(content)
    with pytest.raises(DataError, match=rf"names\.json {message}"):
        load_classification(table(tmp_path, ["a"], TEXT), class_names=str(tmp_path / "names.json"))


def test_data_without_labels_is_refused(tmp_path):
    columns = {"image": [picture(0)], "caption": ["a cat"]}
    file = write_table(tmp_path / "pairs.parquet", columns, {"image": datasets.Image(), "caption": TEXT})
    with pytest.raises(DataError, match=r"pairs\.parquet has no label column among image, caption \(looked for label"):
        load_classification(file)
    class_folders(tmp_path / "unlabelled", ["train/a.png", "val/b.png"])
    with pytest.raises(
        DataError, match=r"unlabelled has folders of splits \(train, val\), but none of 'test' with class"
    ):
        load_classification(str(tmp_path / "unlabelled"), "test")
    with pytest.raises(DataError, match="No data was named"):
        load_classification([])


def test_embedded_data_is_read_with_any_of_its_columns():
    pytest.importorskip("easy_vqa", reason="the package that carries the pictures is missing")
    records = load_classification("easy_vqa", "validation", label_column="color")
    assert set(records["label"]) == set(class_names_of(records)) and "teal" in class_names_of(records)
    with pytest.raises(DataError, match="easy_vqa has no split 'dev'"):
        load_classification("easy_vqa", "dev")


def test_names_in_json_keep_their_letters(tmp_path):
    file = tmp_path / "names.json"
    file.write_text(json.dumps({"n1": "Löwe"}, ensure_ascii=False), encoding="utf-8")
    assert by_id(load_classification(table(tmp_path, ["n1"], TEXT), class_names=str(file))) == {"0": "Löwe"}
