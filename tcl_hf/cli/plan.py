"""Plan a pre-training run: `tcl-hf plan [--recipe NAME] [--num_gpus 8] [--name value ...]`.

It prints parameters, memory on each GPU, the size of checkpoints and, given the speed of the GPUs, the time; with
`--operations true` also operations, bytes and activations by part. Each phase of a run has a plan of its own. It reads
nothing but the recipe: encoders that a run starts from count at the sizes that the recipe's config gives, or else at
the paper's.
"""

import argparse
from collections.abc import Sequence

from ..models.configuration_tcl import TCLConfig
from ..recipes.arguments import ModelArguments, PretrainingDataArguments, RecipeError
from ..recipes.build import config_of_checkpoint
from ..recipes.parsing import PLAN, parser_of
from ..recipes.phases import parse_phases
from ..recipes.starting import check_kept_views
from ..training.arguments import TCLTrainingArguments
from ..training.planning import PlanArguments, describe
from .command_line import command


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    return parser_of(PLAN)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Print the plan of the pre-training that the recipe and the command line describe."""
    for phase in parse_phases(PLAN, argv):
        try:
            plan = _plan_of(*phase.arguments)
        except RecipeError as error:
            raise RecipeError(f"{phase.place}{error}") from error
        print(f"## {phase.title}\n\n{plan}\n" if phase.place else plan)


def _plan_of(
    data_args: PretrainingDataArguments, model_args: ModelArguments, args: TCLTrainingArguments, plan: PlanArguments
) -> str:
    """The plan of a run, or of a phase, as Markdown."""
    config = planned_config(model_args)
    check_kept_views(data_args, config)
    batch_size, precision = args.per_device_train_batch_size, args.mixed_precision or "no"
    kept_views = data_args.kept_views if data_args.keeps_states else None
    return describe(config, batch_size, data_args.max_tokens, precision, args.num_train_epochs, plan, kept_views)


def planned_config(args: ModelArguments) -> TCLConfig:
    """The config of the model that the arguments describe, without reading data or encoders.

    Raises:
        RecipeError: if there is no checkpoint `args.model`, or the fields contradict each other.
    """
    try:
        if args.model is not None:
            return config_of_checkpoint(args)
        text = {"vocab_size": args.vocab_size}
        if args.fusion_layer is not None:
            num_layers = args.fusion_layer + args.num_fusion_layers
            text |= {"fusion_layer": args.fusion_layer, "num_hidden_layers": num_layers}
        text |= args.config_fields.get("text_config", {})
        vision = {"image_size": args.image_size or 256} | args.config_fields.get("vision_config", {})
        return TCLConfig(**args.config_fields | {"text_config": text, "vision_config": vision})
    except (ValueError, TypeError, OSError) as error:
        raise RecipeError(f"The model cannot be planned: {error}") from error
