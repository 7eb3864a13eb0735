"""Evaluate TCL on a task: `accelerate launch -m tcl_hf.recipes.evaluate --model FOLDER --task NAME --data SOURCE ...`.

`--recipe NAME` takes task, data and limits from a recipe of fine-tuning, and passes over what only training reads. With
`--bf16` or `--fp16` the forward passes are in that precision, else in float32.
"""

import random
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from transformers import set_seed

from ..data.annotations.classification import class_names_of
from ..sharing.cards import add_results
from ..training.precision import in_precision_of
from .arguments import RecipeError
from .build import add_words, candidate_answers, load_evaluation_data, open_model
from .command_line import command
from .parsing import EVALUATE, parse_recipe
from .report import PREDICTIONS, prediction_sheet, task_table
from .results import evaluation_protocol, write_results
from .tasks import TASKS


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
    classes = class_names_of(records)
    answers = classes or candidate_answers(data_args, None, checkpoint_args.model)
    if args.shuffle_images:
        records = shuffle_images(records)
    with in_precision_of(training_args):
        evaluation = task.evaluate(model.to(accelerator.device), processor, records, data_args, answers)
    if accelerator.is_main_process:
        protocol = evaluation_protocol(data_args, model.config, len(records), args.shuffle_images, len(classes))
        folder = Path(args.results or checkpoint_args.model)
        write_results(folder, evaluation, protocol)
        if not args.shuffle_images:
            add_results(folder, task.result_type, evaluation.metrics, protocol)
        if evaluation.predictions:
            prediction_sheet(records, evaluation.predictions, folder / PREDICTIONS)
        print(task_table(evaluation.metrics, protocol))
        print(f"Metrics and predictions are in {folder}")


def shuffle_images(records: Sequence[dict], seed: int = 0) -> list[dict]:
    """The records, each with the image of another one, to measure what the texts alone allow."""
    order = list(range(len(records)))
    random.Random(seed).shuffle(order)
    neighbour = dict(zip(order, [*order[1:], *order[:1]], strict=True))
    column = "images" if "images" in records[0] else "image"
    return [record | {column: records[neighbour[row]][column]} for row, record in enumerate(records)]


if __name__ == "__main__":
    main()
