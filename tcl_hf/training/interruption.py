"""A run that is asked to stop: SIGTERM, and how its processes hear of it."""

import signal
import threading
from typing import Any


class Preempted(SystemExit):
    """The run was asked to stop (SIGTERM): it saved a checkpoint, and exits with `PREEMPTED`."""


PREEMPTED = 75  # "try again later" in sysexits.h: a scheduler that sees it starts the run again, with --resume


class StopSignal:
    """Listens for SIGTERM, by which schedulers announce that they will take the machine away."""

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
    """A signal to the whole group shall not take the workers from the process that is about to save."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
