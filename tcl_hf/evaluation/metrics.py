"""Metrics of retrieval, question answering, classification and grounding, as functions without state.

Shapes: I images, T texts, N samples, G true boxes and K candidate boxes of a phrase. Shares are percentages from 0 to
100. Boxes are (x1, y1, x2, y2) in pixels, where x1, y1 is the upper left corner and x2, y2 the lower right.
"""

import re
from collections.abc import Callable, Sized
from typing import Literal

import torch
import torchvision
from torch import Tensor

_ROWS_AT_ONCE = 256


class NonFiniteScoreError(ValueError):
    """Scores that are NaN or infinite, of which no metric can be made; the message says how many, and the first."""


def check_finite(values: Tensor, what: str, name_of: Callable[[int], object] = int) -> None:
    """Refuse features, logits or scores that are not finite: comparisons with NaN would count as hits.

    Args:
        values: one row for each sample (N, ...).
        what: the plural of a row, for the message.
        name_of: gives the name of a row; its number by default.

    Raises:
        NonFiniteScoreError: with the number of such rows, and the first.
    """
    # In pieces, because the states of a large data set have no room for a second tensor of their size.
    bad = [~part.detach().isfinite().reshape(len(part), -1).all(1) for part in values.split(_ROWS_AT_ONCE)]
    _refuse(torch.cat(bad), what, name_of)


def _refuse(bad: Tensor, what: str, name_of: Callable[[int], object] = int) -> None:
    """Refuse rows that are marked (N,), as `check_finite` does."""
    rows = bad.nonzero().flatten().tolist()
    if rows:
        raise NonFiniteScoreError(
            f"{len(rows)} of {len(bad)} {what} are not finite, the first of them {name_of(rows[0])}: the weights are "
            "damaged or have diverged, or half precision overflows. Evaluate another checkpoint, or in float32."
        )


# --- Retrieval ---------------------------------------------------------------------------------------------------


