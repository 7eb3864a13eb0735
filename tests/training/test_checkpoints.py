"""Checkpoints: whole or absent, verified, and written when a scheduler takes the machine away."""

import hashlib
import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from helpers import losses, small_patches, tiny_records, tiny_run
from safetensors.torch import load_file

from tcl_hf import TCLForPreTraining
from tcl_hf.data.pairs import DataError
from tcl_hf.evaluation.shares import in_batches
from tcl_hf.training.arguments import TrainingError
from tcl_hf.training.checkpoints import (
    CHECKPOINTS,
    MANIFEST,
    CheckpointWriteError,
    newest_checkpoint,
    newest_whole_checkpoint,
    read_manifest,
    what_is_damaged,
)
from tcl_hf.training.interruption import PREEMPTED, Preempted
from tcl_hf.training.log import read_metrics


def resumed(folder, **options):
    """Resume with other weights and random numbers, which the checkpoint must replace."""
    torch.manual_seed(99)
    return tiny_run(folder, model=TCLForPreTraining(small_patches()), resume=True, **options)


def curve(folder) -> list[dict[str, float]]:
    """The logged lines without their speed."""
    return [
        {k: v for k, v in line.items() if k != "pairs_per_second"} for line in read_metrics(folder / "metrics.jsonl")
    ]


def test_a_manifest_lists_every_file_and_the_processes(tmp_path):
    tiny_run(tmp_path, save_steps=4)
    checkpoint = newest_checkpoint(tmp_path)
    manifest = read_manifest(checkpoint)
    assert (manifest["step"], manifest["num_processes"]) == (4, 1)
    names = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    assert manifest["files"].keys() == names - {MANIFEST} and names > {"model.safetensors", "optimizer.safetensors"}
    assert what_is_damaged(checkpoint) is None
    modes = {path.stat().st_mode for path in checkpoint.rglob("*") if path.is_file()}
    assert modes == {(tmp_path / "metrics.jsonl").stat().st_mode}  # Who may read the log may read the weights.
    for name, (size, digest) in manifest["files"].items():
        content = (checkpoint / name).read_bytes()
        assert (size, digest) == (len(content), hashlib.sha256(content).hexdigest())


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the names of open files are those of Linux")
def test_files_are_flushed_before_the_checkpoint_gets_its_name(tmp_path, monkeypatch):
    flushed, renamed = [], []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda file: flushed.append(os.readlink(f"/proc/self/fd/{file}")) or fsync(file))
    monkeypatch.setattr(Path, "rename", lambda self, to: renamed.append(list(flushed)) or rename(self, to))
    tiny_run(tmp_path, save_steps=4)
    (before,) = renamed
    files = {path.name for path in newest_checkpoint(tmp_path).iterdir()}
    assert {Path(name).name for name in before if "step-" in name} == {*files, "step-00000004.tmp"}


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "manifest", "no manifest"])
def test_a_damaged_checkpoint_is_passed_over_for_the_last_good_one(reference, tmp_path, damage, caplog):
    tiny_run(tmp_path, save_steps=2)
    checkpoint = newest_checkpoint(tmp_path)
    file = checkpoint / (MANIFEST if "manifest" in damage else "optimizer.safetensors")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if damage in ("missing", "no manifest"):
        file.unlink()
    else:
        file.write_bytes(content[:-9] if damage in ("cut", "manifest") else content)
    assert newest_whole_checkpoint(tmp_path).name == "step-00000002" != checkpoint.name
    assert f"{checkpoint} is passed over: its " in caplog.text
    resumed(tmp_path)
    assert losses(tmp_path) == losses(reference)


def test_a_damaged_newer_checkpoint_does_not_displace_a_good_one(tmp_path):
    tiny_run(tmp_path, save_steps=2, save_total_limit=2)
    newest, deadline = newest_checkpoint(tmp_path), time.monotonic() + 60
    (newest / "optimizer.safetensors").write_bytes(b"damaged")
    resumed(tmp_path, save_steps=3, save_total_limit=1, max_steps=4)
    assert newest_whole_checkpoint(tmp_path) == newest_checkpoint(tmp_path) == newest.with_name("step-00000003")
    while (leftovers := list((tmp_path / CHECKPOINTS).glob("*.*"))) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not leftovers


def test_a_resumed_run_logs_the_same_means_over_steps_before_and_after(tmp_path):
    """A checkpoint between two lines of the log holds the sums so far."""
    options = {"logging_steps": 3, "num_train_epochs": 3}
    tiny_run(tmp_path / "whole", **options)

    def kill(model):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny_run(tmp_path / "killed", save_steps=4, evaluate=kill, eval_steps=5, **options)
    resumed(tmp_path / "killed", **options)
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")


