"""The easy-VQA questions about coloured shapes, from a PyPI package: they need no download.

The package `easy-vqa` (MIT licence) has 4,000 pictures for training and 1,000 for testing, of 64 pixels a side, each
with one shape.
"""

from datasets import Dataset

from ..annotations.questions import QUESTION_FEATURES

SPLITS = ("train", "validation", "test")
HELD_OUT = 10  # every tenth training picture is held out for validation


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
