"""Kill small runs at random moments, resume them, and compare them with runs that were never killed.

`python benchmarks/kill_and_resume.py --kills 30`: map-style and streamed data, one and two processes, `kill -9` and
`kill -TERM` in turn, also while a checkpoint is being saved. It prints whether the logged losses are the same bit for
bit, whether each sample was read exactly once in an epoch, and how many checkpoints could not be read.
"""

import argparse
import collections
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

NUM_SAMPLES, BATCH, EPOCHS = 96, 4, 3
SEEN = "seen-{}.jsonl"
PREEMPTED = 75  # exit code after SIGTERM


def train_child(folder: Path, streaming: bool, resume: bool) -> None:
    """Train a tiny model, and record the samples of each step."""
    import torch
    import torch.distributed as dist

    from tcl_hf import TCLConfig, TCLForPreTraining, TCLImageProcessorPil, TCLProcessor
    from tcl_hf.data.collators import TCLPreTrainingCollator
    from tcl_hf.data.pairs import load_pairs
    from tcl_hf.data.tokenizer import train_tokenizer
    from tcl_hf.training.arguments import TCLTrainingArguments
    from tcl_hf.training.log import MetricsLog
    from tcl_hf.training.loop import TrainingRun

    tokenizer = train_tokenizer([f"word{i}" for i in range(NUM_SAMPLES)], vocab_size=300)
    processor = TCLProcessor(TCLImageProcessorPil(size={"height": 32, "width": 32}), tokenizer)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(int(resume))  # a resumed run starts from other weights, which the checkpoint must replace
    config = TCLConfig(
        vision_config=small | {"image_size": 32, "patch_size": 8},
        text_config=small | {"fusion_layer": 1, "vocab_size": len(tokenizer)},
        projection_dim=16,
        queue_size=64,
    )
    model = TCLForPreTraining(config)
    last: list[list[int]] = []
    model.register_forward_pre_hook(lambda m, a, kwargs: last.append(kwargs["image_ids"].tolist()), with_kwargs=True)
    write = MetricsLog.write

    def write_and_record(self, line):
        rank = dist.get_rank() if dist.is_initialized() else 0
        with (folder / SEEN.format(rank)).open("a") as file:
            file.write(json.dumps({"step": line["step"], "ids": last[-1]}) + "\n")
        write(self, line)

    MetricsLog.write = write_and_record
    pairs = load_pairs(str(folder.parent / "data"), streaming=streaming)
    world = int(os.environ.get("WORLD_SIZE", 1))
    args = TCLTrainingArguments(
        output_dir=str(folder),
        max_steps=EPOCHS * NUM_SAMPLES // BATCH // world,
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-3,
        warmup_steps=3,
        dataloader_num_workers=2,
        logging_steps=1,
        save_steps=3,
        resume=resume,
    )
    TrainingRun(model, pairs, TCLPreTrainingCollator(processor, with_image_ids=True), processor, args).train()


def write_data(folder: Path) -> None:
    """Six parquet files of random pictures with a word each."""
    import datasets
    from PIL import Image

    folder.mkdir()
    rng = np.random.default_rng(0)
    for shard in range(6):
        rows = []
        for number in range(shard, NUM_SAMPLES, 6):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(file, "PNG")
            rows.append({"image": {"bytes": file.getvalue(), "path": None}, "caption": f"word{number}"})
            rows[-1]["image_id"] = str(number)
        features = datasets.Features(
            {"image": datasets.Image(), "caption": datasets.Value("string"), "image_id": datasets.Value("string")}
        )
        datasets.Dataset.from_list(rows, features=features).to_parquet(folder / f"train-{shard}.parquet")


