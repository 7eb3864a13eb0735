"""The results of an evaluation: the protocol they were measured by, and the files that hold them."""

import json
import logging
from pathlib import Path

from ..evaluation.protocol import EvaluationProtocol
from ..evaluation.shares import Evaluation
from ..models.configuration_tcl import TCLConfig
from ..models.whole_files import replace_file
from .arguments import DataArguments
from .tasks import TASKS

logger = logging.getLogger(__name__)

_FACTS = {
    "k": "eval_k",
    "heat": "heat",
    "templates": "templates",
}  # what a protocol states for some tasks, and the arguments that hold it


def protocol_name(config: TCLConfig, task: str, dataset_name: str) -> str:
    """The name of an evaluation's protocol, by what the model has learned from.

    `finetuned` if the model was fine-tuned for the task on the data set itself, `pretrained_on_<data>` if it has seen
    the data set in other training only, `zero_shot_from_<data>` if it was fine-tuned for the task on another set, else
    `zero_shot`. (The paper's "zero-shot" Flickr30k numbers are those of a COCO-tuned model: `zero_shot_from_coco`.)
    """
    history = config.trained_on or []
    tuned_on = [name for step in history if step["task"] == task for name in step["data"]]
    if dataset_name in tuned_on:
        return "finetuned"
    if any(dataset_name in step["data"] for step in history):
        return f"pretrained_on_{dataset_name}"
    return f"zero_shot_from_{tuned_on[-1]}" if tuned_on else "zero_shot"


def evaluation_protocol(
    args: DataArguments, config: TCLConfig, num_records: int, num_classes: int = 0
) -> EvaluationProtocol:
    """The protocol of an evaluation as the arguments describe it.

    Args:
        config: the model's.
        num_records: number of records that were evaluated.
        num_classes: number of classes that the records name; 0 for records without such names.
    """
    row, dataset = TASKS[args.task], args.dataset_names[0]
    task = args.task if row.is_downstream else "retrieval"
    return EvaluationProtocol(
        task=task,
        dataset=dataset,
        split=getattr(args, "held_out", "") or args.validation_split,
        records=num_records,
        protocol=protocol_name(config, task, dataset),
        resolution=config.vision_config.image_size,
        classes=num_classes or None,
        images_shuffled=getattr(args, "shuffle_images", False),
        **{fact: getattr(args, option) for fact, option in _FACTS.items() if option in row.options},
    )


def write_results(folder: Path, evaluation: Evaluation, protocol: EvaluationProtocol, is_cut: bool = False) -> None:
    """Write `evaluation.json`, `predictions.json`, and the task's result files for a server.

    Args:
        is_cut: the evaluation had a limit of samples, so that nothing is written for a server.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = protocol.to_dict() | {"images_shuffled": protocol.images_shuffled, "metrics": evaluation.metrics}
    replace_file(folder / "evaluation.json", json.dumps(content, indent=2) + "\n")
    if evaluation.predictions:
        replace_file(folder / "predictions.json", json.dumps(evaluation.predictions) + "\n")
    if is_cut and TASKS[protocol.task].result_files:
        names = ", ".join(TASKS[protocol.task].result_files)
        logger.warning("%s is not written, because eval_images limits the evaluation: leave it out.", names)
        return
    for name, content_of in TASKS[protocol.task].result_files.items():
        replace_file(folder / name, json.dumps(content_of(evaluation.predictions)) + "\n")
