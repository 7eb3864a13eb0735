"""Pre-train TCL: `accelerate launch scripts/pretrain.py [--recipe FILE] [--name value ...]`."""

import logging
import sys
from pathlib import Path

from accelerate import PartialState
from transformers import set_seed

from tcl_hf.data.pairs import DataError, captions_of
from tcl_hf.evaluation.baselines import ridge_baseline
from tcl_hf.evaluation.retrieval import evaluate_retrieval
from tcl_hf.recipes.arguments import DataArguments, ModelArguments, RecipeError, parse_recipe
from tcl_hf.recipes.build import build_collator, build_model, load_data, name_of
from tcl_hf.recipes.report import Run, write_report
from tcl_hf.recipes.tasks import statement
from tcl_hf.training.arguments import TCLTrainingArguments, TrainingError
from tcl_hf.training.checkpoints import CheckpointWriteError
from tcl_hf.training.guard import NonFiniteError
from tcl_hf.training.loop import train

DEFAULT_RECIPE = "openmoji"


def main() -> None:
    data, parts, args = parse_recipe((DataArguments, ModelArguments, TCLTrainingArguments), DEFAULT_RECIPE)
    set_seed(args.seed)
    pairs, records = load_data(data)
    model, processor = build_model(parts, captions_of(pairs))
    names = [name_of([source]) for source in data.data]
    learned = {"task": "pretraining", "data": names}
    model.config.trained_on = [*(model.config.trained_on or []), learned]
    collator = build_collator(data, model.config, processor)

    def evaluate(model):
        return evaluate_retrieval(model, processor, records, k=data.eval_k, captions_per_image=1)

    metrics = train(model, pairs, collator, processor, args, evaluate if records else None)

    if not PartialState().is_main_process:
        return
    if records:
        bases = [name for name in (parts.model, parts.vision_model, parts.text_model) if name]
        command = " ".join(["accelerate launch", *sys.argv])
        run = Run(names, None if data.streaming else len(pairs), bases, command)
        said = statement(data, model.config, names[0], "retrieval", len(records))
        embedded = data.data == ["openmoji"] and not data.streaming
        baseline = ridge_baseline(list(pairs), records) if embedded else None
        print(write_report(model, processor, records, metrics, said, run, Path(args.output_dir), baseline))
    print(f"Model, processor, metrics and card are in {args.output_dir}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for chatty in ("accelerate", "httpx", "httpx2"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        main()
    except (CheckpointWriteError, DataError, RecipeError, TrainingError, NonFiniteError) as error:
        sys.exit(f"error: {error}")
