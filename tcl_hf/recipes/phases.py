"""Phases of a run: runs one after the other, each of which starts from the model of the one before.

A recipe lists them under `phases`, each with the arguments that it changes. The last phase has the run's `output_dir`,
and phase 1 has the folder `phase-1` in it. A phase is finished when its folder holds `phase.json`, which is written
last.
"""

import gc
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from transformers import PreTrainedModel

from ..models.configuration_tcl import TCLConfig
from ..models.whole_files import replace_file
from ..training.adapters import config_of
from ..training.agreement import Agreement, processes
from ..training.arguments import TCLTrainingArguments, TrainingError
from ..training.checkpoints import newest_checkpoint
from ..training.identity import FREE, names_of_kind
from ..training.interruption import PREEMPTED, Preempted, StopSignal, ending_when_asked
from ..training.log import METRICS
from ..training.matching_start import multiplied_dimensions
from ..training.optimization import check_something_is_trained, trained_groups
from ..training.ownership import owned
from ..training.run_folder import check_new, clear
from .arguments import CheckpointArguments, ModelArguments, RecipeError, TrainingDataArguments
from .build import DROPOUT, SIZES
from .hints import names_of
from .parsing import Command, Given, check_names, check_task
from .starting import check_kept_views

FINISHED = "phase.json"  # it holds the arguments of its phase and of those before it
# What a phase cannot change, because it belongs to the whole run.
_OF_RUN = frozenset({"output_dir", "resume", "task"})
# What only the first phase reads, because the others start from its model.
_OF_START = names_of(ModelArguments) - names_of(CheckpointArguments) - {"fusion_start"} | {"model"}
# What may change when a run goes on, because the model does not depend on it; `config` is compared by its fields.
_FREE = names_of_kind(FREE) | {"config"}


@dataclass
class Phase:
    """A run of its own within a run; the whole run where a recipe lists no phases.

    Args:
        arguments: one object of each of the command's types: data, model, training, and perhaps further ones.
        changes: the arguments that it changes, as the recipe gives them.
        number: its number, counted from 1.
        place: where it stands, as "FILE: phases[2]: "; empty where a recipe lists no phases.
        run: all phases of the run, this one among them; empty where it is the only one.
        stop_signal: notes whether the run was asked to stop while this phase was trained.
    """

    arguments: tuple[Any, ...]
    changes: dict[str, Any] = field(default_factory=dict)
    number: int = 1
    place: str = ""
    run: list["Phase"] = field(default_factory=list, repr=False)
    stop_signal: StopSignal = field(default_factory=StopSignal, repr=False)

    @property
    def data_args(self) -> TrainingDataArguments:
        """The data that it is trained on."""
        return self.arguments[0]

    @property
    def model_args(self) -> CheckpointArguments:
        """The arguments of its start."""
        return self.arguments[1]

    @property
    def args(self) -> TCLTrainingArguments:
        """How it is trained."""
        return self.arguments[2]

    @property
    def is_last(self) -> bool:
        """Whether its model is that of the run."""
        return self.number >= len(self.run)

    @property
    def folder(self) -> Path:
        """The folder of its model, metrics and checkpoints, in a run whose folder is `args.output_dir`."""
        run = Path(self.args.output_dir)
        return run if self.is_last else run / f"phase-{self.number}"

    @property
    def former(self) -> str:
        """The folder of the phase before, whose model it starts from; empty for the first one."""
        return str(self.run[self.number - 2].folder) if self.number > 1 else ""

    @property
    def start(self) -> Any:
        """The arguments of the start of the run."""
        return (self.run or [self])[0].model_args

    @property
    def base_models(self) -> list[str]:
        """The models that the run started from: names on the Hub, folders, or `package:NAME`."""
        return [name for one in ("model", "vision_model", "text_model") if (name := getattr(self.start, one, None))]

    @property
    def dataset_names(self) -> list[str]:
        """The names of the data of all phases."""
        return list(dict.fromkeys(name for phase in self.run or [self] for name in phase.data_args.dataset_names))

    @property
    def title(self) -> str:
        """Its number and its changes, as a line."""
        return f"Phase {self.number} of {len(self.run)}: {_in_words(self.changes)}"

    @property
    def history(self) -> str:
        """A paragraph and a list in Markdown about all phases, for a card; empty where a recipe lists none."""
        if not self.place:
            return ""
        lines = [f"{phase.number}. {_in_words(phase.changes, code='`')}" for phase in self.run]
        return (
            f"\n\nThe run had {len(lines)} phases, each of which started from the model of the one before. They "
            f"changed these arguments of the recipe; `{METRICS}` is that of the last phase:\n\n" + "\n".join(lines)
        )

    def check_start(self, output_dir: str | os.PathLike) -> None:
        """Refuse a folder that holds what the run starts from.

        Raises:
            RecipeError: naming the model and the folder.
        """
        for source in self.base_models:
            if Path(source).exists() and Path(source).resolve().is_relative_to(Path(output_dir).resolve()):
                where = "is the folder" if Path(source).resolve() == Path(output_dir).resolve() else "holds the folder"
                raise RecipeError(
                    f"output_dir={output_dir} {where} of the model that the run starts from, {source}, which would be "
                    "lost: choose another output_dir."
                )

    def check_following(self, model: PreTrainedModel) -> None:
        """Refuse phases after this one that could not be trained, while nothing is lost yet.

        Args:
            model: that of this phase.

        Raises:
            RecipeError: naming the phase.
        """
        for phase in self.run[self.number :]:
            try:
                config = TCLConfig.from_dict(
                    model.config.to_dict(), image_size=phase.model_args.image_size, **_chosen_fields(phase)
                )
                check_kept_views(phase.data_args, config)
                with torch.device("meta"):
                    empty = type(model)(config)
                check_something_is_trained(empty)
                if phase.changes.get("fusion_start") == "similarity":
                    multiplied_dimensions(empty.tcl)
                if phase.args.lora is None:  # Adapters would change the parts that are trained.
                    trained_groups(empty, phase.args)
            except (ValueError, TypeError) as error:
                raise RecipeError(f"{phase.place}{error}") from error


