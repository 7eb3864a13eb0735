"""Commands, and how a recipe and the command line over it become arguments.

A recipe is a YAML file of arguments. What neither the command nor its task reads is refused, so that no argument is
ignored silently; only a recipe for training may also be given to commands that read a part of it.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from ..training.arguments import TCLTrainingArguments
from ..training.planning import PlanArguments
from .arguments import (
    CheckpointArguments,
    DataArguments,
    EvaluationArguments,
    FinetuningDataArguments,
    ModelArguments,
    PretrainingDataArguments,
    RecipeError,
    TaskArguments,
    json_object,
)
from .hints import hint
from .tasks import TASKS, ignored_options, readers_of

RECIPES = Path(__file__).parent


def _names_of(*types: type) -> frozenset[str]:
    """The arguments of dataclasses."""
    return frozenset(one.name for group in types for one in fields(group) if one.init)


@dataclass(frozen=True)
class Command:
    """A module of this package that is run: `scripts/<name>.py`, or `python -m tcl_hf.recipes.<name>`.

    Args:
        recipe: the recipe used where the command line names neither a recipe nor a task.
        types: dataclasses of all arguments that a recipe for this command may hold.
        reads: the arguments among them that the command reads.
        helps: help texts of arguments that mean something else here.
    """

    name: str
    recipe: str
    types: tuple[type, ...]
    reads: frozenset[str]
    helps: dict[str, str] = field(default_factory=dict)


_PRETRAINING = (PretrainingDataArguments, ModelArguments, TCLTrainingArguments)
_FINETUNING = (FinetuningDataArguments, CheckpointArguments, TCLTrainingArguments)
PRETRAIN = Command("pretrain", "openmoji", _PRETRAINING, _names_of(*_PRETRAINING))
FINETUNE = Command("finetune", "easy_vqa", _FINETUNING, _names_of(*_FINETUNING))
EVALUATE = Command(
    "evaluate",
    "easy_vqa",
    (*_FINETUNING, EvaluationArguments),
    _names_of(TaskArguments, CheckpointArguments, EvaluationArguments) | {"seed", "bf16", "fp16"},
    {
        "bf16": "Run the model in bfloat16 by autocast; in float32 with neither, whatever the launcher's precision.",
        "fp16": "Run the model in float16 by autocast.",
    },
)
PLAN = Command(
    "plan",
    "tcl_4m",
    (*_PRETRAINING, PlanArguments),
    _names_of(CheckpointArguments, PlanArguments)
    | {"vocab_size", "fusion_layer", "num_fusion_layers", "max_tokens"}
    | {"per_device_train_batch_size", "num_train_epochs", "bf16", "fp16"},
)
COMMANDS = (PRETRAIN, FINETUNE, EVALUATE, PLAN)


def parse_recipe(command: Command, argv: Sequence[str] | None = None) -> tuple:
    """Parse a recipe and the command line over it: `--recipe NAME_OR_FILE --name value ...`.

    `--config` changes the fields it names and leaves the recipe's others.

    Args:
        argv: the command line; that of the process if None.

    Returns:
        One object of each of the command's types.

    Raises:
        RecipeError: for a file that does not exist, an argument that does not exist or that the command or the task
            ignores, or a value of a wrong type.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser(command)
    name, task = _recipe_and_task(argv)
    path = None if task and not name else recipe_file(name or command.recipe)
    recipe = _read_recipe(path, command) if path is not None else {}
    options = _options_in(argv, parser, command)
    _check_task(command, task or recipe.get("task"), path, recipe, options)
    whole = [*_as_argv(recipe), *argv]
    *parsed, _, unknown = parser.parse_args_into_dataclasses(
        [*whole, *_merged_configs(whole)], look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        raise RecipeError(f"'{unknown[0]}' does not belong to any option: write options as --name value.")
    return tuple(parsed)


def recipe_file(name: str) -> Path:
    """The file of a recipe: one of the package's by its name, such as `openmoji`, or any by its path."""
    ours = RECIPES / f"{name}.yaml"
    return ours if ours.exists() else Path(name)


class _Parser(HfArgumentParser):
    def error(self, message: str):
        raise RecipeError(f"{message[0].upper()}{message[1:]} (--help lists the options).")


def _parser(command: Command) -> _Parser:
    """A parser of all arguments of a command, whose help lists those that the command reads."""
    parser = _Parser(command.types, prog=f"{command.name}.py", allow_abbrev=False)
    parser.add_argument(
        "--recipe", default=command.recipe, help="Name of a recipe of the package, or a YAML file of arguments."
    )
    for action in parser._actions:
        action.help = command.helps.get(action.dest, action.help)
        if action.dest not in command.reads | {"help", "recipe"}:
            action.help = argparse.SUPPRESS
    return parser


def _recipe_and_task(argv: Sequence[str]) -> tuple[str | None, str | None]:
    """The recipe and the task that a command line names."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe")
    parser.add_argument("--task")
    chosen = parser.parse_known_args(argv)[0]
    return chosen.recipe, chosen.task


def _read_recipe(path: Path, command: Command) -> dict[str, Any]:
    """The arguments that a recipe sets, by name; those that the command ignores must be read by its training."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError as error:
        names = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
        raise RecipeError(f"There is no recipe {path}: name a YAML file, or one of {names}.") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"{path} could not be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path} is not a list of `name: value`.")
    known = _names_of(*command.types)
    for name in values:
        if name not in known:
            raise _not_read(command, str(name), path)
    return {name: value for name, value in values.items() if value is not None and value != []}


