"""Metrics equal counts by hand, and normalised answers the outputs of the official VQA evaluation."""

import pytest
import torch

from tcl_hf.evaluation.metrics import (
    accuracy,
    box_iou,
    consistency,
    enclosing_box,
    majority_share,
    mean_per_class_accuracy,
    normalize_answer,
    per_label_scores,
    phrase_recall,
    pointing_accuracy,
    retrieval_metrics,
    top_k_accuracy,
    vqa_accuracies,
    vqa_accuracy,
    vqa_results,
)


def boxes(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows).reshape(-1, 4)


# --- Retrieval ---------------------------------------------------------------------------------------------------


def test_mean_ranks_and_mean_recall_counted_by_hand():
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.1], [0.5, 0.6, 0.4, 0.3]])
    metrics = retrieval_metrics(scores, scores, torch.tensor([0, 0, 1, 1]))
    # Image 0 ranks its text 0 first; image 1 ranks its text 2 third, behind 0.6 and 0.5.
    assert metrics["i2t_mean_rank"] == (1 + 3) / 2
    # Texts 0, 1 and 3 rank their image first; text 2 second, 0.4 behind 0.7.
    assert metrics["t2i_mean_rank"] == (1 + 1 + 2 + 1) / 4
    assert metrics["recall_mean"] == pytest.approx((50 + 75 + 100 + 100 + 100 + 100) / 6, abs=1e-12)


# --- Question answering ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes", "yes"),
        (" yes\n", "yes"),
        ("red\tand\nwhite", "red and white"),
        ("A dog and the cat", "dog and cat"),
        ("the", ""),
        ("None", "0"),
        ("Ten men", "10 men"),
        ("eleven", "eleven"),
        ("one-two", "1 2"),
        ("t-shirt", "t shirt"),
        ("t - shirt", "t shirt"),
        ("hot-dog, and-or", "hot dog and or"),
        ("red,white", "red white"),
        ("red, white", "red white"),
        ("left (right)", "left right"),
        ("black & white", "black & white"),
        ("is it red? yes!", "is it red yes"),
        # A comma between digits makes all marks vanish without a space; only ASCII digits count.
        ("1,2", "12"),
        ("1,000 t-shirts", "1000 tshirts"),
        ("٣,٣-x", "٣ ٣ x"),
        ("3.5", "3.5"),
        ("3.", "3"),
        (".5", ".5"),
        ("5 p.m.", "5 pm"),
        ("...", ""),
        ("a" + "." * 34, "a.."),
        ("St. John's", "st john's"),
        ("$5.00", "$5.00"),
        ("3:30", "3:30"),
        ("dont know", "don't know"),
        ("DONT", "don't"),
        ("wont.", "won't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("couldntve", "couldntve"),
        ("yall'd've", "y'all'd've"),
        ("y'allll", "y'all'll"),
        ("ow's'at", "'ow's'at"),
        ("twas", "'twas"),
        ("oclock", "o'clock"),
        ("hes", "he's"),
        ("shes", "shes"),
        ("Im", "im"),
        ("lets", "lets"),
        ("somebody'd", "somebodyd"),
        ("somebodyd've", "somebody'd've"),
        ("'hello'", "'hello'"),
    ],
)
def test_normalized_answers_are_those_of_the_official_code(answer, expected):
    """Expected values are outputs of the last version of the official evaluation under Python 2.7."""
    assert normalize_answer(answer) == expected


@pytest.mark.parametrize(("agreeing", "expected"), [(0, 0), (1, 9 / 30), (2, 18 / 30), (3, 27 / 30), (4, 1), (9, 1)])
def test_vqa_accuracy_leaves_each_person_out_in_turn(agreeing, expected):
    # For 2 of 10: with one of the two left out 1 remains, a third; with one of the eight left out 2 remain, two thirds.
    # The mean is (2 * 1/3 + 8 * 2/3) / 10.
    humans = ["cat"] * agreeing + ["dog"] * (10 - agreeing)
    assert vqa_accuracy("cat", humans) == pytest.approx(expected, abs=1e-12)


def test_answers_are_normalized_only_where_people_disagree():
    assert vqa_accuracy("Yes.", ["yes"] * 10) == 0
    assert vqa_accuracy("Yes.", ["yes"] * 9 + ["no"]) == 1
    assert vqa_accuracy(" the cat\n", ["the cat"] * 9 + ["the cat "]) == 1
    # These ten are equal only after normalisation, so they count as different, and all become "cat".
    assert vqa_accuracy("a cat", ["the cat"] * 9 + ["Cat"]) == 1


