"""The log of a run: `metrics.jsonl`, trackers, and the means between two of its lines."""

import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..models.whole_files import replace_file
from .health import batch_statistics
from .states import take_over

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"


class MetricsLog:
    """`metrics.jsonl` and the trackers, one line at a time.

    Args:
        path: the file.
        step: where the run begins; lines beyond it, which a resumed run will write again, are dropped.
    """

    def __init__(self, path: Path, step: int, accelerator: Accelerator):
        self.path, self.accelerator = path, accelerator
        if accelerator.is_main_process:
            kept = [line for line in read_metrics(path) if line["step"] <= step] if step else []
            replace_file(path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, line: dict[str, float]) -> None:
        """Append a line, which has a `step`, by the main process."""
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")  # It reaches the file in one piece, when it is closed.
        self.accelerator.log({name: value for name, value in line.items() if name != "step"}, step=int(line["step"]))


def read_metrics(path: str | os.PathLike) -> list[dict[str, float]]:
    """The lines of a `metrics.jsonl`; an empty list if the file does not exist.

    Lines that were cut, by a full disk or a lost machine, or that are not of a log are passed over with a warning.
    """
    path = Path(path)
    lines, damaged = [], []
    for number, text in enumerate(path.read_bytes().splitlines() if path.is_file() else [], 1):
        line = _line_of(text)
        if line is None:
            damaged.append(number)
        else:
            lines.append(line)
    if damaged:
        logger.warning("%s: %d damaged lines are passed over, the first is line %d.", path, len(damaged), damaged[0])
    return lines


def _line_of(text: bytes) -> dict[str, float] | None:
    """A line of the log: numbers by name, a whole `step` among them; None if it is not one."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    is_line = isinstance(line, dict) and type(line.get("step")) is int
    return line if is_line and all(type(value) in (int, float) for value in line.values()) else None


class Meter:
    """Sums losses on the device between two lines of the log.

    A checkpoint may be written between two lines, and so holds these sums.
    """

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        """Forget all sums."""
        self.sums: dict[str, Tensor] = {}
        self.forwards = self.pairs = 0
        self.seconds = 0.0
        self.norms: list[Tensor] = []
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out the time since the last forward."""
        self.clock = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """All but the clock."""
        return {name: getattr(self, name) for name in ("sums", "forwards", "pairs", "seconds", "norms")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over sums.

        Raises:
            ValueError: if they are not those of a meter.
        """
        take_over(self, state)
        for value in (*self.sums.values(), *self.norms):
            if not isinstance(value, Tensor) or value.ndim:
                raise ValueError(f"a sum of Meter is {value!r}")

    def add(self, output: Any, loss_names: Sequence[str], num_pairs: int, gradient_norm: Tensor | None) -> None:
        """Add a forward.

        Args:
            output: the model's output.
            loss_names: the losses that it may have, as scalars.
            num_pairs: texts in the batches of all processes.
            gradient_norm: a scalar; None before the last forward of an optimizer step.
        """
        losses = {name: loss for name in loss_names if (loss := getattr(output, name, None)) is not None}
        for name, value in (losses | batch_statistics(output)).items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        if gradient_norm is not None:
            self.norms.append(gradient_norm.detach())
        self.forwards += 1
        self.pairs += num_pairs
        self.seconds += time.perf_counter() - self.clock
        self.restart_clock()

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
