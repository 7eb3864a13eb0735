"""An evaluation reads the task and its arguments from the folder of the model."""

import json

import pytest
from helpers import tiny

from tcl_hf import TCLForPreTraining, TCLForQuestionAnswering, TCLForTextAssignment, TCLForVisualEntailment, TCLModel
from tcl_hf.models.processing_tcl import MAX_TOKENS
from tcl_hf.recipes.arguments import FinetuningDataArguments, PretrainingDataArguments, RecipeError
from tcl_hf.recipes.model_folder import file_of, read_task, results_folder, write_task
from tcl_hf.recipes.parsing import EVALUATE, parse_recipe


def test_an_evaluation_takes_its_arguments_from_the_model(tmp_path):
    args = FinetuningDataArguments(task="question_answering", data=["mine/questions.json"], eval_k=7, eval_max_tokens=9)
    write_task(tmp_path, args)
    assert json.loads((tmp_path / "task.json").read_text()) == {
        "task": "question_answering",
        "eval_k": 7,
        "eval_max_tokens": 9,
    }  # and not the data, because the folder may be shared
    data, model, _, _ = parse_recipe(EVALUATE, ["--model", str(tmp_path), "--data", "x.json"])
    assert (data.task, data.eval_k, data.eval_max_tokens, data.data) == ("question_answering", 7, 9, ["x.json"])
    assert data.eval_images == 0 and model.image_size is None and not data.add_words  # no recipe's
    data, *_ = parse_recipe(EVALUATE, ["--model", str(tmp_path), "--data", "x.json", "--eval_k", "8"])
    assert data.eval_k == 8
    data, *_ = parse_recipe(EVALUATE, ["--model", str(tmp_path), "--data", "x.json", "--task", "grounding"])
    assert data.task == "grounding" and data.eval_max_tokens is None


def test_embedded_data_is_named_and_gives_way_to_other_data(tmp_path):
    write_task(tmp_path, PretrainingDataArguments(eval_k=16, eval_captions=1))
    data, *_ = parse_recipe(EVALUATE, ["--model", str(tmp_path)])
    assert (data.task, data.data, data.eval_k, data.eval_captions) == ("retrieval", ["openmoji"], 16, 1)
    data, *_ = parse_recipe(EVALUATE, ["--model", str(tmp_path), "--data", "photos"])
    assert (data.data, data.eval_k) == (["photos"], 16)


@pytest.mark.parametrize(
    ("head", "task"),
    [
        (TCLForPreTraining, "retrieval"),
        (TCLModel, "retrieval"),
        (TCLForQuestionAnswering, "question_answering"),
        (TCLForVisualEntailment, "visual_entailment"),
    ],
)
def test_a_model_without_the_file_is_evaluated_by_its_class(head, task, tmp_path):
    tiny(head)[0].save_pretrained(tmp_path)
    assert read_task(str(tmp_path), names_data=True) == {"task": task}
    data, *_ = parse_recipe(EVALUATE, ["--model", str(tmp_path), "--data", "x"])
    assert data.task == task and (data.eval_max_tokens or MAX_TOKENS) == MAX_TOKENS


def test_a_model_for_no_evaluated_task_asks_for_one(tmp_path):
    tiny(TCLForTextAssignment)[0].save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=r"does not say for which task it was made: name one with --task \(retrieval"):
        read_task(str(tmp_path), names_data=True)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"task": "captioning"}',
        '{"task": "retrieval", "output_dir": "/"}',
        pytest.param("[" * 100_000, id="deep"),
    ],
)
def test_a_damaged_file_is_refused_in_a_sentence(content, tmp_path):
    (tmp_path / "task.json").write_text(content)
    with pytest.raises(RecipeError, match=r"task\.json cannot be read \(.*\): name --task, or write the file anew"):
        read_task(str(tmp_path), names_data=True)


def test_results_of_a_model_on_the_hub_go_below_runs(tmp_path):
    assert results_folder(str(tmp_path)) == tmp_path
    assert str(results_folder("user/name")) == "runs/user_name"
    assert file_of("user/name-that-is-nowhere", "answers.json") is None
