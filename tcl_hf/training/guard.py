"""The guard against updates that are not finite."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..models.distributed import is_distributed


class NonFiniteError(FloatingPointError):
    """A loss or gradient was not finite; the weights are those from before that step."""


class UpdateGuard:
    """Masks updates with a loss or gradient that is not finite in any process, and remembers the first of them.

    All of this happens on the device; the flag is read at the lines of the log and before anything is saved.
    """

    def __init__(self, device: torch.device):
        self.finite = torch.ones((), dtype=torch.bool, device=device)  # in all forwards of this optimizer step
        self.first = torch.full((2,), -1.0, device=device)  # step and loss of the first masked update; -1 for none

    def watch(self, optimizer: Any, step: int, loss: Tensor, gradient_norm: Tensor | None) -> None:
        """Note a forward, and mask the update if it is the last one of its optimizer step and any was not finite.

        Args:
            optimizer: the optimizer, perhaps wrapped by Accelerate.
            step: optimizer steps done before.
            loss: the loss of the forward, a scalar.
            gradient_norm: a scalar; None before the last forward of an optimizer step.
        """
        loss = loss.detach()
        # With fp16 a gradient may overflow: its scaler masks the update by itself and lowers the scale.
        is_scaled = getattr(optimizer, "scaler", None) is not None
        self.finite = self.finite & loss.isfinite()
        if gradient_norm is not None and not is_scaled:
            self.finite = self.finite & gradient_norm.isfinite()
        if gradient_norm is not None and is_distributed():
            # All processes mask the update if one does, because their weights would differ from then on.
            finite = self.finite.float()
            dist.all_reduce(finite, dist.ReduceOp.MIN)
            self.finite = finite > 0
        bad = torch.stack([torch.full_like(loss, step, dtype=torch.float32), loss.float()])
        self.first = torch.where((self.first[0] < 0) & ~self.finite, bad, self.first)
        if gradient_norm is not None:
            if not is_scaled:
                getattr(optimizer, "optimizer", optimizer).found_inf = (~self.finite).float()
            self.finite = torch.ones_like(self.finite)

    def check(self, checkpoint: Path | None) -> None:
        """Read the flag from the device.

        Args:
            checkpoint: the last good checkpoint, for the message.

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
