"""How processes agree on what to do next."""

from typing import Any

import torch
import torch.distributed as dist

from ..models.distributed import is_distributed


class Agreement:
    """Lets processes agree on what to do next, over CPUs: nothing waits for a GPU."""

    def __init__(self):
        self.rank: int = dist.get_rank() if is_distributed() else 0
        self.world_size: int = dist.get_world_size() if is_distributed() else 1
        self.group = dist.new_group(backend="gloo") if self.world_size > 1 else None

    def any(self, flag: bool) -> bool:
        """Whether it holds in any process; all of them ask together."""
        return bool(self._reduced(int(flag), dist.ReduceOp.MAX))

    def least(self, number: int) -> int:
        """The smallest of all processes' numbers; all of them ask together."""
        return self._reduced(number, dist.ReduceOp.MIN)

    def _reduced(self, number: int, operation: Any) -> int:
        if self.group is None:
            return number
        numbers = torch.tensor(number)
        dist.all_reduce(numbers, operation, group=self.group)
        return int(numbers)
