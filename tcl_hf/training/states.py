"""States of a run as files that are opened without executing anything.

A state is what a `state_dict` method returns: dictionaries, lists, tuples, numbers, texts, None and tensors. Its
tensors are written as safetensors, and everything else as JSON into the header of the same file. Reading such a file
makes these types and no others, also of a stranger, whereas to read a pickle is to run it.
"""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

_STATE = "state"  # the entry of the header with everything but tensors
_PLAIN = (bool, int, float, str, type(None))
# What a file that somebody damaged or made may raise while it is read or taken over.
STATE_ERRORS = (
    *(OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, OverflowError),
    *(RecursionError, SafetensorError),
)


def write_state(file: Path, state: Any) -> None:
    """Write a state to a safetensors file; of tensors that are sharded, the part of this process.

    Raises:
        TypeError: if the state holds something else than plain values and tensors.
        OSError, SafetensorError: if the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    described = json.dumps(_described(state, tensors))
    save_file(tensors, file, metadata={_STATE: described, "format": "pt"})


def read_state(file: Path) -> Any:
    """Read a state that `write_state` wrote, with its tensors on the CPU.

    Raises:
        ValueError: naming the file, if it is not one of these.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            names = opened.keys()
            tensors = {name: opened.get_tensor(name).clone() for name in names}  # The file may be removed later.
            return _built(json.loads((opened.metadata() or {})[_STATE]), tensors)
    except STATE_ERRORS as error:
        raise ValueError(f"{file} is not a state that this package wrote ({_in_words(error)})") from error


def _in_words(error: BaseException) -> str:
    """The first line of an error, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _described(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON can hold it; its tensors are put into `tensors`, and the JSON has their names."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = local_part(value.detach()).contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[_described(key, tensors), _described(one, tensors)] for key, one in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_described(one, tensors) for one in value]}
    raise TypeError(f"a state holds {value!r}, of the type {type(value).__name__}")


def _built(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The value that `_described` described."""
    if type(value) in _PLAIN:
        return value
    ((kind, content),) = value.items()
    match kind:
        case "tensor":
            return tensors[content]
        case "dict":
            return {_built(key, tensors): _built(one, tensors) for key, one in content}
        case "list":
            return [_built(one, tensors) for one in content]
        case "tuple":
            return tuple(_built(one, tensors) for one in content)
    raise ValueError(f"there is no kind of value '{kind}'")


def take_over(owner: Any, state: Any) -> None:
    """Set the attributes of an object that its `state_dict` has, to those of a state with the same names and types.

    Raises:
        ValueError: naming the attribute that differs.
    """
    expected = owner.state_dict()
    if not isinstance(state, dict) or state.keys() != expected.keys():
        raise ValueError(f"the state of {type(owner).__name__} does not have {', '.join(expected)}")
    for name, value in expected.items():
        if type(state[name]) is not type(value):
            raise ValueError(f"{name} of {type(owner).__name__} is {state[name]!r}")
    vars(owner).update(state)


# Weights


def local_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds; all of it unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def tensors_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """The parameters and saved buffers of a model by name; one that has several names by its first."""
    by_identity: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        by_identity.setdefault(id(tensor), (name, tensor))
    return dict(by_identity.values())


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors by name to a safetensors file, of sharded ones the part of this process."""
    parts = {name: local_part(tensor.detach()).contiguous() for name, tensor in tensors.items()}
    save_file(parts, file, metadata={"format": "pt"})


@torch.no_grad()
def read_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Fill tensors in place, of sharded ones the part of this process, from a file that has exactly these.

    Raises:
        ValueError: naming the file, if it is damaged, or has tensors with other names or shapes; then nothing changes.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            names = set(opened.keys())
            if names != tensors.keys():
                raise ValueError(f"it lacks or adds {sorted(names ^ tensors.keys())[0]}")
            for name, tensor in tensors.items():
                shape, expected = opened.get_slice(name).get_shape(), list(local_part(tensor).shape)
                if shape != expected:
                    raise ValueError(f"{name} has the shape {shape} and not {expected}")
            for name, tensor in tensors.items():
                local_part(tensor).copy_(opened.get_tensor(name))
    except STATE_ERRORS as error:
        raise ValueError(f"{file} does not fit ({_in_words(error)})") from error


# Optimizer


def restore_optimizer(optimizer: Any, state: Any) -> None:
    """Give an optimizer a state that was written by a process with the same part of the same parameters.

    Raises:
        ValueError: if it has other groups of parameters, or tensors of other shapes.
    """
    sizes = [[len(group["params"]) for group in groups] for groups in (state["param_groups"], optimizer.param_groups)]
    if sizes[0] != sizes[1]:
        raise ValueError("the optimizer has another number or other sizes of parameter groups")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, values in state["state"].items():
        parameter = parameters[number]
        expected = local_part(parameter).shape
        for name, value in values.items():
            if not isinstance(value, Tensor) or (value.ndim and value.shape != expected):
                raise ValueError(f"the optimizer's {name} of parameter {number} does not have the parameter's shape")
            if value.ndim and isinstance(parameter, DTensor):
                values[name] = DTensor.from_local(
                    value.to(parameter.device),
                    parameter.device_mesh,
                    parameter.placements,
                    run_check=False,
                    shape=parameter.shape,
                    stride=parameter.stride(),
                )
    optimizer.load_state_dict(state)


# Random numbers


def random_states(device: torch.device) -> dict[str, Any]:
    """The states of the generators of this process: Python's, NumPy's, PyTorch's, and that of its accelerator."""
    numpy: Any = np.random.get_state(legacy=False)
    key = numpy["state"]["key"].tolist()
    states = {
        "python": random.getstate(),
        "numpy": numpy | {"state": numpy["state"] | {"key": key}},
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device.type).get_rng_state()
    return states


def restore_random_states(states: Any, device: torch.device) -> None:
    """Set all generators of this process.

    Raises:
        ValueError: if a state is missing or is not one; some generators may have been set.
    """
    try:
        random.setstate(states["python"])
        np.random.set_state(states["numpy"])
        torch.set_rng_state(states["torch"])
        if device.type != "cpu":
            torch.get_device_module(device.type).set_rng_state(states[device.type])
    except STATE_ERRORS as error:
        missing = f"it has none of '{error.args[0]}'" if isinstance(error, KeyError) else _in_words(error)
        raise ValueError(f"the states of its random numbers cannot be used ({missing})") from error
