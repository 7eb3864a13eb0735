"""Commands: errors are one sentence, other exits pass, and cards name the command line."""

import logging
import runpy
import sys
from types import SimpleNamespace

import pytest
from helpers import ROOT

from tcl_hf.cli.command_line import command
from tcl_hf.data.pairs import DataError
from tcl_hf.recipes import train
from tcl_hf.recipes.arguments import RecipeError
from tcl_hf.recipes.parsing import COMMANDS
from tcl_hf.training.arguments import TrainingError
from tcl_hf.training.checkpoints import CheckpointWriteError
from tcl_hf.training.guard import NonFiniteError
from tcl_hf.training.interruption import PREEMPTED, Preempted


def command_that_raises(error: BaseException):
    @command
    def main(argv=None):
        raise error

    return main


@pytest.mark.parametrize("error", [CheckpointWriteError, DataError, NonFiniteError, RecipeError, TrainingError])
def test_an_error_of_the_input_is_one_sentence(error):
    with pytest.raises(SystemExit) as stopped:
        command_that_raises(error("The disk is full."))([])
    assert stopped.value.code == "error: The disk is full."  # Python prints it on stderr and exits with 1


def test_a_run_that_was_asked_to_stop_keeps_its_exit_code():
    with pytest.raises(Preempted) as stopped:
        command_that_raises(Preempted(PREEMPTED))([])
    assert stopped.value.code == PREEMPTED


def test_an_error_of_the_code_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        command_that_raises(ZeroDivisionError())([])


def test_a_command_keeps_chatty_libraries_out_of_its_log():
    @command
    def main(argv=None):
        assert argv == ["--x"]

    main(["--x"])
    assert logging.getLogger("httpx").level == logging.WARNING


@pytest.mark.parametrize("name", [command.name for command in COMMANDS])
def test_scripts_and_the_command_run_the_same(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--nonsense"])
    with pytest.raises(SystemExit, match=r"^error: There is no option --nonsense"):
        runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")
    monkeypatch.setattr(sys, "argv", ["tcl-hf", name, "--nonsense"])
    with pytest.raises(SystemExit, match=r"^error: There is no option --nonsense"):
        runpy.run_module("tcl_hf", run_name="__main__")


def test_a_card_names_the_command_line_that_starts_the_run_again(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scripts/pretrain.py", "--config", '{"alpha": 0}'])
    expected = "accelerate launch scripts/pretrain.py --config '{\"alpha\": 0}'"
    assert train.command_line("pretrain", None) == expected
    assert train.command_line("pretrain", ["--seed", "1"]) == "tcl-hf pretrain --seed 1"
    monkeypatch.setattr(train, "processes", lambda: SimpleNamespace(num_processes=8))
    started = train.command_line("finetune", ["--data", "a b"])
    assert started == "accelerate launch --num_processes 8 -m tcl_hf finetune --data 'a b'"
