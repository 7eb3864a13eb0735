"""Tensors of all processes, gathered so that each process's own rows come first; and tensors that are sharded."""

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that FSDP2 may have sharded; every process has to ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gather_own_first(tensor: Tensor) -> Tensor:
    """As `gather`, in the order of ranks from the process's own rank on, so that its own rows come first."""
    return gather(tensor).roll(-dist.get_rank() * len(tensor), 0) if is_distributed() else tensor


def gather_padded(tensor: Tensor, with_gradient: bool = False) -> Tensor:
    """As `gather_own_first`, for tensors (N, L, ...) whose L may differ: shorter ones are padded with zeros.

    Args:
        with_gradient: let the gradients that other processes compute for the rows of this one flow back to it.
    """
    if not is_distributed():
        return tensor
    longest = torch.tensor(tensor.shape[1], device=tensor.device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    padding = tensor.new_zeros(len(tensor), int(longest) - tensor.shape[1], *tensor.shape[2:])
    tensor = torch.cat([tensor, padding], dim=1)
    return _GatherWithGradient.apply(tensor) if with_gradient else gather_own_first(tensor)


class _GatherWithGradient(torch.autograd.Function):
    """`gather_own_first`; a row's gradient is the sum of all processes' gradients of it."""

    @staticmethod
    def forward(context, tensor: Tensor) -> Tensor:
        context.num_rows = len(tensor)
        return gather_own_first(tensor)

    @staticmethod
    def backward(context, gradient: Tensor) -> Tensor:
        first = dist.get_rank() * context.num_rows
        in_order = gradient.roll(first, 0).contiguous()  # in the order of ranks
        dist.all_reduce(in_order)
        return in_order[first : first + context.num_rows]


def gather(tensor: Tensor) -> Tensor:
    """Concatenate a tensor (N, ...) of all processes in the order of ranks, without gradient.

    In a single process, the tensor is returned as it is.
    """
    if not is_distributed():
        return tensor
    tensor = tensor.contiguous()
    gathered = tensor.new_empty(dist.get_world_size() * len(tensor), *tensor.shape[1:])
    dist.all_gather_into_tensor(gathered, tensor)
    return gathered
