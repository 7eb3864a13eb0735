"""Time until work can start: `python benchmarks/start_up.py`.

A fresh process imports torch and the two base classes of transformers' models and processors, and then `tcl_hf`, which
registers itself with transformers; a second process imports transformers' CLIP instead. Both imports are timed without
those before them, inside the process, because the difference of two processes would be smaller than their variation. A
third process, timed as a whole, runs `scripts/pretrain.py --help`. They take turns; the first round, which compiles the
bytecode, does not count.

Python's garbage collector searches all objects of torch and transformers when it happens to be due (about 0.2 s). If
this happens during the import, it is part of the time; it is also printed separately, as is the CPU time, which other
jobs on the machine disturb least.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from tqdm.auto import tqdm

ROOT = Path(__file__).parents[1]
BASE = "import torch; from transformers import PreTrainedModel, ProcessorMixin"
BASE_NAME = "torch, PreTrainedModel and ProcessorMixin"
BEYOND = {
    "tcl_hf": "import tcl_hf",
    "CLIPModel and CLIPProcessor": "from transformers import CLIPModel, CLIPProcessor",
}
SCRIPT = "scripts/pretrain.py --help"

# Prints the seconds of the base, then those of the import after it: elapsed, on the CPU, and collecting garbage.
PROGRAM = """
import gc, time
start = time.perf_counter()
{base}
collecting = 0.0
def watch(phase, info):
    global collecting
    collecting += time.process_time() if phase == "stop" else -time.process_time()
gc.callbacks.append(watch)
elapsed, cpu = time.perf_counter(), time.process_time()
{beyond}
print(elapsed - start, time.perf_counter() - elapsed, time.process_time() - cpu, collecting)
"""


def _run(*arguments: str) -> str:
    """Run a fresh Python, and return its output."""
    # Nothing is needed from the Hub, and a slow network must not be measured.
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{arguments[0]} ended with {done.returncode}: {done.stderr[-1000:]}")
    return done.stdout


def _round() -> Iterator[tuple[str, float]]:
    """Names and seconds of one process of each kind."""
    for name, beyond in BEYOND.items():
        base, elapsed, cpu, collecting = map(float, _run("-c", PROGRAM.format(base=BASE, beyond=beyond)).split())
        yield BASE_NAME, base
        yield f"{name}, beyond these", elapsed
        yield f"{name}, on the CPU", cpu
        yield f"{name}, collecting garbage", collecting
    start = time.perf_counter()
    _run(*SCRIPT.split())
    yield SCRIPT, time.perf_counter() - start


def measure(repeats: int) -> dict[str, list[float]]:
    """Seconds by name in `repeats` rounds; each round times the base twice."""
    seconds = defaultdict(list)
    for number in tqdm(range(repeats + 1), desc="rounds"):
        for name, value in _round():
            if number:
                seconds[name].append(value)
    return dict(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}: there is nothing to measure; pass 1 or more")
    seconds = measure(args.repeats)
    print("| seconds | median | min | max |\n|---|---|---|---|")
    for name, values in seconds.items():
        print(f"| {name} | {statistics.median(values):.3f} | {min(values):.3f} | {max(values):.3f} |")
    pairs = zip(*(seconds[f"{name}, beyond these"] for name in BEYOND), strict=True)
    differences = [ours - theirs for ours, theirs in pairs]
    median, least, most = statistics.median(differences), min(differences), max(differences)
    print(f"| {' less '.join(BEYOND)} | {median:.3f} | {least:.3f} | {most:.3f} |")


if __name__ == "__main__":
    main()
