"""The easy-VQA questions about coloured shapes, out of a PyPI package, offline.

Pictures and questions are those of `easy-vqa` (MIT licence): 4,000 and 1,000 pictures of 64 pixels, one shape each.
"""

from datasets import Dataset

from ..annotations.questions import QUESTION_FEATURES

SPLITS = ("train", "validation", "test")
HELD_OUT = 10  # of the training pictures each tenth is held out for validation


def load_easy_vqa(split: str = "train") -> Dataset:
    """Return the questions of a split as records of question answering.

    The package has a training and a test part; "validation" are the questions about each tenth training picture.

    Raises:
        ValueError: for another split.
        ImportError: if the package is missing.
    """
    if split not in SPLITS:
        raise ValueError(f"easy_vqa has no split '{split}': choose one of {', '.join(SPLITS)}.")
    try:
        import easy_vqa
    except ImportError as error:
        raise ImportError("The easy-VQA questions need the package 'easy-vqa': pip install 'tcl_hf[demo]'.") from error
    if split == "test":
        questions, paths = zip(*easy_vqa.get_test_questions(), strict=True), easy_vqa.get_test_image_paths()
    else:
        questions, paths = zip(*easy_vqa.get_train_questions(), strict=True), easy_vqa.get_train_image_paths()
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
        for number, (question, answer, image_id) in enumerate(questions)
        if split == "test" or (image_id % HELD_OUT == HELD_OUT - 1) == (split == "validation")
    ]
    return Dataset.from_list(rows, features=QUESTION_FEATURES)
