"""Pre-training and fine-tuning hand model, collator, evaluation and pushes to the loop."""

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


def test_checkpoints_are_pushed_where_that_was_asked_for(loop):
    model, processor = tiny(TCLForPreTraining)
    args = TCLTrainingArguments(push_to_hub=True, hub_model_id="user/name")
    train.train_task(PretrainingDataArguments(), args, model, processor, [], None)
    ((_, _, _, push),) = loop
    assert isinstance(push, BackgroundPush) and push.repo_id == "user/name"