def annotation(question_id: int, answer_type: str, question_type: str, humans: list[str]) -> dict:
    answers = [
        {"answer": human, "answer_confidence": "yes", "answer_id": number} for number, human in enumerate(humans, 1)
    ]
    return {
        "question_id": question_id,
        "image_id": question_id // 1000,
        "question_type": question_type,
        "answer_type": answer_type,
        "multiple_choice_answer": humans[0],
        "answers": answers,
    }


ANNOTATIONS = [
    annotation(42000, "yes/no", "is it", ["yes"] * 10),
    annotation(42001, "number", "how many", ["2", "2", "two"] + ["3"] * 7),
    annotation(73000, "other", "what is", ["red, white", "Red white"] + ["pink"] * 8),
    annotation(73001, "other", "what is", ["a dog"] + ["cat"] * 9),
]
ANSWERS = {42000: "yes", 42001: "Two", 73000: "red/white", 73001: "dog"}


def test_vqa_accuracies_of_an_annotation_file_counted_by_hand():
    # All ten: 1. Three of ten: (3 * 2/3 + 7 * 1) / 10. Two: (2 * 1/3 + 8 * 2/3) / 10. One: (1 * 0 + 9 * 1/3) / 10.
    assert vqa_accuracies(ANSWERS, ANNOTATIONS) == pytest.approx(
        {
            "overall": 100 * (1 + 0.9 + 0.6 + 0.3) / 4,
            "answer_type/yes/no": 100,
            "answer_type/number": 90,
            "answer_type/other": 100 * (0.6 + 0.3) / 2,
            "question_type/is it": 100,
            "question_type/how many": 90,
            "question_type/what is": 100 * (0.6 + 0.3) / 2,
        },
        abs=1e-9,
    )


def test_vqa_accuracies_need_no_types():
    bare = [{"question_id": one["question_id"], "answers": one["answers"]} for one in ANNOTATIONS]
    assert vqa_accuracies(ANSWERS, bare) == pytest.approx({"overall": 70}, abs=1e-9)


def test_answers_read_back_from_json_find_their_questions():
    as_text = {str(question): answer for question, answer in ANSWERS.items()}
    assert vqa_accuracies(as_text, ANNOTATIONS) == vqa_accuracies(ANSWERS, ANNOTATIONS)


def test_vqa_answers_and_questions_must_be_the_same():
    with pytest.raises(ValueError, match="1 of 4 questions have no answer, first 73001"):
        vqa_accuracies({question: answer for question, answer in ANSWERS.items() if question != 73001}, ANNOTATIONS)
    with pytest.raises(ValueError, match="1 of 5 answers are to unknown questions, first 5"):
        vqa_accuracies(ANSWERS | {5: "yes"}, ANNOTATIONS)
    with pytest.raises(ValueError, match="nothing to score"):
        vqa_accuracies({}, [])
    with pytest.raises(ValueError, match="no human answers"):
        vqa_accuracy("yes", [])


def test_vqa_results_are_what_the_server_takes():
    assert vqa_results({42000: "yes"}) == [{"question_id": 42000, "answer": "yes"}]
    assert vqa_results({"42001": "2", "mine-1": "red"}) == [
        {"question_id": 42001, "answer": "2"},
        {"question_id": "mine-1", "answer": "red"},
    ]


# --- Classification ----------------------------------------------------------------------------------------------

LABELS = torch.tensor([0, 0, 0, 1, 1, 2])
PREDICTIONS = torch.tensor([0, 0, 1, 1, 2, 1])


def test_accuracy_and_majority_counted_by_hand():
    assert accuracy(PREDICTIONS, LABELS) == 100 * 3 / 6
    assert majority_share(LABELS) == 100 * 3 / 6
    assert majority_share(torch.tensor([4, 7, 7, 7])) == 75


