"""Fine-tuning and evaluation end to end."""

import json
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers import ROOT, in_a_process, png, program, small_patches, statements, tiny_processor
from huggingface_hub import ModelCard

from tcl_hf import TCLForPreTraining, TCLForVisualEntailment
from tcl_hf.cli import evaluate, finetune
from tcl_hf.training.log import read_metrics


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    processor = tiny_processor(16)
    TCLForPreTraining(small_patches(vision_config={"image_size": 16})).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def run_script(name: str, *argv: object) -> CompletedProcess:
    return in_a_process(program, ROOT / "scripts" / name, *argv, ACCELERATE_USE_CPU="true")


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
    common = ["--recipe", "tcl_snli_ve", "--validation_data", file]
    common += ["--image_root", tmp_path, "--image_size", 16, "--dataset_name", "tiny_ve"]
    out = tmp_path / "out"
    ran = run_script(
        "finetune.py", *common, "--model", checkpoint, "--output_dir", out, "--num_train_epochs", 2,
        "--per_device_train_batch_size", 4, "--data", file, "--dataloader_num_workers", 0,
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
    written = json.loads((out / "evaluation.json").read_text())
    assert (written["protocol"], written["resolution"], written["records"]) == ("finetuned", 16, 8)
    assert written["images_shuffled"] is True and 0 <= written["metrics"]["accuracy"] <= 100
    assert len(json.loads((out / "predictions.json").read_text())) == 8
    assert (out / "predictions.png").exists()


def test_training_with_shuffled_images_is_marked_and_leaves_a_model_that_is_evaluated_without(checkpoint, tmp_path):
    file, out = write_entailment(tmp_path), tmp_path / "out"
    argv = ["--recipe", "tcl_snli_ve", "--data", file, "--validation_data", file, "--image_root", tmp_path]
    argv += ["--model", checkpoint, "--output_dir", out, "--image_size", 16, "--num_train_epochs", 1]
    argv += ["--per_device_train_batch_size", 4, "--dataloader_num_workers", 0, "--shuffle_images", "true"]
    finetune.main([str(word) for word in argv])
    assert "the images shuffled" in (out / "README.md").read_text()
    assert ModelCard.load(out / "README.md").data.eval_results[0].metric_args["images_shuffled"] is True
    evaluate.main(["--model", str(out), "--data", str(file), "--image_root", str(tmp_path)])
    assert json.loads((out / "evaluation.json").read_text())["images_shuffled"] is False


def test_adapters_of_a_recipe_are_evaluated_as_a_model_is(checkpoint, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    pytest.importorskip("peft", reason="PEFT is not installed")
    AcceleratorState._reset_state(True)
    file = write_entailment(tmp_path)
    common = ["--recipe", "tcl_snli_ve", "--validation_data", file, "--image_root", tmp_path, "--image_size", 16]
    argv = [*common, "--model", checkpoint, "--data", file, "--num_train_epochs", 1, "--dataloader_num_workers", 0]
    argv += ["--lora", '{"r": 2, "lora_alpha": 4}', "--learning_rate", 0.01, "--per_device_train_batch_size", 4]
    scores = {}
    for how in ("adapter", "merged"):
        out = tmp_path / how
        finetune.main([str(word) for word in [*argv, "--lora_save", how, "--output_dir", out]])
        at_end = read_metrics(out / "metrics.jsonl")[-1]["accuracy"]
        evaluate.main([str(word) for word in [*common, "--model", out]])
        evaluation = json.loads((out / "evaluation.json").read_text())
        assert evaluation["metrics"]["accuracy"] == at_end and evaluation["protocol"] == "finetuned"
        scores[how] = json.loads((out / "predictions.json").read_text())
        card = ModelCard.load(out / "README.md")
        assert "LoRA adapters of rank 2 and lora_alpha 4 on fc1, fc2, k_proj" in card.text
        assert card.data.library_name == {"adapter": "peft", "merged": "transformers"}[how]
        assert "lora" in card.data.tags
    assert [row["label"] for row in scores["adapter"]] == [row["label"] for row in scores["merged"]]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "nowhere"], "nowhere cannot be opened"),
        (["--task", "captioning"], "no task 'captioning'"),
        (["--data", "nowhere.json"], "nowhere.json"),
        (["--lora", '{"rank": 4}'], "lora has no field 'rank' (did you mean 'r'?)"),
    ],
)
def test_bad_input_is_one_sentence(checkpoint, argv, message):
    """`command` turns it into a `SystemExit` with this text, which Python prints before it exits with 1."""
    given = ["--recipe", "tcl_snli_ve", "--model", str(checkpoint), "--image_size", "16", *argv]
    with pytest.raises(SystemExit) as stopped:
        finetune.main(given)
    sentence = str(stopped.value.code)
    assert sentence.startswith("error: ") and message in sentence and "\n" not in sentence
