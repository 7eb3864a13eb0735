"""Answers equal those of a plain loop and of the pipeline, and are scored by the official rules."""

import pytest
import torch
from helpers import questions, small_patches, stir, tiny, tiny_processor
from transformers import pipeline

from tcl_hf import TCLForQuestionAnswering
from tcl_hf.data.collators import TCLTaskCollator
from tcl_hf.data.images import open_image
from tcl_hf.evaluation.answers import answer_metrics, evaluate_answers
from tcl_hf.models.processing_tcl import MAX_ANSWER_TOKENS, MAX_QUESTION_TOKENS


@pytest.mark.parametrize("k", [2, 50])
def test_answers_equal_a_plain_loop_over_candidates(k):
    model, processor = tiny(TCLForQuestionAnswering)
    rows, candidates = questions(5), ["red", "green dog", "big cat house", "blue", "a"]
    found = evaluate_answers(model, processor, rows, candidates, k=k, batch_size=2).predictions
    for row, prediction in zip(rows, found, strict=True):
        batch = TCLTaskCollator(processor, with_answers=False, max_tokens=50)([row])
        scores = []
        with torch.no_grad():
            for candidate in candidates:
                labels, _ = processor.encode_answers([candidate])
                logits = model(**batch, labels=labels).logits.log_softmax(-1)[0]  # (L - 1, V)
                log_probabilities = logits.gather(-1, labels[0, 1:, None]).flatten()
                scores.append((log_probabilities[0].item(), (log_probabilities.sum() + log_probabilities[0]).item()))
        among = sorted(range(5), key=lambda c: -scores[c][0])[:k]
        assert prediction["answer"] == candidates[max(among, key=lambda c: scores[c][1])]
        assert prediction["question_id"] == row["question_id"]


def test_evaluation_and_pipeline_rank_long_answers_and_questions_equally():
    """Both cut answers and questions at the same number of tokens, which changes the probabilities of these answers."""
    processor = tiny_processor()
    text = {"vocab_size": 80, "bos_token_id": 2, "eos_token_id": 3, "max_position_embeddings": 64}
    model = stir(TCLForQuestionAnswering(small_patches(text_config=text)).eval(), by=0.3)
    same = "red dog red dog red dog red dog red"  # the tenth word is the last one that is kept
    candidates = [f"{same} cat sits", f"{same} house near the big tree on the green car"]
    assert all(len(processor.tokenizer.tokenize(candidate)) >= MAX_ANSWER_TOKENS for candidate in candidates)
    rows = questions(4)
    rows[1]["question"] = "what is near the big red dog " * 10
    assert len(processor.tokenizer.tokenize(processor.clean_question(rows[1]["question"]))) >= MAX_QUESTION_TOKENS
    evaluated = evaluate_answers(model, processor, rows, candidates, batch_size=2).predictions
    pipe = pipeline("visual-question-answering", model=model, processor=processor, device="cpu")
    for row, expected in zip(rows, evaluated, strict=True):
        best, _ = pipe({"image": open_image(row["image"]), "question": row["question"]}, candidates=candidates)
        assert best["answer"] == expected["answer"]
        assert best["score"] == pytest.approx(expected["score"], abs=1e-5)


def test_the_longest_question_is_an_argument_of_the_evaluation():
    """Questions that differ in their last words only are the same question once these are cut off."""
    model, processor = tiny(TCLForQuestionAnswering)
    stir(model, by=0.3)
    first, second = ({**questions(1)[0], "question": f"what is the big {word}"} for word in ("dog", "car tree"))
    candidates = ["red", "cat", "green"]
    scores = {}
    for max_tokens in (5, 50):
        found = evaluate_answers(model, processor, [first, second], candidates, max_tokens=max_tokens).predictions
        scores[max_tokens] = [prediction["score"] for prediction in found]
    assert scores[5][0] == pytest.approx(scores[5][1], abs=1e-6)
    assert abs(scores[50][0] - scores[50][1]) > 1e-4


def test_single_answers_are_compared_after_normalisation_and_lists_as_sets():
    true = ["2", "cup, books", "red", "red"]
    rows = [{"question_id": str(i), "answers": [answer]} for i, answer in enumerate(true)]
    predicted = ["two", "books, cup", "blue", "Red"]
    predictions = [{"question_id": str(i), "answer": answer} for i, answer in enumerate(predicted)]
    metrics = answer_metrics(predictions, rows, ["red", "2"])
    assert metrics == {"accuracy": 75.0, "most_frequent_answer": 50.0, "answer_is_a_candidate": 75.0}


def test_several_answers_are_scored_by_the_official_rule():
    rows = [{"question_id": "7", "answers": ["red"] * 2 + ["blue"] * 8, "answer_type": "other"}]
    metrics = answer_metrics([{"question_id": "7", "answer": "red"}], rows, [])
    # With one answer left out, 1 "red" remains 2 of 10 times, and 2 remain 8 times: (2 * 1/3 + 8 * 2/3) / 10.
    assert metrics["accuracy"] == pytest.approx(60.0)
    assert answer_metrics([{"question_id": "7", "answer": "red"}], [{"question_id": "7", "answers": []}], []) == {}


def test_each_question_is_scored_by_its_own_answers():
    """One question with two answers changes the score of no other; ten answers are scored by the official rule."""
    single = [{"question_id": n, "answers": [answer]} for n, answer in enumerate(("red", "blue", "2"))]
    given = [{"question_id": n, "answer": answer} for n, answer in enumerate(("red", "green", "two", "a cup"))]
    assert answer_metrics(given[:3], single, ["red"])["accuracy"] == pytest.approx(200 / 3)
    several = [*single, {"question_id": 3, "answers": ["cup", "mug"]}]
    assert answer_metrics(given, several, ["red"]) == {"accuracy": 75.0}
    people = [*single, {"question_id": 3, "answers": ["cup"] * 2 + ["mug"] * 8}]
    # Each of the two is left out in turn, and then one agrees; else both agree: (2 * 1/3 + 8 * 2/3) / 10.
    assert answer_metrics(given, people, ["red"])["accuracy"] == pytest.approx((200 + 60) / 4)
