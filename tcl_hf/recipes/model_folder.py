"""The files in a model's folder that say how it is evaluated: `task.json`, which a run leaves, and `answers.json`."""

import json
import logging
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from ..models.whole_files import replace_file
from ..training.adapters import config_of
from .arguments import DataArguments, FinetuningDataArguments, RecipeError
from .tasks import TASKS

logger = logging.getLogger(__name__)

TASK = "task.json"  # how the model is evaluated: its task, and arguments of the evaluation
ANSWERS = "answers.json"  # beside a model that chooses among answers
_OF_MODEL = ("eval_k", "eval_captions", "eval_max_tokens", "heat", "heat_layer", "templates")
_OF_DATA = ("data", "validation_data", "validation_split", "dataset_name", "eval_captions")
_EMBEDDED = {"openmoji", *(name for row in TASKS.values() for name in row.embedded)}


def write_task(folder: Path, args: DataArguments) -> None:
    """Write how a model is evaluated into its folder: arguments that differ from the defaults.

    The data is named if the package contains it. Other data is not, because the folder may be shared.
    """
    sources = {*args.data, *args.validation_data}
    names = (*_OF_MODEL, *_OF_DATA) if sources <= _EMBEDDED else _OF_MODEL
    content: dict[str, Any] = {"task": args.task if TASKS[args.task].is_downstream else "retrieval"}
    defaults = FinetuningDataArguments()  # those of an evaluation
    for one in fields(args):
        value = getattr(args, one.name)
        if one.name in names and value != getattr(defaults, one.name):
            content[one.name] = value
    if "data" in names:
        content["data"] = args.data
    replace_file(folder / TASK, json.dumps(content, indent=2) + "\n")


def read_task(model: str, names_data: bool) -> dict[str, Any]:
    """The arguments of an evaluation that a model brings.

    Args:
        model: a folder, or a name on the Hub.
        names_data: whether the caller names other data, to which what the model says of its own does not apply.

    Raises:
        RecipeError: if there is no model, its `task.json` is damaged, or it was made for no task that is evaluated.
    """
    file = file_of(model, TASK)
    if file is None:
        return {"task": _task_of_class(model)}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        unknown = content.keys() - {"task", *_OF_MODEL, *_OF_DATA}
        if content["task"] not in TASKS or unknown:
            raise ValueError(f"unknown: {', '.join(unknown) or content['task']}")
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise RecipeError(f"{file} cannot be read ({error}): name --task, or write the file anew.") from error
    return {name: value for name, value in content.items() if not (names_data and name in _OF_DATA)}


def file_of(model: str, name: str) -> Path | None:
    """A file of a model that is a folder or a name on the Hub; None if it is not there."""
    if os.path.isdir(model):
        path = Path(model) / name
        return path if path.is_file() else None
    try:
        found = cached_file(
            model,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
    except (OSError, ValueError):  # The model itself is opened next, whose error says what is wrong.
        return None
    return None if found is None else Path(found)


def results_folder(model: str) -> Path:
    """The folder for the results of a model: its own, or one below `runs` for a model on the Hub."""
    return Path(model) if os.path.isdir(model) else Path("runs") / model.strip("/").replace("/", "_")


def _task_of_class(model: str) -> str:
    """The task of a model by the class that its config names."""
    try:
        names = config_of(model).architectures or []
    except (ValueError, TypeError, OSError) as error:
        raise RecipeError(f"{model} cannot be opened: {error}") from error
    tasks = [task for task, row in TASKS.items() if row.evaluate and row.is_downstream]
    if {"TCLModel", "TCLForPreTraining", "TCLForMaskedLM"}.intersection(names):
        return "retrieval"
    for task in tasks:
        if TASKS[task].model_class.__name__ in names:
            return task
    raise RecipeError(f"{model} does not say for which task it was made: name one with --task ({', '.join(tasks)}).")