def retrieval_ranks(image_scores: Tensor, text_scores: Tensor, image_of_text: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks of the right texts and images; a wrong one with an equal score counts as ranked before them.

    Args:
        image_scores: scores (I, T) by which each image (row) ranks the texts, higher for better pairs.
        text_scores: scores (I, T) by which each text (column) ranks the images, higher for better pairs.
        image_of_text: the image to which each text belongs (T,).

    Returns:
        The rank, from 0, of the best text of each image (I,), and of the image of each text (T,).

    Raises:
        NonFiniteScoreError: if a score is NaN.
    """
    _refuse(image_scores.isnan().any(1), "rows of scores of images")
    _refuse(text_scores.isnan().any(0), "rows of scores of texts")
    right = image_of_text == torch.arange(len(image_scores), device=image_scores.device)[:, None]  # (I, T)
    best_text = image_scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)  # (I, 1)
    image_ranks = ((image_scores >= best_text) & ~right).sum(1)
    right_image = text_scores.gather(0, image_of_text[None])  # (1, T)
    text_ranks = ((text_scores >= right_image) & ~right).sum(0)
    return image_ranks, text_ranks


def retrieval_metrics(image_scores: Tensor, text_scores: Tensor, image_of_text: Tensor) -> dict[str, float]:
    """Recall at 1, 5 and 10 in percent and mean rank, from image to text (`i2t`) and from text to image (`t2i`).

    `recall@k` is the mean of both directions, `recall_mean` that of all six recalls. Mean ranks count from 1.

    Arguments as in `retrieval_ranks`.
    """
    image_ranks, text_ranks = retrieval_ranks(image_scores, text_scores, image_of_text)
    metrics: dict[str, float] = {}
    for k in (1, 5, 10):
        i2t = 100 * (image_ranks < k).double().mean().item()
        t2i = 100 * (text_ranks < k).double().mean().item()
        metrics |= {f"i2t_recall@{k}": i2t, f"t2i_recall@{k}": t2i, f"recall@{k}": (i2t + t2i) / 2}
    metrics["recall_mean"] = (metrics["recall@1"] + metrics["recall@5"] + metrics["recall@10"]) / 3
    metrics["i2t_mean_rank"] = 1 + image_ranks.double().mean().item()
    metrics["t2i_mean_rank"] = 1 + text_ranks.double().mean().item()
    return metrics


# --- Question answering ------------------------------------------------------------------------------------------

# These tables and rules are those of the official VQA evaluation, oddities included, because published numbers are its
# results.
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = {"a", "an", "the"}
NUMBER_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
DIGIT_OF = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBER_WORDS)}
# At most this many periods are removed: the official code passes the value of a flag, re.UNICODE, as the count.
MOST_PERIODS = 32
# Endings of contractions, and the words before them. The official list lacks many (she's, we'll). It also has I'm and
# I've, which are left out here because its look-up is in lower case and never finds them.
CONTRACTED = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "n't've": "could had might should would",
    "'d": "he how it someone something there they where who you",
    "'d've": "he it she somebody someone something there they we who y'all you",
    "'ll": "how it somebody someone something they what who why y'all you",
    "'re": "there they what why you",
    "'s": "he how somebody someone that there what when where who why",
    "'ve": "could might must not should they we what where who would you",
    "": "ma'am o'clock 'ow's'at 'twas y'all",
}
# A word that lacks one apostrophe of a contraction, and the contraction: "dont", "couldnt've", "couldn'tve".
CONTRACTION_OF = {
    whole[:place] + whole[place + 1 :]: whole
    for ending, beginnings in CONTRACTED.items()
    for whole in (beginning + ending for beginning in beginnings.split())
    for place, letter in enumerate(whole)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # the official list has this one the wrong way round


def _stripped(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def normalize_answer(answer: str) -> str:
    """Normalise an answer as the official VQA evaluation does before it compares.

    Punctuation is removed, number words up to ten and "none" become digits, articles are removed, contractions get
    their apostrophe back, and the rest is lower case with single spaces. A mark is replaced by a space ("t-shirt"
    becomes "t shirt"); it is deleted if the same mark has a space beside it anywhere in the answer, or if a comma
    stands between digits anywhere. Periods are deleted, except before a digit.
    """
    text = _stripped(answer)
    grouped = re.search("[0-9],[0-9]", text) is not None
    text = text.translate(
        {ord(mark): "" if grouped or f"{mark} " in text or f" {mark}" in text else " " for mark in PUNCTUATION}
    )
    text = re.sub(r"\.(?![0-9])", "", text, count=MOST_PERIODS)
    words = (DIGIT_OF.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTION_OF.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(answer: str, human_answers: list[str]) -> float:
    """The official VQA accuracy of an answer, from 0 to 1: it is 1 if more than three people gave the same answer.

    Each human answer is left out in turn; the answer then scores a third for each of the others that equals it, at
    most 1. The accuracy is the mean of these scores. If the human answers differ, all answers are normalised first. If
    they are the same to the letter, nothing is normalised, and an answer in another case is wrong.

    Args:
        human_answers: the answers that people gave, ten in VQA.

    Raises:
        ValueError: if there are no human answers.
    """
    if not human_answers:
        raise ValueError(f"There are no human answers to compare {answer!r} with; the test splits cannot be scored.")
    humans, given = [_stripped(human) for human in human_answers], _stripped(answer)
    if len(set(humans)) > 1:
        humans, given = [normalize_answer(human) for human in humans], normalize_answer(given)
    agrees = [human == given for human in humans]
    return sum(min(1, (sum(agrees) - left_out) / 3) for left_out in agrees) / len(agrees)


def _question_id(question: int | str) -> int | str:
    """The id as a number, as in VQA; JSON turns the keys of a dictionary into text."""
    return int(question) if str(question).isdecimal() else question


def vqa_accuracies(answers: dict[int, str] | dict[str, str], annotations: list[dict]) -> dict[str, float]:
    """The official VQA accuracy in percent: `overall`, by answer type and by question type.

    Types are those of the annotations: `answer_type/yes/no`, `question_type/what color` and so on. The official
    evaluation reports the same numbers rounded to two places.

    Args:
        answers: the answer to each question by its id.
        annotations: as in VQA's files, each with `question_id`, `answers` (a list of dictionaries with `answer`) and
            optionally `answer_type` and `question_type`.

    Raises:
        ValueError: if a question has no answer, if an answer's question is unknown, or if there are no questions.
    """
    given = {_question_id(question): answer for question, answer in answers.items()}
    questions = {_question_id(annotation["question_id"]): None for annotation in annotations}
    unanswered = [question for question in questions if question not in given]
    if unanswered:
        raise ValueError(f"{len(unanswered)} of {len(questions)} questions have no answer, first {unanswered[0]!r}.")
    unknown = [question for question in given if question not in questions]
    if unknown:
        raise ValueError(f"{len(unknown)} of {len(given)} answers are to unknown questions, first {unknown[0]!r}.")
    scores, names = [], []
    for annotation in annotations:
        human_answers = [human["answer"] for human in annotation["answers"]]
        scores.append(vqa_accuracy(given[_question_id(annotation["question_id"])], human_answers))
        types = [f"{kind}/{annotation[kind]}" for kind in ("answer_type", "question_type") if kind in annotation]
        names.append(["overall", *types])
    return _means_in_percent(scores, names)


def vqa_results(answers: dict[int, str] | dict[str, str]) -> list[dict[str, int | str]]:
    """The answers in the format of the official VQA server, a list of `{"question_id": ..., "answer": ...}`.

    Ids that are whole numbers become `int`, as in VQA; others stay text.
    """
    return [{"question_id": _question_id(question), "answer": answer} for question, answer in answers.items()]


# --- Classification ----------------------------------------------------------------------------------------------


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Percent of predictions (N,) that equal their labels (N,)."""
    _check_labels(predictions, labels)
    return 100 * (predictions == labels).double().mean().item()


def top_k_accuracy(ranked: Tensor, labels: Tensor) -> float:
    """Percent of samples whose label (N,) is among the classes that are ranked best for it (N, k).

    Raises:
        ValueError: if the shapes do not fit.
    """
    if ranked.ndim != 2:
        raise ValueError(f"The ranked classes are {tuple(ranked.shape)}: they must be (N, k).")
    _check_labels(ranked[:, 0], labels)
    return 100 * (ranked == labels[:, None]).any(1).double().mean().item()


def mean_per_class_accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Percent of right predictions (N,) within each class of the labels (N,), averaged over the classes that occur."""
    _check_labels(predictions, labels)
    _, number, sizes = labels.unique(return_inverse=True, return_counts=True)
    right = torch.zeros(len(sizes), dtype=torch.double).index_add_(0, number, (predictions == labels).double())
    return 100 * (right / sizes).mean().item()


def per_label_scores(predictions: Tensor, labels: Tensor, names: list[str]) -> dict[str, float]:
    """Precision, recall and F1 in percent, and support, of each label: `precision/neutral` and so on.

    Support is the number of samples with that label. A score whose denominator is 0 is 0, for example the precision of
    a label that is never predicted.

    Args:
        predictions, labels: indices into `names` (N,).

    Raises:
        ValueError: if the shapes differ or an index has no name.
    """
    _check_labels(predictions, labels)
    both, size = torch.cat([predictions, labels]).long(), len(names)
    if both.min() < 0 or both.max() >= size:
        raise ValueError(f"Labels go from {both.min()} to {both.max()}; the {size} names stand for 0 to {size - 1}.")
    cells = labels.long() * size + predictions.long()
    table = cells.bincount(minlength=size**2).view(size, size)  # (true, predicted)
    right, predicted, support = table.diagonal().tolist(), table.sum(0).tolist(), table.sum(1).tolist()
    scores: dict[str, float] = {}
    for label, name in enumerate(names):
        scores[f"precision/{name}"] = 100 * right[label] / max(predicted[label], 1)
        scores[f"recall/{name}"] = 100 * right[label] / max(support[label], 1)
        scores[f"f1/{name}"] = 100 * 2 * right[label] / max(predicted[label] + support[label], 1)
        scores[f"support/{name}"] = float(support[label])
    return scores


def majority_share(labels: Tensor) -> float:
    """Percent of labels (N,) that are the most frequent one: the accuracy of always giving the same answer."""
    _check_labels(labels, labels)
    return 100 * labels.unique(return_counts=True)[1].max().item() / len(labels)


_PAIR_ID = re.compile(r"([^-]+)-(\d+)-\d+-(\d+)")


def is_pair_id(pair_id: object) -> bool:
    """Whether an identifier has the form of NLVR2's, of which `consistency` can be computed."""
    return isinstance(pair_id, str) and _PAIR_ID.fullmatch(pair_id) is not None


def consistency(predictions: Tensor, labels: Tensor, pair_ids: list[str]) -> float:
    """NLVR2's consistency: percent of sentences whose label is predicted right for all their pairs of images.

    Args:
        predictions, labels: one class per sample (N,).
        pair_ids: the `identifier` of each sample, split-set-pair-sentence ("dev-850-0-0"). Split, set and sentence
            identify the sentence.

    Raises:
        ValueError: if the lengths differ or an identifier has another form.
    """
    _check_labels(predictions, labels)
    _check_lengths(labels=labels, pair_ids=pair_ids)
    sentence_right: dict[tuple[str, ...], bool] = {}
    for pair_id, right in zip(pair_ids, (predictions == labels).tolist(), strict=True):
        form = _PAIR_ID.fullmatch(pair_id)
        if form is None:
            raise ValueError(f'{pair_id!r} is not of the form split-set-pair-sentence, as "dev-850-0-0" is.')
        sentence_right[form.groups()] = sentence_right.get(form.groups(), True) and right
    return 100 * sum(sentence_right.values()) / len(sentence_right)


# --- Boxes and points --------------------------------------------------------------------------------------------

FOUND_IOU = 0.5  # a box counts as the true one from this overlap on, in RefCOCO as in Flickr30k Entities


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union (N, M) of each of the boxes a (N, 4) with each of b (M, 4), in float64.

    The IoU of a box without area, or of one that ends before it begins, is 0.
    """
    _check_boxes(a, b)
    return torchvision.ops.box_iou(a.double(), b.double()).nan_to_num(0)  # torchvision divides 0 by 0 without area


def enclosing_box(boxes: Tensor) -> Tensor:
    """The smallest box (4,) around all the boxes (G, 4).

    Raises:
        ValueError: if G is 0.
    """
    _check_boxes(boxes)
    if not len(boxes):
        raise ValueError("There are 0 boxes to enclose: leave out phrases without boxes.")
    return torch.cat([boxes[:, :2].amin(0), boxes[:, 2:].amax(0)])


def phrase_recall(
    ranked_boxes: list[Tensor],
    true_boxes: list[Tensor],
    types: list[list[str]] | None = None,
    ks: tuple[int, ...] = (1, 5, 10),
    protocol: Literal["any", "merged"] = "any",
) -> dict[str, float]:
    """Recall of Flickr30k Entities in percent: `recall@k`, and by type of phrase `recall@1/people` and so on.

    A phrase is found if one of its first k boxes has an IoU of 0.5 or more with a true one. `upper_bound` (and
    `upper_bound/people`) is the percentage of phrases for which any of the candidates has such an IoU. Phrases without
    a true box are not counted; those without candidates are counted as not found.

    Args:
        ranked_boxes: the candidates of each phrase, best first (K, 4).
        true_boxes: the boxes of each phrase (G, 4).
        types: the types of each phrase; it counts for each of them.
        protocol: "any" compares with each true box, "merged" with the one that encloses them all.

    Raises:
        ValueError: if the lengths differ, the protocol is unknown, or no phrase has a box.
    """
    if protocol not in ("any", "merged"):
        raise ValueError(f'protocol={protocol!r} is unknown: choose "any" or "merged".')
    types = [[] for _ in true_boxes] if types is None else types
    _check_lengths(ranked_boxes=ranked_boxes, true_boxes=true_boxes, types=types)
    found, names = [], []
    for ranked, true, phrase_types in zip(ranked_boxes, true_boxes, types, strict=True):
        if not len(true):
            continue
        targets = true if protocol == "any" else enclosing_box(true)[None]
        hits = (box_iou(ranked, targets) >= FOUND_IOU).any(1)  # (K,)
        for metric, first in [*((f"recall@{k}", k) for k in ks), ("upper_bound", len(hits))]:
            found.append(float(hits[:first].any()))
            names.append([metric, *(f"{metric}/{name}" for name in phrase_types)])
    return _means_in_percent(found, names)


def pointing_accuracy(
    points: Tensor, true_boxes: list[Tensor], types: list[list[str]] | None = None
) -> dict[str, float]:
    """Percent of points inside any of their true boxes, edges included: `accuracy`, and by type `accuracy/people`.

    Points of phrases without a true box are not counted.

    Args:
        points: (x, y) in pixels (N, 2).
        true_boxes: the boxes of each point's phrase (G, 4).
        types: the types of each point's phrase; it counts for each of them.

    Raises:
        ValueError: if the lengths differ or no point has a box.
    """
    types = [[] for _ in true_boxes] if types is None else types
    _check_lengths(points=points, true_boxes=true_boxes, types=types)
    inside, names = [], []
    for point, boxes, phrase_types in zip(points, true_boxes, types, strict=True):
        _check_boxes(boxes)
        if not len(boxes):
            continue
        holds = (boxes[:, :2] <= point) & (point <= boxes[:, 2:])  # (G, 2)
        inside.append(float(holds.all(1).any()))
        names.append(["accuracy", *(f"accuracy/{name}" for name in phrase_types)])
    return _means_in_percent(inside, names)


# --- Shared by the metrics above -----------------------------------------------------------------------------------


def _means_in_percent(values: list[float], names: list[list[str]]) -> dict[str, float]:
    """Mean in percent for each name, over the values that count for it.

    Args:
        names: those that each value counts for.
    """
    if not values:
        raise ValueError("There is nothing to score: none of the samples has a true answer or box.")
    groups: dict[str, list[float]] = {}
    for value, names_of_value in zip(values, names, strict=True):
        for name in names_of_value:
            groups.setdefault(name, []).append(value)
    return {name: 100 * sum(group) / len(group) for name, group in groups.items()}


def _check_labels(predictions: Tensor, labels: Tensor) -> None:
    # Broadcasting would compare (N, 1) with (N,) as N x N combinations.
    if predictions.shape != labels.shape or labels.ndim != 1 or not len(labels):
        raise ValueError(
            f"Predictions {tuple(predictions.shape)} and labels {tuple(labels.shape)} must both be (N,), with N > 0."
        )


def _check_lengths(**parts: Sized) -> None:
    if len({len(part) for part in parts.values()}) > 1:
        raise ValueError("Lengths differ: " + ", ".join(f"{len(part)} {name}" for name, part in parts.items()) + ".")


def _check_boxes(*boxes: Tensor) -> None:
    for tensor in boxes:
        if tensor.ndim != 2 or tensor.shape[1] != 4:
            raise ValueError(f"Boxes have the shape {tuple(tensor.shape)}; it must be (N, 4): x1, y1, x2, y2 of each.")