def test_accuracies_of_ranked_classes_counted_by_hand():
    ranked = torch.tensor([[0, 1], [2, 1], [1, 0], [0, 2]])
    labels = torch.tensor([0, 1, 2, 0])
    assert top_k_accuracy(ranked, labels) == 75  # all but the third
    assert top_k_accuracy(ranked[:, :1], labels) == accuracy(ranked[:, 0], labels) == 50
    assert mean_per_class_accuracy(ranked[:, 0], labels) == pytest.approx(100 * (1 + 0 + 0) / 3)
    assert mean_per_class_accuracy(torch.tensor([7, 7, 1]), torch.tensor([7, 7, 3])) == 50  # two classes occur
    with pytest.raises(ValueError, match=r"The ranked classes are \(4,\): they must be \(N, k\)"):
        top_k_accuracy(ranked[:, 0], labels)
    with pytest.raises(ValueError, match="must both be"):
        top_k_accuracy(ranked, labels[:3])


def test_scores_by_label_counted_by_hand():
    scores = per_label_scores(PREDICTIONS, LABELS, ["contradiction", "neutral", "entailment", "unused"])
    assert scores == pytest.approx(
        {
            "precision/contradiction": 100 * 2 / 2,
            "recall/contradiction": 100 * 2 / 3,
            "f1/contradiction": 80,  # 2 * 1 * 2/3 / (1 + 2/3)
            "support/contradiction": 3,
            "precision/neutral": 100 * 1 / 3,
            "recall/neutral": 100 * 1 / 2,
            "f1/neutral": 40,  # 2 * 1/3 * 1/2 / (1/3 + 1/2)
            "support/neutral": 2,
            "precision/entailment": 0,
            "recall/entailment": 0,
            "f1/entailment": 0,
            "support/entailment": 1,
            "precision/unused": 0,
            "recall/unused": 0,
            "f1/unused": 0,
            "support/unused": 0,
        },
        abs=1e-9,
    )


@pytest.mark.parametrize(
    ("predictions", "labels"),
    [
        (torch.zeros(3, 1), torch.zeros(3)),
        (torch.zeros(3, 3), torch.zeros(3)),
        (torch.zeros(2), torch.zeros(3)),
        (torch.zeros(0), torch.zeros(0)),
    ],
)
def test_predictions_and_labels_of_other_shapes_are_refused(predictions, labels):
    with pytest.raises(ValueError, match=r"must both be \(N,\)"):
        accuracy(predictions, labels)


def test_a_label_without_a_name_is_refused():
    with pytest.raises(ValueError, match="from 0 to 2; the 2 names stand for 0 to 1"):
        per_label_scores(PREDICTIONS, LABELS, ["no", "yes"])
    with pytest.raises(ValueError, match="from -1"):
        per_label_scores(torch.tensor([-1]), torch.tensor([0]), ["no", "yes"])


def test_consistency_counts_sentences_that_are_right_throughout():
    right = {
        "dev-850-0-0": True,  # the first sentence of set 850 is wrong for one pair
        "dev-850-1-0": False,
        "dev-850-0-1": True,  # its second sentence is right
        "dev-7-2-0": True,  # right for both pairs
        "dev-7-3-0": True,
        "test1-7-2-0": False,  # another split, so another sentence
    }
    labels = torch.tensor([1, 0, 1, 0, 1, 0])
    predictions = torch.where(torch.tensor(list(right.values())), labels, 1 - labels)
    assert consistency(predictions, labels, list(right)) == 100 * 2 / 4
    assert accuracy(predictions, labels) == pytest.approx(100 * 4 / 6, abs=1e-12)


@pytest.mark.parametrize("pair_id", ["850-0-0", "dev-850-0-0-img0.png", "dev-850-0-x", "dev_850_0_0", ""])
def test_a_pair_id_of_another_form_is_refused(pair_id):
    with pytest.raises(ValueError, match="split-set-pair-sentence"):
        consistency(torch.tensor([1, 1]), torch.tensor([1, 1]), ["dev-850-0-0", pair_id])


def test_every_sample_has_a_pair_id():
    with pytest.raises(ValueError, match="2 labels, 1 pair_ids"):
        consistency(torch.tensor([1, 1]), torch.tensor([1, 1]), ["dev-850-0-0"])


# --- Boxes and points --------------------------------------------------------------------------------------------


def test_overlap_of_boxes_counted_by_hand():
    a = boxes([0, 0, 10, 10], [100, 100, 120, 110])
    b = boxes(
        [0, 0, 10, 10],  # the first itself
        [5, 0, 15, 10],  # half of it: 50 of 100 + 100 - 50
        [2, 3, 4, 6],  # inside it: 6 of 100
        [10, 0, 20, 10],  # touches it
        [110, 90, 130, 105],  # 10 x 5 of the second: 50 of 200 + 300 - 50
    )
    expected = torch.tensor([[1, 50 / 150, 6 / 100, 0, 0], [0, 0, 0, 0, 50 / 450]], dtype=torch.float64)
    torch.testing.assert_close(box_iou(a, b), expected, rtol=0, atol=1e-15)


