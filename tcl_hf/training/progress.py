"""Where a run stands: steps, epochs, and the samples that were skipped."""

import math
from dataclasses import dataclass
from typing import Any

from ..data.skipped import SkippedSamples


@dataclass
class Progress:
    """How far a run has come.

    Args:
        step: optimizer steps that are done.
        epoch: epochs that are done.
        batch: batches of the present epoch that are done, in each process.
        best: the highest value so far of the metric by which the model is kept.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    best: float = -math.inf


class RunState:
    """The state of a run beside model, optimizer and random numbers, for its checkpoints."""

    def __init__(self, progress: Progress, skipped: SkippedSamples):
        self.progress, self.skipped = progress, skipped

    def state_dict(self) -> dict[str, Any]:
        """The progress, and the counts of the first process."""
        return {**vars(self.progress), "samples": self.skipped.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        state = dict(state)
        self.skipped.load_state_dict(state.pop("samples"))
        vars(self.progress).update(state)
