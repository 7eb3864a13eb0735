"""Fine-tune TCL for a task: `accelerate launch -m tcl_hf.recipes.finetune --recipe NAME [--name value ...]`."""

import json
from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState
from transformers import set_seed

from ..data.sampling import SharedImages
from ..training.adapters import describe_lora
from .arguments import RecipeError
from .build import ANSWERS, add_words, candidate_answers, load_evaluation_data, load_split, open_model
from .command_line import command
from .parsing import FINETUNE, parse_recipe
from .report import Run, write_finetuning_report
from .results import evaluation_protocol
from .starting import with_kept_states
from .tasks import TASKS
from .train import command_line, train_task


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Fine-tune a checkpoint as the recipe and the command line say, and leave model, metrics and card."""
    data_args, checkpoint_args, args = parse_recipe(FINETUNE, argv)
    task, output_dir = TASKS[data_args.task], Path(args.output_dir)
    if task.batches is None:
        raise RecipeError(f"The task {data_args.task} is evaluated without training: run evaluate.py for it.")
    set_seed(args.seed)
    model, processor = open_model(checkpoint_args, task.model_class)
    samples = load_split(data_args, data_args.data, data_args.split)
    records = load_evaluation_data(data_args) if data_args.validation_split and task.evaluate else None
    if data_args.add_words:
        add_words(model, processor, samples)
    answers = candidate_answers(data_args, samples)
    if answers and PartialState().is_main_process:  # before training, so that a run that is stopped has them too
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / ANSWERS).write_text(json.dumps(answers, ensure_ascii=False) + "\n")
    if data_args.kept_views:
        samples, records = with_kept_states(data_args, args, model, processor, samples, records)
    visited = SharedImages(samples) if data_args.share_images else samples
    metrics = train_task(data_args, args, model, processor, visited, records, answers)
    if PartialState().is_main_process:
        protocol = evaluation_protocol(data_args, model.config, len(records or ()))
        amount, started_by = f"{len(samples)} samples", command_line("finetune", argv)
        lora = {"lora": describe_lora(model), "lora_save": args.lora_save}
        run = Run(data_args, amount, [checkpoint_args.model], started_by, output_dir, protocol, **lora)
        print(write_finetuning_report(run, metrics, args.metric_for_best_model, records))
        print(f"Model, processor, metrics and card are in {output_dir}")


if __name__ == "__main__":
    main()