def parse_phases(command: Command, argv: Sequence[str] | None = None) -> list[Phase]:
    """Parse a recipe and the command line over it, see `parsing.parse_recipe`, for each of its phases.

    What a phase names overrides the recipe, and the command line overrides both. The phases start as the recipe says:
    `run_phases` lets each start from the model of the one before.

    Returns:
        The phases, or a single one where the recipe lists none.

    Raises:
        RecipeError, TrainingError: as there, and naming the phase for what it may not hold.
    """
    given = Given.read(command, argv)
    whole = Phase(given.parsed())
    listed = given.phases
    if listed is None:
        return [whole]
    if not isinstance(listed, list) or not listed:
        raise RecipeError(
            f"{given.place}phases is not a list of phases, but {listed}: write one item of `name: value` for each "
            "phase, or leave phases out."
        )
    phases: list[Phase] = []
    for number, changes in enumerate(listed, 1):
        place = f"{given.place}phases[{number}]: "
        _check_changes(given, place, number, changes)
        try:
            arguments = given.parsed(changes)
        except (RecipeError, TrainingError) as error:
            raise type(error)(f"{place}{error}") from error
        phases.append(Phase(arguments, changes, number, place, phases))
    for former, phase in pairwise(phases):
        _check_dropout(former, phase)
        _check_adapters(former, phase)
    return phases


def _check_changes(given: Given, place: str, number: int, changes: Any) -> None:
    """Refuse what a phase may not hold."""
    if not isinstance(changes, dict):
        raise RecipeError(f"{place}this is not a mapping of arguments, but {changes}: write `name: value`.")
    names = {str(name) for name in changes}
    for name in sorted(names & _OF_RUN):
        raise RecipeError(f"{place}{name} belongs to the whole run: set it outside the phases.")
    check_names(given.command, place, changes, names_of(*given.command.types))
    check_task(given.command, given.task, {place: changes})
    if "data" in names and not changes["data"]:
        raise RecipeError(f"{place}data is empty: name sources, or leave it out to train on those of the recipe.")
    if number == 1:
        return
    for name in sorted(names & _OF_START):
        raise RecipeError(
            f"{place}{name} is read by the first phase only, because the others start from the model of the one "
            "before: set it outside the phases."
        )
    config = changes.get("config")
    for name in _sizes_in(config) if isinstance(config, dict) else ():
        raise RecipeError(
            f"{place}{name} is a size of the model, which the first phase makes: set it outside the phases."
        )


