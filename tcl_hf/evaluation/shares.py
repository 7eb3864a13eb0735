"""Evaluation in several processes: each one works on its share of the rows, and all get all results.

A run may be asked to stop while it evaluates. An evaluation that is `stoppable` ends between two batches, in all
processes: the one that was asked takes part in the next exchange of results with a mark, and all stop there.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm.auto import tqdm

from ..data.collators import TCLTaskCollator
from ..models.distributed import is_distributed

_STOPPED = "stopped"  # takes the place of the results of a process that was asked to stop
_asks: ContextVar[Callable[[], bool] | None] = ContextVar("asks", default=None)


class EvaluationStopped(Exception):
    """An evaluation was asked to stop, and has no result."""


class _StoppedHere(Exception):
    """This process was asked to stop, and has to let the others know."""


@dataclass
class Evaluation:
    """The result of an evaluator: metrics by name, and a prediction for each sample or phrase."""

    metrics: dict[str, float]
    predictions: list[dict[str, Any]] = field(default_factory=list)


def process_share(number: int) -> list[int]:
    """The rows, out of `number`, that this process works on: process r of n takes r, r + n, r + 2n and so on."""
    first, step = (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)
    return list(range(first, number, step))


def gather_results(results: list, number: int) -> list:
    """Give every process the results of all `number` rows in their order.

    Args:
        results: those of this process's rows, in the order of `process_share`. Tensors come back on their device.
    """
    if not is_distributed():
        return results
    shares = _exchange([item.cpu() if isinstance(item, Tensor) else item for item in results])
    device = results[0].device if results and isinstance(results[0], Tensor) else None
    gathered = [shares[row % len(shares)][row // len(shares)] for row in range(number)]
    return gathered if device is None else [item.to(device) for item in gathered]


def _exchange(content: Any) -> list[Any]:
    """Give every process the contents of all, in the order of ranks.

    Raises:
        EvaluationStopped: if another process was asked to stop.
    """
    if not is_distributed():
        return [content]
    contents: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(contents, content)
    if any(isinstance(other, str) and other == _STOPPED for other in contents):
        raise EvaluationStopped
    return contents


@contextmanager
def stoppable(is_asked: Callable[[], bool]) -> Iterator[None]:
    """Let an evaluation in the `with` block stop between two batches when it is asked to. All processes call this.

    Raises:
        EvaluationStopped: in all processes, if it was asked to in one of them.
    """
    token = _asks.set(is_asked)
    try:
        yield
        _exchange(None)  # because another process may have stopped when this one was done
    except _StoppedHere:
        _exchange(_STOPPED)
        raise EvaluationStopped from None
    finally:
        _asks.reset(token)


def may_stop() -> None:
    """Stop the evaluation here if it is asked to; every loop of an evaluator calls this between two batches.

    Raises:
        _StoppedHere: which `stoppable` catches.
    """
    is_asked = _asks.get()
    if is_asked is not None and is_asked():
        raise _StoppedHere


def in_batches(items: list, size: int) -> Iterator[list]:
    """Split a list into lists of `size` items, between which an evaluation may stop; the last one may be shorter."""
    for start in range(0, len(items), size):
        may_stop()
        yield items[start : start + size]


def collated_batches(
    collator: TCLTaskCollator, records: Sequence[dict], batch_size: int, device: torch.device, progress: bool
) -> Iterator[dict[str, Tensor]]:
    """Batches of this process's share of the records, on the device.

    Args:
        collator: makes a batch of records.
        records: those of all processes.
        batch_size: records in a batch of one process.
        device: where the model is.
        progress: whether the main process shows a bar.

    Raises:
        ValueError: if a record cannot be read, because a result without it would be that of other data.
    """
    rows = process_share(len(records))
    bar = tqdm(total=len(rows), desc="Evaluating", disable=not progress, leave=False)
    for batch_rows in in_batches(rows, batch_size):
        batch = collator(_grouped_by_image([records[row] for row in batch_rows]))
        if len(batch["input_ids"]) < len(batch_rows):
            raise ValueError(f"A record cannot be evaluated: {collator.skipped.last}. Leave it out of the data.")
        yield {name: value.to(device) for name, value in batch.items()}
        bar.update(len(batch_rows))
    bar.close()


def _grouped_by_image(records: list[dict]) -> list[dict]:
    """One record for each run of records about the same image, which is then read and encoded once."""

    def image(record: dict) -> object:
        return record["images"] if "images" in record else record.get("image")

    groups = [list(run) for _, run in itertools.groupby(records, key=image)]
    return [{"image_id": group[0].get("image_id"), "records": group} for group in groups]
