"""Interruptions: what happens on SIGTERM, by which schedulers announce that they will take the machine away.

The signal is noted, the present optimizer step is completed, a checkpoint is written by all processes together, and the
run ends with the exit status `PREEMPTED` (see `loop.TrainingRun.after_step`).
"""

import signal
import threading
from typing import Any

PREEMPTED = 75  # "try again later" in sysexits.h: a scheduler that sees it starts the run again, with --resume


class Preempted(SystemExit):
    """The run was asked to stop: it has saved a checkpoint, and exits with `PREEMPTED`."""


class StopSignal:
    """Notes SIGTERM while its context is open, instead of ending the process."""

    def __init__(self):
        self.received = False
        self.can_listen = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "StopSignal":
        if self.can_listen:
            self.former = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *error) -> None:
        if self.can_listen:
            signal.signal(signal.SIGTERM, self.former)

    def _receive(self, number: int, frame: Any) -> None:
        self.received = True


def ignore_sigterm(worker: int) -> None:
    """Let a worker of a loader ignore SIGTERM, which may go to the whole group: the run still needs it to save."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