def _sizes_in(config: dict[str, Any]) -> Iterator[str]:
    """The fields of a config that a checkpoint decides, as `config.part.name`."""
    for name in SIZES:
        if isinstance(config.get(name), dict):
            yield from (f"config.{name}.{part}" for part in config[name] if part not in DROPOUT)
        elif name in config:
            yield f"config.{name}"


def _check_dropout(former: Phase, phase: Phase) -> None:
    """Refuse dropout in encoders that is set for a phase and not for the next one, whose own value is not known."""
    for part in ("vision_config", "text_config"):
        set_before, set_now = (one.model_args.config_fields.get(part) or {} for one in (former, phase))
        for name in set_before.keys() & set(DROPOUT) - set_now.keys():
            raise RecipeError(
                f"{former.place}config.{part}.{name} is set for this phase and not for the next one: set it outside "
                "the phases too."
            )


def _check_adapters(former: Phase, phase: Phase) -> None:
    """Refuse adapters of adapters."""
    if all(one.args.lora is not None and one.args.lora_save == "adapter" for one in (former, phase)):
        raise RecipeError(
            f"{phase.place}lora_save: adapters alone need a whole model to be added to, and the phase before saves "
            "adapters: set lora_save to merged there."
        )


def run_phases(command: Command, argv: Sequence[str] | None, train: Callable[[Phase], None]) -> None:
    """Parse a recipe, and train its phases one after the other; with `--resume` only those that are not finished.

    Args:
        train: trains a phase by its arguments, and leaves its model in `args.output_dir`.

    Raises:
        RecipeError, TrainingError: for phases that cannot be trained, or that are not those of an earlier run which is
            to go on or is in the way.
        Preempted: if the run was asked to stop, before, during or between the phases.
    """
    with ending_when_asked():
        phases = parse_phases(command, argv)
        phases[0].check_start(phases[0].args.output_dir)
        state = processes()
        with owned(phases[-1].folder, Agreement(), state.is_main_process):
            _run(phases, train)


def _run(phases: list[Phase], train: Callable[[Phase], None]) -> None:
    """Train the phases of a run whose folder is its own."""
    args = phases[0].args
    if not phases[0].place:
        if not args.resume:
            check_new(args.output_dir, args.overwrite_output_dir)
        train(phases[0])
        return
    state = processes()
    number_done = _number_finished(phases)
    for phase in phases[number_done:]:
        goes_on = newest_checkpoint(phase.folder) is not None
        state.wait_for_everyone()  # until all processes have looked at the files, which one of them will change
        train(_as_run(phase, goes_on))
        if state.is_main_process:
            _write_finished(phase)
        if phase.is_last:  # and the processes do not communicate any more
            return
        state.wait_for_everyone()
        if Agreement().any(phase.stop_signal.received):
            raise Preempted(PREEMPTED)
        AcceleratorState._reset_state()  # The next phase may choose another precision.
        GradientState._reset_state()
        gc.collect()  # so that two models do not take memory at the same time


def _as_run(phase: Phase, goes_on: bool) -> Phase:
    """A phase with the arguments of a run: in its own folder, and from the model of the phase before, if there is one.

    Args:
        goes_on: whether it goes on from a checkpoint.
    """
    # That it replaces nothing was seen before, and without a checkpoint it starts again.
    args = replace(phase.args, output_dir=str(phase.folder), resume=goes_on, overwrite_output_dir=True)
    model_args = phase.model_args
    if phase.number > 1:
        untouched = _untouched(model_args)  # what only the first phase reads
        start: dict[str, Any] = {name: getattr(untouched, name) for name in _OF_START if hasattr(untouched, name)}
        if hasattr(model_args, "fusion_start"):  # What the recipe names outside the phases is for the first one.
            start["fusion_start"] = phase.changes.get("fusion_start", "random")
        start |= {"model": phase.former, "config": json.dumps(model_args.config_fields | _restored(phase))}
        model_args = replace(model_args, **start)
    return replace(phase, arguments=(phase.data_args, model_args, args))


def _chosen_fields(phase: Phase) -> dict[str, Any]:
    """The fields of the config that a phase after the first chooses, without those that a checkpoint decides."""
    chosen = phase.model_args.config_fields | _restored(phase)
    return {name: value for name, value in chosen.items() if name not in SIZES}


