"""Evaluate TCL on a task: `tcl-hf evaluate --model FOLDER [--data SOURCE] [--name value ...]`.

The model brings its task, its answers and the arguments of its evaluation. `--recipe NAME` takes task and data from a
recipe of fine-tuning instead, and passes over what only training reads. With `--bf16` or `--fp16` the forward passes
are in that precision, else in float32.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from transformers import set_seed

from ..data.annotations.classification import class_names_of
from ..data.sampling import shuffle_images
from ..recipes.arguments import RecipeError
from ..recipes.build import add_words, candidate_answers, load_evaluation_data, open_model, readable_records
from ..recipes.model_folder import results_folder
from ..recipes.parsing import EVALUATE, parse_recipe, parser_of
from ..recipes.report import PREDICTIONS, prediction_sheet, task_table
from ..recipes.results import evaluation_protocol, write_results
from ..recipes.tasks import TASKS
from ..sharing.cards import add_results
from ..training.precision import in_precision_of
from .command_line import command


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    return parser_of(EVALUATE)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate a checkpoint, and leave metrics and predictions beside it or in the folder `--results`."""
    data_args, checkpoint_args, training_args, args = parse_recipe(EVALUATE, argv)
    task = TASKS[data_args.task]
    if task.evaluate is None:
        raise RecipeError(f"The task {data_args.task} has nothing to evaluate: fine-tune its model for another one.")
    set_seed(training_args.seed)
    accelerator = Accelerator()
    model, processor = open_model(checkpoint_args, task.model_class, to_train=False)
    records = load_evaluation_data(data_args)
    if data_args.add_words:
        add_words(model, processor, records)  # a fine-tuned model has them already
    records = readable_records(records, task, data_args, model, processor)
    classes = class_names_of(records)
    answers = classes or candidate_answers(data_args, None, checkpoint_args.model)
    if data_args.shuffle_images:
        records = shuffle_images(records)
    with in_precision_of(training_args):
        evaluation = task.evaluate(model.to(accelerator.device), processor, records, data_args, answers)
    if accelerator.is_main_process:
        protocol = evaluation_protocol(data_args, model.config, len(records), len(classes))
        folder = Path(args.results) if args.results else results_folder(str(checkpoint_args.model))
        write_results(folder, evaluation, protocol, is_cut=data_args.eval_images > 0)
        if not data_args.shuffle_images:
            add_results(folder, task.result_type, evaluation.metrics, protocol)
        if evaluation.predictions:
            prediction_sheet(records, evaluation.predictions, folder / PREDICTIONS)
        print(task_table(evaluation.metrics, protocol))
        print(f"Metrics and predictions are in {folder}")
