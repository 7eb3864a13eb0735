"""Question answering: the model ranks given answers, and the best ones are scored."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from ..data.collators import TCLTaskCollator
from ..models.encoders import eval_mode
from ..models.modeling_tcl_tasks import TCLForQuestionAnswering
from ..models.processing_tcl import MAX_QUESTION_TOKENS, MAX_QUESTION_WORDS, TCLProcessor
from .metrics import check_finite, normalize_answer, vqa_accuracies, vqa_accuracy
from .shares import Evaluation, collated_batches, gather_results

NUM_PEOPLE = 10  # human answers to a question for which the official evaluation is defined


@torch.no_grad()
def evaluate_answers(
    model: TCLForQuestionAnswering,
    processor: TCLProcessor,
    records: Sequence[dict],
    candidates: list[str],
    k: int = 128,
    batch_size: int = 32,
    max_tokens: int = MAX_QUESTION_TOKENS,
    progress: bool = False,
) -> Evaluation:
    """Accuracy in percent of the answers that rank first: see `answer_metrics`.

    Each prediction has `question_id`, `answer` and `score`, its probability.

    Args:
        records: an image, a question and its answers each; no answers in a test split.
        candidates: the answers to choose from.
        k: candidates that are scored in full, those with the most probable first tokens.
        batch_size: questions in a forward.
        max_tokens: longest question, [CLS] included.
        progress: show a progress bar.

    Raises:
        ValueError: if a record cannot be read.
    """
    candidate_ids, candidate_mask = (x.to(model.device) for x in processor.encode_answers(candidates))
    collator = TCLTaskCollator(
        processor, max_tokens=max_tokens, with_answers=False, max_question_words=MAX_QUESTION_WORDS
    )
    results: list[tuple[int, float]] = []  # index and probability of the best candidate
    with eval_mode(model):
        for batch in collated_batches(collator, records, batch_size, model.device, progress):
            options: dict[str, Any] = {"candidate_ids": candidate_ids, "candidate_mask": candidate_mask, "k": k}
            ranked: Any = model.rank_answers(**batch | options)
            results += zip(ranked.indices[:, 0].tolist(), ranked.probabilities[:, 0].tolist(), strict=True)
    results = gather_results(results, len(records))
    scores = torch.tensor([score for _, score in results])
    check_finite(scores, "probabilities of answers", lambda row: records[row]["question_id"])
    predictions = [
        {"question_id": record["question_id"], "answer": candidates[index], "score": score}
        for record, (index, score) in zip(records, results, strict=True)
    ]
    return Evaluation(answer_metrics(predictions, records, candidates), predictions)


def answer_metrics(
    predictions: list[dict[str, Any]], records: Sequence[dict], candidates: list[str]
) -> dict[str, float]:
    """Accuracy in percent of answers to questions; empty if the records have no answers, as those of a test split.

    Each question is scored by its own answers. With ten human answers, as in VQA, that is the official evaluation.
    Otherwise an answer is right if it equals one of the true ones after the official normalisation; answers that are
    lists, with commas, must have the same items in any order. If each question has one true answer,
    `most_frequent_answer` is the accuracy of always giving the most frequent one, and `answer_is_a_candidate` the share
    of questions whose true answer is among the candidates.
    """
    true_answers = [record["answers"] for record in records]
    if not all(true_answers):
        return {}
    if all(len(given) == NUM_PEOPLE for given in true_answers):
        annotations = [
            {"question_id": r["question_id"], "answers": [{"answer": given} for given in r["answers"]]}
            | {name: r[name] for name in ("answer_type", "question_type") if r.get(name)}
            for r in records
        ]
        official = vqa_accuracies({p["question_id"]: p["answer"] for p in predictions}, annotations)
        return {"accuracy": official.pop("overall"), **official}
    scores = [_score(p["answer"], given) for p, given in zip(predictions, true_answers, strict=True)]
    metrics = {"accuracy": 100 * sum(scores) / len(scores)}
    if any(len(given) > 1 for given in true_answers):
        return metrics
    true = [_items(given[0]) for given in true_answers]
    known = {_items(answer) for answer in candidates}
    metrics["most_frequent_answer"] = 100 * Counter(true).most_common(1)[0][1] / len(true)
    metrics["answer_is_a_candidate"] = 100 * sum(items in known for items in true) / len(true)
    return metrics


def _score(answer: str, given: list[str]) -> float:
    """The score of an answer to one question, from 0 to 1."""
    if len(given) == NUM_PEOPLE:
        return vqa_accuracy(answer, given)
    return float(any(_items(answer) == _items(one) for one in given))


def _items(answer: str) -> frozenset[str]:
    return frozenset(normalize_answer(item) for item in answer.split(","))
