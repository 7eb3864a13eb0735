"""Signals to stop, and launchers that pass none on."""

import os
import signal
import subprocess
import sys

import pytest

from tcl_hf.training import interruption
from tcl_hf.training.interruption import PREEMPTED, Preempted, StopSignal, ending_when_asked, launcher


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_are_noted_while_a_run_listens(number):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop.received
        os.kill(os.getpid(), number)
        assert stop.received
    assert stop.received and signal.getsignal(number) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_before_and_after_training_a_signal_ends_the_run_with_its_own_code(number):
    before = signal.getsignal(number)
    with pytest.raises(Preempted) as stopped, ending_when_asked():
        os.kill(os.getpid(), number)
    assert stopped.value.code == PREEMPTED and signal.getsignal(number) == before


def test_a_run_whose_launcher_is_gone_is_asked_to_stop(monkeypatch):
    monkeypatch.setattr(interruption, "launcher", lambda: 1234)
    monkeypatch.setattr(os, "getppid", lambda: 1234)
    with StopSignal() as stop:
        assert not stop.received
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert stop.received


def test_a_run_may_outlive_a_shell(monkeypatch):
    monkeypatch.setattr(interruption, "launcher", lambda: None)
    with StopSignal() as stop:
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert not stop.received


@pytest.mark.parametrize(
    ("words", "is_one"),
    [
        (["/usr/bin/accelerate", "launch", "-m", "tcl_hf"], True),
        (["-m", "accelerate.commands.launch", "train.py"], True),
        (["/env/bin/torchrun", "train.py"], True),
        (["-m", "torch.distributed.run", "-m", "tcl_hf"], True),
        (["-m", "pytest"], False),
    ],
)
def test_launchers_are_recognised_by_their_command_line(words, is_one, tmp_path):
    sleeping = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", *words])
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "getppid", lambda: sleeping.pid)
            assert launcher() == (sleeping.pid if is_one else None)
    finally:
        sleeping.kill()
        sleeping.wait()
