"""Two processes share the work of every evaluator, and each has the whole result."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

TWO_PROCESSES = """
import json, sys, torch.distributed as dist
sys.path.insert(0, "tests")
from helpers import labelled, phrases, questions, statements, tiny, tiny_records
from tcl_hf import TCLForImageTextRetrieval, TCLForQuestionAnswering, TCLForVisualEntailment, TCLModel
from tcl_hf.evaluation.answers import evaluate_answers
from tcl_hf.evaluation.classes import evaluate_classes
from tcl_hf.evaluation.grounding import evaluate_grounding
from tcl_hf.evaluation.retrieval import evaluate_retrieval
from tcl_hf.evaluation.zero_shot import evaluate_zero_shot
dist.init_process_group("gloo")
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
        for shared, alone in zip(other, results[2], strict=True):
            if isinstance(shared, dict):
                assert shared == pytest.approx(alone, abs=1e-5)
            else:
                labels = [[p.get("label", p.get("answer")) for p in predictions] for predictions in (shared, alone)]
                assert labels[0] == labels[1]
