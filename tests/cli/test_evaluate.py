"""Evaluation without training."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers import png, tiny, write_json
from huggingface_hub import ModelCard

from tcl_hf import TCLForImageTextRetrieval, TCLForTextAssignment
from tcl_hf.cli.evaluate import main
from tcl_hf.cli.finetune import main as finetune


def test_a_task_with_nothing_to_measure_is_refused(tmp_path):
    model, processor = tiny(TCLForTextAssignment)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="text_assignment has nothing to evaluate: fine-tune its model"):
        main(["--task", "text_assignment", "--model", str(tmp_path)])


@pytest.fixture
def captions(tmp_path):
    """A file of four pairs whose captions are longer than eight tokens and differ at their end only."""
    rows = []
    for number, word in enumerate(("dog", "cat", "house", "tree")):
        (tmp_path / f"{number}.png").write_bytes(png(number))
        rows.append({"image": f"{number}.png", "caption": f"a big red car runs near the small {word}"})
    (tmp_path / "pairs_test.json").write_text(json.dumps(rows))
    return tmp_path / "pairs_test.json"


@pytest.fixture
def folder(tmp_path):
    AcceleratorState._reset_state(True)
    model, processor = tiny(TCLForImageTextRetrieval)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def evaluate(folder, captions, *argv: str) -> dict[str, float]:
    given = ["--task", "retrieval", "--model", str(folder), "--data", str(captions), "--eval_k", "2", *argv]
    main([*given, "--results", str(folder / "results")])
    return json.loads((folder / "results" / "evaluation.json").read_text())["metrics"]


def test_the_limit_of_tokens_reaches_the_evaluation(folder, captions):
    """Captions that are cut before the word in which they differ rank the four images alike: each rank comes once."""
    cut = evaluate(folder, captions, "--eval_max_tokens", "8")
    assert cut["t2i_mean_rank"] == 2.5 and cut["t2i_recall@1"] == 25
    assert cut != evaluate(folder, captions)


def test_precision_is_that_of_the_command_line(folder, captions, monkeypatch):
    seen = []
    forward = TCLForImageTextRetrieval.match

    def note(self, *args, **kwargs):
        seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(TCLForImageTextRetrieval, "match", note)
    for argv, dtype in (([], torch.float32), (["--bf16"], torch.bfloat16)):
        seen.clear()
        evaluate(folder, captions, *argv)
        assert set(seen) == {dtype}


# Classification


@pytest.fixture
def pictures(tmp_path):
    """Six class folders, of which each holds two pictures and one more that cannot be read."""
    for number, label in enumerate(("n1", "n2", "n3", "n4", "n5", "n6")):
        (tmp_path / "photos" / "val" / label).mkdir(parents=True)
        for name, content in (("a", png(2 * number)), ("b", png(2 * number + 1)), ("c", b"")):
            (tmp_path / "photos" / "val" / label / f"{name}.png").write_bytes(content)
    return str(tmp_path / "photos")


NAMES = {"n1": "dog", "n2": "cat", "n3": "house", "n4": "car", "n5": "tree", "n6": "photo"}


def test_classification_is_evaluated_from_folders_to_results(folder, pictures, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n# A model\n")
    names = write_json(tmp_path, NAMES, "names.json")
    argv = ["--task", "classification", "--model", str(folder), "--data", pictures, "--class_names", names]
    main([*argv, "--templates", "{}", "a big {}"])
    written = json.loads((folder / "evaluation.json").read_text())
    metrics = written.pop("metrics")
    assert written == {
        "task": "classification",
        "dataset": "photos",
        "split": "validation",
        "records": 12,
        "protocol": "zero_shot",
        "resolution": 32,
        "classes": 6,
        "templates": ["{}", "a big {}"],
        "images_shuffled": False,
    }
    predictions = json.loads((folder / "predictions.json").read_text())
    true = {f"{label}/{name}.png": words for label, words in NAMES.items() for name in "ab"}
    right = [prediction["label"] == true[prediction["image_id"]] for prediction in predictions]
    among = [true[prediction["image_id"]] in prediction["scores"] for prediction in predictions]
    assert metrics == pytest.approx(
        {
            "top1": 100 * sum(right) / 12,
            "top5": 100 * sum(among) / 12,
            "mean_per_class": 100 * sum(right) / 12,  # all classes have two pictures
            "most_frequent_label": 100 / 6,
        }
    )
    assert {prediction["image_id"] for prediction in predictions} == true.keys()
    assert (folder / "predictions.png").exists()
    results = ModelCard.load(folder / "README.md").data.eval_results
    assert {result.metric_type: result.metric_value for result in results} == {
        name: round(value, 2) for name, value in metrics.items()
    }
    assert {result.task_type for result in results} == {"zero-shot-image-classification"}
    assert results[0].metric_args == {"protocol": "zero_shot", "resolution": 32, "classes": 6, "templates": 2}


def test_classification_of_shuffled_images_keeps_the_classes(folder, pictures):
    argv = ["--task", "classification", "--model", str(folder), "--data", pictures, "--shuffle_images", "true"]
    main([*argv, "--class_names", "dog", "cat", "house", "car", "tree", "photo", "--results", str(folder / "shuffled")])
    assert json.loads((folder / "shuffled" / "evaluation.json").read_text())["classes"] == 6


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--templates", "{}", "a photo"], r"templates: the template 'a photo' has no \{\}: write it where"),
        (["--class_names", "dog", "cat"], "class_names has 2 names, but .*photos has 6 classes .*: give one name"),
        (["--class_names", "names.json"], "there is no file names.json: name a JSON file, or at least two classes"),
        (["--label_column", "kind"], "photos has no label column among image, image_id, label .*label_column"),
        (["--validation_split", "test"], "photos has folders of splits .*val.*, but none of 'test'"),
        (["--image_root", "photos"], "--image_root is read by .* only: leave it out for classification"),
        (["--eval_k", "5"], "--eval_k is read by .* only: leave it out for classification"),
    ],
)
def test_mistakes_of_classification_are_named(folder, pictures, argv, message):
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        main(["--task", "classification", "--model", str(folder), "--data", pictures, *argv])


def test_classification_is_not_fine_tuned(folder, pictures):
    with pytest.raises(
        SystemExit, match=r"^error: The task classification is evaluated without training: run `tcl-hf evaluate`"
    ):
        finetune(["--task", "classification", "--model", str(folder), "--data", pictures])
