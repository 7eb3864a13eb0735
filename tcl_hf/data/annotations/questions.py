"""Questions about images and their answers: VQA v2, and Visual Genome in ALBEF's lists."""

from collections.abc import Iterator
from dataclasses import replace

import datasets
from datasets import Dataset

from ..pairs import FEATURES, DataError
from .images import ImageFinder
from .rows import TEXT, Row, read_json, read_json_rows
from .sources import Source, load_records

VISUAL_GENOME_WEIGHT = 0.5  # the weight of its answers in the paper's code
QUESTION_FEATURES = datasets.Features(
    {
        "image": FEATURES["image"],
        "image_id": TEXT,
        "question": TEXT,
        "question_id": TEXT,
        "answers": datasets.List(TEXT),
        "weight": datasets.Value("float32"),
        "answer_type": TEXT,
        "question_type": TEXT,
    }
)


def load_questions(
    source: str | list[str],
    split: str = "train",
    *,
    image_root: str | dict[str, str] | None = None,
    annotations: str | list[str] | None = None,
    allow_outside_root: bool = False,
) -> Dataset:
    """Load questions about images as records `image`, `image_id`, `question`, `question_id`, `answers`, `weight`.

    `answers` are those of the source, with repeats (ten in VQA v2), and empty for a test question. `weight` is the
    share of the loss that all of them have together: 1.0, or 0.5 for Visual Genome. `answer_type` and `question_type`
    are None where a file does not have them.

    Args:
        source: one or several of
            VQA v2's questions, with `annotations`. Images are `COCO_val2014_000000000042.jpg` in the folder `val2014`
            of `image_root` if it has one, otherwise in `image_root` itself; likewise for every "data_subtype";
            ALBEF's JSON list of `question_id`, `question`, `answer`, `image` and `dataset` ("vqa" or "vg", Visual
            Genome);
            a `datasets` source with `image`, `question` and `answer` or `answers`, or with `image` and `qa`, a list of
            `question` and `answer`, each of which becomes a record.
        allow_outside_root: as in `load_records`.
        image_root: as in `load_records`; a dictionary has one for each `dataset` of ALBEF's lists.
        annotations: files with the answers to VQA v2's questions.
        split: as in `load_records`.

    Raises:
        DataError: naming file, row and remedy, if a field or an image is missing or a question has no annotation.
    """
    return load_records(_read_questions, QUESTION_FEATURES, source, split, image_root, annotations, allow_outside_root)


def _read_questions(source: Source) -> Iterator[dict]:
    answers = _read_vqa_annotations(source.annotations)
    for row in source.rows():
        if answers:
            row = row.joined(answers, "question_id", " and ".join(source.annotations))
        questions = row.get("qa")
        if questions is None:
            yield _question_record(row, source.images)
            continue
        image_id = row.get("image_id") or row.number
        for number, question in enumerate(questions):
            fields = row.fields | {"question_id": f"{image_id}-{number}"} | question
            yield _question_record(replace(row, fields=fields), source.images)


def _read_vqa_annotations(files: list[str]) -> dict[str, dict]:
    """The rows of VQA v2's annotation files by question id."""
    return {str(row.require("question_id")): row.fields for file in files for row in read_json_rows(file)}


def _question_record(row: Row, images: ImageFinder) -> dict:
    subtype, coco_id = row.get("data_subtype"), row.get("image_id")
    if subtype is None or coco_id is None:
        record = images.image_and_id(row)
    else:  # a row of VQA v2
        subtype = subtype.replace("test-dev", "test")  # test-dev asks about a part of the images of test2015
        record = images.image_and_id(row, f"COCO_{subtype}_{coco_id:0>12}.jpg", (subtype,))
    answers = row.get("answers")
    answers = answers if isinstance(answers, list) else [] if answers is None else [answers]
    answers = [answer.get("answer") if isinstance(answer, dict) else answer for answer in answers]
    if not all(isinstance(answer, str) for answer in answers):
        raise row.error(f"its answers are {answers!r:.80}: each must be a text.")
    return record | {
        "question": row.text("question"),
        "question_id": row.text_or_none("question_id") or f"{record['image_id']}-{row.number}",
        "answers": answers,
        "weight": VISUAL_GENOME_WEIGHT if row.get("dataset") == "vg" else 1.0,
        "answer_type": row.text_or_none("answer_type"),
        "question_type": row.text_or_none("question_type"),
    }


def read_answer_list(path: str) -> list[str]:
    """Read the answers that a model chooses from, in the order of the JSON list at `path`.

    Raises:
        DataError: if the file is not a list of texts; it names the first entry that is not one.
    """
    answers = read_json(path, "a JSON list of answers")
    if not isinstance(answers, list) or not answers:
        raise DataError(f'{path} is not a JSON list of answers: write it as ["yes", "no", ...].')
    for number, answer in enumerate(answers, 1):
        if not isinstance(answer, str):
            raise DataError(f"{path}, row {number}: {answer!r:.60} is not a text: write every answer in quotes.")
    return answers
