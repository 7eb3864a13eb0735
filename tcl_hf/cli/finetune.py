"""Fine-tune TCL for a task: `tcl-hf finetune [--recipe NAME] [--name value ...]`."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from transformers import set_seed

from ..data.sampling import SharedImages, shuffle_images
from ..models.whole_files import replace_file
from ..recipes.arguments import RecipeError
from ..recipes.build import add_words, candidate_answers, load_split, open_model, readable_records, with_held_out
from ..recipes.model_folder import ANSWERS
from ..recipes.parsing import FINETUNE, parser_of
from ..recipes.phases import Phase, run_phases
from ..recipes.report import Run, write_finetuning_report
from ..recipes.results import evaluation_protocol
from ..recipes.starting import with_kept_states
from ..recipes.tasks import TASKS
from ..recipes.train import command_line, train_task
from ..training.adapters import describe_lora
from ..training.agreement import processes
from ..training.interruption import StopSignal
from ..training.run_folder import tokenizer_of_run
from .command_line import command


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    return parser_of(FINETUNE)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Fine-tune a checkpoint as the recipe and the command line say, and leave model, metrics and card."""
    run_phases(FINETUNE, argv, lambda phase: _train(phase, command_line("finetune", argv)))


def _train(phase: Phase, started_by: str) -> None:
    """Train a phase of a run, or the whole run; the last phase leaves the report."""
    data_args, checkpoint_args, args = phase.arguments
    task, output_dir = TASKS[data_args.task], Path(args.output_dir)
    if task.batches is None:
        raise RecipeError(f"The task {data_args.task} is evaluated without training: run `tcl-hf evaluate` for it.")
    set_seed(args.seed)
    model, processor = open_model(checkpoint_args, task.model_class, tokenizer=tokenizer_of_run(args))
    samples = load_split(data_args, data_args.data, data_args.split)
    samples, records = with_held_out(data_args, samples) if task.evaluate else (samples, None)
    if data_args.shuffle_images:
        samples, records = shuffle_images(samples), records and shuffle_images(records)
    if data_args.add_words:
        add_words(model, processor, samples)
    if records:
        records = readable_records(records, task, data_args, model, processor)
    answers = candidate_answers(data_args, samples)
    if answers and processes().is_main_process:  # before training, so that a run that is stopped has them too
        output_dir.mkdir(parents=True, exist_ok=True)
        replace_file(output_dir / ANSWERS, json.dumps(answers, ensure_ascii=False) + "\n")
    if data_args.keeps_states:
        samples, records = with_kept_states(data_args, args, model, processor, samples, records)
    visited = SharedImages(samples) if data_args.share_images else samples
    metrics = train_task(data_args, args, model, processor, visited, records, answers, phase=phase)
    if not phase.is_last or not processes().is_main_process:
        return
    with StopSignal():  # A signal to stop comes too late, and the report is soon written.
        protocol = evaluation_protocol(data_args, model.config, len(records or ()))
        amount = f"{len(samples)} samples"
        lora = {"lora": describe_lora(model), "lora_save": args.lora_save}
        run = Run(data_args, amount, phase.base_models, started_by, output_dir, protocol, **lora, phase=phase)
        print(write_finetuning_report(run, metrics, args.metric_for_best_model, records))
        print(f"Model, processor, metrics and card are in {output_dir}")
