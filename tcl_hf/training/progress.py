"""Where a run stands: steps, epochs, and the samples that were skipped."""

import math
from dataclasses import dataclass
from typing import Any

from ..data.skipped import SkippedSamples
from .states import take_over


@dataclass
class Progress:
    """How far a run has come: its state beside model, optimizer and random numbers, for its checkpoints.

    Args:
        skipped: the samples that were skipped, of which a checkpoint has the counts of the first process.
        step: optimizer steps that are done.
        epoch: epochs that are done.
        batch: batches of the present epoch that are done, in each process.
        best: the highest value so far of the metric by which the model is kept.
        evaluation_due: whether the model of this step is still to be evaluated, because an evaluation was stopped.
    """

    skipped: SkippedSamples
    step: int = 0
    epoch: int = 0
    batch: int = 0
    best: float = -math.inf
    evaluation_due: bool = False

    def state_dict(self) -> dict[str, Any]:
        """The numbers, and under `samples` the counts of samples."""
        numbers = {name: value for name, value in vars(self).items() if name != "skipped"}
        return numbers | {"samples": self.skipped.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: if a number is missing or is not one.
        """
        take_over(self, state)
        self.skipped.load_state_dict(vars(self).pop("samples"))
