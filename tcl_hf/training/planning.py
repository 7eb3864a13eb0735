"""Plans of pre-training runs: parameters, memory, disk space and time, from the config alone.

The model is built without its weights, and a training step runs on fake tensors (see `operations`), so that the
operations and activations of a step are counted and not guessed.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from transformers.modeling_layers import GradientCheckpointingLayer

from ..data.kept_states import StatesPlan
from ..models.configuration_tcl import TCLConfig
from ..models.modeling_tcl import TCLForPreTraining
from .operations import FLOAT, Step, Work, empty_model, locked_flops, run_step, updates

SECONDS_PER_HOUR, SECONDS_PER_DAY = 3600, 86400


@dataclass
class PlanArguments:
    """The machines and the data to plan for."""

    num_gpus: int = field(default=8, metadata={"help": "Number of processes, each with one GPU."})
    num_samples: int = field(default=0, metadata={"help": "Pairs in the data, for the time of an epoch."})
    samples_per_second: float = field(default=0.0, metadata={"help": "Measured samples per second, all GPUs together."})
    gpu_tflops: float = field(
        default=0.0, metadata={"help": "Peak TFLOP/s of one GPU in the run's precision, if no speed was measured."}
    )
    gpu_bandwidth: float = field(default=0.0, metadata={"help": "Peak GB/s of one GPU's memory, for --operations."})
    utilisation: float = field(default=0.3, metadata={"help": "Share of the peak that the run is expected to reach."})
    operations: bool = field(default=False, metadata={"help": "Print operations, bytes and activations by part."})


def count_parameters(model: TCLForPreTraining) -> dict[str, int]:
    """Return the number of parameters by part.

    `student` is the sum of all parts above it, and counts each weight once. `trained` is there if it is another number,
    because parts are locked or serve no objective. The teacher has no copies of locked parts.
    """
    text = model.tcl.text_model
    fused = number_of(text.fusion_layers)
    parts = {
        "vision encoder": number_of(model.tcl.vision_model),
        "text encoder": number_of(text) - fused,
        "fusion encoder": fused,
        "projections and temperature": number_of(model.tcl) - number_of(model.tcl.vision_model) - number_of(text),
    }
    taught = _number_taught(model)
    student, trained = number_of(model) - taught, sum(p.numel() for p in model.parameters() if p.requires_grad)
    parts["heads"] = student - sum(parts.values())
    return parts | {"student": student} | ({} if trained == student else {"trained": trained}) | {"teacher": taught}


def _number_taught(model: TCLForPreTraining) -> int:
    """Return the number of parameters that the teacher alone has."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if name.startswith("teacher."))


def number_of(module: Any) -> int:
    """Return the number of parameters of a module; a parameter that it uses twice counts once."""
    return sum(parameter.numel() for parameter in module.parameters())


