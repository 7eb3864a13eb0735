"""One training loop on Accelerate, for pre-training and every task, and the callback for transformers' Trainer."""

import json
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    DistributedType,
    broadcast,
    send_to_device,
    set_seed,
)
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import TrainerCallback

from .allocation import keep_freed_memory
from .checkpoints import (
    CHECKPOINTS,
    newest_checkpoint,
    newest_whole_checkpoint,
    read_manifest,
    save_checkpoint,
)
from .data import BucketSampler, CaptionLengths, DataError, SkippedSamples, VisitedPairs, VisitSampler
from .health import Monitor, batch_statistics, model_statistics
from .hub import BackgroundPush
from .momentum import is_distributed
from .processing_tcl import TCLProcessor
from .sharding import gather_for_methods, make_shardable, whole, whole_model, whole_state_dict
from .streams import StreamLoader

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
SKIPPED = "skipped.jsonl"
_LOSSES = ("loss", "loss_cma", "loss_imc", "loss_lmi", "loss_itm", "loss_mlm")


class TrainingError(ValueError):
    """Arguments of a run that contradict each other; the message says what, and the remedy."""


class Preempted(SystemExit):
    """The run was asked to stop (SIGTERM): it saved a checkpoint, and exits with `PREEMPTED`."""


PREEMPTED = 75  # "try again later" in sysexits.h: a scheduler that sees it starts the run again, with --resume


class NonFiniteError(FloatingPointError):
    """A loss or gradient was not finite; the weights are those before that step."""


