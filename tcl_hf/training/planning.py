"""What a pre-training run will take: parameters, memory, disk and time, from its config alone.

The model is built without its weights, and a training step is run on tensors that have shapes and no content: what a
step keeps for its backward pass is counted and not guessed. How much it computes follows from `operations`.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.modeling_layers import GradientCheckpointingLayer

from ..models.configuration_tcl import TCLConfig
from ..models.modeling_tcl import TCLForPreTraining
from .operations import FLOAT, Work, operations, updates

# Of the forward: weights, gradients and moments are float32 in any case.
HALF_PRECISION = ("bf16", "fp16")
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
    gpu_bandwidth: float = field(default=0.0, metadata={"help": "Peak of one GPU's memory in GB/s, for --operations."})
    utilisation: float = field(default=0.3, metadata={"help": "Share of the peak that is reached."})
    operations: bool = field(default=False, metadata={"help": "Print operations, bytes and activations by part."})


@dataclass
class Step:
    """What a training step of one process takes.

    Args:
        activations: bytes kept from the forward for the backward pass, half-precision copies of weights included.
        activations_checkpointed: the same with activation checkpointing, while the largest layer is computed again.
        flops: floating-point operations of forward and backward, the teacher's forward included.
        activations_by_part: of `activations`, without checkpointing.
    """

    activations: int
    activations_checkpointed: int
    flops: int
    activations_by_part: dict[str, int] = field(default_factory=dict)


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

    Attention counts as its fast kernels do it, which keep no weights; so its dropout is left out.
    """
    config = copy.deepcopy(config)
    config.text_config.attention_probs_dropout_prob = 0.0
    model = empty_model(config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        model.tie_weights()
        model.update_teacher()
        batch = _batch(config, batch_size, num_tokens)

        def forward() -> _Kept:
            kept = _Kept(model)
            with kept.watching(), torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision in HALF_PRECISION):
                model(**batch, alpha=config.alpha)
            return kept

        kept = forward()
        model.activation_checkpointing_enable()
        kept_by_checkpoints = forward()
    work = operations(config, batch_size, num_tokens, typical_masked(config, num_tokens))
    return Step(
        kept.total(),
        kept_by_checkpoints.total() + kept.largest_layer,
        sum(part.flops for part in work.values()),
        kept.by_part(),
    )


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
        lines.append(f"{_short(rate)} samples a second ({source}), {rate * SECONDS_PER_DAY / 1e6:,.1f} million a day.")
    if rate and plan.num_samples:
        days = epochs * plan.num_samples / rate / SECONDS_PER_DAY
        lines.append(f"{epochs} epochs of {plan.num_samples:,} pairs: {days:,.1f} days.")
    return "\n".join(lines)


def describe_operations(
    config: TCLConfig, batch_size: int, num_tokens: int, mixed_precision: str, plan: PlanArguments
) -> str:
    """Operations, bytes and activations of one process' step by part, as Markdown tables.

    With the peaks of a GPU, each part has the least time that it takes, and which of the two peaks sets it.
    """
    number = 2 if mixed_precision in HALF_PRECISION else FLOAT
    num_masked = typical_masked(config, num_tokens)
    parts: dict[str, Work] = operations(config, batch_size, num_tokens, num_masked, number)
    model = empty_model(config)
    parameters = count_parameters(model)
    parts |= updates(parameters["student"], parameters["teacher"])
    step = sum(parts.values(), start=Work())
    with_peaks = bool(plan.gpu_tflops and plan.gpu_bandwidth)
    lines = [
        f"A step of {batch_size} pairs of {num_tokens} tokens, {num_masked} of them masked, mixed precision: "
        f"{mixed_precision}:",
        "",
        "| part | forward GFLOP | backward GFLOP | share | GB | FLOP/byte |" + " ms | bound by |" * with_peaks,
        "|---|---:|---:|---:|---:|---:|" + "---:|---|" * with_peaks,
    ]
    seconds = 0.0
    for part, work in (parts | {"step": step}).items():
        cells = [part, _short(work.forward / 1e9), _short(work.backward / 1e9), f"{work.flops / step.flops:.1%}"]
        cells += [_short(work.bytes / 1e9), f"{work.intensity:,.0f}"]
        if with_peaks and work is not step:
            computing, moving = work.flops / (plan.gpu_tflops * 1e12), work.bytes / (plan.gpu_bandwidth * 1e9)
            seconds += max(computing, moving)
            cells += [_short(1e3 * max(computing, moving)), "arithmetic" if computing > moving else "memory"]
        elif with_peaks:
            cells += [_short(1e3 * seconds), ""]
        lines.append(f"| {' | '.join(cells)} |")

    kept = run_step(config, batch_size, num_tokens, mixed_precision).activations_by_part
    lines += ["", "| activations | GB | share |", "|---|---:|---:|"]
    total = sum(kept.values())
    lines += [f"| {part} | {_short(size / 1e9)} | {size / total:.1%} |" for part, size in kept.items()]
    lines.append(f"| together | {_short(total / 1e9)} | |")
    return "\n".join(lines)


