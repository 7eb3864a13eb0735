"""Question answering: ranked answers and their accuracy."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from ..data.collators import TCLTaskCollator
from ..models.modeling_tcl_tasks import TCLForQuestionAnswering
from ..models.processing_tcl import MAX_QUESTION_TOKENS, MAX_QUESTION_WORDS, TCLProcessor
from .metrics import normalize_answer, vqa_accuracies
from .shares import Evaluation, batches_of_records, evaluating, exchange


@torch.no_grad()
def answer_questions(
    model: TCLForQuestionAnswering,
    processor: TCLProcessor,
    records: Sequence[dict],
    answers: list[str],
    k: int = 128,
    batch_size: int = 32,
    max_tokens: int = MAX_QUESTION_TOKENS,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """The best of the given answers to each question: `question_id`, `answer`, `score`."""
    candidate_ids, candidate_mask = (x.to(model.device) for x in processor.encode_answers(answers))
    collator = TCLTaskCollator(
        processor, max_tokens=max_tokens, with_answers=False, max_question_words=MAX_QUESTION_WORDS
    )
    own: list[tuple[int, float]] = []
    with evaluating(model):
        for batch in batches_of_records(collator, records, batch_size, model.device, progress):
            ranked = model.rank_answers(**batch, candidate_ids=candidate_ids, candidate_mask=candidate_mask, k=k)
            own += zip(ranked.indices[:, 0].tolist(), ranked.probabilities[:, 0].tolist(), strict=True)
    return [
        {"question_id": record["question_id"], "answer": answers[number], "score": score}
        for record, (number, score) in zip(records, exchange(own, len(records)), strict=True)
    ]


def evaluate_answers(
    model: TCLForQuestionAnswering,
    processor: TCLProcessor,
    records: Sequence[dict],
    answers: list[str],
    k: int = 128,
    batch_size: int = 32,
    max_tokens: int = MAX_QUESTION_TOKENS,
    progress: bool = False,
) -> Evaluation:
    """Accuracy in percent of ranked answers.

    Questions with several human answers are scored as the official VQA evaluation does, those with one by equality
    after its normalisation. An answer that is a list, with commas, must have the same items in any order. Beside it
    stands what the most frequent answer would reach, and the share of questions whose answer is among the candidates.
    """
    predictions = answer_questions(model, processor, records, answers, k, batch_size, max_tokens, progress)
    return Evaluation(answer_metrics(predictions, records, answers), predictions)


def answer_metrics(
    predictions: list[dict[str, Any]], records: Sequence[dict], candidates: list[str]
) -> dict[str, float]:
    """Metrics of answers to questions: see `evaluate_answers`. None where the records have no answers."""
    truth = [record["answers"] for record in records]
    if not all(truth):
        return {}
    if any(len(given) > 1 for given in truth):
        annotations = [
            {"question_id": r["question_id"], "answers": [{"answer": given} for given in r["answers"]]}
            | {name: r[name] for name in ("answer_type", "question_type") if r.get(name)}
            for r in records
        ]
        official = vqa_accuracies({p["question_id"]: p["answer"] for p in predictions}, annotations)
        return {"accuracy": official.pop("overall"), **official}
    right = [_items(p["answer"]) == _items(given[0]) for p, given in zip(predictions, truth, strict=True)]
    counts = Counter(_items(given[0]) for given in truth)
    known = {_items(answer) for answer in candidates}
    return {
        "accuracy": 100 * sum(right) / len(right),
        "most_frequent_answer": 100 * counts.most_common(1)[0][1] / len(truth),
        "answer_is_a_candidate": 100 * sum(_items(given[0]) in known for given in truth) / len(truth),
    }


def _items(answer: str) -> frozenset[str]:
    return frozenset(normalize_answer(item) for item in answer.split(","))
