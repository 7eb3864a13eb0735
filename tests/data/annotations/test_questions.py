"""Questions in every format give the same records, and errors name file and row."""

import json

import datasets
import pytest
from helpers import ANNOTATIONS, PICTURE, TEXT, image_at, png, write_json, write_table

from tcl_hf.data.annotations.questions import load_questions, read_answer_list
from tcl_hf.data.pairs import DataError


def test_vqa_v2_questions_get_their_annotations(tmp_path):
    files = {
        "source": str(ANNOTATIONS / "vqa_questions.json"),
        "annotations": str(ANNOTATIONS / "vqa_annotations.json"),
    }
    questions = load_questions(**files, image_root=str(tmp_path))
    image = {"image": image_at(tmp_path / "COCO_val2014_000000000042.jpg"), "image_id": "42", "weight": 1.0}
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
    assert questions[0]["image"] == image_at(tmp_path / "val2014" / "COCO_val2014_000000000042.jpg")


def test_vqa_v2_questions_without_annotations_have_no_answers(tmp_path):
    questions = load_questions(str(ANNOTATIONS / "vqa_questions.json"))
    assert questions["answers"] == [[], []]
    assert questions["answer_type"] == [None, None]
    content = json.loads((ANNOTATIONS / "vqa_questions.json").read_text()) | {"data_subtype": "test-dev2015"}
    questions = load_questions(write_json(tmp_path, content))
    assert questions[0]["image"] == image_at(tmp_path / "COCO_test2015_000000000042.jpg")


def test_a_vqa_v2_question_without_its_annotation_is_named(tmp_path):
    annotations = write_json(
        tmp_path, {"annotations": [{"question_id": 42000, "answers": [{"answer": "a"}]}]}, "a.json"
    )
    with pytest.raises(DataError, match=r"vqa_questions.json, row 2: its question_id '42001' is not in .*a.json"):
        load_questions(str(ANNOTATIONS / "vqa_questions.json"), annotations=annotations)


def test_albefs_questions_are_of_vqa_and_of_visual_genome():
    roots = {"vqa": "coco", "vg": "genome"}
    files = [str(ANNOTATIONS / name) for name in ("albef_vqa.json", "albef_vqa_test.json")]
    none = {"answer_type": None, "question_type": None}
    assert list(load_questions(files, image_root=roots)) == [
        {
            "image": image_at("coco/train2014/COCO_train2014_000000000007.jpg"),
            "image_id": "train2014/COCO_train2014_000000000007.jpg",
            "question": "What is the hat made of?",
            "question_id": "7001",
            "answers": ["straw", "straw", "felt"],
            "weight": 1.0,
            **none,
        },
        {
            "image": image_at("genome/image/8.jpg"),
            "image_id": "image/8.jpg",
            "question": "Who holds the rope?",
            "question_id": "8001",
            "answers": ["a sailor"],
            "weight": 0.5,
            **none,
        },
        {
            "image": image_at("coco/test2015/COCO_test2015_000000000009.jpg"),
            "image_id": "test2015/COCO_test2015_000000000009.jpg",
            "question": "Where is the kite?",
            "question_id": "9001",
            "answers": [],
            "weight": 1.0,
            **none,
        },
    ]
    assert load_questions(files, image_root="all")[1]["image"] == image_at("all/image/8.jpg")
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


def test_questions_of_a_table_whose_answers_are_objects(tmp_path):
    table = {
        "image": [{"bytes": png(0), "path": None}],
        "question": ["Who?"],
        "answers": [[{"answer": "a", "answer_id": 1}, {"answer": "b", "answer_id": 2}]],
    }
    answer = {"answer": TEXT, "answer_id": datasets.Value("int32")}
    file = write_table(
        tmp_path / "x.parquet", table, {"image": datasets.Image(), "question": TEXT, "answers": datasets.List(answer)}
    )
    (record,) = load_questions(file)
    assert record["image"] == {"bytes": png(0), "path": None}
    assert (record["question"], record["answers"], record["image_id"]) == ("Who?", ["a", "b"], "0")


def test_a_missing_column_of_a_table_is_named(tmp_path):
    table = {"image": [{"bytes": png(0), "path": None}], "asked": ["Who?"]}
    file = write_table(tmp_path / "x.parquet", table, {"image": datasets.Image(), "asked": TEXT})
    with pytest.raises(DataError, match=r"x.parquet, row 1: it has no 'question' \(looked for question among asked, i"):
        load_questions(file)


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


def test_an_answer_list_is_read_and_its_faults_are_named(tmp_path):
    assert read_answer_list(str(ANNOTATIONS / "answer_list.json")) == ["no", "yes", "cup, books"]
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
