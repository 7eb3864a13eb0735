"""Metrics of retrieval, question answering, classification, grounding and pointing, as pure functions.

Shapes: I images, T texts, N examples, G true boxes and K candidate boxes of a phrase. Shares are percentages from
0 to 100. Boxes are (x1, y1, x2, y2) in pixels, where x1, y1 is the upper left corner and x2, y2 the lower right.
"""

import re
from collections.abc import Sized
from typing import Literal

import torch
from torch import Tensor

# --- Retrieval ---------------------------------------------------------------------------------------------------


def retrieval_ranks(image_scores: Tensor, text_scores: Tensor, image_of_text: Tensor) -> tuple[Tensor, Tensor]:
    """Count what ranks before the right answer; ties count against it.

    Args:
        image_scores: scores by which each image (row) ranks the texts, higher for better pairs (I, T).
        text_scores: scores by which each text (column) ranks the images, higher for better pairs (I, T).
        image_of_text: the image to which each text belongs (T,).

    Returns:
        The rank, from 0, of the best of an image's own texts (I,), and of a text's own image (T,).
    """
    own = image_of_text == torch.arange(len(image_scores), device=image_scores.device)[:, None]  # (I, T)
    best_own_text = image_scores.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
    image_ranks = ((image_scores >= best_own_text) & ~own).sum(1)
    own_image = text_scores.gather(0, image_of_text[None])  # (1, T)
    text_ranks = ((text_scores >= own_image) & ~own).sum(0)
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

# All facts below are those of the official VQA evaluation, whose results are what published numbers mean.
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = {"a", "an", "the"}
NUMBER_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
DIGIT_OF = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBER_WORDS)}
# No more periods are removed from an answer: the official substitution has a flag's value where the count stands.
MOST_PERIODS = 32
# Ending: what stands before it. As there, many are missing (she's, we'll) and none is in capitals: it has I'm and I've,
# but looks them up in lower case and never finds them.
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
} | {"somebody'd": "somebodyd"}  # the wrong way round there


