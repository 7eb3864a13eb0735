"""Evaluation without training."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers import png, tiny

from tcl_hf import TCLForImageTextRetrieval, TCLForTextAssignment
from tcl_hf.recipes.evaluate import main, shuffle_images


def test_shuffled_images_are_those_of_other_records():
    rows = [{"image": i, "label": i} for i in range(9)]
    shuffled = shuffle_images(rows)
    assert sorted(row["image"] for row in shuffled) == list(range(9))
    assert all(row["image"] != row["label"] for row in shuffled)
    assert [row["image"] for row in rows] == list(range(9))


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