def start(folder: Path, streaming: bool, processes: int, resume: bool) -> list[subprocess.Popen]:
    """Start the processes of a run in one process group, without a launcher, which would start more groups."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", str(folder)]
    command += ["--streaming"] * streaming + ["--resume"] * resume
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    started: list[subprocess.Popen] = []
    with (folder.parent / f"{folder.name}.log").open("a") as log:
        for rank in range(processes):
            variables = environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {})
            group = started[0].pid if started else 0  # 0 makes a new group
            started.append(subprocess.Popen(command, env=variables, stdout=log, stderr=log, process_group=group))
    return started


def finish(folder: Path, streaming: bool, processes: int, resume: bool) -> None:
    """Start or resume a run, and wait for its end."""
    codes = [child.wait() for child in start(folder, streaming, processes, resume)]
    if any(codes):
        sys.exit(f"{folder} failed: see {folder}.log")


def steps_done(folder: Path) -> int:
    """The step of the last line of the log; a line that is being written does not count."""
    metrics = folder / "metrics.jsonl"
    text = metrics.read_text() if metrics.exists() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()
    return json.loads(lines[-1])["step"] if lines else 0


def can_resume(folder: Path) -> bool:
    """Whether there is a checkpoint. If not, the folder is emptied for a run from the start."""
    if any((folder / "checkpoints").glob("step-????????")):
        return True
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return False


def kill_once(
    folder: Path, streaming: bool, processes: int, with_signal: int, kills_left: int, draw: random.Random
) -> str:
    """Start or resume a run, and kill its whole group at a random moment; the moments are spread over the run."""
    resume = can_resume(folder)
    newest = max((folder / "checkpoints").glob("step-????????"), default=None)
    first = int(newest.name.removeprefix("step-")) if newest else 0
    last = EPOCHS * NUM_SAMPLES // BATCH // processes - 6  # so that a kill finds the run before its end
    target = first + 1 + draw.randrange(max(2 * (last - first) // (kills_left + 1), 1))
    metrics = folder / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns if metrics.exists() else 0
    children = start(folder, streaming, processes, resume)

    def running() -> bool:
        return all(child.poll() is None for child in children)

    # The log has the lines of the previous run until the new run drops those beyond its checkpoint.
    while running() and (not metrics.exists() or metrics.stat().st_mtime_ns == before):
        time.sleep(0.002)
    while running() and steps_done(folder) < target:
        time.sleep(0.002)
    time.sleep(draw.uniform(0, 0.3))  # a few steps, with saves between them
    was_running = running()
    if was_running:
        os.killpg(children[0].pid, with_signal)
    codes = {child.wait() for child in children}
    if not was_running or codes == {0}:
        return "had ended" if codes == {0} else f"FAILED {codes}"
    if codes != {PREEMPTED if with_signal == signal.SIGTERM else -signal.SIGKILL}:
        return f"FAILED {codes}"
    saving = any((folder / "checkpoints").glob("*.tmp"))
    return f"killed at step {steps_done(folder)}" + ", while saving" * saving


def curve(folder: Path) -> list[dict]:
    """The logged lines without their speed."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "pairs_per_second"} for line in lines]


def visits(folder: Path, processes: int) -> list[collections.Counter]:
    """How often each sample was read in each epoch, counting for each step the last run that took it."""
    steps: dict[tuple[int, int], list[int]] = {}
    for rank in range(processes):
        for text in (folder / SEEN.format(rank)).read_text().splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:  # cut off by a kill
                continue
            steps[rank, line["step"]] = line["ids"]
    per_epoch = NUM_SAMPLES // BATCH // processes
    epochs = [collections.Counter() for _ in range(EPOCHS)]
    for (_, step), ids in steps.items():
        epochs[(step - 1) // per_epoch].update(ids)
    return epochs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--streaming", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        train_child(args.child, args.streaming, args.resume)
        return
    root, draw = Path(tempfile.mkdtemp()), random.Random(0)
    write_data(root / "data")
    cases = [(streaming, processes) for streaming in (False, True) for processes in (1, 2)]
    good = True
    for number, (streaming, processes) in enumerate(cases):
        name = f"{'stream' if streaming else 'map'}-{processes}"
        (root / f"{name}-whole").mkdir()
        finish(root / f"{name}-whole", streaming, processes, resume=False)
        folder = root / name
        for kill in range(number, args.kills, len(cases)):
            with_signal = (signal.SIGKILL, signal.SIGTERM)[kill // len(cases) % 2]
            kills_left = len(range(kill, args.kills, len(cases)))
            outcome = kill_once(folder, streaming, processes, with_signal, kills_left, draw)
            print(f"{name}: {with_signal.name}, {outcome}", flush=True)
            good = good and "FAILED" not in outcome
        if not (folder / "model.safetensors").exists():
            finish(folder, streaming, processes, can_resume(folder))
        same = curve(folder) == curve(root / f"{name}-whole")
        once = all(set(epoch.values()) == {1} and len(epoch) == NUM_SAMPLES for epoch in visits(folder, processes))
        passed_over = (root / f"{name}.log").read_text().count("is passed over")
        print(f"{name}: same losses {same}, each sample once {once}, unreadable checkpoints {passed_over}", flush=True)
        good = good and same and once and not passed_over
    print("all as if never killed" if good else f"NOT as if never killed: see {root}")
    sys.exit(not good)


if __name__ == "__main__":
    main()
