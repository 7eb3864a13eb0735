"""Training on kept states against the same training from pixels, and the memory of locked towers.

`python benchmarks/kept_states.py --recipe flickr8k_small --data FOLDER --vision_model FOLDER --text_model FOLDER`: all
arguments but `--steps` and `--repeats` are those of `scripts/pretrain.py`. Both ways train in turn, on an otherwise
idle machine, after the states were made once. The bytes of weights, gradients, AdamW and teacher are counted for the
recipe's model as it is, with both towers locked, and with none.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tcl_hf.models.configuration_tcl import TCLConfig
from tcl_hf.training.operations import empty_model

ROOT = Path(__file__).resolve().parents[1]
WAYS = {"kept states": [], "pixels": ["--kept_views", "0", "--plain_view", "false"]}
FLOAT = 4


def train(arguments: list[str], steps: int, folder: str) -> float:
    """Train for a number of steps, and return the median of the pairs per second in the log, without the first line."""
    command = [sys.executable, str(ROOT / "scripts/pretrain.py"), *arguments, "--output_dir", folder]
    command += ["--validation_split", "", "--max_steps", str(steps), "--logging_steps", str(max(steps // 4, 1))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["pairs_per_second"] for line in lines[1:])


def bytes_of(config: TCLConfig) -> dict[str, int]:
    """Bytes of weights, gradients, AdamW's two moments and teacher, in float32."""
    model = empty_model(config)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    student = {id(p): p.numel() for name, p in model.named_parameters() if not name.startswith("teacher.")}
    teacher = sum(p.numel() for p in model.teacher.parameters() if id(p) not in student)
    return {
        "weights": FLOAT * sum(student.values()),
        "gradients": FLOAT * trained,
        "AdamW": 2 * FLOAT * trained,
        "teacher": FLOAT * teacher,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    args, arguments = parser.parse_known_args()
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        train([*arguments], 2, f"{folder}/first")  # makes the states
        for repeat in range(args.repeats):
            for way, options in WAYS.items():
                found[way].append(train([*arguments, *options], args.steps, f"{folder}/{way}-{repeat}"))
        config = TCLConfig.from_pretrained(f"{folder}/first").to_dict()
    print("| | pairs/s (median) | least | most |\n|---|---|---|---|")
    for way, values in found.items():
        print(f"| {way} | {statistics.median(values):.1f} | {min(values):.1f} | {max(values):.1f} |")
    ratios = [one / other for one, other in zip(found["kept states"], found["pixels"], strict=True)]
    print(
        f"\nKept states are {statistics.median(ratios):.1f} times as fast ({min(ratios):.1f} to {max(ratios):.1f}).\n"
    )
    print("| towers locked | weights | gradients | AdamW | teacher | together | share |\n|---|---|---|---|---|---|---|")
    whole = 0
    for name, locks in {
        "none": {"lock_vision": False, "lock_text": False},
        "the recipe's": {},
        "both": {"lock_vision": True, "lock_text": True},
    }.items():
        sizes = bytes_of(TCLConfig.from_dict(config | locks))
        whole = whole or sum(sizes.values())
        cells = " | ".join(f"{size / 1e6:.0f} MB" for size in [*sizes.values(), sum(sizes.values())])
        print(f"| {name} | {cells} | {sum(sizes.values()) / whole:.2f} |")


if __name__ == "__main__":
    main()
