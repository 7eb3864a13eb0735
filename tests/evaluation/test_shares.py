"""Two processes share the work of every evaluator, and each has the whole result."""

import json
from pathlib import Path

import pytest
from helpers import in_two_processes, labelled, phrases, questions, statements, tiny, tiny_records
from torch import distributed

from tcl_hf import TCLForImageTextRetrieval, TCLForQuestionAnswering, TCLForVisualEntailment, TCLModel
from tcl_hf.evaluation.answers import evaluate_answers
from tcl_hf.evaluation.classes import evaluate_classes
from tcl_hf.evaluation.grounding import evaluate_grounding
from tcl_hf.evaluation.retrieval import evaluate_retrieval
from tcl_hf.evaluation.zero_shot import evaluate_zero_shot


def evaluate_all() -> list:
    model, processor = tiny(TCLForImageTextRetrieval)
    found = [evaluate_retrieval(model, processor, tiny_records(7), k=3, batch_size=2, rerank_weight=0.5)]
    found.append(evaluate_grounding(model, processor, phrases(3), batch_size=2).metrics)
    model, processor = tiny(TCLForVisualEntailment)
    rows = statements(("entailment", "neutral", "contradiction"), 7)
    found.append(evaluate_classes(model, processor, rows, batch_size=2).predictions)
    model, processor = tiny(TCLForQuestionAnswering)
    found.append(evaluate_answers(model, processor, questions(5), ["red", "green dog", "a"], batch_size=2).predictions)
    model, processor = tiny(TCLModel)
    for classes in (["red dog", "big cat", "house"], ["tree"]):
        rows = labelled(classes)
        evaluation = evaluate_zero_shot(model, processor, rows, classes, ["{}", "a photo of a {}"], batch_size=2)
        found += [evaluation.metrics, evaluation.predictions]
    return found


def evaluate_and_save(rank: int, folder: Path) -> None:
    distributed.init_process_group("gloo")
    (folder / f"{rank}.json").write_text(json.dumps(evaluate_all()))
    distributed.destroy_process_group()


def test_processes_share_the_work_and_all_get_the_whole_result(tmp_path):
    in_two_processes(evaluate_and_save, tmp_path)
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    results.append(json.loads(json.dumps(evaluate_all())))
    for other in results[:2]:
        for shared, alone in zip(other, results[2], strict=True):
            if isinstance(shared, dict):
                assert shared == pytest.approx(alone, abs=1e-5)
            else:
                labels = [[p.get("label", p.get("answer")) for p in predictions] for predictions in (shared, alone)]
                assert labels[0] == labels[1]
