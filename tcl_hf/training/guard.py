"""The guard against updates that are not finite."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ..models.distributed import is_distributed


class NonFiniteError(FloatingPointError):
    """A loss or gradient was not finite; the weights are those before that step."""


class UpdateGuard:
    """Masks updates with a non-finite loss or gradient in any process, on the device, and remembers the first."""

    def __init__(self, device: torch.device):
        self.finite = torch.ones((), dtype=torch.bool, device=device)  # all forwards of this optimizer step
        self.first = torch.full((2,), -1.0, device=device)  # its step and its loss

    def watch(self, optimizer, step: int, loss: Tensor, norm: Tensor | None) -> None:
        """Note a forward; `norm` is the gradient's, of the last forward before an update."""
        loss = loss.detach()
        # With fp16 a gradient may overflow: its scaler masks the update by itself and lowers the scale.
        scaled = getattr(optimizer, "scaler", None) is not None
        self.finite = self.finite & loss.isfinite()
        if norm is not None and not scaled:
            self.finite = self.finite & norm.isfinite()
        if norm is not None and is_distributed():  # where one masks its update, all do: they would part ways
            finite = self.finite.float()
            dist.all_reduce(finite, dist.ReduceOp.MIN)
            self.finite = finite > 0
        bad = torch.stack([torch.full_like(loss, step, dtype=torch.float32), loss.float()])
        self.first = torch.where((self.first[0] < 0) & ~self.finite, bad, self.first)
        if norm is not None:
            inner = getattr(optimizer, "optimizer", optimizer)
            if not scaled:
                inner.found_inf = (~self.finite).float()
            self.finite = torch.ones_like(self.finite)

    def check(self, checkpoint: Path | None) -> None:
        """Read the flag.

        Raises:
            NonFiniteError: if an update was masked.
        """
        step, loss = self.first.tolist()
        if step >= 0:
            raise NonFiniteError(
                f"Step {int(step) + 1}: the loss was {loss:g} or its gradient was not finite, here or in another "
                "process. No such update reached the weights. "
                f"Last good checkpoint: {checkpoint or 'none was saved (see save_steps)'}. "
                "Lower the learning rate, clip the gradient (max_grad_norm) or look at the data of that step."
            )
