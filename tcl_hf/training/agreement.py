"""How the processes of a run agree on what to do next."""

from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from ..models.distributed import is_distributed


def processes() -> PartialState:
    """The processes that the launcher has started.

    Called alone, `PartialState()` leaves it to Accelerate's other classes to see that they run on CPUs, and takes each
    process for the only one.
    """
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


class Agreement:
    """Lets processes agree by collective calls over their CPUs, so that nothing waits for a GPU."""

    def __init__(self):
        self.group: Any = dist.new_group(backend="gloo") if is_distributed() else None

    def any(self, flag: bool) -> bool:
        """Whether the flag is true in any process; all processes have to ask together."""
        return bool(self._reduced(int(flag), dist.ReduceOp.MAX))

    def least(self, number: int) -> int:
        """The smallest number of any process; all processes have to ask together."""
        return self._reduced(number, dist.ReduceOp.MIN)

    def _reduced(self, number: int, operation: Any) -> int:
        if self.group is None:
            return number
        numbers = torch.tensor(number)
        dist.all_reduce(numbers, operation, group=self.group)
        return int(numbers)
