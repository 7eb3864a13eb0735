"""A run stops when it is asked to, in each way in which it can be started."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers import ROOT, png

from tcl_hf.training.checkpoints import newest_whole_checkpoint
from tcl_hf.training.interruption import PREEMPTED
from tcl_hf.training.log import read_metrics

MARK = "TCL_TEST_RUN"
OPTIONS = [
    *("--image_size", "16", "--vocab_size", "60", "--max_steps", "100000", "--logging_steps", "1"),
    *("--per_device_train_batch_size", "4", "--dataloader_num_workers", "2", "--validation_share", "0"),
    "--config",
    '{"queue_size": 8, "vision_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,'
    ' "intermediate_size": 32, "patch_size": 8}, "text_config": {"hidden_size": 16, "num_hidden_layers": 2,'
    ' "fusion_layer": 1, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 40}}',
]
PYTHON = [sys.executable, "-m"]
LAUNCHERS = {
    "python": ([*PYTHON, "tcl_hf"], PREEMPTED),
    "accelerate": ([*PYTHON, "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "tcl_hf"], -15),
    "two processes": ([*PYTHON, "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "tcl_hf"], 1),
}


def processes_of(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_until(is_so, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not is_so() and time.monotonic() < end:
        time.sleep(0.2)
    return is_so()


@pytest.mark.slow
@pytest.mark.parametrize("way", LAUNCHERS)
def test_a_run_saves_and_ends_when_what_has_started_it_gets_sigterm(tmp_path, way):
    command, expected = LAUNCHERS[way]
    folder, mark = tmp_path / "run", str(tmp_path)
    rows = "".join(f"{n}.png,a dog number {n}\n" for n in range(12))
    for n in range(12):
        (tmp_path / f"{n}.png").write_bytes(png(n))
    (tmp_path / "captions.csv").write_text(f"image,caption\n{rows}")
    environment = os.environ | {MARK: mark, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    arguments = ["pretrain", "--data", str(tmp_path / "captions.csv"), "--output_dir", str(folder), *OPTIONS]
    with (tmp_path / "log").open("w") as log:
        started = subprocess.Popen([*command, *arguments], env=environment, stdout=log, stderr=log, cwd=tmp_path)
    try:
        assert wait_until(lambda: len(lines_of(folder)) >= 2 or started.poll() is not None, 180)
        assert started.poll() is None, (tmp_path / "log").read_text()
        started.send_signal(signal.SIGTERM)
        assert started.wait(60) == expected, (tmp_path / "log").read_text()
        assert wait_until(lambda: not processes_of(mark), 40), processes_of(mark)
    finally:
        for process in processes_of(mark):
            process.kill()
        started.wait()
    assert newest_whole_checkpoint(folder) is not None
    assert "The run was asked to stop" in (tmp_path / "log").read_text()
    assert not (folder / "run.lock").exists()


def lines_of(folder: Path) -> list[dict]:
    try:
        return read_metrics(folder / "metrics.jsonl")
    except ValueError:  # A line is just being written.
        return []
