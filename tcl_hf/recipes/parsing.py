"""Commands, and how a recipe and the command line over it become arguments.

A recipe is a YAML file of arguments. What neither the command nor its task reads is refused, so that no argument is
ignored silently; only a recipe for training may also be given to commands that read a part of it.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from ..training.arguments import TCLTrainingArguments
from ..training.planning import PlanArguments
from .arguments import (
    OBJECTS,
    CheckpointArguments,
    EvaluationArguments,
    FinetuningDataArguments,
    ModelArguments,
    PretrainingDataArguments,
    RecipeError,
    TaskArguments,
    json_object,
    name_of,
)
from .hints import hint, names_of
from .model_folder import TASK, read_task
from .tasks import TASKS, ignored_options, readers_of

RECIPES = Path(__file__).parent
MAX_VALUES = 100_000  # in a recipe; a few anchors can stand for billions
PHASES = "phases"  # the argument of a recipe that lists what its phases change


@dataclass(frozen=True)
class Command:
    """A command that reads a recipe: `tcl-hf <name>`, or `scripts/<name>.py`.

    Args:
        recipe: the recipe of the embedded data, used where the command line names neither a recipe nor a task nor a
            model nor other data; None for a command that reads a model's own `task.json` instead.
        types: dataclasses of all arguments that a recipe for this command may hold; the first is of the data.
        reads: the arguments among them that the command reads.
        helps: help texts of arguments that mean something else here.
    """

    name: str
    recipe: str | None
    types: tuple[type[Any], ...]
    reads: frozenset[str]
    helps: dict[str, str] = field(default_factory=dict)


_PRETRAINING = (PretrainingDataArguments, ModelArguments, TCLTrainingArguments)
_FINETUNING = (FinetuningDataArguments, CheckpointArguments, TCLTrainingArguments)
# These replace texts that name the launcher's precision as the default.
_PRECISION_HELPS = {
    "bf16": "Autocast to bfloat16, except on CPUs without it; else float32, whatever the launcher's precision.",
    "fp16": "Run the model in float16 by autocast.",
}
_EVALUATED = names_of(TaskArguments, CheckpointArguments, EvaluationArguments) | {"seed", "bf16", "fp16"}
_PLANNED = names_of(CheckpointArguments, PlanArguments) | {
    *("vocab_size", "fusion_layer", "num_fusion_layers", "max_tokens", "kept_views", "plain_view"),
    *("per_device_train_batch_size", "num_train_epochs", "bf16", "fp16"),
}
PRETRAIN = Command("pretrain", "openmoji", _PRETRAINING, names_of(*_PRETRAINING))
FINETUNE = Command("finetune", "easy_vqa", _FINETUNING, names_of(*_FINETUNING))
EVALUATE = Command("evaluate", None, (*_FINETUNING, EvaluationArguments), _EVALUATED, _PRECISION_HELPS)
PLAN = Command("plan", "tcl_4m", (*_PRETRAINING, PlanArguments), _PLANNED, _PRECISION_HELPS)
COMMANDS = (PRETRAIN, FINETUNE, EVALUATE, PLAN)


def parse_recipe(command: Command, argv: Sequence[str] | None = None) -> tuple:
    """Parse a recipe and the command line over it: `--recipe NAME_OR_FILE --name value ...`.

    `--config` and `--lora` change the fields they name and leave the recipe's others. The recipe's `phases` are passed
    over, see `phases.parse_phases`.

    Args:
        argv: the command line; that of the process if None.

    Returns:
        One object of each of the command's types.

    Raises:
        RecipeError: for a file that does not exist, an argument that does not exist or that the command or the task
            ignores, or a value of a wrong type.
    """
    return Given.read(command, argv).parsed()


@dataclass(frozen=True)
class Given:
    """The content of a recipe and a command line, with the names of all arguments checked.

    Args:
        place: the recipe's file as "FILE: "; empty without one.
        recipe: the arguments in it, without those that it leaves empty.
        phases: its phases as they stand there; None if it has none.
        argv: the command line.
        objects: the JSON of each `--config` and of each `--lora` on it.
        task: the task that either names; None for the default.
    """

    command: Command
    place: str
    recipe: dict[str, Any]
    phases: Any
    argv: list[str]
    objects: dict[str, list[str]]
    task: str | None

    @classmethod
    def read(cls, command: Command, argv: Sequence[str] | None) -> "Given":
        """Read a command line, that of the process if None, and the recipe that it names."""
        argv = list(sys.argv[1:] if argv is None else argv)
        chosen = _chosen(argv)
        path = recipe_file(chosen.recipe) if chosen.recipe else _recipe_of_data(command, chosen)
        place = f"{path}: " if path is not None else ""
        recipe = _read_recipe(path) if path is not None else {}
        phases = recipe.pop(PHASES, None)
        if command is EVALUATE:
            recipe.pop("eval_images", None)  # a limit for quick looks in training
            if chosen.model and path is None and not chosen.task:
                place = f"{chosen.model}/{TASK}: "
                recipe = read_task(chosen.model, names_data=bool(chosen.data or chosen.validation_data))
        check_names(command, place, recipe, names_of(*command.types))
        recipe = _filled(recipe)
        options = _options_in(argv, parser_of(command))
        check_names(command, "--", options, command.reads | {"help", "recipe"})
        task = chosen.task or recipe.get("task")
        check_task(command, task, {place: recipe, "--": options})
        objects = {name: getattr(chosen, name) for name in OBJECTS}
        return cls(command, place, recipe, phases, argv, objects, task)

    def parsed(self, changes: dict[str, Any] | None = None) -> tuple:
        """One object of each of the command's types; `changes` override the recipe, and the command line both.

        Raises:
            RecipeError: for a word of the command line that does not belong to an option.
        """
        changes = changes or {}
        recipe = _filled(self.recipe | changes)
        recipe = self._defaults(recipe) | recipe
        argv = [*_as_argv({name: value for name, value in recipe.items() if name not in OBJECTS}), *self.argv]
        for name in OBJECTS:
            of_recipe = [] if name in changes and changes[name] is None else [self.recipe.get(name)]
            values = [*of_recipe, changes.get(name), *self.objects[name]]
            given = [value for value in values if value is not None]
            argv += [f"--{name}", json.dumps(_merged(name, given))] if given else []
        *parsed, _, rest = parser_of(self.command).parse_args_into_dataclasses(
            argv, look_for_args_file=False, return_remaining_strings=True
        )
        if rest:
            raise RecipeError(f"'{rest[0]}' does not belong to any option: write options as --name value.")
        return tuple(parsed)

    def _defaults(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """Defaults that depend on others: a run has a folder named after its data, and an evaluation has no limit."""
        if self.command is EVALUATE:
            return {"eval_images": 0}
        data = _chosen(self.argv).data or recipe.get("data")
        if "output_dir" not in self.command.reads or not data:
            return {}
        task = self.task or (self.command.types[0].task if "task" in self.command.reads else None)
        names = [name_of(data if isinstance(data, list) else [data]), *([task] if task else [])]
        return {"output_dir": f"runs/{'_'.join(names)}"}


def _recipe_of_data(command: Command, chosen: argparse.Namespace) -> Path | None:
    """The file of the recipe that embedded data brings; None if the command line names something else."""
    if command.recipe is None or chosen.task or (chosen.model and not chosen.data):
        return None
    path = recipe_file(command.recipe)
    return path if not chosen.data or chosen.data == _read_recipe(path).get("data") else None


def recipe_names() -> list[str]:
    """The names of the package's recipes."""
    return sorted(file.stem for file in RECIPES.glob("*.yaml"))


