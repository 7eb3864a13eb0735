"""Pre-train TCL: `accelerate launch -m tcl_hf.recipes.pretrain [--recipe NAME] [--name value ...]`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import set_seed

from ..data.pairs import captions_of
from ..evaluation.baselines import ridge_baseline
from ..training.adapters import describe_lora
from .build import build_model, load_pretraining_data
from .command_line import command
from .parsing import PRETRAIN, parse_recipe
from .report import Run, write_pretraining_report
from .results import evaluation_protocol
from .train import command_line, train_task


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Pre-train a model as the recipe and the command line say, and leave model, metrics, pictures and card."""
    data_args, model_args, args = parse_recipe(PRETRAIN, argv)
    set_seed(args.seed)
    pairs: Any
    pairs, records = load_pretraining_data(data_args)
    model, processor = build_model(model_args, captions_of(pairs))
    metrics = train_task(data_args, args, model, processor, pairs, records)
    if not PartialState().is_main_process:
        return
    if records:
        amount = "a stream of samples" if data_args.streaming else f"{len(pairs)} samples"
        bases = [name for name in (model_args.model, model_args.vision_model, model_args.text_model) if name]
        protocol = evaluation_protocol(data_args, model.config, len(records))
        lora = {"lora": describe_lora(model), "lora_save": args.lora_save}
        run = Run(data_args, amount, bases, command_line("pretrain", argv), Path(args.output_dir), protocol, **lora)
        is_embedded = data_args.data == ["openmoji"] and not data_args.streaming
        baseline = ridge_baseline(list(pairs), records) if is_embedded else None
        print(write_pretraining_report(run, model, processor, records, metrics, baseline))
    print(f"Model, processor, metrics and card are in {args.output_dir}")


if __name__ == "__main__":
    main()