@dataclass
class TrainingArguments:
    """How to train."""

    output_dir: str = field(default="runs/tcl", metadata={"help": "Folder of the model, metrics and checkpoints."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, order, augmentation and masking."})
    epochs: int = field(default=30, metadata={"help": "Passes over the data."})
    max_steps: int = field(default=0, metadata={"help": "Stop after so many optimizer steps; 0 for all epochs."})
    batch_size: int = field(default=64, metadata={"help": "Pairs in a forward of one process."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Forwards in an optimizer step."})
    schedule: str = field(
        default="cosine",
        metadata={
            "help": "cosine: linear warm-up, then cosine, per step; paper: warm-up in stairs, then cosine by epoch.",
            "choices": ["cosine", "paper"],
        },
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "Highest learning rate."})
    min_learning_rate: float = field(default=1e-5, metadata={"help": "Last learning rate."})
    warmup_learning_rate: float = field(default=1e-5, metadata={"help": "First learning rate."})
    warmup_steps: int = field(default=2000, metadata={"help": "Optimizer steps of warm-up."})
    weight_decay: float = field(default=0.02, metadata={"help": "Decay of AdamW."})
    decay_rule: str = field(
        default="matrices",
        metadata={
            "help": "matrices: weights of linear layers, convolutions and embeddings decay; "
            "original: also the temperature, class token and image positions.",
            "choices": ["matrices", "original"],
        },
    )
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW's first beta."})
    adam_beta2: float = field(default=0.999, metadata={"help": "AdamW's second beta."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Clip the gradient to this norm; 0 for no clipping."})
    mixed_precision: str | None = field(
        default=None,
        metadata={
            "help": "Precision of the forward; that of `accelerate launch` if not given.",
            "choices": ["no", "bf16", "fp16"],
        },
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute activations: less memory."})
    torch_compile: bool = field(default=False, metadata={"help": "Compile the forward."})
    bucket_by_length: bool = field(
        default=False,
        metadata={"help": "Batches of about equally long captions: less padding, but no longer any with any."},
    )
    num_workers: int = field(default=4, metadata={"help": "Processes that prepare batches."})
    logging_steps: int = field(default=50, metadata={"help": "Write the mean losses each so many steps."})
    alpha_ramp: bool = field(
        default=True, metadata={"help": "Raise alpha from 0 over the first epoch (paper: not for visual entailment)."}
    )
    eval_steps: int = field(default=0, metadata={"help": "Evaluate each so many steps; 0 for the end only."})
    keep_best: str = field(
        default="", metadata={"help": "Keep the model with the highest value of this metric; that of the end if empty."}
    )
    save_steps: int = field(default=0, metadata={"help": "Write a checkpoint each so many steps; 0 for none."})
    save_total_limit: int = field(default=2, metadata={"help": "Keep so many checkpoints."})
    push_checkpoints_to: str | None = field(
        default=None, metadata={"help": "Repository on the Hub to which checkpoints are pushed in the background."}
    )
    resume: bool = field(default=False, metadata={"help": "Go on from the newest checkpoint in output_dir."})
    report_to: list[str] = field(
        default_factory=list, metadata={"help": "Trackers: tensorboard, wandb, trackio, or others of Accelerate."}
    )
    max_bad_share: float = field(default=0.1, metadata={"help": "Stop when a larger share of the samples is bad."})


@dataclass
class Progress:
    """Where a run stands; part of every checkpoint."""

    step: int = 0  # optimizer steps done
    epoch: int = 0
    batch: int = 0  # batches of this epoch done, per process
    best: float = -math.inf  # of the metric by which the model is kept
    samples: dict[str, int] = field(default_factory=dict)  # seen and skipped by the first process

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def train(
    model: nn.Module,
    pairs,
    collator: Any,
    processor: TCLProcessor,
    args: TrainingArguments,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
) -> dict[str, float]:
    """Train a head; save it with its processor, metrics and checkpoints in `output_dir`.

    Args:
        model: a `TCLTaughtModel`, whose output has `loss`, and perhaps losses by name.
        pairs: records, map-style or a stream.
        collator: makes batches of records; its `skipped`, if any, notes bad samples.
        evaluate: called with the model each `eval_steps` and at the end, by every process; returns metrics by name.

    Returns:
        The last line of `metrics.jsonl`.

    Raises:
        NonFiniteError: if a loss or gradient was not finite; the update was masked.
        Preempted: if it was asked to stop, after saving a checkpoint.
        CheckpointWriteError: if a checkpoint can not be written.
        TrainingError: if arguments contradict each other, or there is nothing to resume from.
        DataError: if too much of the data is bad.
    """
    skipped = getattr(collator, "skipped", None) or SkippedSamples()
    with _StopSignal() as stop, skipped.naming_dead_workers():
        return _train(model, pairs, collator, processor, args, evaluate, stop, skipped)


def _train(
    model: nn.Module,
    pairs,
    collator: Any,
    processor: TCLProcessor,
    args: TrainingArguments,
    evaluate: Callable[[nn.Module], dict[str, float]] | None,
    stop: "_StopSignal",
    skipped: SkippedSamples,
) -> dict[str, float]:
    output_dir = Path(args.output_dir)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=args.report_to or None,
        project_dir=str(output_dir),
        step_scheduler_with_optimizer=False,
        # Every process pushes the same keys: sending the queues from rank 0 at each forward would be for nothing.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        # Each process reads its own batches: sending them from rank 0 fails on a batch of bad samples alone.
        dataloader_config=DataLoaderConfiguration(dispatch_batches=False),
    )
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    if not args.resume and newest_checkpoint(output_dir) is not None:
        raise TrainingError(
            f"{output_dir} holds checkpoints of an earlier run: go on with --resume, or choose another output_dir."
        )
    skipped.path, skipped.max_share = output_dir / SKIPPED, args.max_bad_share
    if not args.resume:
        skipped.path.unlink(missing_ok=True)
    collator.empty_batches = True  # the loop passes over them

    # Parts: data, optimizer, and everything as Accelerate wants it.
    set_seed(args.seed, device_specific=True)  # each process its own dropout masks and negatives
    agreement = _Agreement()
    loader, order = _loader(pairs, collator, args, agreement, skipped)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(
        parameter_groups(model, args.weight_decay, args.decay_rule),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        fused=True,  # reads found_inf on the device, see _Guard
    )
    bare_model = model
    if args.torch_compile:
        model.forward = torch.compile(model.forward)
    _prepare_engine(accelerator, model, args)
    model, optimizer = accelerator.prepare(model, optimizer)
    gather_for_methods(bare_model)
    if isinstance(loader, StreamLoader):
        accelerator.register_for_checkpointing(loader)
    else:
        loader = accelerator.prepare(loader)
    for buffer in bare_model.buffers():  # the queues start equal
        broadcast(buffer)
    progress, meter, monitor = Progress(), _Meter(), Monitor()
    accelerator.register_for_checkpointing(progress, meter, monitor)
    if args.keep_best and evaluate is None:
        raise TrainingError(f"keep_best={args.keep_best} needs data to evaluate on: name some, or leave it out.")
    if args.report_to:
        accelerator.init_trackers("tcl_hf", config={k: str(v) for k, v in vars(args).items()})

    accumulation = accelerator.gradient_accumulation_steps
    steps_per_epoch = _steps_per_epoch(loader, args, accumulation)
    num_steps = args.max_steps or args.epochs * steps_per_epoch
    if args.resume:
        checkpoint = newest_whole_checkpoint(output_dir)
        if checkpoint is None:
            raise TrainingError(
                f"There is no whole checkpoint to resume from in {output_dir / CHECKPOINTS}: leave out --resume."
            )
        wrote = read_manifest(checkpoint)["num_processes"]
        if wrote != accelerator.num_processes:
            raise TrainingError(
                f"{checkpoint} was written by {wrote} processes, and this run has {accelerator.num_processes}: "
                f"each had its own random numbers and share of the data. Start {wrote}."
            )
        accelerator.load_state(str(checkpoint))
        if accelerator.is_main_process:
            skipped.mend_list()
        accelerator.wait_for_everyone()
        skipped.load_state_dict(progress.samples)
        accelerator.wait_for_everyone()  # before any adds to the list
        if progress.step >= num_steps:
            raise TrainingError(
                f"{checkpoint} is at step {progress.step}, and the run is to end at {num_steps}: "
                "raise epochs or max_steps."
            )
        logger.info("Resumed from %s at step %d.", checkpoint, progress.step)
    log = MetricsLog(output_dir / METRICS, progress.step if args.resume else 0, accelerator)
    guard = _Guard(accelerator.device)
    bar = tqdm(total=num_steps, initial=progress.step, desc="Training", disable=not accelerator.is_main_process)

    pusher = None
    if args.push_checkpoints_to and accelerator.is_main_process:
        pusher = BackgroundPush(args.push_checkpoints_to)

    # The loop.
    line: dict[str, float] = {}
    model.train()
    is_first_forward = True
    while progress.step < num_steps:
        is_whole_epoch, has_pairs = progress.batch == 0, False
        for batch in _batches(loader, order, progress, args, accelerator):
            progress.batch += 1
            num_pairs = agreement.least(len(batch["input_ids"]) if batch else 0)
            if not num_pairs:  # a process alone would wait for the others' gradients
                skipped.check()
                continue
            if bare_model.contrasts:  # the keys that are gathered must be as many in each process
                batch = {name: value[:num_pairs] for name, value in batch.items()}
            has_pairs = True
            if is_first_forward:  # of this optimizer step
                bare_model.update_teacher()
                lr = learning_rate(args, progress.step, progress.epoch, num_steps)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                ramp = min(1.0, progress.step / steps_per_epoch) if args.alpha_ramp else 1.0
                alpha = bare_model.config.alpha * ramp
                # A compiled forward takes a tensor: each new number would compile it again.
                share = torch.full((), alpha, device=accelerator.device) if args.torch_compile else alpha
            with accelerator.accumulate(model):
                with accelerator.autocast():  # which Accelerate leaves out under FSDP2
                    output = model(**batch, alpha=share)
                accelerator.backward(output.loss)
                norm = None
                if accelerator.sync_gradients:
                    norm = _gradient_norm(accelerator, model, args.max_grad_norm)
                guard.watch(optimizer, progress.step, output.loss, norm)
                optimizer.step()
                optimizer.zero_grad()
            meter.add(output, len(batch["input_ids"]) * accelerator.num_processes, norm)
            is_first_forward = accelerator.sync_gradients
            if not accelerator.sync_gradients:
                continue

            progress.step += 1
            bar.update()
            last = progress.step == num_steps
            if last or progress.step % args.logging_steps == 0:
                line = {"step": progress.step, "epoch": progress.epoch, "learning_rate": lr, "alpha": alpha}
                line |= {"temperature": whole(bare_model.tcl.temperature).item(), **meter.read(accelerator)}
                line |= model_statistics(bare_model, args.batch_size * accumulation * accelerator.num_processes)
                line["skipped_samples"] = skipped.count
                monitor.watch(line)
                guard.check(newest_checkpoint(output_dir))
                skipped.check()
                log.write(line)
                bar.set_postfix({k: f"{line[k]:.3g}" for k in ("loss", "pairs_per_second") if k in line})
            if last and not args.keep_best:  # before the evaluation, which may fail
                guard.check(newest_checkpoint(output_dir))
                _save_model(accelerator, model, processor, output_dir)
            if evaluate and (last or (args.eval_steps and progress.step % args.eval_steps == 0)):
                guard.check(newest_checkpoint(output_dir))
                with accelerator.autocast():
                    metrics = evaluate(whole_model(accelerator.unwrap_model(model)))
                accelerator.wait_for_everyone()
                if args.keep_best and _metric(metrics, args.keep_best) > progress.best:
                    progress.best = metrics[args.keep_best]
                    _save_model(accelerator, model, processor, output_dir)
                line = {"step": progress.step, "epoch": progress.epoch, **metrics}
                log.write(line)
                model.train()
                meter.restart_clock()
            stopping = not last and agreement.any(stop.received)
            if stopping or (args.save_steps and progress.step % args.save_steps == 0 and not last):
                guard.check(newest_checkpoint(output_dir))
                progress.samples = skipped.state_dict()
                spared = pusher.on_its_way if pusher else None
                saved = save_checkpoint(
                    accelerator, output_dir, progress.step, args.save_total_limit, agreement.any, spared
                )
                if pusher:
                    pusher.start(saved)
                meter.restart_clock()
            if stopping:
                logger.warning("Asked to stop: %s is saved; go on with --resume.", saved)
                bar.close()
                if pusher:
                    pusher.finish()
                accelerator.end_training()
                raise Preempted(PREEMPTED)
            if last:
                break
        else:
            if is_whole_epoch and not has_pairs:
                raise DataError(
                    f"No sample could be used: {skipped.count} were bad and are listed in {skipped.path}."
                    if skipped.count
                    else "The data gave no batch: it holds no pairs, or fewer than the processes need."
                )
            progress.epoch, progress.batch = progress.epoch + 1, 0
    bar.close()
    if pusher:
        pusher.finish()
    accelerator.end_training()
    return line


def _save_model(accelerator: Accelerator, model: nn.Module, processor: TCLProcessor, output_dir: Path) -> None:
    accelerator.wait_for_everyone()
    bare_model = accelerator.unwrap_model(model)
    state = whole_state_dict(bare_model) if _is_sharded(accelerator) else None  # every process has to ask
    if accelerator.is_main_process:
        bare_model.save_pretrained(output_dir, state_dict=state)
        processor.save_pretrained(output_dir)


def _is_sharded(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def _prepare_engine(accelerator: Accelerator, model: nn.Module, args: TrainingArguments) -> None:
    """Fit model and engine to each other, where the engine shards."""
    if _is_sharded(accelerator):
        make_shardable(model)  # both engines fail on the scalar temperature
    if accelerator.is_fsdp2:  # else the temperature and the states between layers would be rounded to bf16
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
    if accelerator.distributed_type == DistributedType.DEEPSPEED:  # prepared without a loader
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config |= {"train_micro_batch_size_per_gpu": args.batch_size, "gradient_clipping": args.max_grad_norm}


def _metric(metrics: dict[str, float], name: str) -> float:
    if name not in metrics:
        raise TrainingError(f"keep_best: there is no metric '{name}' among {', '.join(metrics)}.")
    return metrics[name]


def parameter_groups(model: nn.Module, weight_decay: float, rule: str = "matrices") -> list[dict]:
    """AdamW's groups of trainable parameters: those that decay, and those that do not.

    Args:
        rule: "matrices" decays weights with two or four dimensions (linear, embedding, convolution); "original"
            all but biases and one-dimensional ones, so also the temperature, class token and image positions.
    """

    def decays(name: str, parameter: nn.Parameter) -> bool:
        if rule == "original":
            return parameter.ndim != 1 and not name.endswith(".bias")
        return parameter.ndim in (2, 4)

    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"params": [p for name, p in trained if decays(name, p)], "weight_decay": weight_decay},
        {"params": [p for name, p in trained if not decays(name, p)], "weight_decay": 0.0},
    ]


def learning_rate(args: TrainingArguments, step: int, epoch: int, num_steps: int) -> float:
    """The learning rate of an optimizer step, counted from 0.

    "cosine" warms up linearly and then follows a cosine to the last step. "paper" warms up in stairs of 100 steps
    within the first epoch, and then takes one value per epoch from the cosine over all epochs.
    """
    low, high = args.min_learning_rate, args.learning_rate
    if args.schedule == "paper":
        if epoch == 0:
            stair = 100
            share = min(1.0, step // stair * stair / max(args.warmup_steps, 1))
            return args.warmup_learning_rate + share * (high - args.warmup_learning_rate)
        return low + 0.5 * (high - low) * (1 + math.cos(math.pi * epoch / args.epochs))
    if step < args.warmup_steps:
        return args.warmup_learning_rate + step / args.warmup_steps * (high - args.warmup_learning_rate)
    share = (step - args.warmup_steps) / max(num_steps - args.warmup_steps, 1)
    return low + 0.5 * (high - low) * (1 + math.cos(math.pi * min(share, 1.0)))


class MetricsLog:
    """`metrics.jsonl`, and the trackers: one line at a time; a resumed run first drops the lines beyond its step."""

    def __init__(self, path: Path, step: int, accelerator: Accelerator):
        self.path, self.accelerator = path, accelerator
        if accelerator.is_main_process:
            kept = [line for line in read_metrics(path) if line["step"] <= step] if step else []
            path.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def write(self, line: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        self.accelerator.log({k: v for k, v in line.items() if k != "step"}, step=int(line["step"]))


def read_metrics(path: str | os.PathLike) -> list[dict[str, float]]:
    """The lines of a `metrics.jsonl`; none if it is not there."""
    path = Path(path)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class TCLMomentumCallback(TrainerCallback):
    """Moves the momentum teacher in transformers' `Trainer`: once before each optimizer step.

    Also ramps alpha, the share of the teacher's targets, over the first epoch, as the paper does.
    """

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        model = getattr(model, "module", model)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model  # of PEFT
        model.alpha = model.config.alpha * min(1.0, state.epoch or 0.0)
        model.update_teacher()


class _Agreement:
    """Lets processes agree on what to do next, over CPUs: nothing waits for a GPU."""

    def __init__(self):
        self.rank: int = dist.get_rank() if is_distributed() else 0
        self.world_size: int = dist.get_world_size() if is_distributed() else 1
        self.group = dist.new_group(backend="gloo") if self.world_size > 1 else None

    def any(self, flag: bool) -> bool:
        """Whether it holds in any process; all of them ask together."""
        return bool(self._reduced(int(flag), dist.ReduceOp.MAX))

    def least(self, number: int) -> int:
        """The smallest of all processes' numbers; all of them ask together."""
        return self._reduced(number, dist.ReduceOp.MIN)

    def _reduced(self, number: int, operation: Any) -> int:
        if self.group is None:
            return number
        numbers = torch.tensor(number)
        dist.all_reduce(numbers, operation, group=self.group)
        return int(numbers)


class _StopSignal:
    """Listens for SIGTERM, by which schedulers announce that they will take the machine away."""

    def __init__(self):
        self.received = False
        self.can_listen = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "_StopSignal":
        if self.can_listen:
            self.former = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *error) -> None:
        if self.can_listen:
            signal.signal(signal.SIGTERM, self.former)

    def _receive(self, number: int, frame: Any) -> None:
        self.received = True


def _ignore_sigterm(worker: int) -> None:
    """A signal to the whole group shall not take the workers from the process that is about to save."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class _Guard:
    """Masks updates with a non-finite loss or gradient in any process, on the device, and remembers the first."""

    def __init__(self, device: torch.device):
        self.finite = torch.ones((), dtype=torch.bool, device=device)  # all forwards of this optimizer step
        self.first = torch.full((2,), -1.0, device=device)  # its step and its loss

    def watch(self, optimizer, step: int, loss: Tensor, norm: Tensor | None) -> None:
        """Note a forward; `norm` is the gradient's, of the last forward before an update."""
        loss = loss.detach()
        # With fp16 a gradient may overflow: its scaler masks the update by itself and lowers the scale.
        scaled = getattr(optimizer, "scaler", None) is not None
        self.finite = self.finite & loss.isfinite()
        if norm is not None and not scaled:
            self.finite = self.finite & norm.isfinite()
        if norm is not None and is_distributed():  # where one masks its update, all do: they would part ways
            finite = self.finite.float()
            dist.all_reduce(finite, dist.ReduceOp.MIN)
            self.finite = finite > 0
        bad = torch.stack([torch.full_like(loss, step, dtype=torch.float32), loss.float()])
        self.first = torch.where((self.first[0] < 0) & ~self.finite, bad, self.first)
        if norm is not None:
            inner = getattr(optimizer, "optimizer", optimizer)
            if not scaled:
                inner.found_inf = (~self.finite).float()
            self.finite = torch.ones_like(self.finite)

    def check(self, checkpoint: Path | None) -> None:
        """Read the flag.

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


class _Meter:
    """Sums losses on the device between two lines of the log; part of every checkpoint, which may come between."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.forwards = self.pairs = 0
        self.seconds = 0.0
        self.norms: list[Tensor] = []
        self.clock = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("sums", "forwards", "pairs", "seconds", "norms")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def restart_clock(self) -> None:
        """Leave out the time since the last forward."""
        self.clock = time.perf_counter()

    def add(self, output, num_pairs: int, norm: Tensor | None) -> None:
        losses = {name: loss for name in _LOSSES if (loss := getattr(output, name, None)) is not None}
        for name, value in (losses | batch_statistics(output)).items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        if norm is not None:
            self.norms.append(norm.detach())
        self.forwards += 1
        self.pairs += num_pairs
        now = time.perf_counter()
        self.seconds += now - self.clock
        self.clock = now

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over the forwards since the last reading, over all processes, and pairs per second."""
        sums = torch.stack([*self.sums.values()]) / self.forwards
        means = accelerator.reduce(sums, "mean").tolist()
        line = dict(zip(self.sums, means, strict=True))
        if self.norms:
            line["gradient_norm"] = torch.stack(self.norms).mean().item()
        line["pairs_per_second"] = self.pairs / max(self.seconds, 1e-9)
        self.restart()
        return line


def _loader(
    pairs, collator: Callable, args: TrainingArguments, agreement: _Agreement, skipped: SkippedSamples
) -> tuple[DataLoader | StreamLoader, VisitSampler | StreamLoader]:
    """A loader whose order and whose samples' random choices follow from the seed alone, and what sets its position."""
    pin_memory = torch.cuda.is_available()
    if isinstance(pairs, torch.utils.data.IterableDataset):
        if not args.max_steps:
            raise TrainingError("A stream has no known length: say how long to train with max_steps.")
        if args.bucket_by_length:
            raise TrainingError(
                "bucket_by_length needs the lengths of all captions, which a stream does not know: leave out one of "
                "bucket_by_length and streaming."
            )
        stream = StreamLoader(
            pairs,
            collator,
            args.batch_size,
            args.seed,
            num_workers=args.num_workers,
            rank=agreement.rank,
            world_size=agreement.world_size,
            any_process=agreement.any,
            skipped=skipped,
            pin_memory=pin_memory,
            worker_init_fn=_ignore_sigterm,
        )
        return stream, stream
    if len(pairs) == 0:
        raise DataError("There is nothing to train on: the data holds no pairs.")
    order = VisitSampler(len(pairs), args.seed)
    if args.bucket_by_length:
        order = BucketSampler(CaptionLengths(pairs), args.seed, args.batch_size * agreement.world_size)
    loader = DataLoader(
        VisitedPairs(pairs),
        sampler=order,
        drop_last=len(pairs) >= args.batch_size,
        batch_size=args.batch_size,
        collate_fn=collator,
        num_workers=args.num_workers,
        generator=torch.Generator().manual_seed(args.seed),
        pin_memory=pin_memory,
        worker_init_fn=_ignore_sigterm,
        persistent_workers=args.num_workers > 0,  # the order is made here, not in the workers
    )
    return loader, order


def _steps_per_epoch(loader: DataLoader | StreamLoader, args: TrainingArguments, accumulation: int) -> int:
    """Optimizer steps in an epoch; of a stream, all."""
    if isinstance(loader, StreamLoader):
        return args.max_steps
    return max(math.ceil(len(loader) / accumulation), 1)


def _batches(loader, order, progress: Progress, args: TrainingArguments, accelerator: Accelerator) -> Iterator[dict]:
    """The epoch's batches that are still to come, on the device."""
    if isinstance(loader, StreamLoader):
        loader.begin(progress.epoch, progress.batch)
        for batch in loader:
            yield send_to_device(batch, accelerator.device, non_blocking=True)
    else:
        order.begin(progress.epoch, progress.batch * args.batch_size * accelerator.num_processes)
        yield from loader


def _gradient_norm(accelerator: Accelerator, model: nn.Module, max_norm: float) -> Tensor | None:
    """Norm of the whole gradient, before clipping where it is clipped; None where the engine does not tell."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:  # it has clipped and stepped already, in `backward`
        norm = accelerator.clip_grad_norm_(model.parameters(), max_norm)
        return None if norm is None else torch.tensor(float(norm), device=accelerator.device)
    if max_norm > 0:
        return whole(accelerator.clip_grad_norm_(model.parameters(), max_norm))
    accelerator.unscale_gradients()
    return whole(torch.nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None))
