"""Fine-tune TCL for a task: `accelerate launch scripts/finetune.py --recipe FILE [--name value ...]`."""

import json
import logging
import sys
from pathlib import Path

from accelerate import PartialState
from transformers import set_seed

from tcl_hf.data.pairs import DataError
from tcl_hf.data.sampling import SharedImages
from tcl_hf.recipes.arguments import ModelArguments, RecipeError, parse_recipe
from tcl_hf.recipes.build import open_model
from tcl_hf.recipes.report import Run, write_task_report
from tcl_hf.recipes.tasks import (
    ANSWERS,
    TASKS,
    TaskArguments,
    add_words,
    build_task_collator,
    candidate_answers,
    load_task,
    statement,
)
from tcl_hf.training.arguments import TCLTrainingArguments, TrainingError
from tcl_hf.training.checkpoints import CheckpointWriteError
from tcl_hf.training.guard import NonFiniteError
from tcl_hf.training.loop import train

DEFAULT_RECIPE = "easy_vqa"


def main() -> None:
    data, parts, args = parse_recipe((TaskArguments, ModelArguments, TCLTrainingArguments), DEFAULT_RECIPE)
    task, output_dir = TASKS[data.task], Path(args.output_dir)
    set_seed(args.seed)
    model, processor = open_model(parts, task.model_class)
    records = load_task(data)
    held_out = load_task(data, validation=True) if data.validation_split and task.evaluate else None
    if data.add_words:
        add_words(model, processor, records)
    answers = candidate_answers(data, records)
    if answers and PartialState().is_main_process:  # with the model, also if the run is stopped
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / ANSWERS).write_text(json.dumps(answers, ensure_ascii=False) + "\n")
    model.config.trained_on = [*(model.config.trained_on or []), {"task": data.task, "data": [data.dataset_name]}]
    collator = build_task_collator(data, model.config, processor)

    def evaluate(model):
        return task.evaluate(model, processor, held_out, data, answers).metrics

    items = SharedImages(records) if data.share_images else records
    metrics = train(model, items, collator, processor, args, evaluate if held_out else None)

    if PartialState().is_main_process:
        said = statement(data, model.config, data.dataset_name, data.task, len(held_out) if held_out else 0)
        run = Run([data.dataset_name], len(records), [parts.model], " ".join(["accelerate launch", *sys.argv]))
        print(
            write_task_report(
                output_dir, metrics, said, run, args.metric_for_best_model, held_out[0] if held_out else None
            )
        )
        print(f"Model, processor, metrics and card are in {output_dir}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for chatty in ("accelerate", "httpx", "httpx2"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        main()
    except (CheckpointWriteError, DataError, RecipeError, TrainingError, NonFiniteError) as error:
        sys.exit(f"error: {error}")
