"""The two memories of contrastive pre-training: a slowly moving teacher, and queues of its features."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.utils import logging

from .distributed import gather, whole
from .losses import NO_IMAGE_ID

logger = logging.get_logger(__name__)


class SharedModule(nn.Module):
    """Stands for a module that belongs to another one: it calls it, but has no weights of its own."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.owned_elsewhere = (module,)  # a tuple, so that the module is not registered here too

    def forward(self, *args, **kwargs) -> Any:
        return self.owned_elsewhere[0](*args, **kwargs)


class MomentumTeacher(nn.Module):
    """Frozen copies of student modules that follow them as an exponential moving average.

    The copies have the students' names: `MomentumTeacher(encoder=student.encoder).encoder`. They are in train mode
    whenever the student is, so that their dropout masks differ from the student's: for texts this is the second view of
    IMC. Parts that never change are not copied, but shared with the student.

    Args:
        shared: full names of the students' modules that are shared.
        students: the modules to copy, by name.
    """

    tcl: Any
    lm_head: Any
    cls_head: Any
    text_decoder: Any

    def __init__(self, shared: Iterable[str] = (), **students: nn.Module):
        super().__init__()
        given = nn.ModuleDict(students)
        memo: dict[int, Any] = {}
        for name in shared:  # A module that `deepcopy` finds in its memo is not copied.
            module = given.get_submodule(name)
            memo[id(module)] = SharedModule(module)
        for name, student in students.items():
            self.add_module(name, copy.deepcopy(student, memo))
        self.requires_grad_(False)

    def parameters_and_targets(self, student: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """The teacher's own parameters, and the student's of the same names, in the same order."""
        targets = weights_of(student)
        pairs = [(parameter, targets[name]) for name, parameter in self.named_parameters()]
        pairs = [(parameter, target) for parameter, target in pairs if parameter is not target]
        return [parameter for parameter, _ in pairs], [target for _, target in pairs]

    @torch.no_grad()
    def copy_from(self, student: nn.Module) -> None:
        """Make every parameter equal to that of the same name in `student`."""
        torch._foreach_copy_(*self.parameters_and_targets(student))

    @contextmanager
    def lending_weights_to(self, student: nn.Module) -> Iterator[None]:
        """Give `student` the teacher's weights, in place, for the duration of a `with` block.

        Parts that have no copy in the teacher keep their weights. Within the block, the student's own weights take
        memory once more. Under FSDP2 every process has to enter and leave it.
        """
        parameters, targets = self.parameters_and_targets(student)
        own = [target.detach().clone() for target in targets]
        _overwrite(targets, parameters)
        try:
            yield
        finally:
            _overwrite(targets, own)

    @torch.no_grad()
    def resize_to(self, student: nn.Module) -> None:
        """Take the sizes of a student whose parameters have more or fewer rows. Rows that the teacher has are kept, and
        new ones are the student's."""
        for module_name, module in self.named_modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                target = student.get_parameter(f"{module_name}.{name}")
                if parameter.shape != target.shape:
                    resized = target.detach().clone()
                    rows = min(len(parameter), len(target))
                    resized[:rows] = parameter[:rows]
                    setattr(module, name, nn.Parameter(resized, requires_grad=False))
            for size in ("num_embeddings", "out_features"):
                if hasattr(module, size):
                    setattr(module, size, len(module.weight))

    @torch.no_grad()
    def update(self, student: nn.Module, momentum: float) -> None:
        """Move every parameter in place: `momentum * teacher + (1 - momentum) * student`.

        PEFT's adapters of the student are followed as the weights that they amount to.

        Raises:
            ValueError: if the teacher has adapters, because an average of their factors is not that of the weights.
        """
        if any(hasattr(module, "get_base_layer") for module in self.modules()):
            raise ValueError(
                "The momentum teacher has adapters, but it follows the student's weights, adapters included: leave it "
                r"out with exclude_modules=r'teacher\..*' in the config of the adapters."
            )
        parameters, targets = self.parameters_and_targets(student)
        torch._foreach_lerp_(parameters, targets, 1 - momentum)
        if parameters[0].dtype in (torch.float16, torch.bfloat16):
            logger.warning_once(
                f"The momentum teacher is {parameters[0].dtype}, too coarse for its small steps: it stands still. Load "
                "the model in float32 and train under bf16 autocast."
            )

    @torch.no_grad()
    def distance_to(self, student: nn.Module) -> Tensor:
        """Norm of the difference between teacher and student, relative to the norm of the student; a scalar."""
        parameters, targets = self.parameters_and_targets(student)
        differences = torch._foreach_sub(parameters, targets)
        distance, norm = (whole(nn.utils.get_total_norm(tensors)) for tensors in (differences, targets))
        return distance / norm


@torch.no_grad()
def _overwrite(targets: list[Tensor], values: list[Tensor]) -> None:
    """Copy values into tensors, one by one, because torch cannot copy lists of sharded tensors."""
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters by name. A layer with PEFT's adapters also has, by its former names, the weights they amount to."""
    weights: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    for name, layer in module.named_modules():
        if hasattr(layer, "get_base_layer"):
            weights |= {f"{name}.{part}": weight for part, weight in _merged_weights(layer).items()}
    return weights


def _merged_weights(layer: Any) -> dict[str, Tensor]:
    """The parameters that a layer with PEFT's adapters amounts to; the layer stays as it is."""
    base = layer.get_base_layer()
    weights: dict[str, Tensor] = dict(base.named_parameters())
    is_plain_lora = hasattr(layer, "lora_variant") and not layer.lora_variant and not any(layer.lora_bias.values())
    if is_plain_lora and isinstance(base, nn.Linear):
        for name in layer.active_adapters:
            if name in layer.lora_A and name not in layer.merged_adapters:
                a, b = (factors[name].weight.to(base.weight.dtype) for factors in (layer.lora_A, layer.lora_B))
                weights["weight"] = torch.addmm(weights["weight"], b, a, alpha=layer.scaling[name])
        return weights
    merged = copy.deepcopy(layer)  # a copy, because adapters are merged in place
    merged.merge()
    return dict(merged.get_base_layer().named_parameters())


class FeatureQueue(nn.Module):
    """The teacher's most recent features of both modalities: a ring that accepts any batch size.

    Rows start as random unit vectors, without image ids. `cursor` is the row that the next push overwrites.

    Args:
        size: rows kept (Q); 0 for a queue that keeps nothing.
        dim: feature dimensions (D).
    """

    image: Tensor
    text: Tensor
    ids: Tensor
    cursor: Tensor

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.register_buffer("image", torch.empty(size, dim))  # (Q, D)
        self.register_buffer("text", torch.empty(size, dim))  # (Q, D)
        self.register_buffer("ids", torch.empty(size, dtype=torch.long))  # (Q,)
        self.register_buffer("cursor", torch.empty(1, dtype=torch.long))
        self.reset()

    def reset(self) -> None:
        """Draw new features and forget the ids, except in buffers that were read from a checkpoint."""
        for features in (self.image, self.text):
            if not getattr(features, "_is_hf_initialized", False):
                init.copy_(features, F.normalize(torch.randn_like(features), dim=-1))
        init.constant_(self.ids, NO_IMAGE_ID)
        init.zeros_(self.cursor)

    @torch.no_grad()
    def push(self, image: Tensor, text: Tensor, image_ids: Tensor | None = None) -> None:
        """Overwrite the oldest rows with features (N, D) of both modalities, and their image ids (N,).

        The features of all processes are pushed, in the order of ranks, so that every process has the same queue; every
        process must push the same number. If they are more than the queue holds, the last rows are kept. A row with a
        non-finite feature is skipped: the old one remains in its place.
        """
        size = len(self.image)
        if size == 0:
            return
        if image_ids is None:
            image_ids = torch.full((len(image),), NO_IMAGE_ID, device=image.device)
        image, text, image_ids = gather(image), gather(text), gather(image_ids)
        num_pushed = len(image)
        image, text, image_ids = image[-size:], text[-size:], image_ids[-size:]
        first = self.cursor + num_pushed - len(image)
        rows = (first + torch.arange(len(image), device=image.device)) % size
        finite = (image.isfinite() & text.isfinite()).all(-1)
        self.image.index_copy_(0, rows, torch.where(finite[:, None], image.to(self.image.dtype), self.image[rows]))
        self.text.index_copy_(0, rows, torch.where(finite[:, None], text.to(self.text.dtype), self.text[rows]))
        self.ids.index_copy_(0, rows, torch.where(finite, image_ids, self.ids[rows]))
        self.cursor.add_(num_pushed).remainder_(size)

    @torch.no_grad()
    def spread(self) -> Tensor:
        """1 minus the norm of the mean feature, for the modality where it is less; a scalar, 0 if all are equal."""
        image, text = (1 - features.float().mean(0).norm() for features in (self.image, self.text))
        return torch.minimum(image, text)
