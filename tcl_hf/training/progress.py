"""Where a run stands."""

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Progress:
    """Where a run stands; part of every checkpoint."""

    step: int = 0  # optimizer steps done
    epoch: int = 0
    batch: int = 0  # batches of this epoch done, per process
    best: float = -math.inf  # of the metric by which the model is kept
    samples: dict[str, int] = field(default_factory=dict)  # seen and skipped by the first process

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
