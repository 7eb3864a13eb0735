"""What a pre-training run will take: parameters, memory, disk and time, from its config alone.

The model is built without its weights, and a training step is run on tensors that have shapes and no content: what a
step keeps for its backward pass and how much it computes are counted and not guessed.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_tcl import TCLConfig
from .modeling_tcl import TCLForPreTraining

FLOAT = 4  # bytes of a weight, gradient or moment: all are float32, whatever the forward computes in
SECONDS_PER_DAY = 86400


@dataclass
class PlanArguments:
    """What to plan for."""

    num_gpus: int = field(default=8, metadata={"help": "Processes, each with a GPU."})
    num_samples: int = field(default=0, metadata={"help": "Pairs in the data, for the time an epoch takes."})
    samples_per_second: float = field(default=0.0, metadata={"help": "Measured, of all GPUs together."})
    gpu_tflops: float = field(
        default=0.0, metadata={"help": "Peak of one GPU in its precision, if nothing was measured."}
    )
    utilisation: float = field(default=0.3, metadata={"help": "Share of the peak that is reached."})


@dataclass
class Step:
    """What a training step of one process takes.

    Args:
        activations: bytes kept from the forward for the backward pass, half-precision copies of weights included.
        activations_checkpointed: the same with activation checkpointing, while the largest layer is computed again.
        flops: floating-point operations of forward and backward, the teacher's forward included.
    """

    activations: int
    activations_checkpointed: int
    flops: int


def empty_model(config: TCLConfig) -> TCLForPreTraining:
    """The model to pre-train with shapes and without content."""
    with torch.device("meta"):
        return TCLForPreTraining(copy.deepcopy(config))


def count_parameters(model: TCLForPreTraining) -> dict[str, int]:
    """Parameters by part; `student` is the sum of all parts above it, each weight counted once."""
    text = model.tcl.text_model
    fused = number_of(text.fusion_layers)
    parts = {
        "vision encoder": number_of(model.tcl.vision_model),
        "text encoder": number_of(text) - fused,
        "fusion encoder": fused,
        "projections and temperature": number_of(model.tcl) - number_of(model.tcl.vision_model) - number_of(text),
    }
    student = sum(p.numel() for p in model.parameters() if p.requires_grad)
    parts["heads"] = student - sum(parts.values())
    return parts | {"student": student, "teacher": number_of(model.teacher)}


def number_of(module: nn.Module) -> int:
    """Parameters of a module, those it uses twice counted once."""
    return sum(parameter.numel() for parameter in module.parameters())


def run_step(config: TCLConfig, batch_size: int, num_tokens: int, mixed_precision: str = "no") -> Step:
    """Run a step of one process without computing anything, and count.

    Attention is counted as its fast kernels do it, which keep no weights; so its dropout is left out.
    """
    config = copy.deepcopy(config)
    config.text_config.attention_probs_dropout_prob = 0.0
    model = empty_model(config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        model.tie_weights()
        model.update_teacher()
        batch = _batch(config, batch_size, num_tokens)

        def forward() -> tuple[Tensor, _Kept]:
            kept = _Kept(model)
            with kept.watching(), torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision == "bf16"):
                return model(**batch, alpha=config.alpha).loss, kept

        with FlopCounterMode(display=False) as counter:
            loss, kept = forward()
            loss.backward()
        model.activation_checkpointing_enable()
        _, kept_by_checkpoints = forward()
    return Step(kept.total(), kept_by_checkpoints.total() + kept.largest_layer, counter.get_total_flops())


def memory_per_gpu(model: TCLForPreTraining, activations: int, num_gpus: int, sharded: bool = False) -> dict[str, int]:
    """Bytes by part on each of the GPUs: under DDP, or `sharded` under FSDP2 with every layer a unit."""
    trained = FLOAT * sum(p.numel() for p in model.parameters() if p.requires_grad)
    taught = FLOAT * number_of(model.teacher)
    queues = sum(buffer.nbytes for buffer in model.buffers())
    layers = [FLOAT * number_of(m) for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    outside = trained + taught - sum(layers)
    # DDP keeps the gradients a second time, in the buckets that it sends. FSDP2 gathers what lies outside layers for
    # the whole step, and the layer at work with the next one.
    gathered = outside + 2 * max(layers) if sharded else 0
    share = num_gpus if sharded else 1
    memory = {
        "weights": trained / share,
        "teacher": taught / share,
        "gradients": trained / share,
        "AdamW": 2 * trained / share,
        "gathered weights" if sharded else "gradient buckets": gathered if sharded else trained * (num_gpus > 1),
        "queues": queues,
        "activations": activations,
    }
    memory = {part: math.ceil(size) for part, size in memory.items()}
    return memory | {"total": sum(memory.values())}


def bytes_on_disk(model: TCLForPreTraining) -> dict[str, int]:
    """Bytes of the tensors of a saved model, and of the states of AdamW that a training checkpoint has besides."""
    saved = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adamw = sum(2 * parameter.nbytes + FLOAT for parameter in trained)  # two moments, and a count of steps
    return {"model": saved, "training checkpoint": saved + adamw}


def throughput(step: Step, batch_size: int, plan: PlanArguments) -> float:
    """Samples a second of all GPUs: as measured, or what the stated utilisation would give; 0 if neither is known."""
    if plan.samples_per_second:
        return plan.samples_per_second
    return plan.num_gpus * plan.gpu_tflops * 1e12 * plan.utilisation / (step.flops / batch_size)


def describe(
    config: TCLConfig, batch_size: int, num_tokens: int, mixed_precision: str, epochs: int, plan: PlanArguments
) -> str:
    """The plan as Markdown tables; `epochs` counts passes over `plan.num_samples`."""
    model = empty_model(config)
    lines = ["| part | parameters |", "|---|---:|"]
    lines += [f"| {part} | {number:,} |" for part, number in count_parameters(model).items()]
    step = run_step(config, batch_size, num_tokens, mixed_precision)
    columns = [
        memory_per_gpu(model, activations, plan.num_gpus, sharded)
        for sharded in (False, True)
        for activations in (step.activations, step.activations_checkpointed)
    ]
    lines += [
        "",
        f"GB on each of {plan.num_gpus} GPUs, {batch_size} pairs each (mixed precision: {mixed_precision}):",
        "",
    ]
    lines += ["| | DDP | DDP, checkpointing | FSDP2 | FSDP2, checkpointing |", "|---|---:|---:|---:|---:|"]
    for part in dict.fromkeys(part for column in columns for part in column if part != "total") | {"total": None}:
        cells = [f"{column[part] / 1e9:.2f}" if part in column else "" for column in columns]
        lines.append(f"| {part} | {' | '.join(cells)} |")
    lines += ["", "| on disk | GB |", "|---|---:|"]
    lines += [f"| {what} | {size / 1e9:.2f} |" for what, size in bytes_on_disk(model).items()]
    lines += ["", f"A sample takes {step.flops / batch_size / 1e9:.0f} GFLOP."]
    rate = throughput(step, batch_size, plan)
    if rate:
        source = "measured" if plan.samples_per_second else f"at {plan.utilisation:.0%} of {plan.gpu_tflops:g} TFLOP/s"
        lines.append(f"{rate:,.0f} samples a second ({source}), {rate * SECONDS_PER_DAY / 1e6:,.1f} million a day.")
    if rate and plan.num_samples:
        days = epochs * plan.num_samples / rate / SECONDS_PER_DAY
        lines.append(f"{epochs} epochs of {plan.num_samples:,} pairs: {days:,.1f} days.")
    return "\n".join(lines)


class _Kept:
    """Memory that autograd keeps for the backward pass, that of parameters and buffers left out."""

    def __init__(self, model: nn.Module):
        self.own = {id_of(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self.sizes: dict[int, int] = {}  # bytes
        self.alive: list[Tensor] = []  # else the number of a freed memory would come again
        self.largest_layer = 0
        self.before = 0
        self.layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note what is kept, and what of it by the largest layer."""
        handles = [layer.register_forward_pre_hook(self._enter) for layer in self.layers]
        handles += [layer.register_forward_hook(self._leave) for layer in self.layers]
        with torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor):
            yield
        for handle in handles:
            handle.remove()

    def total(self) -> int:
        return sum(self.sizes.values())

    def _note(self, tensor: Tensor) -> Tensor:
        if id_of(tensor) not in self.own:
            self.alive.append(tensor)
            self.sizes[id_of(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    def _enter(self, *_) -> None:
        self.before = self.total()

    def _leave(self, *_) -> None:
        self.largest_layer = max(self.largest_layer, self.total() - self.before)


def id_of(tensor: Tensor) -> int:
    """What tells one tensor's memory from another's."""
    return tensor.untyped_storage()._cdata


def _batch(config: TCLConfig, batch_size: int, num_tokens: int) -> dict[str, Tensor]:
    """A batch of the longest texts, as the collator makes it, without content."""
    size = config.vision_config.image_size
    # As many as the fullest of some tens of texts.
    words, share = num_tokens - 1, config.mlm_probability
    num_masked = min(words, math.ceil(words * share + 2.5 * math.sqrt(words * share * (1 - share))))
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
