"""The training loop, for pre-training and every task.

`TrainingRun.step` is the paper's algorithm. What an engine needs is in `engine`, and how a batch becomes losses is in
the model (`models/modeling_tcl.py`).
"""

import copy
import logging
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from accelerate.utils import set_seed
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data.pairs import DataError
from ..data.skipped import SkippedSamples
from ..evaluation.shares import EvaluationStopped
from ..models.processing_tcl import TCLProcessor
from .adapters import check_output_dir
from .arguments import TCLTrainingArguments, TrainingError
from .checkpoints import (
    CHECKPOINTS,
    FORMAT,
    CheckpointPusher,
    newest_checkpoint,
    newest_whole_checkpoint,
    read_manifest,
    save_checkpoint,
)
from .engine import Engine
from .guard import UpdateGuard
from .health import Monitor
from .identity import check_identity, identity_of_run, start_anew
from .interruption import PREEMPTED, Preempted, StopSignal
from .loaders import Collator, RunLoader
from .log import METRICS, Meter, MetricsLog
from .optimization import learning_rate
from .ownership import owned
from .progress import Progress
from .run_folder import SKIPPED, check_new, clear

logger = logging.getLogger(__name__)

Evaluator = Callable[[nn.Module], dict[str, float]]


@dataclass
class TrainingRun:
    """Trains a head; `train` saves it with its processor, metrics and checkpoints in `args.output_dir`.

    Args:
        model: a `TCLTaughtModel`, whose output has `loss`, and perhaps losses by name.
        dataset: records, map-style or a stream.
        collator: makes batches of records. If it has a method `for_run`, as ours have, it lists bad samples in the
            run's `skipped.jsonl`.
        processor: saved beside the model.
        evaluator: called with the model every `eval_steps` and at the end, by every process; returns metrics by name.
        push_checkpoint: takes every checkpoint that is written; only the main process needs one.
        stop_signal: notes whether the run was asked to stop. At its end, it may have been too late to do so.
        is_followed: whether the same processes train another run afterwards.
        recipe: further arguments by name, see `identity.settings_of`; a resumed run is compared with them.
    """

    model: PreTrainedModel
    dataset: Any
    collator: Collator
    processor: TCLProcessor
    args: TCLTrainingArguments
    evaluator: Evaluator | None = None
    push_checkpoint: CheckpointPusher | None = None
    stop_signal: StopSignal = field(default_factory=StopSignal)
    is_followed: bool = False
    recipe: dict[str, Any] = field(default_factory=dict)

    def train(self) -> dict[str, float]:
        """Train to the end, and return the last line of `metrics.jsonl`.

        Raises:
            NonFiniteError: if a loss or gradient was not finite; the update was masked.
            Preempted: if the run was asked to stop, after saving a checkpoint.
            CheckpointWriteError: if a checkpoint cannot be written.
            TrainingError: if arguments contradict each other, or there is nothing to resume from.
            DataError: if too much of the data is bad.
        """
        self.output_dir = Path(self.args.output_dir)
        self.skipped = SkippedSamples(self.output_dir / SKIPPED, self.args.max_bad_share)
        with self.stop_signal, self.skipped.naming_dead_workers(), ExitStack() as self.held:
            self.prepare()
            if self.evaluator and self.progress.evaluation_due:
                self.evaluate(self.evaluator)
            while not self.is_done:
                self.train_epoch()
            self.finish()
        return self.line

    def prepare(self) -> None:
        """Make everything that the run needs, and bring it to where the run begins or goes on.

        Raises:
            TrainingError: if the best model is to be kept by a metric and there is nothing to evaluate on.
        """
        args = self.args
        self.engine = Engine(args)
        self.accelerator = self.engine.accelerator
        self._open_folder()
        if args.metric_for_best_model and self.evaluator is None:
            raise TrainingError(
                f"metric_for_best_model={args.metric_for_best_model} needs data to evaluate on: name some, or leave it "
                "out."
            )
        set_seed(args.seed, device_specific=True)  # Each process has its own dropout masks and negatives.
        self.identity = identity_of_run(
            args, self.recipe, self.model, self.processor, self.dataset, self.engine.describe()
        )
        self.engine.prepare(self.model)
        self.loader = RunLoader(self.dataset, self.collator, args, self.engine, self.skipped)
        self.held.callback(self.loader.close)
        self.progress, self.meter, self.monitor = Progress(self.skipped), Meter(), Monitor()
        self.states = {"progress": self.progress, "meter": self.meter, "monitor": self.monitor, **self.loader.state}
        if args.report_to:
            self.accelerator.init_trackers("tcl_hf", config={name: str(value) for name, value in vars(args).items()})
        self.num_steps = args.max_steps if args.max_steps > 0 else args.num_train_epochs * self.loader.steps_per_epoch
        if args.resume:
            self._resume()
        self.metrics_log = MetricsLog(self.output_dir / METRICS, self.progress.step, self.accelerator)
        self.guard = UpdateGuard(self.engine.device)
        self.has_saved = False  # whether there is a model or a checkpoint of this run
        self.is_first_forward = True  # whether the next forward begins an optimizer step
        self.line: dict[str, float] = {}  # the last one of the log
        is_hidden = not self.accelerator.is_main_process
        self.bar = tqdm(total=self.num_steps, initial=self.progress.step, desc="Training", disable=is_hidden)
        self.engine.model.train()

    def _open_folder(self) -> None:
        """Make the run's folder, own it, and see to what an earlier run has left there."""
        is_main = self.accelerator.is_main_process
        self.lock = self.held.enter_context(owned(self.output_dir, self.engine.agreement, is_main))
        check_output_dir(self.output_dir, self.args)
        if self.args.resume:
            return
        check_new(self.output_dir, self.args.overwrite_output_dir)
        self.accelerator.wait_for_everyone()  # until all processes have looked
        if self.accelerator.is_main_process:
            clear(self.output_dir)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        """Go on from the newest checkpoint that is whole."""
        checkpoint = newest_whole_checkpoint(self.output_dir)
        if checkpoint is None:
            is_damaged = newest_checkpoint(self.output_dir) is not None
            remedy = "remove this folder, and start the run again" if is_damaged else "leave out --resume"
            raise TrainingError(
                f"There is no whole checkpoint to resume from in {self.output_dir / CHECKPOINTS}: {remedy}."
            )
        manifest = read_manifest(checkpoint)
        if manifest["format"] != FORMAT:
            raise TrainingError(
                f"{checkpoint} was written by another version of tcl_hf, as format {manifest['format']} and not "
                f"{FORMAT}: finish the run with that version, or put its model.safetensors beside the config.json and "
                f"the processor of such a model, and {start_anew(checkpoint)}."
            )
        writers = manifest["num_processes"]
        if writers != self.accelerator.num_processes:
            raise TrainingError(
                f"{checkpoint} was written by {writers} processes, and this run has {self.accelerator.num_processes}: "
                f"each had its own random numbers and share of the data. Start {writers}."
            )
        check_identity(checkpoint, manifest["identity"], self.identity)
        if self.accelerator.is_main_process:
            self.skipped.mend_list()
        self.accelerator.wait_for_everyone()
        self.engine.load_state(checkpoint, self.states)
        self.accelerator.wait_for_everyone()  # before any process adds to the list of skipped samples
        if self.progress.step >= self.num_steps + self.progress.evaluation_due:
            raise TrainingError(
                f"{checkpoint} is at step {self.progress.step}, and the run is to end at {self.num_steps}: "
                "raise num_train_epochs or max_steps."
            )
        logger.info("Resumed from %s at step %d.", checkpoint, self.progress.step)

    @property
    def is_done(self) -> bool:
        """Whether all optimizer steps are done."""
        return self.progress.step == self.num_steps

    def train_epoch(self) -> None:
        """Train on the rest of an epoch, or to the end of the run.

        Raises:
            DataError: if a whole epoch has no sample that can be used.
        """
        is_whole, is_empty = self.progress.batch == 0, True
        for batch in self.loader.batches(self.progress.epoch, self.progress.batch):
            self.progress.batch += 1
            batch = self.equal_share(batch)
            if not batch:
                self.skipped.check()
                continue
            is_empty = False
            if self.step(batch):
                self.after_step()
                if self.is_done:
                    return
        if is_whole and is_empty:
            raise DataError(
                f"No sample could be used: {self.skipped.count} were bad and are listed in {self.skipped.path}."
                if self.skipped.count
                else "The data gave no batch: it holds no pairs, or fewer than the processes need."
            )
        self.progress.epoch, self.progress.batch = self.progress.epoch + 1, 0

    def equal_share(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch to train on; it is empty in all processes if it is empty in one of them.

        A process that trained alone would wait for the gradients of the others. Contrastive losses gather features as
        keys, for which they need the same number of samples in each process.
        """
        number = self.engine.agreement.least(len(batch["input_ids"]) if batch else 0)
        if number and not self.model.contrasts:
            return batch
        return {name: value[:number] for name, value in batch.items()} if number else {}

    def step(self, batch: dict[str, Tensor]) -> bool:
        """Run one forward and backward pass; return whether it completed an optimizer step.

        Gradients accumulate over the forwards of an optimizer step, before which the teacher moves once.
        """
        args, engine, progress = self.args, self.engine, self.progress
        if self.is_first_forward:
            self.model.update_teacher()  # The teacher's weights follow the student's as a moving average.
            self.learning_rate = learning_rate(args, progress.step, progress.epoch, self.num_steps)
            for group, factor in zip(engine.optimizer.param_groups, engine.rate_factors, strict=True):
                group["lr"] = self.learning_rate * factor  # The factor is 1 without rates by part or layer.
            ramp = min(1.0, progress.step / self.loader.steps_per_epoch) if args.alpha_ramp else 1.0
            self.alpha = self.model.config.alpha * ramp  # the share of the teacher's targets

        with self.accelerator.accumulate(engine.model):
            # The student sees `pixel_values` and the teacher `pixel_values_augmented`, two views of the same images.
            output = engine.forward(batch, self.alpha)
            gradient_norm = engine.backward(output.loss)
            self.guard.watch(engine.optimizer, progress.step, output.loss, gradient_norm)
            engine.optimizer.step()  # The optimizer waits for the last forward of its step, as `zero_grad` does.
            engine.optimizer.zero_grad()

        num_pairs = len(batch["input_ids"]) * self.accelerator.num_processes
        self.meter.add(output, self.model.loss_names, num_pairs, gradient_norm)
        self.is_first_forward = is_complete = engine.is_last_forward
        progress.step += is_complete
        return is_complete

    def after_step(self) -> None:
        """Log, save, evaluate, write a checkpoint, and stop, each where it is due."""
        args, step = self.args, self.progress.step
        self.bar.update()
        if self.is_done or step % args.logging_steps == 0:
            self.log()
        if self.evaluator and (self.is_done or (args.eval_steps and step % args.eval_steps == 0)):
            self.evaluate(self.evaluator)
        elif self.is_done:
            self.save_model()
        if self.is_done:  # The model is saved, so that a checkpoint is not needed.
            return
        if self.engine.agreement.any(self.stop_signal.received):
            self.stop()
        if args.save_steps and step % args.save_steps == 0:
            self.save_checkpoint()

    def log(self) -> None:
        """Write a line of the log, and look at it: for numbers that are not finite, bad data, and signs of trouble."""
        progress, model, num_processes = self.progress, self.model, self.accelerator.num_processes
        samples_per_step = self.args.per_device_train_batch_size * self.engine.accumulation_steps * num_processes
        statistics = {name: value.item() for name, value in model.training_statistics().items()}
        if "queue_spread" in statistics:
            statistics["queue_age"] = model.config.queue_size / samples_per_step  # steps that a feature stays
        self.line = {
            "step": progress.step,
            "epoch": progress.epoch,
            "learning_rate": self.learning_rate,
            "alpha": self.alpha,
            **self.meter.read(self.accelerator),
            **statistics,
            "skipped_samples": self.skipped.count,
        }
        self.lock.check()
        self.monitor.watch(self.line)
        self.guard.check(newest_checkpoint(self.output_dir))
        self.skipped.check()
        self.metrics_log.write(self.line)
        self.bar.set_postfix({k: f"{self.line[k]:.3g}" for k in ("loss", "pairs_per_second") if k in self.line})

    def evaluate(self, evaluator: Evaluator) -> None:
        """Evaluate and write a line of the log; save the model if it is the best so far and that is asked for.

        The model is saved before it is evaluated, because an evaluation may fail: the last one, and else the first one
        that would be lost. With `metric_for_best_model` it never takes the place of a better one.

        Raises:
            TrainingError: if `metric_for_best_model` is not among the metrics.
        """
        self.guard.check(newest_checkpoint(self.output_dir))
        wanted = self.args.metric_for_best_model
        if self.progress.best == -math.inf if wanted else self.is_done or not self.has_saved:
            self.save_model()
        self.progress.evaluation_due = True
        try:
            metrics = self.engine.evaluate(evaluator, lambda: self.stop_signal.received)
        except EvaluationStopped:
            self.stop()
        self.progress.evaluation_due = False
        if wanted and wanted not in metrics:
            raise TrainingError(f"metric_for_best_model: there is no metric '{wanted}' among {', '.join(metrics)}.")
        if wanted and metrics[wanted] > self.progress.best:
            self.progress.best = metrics[wanted]
            self.save_model()
        self.line = {"step": self.progress.step, "epoch": self.progress.epoch, **metrics}
        self.metrics_log.write(self.line)
        self.engine.model.train()
        self.meter.restart_clock()

    def save_model(self) -> None:
        """Save the model with its processor, as the result of the run so far."""
        self.lock.check()
        self.engine.save_model(self.output_dir, self.processor)
        self.has_saved = True

    def save_checkpoint(self) -> Path:
        """Write a checkpoint and begin to push it."""
        self.lock.check()
        self.guard.check(newest_checkpoint(self.output_dir))
        step, limit, pusher = self.progress.step, self.args.save_total_limit, self.push_checkpoint
        spared = pusher.on_its_way if pusher else None
        checkpoint = save_checkpoint(
            self.accelerator,
            self.output_dir,
            step,
            limit,
            self.engine.agreement,
            self.save_state,
            spared,
            self.identity,
        )
        self.has_saved = True
        if pusher:
            pusher.start(checkpoint)
        self.meter.restart_clock()
        return checkpoint

    def save_state(self, folder: Path) -> None:
        """Write the files of a checkpoint; where weights are not in parts, the folder also opens as a model."""
        self.engine.save_state(folder, self.states)
        if self.accelerator.is_main_process:
            self.processor.save_pretrained(folder)
            if self.args.lora is None and not self.engine.is_sharded:
                config = copy.deepcopy(self.model.config)
                config.architectures = [type(self.model).__name__]
                config.save_pretrained(folder)

    def stop(self) -> NoReturn:
        """Save a checkpoint and end the run, which was asked to stop.

        Raises:
            Preempted: always; it ends the process with the exit status of a run that goes on with `--resume`.
        """
        checkpoint = self.save_checkpoint()
        logger.warning("The run was asked to stop: %s is saved; go on with --resume.", checkpoint)
        self.finish()
        raise Preempted(PREEMPTED)

    def finish(self) -> None:
        """Wait for what is still on its way, and close the trackers."""
        self.bar.close()
        if self.push_checkpoint:
            self.push_checkpoint.finish()
        if self.is_followed:  # `end_training` would also end the communication of the processes.
            for tracker in self.accelerator.trackers:
                tracker.finish()
        else:
            self.accelerator.end_training()
