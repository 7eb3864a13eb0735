"""Operations, bytes and activations of a pre-training step by part, counted while the step runs on fake tensors.

Fake tensors have shapes but no content, so that a step of any size runs within seconds and needs no memory.

A matrix product counts as `2 * rows * inner * columns` operations, as in `torch.utils.flop_counter`; elementwise work
counts as none. Bytes are the least that must move: a product reads its operands once and writes its result once, and
the elementwise work between two products happens on the way. Attention is one kernel that reads queries, keys and
values and writes its output, so that its scores never leave the chip. Its backward pass counts as two forward passes,
without the scores that a fused kernel computes again.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count
from transformers.modeling_layers import GradientCheckpointingLayer

from ..data.kept_states import DTYPE as STATES_DTYPE
from ..models.attention import TCLAttention
from ..models.configuration_tcl import TCLConfig
from ..models.modeling_tcl import TCLForPreTraining

FLOAT = 4  # bytes of a float32
LOSSES = "losses"


@dataclass(frozen=True)
class Work:
    """The least that a part of a step computes and moves.

    Args:
        forward, backward: floating-point operations of its matrix products.
        bytes: bytes read and written, forward and backward together.
    """

    forward: int = 0
    backward: int = 0
    bytes: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.forward + other.forward, self.backward + other.backward, self.bytes + other.bytes)

    @property
    def flops(self) -> int:
        """Operations of forward and backward."""
        return self.forward + self.backward

    @property
    def intensity(self) -> float:
        """Operations per byte; 0 where nothing moves."""
        return self.flops / self.bytes if self.bytes else 0.0


@dataclass
class Step:
    """Counts of one training step of one process.

    Args:
        num_masked: masked tokens of each text.
        work: operations and bytes by part, without the parts that compute no product.
        activations_by_part: bytes that each part keeps for the backward pass, half-precision copies of weights
            included. A tensor counts for the part that keeps it first.
        largest_layer: the most bytes that one layer keeps. Under activation checkpointing a step keeps them besides,
            while the layer is computed again.
    """

    num_masked: int
    work: dict[str, Work]
    activations_by_part: dict[str, int]
    largest_layer: int

    @property
    def activations(self) -> int:
        """Bytes that all parts keep."""
        return sum(self.activations_by_part.values())

    @property
    def flops(self) -> int:
        """Operations of forward and backward, the teacher's forward included."""
        return sum(work.flops for work in self.work.values())


def run_step(
    config: TCLConfig,
    batch_size: int,
    num_tokens: int,
    mixed_precision: str = "no",
    num_masked: int | None = None,
    checkpointing: bool = False,
    from_states: bool = False,
) -> Step:
    """Run a step of one process on fake tensors, and count.

    Attention dropout is left out, because the fast kernels that are counted keep no attention weights for it.

    Args:
        batch_size: pairs (B).
        num_tokens: tokens of each text, [CLS] included (L).
        mixed_precision: "no", "bf16" or "fp16", for the forward pass: weights, gradients and the moments of AdamW are
            float32 in any case.
        num_masked: masked tokens of each text (M); `typical_masked` if None.
        checkpointing: keep only what activation checkpointing keeps. Then only the forward pass runs, so that no
            operation is counted twice.
        from_states: read kept states of the locked vision layers in place of images.

    Raises:
        ValueError: if there are fewer pairs or tokens than one, or more masked tokens than tokens.
    """
    num_masked = typical_masked(config, num_tokens) if num_masked is None else num_masked
    if batch_size < 1 or num_tokens < 1 or not 0 <= num_masked <= num_tokens:
        raise ValueError(
            f"batch_size={batch_size}, num_tokens={num_tokens} and num_masked={num_masked} do not make a batch: "
            "choose at least one pair and one token, and at most as many masked tokens as tokens."
        )
    config = copy.deepcopy(config)
    config.text_config.attention_probs_dropout_prob = 0.0
    model = empty_model(config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        model.tie_weights()
        model.update_teacher()
        for module in model.modules():
            if isinstance(module, TCLAttention):
                module.avoids_slow_kernels = False
        if checkpointing:
            model.activation_checkpointing_enable()
        batch = _batch(config, batch_size, num_tokens, num_masked)
        if from_states:
            states = torch.empty(batch_size, *model.tcl.vision_model.locked_shape, dtype=STATES_DTYPE)
            batch |= {"pixel_values": states, "pixel_values_augmented": torch.empty_like(states)}
        counter = StepCounter(model)
        with counter.counting():
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision != "no"):
                loss = model(**batch, alpha=config.alpha).loss
            if loss is not None and not checkpointing:
                loss.backward()
    return Step(
        num_masked,
        {part: work for part, work in counter.work.items() if work.flops},
        {part: size for part, size in counter.activations.items() if size},
        counter.largest_layer,
    )


