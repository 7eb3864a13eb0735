"""The start of a run, once its data and its model are there: kept states, projections and fusion in closed form."""

import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..data.kept_states import SamplesWithStates, keep_states
from ..models.configuration_tcl import TCLConfig
from ..models.modeling_tcl import TCLForImageTextRetrieval
from ..models.processing_tcl import TCLProcessor
from ..training.agreement import processes
from ..training.alignment import align_projections
from ..training.arguments import TCLTrainingArguments
from ..training.matching_start import multiplied_dimensions, start_matching
from ..training.precision import in_precision_of
from .arguments import ModelArguments, RecipeError, TrainingDataArguments
from .tasks import TASKS, build_augmentation

logger = logging.getLogger(__name__)


def check_kept_views(data_args: TrainingDataArguments, config: TCLConfig) -> None:
    """Refuse to keep states that cannot be kept of a model with this config.

    Raises:
        RecipeError: if the number of views is negative, no vision layer is locked, or the samples are a stream.
    """
    kept_views = data_args.kept_views
    if kept_views < 0:
        raise RecipeError(f"kept_views={kept_views} is negative: name a number of views, or 0 to read pixels.")
    if not data_args.keeps_states:
        return
    argument = f"kept_views={kept_views}" if kept_views else "plain_view=true"
    if config.lock_vision is False:
        raise RecipeError(
            f"{argument} keeps the states of locked layers, and lock_vision is false: set lock_vision in the config, "
            f"or leave out {argument.split('=')[0]}."
        )
    if getattr(data_args, "streaming", False):
        raise RecipeError(
            f"{argument} needs samples that can be read again, and a stream cannot: leave out one of both."
        )


def with_kept_states(
    data_args: TrainingDataArguments,
    args: TCLTrainingArguments,
    model: PreTrainedModel,
    processor: TCLProcessor,
    samples: Any,
    *evaluated: Any,
) -> tuple[Any, ...]:
    """The samples to train on with the states of their views, and the records to evaluate on with theirs.

    States that are not on disk yet are made, in the precision of the run. Records of tasks that need the pixels of
    their images stay as they are.

    Args:
        evaluated: data sets of records to evaluate on; one that is None stays None.

    Raises:
        RecipeError: if no vision layer is locked, or the samples are a stream.
        DataError: if states cannot be made or written, see `keep_states`.
    """
    state = processes()
    check_kept_views(data_args, model.config)
    if not hasattr(samples, "select_columns") or not hasattr(samples, "__len__"):
        raise RecipeError(
            "Kept states need samples that can be read again, and a stream cannot: leave out kept_views and plain_view."
        )
    vision_model = model.tcl.vision_model.to(state.device).eval()

    def encode(pixels: Tensor) -> Tensor:
        with in_precision_of(args):
            return vision_model.encode_locked(pixels.to(state.device))

    def keep(dataset: Any, num_views: int) -> SamplesWithStates:
        return keep_states(
            dataset,
            vision_model,
            encode,
            processor,
            build_augmentation(data_args, processor) if num_views else None,
            num_views,
            data_args.kept_states_dir,
            plain_view=data_args.plain_view,
            batch_size=data_args.per_device_eval_batch_size,
            num_workers=args.dataloader_num_workers,
            rank=state.process_index,
            world_size=state.num_processes,
            wait=state.wait_for_everyone,
        )

    samples = keep(samples, data_args.kept_views)
    if TASKS[data_args.task].evaluates_states:
        evaluated = tuple(records if records is None else keep(records, 0) for records in evaluated)
    return samples, *evaluated


def _check_read_twice(samples: Any, argument: str) -> None:
    """Refuse a stream for an argument that reads the samples before training."""
    if not hasattr(samples, "__len__"):
        raise RecipeError(f"{argument} needs samples that can be read twice: leave it out for a stream.")


def check_fusion_start(model_args: ModelArguments, model: Any) -> None:
    """Refuse a `fusion_start` that the model cannot have.

    Raises:
        TrainingError: naming what the model lacks.
    """
    if model_args.fusion_start == "similarity":
        multiplied_dimensions(model.tcl)


def start_fusion(
    data_args: TrainingDataArguments, model: TCLForImageTextRetrieval, processor: TCLProcessor, samples: Any
) -> None:
    """Start the fusion layer in closed form from the samples, see `start_matching`.

    Args:
        data_args: lengths of texts and batches.
        model, processor, samples: those of the run.

    Raises:
        RecipeError: if the samples are a stream.
        TrainingError: if the model has no single fusion layer of enough width, or there are too few samples.
    """
    _check_read_twice(samples, "fusion_start=similarity")
    device = processes().device
    options = {"max_tokens": data_args.max_tokens, "batch_size": data_args.per_device_eval_batch_size}
    correlation = start_matching(model.to(device), processor, samples, **options)  # type: ignore[arg-type]
    logger.info("The log-odds of matching start with a correlation of %.3f to the similarities.", correlation)


def start_projections(
    data_args: TrainingDataArguments,
    args: TCLTrainingArguments,
    model: PreTrainedModel,
    processor: TCLProcessor,
    samples: Any,
    ridges: Sequence[float] = (0.1, 0.1),
) -> None:
    """Start the projections in closed form from the samples.

    Args:
        ridges: those for images and for texts, see `correlated_maps`.

    Raises:
        RecipeError: if the samples are a stream.
        TrainingError: if there are too few of them.
    """
    state = processes()
    _check_read_twice(samples, "projection_start=cca")
    with in_precision_of(args):
        align_projections(
            model.to(state.device),
            processor,
            samples,
            ridge=ridges[0],
            text_ridge=ridges[1],
            max_tokens=data_args.max_tokens,
            batch_size=data_args.per_device_eval_batch_size,
            progress=state.is_main_process,
        )
