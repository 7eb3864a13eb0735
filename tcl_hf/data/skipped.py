"""Samples that cannot be used: they are counted and listed, and too many of them stop the run."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.context import get_spawning_popen
from pathlib import Path
from typing import Any

import torch

from .records import DataError
from .sampling import Visit

_WORKERS, _NOTE_BYTES = 128, 256  # Workers whose samples are noted, and the bytes of a note.
_SHARED = get_context("spawn")  # so that its objects reach a process however it is started
# PyTorch's words for a dead worker, with its process id; it raises them at any point of the main process.
DEAD_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")
_Visited = tuple[str, int, int]  # image id, epoch, index; several samples may share one, as texts about an image do


@dataclass
class SkippedSamples:
    """Counts the samples that cannot be used, and lists each in a line of JSON. It works across worker processes.

    A resumed run repeats the visits after its checkpoint, including those of batches that workers had prepared ahead.
    It neither lists nor counts a bad sample twice. (Good samples that were prepared ahead are counted twice.)

    It also notes which sample each worker of a loader began last, so that a worker's death can be explained.

    Args:
        path: file of the list; None keeps no list.
        max_share: the run stops when a larger share of the samples is bad.
        min_seen: number of samples from which on the share is judged.
    """

    path: str | os.PathLike | None = None
    max_share: float = 0.1
    min_seen: int = 100
    last: str = field(default="none yet", init=False)
    # The visits that were listed before this run was resumed, and whether its checkpoint has counted them.
    _listed: dict[_Visited | None, bool] = field(default_factory=dict, init=False, repr=False)
    _seen: Any = field(default_factory=lambda: _SHARED.Value("q", 0), repr=False)
    _skipped: Any = field(default_factory=lambda: _SHARED.Value("q", 0), repr=False)
    _begun: Any = field(default_factory=lambda: _SHARED.Array("c", _WORKERS * _NOTE_BYTES, lock=False), repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """For a worker that is being started, the counts themselves; for a copy, their values."""
        state = dict(self.__dict__)
        if get_spawning_popen() is None:
            state |= {"_seen": self._seen.value, "_skipped": self._skipped.value, "_begun": None}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["_begun"] is None:
            state |= {"_seen": _SHARED.Value("q", state["_seen"]), "_skipped": _SHARED.Value("q", state["_skipped"])}
            state["_begun"] = _SHARED.Array("c", _WORKERS * _NOTE_BYTES, lock=False)
        self.__dict__.update(state)

    @property
    def count(self) -> int:
        """The number of samples skipped so far."""
        return self._skipped.value

    def state_dict(self) -> dict[str, int]:
        """The counts of this process so far and the length of the list, for a checkpoint."""
        with self._skipped.get_lock():  # Under the lock, every sample that is counted is also listed.
            size = os.path.getsize(self.path) if self.path is not None and os.path.exists(self.path) else 0
            return {"seen": self._seen.value, "count": self.count, "list_bytes": size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a checkpoint: take over its counts, and read which visits are listed already."""
        self._seen.value, self._skipped.value = state.get("seen", 0), state.get("count", 0)
        if self.path is None or not os.path.exists(self.path):
            return
        with open(self.path, "rb") as file:
            for text in file:
                try:
                    line = json.loads(text)
                    epoch, index = line.get("visit", (None, None))
                    visited = (str(line["image_id"]), epoch, index)
                    if epoch is not None:
                        self._listed[visited] = file.tell() <= state.get("list_bytes", 0)
                except (
                    ValueError,
                    TypeError,
                    KeyError,
                    AttributeError,
                    RecursionError,
                ):  # It was cut, or is not of a list.
                    continue

    def mend_list(self) -> None:
        """Remove the last line if it is incomplete because the run was killed.

        Only one process may call this, and only while the others do not add to the list.
        """
        if self.path is not None and os.path.exists(self.path):
            content = Path(self.path).read_bytes()
            os.truncate(self.path, content.rfind(b"\n") + 1)

    def saw(self, number: int) -> None:
        """Count samples, usable or not."""
        with self._seen.get_lock():
            self._seen.value += number

    def add(self, image_id: object, reason: str, visit: "Visit | None" = None, number: int = 1) -> None:
        """Count and list a bad sample, with the reason and the visit on which it was found.

        Args:
            number: how many samples are bad for this one reason, such as the texts about an image.
        """
        self.last = f"{image_id}: {reason}"
        entry: dict[str, Any] = {"image_id": str(image_id), "reason": reason}
        visited = None
        if visit is not None:
            entry["visit"] = [visit.epoch, visit.index]
            visited = (entry["image_id"], visit.epoch, visit.index)
        with self._skipped.get_lock():
            self._skipped.value += 0 if self._listed.get(visited) else number
            if self.path is not None and visited not in self._listed:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def begins(self, image_id: object) -> None:
        """Note the sample that this process begins, if it is a worker of a loader."""
        worker = torch.utils.data.get_worker_info()
        if worker is not None:
            note = f"{os.getpid()} {image_id}".encode(errors="replace")[:_NOTE_BYTES].ljust(_NOTE_BYTES, b"\0")
            place = worker.id % _WORKERS * _NOTE_BYTES
            memoryview(self._begun).cast("B")[place : place + _NOTE_BYTES] = note

    def _begun_by(self, pid: str) -> str:
        """Which sample the worker with this process id began last, in words."""
        notes = bytes(memoryview(self._begun).cast("B"))
        for place in range(0, len(notes), _NOTE_BYTES):
            noted_pid, _, image_id = notes[place : place + _NOTE_BYTES].rstrip(b"\0").partition(b" ")
            if noted_pid == pid.encode():
                return f"last began '{image_id.decode(errors='replace')}'"
        return "had not begun a sample"

    @contextmanager
    def naming_dead_workers(self) -> Iterator[None]:
        """Name the sample on which a worker of a loader died.

        PyTorch raises the worker's death at any point of the main process, so that this has to enclose the whole loop.

        Raises:
            DataError: instead of PyTorch's `RuntimeError`.
        """
        try:
            yield
        except RuntimeError as error:
            dead = DEAD_WORKER.search(str(error))
            if dead is None:
                raise
            begun = "; ".join(f"worker {pid} {self._begun_by(pid)}" for pid in dead[1].split(", "))
            raise DataError(
                f"A worker of the loader died ({str(error).strip().splitlines()[0]}): {begun}. If memory ran out, "
                "lower dataloader_num_workers. If that sample crashes its decoder, take it out of the data."
            ) from error

    def check(self) -> None:
        """Stop the run if too much of the data is bad.

        Raises:
            DataError: with the share, and the file that lists the samples.
        """
        seen, skipped = self._seen.value, self._skipped.value
        if seen >= self.min_seen and skipped > self.max_share * seen:
            where = f" (see {self.path})" if self.path is not None else ""
            raise DataError(
                f"{skipped} of {seen} samples could not be used, more than the share of {self.max_share:g} that "
                f"max_bad_share allows: repair the data{where}, or raise max_bad_share."
            )
