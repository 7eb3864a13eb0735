"""Pre-train TCL: `accelerate launch scripts/pretrain.py [--recipe FILE] [--name value ...]`."""

import sys
from pathlib import Path

from transformers import set_seed

from tcl_hf.data import DataError, load_pairs
from tcl_hf.evaluation import evaluate_retrieval
from tcl_hf.recipes import DataArguments, ModelArguments, RecipeError, build_collator, build_model, parse_recipe
from tcl_hf.training import NonFiniteError, TrainingArguments, train

RECIPES = Path(__file__).parent / "recipes"


def main() -> None:
    data, parts, args = parse_recipe((DataArguments, ModelArguments, TrainingArguments), RECIPES / "openmoji.yaml")
    set_seed(args.seed)
    columns = {"image_root": data.image_root, "image_column": data.image_column, "caption_column": data.caption_column}
    pairs = load_pairs(data.data, data.split, streaming=data.streaming, **columns)
    model, processor = build_model(parts, (text for record in pairs for text in record["captions"]))
    evaluate = None
    if data.validation_split:
        held_out = load_pairs(data.validation_data or data.data, data.validation_split, **columns)
        records = list(held_out.take(data.eval_images))

        def evaluate(model):
            return evaluate_retrieval(model, processor, records, k=data.eval_k, captions_per_image=1)

    train(model, pairs, build_collator(data, model.config, processor), processor, args, evaluate)


if __name__ == "__main__":
    try:
        main()
    except (DataError, RecipeError, NonFiniteError) as error:
        sys.exit(f"error: {error}")
