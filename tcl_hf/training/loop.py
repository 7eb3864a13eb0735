"""One training loop on Accelerate, for pre-training and every task, and the callback for transformers' Trainer."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    DistributedType,
    broadcast,
    set_seed,
)
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from tqdm.auto import tqdm

from ..data.pairs import DataError
from ..data.skipped import SkippedSamples
from ..data.streams import StreamLoader
from ..models.processing_tcl import TCLProcessor
from .agreement import Agreement
from .allocation import keep_freed_memory
from .arguments import TCLTrainingArguments, TrainingError
from .checkpoints import CHECKPOINTS, newest_checkpoint, newest_whole_checkpoint, read_manifest, save_checkpoint
from .engine import gather_for_methods, make_shardable, whole, whole_model, whole_state_dict
from .guard import UpdateGuard
from .health import Monitor, model_statistics
from .interruption import PREEMPTED, Preempted, StopSignal
from .loaders import batches_of_epoch, build_loader, steps_per_epoch
from .log import METRICS, Meter, MetricsLog
from .optimization import gradient_norm, learning_rate, parameter_groups
from .progress import Progress

logger = logging.getLogger(__name__)
SKIPPED = "skipped.jsonl"


def train(
    model: nn.Module,
    pairs,
    collator: Any,
    processor: TCLProcessor,
    args: TCLTrainingArguments,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    push_checkpoint: Any = None,
) -> dict[str, float]:
    """Train a head; save it with its processor, metrics and checkpoints in `output_dir`.

    Args:
        model: a `TCLTaughtModel`, whose output has `loss`, and perhaps losses by name.
        pairs: records, map-style or a stream.
        collator: makes batches of records; its `skipped`, if any, notes bad samples.
        push_checkpoint: pushes every checkpoint that is written, see `sharing.hub.BackgroundPush`.
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
    with StopSignal() as stop, skipped.naming_dead_workers():
        return _train(model, pairs, collator, processor, args, evaluate, stop, skipped, push_checkpoint)


def _train(
    model: nn.Module,
    pairs,
    collator: Any,
    processor: TCLProcessor,
    args: TCLTrainingArguments,
    evaluate: Callable[[nn.Module], dict[str, float]] | None,
    stop: "StopSignal",
    skipped: SkippedSamples,
    pusher: Any,
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
    agreement = Agreement()
    loader, order = build_loader(pairs, collator, args, agreement, skipped)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(
        parameter_groups(model, args.weight_decay, args.decay_rule),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        fused=True,  # reads found_inf on the device, see UpdateGuard
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
    progress, meter, monitor = Progress(), Meter(), Monitor()
    accelerator.register_for_checkpointing(progress, meter, monitor)
    if args.metric_for_best_model and evaluate is None:
        raise TrainingError(
            f"metric_for_best_model={args.metric_for_best_model} needs data to evaluate on: name some, or leave it out."
        )
    if args.report_to:
        accelerator.init_trackers("tcl_hf", config={k: str(v) for k, v in vars(args).items()})

    accumulation = accelerator.gradient_accumulation_steps
    steps_in_epoch = steps_per_epoch(loader, args, accumulation)
    num_steps = args.max_steps if args.max_steps > 0 else args.num_train_epochs * steps_in_epoch
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
                "raise num_train_epochs or max_steps."
            )
        logger.info("Resumed from %s at step %d.", checkpoint, progress.step)
    log = MetricsLog(output_dir / METRICS, progress.step if args.resume else 0, accelerator)
    guard = UpdateGuard(accelerator.device)
    bar = tqdm(total=num_steps, initial=progress.step, desc="Training", disable=not accelerator.is_main_process)

    # The loop.
    line: dict[str, float] = {}
    model.train()
    is_first_forward = True
    while progress.step < num_steps:
        is_whole_epoch, has_pairs = progress.batch == 0, False
        for batch in batches_of_epoch(loader, order, progress, args, accelerator):
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
                ramp = min(1.0, progress.step / steps_in_epoch) if args.alpha_ramp else 1.0
                alpha = bare_model.config.alpha * ramp
                # A compiled forward takes a tensor: each new number would compile it again.
                share = torch.full((), alpha, device=accelerator.device) if args.torch_compile else alpha
            with accelerator.accumulate(model):
                with accelerator.autocast():  # which Accelerate leaves out under FSDP2
                    output = model(**batch, alpha=share)
                accelerator.backward(output.loss)
                norm = None
                if accelerator.sync_gradients:
                    norm = gradient_norm(accelerator, model, args.max_grad_norm)
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
                line |= model_statistics(
                    bare_model, args.per_device_train_batch_size * accumulation * accelerator.num_processes
                )
                line["skipped_samples"] = skipped.count
                monitor.watch(line)
                guard.check(newest_checkpoint(output_dir))
                skipped.check()
                log.write(line)
                bar.set_postfix({k: f"{line[k]:.3g}" for k in ("loss", "pairs_per_second") if k in line})
            if last and not args.metric_for_best_model:  # before the evaluation, which may fail
                guard.check(newest_checkpoint(output_dir))
                _save_model(accelerator, model, processor, output_dir)
            if evaluate and (last or (args.eval_steps and progress.step % args.eval_steps == 0)):
                guard.check(newest_checkpoint(output_dir))
                with accelerator.autocast():
                    metrics = evaluate(whole_model(accelerator.unwrap_model(model)))
                accelerator.wait_for_everyone()
                if args.metric_for_best_model and _metric(metrics, args.metric_for_best_model) > progress.best:
                    progress.best = metrics[args.metric_for_best_model]
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


def _prepare_engine(accelerator: Accelerator, model: nn.Module, args: TCLTrainingArguments) -> None:
    """Fit model and engine to each other, where the engine shards."""
    if _is_sharded(accelerator):
        make_shardable(model)  # both engines fail on the scalar temperature
    if accelerator.is_fsdp2:  # else the temperature and the states between layers would be rounded to bf16
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
    if accelerator.distributed_type == DistributedType.DEEPSPEED:  # prepared without a loader
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config |= {
            "train_micro_batch_size_per_gpu": args.per_device_train_batch_size,
            "gradient_clipping": args.max_grad_norm,
        }


def _metric(metrics: dict[str, float], name: str) -> float:
    if name not in metrics:
        raise TrainingError(f"metric_for_best_model: there is no metric '{name}' among {', '.join(metrics)}.")
    return metrics[name]