def test_a_run_that_is_asked_to_stop_saves_and_exits_with_its_own_code(reference, tmp_path):
    def ask(model):
        os.kill(os.getpid(), signal.SIGTERM)
        return {"recall": 1.0}

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted) as stopped:
        tiny_run(tmp_path, evaluate=ask, eval_steps=3)
    assert stopped.value.code == PREEMPTED == 75
    assert signal.getsignal(signal.SIGTERM) == before
    assert newest_checkpoint(tmp_path).name == "step-00000003"
    resumed(tmp_path)
    assert losses(tmp_path) == losses(reference)


@pytest.mark.parametrize("eval_steps", [4, 0], ids=["in the middle", "at the end"])
def test_an_evaluation_stops_between_two_batches_and_is_done_anew(tmp_path, eval_steps):
    """The line of the log is then that of a run that was never stopped, although an evaluation draws random numbers."""
    batches = []

    def evaluate(model, asks_at=None):
        drawn = 0.0
        for rows in in_batches(list(range(4)), 1):
            batches.append(rows)
            drawn += torch.rand(()).item()
            if len(batches) == asks_at:
                os.kill(os.getpid(), signal.SIGTERM)
        return {"recall": drawn}

    options = {"eval_steps": eval_steps}
    tiny_run(tmp_path / "whole", evaluate=evaluate, **options)
    batches.clear()
    with pytest.raises(Preempted):
        tiny_run(tmp_path / "stopped", evaluate=lambda model: evaluate(model, 2), **options)
    assert len(batches) == 2
    assert newest_checkpoint(tmp_path / "stopped").name == f"step-{eval_steps or 6:08d}"
    resumed(tmp_path / "stopped", evaluate=evaluate, **options)
    assert curve(tmp_path / "stopped") == curve(tmp_path / "whole")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("stopped", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in one | other)


@pytest.fixture
def small_files():
    """A limit on the size of files stands for a full disk."""
    limit, ceiling = resource.getrlimit(resource.RLIMIT_FSIZE)
    former = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size or limit, ceiling))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, ceiling))
    signal.signal(signal.SIGXFSZ, former)


def test_a_full_disk_leaves_the_checkpoint_before_whole(reference, tmp_path, small_files):
    def fill(model):
        small_files(100_000)
        return {"recall": 1.0}

    with pytest.raises(CheckpointWriteError, match=r"step-00000004 could not be written .*Last good .*step-00000002"):
        tiny_run(tmp_path, save_steps=2, evaluate=fill, eval_steps=3)
    small_files(None)
    assert [path.name for path in (tmp_path / CHECKPOINTS).iterdir()] == ["step-00000002"]
    resumed(tmp_path)
    assert losses(tmp_path) == losses(reference)


def test_a_worker_that_dies_while_a_checkpoint_is_saved_is_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    def save(engine, folder, states):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    monkeypatch.setattr("tcl_hf.training.engine.Engine.save_state", save)
    with pytest.raises(DataError, match="A worker of the loader died"):
        tiny_run(tmp_path, save_steps=2)


def test_another_number_of_processes_is_refused(tmp_path):
    tiny_run(tmp_path, save_steps=4)
    manifest = newest_checkpoint(tmp_path) / MANIFEST
    manifest.write_text(manifest.read_text().replace('"num_processes": 1', '"num_processes": 2'))
    with pytest.raises(TrainingError, match="was written by 2 processes, and this run has 1"):
        resumed(tmp_path)


@pytest.mark.parametrize("workers", [(0, 2), (2, 1)])
def test_the_number_of_workers_may_change_between_runs(reference, tmp_path, workers):
    def kill(model):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny_run(tmp_path, save_steps=2, evaluate=kill, eval_steps=4, dataloader_num_workers=workers[0])
    resumed(tmp_path, dataloader_num_workers=workers[1])
    assert losses(tmp_path) == losses(reference)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"per_device_train_batch_size": 3}, "per_device_train_batch_size was 4 and is now 3"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps was 1 and is now 2"),
        ({"seed": 5}, "seed was 0 and is now 5"),
        ({"records": tiny_records(11)}, "the samples or their order differ; data.samples was 12 and is now 11"),
        ({"records": tiny_records(12)[::-1]}, "the samples or their order differ"),
    ],
)
def test_a_run_does_not_go_on_with_samples_in_another_order(tmp_path, change, sentence):
    """Some samples would be missed in the epoch, and others seen twice."""
    tiny_run(tmp_path, save_steps=4)
    anew = (
        r"Set them as they were, or start anew from its weights with --model .*step-00000004 and another output_dir\."
    )
    with pytest.raises(TrainingError, match=rf"step-00000004 is of a run with other settings: .*{sentence}.*{anew}"):
        resumed(tmp_path, num_train_epochs=3, **change)
    resumed(tmp_path, num_train_epochs=3, learning_rate=5e-4)  # What the order does not follow from may change.
    assert len(losses(tmp_path)) == 9
