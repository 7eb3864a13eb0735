"""Worker processes of loaders: signals to stop pass over them, and none outlives the process that it works for.

Python's `multiprocessing` ends a worker by SIGTERM and then waits for it, without a limit. A scheduler sends SIGTERM to
all processes of a run, of which the workers are needed until a checkpoint is saved, so that they ignore it. Therefore
they have to end in other ways: `Workers.end` kills those that do not leave when they are asked to, and a worker kills
itself when the process that it works for is gone, even while it waits for a file that never comes.
"""

import copy
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

from torch.utils.data import DataLoader

PATIENCE = 2.0  # seconds that workers have to leave by themselves
_LOOK = 0.5  # seconds between two looks of a worker at whether the process that it works for is there
PASSED_OVER = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Workers:
    """The worker processes of loaders, which are gone when its `with` block ends, whatever ends it."""

    def __init__(self) -> None:
        self._started: list[Any] = []
        self._iterators: list[Any] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def options(self, number: int) -> dict[str, Any]:
        """The arguments of a `DataLoader` that has so many of these workers."""
        if number == 0:
            return {"num_workers": 0}
        context: Any = copy.copy(multiprocessing.get_context())
        context.Process = self._process_of(context.Process)
        return {"num_workers": number, "multiprocessing_context": context, "worker_init_fn": stay_with_parent}

    def _process_of(self, process_class: Any) -> Any:
        """A function that makes processes of this class and notes them, so that none is missed."""

        def make(*args: Any, **kwargs: Any) -> Any:
            process = process_class(*args, **kwargs)
            self._started = [one for one in self._started if one.exitcode is None] + [process]
            return process

        return make

    def iterate(self, loader: DataLoader) -> Iterator[Any]:
        """Iterate over a loader of these workers."""
        iterator = iter(loader)
        self.attend(iterator)
        return iterator

    def attend(self, iterator: Any) -> None:
        """Ask the workers of this iterator of a `DataLoader` to leave before they are ended."""
        self._iterators = [one for one in self._iterators if not getattr(one, "_shutdown", True)] + [iterator]

    def end(self) -> None:
        """Ask the workers to leave, and kill those that have not left after `PATIENCE` seconds.

        PyTorch's own shutdown comes first where it can, because a killed worker may leave half a batch in the pipe that
        a thread for pinned memory reads. The iterators cannot be used afterwards.
        """
        killing = threading.Timer(PATIENCE, self._kill)
        with _undisturbed():
            killing.start()
            try:
                for iterator in self._iterators:
                    if hasattr(iterator, "_shutdown_workers"):
                        iterator._shutdown_workers()
            finally:
                killing.cancel()
                self._kill()
                for process in self._started:
                    if process.pid is not None:
                        process.join(PATIENCE)
                self._started, self._iterators = [], []

    def _kill(self) -> None:
        for process in self._started:
            if process.pid is not None and process.exitcode is None:
                process.kill()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep the main thread from a second Ctrl-C, and from PyTorch's handler, which raises the death of a worker."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
        signal.SIGCHLD: signal.signal(signal.SIGCHLD, signal.SIG_DFL),
    }
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def stay_with_parent(worker: int) -> None:
    """Let this process, a worker, pass over signals to stop, and end when its parent is gone."""
    for number in PASSED_OVER:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """Kill this process once it has another parent than it had, or the process that started it is gone."""
    starter = multiprocessing.parent_process()  # The parent may have been gone already when it was looked at first.
    while os.getppid() == parent and (starter is None or starter.is_alive()):
        time.sleep(_LOOK)
    os.kill(os.getpid(), signal.SIGKILL)
