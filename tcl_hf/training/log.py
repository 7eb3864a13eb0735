"""The log of a run: `metrics.jsonl`, trackers, and the means between two of its lines."""

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from .health import batch_statistics

METRICS = "metrics.jsonl"
_LOSSES = ("loss", "loss_cma", "loss_imc", "loss_lmi", "loss_itm", "loss_mlm")


class MetricsLog:
    """`metrics.jsonl`, and the trackers: one line at a time; a resumed run first drops the lines beyond its step."""

    def __init__(self, path: Path, step: int, accelerator: Accelerator):
        self.path, self.accelerator = path, accelerator
        if accelerator.is_main_process:
            kept = [line for line in read_metrics(path) if line["step"] <= step] if step else []
            path.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def write(self, line: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        self.accelerator.log({k: v for k, v in line.items() if k != "step"}, step=int(line["step"]))


def read_metrics(path: str | os.PathLike) -> list[dict[str, float]]:
    """The lines of a `metrics.jsonl`; none if it is not there."""
    path = Path(path)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Meter:
    """Sums losses on the device between two lines of the log; part of every checkpoint, which may come between."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.forwards = self.pairs = 0
        self.seconds = 0.0
        self.norms: list[Tensor] = []
        self.clock = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("sums", "forwards", "pairs", "seconds", "norms")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def restart_clock(self) -> None:
        """Leave out the time since the last forward."""
        self.clock = time.perf_counter()

    def add(self, output, num_pairs: int, norm: Tensor | None) -> None:
        losses = {name: loss for name in _LOSSES if (loss := getattr(output, name, None)) is not None}
        for name, value in (losses | batch_statistics(output)).items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        if norm is not None:
            self.norms.append(norm.detach())
        self.forwards += 1
        self.pairs += num_pairs
        now = time.perf_counter()
        self.seconds += now - self.clock
        self.clock = now

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over the forwards since the last reading, over all processes, and pairs per second."""
        sums = torch.stack([*self.sums.values()]) / self.forwards
        means = accelerator.reduce(sums, "mean").tolist()
        line = dict(zip(self.sums, means, strict=True))
        if self.norms:
            line["gradient_norm"] = torch.stack(self.norms).mean().item()
        line["pairs_per_second"] = self.pairs / max(self.seconds, 1e-9)
        self.restart()
        return line
