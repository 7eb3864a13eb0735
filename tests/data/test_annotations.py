"""Every file format of a task gives the same records; what is wrong in a file is named with its row."""

import json
import logging
import pickle
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from helpers import png

from tcl_hf.data.annotations.entailment import load_entailment
from tcl_hf.data.annotations.phrases import load_phrases
from tcl_hf.data.annotations.questions import load_questions, read_answer_list
from tcl_hf.data.annotations.reasoning import load_reasoning
from tcl_hf.data.pairs import DataError, captions_of, load_pairs

FILES = Path(__file__).parent / "fixtures" / "annotations"
PICTURE = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}  # as parquet of other origin has it
TEXT = datasets.Value("string")


def at(path):
    return {"bytes": None, "path": str(path)}


def write_json(folder, rows, name="rows.json"):
    (folder / name).write_text(json.dumps(rows))
    return str(folder / name)


def write_table(file, table, features):
    datasets.Dataset.from_dict(table, features=datasets.Features(features)).to_parquet(file)
    return str(file)


@pytest.fixture
def pictures(tmp_path):
    """Parquet files of two splits with the images 1001 and 1002."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, number in (("train", 1001), ("validation", 1002)):
        table = {"image": [{"bytes": png(number), "path": f"{number}.jpg"}], "image_id": [number]}
        write_table(folder / f"{name}.parquet", table, {"image": PICTURE, "image_id": datasets.Value("int64")})
    return str(folder)


# Retrieval


def test_rows_of_one_image_keep_its_id():
    pairs = load_pairs(str(FILES / "albef_coco_train.json"), image_root="coco")
    assert list(pairs) == [
        {"image": at("coco/val2014/COCO_val2014_000000000123.jpg"), "captions": [text], "image_id": "coco_123"}
        for text in ("A tram waits.", "The tram is yellow.")
    ]


@pytest.mark.parametrize("split", ["val", "validation", "dev"])
def test_karpathys_splits(split):
    file = str(FILES / "karpathy_coco.json")
    assert list(load_pairs(file, "train", image_root="coco")) == [
        {
            "image": at("coco/train2014/COCO_train2014_000000000001.jpg"),
            "captions": ["A barn.", "A red barn."],
            "image_id": "1",
        },
        {"image": at("coco/val2014/COCO_val2014_000000000002.jpg"), "captions": ["Two geese."], "image_id": "2"},
    ]
    assert load_pairs(file, split)["image_id"] == ["3"]
    with pytest.raises(DataError, match="no pairs in its split 'test'"):
        load_pairs(file, "test")


def test_karpathys_flickr30k_has_no_folders_and_its_own_ids():
    assert list(load_pairs(str(FILES / "karpathy_flickr30k.json"), "test")) == [
        {"image": at(FILES / "1001.jpg"), "captions": ["Two boys ."], "image_id": "5"}
    ]


def test_a_broken_karpathy_file_names_the_image(tmp_path):
    file = write_json(tmp_path, {"images": [{"filename": "1.jpg", "split": "train"}]})
    with pytest.raises(
        DataError, match=r"rows.json, image 1, is not as in Karpathy's splits \(KeyError: 'sentences'\)"
    ):
        load_pairs(file)


# Question answering


def test_vqa_questions_with_their_annotations(tmp_path):
    files = {"source": str(FILES / "vqa_questions.json"), "annotations": str(FILES / "vqa_annotations.json")}
    questions = load_questions(**files, image_root=str(tmp_path))
    image = {"image": at(tmp_path / "COCO_val2014_000000000042.jpg"), "image_id": "42", "weight": 1.0}
    assert list(questions) == [
        {
            **image,
            "question": "What lies on the table?",
            "question_id": "42000",
            "answers": ["cup, books"],
            "answer_type": "other",
            "question_type": "what",
        },
        {
            **image,
            "question": "Is the lamp on?",
            "question_id": "42001",
            "answers": ["no", "yes", "no"],
            "answer_type": "yes/no",
            "question_type": "is the",
        },
    ]
    (tmp_path / "val2014").mkdir()
    questions = load_questions(**files, image_root=str(tmp_path))
    assert questions[0]["image"] == at(tmp_path / "val2014" / "COCO_val2014_000000000042.jpg")


def test_vqa_questions_without_annotations_have_no_answers(tmp_path):
    questions = load_questions(str(FILES / "vqa_questions.json"))
    assert questions["answers"] == [[], []]
    assert questions["answer_type"] == [None, None]
    content = json.loads((FILES / "vqa_questions.json").read_text()) | {"data_subtype": "test-dev2015"}
    questions = load_questions(write_json(tmp_path, content))
    assert questions[0]["image"] == at(tmp_path / "COCO_test2015_000000000042.jpg")


def test_a_question_that_is_not_annotated_is_named(tmp_path):
    annotations = write_json(
        tmp_path, {"annotations": [{"question_id": 42000, "answers": [{"answer": "a"}]}]}, "a.json"
    )
    with pytest.raises(DataError, match=r"vqa_questions.json, row 2: its question '42001' is not in .*a.json"):
        load_questions(str(FILES / "vqa_questions.json"), annotations=annotations)


def test_albefs_questions_of_two_data_sets():
    roots = {"vqa": "coco", "vg": "genome"}
    files = [str(FILES / name) for name in ("albef_vqa.json", "albef_vqa_test.json")]
    none = {"answer_type": None, "question_type": None}
    assert list(load_questions(files, image_root=roots)) == [
        {
            "image": at("coco/train2014/COCO_train2014_000000000007.jpg"),
            "image_id": "train2014/COCO_train2014_000000000007.jpg",
            "question": "What is the hat made of?",
            "question_id": "7001",
            "answers": ["straw", "straw", "felt"],
            "weight": 1.0,
            **none,
        },
        {
            "image": at("genome/image/8.jpg"),
            "image_id": "image/8.jpg",
            "question": "Who holds the rope?",
            "question_id": "8001",
            "answers": ["a sailor"],
            "weight": 0.5,
            **none,
        },
        {
            "image": at("coco/test2015/COCO_test2015_000000000009.jpg"),
            "image_id": "test2015/COCO_test2015_000000000009.jpg",
            "question": "Where is the kite?",
            "question_id": "9001",
            "answers": [],
            "weight": 1.0,
            **none,
        },
    ]
    assert load_questions(files, image_root="all")[1]["image"] == at("all/image/8.jpg")
    with pytest.raises(DataError, match="row 2: its dataset 'vg' has no images: image_root names only vqa"):
        load_questions(files, image_root={"vqa": "coco"})


def test_questions_of_one_image_in_a_table_become_records(tmp_path):
    table = {
        "image_id": ["a", "b"],
        "image": [{"bytes": png(n), "path": f"{n}.jpg"} for n in range(2)],
        "qa": [[{"question": "q1", "answer": "cup, books"}, {"question": "q2", "answer": "2"}], [{"question": "q3"}]],
    }
    table["qa"][1][0]["answer"] = None
    write_table(
        tmp_path / "train.parquet",
        table,
        {"image_id": TEXT, "image": PICTURE, "qa": [{"question": TEXT, "answer": TEXT}]},
    )
    records = list(load_questions(str(tmp_path)))
    assert [record["question"] for record in records] == ["q1", "q2", "q3"]
    assert [record["answers"] for record in records] == [["cup, books"], ["2"], []]
    assert [record["question_id"] for record in records] == ["a-0", "a-1", "b-0"]
    assert [record["image_id"] for record in records] == ["a", "a", "b"]
    assert [record["image"] for record in records] == [{"bytes": png(n), "path": f"{n}.jpg"} for n in (0, 0, 1)]


def test_questions_of_a_table_with_unusual_columns(tmp_path):
    table = {
        "picture": [{"bytes": png(0), "path": None}],
        "asked": ["Who?"],
        "answers": [[{"answer": "a", "answer_id": 1}, {"answer": "b", "answer_id": 2}]],
    }
    answer = {"answer": TEXT, "answer_id": datasets.Value("int32")}
    file = write_table(
        tmp_path / "x.parquet", table, {"picture": datasets.Image(), "asked": TEXT, "answers": datasets.List(answer)}
    )
    (record,) = load_questions(file, columns={"image": "picture", "question": "asked"})
    assert record["image"] == {"bytes": png(0), "path": None}
    assert (record["question"], record["answers"], record["image_id"]) == ("Who?", ["a", "b"], "0")
    with pytest.raises(DataError, match=r"x.parquet, row 1: it has no 'question' \(looked for question among asked, a"):
        load_questions(file, columns={"image": "picture"})
    with pytest.raises(DataError, match=r"it has no 'question' \(looked for nothing among"):
        load_questions(file, columns={"image": "picture", "question": "nothing"})
    with pytest.raises(DataError, match="There is no column picture to name: columns are image, "):
        load_questions(file, columns={"picture": "image"})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "1.jpg", "answer": "a"}, r"row 2: it has no 'question' \(looked for question among image, answer"),
        ({"image": "1.jpg", "question": 5}, "row 2: its 'question' is 5: it must be a text"),
        ({"question": "Who?"}, r"row 2: it has no 'image' \(looked for image, "),
        ({"image": "1.jpg", "question": "Who?", "answer": [3]}, r"row 2: its answers are \[3\]: each must be a text"),
        ("Who?", "row 2: it is 'Who\\?', not an object with named fields"),
    ],
)
def test_a_bad_question_is_named(tmp_path, row, message):
    with pytest.raises(DataError, match=f"rows.json, {message}"):
        load_questions(write_json(tmp_path, [{"image": "1.jpg", "question": "Who?"}, row]))


def test_answer_list(tmp_path):
    assert read_answer_list(str(FILES / "answer_list.json")) == ["no", "yes", "cup, books"]
    for content, message in (
        (["yes", 2], "row 2: 2 is not a text"),
        ({"yes": 1}, "is not a JSON list of answers"),
        ([], "is not a JSON list of answers"),
    ):
        with pytest.raises(DataError, match=message):
            read_answer_list(write_json(tmp_path, content))
    (tmp_path / "rows.json").write_text("[")
    with pytest.raises(DataError, match=r"rows.json could not be read as a JSON list of answers: Expecting"):
        read_answer_list(str(tmp_path / "rows.json"))
    with pytest.raises(DataError, match=r"nowhere.json could not be read"):
        read_answer_list(str(tmp_path / "nowhere.json"))


# Visual entailment


def test_snli_ve_without_the_rows_that_have_no_gold_label(caplog):
    with caplog.at_level(logging.WARNING):
        records = list(load_entailment(str(FILES / "snli_ve.jsonl"), image_root="flickr30k"))
    assert records == [
        {
            "image": at("flickr30k/1001.jpg"),
            "captions": ["The boys are brothers."],
            "image_id": "1001",
            "label": "neutral",
            "pair_id": "1001.jpg#0r1n",
        },
        {
            "image": at("flickr30k/1002.jpg"),
            "captions": ["Somebody cooks."],
            "image_id": "1002",
            "label": "entailment",
            "pair_id": "1002.jpg#2r2e",
        },
    ]
    assert "snli_ve.jsonl: 1 rows without a gold label ('-') were left out." in caplog.text


def test_entailment_of_albef_and_of_plain_lines():
    files = [str(FILES / name) for name in ("albef_ve.json", "entailment.jsonl")]
    none = {"pair_id": None}
    assert list(load_entailment(files, image_root="flickr30k")) == [
        {
            "image": at("flickr30k/1001.jpg"),
            "captions": ["Nobody is there."],
            "image_id": "1001",
            "label": "contradiction",
            **none,
        },
        {
            "image": at("flickr30k/1001.jpg"),
            "captions": ["The boat is carried ."],
            "image_id": "1001",
            "label": "entailment",
            **none,
        },
        {
            "image": at("flickr30k/1002.jpg"),
            "captions": ["The cook sleeps ."],
            "image_id": "1002",
            "label": "contradiction",
            **none,
        },
    ]


def test_entailment_of_a_table_whose_labels_are_numbers_with_names(tmp_path):
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
def test_another_label_is_named(tmp_path, label):
    rows = [{"image": "1", "sentence": "a", "label": "neutral"}, {"image": "1", "sentence": "a", "label": label}]
    message = rf"rows.json, row 2: its label is {label!r}: it must be one of contradiction, neutral, entailment\."
    with pytest.raises(DataError, match=message):
        load_entailment(write_json(tmp_path, rows))


def test_bad_json_lines_are_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"image": "1", "sentence": "a", "label": "neutral"}\n\n{"image": \n')
    with pytest.raises(DataError, match=r"rows.jsonl, row 3: this line is not JSON"):
        load_entailment(str(file))
    file.write_text('{"image": ')
    with pytest.raises(DataError, match=r"rows.jsonl could not be read as a JSON list or JSON lines"):
        load_entailment(str(file))
    file.write_text("[]")
    with pytest.raises(DataError, match=r"rows.jsonl holds no records in its split 'dev'"):
        load_entailment(str(file), "dev")
    with pytest.raises(DataError, match="No data was named"):
        load_entailment([])


# Images that are elsewhere


def test_images_are_joined_by_id_whatever_their_split(pictures):
    records = load_entailment(
        [str(FILES / name) for name in ("entailment.jsonl", "snli_ve.jsonl", "albef_ve.json")], image_root=pictures
    )
    assert [record["image_id"] for record in records] == ["1001", "1002", "1001", "1002", "1001"]
    for record in records:
        assert record["image"] == {"bytes": png(int(record["image_id"])), "path": f"{record['image_id']}.jpg"}


def test_joined_records_can_be_selected_batched_and_read_by_workers(pictures):
    records = load_entailment(str(FILES / "entailment.jsonl"), image_root=f"{pictures}/*.parquet")
    assert list(captions_of(records)) == ["The boat is carried .", "The cook sleeps ."]
    assert records[:2]["image"][1]["bytes"] == png(1002)
    assert records.select([1])[0]["image"]["bytes"] == png(1002)
    assert pickle.loads(pickle.dumps(records))[0]["image"]["bytes"] == png(1001)
    loader = torch.utils.data.DataLoader(records, batch_size=2, num_workers=1, collate_fn=list)
    assert [record["image"]["bytes"] for record in next(iter(loader))] == [png(1001), png(1002)]


def test_an_image_that_is_not_there_is_named(pictures, tmp_path):
    rows = [{"image_id": "1001", "sentence": "a", "label": "neutral"}]
    rows.append(rows[0] | {"image_id": "1003"})
    with pytest.raises(
        DataError, match=r"rows.json, row 2: its image '1003' is not among the 2 image ids of .*pictures"
    ):
        load_entailment(write_json(tmp_path, rows), image_root=pictures)
    table = write_table(tmp_path / "no_ids.parquet", {"image": [{"bytes": b"", "path": None}]}, {"image": PICTURE})
    with pytest.raises(DataError, match=r"no_ids.parquet has no column image_id among image"):
        load_entailment(write_json(tmp_path, rows), image_root=table)


# Two-image reasoning


def test_nlvr2_and_its_folders(tmp_path):
    files = [str(FILES / name) for name in ("nlvr2_dev.json", "nlvr2_train.json")]
    records = list(load_reasoning(files, image_root=str(tmp_path)))
    assert records == [
        {
            "images": [at(tmp_path / "dev-12-0-img0.png"), at(tmp_path / "dev-12-0-img1.png")],
            "captions": ["Both pictures show a bridge."],
            "image_id": "dev-12-0-img0",
            "label": "True",
            "pair_id": "dev-12-0-1",
        },
        {
            "images": [at(tmp_path / "dev-12-3-img0.png"), at(tmp_path / "dev-12-3-img1.png")],
            "captions": ["The left bridge is red."],
            "image_id": "dev-12-3-img0",
            "label": "False",
            "pair_id": "dev-12-3-0",
        },
        {
            "images": [at(tmp_path / "57" / "train-34-2-img0.png"), at(tmp_path / "57" / "train-34-2-img1.png")],
            "captions": ["One picture shows an owl."],
            "image_id": "train-34-2-img0",
            "label": "False",
            "pair_id": "train-34-2-0",
        },
    ]
    for folder in ("dev", "images/train"):
        (tmp_path / folder).mkdir(parents=True)
    records = load_reasoning(files, image_root=str(tmp_path))
    assert records[0]["images"][1] == at(tmp_path / "dev" / "dev-12-0-img1.png")
    assert records[2]["images"][1] == at(tmp_path / "images" / "train" / "57" / "train-34-2-img1.png")


def test_reasoning_of_albef(tmp_path):
    assert list(load_reasoning(str(FILES / "albef_nlvr.json"), image_root="nlvr2")) == [
        {
            "images": [at("nlvr2/dev/dev-5-0-img0.png"), at("nlvr2/dev/dev-5-0-img1.png")],
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
def test_reasoning_of_tables(tmp_path, together):
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
    (record,) = load_reasoning(str(FILES / "albef_nlvr.json"), image_root=root)
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
def test_a_bad_pair_is_named(tmp_path, row, message):
    with pytest.raises(DataError, match=f"rows.json, row 1: {message}"):
        load_reasoning(write_json(tmp_path, [{"sentence": "a", **row}]))


# Grounding


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
    shutil.copytree(FILES / "refcoco+", tmp_path / "refcoco+")
    shutil.copy(FILES / "refcoco+_test.json", tmp_path)
    (tmp_path / "refcoco+" / "refs(unc).p").write_bytes(b"\x80\x02" + python_2_pickle(REFS) + b".")
    return tmp_path / "refcoco+"


GOAT = {
    "image_id": "77",
    "proposals": [[0, 0, 30, 40], [50, 10, 70, 30]],
    "width": 100,
    "height": 50,
}


def whole(end, types, box, phrase_id):
    return [{"caption_index": 0, "start": 0, "end": end, "types": types, "boxes": [box], "phrase_id": phrase_id}]


def test_refcoco(refcoco):
    image = at(refcoco / "COCO_train2014_000000000077.jpg")
    goat, barrel = [10.5, 5, 30.5, 35.25], [60, 0, 100, 50]  # the barrel's stuck out by half a pixel
    expected = [
        {"image": image, "captions": ["goat with bell"], "phrases": whole(14, ["goat"], goat, "901"), **GOAT},
        {"image": image, "captions": ["the caf\xe9 goat"], "phrases": whole(13, ["goat"], goat, "901"), **GOAT},
        {"image": image, "captions": ["barrel"], "phrases": whole(6, [], barrel, "902"), **GOAT},
    ]
    assert list(load_phrases(str(refcoco), "test")) == expected
    assert list(load_phrases(str(refcoco), "testA")) == expected[:2]
    (record,) = load_phrases(str(refcoco), "testB", image_root=str(refcoco.parent))
    assert record["image"] == at(refcoco.parent / "COCO_train2014_000000000077.jpg")
    (refcoco.parent / "train2014").mkdir()
    (record,) = load_phrases(str(refcoco), "testB", image_root=str(refcoco.parent))
    assert record["image"] == at(refcoco.parent / "train2014" / "COCO_train2014_000000000077.jpg")
    with pytest.raises(DataError, match=r"holds no records in its split 'train'"):
        load_phrases(str(refcoco), "train")


def test_albefs_refcoco_gets_its_boxes_from_the_folder(refcoco, tmp_path):
    image = at("coco/train2014/COCO_train2014_000000000077.jpg")
    goat, barrel = [10.5, 5, 30.5, 35.25], [60, 0, 100, 50]
    expected = [
        {"image": image, "captions": ["goat with bell"], "phrases": whole(14, ["goat"], goat, "901"), **GOAT},
        {"image": image, "captions": ["barrel"], "phrases": whole(6, [], barrel, "902"), **GOAT},
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
    with pytest.raises(DataError, match="row 1: it does not tell 'testA': give the RefCOCO folder with annotations"):
        load_phrases(alone, "testA")
    stranger = write_json(tmp_path / "elsewhere", [{"image": "1.jpg", "text": "a", "ref_id": 903}])
    with pytest.raises(DataError, match=r"rows.json, row 1: its ref_id 903 is not in the RefCOCO folder"):
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
    trace.unlink()  # it does what it is made for
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


def test_flickr30k_entities():
    folder = FILES / "flickr30k_entities"
    boys, both = [0, 19, 100, 375], [89, 199, 500, 300]
    assert list(load_phrases(str(folder), image_root="flickr30k")) == [
        {
            "image": at("flickr30k/1001.jpg"),
            "captions": ["Two boys carry a small boat that leaks .", "They are in the harbour ."],
            "image_id": "1001",
            "phrases": [
                {
                    "caption_index": 0,
                    "start": 0,
                    "end": 8,
                    "types": ["people"],
                    "boxes": [boys, both],
                    "phrase_id": "12",
                },
                {
                    "caption_index": 0,
                    "start": 15,
                    "end": 27,
                    "types": ["vehicles", "other"],
                    "boxes": [both],
                    "phrase_id": "13",
                },
                {"caption_index": 0, "start": 28, "end": 32, "types": ["notvisual"], "boxes": [], "phrase_id": "0"},
                {
                    "caption_index": 1,
                    "start": 0,
                    "end": 4,
                    "types": ["people"],
                    "boxes": [boys, both],
                    "phrase_id": "12",
                },
                {"caption_index": 1, "start": 12, "end": 23, "types": ["scene"], "boxes": [], "phrase_id": "14"},
            ],
            "proposals": [],
            "width": 500,
            "height": 375,
        }
    ]


def test_what_is_wrong_in_flickr30k_entities_is_named(tmp_path):
    folder = tmp_path / "entities"
    shutil.copytree(FILES / "flickr30k_entities", folder)
    with pytest.raises(DataError, match=r"1003.xml could not be read"):
        load_phrases(str(folder), "validation")
    with pytest.raises(DataError, match=r"has no test.txt"):
        load_phrases(str(folder), "test")
    (folder / "Annotations" / "1003.xml").write_text("<annotation><size><width>9</width></size></annotation>")
    with pytest.raises(DataError, match=r"1003.xml could not be read"):
        load_phrases(str(folder), "val")
    xml = (folder / "Annotations" / "1001.xml").read_text()
    (folder / "Annotations" / "1003.xml").write_text(xml.replace("<xmax>500<", "<xmax>502<"))
    with pytest.raises(DataError, match=r"1003.txt is missing: val.txt names it"):
        load_phrases(str(folder), "val")
    shutil.copy(folder / "Sentences" / "1001.txt", folder / "Sentences" / "1003.txt")
    with pytest.raises(
        DataError, match=r"val.txt, row 1: its box \[89.0, 199.0, 502.0, 300.0\] lies outside of the image"
    ):
        load_phrases(str(folder), "val")
    (folder / "Sentences" / "1003.txt").write_text("A dog .\n[/EN#people Two boys] run .\n")
    with pytest.raises(DataError, match=r"1003.txt, row 2: a phrase is not as '\[/EN#12/people Two boys\]'"):
        load_phrases(str(folder), "val")


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


def test_phrases_of_a_table(tmp_path):
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
