"""Evaluate TCL on a task: `accelerate launch scripts/evaluate.py --model FOLDER --task NAME --data SOURCE ...`.

`--recipe FILE` takes task, data and limits from a recipe of fine-tuning.
"""

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import Accelerator
from transformers import set_seed

from tcl_hf.data.pairs import DataError
from tcl_hf.recipes.arguments import ModelArguments, RecipeError, parse_recipe
from tcl_hf.recipes.build import open_model
from tcl_hf.recipes.report import PREDICTIONS, prediction_sheet, task_table
from tcl_hf.recipes.tasks import (
    TASKS,
    TaskArguments,
    add_words,
    candidate_answers,
    load_task,
    shuffle_images,
    statement,
    write_results,
)
from tcl_hf.sharing.cards import add_results
from tcl_hf.training.arguments import TCLTrainingArguments

DEFAULT_RECIPE = "easy_vqa"


@dataclass
class EvaluationArguments:
    """How to evaluate."""

    results: str | None = field(default=None, metadata={"help": "Folder for the results; that of the model if None."})
    shuffle_images: bool = field(
        default=False, metadata={"help": "Give each record the image of another: what is reached by reading alone."}
    )


def main() -> None:
    types = (TaskArguments, ModelArguments, TCLTrainingArguments, EvaluationArguments)
    data, parts, args, how = parse_recipe(types, DEFAULT_RECIPE)
    task = TASKS[data.task]
    if task.evaluate is None:
        raise RecipeError(f"The task {data.task} has nothing to evaluate: fine-tune its model for another one.")
    set_seed(args.seed)
    accelerator = Accelerator()
    model, processor = open_model(parts, task.model_class, to_train=False)
    records = load_task(data, validation=True)
    if data.add_words:
        add_words(model, processor, records)  # a fine-tuned model has them
    answers = candidate_answers(data, None, parts.model)
    if how.shuffle_images:
        records = shuffle_images(records)
    evaluation = task.evaluate(model.to(accelerator.device), processor, records, data, answers)
    if accelerator.is_main_process:
        said = statement(data, model.config, data.dataset_name, data.task, len(records))
        said["images_shuffled"] = how.shuffle_images
        folder = Path(how.results or parts.model)
        write_results(folder, evaluation, said)
        if not how.shuffle_images:
            add_results(folder, data.task, evaluation.metrics, said)
        if evaluation.predictions:
            prediction_sheet(records, evaluation.predictions, folder / PREDICTIONS)
        print(task_table(evaluation.metrics, said))
        print(f"Metrics and predictions are in {folder}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for chatty in ("accelerate", "httpx", "httpx2"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        main()
    except (DataError, RecipeError) as error:
        sys.exit(f"error: {error}")
