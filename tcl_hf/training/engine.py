"""What torch's FSDP2 needs to shard a model with its teacher: `fully_shard` alone refuses or breaks it.

A sharded model holds a slice of every weight, of the teacher's as of the student's, and gathers a layer's weights while
that layer is called. Queues are buffers: each process holds them whole, and pushes the same rows.
"""

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from ..models.encoders import TCLTextLayer, TCLVisionLayer

SHARDED_LAYERS = (TCLVisionLayer, TCLTextLayer)
_SCALARS = ("temperature",)


def shard(model: nn.Module, mesh: DeviceMesh | None = None) -> nn.Module:
    """Shard a model in place over the processes of `mesh`, all of them if None, and return it.

    Every layer is a unit; what lies outside layers is one more. Build the optimizer afterwards. Accelerate shards by
    itself: it needs `make_shardable` before and `gather_for_methods` after.
    """
    make_shardable(model)
    for module in model.modules():
        if isinstance(module, SHARDED_LAYERS):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    gather_for_methods(model)
    return model


def make_shardable(model: nn.Module) -> None:
    """Give scalar parameters, which can not be sharded, one dimension; an optimizer that holds them keeps them."""
    for parameter in model.parameters():
        if parameter.ndim == 0:
            parameter.data = parameter.data[None]


def gather_for_methods(model: nn.Module) -> None:
    """Let the layers of a sharded model gather their weights also where keys and values of images are made."""
    for module in model.modules():
        if isinstance(module, TCLTextLayer):
            register_fsdp_forward_method(module, "project_image")


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; every process has to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state of a sharded model as if it were not, for `save_pretrained(..., state_dict=...)`.

    Every process has to ask for it. The first gets it all, in the memory of its CPU, and the others nothing.
    """
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name: _as_saved(name, value) for name, value in state.items()}


@torch.no_grad()
def whole_model(model: nn.Module) -> nn.Module:
    """A copy of a sharded model that is not, on every process, as evaluation needs it: it calls parts in any order.

    Every process has to ask for it. A model that is not sharded is returned as it is.
    """
    if not isinstance(model, FSDPModule):
        return model
    model_class = next(base for base in type(model).__mro__ if not issubclass(base, FSDPModule))
    with torch.device("meta"):
        copy = model_class(model.config)
    copy.load_state_dict({name: _as_saved(name, whole(x)) for name, x in model.state_dict().items()}, assign=True)
    copy.tie_weights()
    return copy.train(model.training)


def _as_saved(name: str, value: Tensor) -> Tensor:
    return value.squeeze(0) if name.rpartition(".")[2] in _SCALARS else value
