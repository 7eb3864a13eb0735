"""Pre-training and fine-tuning hand model, collator, evaluation and pushes to the loop."""

import json

import pytest
from helpers import tiny, tiny_records

from tcl_hf import TCLForImageTextRetrieval, TCLForPreTraining
from tcl_hf.recipes import train
from tcl_hf.recipes.arguments import FinetuningDataArguments, PretrainingDataArguments
from tcl_hf.sharing.hub import BackgroundPush
from tcl_hf.training.arguments import TCLTrainingArguments


@pytest.fixture
def loop(monkeypatch):
    """The arguments of each training run, which does not run."""
    calls = []

    def note(run):
        calls.append((run.model, run.collator, run.evaluator, run.push_checkpoint))
        return {"loss": 1.0}

    monkeypatch.setattr(train.TrainingRun, "train", note)
    return calls


def test_a_model_remembers_what_it_was_trained_on(loop):
    model, processor = tiny(TCLForPreTraining)
    model.config.trained_on = [{"task": "pretraining", "data": ["old"]}]
    data = PretrainingDataArguments(data=["coco.json", "vg.json"])
    assert train.train_task(data, TCLTrainingArguments(), model, processor, [], None) == {"loss": 1.0}
    step = {"task": "pretraining", "data": ["coco", "vg"]}
    assert model.config.trained_on == [{"task": "pretraining", "data": ["old"]}, step]
    ((_, collator, evaluate, push),) = loop
    assert collator.mlm_probability == 0.15 and evaluate is None and push is None


def test_a_run_evaluates_its_task_on_the_held_out_records(loop):
    model, processor = tiny(TCLForImageTextRetrieval)
    data = FinetuningDataArguments(task="retrieval", data=["coco.json"], eval_k=2)
    train.train_task(data, TCLTrainingArguments(), model, processor, [], tiny_records(4))
    ((_, collator, evaluate, _),) = loop
    assert collator.with_image_ids
    assert {"recall@1", "reranked_recall@1"} <= evaluate(model).keys()


def test_every_evaluation_chooses_the_weight_of_the_combined_score_on_tuning_data(loop, monkeypatch):
    model, processor = tiny(TCLForPreTraining)
    tuning, seen = tiny_records(3), []

    def choose(model, processor, records, args):
        seen.append(records)
        return 0.25 * len(seen)

    monkeypatch.setattr(train, "choose_rerank_weight_on", choose)
    data = PretrainingDataArguments(eval_k=2)
    train.train_task(data, TCLTrainingArguments(), model, processor, [], tiny_records(4), tuning=tuning)
    ((_, _, evaluate, _),) = loop
    assert evaluate(model)["rerank_weight"] == 0.25 and "combined_recall@1" in evaluate(model)
    assert seen == [tuning, tuning] and model.config.rerank_weight == 0.5


@pytest.mark.parametrize(("given", "fields", "expected"), [(2.0, {}, 2.0), (None, {"itm_weight": 0}, None)])
def test_a_weight_is_not_chosen_where_it_is_given_or_the_model_does_not_match(loop, given, fields, expected):
    model, processor = tiny(TCLForPreTraining, **fields)
    data = PretrainingDataArguments(eval_k=2, rerank_weight=given)
    train.train_task(data, TCLTrainingArguments(), model, processor, [], tiny_records(4), tuning=tiny_records(3))
    ((_, _, evaluate, _),) = loop
    assert evaluate(model).get("rerank_weight") == model.config.rerank_weight == expected


def test_the_weight_that_was_chosen_last_is_saved_with_the_model(tmp_path, monkeypatch):
    """The loop saves the last model before its evaluation."""
    model, processor = tiny(TCLForPreTraining)
    model.save_pretrained(tmp_path)
    before = json.loads((tmp_path / "config.json").read_text())
    monkeypatch.setattr(train.TrainingRun, "train", lambda run: run.evaluator(run.model))
    monkeypatch.setattr(train, "choose_rerank_weight_on", lambda *_: 0.5)
    args = TCLTrainingArguments(output_dir=str(tmp_path))
    data = PretrainingDataArguments(eval_k=2)
    train.train_task(data, args, model, processor, [], tiny_records(4), tuning=tiny_records(3))
    assert json.loads((tmp_path / "config.json").read_text()) == before | {"rerank_weight": 0.5}
    assert TCLForPreTraining.from_pretrained(tmp_path).config.rerank_weight == 0.5


def test_checkpoints_are_pushed_where_that_was_asked_for(loop):
    model, processor = tiny(TCLForPreTraining)
    args = TCLTrainingArguments(push_to_hub=True, hub_model_id="user/name")
    train.train_task(PretrainingDataArguments(), args, model, processor, [], None)
    ((_, _, _, push),) = loop
    assert isinstance(push, BackgroundPush) and push.repo_id == "user/name"
