"""The two memories of contrastive pre-training: a slowly moving teacher, and queues of its features."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from .distributed import gather
from .losses import NO_IMAGE_ID


class MomentumTeacher(nn.Module):
    """Frozen copies of student modules that follow them as an exponential moving average.

    The copies carry the students' names: `MomentumTeacher(encoder=student.encoder).encoder`. They stay in train
    mode with the student, so that their dropout masks differ from the student's: for texts this is the second
    view of IMC.
    """

    def __init__(self, **students: nn.Module):
        super().__init__()
        for name, student in students.items():
            self.add_module(name, copy.deepcopy(student))
        self.requires_grad_(False)

    def _pairs(self, student: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """Own parameters, and the student's of the same names; a parameter we do not hold is not followed."""
        students = weights_of(student)
        own = dict(self.named_parameters())
        return list(own.values()), [students[name] for name in own]

    @torch.no_grad()
    def copy_from(self, student: nn.Module) -> None:
        """Make every parameter equal to that of the same name in `student`."""
        torch._foreach_copy_(*self._pairs(student))

    @torch.no_grad()
    def resize_to(self, student: nn.Module) -> None:
        """Follow a student whose parameters have more or fewer rows: keep the own ones, take new from the student."""
        for module_name, module in self.named_modules():
            for name, own in list(module.named_parameters(recurse=False)):
                path = f"{module_name}.{name}"
                target = student.get_parameter(path)
                if own.shape != target.shape:
                    resized = target.detach().clone()
                    rows = min(len(own), len(target))
                    resized[:rows] = own[:rows]
                    setattr(module, name, nn.Parameter(resized, requires_grad=False))
            for size in ("num_embeddings", "out_features"):
                if hasattr(module, size):
                    setattr(module, size, len(module.weight))

    @torch.no_grad()
    def update(self, student: nn.Module, momentum: float) -> None:
        """Move every parameter in place: `momentum * teacher + (1 - momentum) * student`.

        Adapters of PEFT on the student count as the weights they amount to.

        Raises:
            ValueError: if there are adapters on the teacher: an average of their factors is not that of the weights.
        """
        if any(hasattr(module, "get_base_layer") for module in self.modules()):
            raise ValueError(
                "The momentum teacher has adapters of its own, but follows the student's weights with theirs: leave it "
                r"out with exclude_modules=r'teacher\..*' in the config of the adapters."
            )
        teacher, students = self._pairs(student)
        torch._foreach_lerp_(teacher, students, 1 - momentum)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters by name; a layer with adapters of PEFT also has, by its former names, the weights they amount to."""
    weights = dict(module.named_parameters(remove_duplicate=False))
    for name, layer in module.named_modules():
        if hasattr(layer, "get_base_layer"):
            merged = copy.deepcopy(layer)  # each kind of adapter knows how to merge, and does so in place
            merged.merge()
            weights |= {f"{name}.{own}": weight for own, weight in merged.get_base_layer().named_parameters()}
    return weights


class FeatureQueue(nn.Module):
    """The teacher's most recent features of both modalities: a ring that accepts any batch size.

    Rows start as random unit vectors, without image ids. `cursor` is the row that the next push overwrites.

    Args:
        size: rows kept (Q); 0 for a queue that keeps nothing.
        dim: feature dimensions (D).
    """

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.register_buffer("image", torch.empty(size, dim))  # (Q, D)
        self.register_buffer("text", torch.empty(size, dim))  # (Q, D)
        self.register_buffer("ids", torch.empty(size, dtype=torch.long))  # (Q,)
        self.register_buffer("cursor", torch.empty(1, dtype=torch.long))
        self.reset()

    def reset(self) -> None:
        """Fill the queue anew, except for buffers that were read from a checkpoint."""
        for features in (self.image, self.text):
            if not getattr(features, "_is_hf_initialized", False):
                init.copy_(features, F.normalize(torch.randn_like(features), dim=-1))
        init.constant_(self.ids, NO_IMAGE_ID)
        init.zeros_(self.cursor)

    @torch.no_grad()
    def push(self, image: Tensor, text: Tensor, image_ids: Tensor | None = None) -> None:
        """Overwrite the oldest rows with features (N, D) of both modalities, and their image ids (N,).

        The features of all processes are pushed, in the order of ranks, so that every process holds the same
        queue; each must bring the same number. Of a batch larger than the queue the last rows stay. A row with
        a non-finite feature is skipped: the old one remains in its place.
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