def _as_argv(recipe: dict[str, Any]) -> list[str]:
    """The arguments of a recipe as options, so that both are checked alike."""
    argv = []
    for name, value in recipe.items():
        text = json.dumps(value) if isinstance(value, dict) else value
        argv += [f"--{name}", *map(str, text if isinstance(text, list) else [text])]
    return argv


def _options_in(argv: Sequence[str], parser: _Parser, command: Command) -> list[str]:
    """The names of the options on a command line.

    Raises:
        RecipeError: for an option that does not exist, or that the command ignores.
    """
    names = []
    for text in argv:
        option = text.partition("=")[0]
        if option.startswith("--"):
            action = parser._option_string_actions.get(option)
            names.append(action.dest if action else option[2:])
    for name in names:
        if name not in command.reads | {"help", "recipe"}:
            raise _not_read(command, name)
    return names


def _not_read(command: Command, name: str, path: Path | None = None) -> RecipeError:
    """The error for an argument, in a recipe or on the command line, that a command does not read."""
    name = name.replace("-", "_")
    readers = [f"{other.name}.py" for other in COMMANDS if name in other.reads]
    if readers:
        place = "--" if path is None else f"{path}: "
        return RecipeError(f"{place}{name} is read by {_listed(readers)} only: leave it out of {command.name}.py.")
    place = f"There is no option --{name}" if path is None else f"{path}: there is no argument '{name}'"
    return RecipeError(f"{place}{hint(name, command.reads)}.")


def _check_task(
    command: Command, task: str | None, path: Path | None, recipe: Iterable[str], options: Iterable[str]
) -> None:
    """Refuse a task that the command does not have, and arguments that its task ignores.

    Args:
        task: the name that recipe or command line give it; None for the default.
        path: the recipe's file.
        recipe: names of the arguments in the recipe.
        options: names of the arguments on the command line.

    Raises:
        RecipeError: naming where the argument stands, and the tasks that read it.
    """
    task = task or next(one.task for one in command.types if issubclass(one, DataArguments))
    tasks = [name for name, row in TASKS.items() if row.is_downstream == ("task" in command.reads)]
    if task not in tasks:
        raise RecipeError(f"There is no task '{task}': choose one of {', '.join(tasks)}.")
    for place, given in ((f"{path}: ", recipe), ("--", options)):
        for name in ignored_options(task, command.reads & set(given)):
            raise RecipeError(f"{place}{name} is read by {_listed(readers_of(name))} only: leave it out for {task}.")


def _listed(names: Iterable[str]) -> str:
    """Names as a list in a sentence."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def _merged_configs(argv: list[str]) -> list[str]:
    """All configs of a command line as one, where it has several; a later one overrides fields of an earlier one."""
    option = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    option.add_argument("--config", action="append", default=[])
    configs = [json_object(config) for config in option.parse_known_args(argv)[0].config]
    merged: dict[str, Any] = {}
    for config in configs:
        for name, value in config.items():
            are_parts = isinstance(value, dict) and isinstance(merged.get(name), dict)
            merged[name] = merged[name] | value if are_parts else value
    return ["--config", json.dumps(merged)] if len(configs) > 1 else []
