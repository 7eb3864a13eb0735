"""The table of tasks: batches, evaluators against plain loops, protocols, and both scripts end to end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import (
    ROOT,
    png,
    questions,
    small_patches,
    statements,
    tiny,
    tiny_processor,
)

from tcl_hf import (
    TCLConfig,
    TCLForPreTraining,
    TCLForQuestionAnswering,
    TCLForVisualEntailment,
)
from tcl_hf.data.annotations.questions import QUESTION_FEATURES
from tcl_hf.data.collators import TCLPreTrainingCollator
from tcl_hf.data.pairs import DataError
from tcl_hf.recipes.arguments import RecipeError
from tcl_hf.recipes.build import name_of
from tcl_hf.recipes.tasks import (
    TASKS,
    TaskArguments,
    add_words,
    build_task_collator,
    candidate_answers,
    load_task,
    protocol,
    shuffle_images,
)


def test_sharing_images_is_for_tasks_with_one_text_after_the_other():
    with pytest.raises(RecipeError, match="share_images: 'retrieval' draws one caption"):
        TaskArguments(task="retrieval", share_images=True)


def test_an_unknown_kind_of_heat_map_is_refused():
    with pytest.raises(RecipeError, match="there is no map of 'cold'"):
        TaskArguments(task="grounding", heat="cold")


# The table


def test_every_task_has_what_training_needs():
    for name, task in TASKS.items():
        args = TaskArguments(task=name)
        collator = build_task_collator(args, TCLConfig(), tiny_processor())
        assert isinstance(collator, TCLPreTrainingCollator) == task.makes_pairs
        assert (task.evaluate is None) == (task.metric == "")


def test_protocols_tell_what_a_model_has_learned_from():
    def of(*history):
        config = TCLConfig(trained_on=[{"task": task, "data": data} for task, data in history])
        return protocol(config, "retrieval", "flickr30k")

    assert protocol(TCLConfig(), "retrieval", "flickr30k") == "zero_shot"
    assert of(("pretraining", ["coco", "vg"])) == "zero_shot"
    assert of(("pretraining", ["coco"]), ("retrieval", ["coco"])) == "zero_shot_from_coco"
    assert of(("pretraining", ["coco"]), ("retrieval", ["flickr30k"])) == "finetuned"
    assert of(("pretraining", ["flickr30k", "coco"])) == "pretrained_on_flickr30k"
    assert of(("visual_entailment", ["snli_ve"])) == "zero_shot"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("data/json_down/coco_train.json", "coco"),
        ("runs/x/flickr8k/", "flickr8k"),
        ("ve_dev.json", "ve"),
        ("data/pairs-*.tar", "pairs"),
        ("train.jsonl", "train"),
        ("openmoji", "openmoji"),
    ],
)
def test_data_is_called_by_its_name_without_the_split(source, name):
    assert name_of([source]) == name


def test_shuffled_images_are_those_of_other_records():
    rows = [{"image": i, "label": i} for i in range(9)]
    shuffled = shuffle_images(rows)
    assert sorted(row["image"] for row in shuffled) == list(range(9))
    assert all(row["image"] != row["label"] for row in shuffled)
    assert [row["image"] for row in rows] == list(range(9))


def test_answers_to_choose_from_are_those_of_training_most_frequent_first(tmp_path):
    rows = [row | {"answer_type": None, "question_type": None} for row in questions(3)]
    records = Dataset.from_list(rows, features=QUESTION_FEATURES)
    args = TaskArguments(task="question_answering")
    assert candidate_answers(args, records) == ["red", "big cat", "green"]
    (tmp_path / "answers.json").write_text('["yes", "no"]')
    assert candidate_answers(args, None, str(tmp_path)) == ["yes", "no"]
    with pytest.raises(RecipeError, match="--answer_list"):
        candidate_answers(args, None, str(tmp_path / "nothing"))
    assert candidate_answers(TaskArguments(task="retrieval"), None) == []


def test_new_words_become_one_token_each_and_survive_saving(tmp_path):
    model, processor = tiny(TCLForQuestionAnswering)
    rows = [row | {"answer_type": None, "question_type": None} for row in questions(3)]
    records = Dataset.from_list(rows, features=QUESTION_FEATURES)
    before = model.text_decoder.text_model.embeddings.word_embeddings.weight[:80].clone()
    new = add_words(model, processor, records)
    assert "what" in new and "red" not in new
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = type(processor).from_pretrained(tmp_path)
    for text in ("What is the red, near?", "whatis"):
        assert again(text=text)["input_ids"] == processor(text=text)["input_ids"]
    assert len(again.tokenizer.tokenize("what is")) == 2
    assert "what" not in again.tokenizer.tokenize("whatever")
    reloaded = TCLForQuestionAnswering.from_pretrained(tmp_path)
    embeddings = reloaded.text_decoder.text_model.embeddings.word_embeddings.weight
    assert len(embeddings) == len(processor.tokenizer)
    assert torch.equal(embeddings[:80], before)


def test_records_that_can_not_be_evaluated_are_left_out_and_said(caplog):
    args = TaskArguments(task="visual_entailment", data=["scenes"], validation_split="test")
    with pytest.raises(DataError, match="no split 'test'"):
        load_task(args, validation=True)


# The scripts


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    processor = tiny_processor(16)
    TCLForPreTraining(small_patches(vision_config={"image_size": 16})).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def run_script(name: str, *argv: object) -> subprocess.CompletedProcess:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)


def write_entailment(folder: Path, number: int = 8) -> Path:
    rows = []
    for i, row in enumerate(statements(("entailment", "neutral", "contradiction"), number)):
        (folder / f"{i}.jpg").write_bytes(png(i))
        rows.append({"image": str(i), "sentence": row["captions"][0], "label": row["label"]})
    file = folder / "ve_train.json"
    file.write_text(json.dumps(rows))
    return file


def test_both_scripts_run_a_task_from_files_to_results(checkpoint, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    file = write_entailment(tmp_path)
    common = ["--recipe", "tcl_snli_ve", "--data", file, "--validation_data", file]
    common += ["--image_root", tmp_path, "--image_size", 16, "--dataset_name", "tiny_ve", "--dataloader_num_workers", 0]
    out = tmp_path / "out"
    ran = run_script(
        "finetune.py", *common, "--model", checkpoint, "--output_dir", out, "--num_train_epochs", 2,
        "--per_device_train_batch_size", 4,
        "--eval_steps", 2,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "protocol finetuned" in ran.stdout
    card = (out / "README.md").read_text()
    assert "tiny_ve" in card and "protocol: finetuned" in card
    model = TCLForVisualEntailment.from_pretrained(out)
    assert model.config.trained_on == [{"task": "visual_entailment", "data": ["tiny_ve"]}]

    ran = run_script("evaluate.py", *common, "--model", out, "--shuffle_images", "true")
    assert ran.returncode == 0, ran.stderr
    said = json.loads((out / "evaluation.json").read_text())
    assert (said["protocol"], said["resolution"], said["records"]) == ("finetuned", 16, 8)
    assert said["images_shuffled"] is True and 0 <= said["metrics"]["accuracy"] <= 100
    assert len(json.loads((out / "predictions.json").read_text())) == 8
    assert (out / "predictions.png").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "nowhere"], "nowhere can not be opened"),
        (["--task", "captioning"], "no task 'captioning'"),
        (["--data", "nowhere.json"], "nowhere.json"),
    ],
)
def test_bad_input_is_one_sentence(checkpoint, argv, message):
    given = ["--recipe", "tcl_snli_ve", "--model", checkpoint, "--image_size", 16, *argv]
    ran = run_script("finetune.py", *given)
    assert ran.returncode == 1
    last = ran.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last
    assert "Traceback" not in ran.stderr
