"""The folder of a run belongs to one run at a time: a file in it names the owner.

Two runs in one folder would mix their logs and remove each other's unfinished checkpoints. The first process of a run
makes the file `LOCK`, which names its machine, its process id and when it was started. A run that is killed leaves the
file, and the next run has to recognise that its owner is gone, without the help of a user:

- On the same machine, the owner is gone if there is no such process, or if it was started at another time, because then
  another process has got the id.
- On another machine, processes cannot be looked up. An owner touches its file every `BEAT` seconds, and is gone if it
  has not done so for `SILENCE` seconds, by the clock of the file system. A run waits that long for an owner.

An owner that was only suspended for longer, and whose folder another run has taken, notices it and ends.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from .agreement import Agreement
from .arguments import TrainingError

LOCK = "run.lock"
BEAT = 10.0  # seconds between two signs of life
SILENCE = 60.0  # seconds without a sign of life after which an owner on another machine is gone
_LOOK = 0.5  # seconds between two looks at the lock of another owner
_SETTLE = 0.3  # seconds in which runs that take over a lock at the same time have all written to it
_CLOCK = 2.0  # seconds by which the start of a process may seem to differ


@dataclass(frozen=True)
class Owner:
    """A process, as other processes and machines can recognise it.

    Args:
        host: the name of its machine.
        pid: its process id there.
        started: when it was started, in seconds since its machine was.
        since: when it took the folder, for messages.
    """

    host: str
    pid: int
    started: float
    since: str = ""

    @classmethod
    def present(cls) -> "Owner":
        """This process."""
        return cls(socket.gethostname(), os.getpid(), _started(os.getpid()) or 0.0, time.strftime("%Y-%m-%d %H:%M:%S"))

    def is_same(self, other: "Owner | None") -> bool:
        """Whether both are the same process."""
        return (
            other is not None
            and (self.host, self.pid) == (other.host, other.pid)
            and abs(self.started - other.started) < _CLOCK
        )

    @property
    def is_gone(self) -> bool:
        """Whether this process, which was one of this machine, has ended."""
        started = _started(self.pid)
        return started is None or abs(started - self.started) >= _CLOCK


def _started(pid: int) -> float | None:
    """When a process of this machine was started, in seconds since the machine was; None if there is none."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return process.create_time() - psutil.boot_time()
    except psutil.Error:
        return None


@contextmanager
def owned(folder: Path, agreement: Agreement, is_main_process: bool) -> Iterator["FolderLock"]:
    """Own a folder, which is made if it is missing. All processes of a run call this together; the first one owns it.

    Raises:
        TrainingError: in all processes, if the folder cannot be written or belongs to another run.
    """
    lock, failure = FolderLock(folder), None
    if is_main_process:
        try:
            lock.take()
        except TrainingError as error:
            failure = error
    if agreement.any(failure is not None):
        raise failure or TrainingError(f"The first process cannot use output_dir={folder}: its error says why.")
    try:
        yield lock
    finally:
        lock.release()


class FolderLock:
    """The right of this process to write into a folder; within the process it may be taken several times."""

    def __init__(self, folder: Path):
        self.folder, self.file, self.me = Path(folder), Path(folder) / LOCK, Owner.present()
        self.is_taken = self.is_new = False  # new is a folder that was made for this
        self.successor: Owner | None = None  # the run that has taken the folder since
        self._ended = threading.Event()

    def take(self) -> None:
        """Take the folder, and keep giving signs of life.

        Raises:
            TrainingError: if it cannot be written, or belongs to a run that is alive.
        """
        try:
            self.is_new = not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            while not self._make():
                owner = self._owner()
                if self.me.is_same(owner):
                    return  # taken before, by a part of the run that this one belongs to
                if self._is_left(owner):
                    self._take_over()
                    break
        except OSError as error:
            raise TrainingError(
                f"output_dir={self.folder} cannot be written ({error.strerror or error}): choose another output_dir, "
                "or make it a folder that you may write to."
            ) from error
        self.is_taken = True
        threading.Thread(target=self._give_signs, daemon=True).start()

    def check(self) -> None:
        """End this run if another one owns the folder now.

        Raises:
            TrainingError: naming the other run.
        """
        if self.successor is not None:
            raise TrainingError(
                f"{self.folder} was taken over by the run of process {self.successor.pid} on {self.successor.host}, "
                "because this one had given no sign of life: it ends here, and the other one goes on."
            )

    def release(self) -> None:
        """Give the folder back, if this object took it; one that was made for it and is still empty is removed."""
        self._ended.set()
        if self.is_taken and self.me.is_same(self._owner()):
            self.file.unlink(missing_ok=True)
            if self.is_new:
                with contextlib.suppress(OSError):
                    self.folder.rmdir()
        self.is_taken = False

    def _make(self) -> bool:
        """Make the lock, unless there is one."""
        try:
            with open(self.file, "x") as file:
                file.write(json.dumps(asdict(self.me)) + "\n")
        except FileExistsError:
            return False
        return True

    def _owner(self) -> Owner | None:
        """The owner that the lock names; None if it cannot be read, for example because it is just being written."""
        try:
            content: dict[str, Any] = json.loads(self.file.read_text())
            owner = Owner(**content)
            return Owner(str(owner.host), int(owner.pid), float(owner.started), str(owner.since))
        except (OSError, ValueError, TypeError, RecursionError):
            return None

    def _is_left(self, owner: Owner | None) -> bool:
        """Whether the owner of the lock is gone.

        Raises:
            TrainingError: if it is alive.
        """
        if owner is not None and owner.host == self.me.host:
            if owner.is_gone:
                return True
            self._refuse(owner)
        last = self._last_sign()
        while last is not None and self._now() - last < SILENCE:
            time.sleep(_LOOK)
            sign = self._last_sign()
            if sign != last:
                now = self._owner()
                if now is not None and (owner is None or now == owner):
                    self._refuse(now)
                return False  # The file was removed or has another owner: look again.
        return True

    def _refuse(self, owner: Owner) -> None:
        since = f" since {owner.since}" if owner.since else ""
        raise TrainingError(
            f"output_dir={self.folder} belongs to the run of process {owner.pid} on {owner.host}{since}: wait for its "
            f"end, or choose another output_dir. If that run is not there any more, remove {self.file}."
        )

    def _last_sign(self) -> float | None:
        """When the lock was touched last, by the clock of the file system; None if it is not there."""
        try:
            return self.file.stat().st_mtime
        except FileNotFoundError:
            return None

    def _now(self) -> float:
        """The time by the clock of the file system."""
        return self._write_beside().stat().st_mtime

    def _write_beside(self) -> Path:
        """A lock of this process under another name."""
        beside = self.file.with_name(f"{LOCK}.{self.me.host}.{self.me.pid}")
        beside.write_text(json.dumps(asdict(self.me)) + "\n")
        return beside

    def _take_over(self) -> None:
        """Take the lock of an owner that is gone; of several runs that do so at once, the last one gets it."""
        os.replace(self._write_beside(), self.file)
        time.sleep(_SETTLE)
        owner = self._owner()
        if owner is not None and not self.me.is_same(owner):
            self._refuse(owner)

    def _give_signs(self) -> None:
        """Touch the lock again and again, and note if it belongs to another run."""
        while not self._ended.wait(BEAT):
            owner = self._owner()
            if owner is not None and not self.me.is_same(owner):
                self.successor = owner
                return
            with contextlib.suppress(OSError):  # A file system that is away may come back.
                if self.file.exists():
                    os.utime(self.file)
                else:
                    self._make()