def _short(number: float) -> str:
    """Three digits, or all before the point."""
    if 0 < number < 0.001:
        return "<0.001"
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


class _Kept:
    """Memory that autograd keeps for the backward pass, that of parameters and buffers left out."""

    def __init__(self, model: nn.Module):
        self.own = {id_of(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self.sizes: dict[int, int] = {}  # bytes
        self.parts: dict[int, str] = {}  # what kept them first
        self.part = LOSSES
        self.modules = modules_by_part(model)
        self.alive: list[Tensor] = []  # else the number of a freed memory would come again
        self.largest_layer = 0
        self.before = 0
        self.layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note what is kept, and what of it by the largest layer."""
        handles = [layer.register_forward_pre_hook(self._enter) for layer in self.layers]
        handles += [layer.register_forward_hook(self._leave) for layer in self.layers]
        for part, modules in self.modules.items():
            for module in modules:
                handles.append(module.register_forward_pre_hook(self._is_at(part)))
                handles.append(module.register_forward_hook(self._is_at(LOSSES)))
        with torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor):
            yield
        for handle in handles:
            handle.remove()

    def total(self) -> int:
        return sum(self.sizes.values())

    def by_part(self) -> dict[str, int]:
        """Bytes that each part was the first to keep."""
        parts = dict.fromkeys((*self.modules, LOSSES), 0)
        for key, size in self.sizes.items():
            parts[self.parts[key]] += size
        return {part: size for part, size in parts.items() if size}

    def _note(self, tensor: Tensor) -> Tensor:
        if id_of(tensor) not in self.own:
            self.alive.append(tensor)
            self.sizes[id_of(tensor)] = tensor.untyped_storage().nbytes()
            self.parts.setdefault(id_of(tensor), self.part)
        return tensor

    def _is_at(self, part: str) -> Callable[..., None]:
        """A hook that notes what is kept from now on as that of a part."""

        def hook(*_) -> None:
            self.part = part

        return hook

    def _enter(self, *_) -> None:
        self.before = self.total()

    def _leave(self, *_) -> None:
        self.largest_layer = max(self.largest_layer, self.total() - self.before)


LOSSES = "losses and features"


def modules_by_part(model: TCLForPreTraining) -> dict[str, list[nn.Module]]:
    """The modules that a step calls one after the other; what is computed outside them belongs to the losses."""
    text = model.tcl.text_model
    attentions = [layer.cross_attn for layer in text.fusion_layers if hasattr(layer.cross_attn, "k_proj")]
    return {
        "image encoder": [model.tcl.vision_model],
        "text encoder": [text.embeddings, *text.layers[: text.config.fusion_layer]],
        "keys and values of images": [linear for a in attentions for linear in (a.k_proj, a.v_proj)],
        "fusion encoder": list(text.fusion_layers),
        "language-model head": [model.lm_head],
    }


def id_of(tensor: Tensor) -> int:
    """What tells one tensor's memory from another's."""
    return tensor.untyped_storage()._cdata


def typical_masked(config: TCLConfig, num_tokens: int) -> int:
    """Masked tokens of the fullest of some tens of texts, to which the collator pads the positions of the others."""
    words, share = num_tokens - 1, config.mlm_probability
    return min(words, math.ceil(words * share + 2.5 * math.sqrt(words * share * (1 - share))))


def _batch(config: TCLConfig, batch_size: int, num_tokens: int) -> dict[str, Tensor]:
    """A batch of the longest texts, as the collator makes it, without content."""
    size = config.vision_config.image_size
    num_masked = typical_masked(config, num_tokens)
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