def recipe_file(name: str) -> Path:
    """The file of a recipe: one of the package's by its name, such as `openmoji`, or any by its path."""
    ours = RECIPES / f"{name}.yaml"
    return ours if ours.exists() else Path(name)


class RecipeParser(HfArgumentParser):
    """A parser whose errors are exceptions."""

    def error(self, message: str):
        """Refuse the command line in a sentence.

        Raises:
            RecipeError: always.
        """
        raise RecipeError(f"{message[0].upper()}{message[1:]} (--help lists the options).")


def parser_of(command: Command) -> RecipeParser:
    """A parser of all arguments of a command, whose help lists those that the command reads."""
    parser = RecipeParser(command.types, prog=f"tcl-hf {command.name}", allow_abbrev=False)
    parser.add_argument("--recipe", default=None, help="Name of a recipe of the package, or a YAML file.")
    for action in parser._actions:
        action.help = command.helps.get(action.dest, action.help)
        if action.dest not in command.reads | {"help", "recipe"}:
            action.help = argparse.SUPPRESS
    return parser


def _chosen(argv: Sequence[str]) -> argparse.Namespace:
    """The recipe, the task and the objects that a command line names."""
    parser = RecipeParser((), add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe")
    parser.add_argument("--task")
    parser.add_argument("--model")
    parser.add_argument("--data", nargs="*")
    parser.add_argument("--validation_data", "--validation-data", nargs="*")
    for name in OBJECTS:
        parser.add_argument(f"--{name}", action="append", default=[])
    return parser.parse_known_args(argv)[0]


def _read_recipe(path: Path) -> dict[str, Any]:
    """The arguments in a recipe, by name."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError as error:
        names = ", ".join(recipe_names())
        raise RecipeError(f"There is no recipe {path}: name a YAML file, or one of {names}.") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError, RecursionError) as error:
        raise RecipeError(f"{path} could not be read as YAML: {error}") from error
    if sum(1 for _ in islice(_values_in(values), MAX_VALUES + 1)) > MAX_VALUES:
        raise RecipeError(f"{path} has more than {MAX_VALUES:,} values, those of its anchors among them: shorten it.")
    if not isinstance(values, dict):
        raise RecipeError(f"{path} is not a list of `name: value`.")
    return {str(name): value for name, value in values.items()}


def _values_in(content: Any) -> Iterator[Any]:
    """Every value inside lists and dictionaries; one that anchors repeat is counted as often as it stands there."""
    yield content
    parts = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    for part in parts:
        yield from _values_in(part)


def _filled(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments without those that are left empty, which then have their defaults."""
    return {name: value for name, value in arguments.items() if value is not None and value != []}


def _as_argv(recipe: dict[str, Any]) -> list[str]:
    """The arguments of a recipe as options, so that both are checked alike; mappings become JSON."""
    argv = []
    for name, value in recipe.items():
        values = value if isinstance(value, list) else [value]
        argv += [f"--{name}", *(json.dumps(x) if isinstance(x, dict) else str(x) for x in values)]
    return argv


def _options_in(argv: Sequence[str], parser: RecipeParser) -> list[str]:
    """The names of the options on a command line; those that the parser lacks as they are written."""
    options = [text.partition("=")[0] for text in argv if text.startswith("--")]
    actions = parser._option_string_actions
    return [actions[option].dest if option in actions else option[2:] for option in options]


def check_names(command: Command, place: str, names: Iterable[str], known: frozenset[str]) -> None:
    """Refuse arguments that are not known to a command.

    Args:
        place: the recipe's file as "FILE: ", or "--" for the command line.

    Raises:
        RecipeError: with the commands that read the argument, or a hint for its name.
    """
    for name in (name.replace("-", "_") for name in names if name not in known):
        readers = [other.name for other in COMMANDS if name in other.reads]
        if readers:
            raise RecipeError(f"{place}{name} is read by {_listed(readers)} only: leave it out of {command.name}.")
        missing = f"There is no option --{name}" if place == "--" else f"{place}there is no argument '{name}'"
        raise RecipeError(f"{missing}{hint(name, command.reads)}.")


def check_task(command: Command, task: str | None, given: dict[str, Iterable[str]]) -> None:
    """Refuse a task that the command does not have, and arguments that its task ignores.

    Args:
        task: the name that recipe or command line give it; None for the default.
        given: names of arguments by their place, see `check_names`.

    Raises:
        RecipeError: naming where the argument stands, and the tasks that read it.
    """
    task = task or command.types[0].task
    tasks = [name for name, row in TASKS.items() if row.is_downstream == ("task" in command.reads)]
    if task not in tasks:
        raise RecipeError(f"There is no task '{task}': choose one of {', '.join(tasks)}.")
    for place, names in given.items():
        for name in ignored_options(task, command.reads.intersection(names)):
            raise RecipeError(f"{place}{name} is read by {_listed(readers_of(name))} only: leave it out for {task}.")


def _listed(names: Iterable[str]) -> str:
    """Names as a list in a sentence."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def _merged(argument: str, objects: Iterable[Any]) -> dict[str, Any]:
    """The values of an argument, each an object or JSON, in one; a later one overrides fields of an earlier one."""
    merged: dict[str, Any] = {}
    for one in objects:
        for name, value in (one if isinstance(one, dict) else json_object(str(one), argument)).items():
            are_parts = isinstance(value, dict) and isinstance(merged.get(name), dict)
            merged[name] = merged[name] | value if are_parts else value
    return merged