def locked_flops(config: TCLConfig) -> int:
    """Count the operations of the locked vision layers for one image."""
    model, size = empty_model(config), config.vision_config.image_size
    with FakeTensorMode(allow_non_fake_inputs=True):
        vision_model = model.to_empty(device="cpu").tcl.vision_model
        counter = StepCounter(model)
        with torch.no_grad(), counter.counting():
            vision_model.encode_locked(torch.empty(1, config.vision_config.num_channels, size, size))
    return sum(work.forward for work in counter.work.values())


def empty_model(config: TCLConfig) -> TCLForPreTraining:
    """Build the model to pre-train on the meta device: its weights have shapes and no content."""
    with torch.device("meta"):
        return TCLForPreTraining(copy.deepcopy(config))


def typical_masked(config: TCLConfig, num_tokens: int) -> int:
    """Return the number of masked tokens that the fullest of some tens of texts has.

    The collator pads the masked positions of the other texts to it.
    """
    words, share = max(0, num_tokens - 1), config.mlm_probability
    return min(words, math.ceil(words * share + 2.5 * math.sqrt(words * share * (1 - share))))


def _batch(config: TCLConfig, batch_size: int, num_tokens: int, num_masked: int) -> dict[str, Tensor]:
    """Make the tensors that the collator makes, for texts without padding."""
    size = config.vision_config.image_size
    pixels = torch.empty(batch_size, config.vision_config.num_channels, size, size)
    ids = torch.zeros(batch_size, num_tokens, dtype=torch.long)
    return {
        "pixel_values": pixels,
        "pixel_values_augmented": torch.empty_like(pixels),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mlm_input_ids": torch.zeros_like(ids),
        "mlm_labels": torch.zeros_like(ids),
        "mlm_positions": torch.zeros(batch_size, num_masked, dtype=torch.long),
        "image_ids": torch.zeros(batch_size, dtype=torch.long),
    }


def updates(num_trained: int, num_taught: int) -> dict[str, Work]:
    """Return the work of the teacher's update and of AdamW, which pass over all weights in float32.

    Args:
        num_trained, num_taught: parameters of the student and of the teacher.
    """
    return {
        "teacher's update": Work(bytes=(2 + 1) * FLOAT * num_taught),  # reads teacher and student
        "AdamW": Work(bytes=(4 + 3) * FLOAT * num_trained),  # reads weight, gradient, two moments; writes all but one
    }


def modules_by_part(model: TCLForPreTraining) -> dict[str, list[nn.Module]]:
    """Return the modules of each part of a step.

    None of them calls another, except that the teacher calls the student's where these are locked: such a call belongs
    to the teacher. What runs outside all of them belongs to the losses.
    """
    owners: dict[str, Any] = {"student": model, "teacher": model.teacher}
    modules = {}
    for name, owner in owners.items():
        text = owner.tcl.text_model
        attentions = [layer.cross_attn for layer in text.fusion_layers if hasattr(layer.cross_attn, "k_proj")]
        modules[name] = {
            "image encoder": [owner.tcl.vision_model],
            "text encoder": [text.embeddings, *text.layers[: text.config.fusion_layer]],
            "keys and values of images": [linear for a in attentions for linear in (a.k_proj, a.v_proj)],
            "fusion encoder": [*text.fusion_layers],
            "language-model head": [owner.lm_head],
            "projections": [owner.tcl.visual_projection, owner.tcl.text_projection],
        }
    parts = {f"{part}, {name}": modules[name][part] for part in modules["student"] for name in modules}
    return parts | {"matching head": [model.itm_head]}


def _attention_backward_flops(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs) -> int:
    return 2 * sdpa_flop_count(query.shape, key.shape, value.shape)


@dataclass(frozen=True)
class _Product:
    """A kernel that computes matrix products.

    Args:
        flops: operations, from its arguments.
        operands: positions of the arguments that it reads. Biases and the sums of attention weights are small, and do
            not count.
        num_results: the number of its first results that count; gradients of biases and the like do not.
    """

    flops: Callable[..., int]
    operands: slice
    num_results: int = 1