def test_a_box_without_area_overlaps_nothing():
    flat, backwards, whole = [3, 3, 3, 9], [8, 8, 2, 2], [0, 0, 10, 10]
    assert box_iou(boxes(flat, backwards), boxes(flat, backwards, whole)).tolist() == [[0, 0, 0], [0, 0, 0]]
    to_the_left = [8, 0, -2, 10]  # its area of -100 and that of the whole image add up to 0
    assert box_iou(boxes(to_the_left), boxes(to_the_left, whole)).tolist() == [[0, 0]]


def test_no_boxes_overlap_in_an_empty_matrix():
    assert box_iou(boxes(), boxes([0, 0, 1, 1])).shape == (0, 1)


def test_the_enclosing_box_takes_the_outermost_edges():
    assert enclosing_box(boxes([1, 8, 4, 9], [2, 3, 7, 5])).tolist() == [1, 3, 7, 9]


HERE, THERE, NOWHERE = [0, 0, 10, 10], [30, 0, 40, 10], [70, 70, 80, 80]
TRUE = [boxes(HERE), boxes(HERE, THERE), boxes(), boxes(HERE), boxes(HERE)]
TYPES = [["people"], ["people", "clothing"], ["scene"], ["other"], ["other"]]
RANKED = [
    boxes(NOWHERE, HERE),  # found second
    boxes(THERE, [0, 0, 30, 10]),  # any: found first; merged box [0, 0, 40, 10]: IoU a quarter, then three quarters
    boxes(HERE),  # has no true box
    boxes(*[NOWHERE] * 11, HERE),  # found twelfth
    boxes(),  # has no candidates
]


def test_phrase_recall_with_any_box_counted_by_hand():
    assert phrase_recall(RANKED, TRUE, TYPES) == {
        "recall@1": 100 * 1 / 4,
        "recall@5": 100 * 2 / 4,
        "recall@10": 100 * 2 / 4,
        "upper_bound": 100 * 3 / 4,
        "recall@1/people": 50,
        "recall@5/people": 100,
        "recall@10/people": 100,
        "upper_bound/people": 100,
        "recall@1/clothing": 100,
        "recall@5/clothing": 100,
        "recall@10/clothing": 100,
        "upper_bound/clothing": 100,
        "recall@1/other": 0,
        "recall@5/other": 0,
        "recall@10/other": 0,
        "upper_bound/other": 50,
    }


def test_phrase_recall_with_merged_boxes_counted_by_hand():
    assert phrase_recall(RANKED, TRUE, ks=(1, 2, 12), protocol="merged") == {
        "recall@1": 0,
        "recall@2": 100 * 2 / 4,
        "recall@12": 100 * 3 / 4,
        "upper_bound": 100 * 3 / 4,
    }


def test_pointing_accuracy_counted_by_hand():
    points = torch.tensor([[5, 5], [35, 5], [5, 5], [10, 10], [11, 5]])
    # Inside; in the second box; no box, not counted; on the corner; outside.
    assert pointing_accuracy(points, TRUE, TYPES) == {
        "accuracy": 100 * 3 / 4,
        "accuracy/people": 100,
        "accuracy/clothing": 100,
        "accuracy/other": 50,
    }
    assert pointing_accuracy(points, TRUE) == {"accuracy": 75}


def test_boxes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"shape \(4,\); it must be \(N, 4\)"):
        box_iou(torch.zeros(4), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="0 boxes to enclose"):
        enclosing_box(boxes())
    with pytest.raises(ValueError, match="protocol='all' is unknown"):
        phrase_recall(RANKED, TRUE, protocol="all")
    with pytest.raises(ValueError, match="5 ranked_boxes, 5 true_boxes, 1 types"):
        phrase_recall(RANKED, TRUE, [["people"]])
    with pytest.raises(ValueError, match="2 points, 5 true_boxes"):
        pointing_accuracy(torch.zeros(2, 2), TRUE)
    with pytest.raises(ValueError, match="nothing to score"):
        pointing_accuracy(torch.zeros(1, 2), [boxes()])
    with pytest.raises(ValueError, match="nothing to score"):
        phrase_recall([boxes(HERE)], [boxes()])
