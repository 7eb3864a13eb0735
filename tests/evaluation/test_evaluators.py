"""The evaluators against plain loops, alone and in two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import (
    ROOT,
    phrases,
    questions,
    statements,
    tiny,
    tiny_records,
)

from tcl_hf import (
    TCLForImageTextRetrieval,
    TCLForQuestionAnswering,
    TCLForVisualEntailment,
    TCLForVisualReasoning,
    TCLModel,
)
from tcl_hf.data.collators import TCLTaskCollator
from tcl_hf.data.images import open_image
from tcl_hf.evaluation.answers import answer_metrics, answer_questions
from tcl_hf.evaluation.classes import evaluate_classes
from tcl_hf.evaluation.grounding import evaluate_grounding
from tcl_hf.evaluation.retrieval import evaluate_retrieval
from tcl_hf.inference.grounding import heat_point, matching_heat_map, similarity_heat_map


def test_neighbours_about_one_image_are_evaluated_together_with_the_same_result(monkeypatch):
    model, processor = tiny(TCLForVisualReasoning)
    rows = statements(("True", "False"), 6, images=2)
    for row in (1, 2, 4):
        rows[row] |= {"images": rows[row - 1]["images"]}
    encoded = []
    encode = TCLModel.encode_image
    monkeypatch.setattr(TCLModel, "encode_image", lambda self, p, **k: encoded.append(len(p)) or encode(self, p, **k))
    found = evaluate_classes(model, processor, rows, batch_size=5)
    assert encoded == [2 * 2, 2]  # rows 0 to 2, and 3 and 4; row 5
    for row, prediction in zip(rows, found.predictions, strict=True):
        with torch.no_grad():
            shares = model(**TCLTaskCollator(processor)([row])).logits.softmax(-1)[0]
        torch.testing.assert_close(torch.tensor(list(prediction["scores"].values())), shares, rtol=0, atol=1e-5)


def test_classes_equal_a_plain_loop_and_are_scored():
    model, processor = tiny(TCLForVisualEntailment)
    rows = statements(("entailment", "neutral", "contradiction"), 7)
    found = evaluate_classes(model.train(), processor, rows, batch_size=3)
    assert model.training
    model.eval()
    for row, prediction in zip(rows, found.predictions, strict=True):
        batch = TCLTaskCollator(processor)([row])
        with torch.no_grad():
            shares = model(**batch).logits.softmax(-1)[0]
        assert prediction["label"] == model.config.id2label[int(shares.argmax())]
        torch.testing.assert_close(torch.tensor(list(prediction["scores"].values())), shares, rtol=0, atol=1e-5)
    right = sum(row["label"] == p["label"] for row, p in zip(rows, found.predictions, strict=True))
    assert found.metrics["accuracy"] == pytest.approx(100 * right / 7)
    assert found.metrics["most_frequent_label"] == pytest.approx(100 * 3 / 7)


def test_two_image_reasoning_is_scored_by_sentence_too():
    model, processor = tiny(TCLForVisualReasoning)
    rows = statements(("True", "False"), 6, images=2)
    found = evaluate_classes(model, processor, rows)
    right = [row["label"] == p["label"] for row, p in zip(rows, found.predictions, strict=True)]
    whole = [right[i] and right[i + 1] for i in (0, 2, 4)]
    assert found.metrics["consistency"] == pytest.approx(100 * sum(whole) / 3)


@pytest.mark.parametrize("k", [2, 50])
def test_answers_equal_a_plain_loop_over_candidates(k):
    model, processor = tiny(TCLForQuestionAnswering)
    rows, candidates = questions(5), ["red", "green dog", "big cat house", "blue", "a"]
    found = answer_questions(model, processor, rows, candidates, k=k, batch_size=2)
    for row, prediction in zip(rows, found, strict=True):
        batch = TCLTaskCollator(processor, with_answers=False, max_tokens=50)([row])
        scores = []
        with torch.no_grad():
            for candidate in candidates:
                labels, _ = processor.encode_answers([candidate])
                logits = model(**batch, labels=labels).logits.log_softmax(-1)[0]  # (L - 1, V)
                each = logits.gather(-1, labels[0, 1:, None]).flatten()
                scores.append((each[0].item(), (each.sum() + each[0]).item()))
        among = sorted(range(5), key=lambda c: -scores[c][0])[:k]
        assert prediction["answer"] == candidates[max(among, key=lambda c: scores[c][1])]
        assert prediction["question_id"] == row["question_id"]


def test_single_answers_are_compared_after_normalisation_and_lists_as_sets():
    truth = ["2", "cup, books", "red", "red"]
    rows = [{"question_id": str(i), "answers": [answer]} for i, answer in enumerate(truth)]
    said = ["two", "books, cup", "blue", "Red"]
    predictions = [{"question_id": str(i), "answer": answer} for i, answer in enumerate(said)]
    metrics = answer_metrics(predictions, rows, ["red", "2"])
    assert metrics == {"accuracy": 75.0, "most_frequent_answer": 50.0, "answer_is_a_candidate": 75.0}


def test_several_answers_are_scored_by_the_official_rule():
    rows = [{"question_id": "7", "answers": ["red"] * 2 + ["blue"] * 8, "answer_type": "other"}]
    metrics = answer_metrics([{"question_id": "7", "answer": "red"}], rows, [])
    # Leaving one out: 2 of 10 times one "red" is left, 8 times two: (2 * 1/3 + 8 * 2/3) / 10.
    assert metrics["accuracy"] == pytest.approx(60.0)
    assert answer_metrics([{"question_id": "7", "answer": "red"}], [{"question_id": "7", "answers": []}], []) == {}


def test_grounding_equals_a_plain_loop_and_counts_phrases_with_boxes():
    model, processor = tiny(TCLForImageTextRetrieval)
    rows = phrases(4)
    found = evaluate_grounding(model, processor, rows, layer=2, batch_size=3)
    assert found.metrics["phrases"] == 4
    hits = 0
    for row, prediction in zip(rows, found.predictions, strict=True):
        image = open_image(row["image"]).convert("RGB")
        inputs = processor(images=image, text=row["captions"][1], return_tensors="pt")
        maps = matching_heat_map(model, **inputs, layer=2)[0]
        words = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
        last = max(i for i, word in enumerate(words) if word == "dog")
        x, y = heat_point(maps[1 : last + 1].mean(0), image.size)
        assert prediction["point"] == [x, y]
        hits += 2 <= x <= 20 and 2 <= y <= 20
    assert found.metrics["pointing_accuracy"] == pytest.approx(100 * hits / 4)
    assert found.metrics["random_point"] == pytest.approx(100 * 18 * 18 / (40 * 30))


def test_grounding_by_similarity_reads_the_phrase_alone():
    model, processor = tiny(TCLForImageTextRetrieval)
    rows = phrases(4)
    found = evaluate_grounding(model, processor, rows, layer=0, batch_size=3, heat="similarity")
    assert found.metrics["phrases"] == 4
    for row, prediction in zip(rows, found.predictions, strict=True):
        image = open_image(row["image"]).convert("RGB")
        inputs = processor(images=image, text=prediction["phrase"], return_tensors="pt")
        x, y = heat_point(similarity_heat_map(model, **inputs, layer=0)[0], image.size)
        assert prediction["point"] == [x, y]
    with pytest.raises(ValueError, match="heat='cold' is no kind of heat map"):
        evaluate_grounding(model, processor, rows, heat="cold")


def test_states_in_half_precision_change_little_and_stay_on_the_cpu():
    model, processor = tiny(TCLForImageTextRetrieval)
    whole = evaluate_retrieval(model, processor, tiny_records(7), k=3)
    half = evaluate_retrieval(model, processor, tiny_records(7), k=3, states_dtype=torch.float16)
    similar = [name for name in whole if not name.startswith("reranked")]
    assert {name: half[name] for name in similar} == {name: whole[name] for name in similar}
    assert abs(half["reranked_recall_mean"] - whole["reranked_recall_mean"]) <= 10


TWO_PROCESSES = """
import json, sys, torch, torch.distributed as dist
sys.path.insert(0, "tests")
from helpers import phrases, questions, statements, tiny, tiny_records
from tcl_hf import *
from tcl_hf.evaluation.answers import *
from tcl_hf.evaluation.classes import *
from tcl_hf.evaluation.grounding import *
from tcl_hf.evaluation.retrieval import *
from tcl_hf.evaluation.shares import *
dist.init_process_group("gloo")
model, processor = tiny(TCLForImageTextRetrieval)
found = [evaluate_retrieval(model, processor, tiny_records(7), k=3, batch_size=2)]
found.append(evaluate_grounding(model, processor, phrases(3), batch_size=2).metrics)
model, processor = tiny(TCLForVisualEntailment)
rows = statements(("entailment", "neutral", "contradiction"), 7)
found.append(evaluate_classes(model, processor, rows, batch_size=2).predictions)
model, processor = tiny(TCLForQuestionAnswering)
found.append(answer_questions(model, processor, questions(5), ["red", "green dog", "a"], batch_size=2))
open(f"{sys.argv[1]}-{dist.get_rank()}.json", "w").write(json.dumps(found))
dist.destroy_process_group()
"""


def test_processes_share_the_work_and_all_get_the_whole_result(tmp_path):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    results = []
    for processes in (2, 1):
        out = tmp_path / f"of-{processes}"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        subprocess.run([*command, str(script), str(out)], cwd=ROOT, env=env, check=True, capture_output=True)
        results += [json.loads(Path(f"{out}-{rank}.json").read_text()) for rank in range(processes)]
    for other in results[:2]:
        for mine, alone in zip(other, results[2], strict=True):
            if isinstance(mine, dict):
                assert mine == pytest.approx(alone, abs=1e-5)
            else:
                assert [p.get("label", p.get("answer")) for p in mine] == [
                    p.get("label", p.get("answer")) for p in alone
                ]
