"""Pre-training and fine-tuning share this: a task is trained, and its run is described."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel

from ..models.processing_tcl import TCLProcessor
from ..sharing.hub import BackgroundPush
from ..training.arguments import TCLTrainingArguments
from ..training.loop import TrainingRun
from .arguments import TrainingDataArguments
from .phases import Phase
from .tasks import TASKS


def train_task(
    data_args: TrainingDataArguments,
    args: TCLTrainingArguments,
    model: PreTrainedModel,
    processor: TCLProcessor,
    samples: Any,
    records: Sequence[dict] | None,
    answers: list[str] | None = None,
    phase: Phase | None = None,
) -> dict[str, float]:
    """Train a model for a task, and save it with its processor, metrics and checkpoints.

    Args:
        samples: the data to train on, map-style or a stream.
        records: the data to evaluate on; None for no evaluation.
        answers: the answers to choose from, for a task that chooses answers.
        phase: the phase of the run that is trained; None in a run without phases.

    Returns:
        The last line of `metrics.jsonl`.

    Raises:
        RecipeError: if a phase after this one could not be trained.
        NonFiniteError, Preempted, CheckpointWriteError, TrainingError, DataError: as in `TrainingRun.train`.
    """
    task, phase = TASKS[data_args.task], phase or Phase((data_args, None, args))
    phase.check_following(model)
    history, step = model.config.trained_on or [], {"task": data_args.task, "data": data_args.dataset_names}
    if phase.number == 1 or step not in history:
        model.config.trained_on = [*history, step]
    collator = task.batches.collator(data_args, model.config, processor)

    def evaluate(model: PreTrainedModel) -> dict[str, float]:
        assert task.evaluate is not None and records is not None
        return task.evaluate(model, processor, records, data_args, answers or []).metrics

    pushes = args.push_to_hub and PartialState().is_main_process
    push = BackgroundPush(str(args.hub_model_id)) if pushes else None
    evaluation = evaluate if records else None
    run = TrainingRun(model, samples, collator, processor, args, evaluation, push, phase.stop_signal, not phase.is_last)
    return run.train()


def command_line(name: str, argv: Sequence[str] | None) -> str:
    """The command line of a run, for its card.

    Args:
        name: the module of this package that was run.
        argv: the arguments that it was given; None for those of the process.
    """
    is_module = argv is not None or Path(sys.argv[0]).resolve() == Path(__file__).with_name(f"{name}.py").resolve()
    program = f"-m {__package__}.{name}" if is_module else sys.argv[0]
    return f"accelerate launch {program} {shlex.join(sys.argv[1:] if argv is None else argv)}".rstrip()
