"""RefCOCO+ folders and ALBEF's lists give the same records; pickles run no code; errors name file and row."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
from helpers import ANNOTATIONS, image_at, write_json

from tcl_hf.data.annotations.phrases import load_phrases
from tcl_hf.data.pairs import DataError


def python_2_pickle(value) -> bytes:
    """The opcodes that Python 2 writes for lists, dictionaries, byte strings and numbers below 2**31."""
    if isinstance(value, dict):
        return b"}(" + b"".join(python_2_pickle(k) + python_2_pickle(v) for k, v in value.items()) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(python_2_pickle, value)) + b"e"
    if isinstance(value, str):
        return b"U" + bytes([len(value)]) + value.encode("latin1")
    return b"J" + value.to_bytes(4, "little")


REFS = [
    {
        "ref_id": 901,
        "ann_id": 501,
        "image_id": 77,
        "category_id": 3,
        "split": "testA",
        "file_name": "COCO_train2014_000000000077_901.jpg",
        "sent_ids": [1, 2],
        "sentences": [
            {"sent_id": 1, "sent": "goat with bell", "raw": "Goat with bell", "tokens": ["goat", "with", "bell"]},
            {"sent_id": 2, "sent": "the caf\xe9 goat", "raw": "the caf\xe9 goat", "tokens": ["the", "caf\xe9", "goat"]},
        ],
    },
    {
        "ref_id": 902,
        "ann_id": 502,
        "image_id": 77,
        "category_id": 4,
        "split": "testB",
        "file_name": "COCO_train2014_000000000077_902.jpg",
        "sent_ids": [3],
        "sentences": [{"sent_id": 3, "sent": "barrel", "raw": "barrel", "tokens": ["barrel"]}],
    },
]


@pytest.fixture
def refcoco(tmp_path):
    """A folder of RefCOCO+, and ALBEF's list beside it."""
    shutil.copytree(ANNOTATIONS / "refcoco+", tmp_path / "refcoco+")
    shutil.copy(ANNOTATIONS / "refcoco+_test.json", tmp_path)
    (tmp_path / "refcoco+" / "refs(unc).p").write_bytes(b"\x80\x02" + python_2_pickle(REFS) + b".")
    return tmp_path / "refcoco+"


GOAT = {
    "image_id": "77",
    "proposals": [[0, 0, 30, 40], [50, 10, 70, 30]],
    "width": 100,
    "height": 50,
}


def whole_phrase(end, types, box, phrase_id):
    return [{"caption_index": 0, "start": 0, "end": end, "types": types, "boxes": [box], "phrase_id": phrase_id}]


def test_refcoco_sentences_become_records(refcoco):
    image = image_at(refcoco / "COCO_train2014_000000000077.jpg")
    goat, barrel = (
        [10.5, 5, 30.5, 35.25],
        [60, 0, 100, 50],
    )  # in the file, the barrel's box leaves the image by half a pixel
    expected = [
        {"image": image, "captions": ["goat with bell"], "phrases": whole_phrase(14, ["goat"], goat, "901"), **GOAT},
        {"image": image, "captions": ["the caf\xe9 goat"], "phrases": whole_phrase(13, ["goat"], goat, "901"), **GOAT},
        {"image": image, "captions": ["barrel"], "phrases": whole_phrase(6, [], barrel, "902"), **GOAT},
    ]
    assert list(load_phrases(str(refcoco), "test")) == expected
    assert list(load_phrases(str(refcoco), "testA")) == expected[:2]
    (record,) = load_phrases(str(refcoco), "testB", image_root=str(refcoco.parent))
    assert record["image"] == image_at(refcoco.parent / "COCO_train2014_000000000077.jpg")
    (refcoco.parent / "train2014").mkdir()
    (record,) = load_phrases(str(refcoco), "testB", image_root=str(refcoco.parent))
    assert record["image"] == image_at(refcoco.parent / "train2014" / "COCO_train2014_000000000077.jpg")
    with pytest.raises(DataError, match=r"holds no records in its split 'train'"):
        load_phrases(str(refcoco), "train")


