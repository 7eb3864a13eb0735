"""Results: the protocol of a measurement, and the files that hold it."""

import json
from dataclasses import replace

import pytest
from helpers import small_patches

from tcl_hf import TCLConfig
from tcl_hf.evaluation.protocol import EvaluationProtocol
from tcl_hf.evaluation.shares import Evaluation
from tcl_hf.recipes.arguments import PretrainingDataArguments, TaskArguments
from tcl_hf.recipes.results import evaluation_protocol, protocol_name, write_results


def test_protocols_are_named_after_what_a_model_has_learned_from():
    def of(*history):
        config = TCLConfig(trained_on=[{"task": task, "data": data} for task, data in history])
        return protocol_name(config, "retrieval", "flickr30k")

    assert protocol_name(TCLConfig(), "retrieval", "flickr30k") == "zero_shot"
    assert of(("pretraining", ["coco", "vg"])) == "zero_shot"
    assert of(("pretraining", ["coco"]), ("retrieval", ["coco"])) == "zero_shot_from_coco"
    assert of(("pretraining", ["coco"]), ("retrieval", ["flickr30k"])) == "finetuned"
    assert of(("pretraining", ["flickr30k", "coco"])) == "pretrained_on_flickr30k"
    assert of(("visual_entailment", ["snli_ve"])) == "zero_shot"


@pytest.mark.parametrize(
    ("task", "facts"),
    [
        ("retrieval", {"k": 16}),
        ("question_answering", {"k": 16}),
        ("grounding", {"heat": "similarity"}),
        ("visual_entailment", {}),
        ("visual_reasoning", {}),
    ],
)
def test_a_protocol_states_the_facts_of_its_task(task, facts):
    args = TaskArguments(task=task, data=["coco_test.json"], validation_split="test", eval_k=16, heat="similarity")
    assert evaluation_protocol(args, small_patches(), 7).to_dict() == {
        "task": task,
        "dataset": "coco",
        "split": "test",
        "records": 7,
        "protocol": "zero_shot",
        "resolution": 32,
        **facts,
    }


def test_a_protocol_of_classification_states_classes_and_templates():
    args = TaskArguments(task="classification", data=["imagenet/val"], templates=["a {}", "{}"])
    protocol = evaluation_protocol(args, small_patches(), 7, num_classes=3)
    assert (protocol.classes, protocol.templates, protocol.k) == (3, ["a {}", "{}"], None)
    assert str(protocol).endswith("with the protocol zero_shot, the resolution 32, 3 classes and 2 templates.")
    assert str(replace(protocol, templates=["{}"])).endswith("3 classes and 1 template.")


def test_pre_training_is_measured_as_retrieval():
    config = small_patches(trained_on=[{"task": "pretraining", "data": ["coco", "vg"]}])
    protocol = evaluation_protocol(PretrainingDataArguments(data=["coco.json", "vg.json"]), config, 3)
    assert (protocol.task, protocol.dataset, protocol.k) == ("retrieval", "coco", 32)
    assert protocol.protocol == "pretrained_on_coco"


def test_results_are_written_with_their_protocol(tmp_path):
    protocol = EvaluationProtocol("visual_entailment", "tiny", "dev", 2, "finetuned", 16)
    predictions = [{"image_id": "1", "label": "neutral"}]
    write_results(tmp_path / "new", Evaluation({"accuracy": 50.0}, predictions), protocol)
    written = json.loads((tmp_path / "new" / "evaluation.json").read_text())
    assert list(written) == [
        *("task", "dataset", "split", "records", "protocol", "resolution", "images_shuffled", "metrics")
    ]
    assert written["images_shuffled"] is False and written["metrics"] == {"accuracy": 50.0}
    assert json.loads((tmp_path / "new" / "predictions.json").read_text()) == predictions
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"evaluation.json", "predictions.json"}


def test_answers_are_written_for_the_server_too(tmp_path):
    protocol = EvaluationProtocol("question_answering", "vqa_v2", "test", 2, "finetuned", 384, k=128)
    predictions = [{"question_id": "262148000", "answer": "no", "score": 0.5}]
    write_results(tmp_path, Evaluation({}, predictions), protocol)
    assert json.loads((tmp_path / "vqa_results.json").read_text()) == [{"question_id": 262148000, "answer": "no"}]
    assert json.loads((tmp_path / "evaluation.json").read_text())["k"] == 128
