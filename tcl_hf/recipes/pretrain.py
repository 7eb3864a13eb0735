"""Pre-train TCL: `accelerate launch -m tcl_hf.recipes.pretrain [--recipe NAME] [--name value ...]`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import set_seed

from ..data.pairs import captions_of
from ..training.adapters import describe_lora
from .baselines import measure_baselines
from .build import build_model, cut_off_tuning_data, load_pretraining_data
from .command_line import command
from .parsing import PRETRAIN, parse_recipe
from .report import Run, write_pretraining_report
from .results import evaluation_protocol
from .starting import start_projections, with_kept_states
from .train import command_line, train_task


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Pre-train a model as the recipe and the command line say, and leave model, metrics, pictures and card."""
    data_args, model_args, args = parse_recipe(PRETRAIN, argv)
    set_seed(args.seed)
    pairs: Any
    pairs, records = load_pretraining_data(data_args)
    tuning = None
    if records:  # the settings are chosen by evaluations
        pairs, tuning = cut_off_tuning_data(data_args, pairs)
    model, processor = build_model(model_args, captions_of(pairs))
    if data_args.kept_views:
        pairs, records, tuning = with_kept_states(data_args, args, model, processor, pairs, records, tuning)
    if model_args.projection_start == "cca" and not args.resume:
        start_projections(data_args, args, model, processor, pairs, model_args.projection_ridge)
    metrics = train_task(data_args, args, model, processor, pairs, records, tuning=tuning)
    if not PartialState().is_main_process:
        return
    if records:
        if args.average_weights:  # The pictures are those of the model that was saved.
            model = type(model).from_pretrained(args.output_dir).to(model.device)
        amount = "a stream of samples" if data_args.streaming else f"{len(pairs)} samples"
        bases = [name for name in (model_args.model, model_args.vision_model, model_args.text_model) if name]
        protocol = evaluation_protocol(data_args, model.config, len(records))
        lora = {"lora": describe_lora(model), "lora_save": args.lora_save}
        run = Run(data_args, amount, bases, command_line("pretrain", argv), Path(args.output_dir), protocol, **lora)
        baselines = measure_baselines(data_args, model_args, args, pairs, records)
        num_tuning = len(tuning or ()) if data_args.rerank_weight is None else 0
        texts, others = data_args.free_texts, [tuning or [], [] if data_args.streaming else pairs]
        print(write_pretraining_report(run, model, processor, records, metrics, baselines, num_tuning, texts, others))
    print(f"Model, processor, metrics and card are in {args.output_dir}")


if __name__ == "__main__":
    main()
