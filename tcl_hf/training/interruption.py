"""Interruptions: what happens on SIGTERM or SIGUSR1, by which schedulers announce that they will take the machine away.

The signal is noted, the present optimizer step is completed, a checkpoint is written by all processes together, and the
run ends with the exit status `PREEMPTED` (see `loop.TrainingRun.after_step`). A launcher that ends without passing the
signal on counts as a signal.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import psutil

PREEMPTED = 75  # "try again later" in sysexits.h: a scheduler that sees it starts the run again, with --resume
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_LAUNCHERS = {"accelerate", "accelerate-launch", "torchrun", "accelerate.commands.launch", "torch.distributed.run"}


class Preempted(SystemExit):
    """The run was asked to stop: it has saved a checkpoint, and exits with `PREEMPTED`."""


class StopSignal:
    """Notes the signals to stop while its context is open, instead of ending the process.

    `accelerate launch` of one process ends by SIGTERM and passes nothing on. Therefore a run that it has started is
    also asked to stop when the launcher is gone. A shell or a scheduler that has started the run may end.
    """

    def __init__(self) -> None:
        self._noted = False
        self._launcher: int | None = None
        self.can_listen = threading.current_thread() is threading.main_thread()

    @property
    def received(self) -> bool:
        """Whether the run was asked to stop."""
        return self._noted or (self._launcher is not None and os.getppid() != self._launcher)

    def __enter__(self) -> "StopSignal":
        self._launcher = launcher()
        if self.can_listen:
            self.former = {number: signal.signal(number, self.ask) for number in SIGNALS}
        return self

    def __exit__(self, *error) -> None:
        if self.can_listen:
            for number, handler in self.former.items():
                signal.signal(number, handler)

    def ask(self, number: int = signal.SIGTERM, frame: Any = None) -> None:
        """Ask the run to stop, as a signal does."""
        self._noted = True


def launcher() -> int | None:
    """The process id of the launcher that has started this process; None if it was not started by one."""
    try:
        parent = psutil.Process(os.getppid())
        words = {os.path.basename(word) for word in parent.cmdline()}
    except psutil.Error:
        return None
    return parent.pid if words & _LAUNCHERS else None


@contextmanager
def ending_when_asked() -> Iterator[None]:
    """Let a signal to stop end the process at once with `PREEMPTED`, as long as there is nothing to save.

    Raises:
        Preempted: where the signal arrives.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: Any) -> NoReturn:
        raise Preempted(PREEMPTED)

    former = {number: signal.signal(number, end) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