def _restored(phase: Phase) -> dict[str, Any]:
    """The fields of the config that only the phase before chose, with the values that the run started with.

    Raises:
        RecipeError: if the checkpoint that the run started from cannot be read.
    """
    former, start = phase.run[phase.number - 2].model_args, phase.run[0].model_args.model
    names = former.config_fields.keys() - phase.model_args.config_fields.keys() - set(SIZES)
    if not names:
        return {}
    try:
        config = TCLConfig() if start is None else config_of(start)
    except (ValueError, TypeError, OSError) as error:
        raise RecipeError(f"{start} cannot be opened: {error}") from error
    return {name: getattr(config, name) for name in sorted(names)}


def _number_finished(phases: list[Phase]) -> int:
    """The number of phases that an earlier run has finished, and this one passes over.

    Raises:
        TrainingError: if an earlier run is in the way, or is not one that this run can go on with.
    """
    run = phases[-1].folder
    done = max((phase.number for phase in phases if (phase.folder / FINISHED).exists()), default=0)
    if not phases[0].args.resume:
        if phases[0].args.overwrite_output_dir:
            _clear_phases(phases)
        elif done or any(newest_checkpoint(phase.folder) for phase in phases):
            raise TrainingError(
                f"{run} holds phases of an earlier run: go on with --resume, choose another output_dir, or replace "
                "them with --overwrite_output_dir true."
            )
        else:
            check_new(run, overwrite=False)
        return 0
    if done:
        _check_finished(phases[:done])
    if done == len(phases):
        raise TrainingError(f"All {done} phases in {run} are finished: choose another output_dir to train anew.")
    for phase in phases[done + 1 :]:
        if newest_checkpoint(phase.folder):
            raise TrainingError(
                f"{phase.folder} holds checkpoints of phase {phase.number}, but phase {done + 1} is not finished: "
                "remove them, or choose another output_dir."
            )
    return done


def _clear_phases(phases: list[Phase]) -> None:
    """Remove the checkpoints of an earlier run, and the marks of its finished phases."""
    state = processes()
    if state.is_main_process:
        for phase in phases:
            (phase.folder / FINISHED).unlink(missing_ok=True)
            clear(phase.folder)
    state.wait_for_everyone()


def _check_finished(phases: list[Phase]) -> None:
    """Refuse to go on with finished phases whose arguments were others."""
    file = phases[-1].folder / FINISHED
    try:
        finished = json.loads(file.read_text(encoding="utf-8"))["phases"]
        if not isinstance(finished, list) or not all(isinstance(one, dict) for one in finished):
            raise ValueError("it does not hold a list of phases")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise TrainingError(f"{file} cannot be read ({error}): choose another output_dir.") from error
    if len(finished) != len(phases):
        raise TrainingError(
            f"{file} was written by a run with other phases: list the same ones, or choose another output_dir."
        )
    for phase, before in zip(phases, finished, strict=True):
        # An earlier version of the package may lack an argument, which then had its default.
        untouched = {name: getattr(part, name) for part in map(_untouched, phase.arguments) for name in vars(part)}
        settings = _settings(phase)
        left_out = {name: None for name in before if name.startswith("config.") and name not in settings}
        for name, value in (settings | left_out).items():
            former = before.get(name, untouched.get(name))
            if former != value:
                raise TrainingError(
                    f"{phase.place}this phase is finished in {phase.folder}, where {name} was {former} and not "
                    f"{value}: set it as before to go on, or choose another output_dir."
                )


def _untouched(arguments: Any) -> Any:
    """Arguments of the same type, all with their defaults."""
    return type(arguments)()


def _settings(phase: Phase) -> dict[str, Any]:
    """The arguments of a phase that its model depends on, by name, as JSON holds them."""
    ignored = _FREE if phase.number == 1 else _FREE | _OF_START
    settings = {one.name: getattr(part, one.name) for part in phase.arguments for one in fields(part) if one.init}
    settings = {name: value for name, value in settings.items() if name not in ignored}
    settings |= {f"config.{name}": value for name, value in phase.model_args.config_fields.items()}
    return json.loads(json.dumps(settings))


def _write_finished(phase: Phase) -> None:
    """Mark a phase as finished."""
    content = {"phases": [_settings(one) for one in phase.run[: phase.number]]}
    replace_file(phase.folder / FINISHED, json.dumps(content, indent=1) + "\n")


def _in_words(changes: dict[str, Any], code: str = "") -> str:
    """The changes of a phase, each between marks of code."""
    return ", ".join(f"{code}{name}: {json.dumps(value)}{code}" for name, value in changes.items()) or "none"