def test_albefs_refcoco_gets_its_boxes_from_the_folder(refcoco, tmp_path):
    image = image_at("coco/train2014/COCO_train2014_000000000077.jpg")
    goat, barrel = [10.5, 5, 30.5, 35.25], [60, 0, 100, 50]
    expected = [
        {"image": image, "captions": ["goat with bell"], "phrases": whole_phrase(14, ["goat"], goat, "901"), **GOAT},
        {"image": image, "captions": ["barrel"], "phrases": whole_phrase(6, [], barrel, "902"), **GOAT},
    ]
    beside = str(tmp_path / "refcoco+_test.json")
    assert list(load_phrases(beside, "test", image_root="coco")) == expected
    assert list(load_phrases(beside, "testB", image_root="coco")) == expected[1:]
    (tmp_path / "elsewhere").mkdir()
    alone = shutil.copy(beside, tmp_path / "elsewhere")
    assert list(load_phrases(alone, "test", image_root="coco", annotations=str(refcoco))) == expected
    record = load_phrases(alone, "test", image_root="coco")[1]
    assert record == {
        "image": image,
        "image_id": "train2014/COCO_train2014_000000000077.jpg",
        "captions": ["barrel"],
        "phrases": [{**expected[1]["phrases"][0], "boxes": []}],
        "proposals": [],
        "width": 0,
        "height": 0,
    }
    with pytest.raises(
        DataError, match="row 1: the list does not separate 'testA': give the RefCOCO folder with annotations"
    ):
        load_phrases(alone, "testA")
    stranger = write_json(tmp_path / "elsewhere", [{"image": "1.jpg", "text": "a", "ref_id": 903}])
    with pytest.raises(DataError, match=r"rows.json, row 1: its ref_id '903' is not in the RefCOCO folder"):
        load_phrases(stranger, annotations=str(refcoco))


class Malice:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_would_call_code_is_refused_and_calls_nothing(refcoco, protocol):
    trace = refcoco / "trace"
    (refcoco / "refs(unc).p").write_bytes(pickle.dumps([REFS[0], Malice(trace)], protocol=protocol))
    pickle.loads((refcoco / "refs(unc).p").read_bytes())
    trace.unlink()  # Python's own unpickler has called the code
    with pytest.raises(DataError, match=r"refs\(unc\)\.p could not be read: it refers to [\w.]+, but only plain data"):
        load_phrases(str(refcoco), "test")
    assert not trace.exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x02](U", b"no pickle", b"\x80\x02}."])
def test_a_broken_pickle_is_named(refcoco, content):
    (refcoco / "refs(unc).p").write_bytes(content)
    with pytest.raises(DataError, match=r"refs\(unc\)\.p (could not be read|is not a list of refs)"):
        load_phrases(str(refcoco), "test")


def test_a_ref_without_its_annotation_is_named(refcoco):
    (refcoco / "refs(unc).p").write_bytes(pickle.dumps([REFS[0], REFS[1] | {"ann_id": 503}], protocol=2))
    with pytest.raises(
        DataError, match=r"refs\(unc\)\.p, row 2: its ann_id 503 or image_id 77 is not in .*instances.json"
    ):
        load_phrases(str(refcoco), "test")
    (refcoco / "refs(unc).p").write_bytes(pickle.dumps([{"ref_id": 1}], protocol=2))
    with pytest.raises(DataError, match=r"refs\(unc\)\.p, row 1: it has no 'ann_id'"):
        load_phrases(str(refcoco), "test")
    (refcoco / "refs(unc).p").write_bytes(pickle.dumps(REFS, protocol=2))
    instances = json.loads((refcoco / "instances.json").read_text())
    del instances["annotations"][1]["bbox"]
    write_json(refcoco, instances, "instances.json")
    with pytest.raises(DataError, match=r"instances.json, row 2: it has no 'bbox'"):
        load_phrases(str(refcoco), "test")
    (refcoco / "refs(unc).p").unlink()
    with pytest.raises(DataError, match=r"has no refs\(unc\)\.p"):
        load_phrases(str(refcoco), "test")