aten = torch.ops.aten
PRODUCTS = {
    aten.mm: _Product(flop_registry[aten.mm], slice(0, 2)),
    aten.bmm: _Product(flop_registry[aten.bmm], slice(0, 2)),
    aten.addmm: _Product(flop_registry[aten.addmm], slice(1, 3)),
    aten.baddbmm: _Product(flop_registry[aten.baddbmm], slice(1, 3)),
    aten.convolution: _Product(flop_registry[aten.convolution], slice(0, 2)),
    # The first two arguments are the output's gradient and the pixels, which need no gradient themselves.
    aten.convolution_backward: _Product(flop_registry[aten.convolution_backward], slice(0, 2), 2),
    # torch has a formula for the attention kernels of GPUs, and none for that of the CPU.
    aten._scaled_dot_product_flash_attention_for_cpu: _Product(
        flop_registry[aten._scaled_dot_product_flash_attention], slice(0, 3)
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _Product(_attention_backward_flops, slice(0, 5), 3),
}


class StepCounter(TorchDispatchMode):
    """Counts the products that run within `counting` and the tensors that autograd keeps, by part.

    A product of the backward pass belongs to the part whose forward pass made its autograd node. torch's
    `ModuleTracker` cannot separate the parts: the image states have several users, and a module counts as running
    until the gradients of all its inputs are complete.

    Attributes:
        work: operations and bytes by part.
        activations: bytes by part, without parameters and buffers.
        largest_layer: the most bytes that one layer keeps.
    """

    def __init__(self, model: TCLForPreTraining):
        super().__init__()
        self._modules = modules_by_part(model)
        self._layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        self.work = dict.fromkeys((*self._modules, LOSSES), Work())
        self.activations = dict.fromkeys(self.work, 0)
        self.largest_layer = 0
        self._running: list[str] = []  # the parts at work, each of which was called by the one before
        self._part_of_node: dict[int, str] = {}  # by sequence number
        # Tensors by address. They are held, because the address of freed memory could be seen a second time.
        self._seen = {_memory_of(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        self._before_layer = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count everything that runs in the context."""
        handles = [layer.register_forward_pre_hook(self._enter_layer) for layer in self._layers]
        handles += [layer.register_forward_hook(self._leave_layer) for layer in self._layers]
        for part, modules in self._modules.items():
            for module in modules:
                handles.append(module.register_forward_pre_hook(partial(self._enter_part, part)))
                handles.append(module.register_forward_hook(self._leave_part))
        with self, torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
            yield
        for handle in handles:
            handle.remove()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        product = PRODUCTS.get(function.overloadpacket)
        if product is None:
            return result
        results = result if isinstance(result, tuple) else (result,)
        flops = product.flops(*args, **kwargs, out_val=result)
        moved = (*args[product.operands], *results[: product.num_results])
        size = sum(_bytes_of(tensor) for tensor in moved if tensor is not None)
        node = torch._C._current_autograd_node()
        if node is None:
            # The node of this product, if it has one, is the newest. A product without a node, as in the teacher, must
            # not claim the node of an earlier product.
            self._part_of_node.setdefault(torch.autograd._get_sequence_nr() - 1, self._part)
            self.work[self._part] += Work(forward=flops, bytes=size)
        else:
            self.work[self._part_of_node[node._sequence_nr()]] += Work(backward=flops, bytes=size)
        return result

    def _keep(self, tensor: Tensor) -> Tensor:
        memory = _memory_of(tensor)
        if memory not in self._seen:
            self._seen[memory] = tensor
            self.activations[self._part] += tensor.untyped_storage().nbytes()
        return tensor

    @property
    def _part(self) -> str:
        """The part that the present work belongs to."""
        return self._running[0] if self._running else LOSSES

    def _enter_part(self, part: str, *_) -> None:
        self._running.append(part)

    def _leave_part(self, *_) -> None:
        self._running.pop()

    def _enter_layer(self, *_) -> None:
        self._before_layer = sum(self.activations.values())

    def _leave_layer(self, *_) -> None:
        self.largest_layer = max(self.largest_layer, sum(self.activations.values()) - self._before_layer)


def _bytes_of(tensor: Tensor) -> int:
    """The bytes of a tensor, without the repetitions of an expanded one, whose stride is 0."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return tensor.element_size() * math.prod(sizes)


def _memory_of(tensor: Tensor) -> int:
    """The address of a tensor's memory, which views of it share."""
    return tensor.untyped_storage()._cdata
