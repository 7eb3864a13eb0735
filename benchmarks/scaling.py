"""Pairs per second of pre-training on the default pictures with one process and with two, on an otherwise idle machine.

`python benchmarks/scaling.py`: one process with one thread, two processes (gloo) with one thread each, and one process
with two threads, in turn and repeated. Each process reads and augments its own data in one worker.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WAYS = {"1 process, 1 thread": (1, 1), "2 processes, 1 thread each": (2, 1), "1 process, 2 threads": (1, 2)}


def pairs_per_second(processes: int, threads: int, steps: int, image_size: int) -> float:
    """Train for a number of steps, and return the median over the lines of the log, without the first."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command += [
            str(ROOT / "scripts/pretrain.py"),
            "--recipe",
            "openmoji_scratch",
            "--output_dir",
            folder,
            "--validation_split",
            "",
        ]
        command += ["--max_steps", str(steps), "--logging_steps", str(steps // 4), "--dataloader_num_workers", "1"]
        command += ["--image_size", str(image_size), "--num_operations", "0"]
        subprocess.run(command, check=True, env=environment, cwd=folder, capture_output=True)
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["pairs_per_second"] for line in lines[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--image_size", type=int, default=128, help="pixels; at 64, the workers need a core of their own"
    )
    args = parser.parse_args()
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(args.repeats):
        for way, (processes, threads) in WAYS.items():
            found[way].append(pairs_per_second(processes, threads, args.steps, args.image_size))
    one = statistics.median(found["1 process, 1 thread"])
    print("| | pairs/s (median) | least | most | against one thread |\n|---|---|---|---|---|")
    for way, values in found.items():
        median = statistics.median(values)
        print(f"| {way} | {median:.1f} | {min(values):.1f} | {max(values):.1f} | {median / one:.2f} |")


if __name__ == "__main__":
    main()