def _stripped(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def normalize_answer(answer: str) -> str:
    """The answer as the official VQA evaluation compares it.

    Punctuation is removed, number words to ten and "none" become digits, articles go, contractions get their
    apostrophe back, and the rest is lower case with single spaces. A mark becomes a space ("t-shirt" is "t shirt")
    unless somewhere in the answer it stands beside a space or somewhere a comma stands between digits; then it
    leaves nothing. Periods leave nothing, except before a digit.
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
    """The official VQA accuracy of an answer, from 0 to 1: how many people gave it, where three are enough.

    Each person's answer in turn is left out; an answer scores a third for each of the others that equals it, at most
    1, and the accuracy is the mean. Where the people disagree, all answers are normalised first; where all agree to
    the letter, they are not, and an answer in another case is wrong.

    Args:
        human_answers: what people answered, ten in VQA.

    Raises:
        ValueError: if there are no human answers.
    """
    if not human_answers:
        raise ValueError(f"There are no human answers to compare {answer!r} with; the test splits cannot be scored.")
    humans, given = [_stripped(human) for human in human_answers], _stripped(answer)
    if len(set(humans)) > 1:
        humans, given = [normalize_answer(human) for human in humans], normalize_answer(given)
    agrees = [human == given for human in humans]
    return sum(min(1, (sum(agrees) - own) / 3) for own in agrees) / len(agrees)


def _question_id(question: int | str) -> int | str:
    """The id as VQA has it, a number; JSON makes text of a dictionary's keys."""
    return int(question) if str(question).isdecimal() else question


def vqa_accuracies(answers: dict[int, str] | dict[str, str], annotations: list[dict]) -> dict[str, float]:
    """The official VQA accuracy in percent: `overall`, by answer type and by question type.

    The types are those that the annotations carry: `answer_type/yes/no`, `question_type/what color` and so on. The
    official evaluation reports the same numbers rounded to two places.

    Args:
        answers: the answer to each question by its id.
        annotations: as in VQA's files, each with `question_id`, `answers` (a list of dictionaries with `answer`) and
            perhaps `answer_type` and `question_type`.

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
    """The answers as the official VQA server takes them, `{"question_id": ..., "answer": ...}` each.

    Ids that are whole numbers become `int`, as in VQA; others stay text.
    """
    return [{"question_id": _question_id(question), "answer": answer} for question, answer in answers.items()]


# --- Classification ----------------------------------------------------------------------------------------------


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Percent of predictions (N,) that equal their labels (N,)."""
    _check_labels(predictions, labels)
    return 100 * (predictions == labels).double().mean().item()


def per_label_scores(predictions: Tensor, labels: Tensor, names: list[str]) -> dict[str, float]:
    """Precision, recall and F1 in percent, and support, of each label: `precision/neutral` and so on.

    Support is the number of examples with that label. What has nothing to be counted in (the precision of a label
    that is never predicted) is 0.

    Args:
        predictions, labels: indices into `names` (N,).

    Raises:
        ValueError: if the shapes differ or an index has no name.
    """
    _check_labels(predictions, labels)
    both, size = torch.cat([predictions, labels]).long(), len(names)
    if both.min() < 0 or both.max() >= size:
        raise ValueError(f"Labels go from {both.min()} to {both.max()}; the {size} names stand for 0 to {size - 1}.")
    table = (
        (labels.long() * size + predictions.long()).bincount(minlength=size**2).view(size, size)
    )  # (true, predicted)
    right, predicted, support = table.diagonal().tolist(), table.sum(0).tolist(), table.sum(1).tolist()
    scores: dict[str, float] = {}
    for label, name in enumerate(names):
        scores[f"precision/{name}"] = 100 * right[label] / max(predicted[label], 1)
        scores[f"recall/{name}"] = 100 * right[label] / max(support[label], 1)
        scores[f"f1/{name}"] = 100 * 2 * right[label] / max(predicted[label] + support[label], 1)
        scores[f"support/{name}"] = float(support[label])
    return scores


def majority_share(labels: Tensor) -> float:
    """Percent of labels (N,) that are the most frequent one: what always giving the same answer is worth."""
    _check_labels(labels, labels)
    return 100 * labels.unique(return_counts=True)[1].max().item() / len(labels)


def consistency(predictions: Tensor, labels: Tensor, pair_ids: list[str]) -> float:
    """NLVR2's consistency: percent of sentences that are judged right with every pair of images they come with.

    Args:
        predictions, labels: one class per example (N,).
        pair_ids: the `identifier` of each example, split-set-pair-sentence ("dev-850-0-0"); without the pair it
            names the sentence.

    Raises:
        ValueError: if the lengths differ or an identifier has another form.
    """
    _check_labels(predictions, labels)
    _check_lengths(labels=labels, pair_ids=pair_ids)
    sentence_right: dict[tuple[str, ...], bool] = {}
    for pair_id, right in zip(pair_ids, (predictions == labels).tolist(), strict=True):
        form = re.fullmatch(r"([^-]+)-(\d+)-\d+-(\d+)", pair_id)
        if form is None:
            raise ValueError(f'{pair_id!r} is not of the form split-set-pair-sentence, as "dev-850-0-0" is.')
        sentence_right[form.groups()] = sentence_right.get(form.groups(), True) and right
    return 100 * sum(sentence_right.values()) / len(sentence_right)


# --- Boxes and points --------------------------------------------------------------------------------------------

FOUND_IOU = 0.5  # from this overlap on a box counts as the true one, in RefCOCO as in Flickr30k Entities


def _overlap(a: Tensor, b: Tensor) -> Tensor:
    """IoU of boxes (..., 4) with boxes (..., 4)."""
    a, b = a.double(), b.double()
    corners = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    shared, area_a, area_b = (
        (lower - upper).clamp(min=0).prod(-1) for upper, lower in (corners, a.split(2, -1), b.split(2, -1))
    )
    union = area_a + area_b - shared
    return torch.where(union > 0, shared / union, 0)


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union (N, M) of each of the boxes a (N, 4) with each of b (M, 4), in float64.

    A box without area, as is one that ends before it begins, overlaps nothing.
    """
    _check_boxes(a, b)
    return _overlap(a[:, None], b[None])


def enclosing_box(boxes: Tensor) -> Tensor:
    """The smallest box (4,) that holds all the boxes (G, 4); a ValueError if there are none."""
    _check_boxes(boxes)
    if not len(boxes):
        raise ValueError("No box encloses none; leave out what has no boxes.")
    return torch.cat([boxes[:, :2].amin(0), boxes[:, 2:].amax(0)])


def grounding_accuracy(predicted: Tensor, true: Tensor, threshold: float = FOUND_IOU) -> float:
    """Percent of predicted boxes (N, 4) whose IoU with their true box (N, 4) is `threshold` or more."""
    _check_boxes(predicted, true)
    _check_lengths(predicted=predicted, true=true)
    if not len(true):
        raise ValueError("There are no boxes to score.")
    return 100 * (_overlap(predicted, true) >= threshold).double().mean().item()


def phrase_recall(
    ranked_boxes: list[Tensor],
    true_boxes: list[Tensor],
    types: list[list[str]] | None = None,
    ks: tuple[int, ...] = (1, 5, 10),
    protocol: Literal["any", "merged"] = "any",
) -> dict[str, float]:
    """Recall of Flickr30k Entities in percent: `recall@k`, and by type of phrase `recall@1/people` and so on.

    A phrase is found if one of its first k boxes has an IoU of 0.5 or more with a true one. `upper_bound` (and
    `upper_bound/people`) is the percentage of phrases for which any of the candidates has. Phrases without a true
    box are not counted; those without candidates are counted as not found.

    Args:
        ranked_boxes: the candidates of each phrase, best first (K, 4).
        true_boxes: the boxes of each phrase (G, 4).
        types: the types of each phrase, it counts for each of them.
        protocol: "any" true box counts, or only the one that encloses them all, "merged".

    Raises:
        ValueError: if the lengths differ, the protocol is another one, or no phrase has a box.
    """
    if protocol not in ("any", "merged"):
        raise ValueError(f'{protocol!r} is no protocol; it is "any" or "merged".')
    types = [[] for _ in true_boxes] if types is None else types
    _check_lengths(ranked_boxes=ranked_boxes, true_boxes=true_boxes, types=types)
    found, names = [], []
    for ranked, true, own_types in zip(ranked_boxes, true_boxes, types, strict=True):
        if not len(true):
            continue
        targets = true if protocol == "any" else enclosing_box(true)[None]
        hits = (box_iou(ranked, targets) >= FOUND_IOU).any(1)  # (K,)
        for metric, first in [*((f"recall@{k}", k) for k in ks), ("upper_bound", len(hits))]:
            found.append(float(hits[:first].any()))
            names.append([metric, *(f"{metric}/{name}" for name in own_types)])
    return _means_in_percent(found, names)


def pointing_accuracy(
    points: Tensor, true_boxes: list[Tensor], types: list[list[str]] | None = None
) -> dict[str, float]:
    """Percent of points inside any of their true boxes, edges included: `accuracy`, and by type `accuracy/people`.

    Points without a true box are not counted.

    Args:
        points: (x, y) in pixels (N, 2).
        true_boxes: the boxes of each point's phrase (G, 4).
        types: the types of each point's phrase, it counts for each of them.

    Raises:
        ValueError: if the lengths differ or no point has a box.
    """
    types = [[] for _ in true_boxes] if types is None else types
    _check_lengths(points=points, true_boxes=true_boxes, types=types)
    inside, names = [], []
    for point, boxes, own_types in zip(points, true_boxes, types, strict=True):
        _check_boxes(boxes)
        if not len(boxes):
            continue
        holds = (boxes[:, :2] <= point) & (point <= boxes[:, 2:])  # (G, 2)
        inside.append(float(holds.all(1).any()))
        names.append(["accuracy", *(f"accuracy/{name}" for name in own_types)])
    return _means_in_percent(inside, names)


# --- Shared by the metrics above -----------------------------------------------------------------------------------


def _means_in_percent(values: list[float], names: list[list[str]]) -> dict[str, float]:
    """Mean in percent of the values that count for each name; `names` are those that each value counts for."""
    if not values:
        raise ValueError("There is nothing to score: no example has what it would be compared with.")
    groups: dict[str, list[float]] = {}
    for value, own_names in zip(values, names, strict=True):
        for name in own_names:
            groups.setdefault(name, []).append(value)
    return {name: 100 * sum(group) / len(group) for name, group in groups.items()}


def _check_labels(predictions: Tensor, labels: Tensor) -> None:
    # Shapes (N, 1) and (N,) would compare each with each.
    if predictions.shape != labels.shape or labels.ndim != 1 or not len(labels):
        raise ValueError(
            f"Predictions {tuple(predictions.shape)} and labels {tuple(labels.shape)} must both be (N,), with N > 0."
        )


def _check_lengths(**parts: Sized) -> None:
    if len({len(part) for part in parts.values()}) > 1:
        raise ValueError("Lengths differ: " + ", ".join(f"{len(part)} {name}" for name, part in parts.items()) + ".")


def _check_boxes(*boxes: Tensor) -> None:
    for some in boxes:
        if some.ndim != 2 or some.shape[1] != 4:
            raise ValueError(f"Boxes have the shape {tuple(some.shape)}; it must be (N, 4), x1, y1, x2, y2 each.")
