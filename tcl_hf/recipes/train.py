"""Pre-training and fine-tuning share this: a task is trained, and its run is described."""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..models.processing_tcl import TCLProcessor
from ..models.whole_files import replace_file
from ..sharing.hub import BackgroundPush
from ..training.agreement import processes
from ..training.arguments import TCLTrainingArguments
from ..training.identity import settings_of
from ..training.loop import TrainingRun
from .arguments import TrainingDataArguments
from .model_folder import write_task
from .phases import Phase
from .tasks import TASKS, choose_rerank_weight_on


def train_task(
    data_args: TrainingDataArguments,
    args: TCLTrainingArguments,
    model: PreTrainedModel,
    processor: TCLProcessor,
    samples: Any,
    records: Sequence[dict] | None,
    answers: list[str] | None = None,
    tuning: Sequence[dict] | None = None,
    phase: Phase | None = None,
) -> dict[str, float]:
    """Train a model for a task, and save it with its processor, metrics and checkpoints.

    Args:
        samples: the data to train on, map-style or a stream.
        records: the data to evaluate on; None for no evaluation.
        answers: the answers to choose from, for a task that chooses answers.
        tuning: the data on which every evaluation first chooses the weight of the combined score, unless the arguments
            give one; None for no choice.
        phase: the phase of the run that is trained; None in a run without phases.

    Returns:
        The last line of `metrics.jsonl`.

    Raises:
        RecipeError: if a phase after this one could not be trained, or the run would replace what it starts from.
        NonFiniteError, Preempted, CheckpointWriteError, TrainingError, DataError: as in `TrainingRun.train`.
    """
    task, phase = TASKS[data_args.task], phase or Phase((data_args, None, args))
    phase.check_start(args.output_dir)
    phase.check_following(model)
    if processes().is_main_process:  # before training, so that a run that is stopped has it too
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        write_task(Path(args.output_dir), data_args)
    history, step = model.config.trained_on or [], {"task": data_args.task, "data": data_args.dataset_names}
    if phase.number == 1 or step not in history:
        model.config.trained_on = [*history, step]
    collator = task.batches.collator(data_args, model.config, processor)
    if data_args.rerank_weight is not None:
        model.config.rerank_weight = data_args.rerank_weight
    chooses_weight = bool(tuning) and data_args.rerank_weight is None and bool(model.config.itm_weight)

    def evaluate(model: PreTrainedModel) -> dict[str, float]:
        assert task.evaluate is not None and records is not None
        if tuning and chooses_weight:
            model.config.rerank_weight = choose_rerank_weight_on(model, processor, tuning, data_args)
        return task.evaluate(model, processor, records, data_args, answers or []).metrics

    pushes = args.push_to_hub and processes().is_main_process
    push = BackgroundPush(str(args.hub_model_id)) if pushes else None
    evaluation = evaluate if records else None
    of_run: dict[str, Any] = {"stop_signal": phase.stop_signal, "is_followed": not phase.is_last}
    run = TrainingRun(
        model, samples, collator, processor, args, evaluation, push, **of_run, recipe=settings_of(*phase.arguments)
    )
    metrics = run.train()
    # The last model is saved before its evaluation. The best one is saved after its own, with the weight chosen there.
    is_outdated = chooses_weight and "rerank_weight" in metrics and not args.metric_for_best_model
    if is_outdated and processes().is_main_process:
        write_rerank_weight(Path(args.output_dir), metrics["rerank_weight"])
    return metrics


def write_rerank_weight(folder: Path, rerank_weight: float) -> None:
    """Write the weight of the combined score into the config of a saved model."""
    config = folder / "config.json"
    fields = json.loads(config.read_text()) | {"rerank_weight": rerank_weight}
    replace_file(config, json.dumps(fields, indent=2, sort_keys=True) + "\n")


def command_line(name: str, argv: Sequence[str] | None) -> str:
    """The command line of a run, for its card.

    Args:
        name: the subcommand of `tcl-hf` that was run.
        argv: the arguments that it was given; None for those of a script.
    """
    if argv is None:
        return f"accelerate launch {shlex.join(sys.argv)}"
    number = processes().num_processes
    launched = f"accelerate launch --num_processes {number} -m tcl_hf" if number > 1 else "tcl-hf"
    return f"{launched} {name} {shlex.join(argv)}".rstrip()
