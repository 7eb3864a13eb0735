"""Images stay below their root: a list of somebody else could name any image of this machine."""

import json
import os

import pytest
from helpers import TEXT, png, write_json, write_table

from tcl_hf.data.annotations.entailment import load_entailment
from tcl_hf.data.images import why_unusable
from tcl_hf.data.pairs import load_pairs
from tcl_hf.data.records import DataError
from tcl_hf.data.roots import OUTSIDE, below

ROWS = 6


@pytest.fixture
def place(tmp_path):
    """A folder `data` with images, and an image beside it."""
    (tmp_path / "data" / "images").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(png(0))
    for number in range(ROWS):
        (tmp_path / "data" / "images" / f"{number}.png").write_bytes(png(number))
    return tmp_path


@pytest.mark.parametrize(
    ("root", "path", "expected"),
    [
        ("/data", "a/b.png", "/data/a/b.png"),
        ("/data", "/data/a/b.png", "/data/a/b.png"),
        ("/data", "a/../b..png", "/data/b..png"),
        ("/data", "../data/b.png", "/data/b.png"),
        ("/", "/etc/b.png", "/etc/b.png"),
        ("/data", "/etc/b.png", None),
        ("/data", "/database/b.png", None),
        ("/data", "../database/b.png", None),
        ("/data", "a/../../b.png", None),
        ("/data", "/data/../b.png", None),
        ("s3://bucket/data", "a/b.png", "s3://bucket/data/a/b.png"),
        ("s3://bucket/data", "/etc/b.png", None),
        ("s3://bucket/data", "../other/b.png", None),
    ],
)
def test_a_path_leaves_its_root_or_not(root, path, expected):
    assert below(root, path, False) == (OUTSIDE + path if expected is None else expected)
    assert below(root, path, True) == os.path.join(root, path)


def source_of(kind: str, folder, paths: list[str]) -> str:
    """A list or a table of paths in a folder."""
    captions = ["a dog"] * len(paths)
    rows = [{"image": path, "caption": "a dog"} for path in paths]
    if kind == "json":
        return write_json(folder, rows)
    if kind == "jsonl":
        (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return str(folder / "rows.jsonl")
    if kind == "csv":
        (folder / "rows.csv").write_text("image,caption\n" + "".join(f"{path},a dog\n" for path in paths))
        return str(folder / "rows.csv")
    return write_table(folder / "rows.parquet", {"image": paths, "caption": captions}, {"image": TEXT, "caption": TEXT})


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
def test_a_sample_that_leaves_the_root_is_one_that_cannot_be_used(kind, streaming, place):
    secret = str(place / "secret.png")
    inside = str(place / "data" / "images" / "2.png")
    paths = ["images/1.png", secret, "../secret.png", "images/../../secret.png", inside]
    source = source_of(kind, place / "data", paths)
    reasons = [why_unusable(record) for record in load_pairs(source, streaming=streaming)]
    assert [reason is None for reason in reasons] == [True, False, False, False, True]
    assert all("outside of image_root, and allow_outside_root is not set" in reason for reason in reasons[1:4])
    trusted = load_pairs(source, streaming=streaming, allow_outside_root=True)
    assert [why_unusable(record) for record in trusted] == [None] * 5
    # Nothing leaves a root that holds everything.
    if kind != "parquet":
        rows = ["data/images/1.png", secret, "secret.png", "data/../secret.png", inside]
        wider = load_pairs(source_of(kind, place / "data", rows), streaming=streaming, image_root=str(place))
        assert [why_unusable(record) for record in wider] == [None] * 5


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_a_list_of_nothing_but_paths_outside_names_the_remedies(kind, place):
    paths = [str(place / "data" / "images" / f"{number}.png") for number in range(ROWS)]
    (place / "lists").mkdir()
    source = source_of(kind, place / "lists", paths)
    with pytest.raises(
        DataError, match=r"names images outside of .*0\.png: name the folder .* image_root, or set allow"
    ):
        load_pairs(source)
    for options in ({"image_root": str(place / "data")}, {"allow_outside_root": True}):
        assert [why_unusable(record) for record in load_pairs(source, **options)] == [None] * ROWS


def test_annotations_stay_below_their_root(place):
    secret = str(place / "secret.png")
    rows = [{"image": image, "sentence": "a dog", "label": "entailment"} for image in ("images/1.png", secret)]
    source = write_json(place / "data", rows)
    reasons = [why_unusable(record) for record in load_entailment(source)]
    assert reasons[0] is None and "outside of image_root" in reasons[1]
    assert why_unusable(load_entailment(source, allow_outside_root=True)[1]) is None
    with pytest.raises(DataError, match="names images outside of image_root, such as"):
        load_entailment(write_json(place / "data", rows[1:], "others.json"))
