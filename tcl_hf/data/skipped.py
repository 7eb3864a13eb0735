"""Samples that cannot be used: they are counted, listed, and stop the run when they are too many."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import Array, Value
from pathlib import Path
from typing import Any

import torch

from .pairs import DataError
from .sampling import Visit

_WORKERS, _ID_BYTES = 128, 256  # notes on the samples that workers have begun


@dataclass
class SkippedSamples:
    """Counts the samples that could not be used and lists them, one JSON line each, also from worker processes.

    A run that goes on makes the visits after its checkpoint again, also those of batches that were prepared ahead: it
    lists no bad sample that is listed already, and counts none twice. (Good ones that were prepared ahead count twice
    among those seen.) The sample that each of a loader's workers began last is known, for the case that it dies.

    Args:
        path: the list's file; None keeps none.
        max_share: the run stops when a larger share of the samples seen is bad.
    """

    path: str | os.PathLike | None = None
    max_share: float = 0.1
    min_seen: int = 100
    last: str = field(default="none yet", init=False)
    # Visits listed by the run before this one, and whether its checkpoint has counted them.
    _listed: dict[str, bool] = field(default_factory=dict, init=False, repr=False)
    _seen: Any = field(default_factory=lambda: Value("q", 0), repr=False)
    _skipped: Any = field(default_factory=lambda: Value("q", 0), repr=False)
    _begun: Any = field(default_factory=lambda: Array("c", _WORKERS * _ID_BYTES, lock=False), repr=False)

    @property
    def count(self) -> int:
        return self._skipped.value

    def state_dict(self) -> dict[str, int]:
        """The numbers of this process so far, and how long the list is, for a checkpoint."""
        with self._skipped.get_lock():  # nothing is counted and not yet listed
            size = os.path.getsize(self.path) if self.path is not None and os.path.exists(self.path) else 0
            return {"seen": self._seen.value, "count": self.count, "list_bytes": size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a checkpoint: with its numbers, and knowing what is listed."""
        self._seen.value, self._skipped.value = state.get("seen", 0), state.get("count", 0)
        if self.path is None or not os.path.exists(self.path):
            return
        position = 0
        with open(self.path, "rb") as file:
            for text in file:
                position += len(text)
                try:
                    line = json.loads(text)
                except ValueError:  # cut off in the midst, by a full disk for instance: it tells of no visit
                    continue
                if "visit" in line:
                    name = visit_name(line["image_id"], *line["visit"])
                    self._listed[name] = position <= state.get("list_bytes", 0)

    def mend_list(self) -> None:
        """Take off the last line if a kill has cut it; for one process, while no other adds to the list."""
        if self.path is not None and os.path.exists(self.path):
            content = Path(self.path).read_bytes()
            os.truncate(self.path, content.rfind(b"\n") + 1)

    def saw(self, number: int) -> None:
        with self._seen.get_lock():
            self._seen.value += number

    def add(self, image_id: object, reason: str, visit: "Visit | None" = None) -> None:
        """Note one bad sample, why it is bad, and the visit on which it was found."""
        self.last = f"{image_id}: {reason}"
        entry: dict[str, Any] = {"image_id": str(image_id), "reason": reason}
        is_listed = is_counted = False
        if visit is not None:
            entry["visit"] = [visit.epoch, visit.index]
            name = visit_name(entry["image_id"], *entry["visit"])
            is_listed, is_counted = name in self._listed, self._listed.get(name, False)
        with self._skipped.get_lock():
            self._skipped.value += not is_counted
            if self.path is not None and not is_listed:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def begins(self, image_id: object) -> None:
        """Note the sample that this process works on, if it is a worker of a loader."""
        worker = torch.utils.data.get_worker_info()
        if worker is not None:
            text = f"{os.getpid()} {image_id}".encode(errors="replace")[:_ID_BYTES].ljust(_ID_BYTES, b"\0")
            place = worker.id % _WORKERS * _ID_BYTES
            memoryview(self._begun).cast("B")[place : place + _ID_BYTES] = text

    def begun_by(self, pid: int) -> str | None:
        """The sample that a worker began last; None if it has not begun any."""
        notes = bytes(memoryview(self._begun).cast("B"))
        for place in range(0, len(notes), _ID_BYTES):
            number, _, image_id = notes[place : place + _ID_BYTES].rstrip(b"\0").partition(b" ")
            if number == str(pid).encode():
                return image_id.decode(errors="replace")
        return None

    @contextmanager
    def naming_dead_workers(self) -> Iterator[None]:
        """Say of a loader's worker that dies which sample it died on.

        PyTorch tells of it at any point of the main process, so this goes around the whole loop.

        Raises:
            DataError: in place of PyTorch's `RuntimeError`.
        """
        try:
            yield
        except RuntimeError as error:
            dead = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)", str(error))
            if dead is None:
                raise
            samples = {pid: self.begun_by(int(pid)) for pid in dead[1].split(", ")}
            where = "; ".join(
                f"worker {pid} " + ("had not begun any" if sample is None else f"last began '{sample}'")
                for pid, sample in samples.items()
            )
            raise DataError(
                f"A worker of the loader died ({str(error).strip().splitlines()[0]}). Sample: {where}. If memory ran "
                "out, lower dataloader_num_workers; if that sample crashes its decoder, take it out of the data."
            ) from error

    def check(self) -> None:
        """Stop the run if too much of the data is bad.

        Raises:
            DataError: with the share, and where the samples are listed.
        """
        seen, skipped = self._seen.value, self._skipped.value
        if seen >= self.min_seen and skipped > self.max_share * seen:
            raise DataError(
                f"{skipped} of {seen} samples could not be used, more than the share of {self.max_share:g} that "
                f"max_bad_share allows; they are listed in {self.path}."
            )


def visit_name(image_id: str, epoch: int, index: int) -> str:
    """What a visit of a sample is known by; several samples may share one, as texts about one image do."""
    return f"{epoch} {index} {image_id}"
