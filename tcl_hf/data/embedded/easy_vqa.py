"""The easy-VQA questions about coloured shapes, from a PyPI package: they need no download.

The package `easy-vqa` (MIT licence) has 4,000 pictures for training and 1,000 for testing, of 64 pixels a side, each
with one shape.
"""

import re

from datasets import ClassLabel, Dataset, Features

from ..annotations.questions import QUESTION_FEATURES

SPLITS = ("train", "validation", "test")
HELD_OUT = 10  # every tenth training picture is held out for validation
SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")


def load_easy_vqa(split: str = "train") -> Dataset:
    """Return the questions of a split as records of question answering.

    The package has a training and a test part. "validation" has the questions about every tenth training picture, and
    "train" those about the others.

    Raises:
        ValueError: if the split does not exist.
        ImportError: if the package is missing.
    """
    if split not in SPLITS:
        raise ValueError(f"easy_vqa has no split '{split}': choose one of {', '.join(SPLITS)}.")
    try:
        import easy_vqa
    except ImportError as error:
        raise ImportError("The easy-VQA questions need the package 'easy-vqa': pip install 'tcl_hf[demo]'.") from error
    if split == "test":
        columns, paths = easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()
    else:
        columns, paths = easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()
    rows = [
        {
            "image": {"bytes": None, "path": paths[image_id]},
            "image_id": str(image_id),
            "question": question,
            "question_id": str(number),
            "answers": [answer],
            "weight": 1.0,
            "answer_type": None,
            "question_type": None,
        }
        for number, (question, answer, image_id) in enumerate(zip(*columns, strict=True))
        if split == "test" or (image_id % HELD_OUT == HELD_OUT - 1) == (split == "validation")
    ]
    return Dataset.from_list(rows, features=QUESTION_FEATURES)


def load_easy_vqa_classes(split: str = "train") -> Dataset:
    """Return the pictures of a split as a table of `image`, `image_id`, `label`, `shape` and `color`.

    The label of a picture is its colour with its shape ("red circle"), of which there are 24. Both follow from the
    questions about it with their answers; a picture whose shape or colour none of them gives is left out (one in nine).

    Raises:
        ValueError, ImportError: as in `load_easy_vqa`.
    """
    pictures: dict[str, dict] = {}
    facts: dict[str, set[str]] = {}
    for record in load_easy_vqa(split):
        pictures[record["image_id"]] = record["image"]
        facts.setdefault(record["image_id"], set()).update(_facts(record["question"], record["answers"][0]))
    rows = []
    for image_id, words in facts.items():
        shapes, colors = words.intersection(SHAPES), words.intersection(COLORS)
        if shapes and colors:
            (shape,), (color,) = shapes, colors
            label = f"{color} {shape}"
            rows.append(
                {"image": pictures[image_id], "image_id": image_id, "label": label, "shape": shape, "color": color}
            )
    features = {name: QUESTION_FEATURES[name] for name in ("image", "image_id")} | {
        "label": ClassLabel(names=[f"{color} {shape}" for color in COLORS for shape in SHAPES]),
        "shape": ClassLabel(names=list(SHAPES)),
        "color": ClassLabel(names=list(COLORS)),
    }
    return Dataset.from_list(rows, features=Features(features))


def _facts(question: str, answer: str) -> set[str]:
    """The shapes and colours that a picture has according to a question and its answer."""
    words = set(re.findall(r"\w+", question))
    if answer in ("yes", "no"):
        is_negated = bool(words & {"no", "not"})
        return words.intersection(SHAPES + COLORS) if (answer == "yes") != is_negated else set()
    return {*words, answer}.intersection(SHAPES + COLORS)
