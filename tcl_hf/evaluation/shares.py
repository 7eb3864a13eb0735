"""What all evaluators share: a model in eval mode, batches, and the work of several processes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data.collators import TCLTaskCollator


@dataclass
class Evaluation:
    """What an evaluator found: metrics by name, and a prediction for each record or phrase."""

    metrics: dict[str, float]
    predictions: list[dict[str, Any]] = field(default_factory=list)


def batches_of_records(
    collator: TCLTaskCollator, records: Sequence[dict], batch_size: int, device: torch.device, progress: bool
) -> Iterator[dict[str, Tensor]]:
    """Batches of this process's share of the records, on the device."""
    rows = own_share(len(records))
    bar = tqdm(total=len(rows), desc="Evaluating", disable=not progress, leave=False)
    for some in batches(rows, batch_size):
        batch = collator(_by_image([records[row] for row in some]))
        if len(batch["input_ids"]) < len(some):
            raise ValueError(f"A record can not be evaluated: {collator.skipped.last}. Leave it out of the data.")
        yield {name: value.to(device) for name, value in batch.items()}
        bar.update(len(some))
    bar.close()


def _by_image(records: list[dict]) -> list[dict]:
    """Neighbours about the same image as one, which is then read and encoded once."""

    def image(record: dict) -> object:
        return record["images"] if "images" in record else record.get("image")

    groups: list[list[dict]] = []
    for record in records:
        if groups and image(groups[-1][0]) == image(record):
            groups[-1].append(record)
        else:
            groups.append([record])
    return [{"image_id": own[0].get("image_id"), "records": own} for own in groups]


class evaluating:
    """A model in eval mode within a `with` block, and in the mode in which it came after it."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.was_training = model, model.training

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *error) -> None:
        self.model.train(self.was_training)


def own_share(number: int) -> list[int]:
    """Which of so many items this process works on: each n-th of n processes."""
    if dist.is_available() and dist.is_initialized():
        return list(range(dist.get_rank(), number, dist.get_world_size()))
    return list(range(number))


def exchange(own: list, number: int) -> list:
    """The results of all processes in the order of the items, from those of `own_share`."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return own
    shares: list[list] = [[] for _ in range(dist.get_world_size())]
    on_cpu = [item.cpu() if isinstance(item, Tensor) else item for item in own]
    dist.all_gather_object(shares, on_cpu)
    device = own[0].device if own and isinstance(own[0], Tensor) else None
    items = [shares[row % len(shares)][row // len(shares)] for row in range(number)]
    return items if device is None else [item.to(device) for item in items]


def batches(items: list, size: int) -> Iterator[list]:
    """Items in lists of `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
