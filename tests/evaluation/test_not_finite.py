"""Scores that are not finite stop an evaluation in one sentence: comparisons with NaN would count as hits."""

import pytest
import torch
from helpers import labelled, phrases, questions, statements, tiny, tiny_records

from tcl_hf import TCLForImageTextRetrieval, TCLForQuestionAnswering, TCLForVisualEntailment, TCLModel
from tcl_hf.evaluation.answers import evaluate_answers
from tcl_hf.evaluation.classes import evaluate_classes
from tcl_hf.evaluation.grounding import evaluate_grounding
from tcl_hf.evaluation.metrics import NonFiniteScoreError, check_finite, retrieval_metrics
from tcl_hf.evaluation.retrieval import evaluate_retrieval
from tcl_hf.evaluation.zero_shot import evaluate_zero_shot


def test_the_number_and_the_first_are_named():
    values = torch.zeros(4, 2)
    check_finite(values, "rows")
    values[1, 0], values[3, 1] = torch.nan, torch.inf
    with pytest.raises(NonFiniteScoreError, match=r"^2 of 4 rows are not finite, the first of them 1: "):
        check_finite(values, "rows")
    with pytest.raises(NonFiniteScoreError, match="the first of them b: "):
        check_finite(values, "rows", "abcd".__getitem__)


def test_no_recall_counts_a_score_that_is_nan():
    scores = torch.eye(3)
    scores[0, 0] = torch.nan
    for given in ((scores, torch.eye(3)), (torch.eye(3), scores)):
        with pytest.raises(NonFiniteScoreError, match="1 of 3 rows of scores"):
            retrieval_metrics(*given, torch.arange(3))


def broken(model_class, part: str):
    """A model whose layer `part` gives NaN."""
    model, processor = tiny(model_class)
    with torch.no_grad():
        dict(model.named_parameters())[part].fill_(torch.nan)
    return model, processor


@pytest.mark.parametrize(
    ("part", "what"),
    [
        ("tcl.visual_projection.weight", "features of images are not finite, the first of them 0:"),
        ("tcl.text_projection.weight", "features of texts are not finite, the first of them '"),
        ("itm_head.weight", "rows of matching logits of images are not finite"),
    ],
)
def test_retrieval_stops(part, what):
    model, processor = broken(TCLForImageTextRetrieval, part)
    with pytest.raises(NonFiniteScoreError, match=what):
        evaluate_retrieval(model, processor, tiny_records(4), k=2)


def test_states_that_overflow_half_precision_stop_retrieval():
    model, processor = tiny(TCLForImageTextRetrieval)
    with torch.no_grad():
        model.tcl.vision_model.layer_norm.weight.fill_(1e6)
    evaluate_retrieval(model, processor, tiny_records(4), k=2)
    with pytest.raises(NonFiniteScoreError, match="4 of 4 states of images are not finite"):
        evaluate_retrieval(model, processor, tiny_records(4), k=2, states_dtype=torch.float16)


LABELS = ("entailment", "neutral", "contradiction")


@pytest.mark.parametrize(
    ("evaluate", "model_class", "part", "what"),
    [
        (
            lambda *given: evaluate_classes(*given, statements(LABELS)),
            TCLForVisualEntailment,
            "cls_head.2.weight",
            "6 of 6 probabilities of labels are not finite, the first of them 0:",
        ),
        (
            lambda *given: evaluate_answers(*given, questions(), ["red", "green", "big cat"], k=2),
            TCLForQuestionAnswering,
            "text_decoder.lm_head.dense.weight",
            "5 of 5 probabilities of answers are not finite",
        ),
        (
            lambda *given: evaluate_zero_shot(*given, labelled(["dog", "cat"]), ["dog", "cat"]),
            TCLModel,
            "visual_projection.weight",
            "7 of 7 probabilities of classes are not finite",
        ),
        (
            lambda *given: evaluate_grounding(*given, phrases()),
            TCLForImageTextRetrieval,
            "itm_head.weight",
            "heat maps are not finite, the first of them of image 0:",
        ),
    ],
)
def test_every_evaluation_stops(evaluate, model_class, part, what):
    model, processor = broken(model_class, part)
    if model_class is TCLForVisualEntailment:
        model.config.label2id = {label: number for number, label in enumerate(LABELS)}
        model.config.id2label = dict(enumerate(LABELS))
    with pytest.raises(NonFiniteScoreError, match=what):
        evaluate(model, processor)
