"""Plan a pre-training run from its recipe: `python scripts/plan.py --recipe FILE [--num_gpus 8] [--name value ...]`.

Prints parameters, memory on each GPU, size of checkpoints and, if it is told how fast the GPUs are, the time; with
`--operations true` also operations, bytes and activations by part. It reads nothing but the recipe: encoders that it
starts from count at the sizes that its config gives, or else the paper's.
"""

import logging
import sys

from tcl_hf import TCLConfig
from tcl_hf.recipes.arguments import DataArguments, ModelArguments, RecipeError, parse_recipe
from tcl_hf.training.arguments import TCLTrainingArguments
from tcl_hf.training.planning import PlanArguments, describe, describe_operations

DEFAULT_RECIPE = "tcl_4m"


def config_of(parts: ModelArguments) -> TCLConfig:
    if parts.model is not None:
        return TCLConfig.from_pretrained(parts.model, image_size=parts.image_size)
    fields = dict(parts.config_fields)
    text = {"vocab_size": parts.vocab_size}
    if parts.fusion_layer is not None:
        text |= {"fusion_layer": parts.fusion_layer, "num_hidden_layers": parts.fusion_layer + parts.num_fusion_layers}
    fields["text_config"] = text | fields.get("text_config", {})
    fields["vision_config"] = {"image_size": parts.image_size or 256} | fields.get("vision_config", {})
    return TCLConfig(**fields)


def main() -> None:
    types = (DataArguments, ModelArguments, TCLTrainingArguments, PlanArguments)
    data, parts, args, plan = parse_recipe(types, DEFAULT_RECIPE)
    precision = args.mixed_precision or "bf16"
    config = config_of(parts)
    print(describe(config, args.per_device_train_batch_size, data.max_tokens, precision, args.num_train_epochs, plan))
    if plan.operations:
        print("\n" + describe_operations(config, args.per_device_train_batch_size, data.max_tokens, precision, plan))


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    try:
        main()
    except RecipeError as error:
        sys.exit(f"error: {error}")
