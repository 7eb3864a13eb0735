"""Pre-train TCL: `tcl-hf pretrain [--recipe NAME] [--name value ...]`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import set_seed

from ..data.pairs import captions_of
from ..recipes.baselines import measure_baselines
from ..recipes.build import build_model, cut_off_tuning_data, load_pretraining_data
from ..recipes.parsing import PRETRAIN, parser_of
from ..recipes.phases import Phase, run_phases
from ..recipes.report import Run, write_pretraining_report
from ..recipes.results import evaluation_protocol
from ..recipes.starting import check_fusion_start, start_fusion, start_projections, with_kept_states
from ..recipes.train import command_line, train_task
from ..training.adapters import describe_lora
from ..training.agreement import processes
from ..training.interruption import StopSignal
from ..training.run_folder import tokenizer_of_run
from .command_line import command


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    return parser_of(PRETRAIN)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Pre-train a model as the recipe and the command line say, and leave model, metrics, pictures and card."""
    run_phases(PRETRAIN, argv, lambda phase: _train(phase, command_line("pretrain", argv)))


def _train(phase: Phase, started_by: str) -> None:
    """Train a phase of a run, or the whole run; the last phase leaves the report."""
    data_args, model_args, args = phase.arguments
    set_seed(args.seed)
    pairs: Any
    pairs, records = load_pretraining_data(data_args)
    tuning = None
    if records:  # the settings are chosen by evaluations
        pairs, tuning = cut_off_tuning_data(data_args, pairs)
    model, processor = build_model(model_args, captions_of(pairs), tokenizer_of_run(args))
    check_fusion_start(model_args, model)
    if data_args.keeps_states:
        pairs, records, tuning = with_kept_states(data_args, args, model, processor, pairs, records, tuning)
    if model_args.projection_start == "cca" and not args.resume:
        start_projections(data_args, args, model, processor, pairs, model_args.projection_ridge)
    if model_args.fusion_start == "similarity" and not args.resume:
        start_fusion(data_args, model, processor, pairs)
    metrics = train_task(data_args, args, model, processor, pairs, records, tuning=tuning, phase=phase)
    if not phase.is_last or not processes().is_main_process:
        return
    with StopSignal():  # A signal to stop comes too late, and the report is soon written.
        if records:
            if args.average_weights:  # The pictures are those of the model that was saved.
                model = type(model).from_pretrained(args.output_dir).to(model.device)
            amount = "a stream of samples" if data_args.streaming else f"{len(pairs)} samples"
            protocol = evaluation_protocol(data_args, model.config, len(records))
            lora = {"lora": describe_lora(model), "lora_save": args.lora_save}
            folder = Path(args.output_dir)
            run = Run(data_args, amount, phase.base_models, started_by, folder, protocol, **lora, phase=phase)
            baselines = measure_baselines(data_args, phase.start, args, pairs, records)
            num_tuning = len(tuning or ()) if data_args.rerank_weight is None else 0
            texts, others = data_args.free_texts, [tuning or [], [] if data_args.streaming else pairs]
            print(
                write_pretraining_report(run, model, processor, records, metrics, baselines, num_tuning, texts, others)
            )
        print(f"Model, processor, metrics and card are in {args.output_dir}")