def memory_per_gpu(model: TCLForPreTraining, activations: int, num_gpus: int, sharded: bool = False) -> dict[str, int]:
    """Return the bytes on each GPU by part.

    Args:
        activations: bytes that a step keeps, see `Step`.
        sharded: whether FSDP2 shards the model, with each layer as a unit; DDP otherwise.
    """
    trained = FLOAT * sum(p.numel() for p in model.parameters() if p.requires_grad)
    taught = FLOAT * _number_taught(model)
    weights = FLOAT * number_of(model) - taught
    queues = sum(buffer.nbytes for buffer in model.buffers())
    layers = [FLOAT * number_of(m) for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    outside = weights + taught - sum(layers)
    # DDP keeps the gradients a second time, in the buckets that it sends. FSDP2 gathers the weights outside the layers
    # for the whole step, and those of the running layer and of the next one.
    gathered = outside + 2 * max(layers) if sharded else 0
    share = num_gpus if sharded else 1
    memory = {
        "weights": weights / share,
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
    """Return the bytes of the tensors of a saved model, and of a training checkpoint.

    The checkpoint has the states of AdamW as well.
    """
    saved = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adamw = sum(2 * parameter.nbytes + FLOAT for parameter in trained)  # two moments and a step count
    return {"model": saved, "training checkpoint": saved + adamw}


def throughput(step: Step, batch_size: int, plan: PlanArguments) -> float:
    """Return the samples per second of all GPUs together.

    It is the measured number, or else follows from the peak and its utilisation; 0 if `plan` has neither.
    """
    if plan.samples_per_second:
        return plan.samples_per_second
    return plan.num_gpus * plan.gpu_tflops * 1e12 * plan.utilisation / (step.flops / batch_size)


def describe(
    config: TCLConfig,
    batch_size: int,
    num_tokens: int,
    mixed_precision: str,
    epochs: int,
    plan: PlanArguments,
    kept_views: int | None = None,
) -> str:
    """Return the plan as Markdown tables, with those of `operations_tables` if `plan` asks for them.

    Args:
        batch_size: pairs of each process.
        num_tokens: tokens of each text.
        mixed_precision: "no", "bf16" or "fp16".
        epochs: passes over `plan.num_samples`.
        kept_views: augmented views of each image whose states of the locked vision layers are kept, beside the image
            itself, and read in place of images; None to read images.
    """
    model = empty_model(config)
    parameters = count_parameters(model)
    lines = ["| part | parameters |", "|---|---:|"]
    lines += [f"| {part} | {number:,} |" for part, number in parameters.items()]
    run: Any = partial(run_step, config, batch_size, num_tokens, mixed_precision, from_states=kept_views is not None)
    step, checkpointed = run(), run(checkpointing=True).activations
    columns = [
        memory_per_gpu(model, activations, plan.num_gpus, sharded)
        for sharded in (False, True)
        for activations in (step.activations, checkpointed + step.largest_layer)
    ]
    lines += [
        "",
        f"GB on each of {plan.num_gpus} GPUs, {batch_size} pairs each (mixed precision: {mixed_precision}):",
        "",
        "| | DDP | DDP, checkpointing | FSDP2 | FSDP2, checkpointing |",
        "|---|---:|---:|---:|---:|",
    ]
    for part in dict.fromkeys(part for column in columns for part in column if part != "total") | {"total": None}:
        cells = [f"{column[part] / 1e9:.2f}" if part in column else "" for column in columns]
        lines.append(f"| {part} | {' | '.join(cells)} |")
    lines += ["", "| on disk | GB |", "|---|---:|"]
    lines += [f"| {file} | {size / 1e9:.2f} |" for file, size in bytes_on_disk(model).items()]
    rate = throughput(step, batch_size, plan)
    if kept_views is not None:
        lines += ["", *_states_lines(config, kept_views, plan, rate * step.flops / batch_size)]
    lines += ["", f"A sample takes {step.flops / batch_size / 1e9:.0f} GFLOP."]
    if rate:
        source = "measured" if plan.samples_per_second else f"at {plan.utilisation:.0%} of {plan.gpu_tflops:g} TFLOP/s"
        lines.append(f"{_short(rate)} samples a second ({source}), {rate * SECONDS_PER_DAY / 1e6:,.1f} million a day.")
    if rate and plan.num_samples:
        days = epochs * plan.num_samples / rate / SECONDS_PER_DAY
        lines.append(f"{epochs} epochs of {plan.num_samples:,} pairs: {days:,.1f} days.")
    if plan.operations:
        texts = f"{batch_size} pairs of {num_tokens} tokens, {step.num_masked} of them masked"
        lines += ["", f"A step of {texts}, mixed precision: {mixed_precision}:", ""]
        lines += operations_tables(step, parameters, plan)
    return "\n".join(lines)


def _states_lines(config: TCLConfig, kept_views: int, plan: PlanArguments, flops_per_second: float) -> list[str]:
    """Return sentences about kept states: their size, and the work and the time of making them.

    Args:
        flops_per_second: of all GPUs together; 0 if it is not known.
    """
    num_states, width = empty_model(config).tcl.vision_model.locked_shape
    kept = StatesPlan("", plan.num_samples, kept_views, num_states, width)
    flops = (1 + kept_views) * locked_flops(config)
    lines = [
        f"A step reads kept states in place of images: {1 + kept_views} views of {num_states} states of {width} "
        f"numbers for each image, {kept.bytes_per_image / 1e6:.2f} MB on disk, made by {flops / 1e9:.1f} GFLOP of the "
        "locked layers."
    ]
    if plan.num_samples:
        made = ""
        if flops_per_second:
            made = f", and are made in {_short(plan.num_samples * flops / flops_per_second / SECONDS_PER_HOUR)} hours"
        lines.append(f"The states of {plan.num_samples:,} images take {kept.num_bytes / 1e9:,.2f} GB{made}.")
    return lines


def operations_tables(step: Step, parameters: dict[str, int], plan: PlanArguments) -> list[str]:
    """Return operations, bytes and activations of one step of one process by part, as lines of Markdown tables.

    If `plan` has the peaks of a GPU, each part has the least time that it can take, and which of the two peaks sets
    that time.

    Args:
        parameters: those of `count_parameters`, which the teacher's update and AdamW pass over.
    """
    parts = step.work | updates(parameters.get("trained", parameters["student"]), parameters["teacher"])
    total = sum(parts.values(), start=Work())
    with_peaks = bool(plan.gpu_tflops and plan.gpu_bandwidth)
    lines = [
        "| part | forward GFLOP | backward GFLOP | share | GB | FLOP/byte |" + " ms | bound by |" * with_peaks,
        "|---|---:|---:|---:|---:|---:|" + "---:|---|" * with_peaks,
    ]
    seconds = 0.0
    for part, work in (parts | {"step": total}).items():
        cells = [part, _short(work.forward / 1e9), _short(work.backward / 1e9), f"{work.flops / total.flops:.1%}"]
        cells += [_short(work.bytes / 1e9), f"{work.intensity:,.0f}"]
        if with_peaks and work is not total:
            computing, moving = work.flops / (plan.gpu_tflops * 1e12), work.bytes / (plan.gpu_bandwidth * 1e9)
            seconds += max(computing, moving)
            cells += [_short(1e3 * max(computing, moving)), "arithmetic" if computing > moving else "memory"]
        elif with_peaks:
            cells += [_short(1e3 * seconds), ""]
        lines.append(f"| {' | '.join(cells)} |")

    lines += ["", "| activations | GB | share |", "|---|---:|---:|"]
    for part, size in step.activations_by_part.items():
        lines.append(f"| {part} | {_short(size / 1e9)} | {size / step.activations:.1%} |")
    lines.append(f"| together | {_short(step.activations / 1e9)} | |")
    return lines


def _short(number: float) -> str:
    """Format a number with three digits, or with all digits before the point if there are more."""
    if 0 < number < 0.001:
        return "<0.001"
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
