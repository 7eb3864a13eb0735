"""How long a checkpoint of the base model stops training, compared with writing as many bytes to the same disk.

`python benchmarks/checkpoint.py [--folder FOLDER] [--repeats 5]`: the paper's model with its teacher, queues and
AdamW's states, on the CPU. In turn, random bytes are written in large blocks and flushed to the disk, and a checkpoint
is saved as training saves it: written, hashed, flushed and renamed. Training removes the previous checkpoint in the
background; the benchmark waits for this outside the measurement.
"""

import argparse
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from tqdm.auto import trange

from tcl_hf import TCLConfig, TCLForPreTraining
from tcl_hf.training.arguments import TCLTrainingArguments
from tcl_hf.training.checkpoints import save_checkpoint
from tcl_hf.training.engine import Engine

BLOCK = 2**26


def write_raw(path: Path, num_bytes: int) -> float:
    """Write random bytes and flush them to the disk, and return the seconds."""
    block = memoryview(os.urandom(min(BLOCK, num_bytes)))
    os.sync()
    start = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for done in range(0, num_bytes, BLOCK):
            file.write(block[: num_bytes - done])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds


def base_model() -> Engine:
    """The engine of a run of the paper's model after a step, as training holds it."""
    engine = Engine(TCLTrainingArguments())
    model = TCLForPreTraining(TCLConfig())
    engine.prepare(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    engine.optimizer.step()
    engine.optimizer.zero_grad()
    return engine


def main() -> None:
    """Write both in turn, and print the ratios of their times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="folder on the disk to measure, in which a temporary folder is made")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    engine = base_model()
    raw, blocked = [], []
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)

        def save(step: int) -> Path:
            write = partial(engine.save_state, states={})
            return save_checkpoint(engine.accelerator, folder, step, 1, engine.agreement, write)

        num_bytes = sum(path.stat().st_size for path in save(0).iterdir())
        for step in trange(1, args.repeats + 1, desc="Writing"):
            raw.append(write_raw(folder / "raw", num_bytes))
            os.sync()
            start = time.perf_counter()
            save(step)
            blocked.append(time.perf_counter() - start)
            while any(folder.rglob("*.tmp")):
                time.sleep(0.1)
    ratios = [one / other for one, other in zip(blocked, raw, strict=True)]
    print(f"{num_bytes / 1e9:.2f} GB, {args.repeats} rounds\n| | median | least | most |\n|---|---|---|---|")
    for title, values in (("raw, s", raw), ("checkpoint, s", blocked), ("ratio in a round", ratios)):
        print(f"| {title} | {statistics.median(values):.2f} | {min(values):.2f} | {max(values):.2f} |")


if __name__ == "__main__":
    main()
