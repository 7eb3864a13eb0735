"""The loaders of a run: shuffled map-style data and streams behind one interface.

The order of a loader, and the random choices of every sample, follow from the seed alone.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ..data.pairs import DataError
from ..data.sampling import BucketSampler, CaptionLengths, VisitedSamples, VisitSampler
from ..data.skipped import SkippedSamples
from ..data.streams import StreamLoader
from .agreement import Agreement
from .arguments import TCLTrainingArguments, TrainingError
from .engine import Engine
from .interruption import ignore_sigterm


class RunLoader(Protocol):
    """The interface of a loader to the loop."""

    state: list[Any]  # the objects that belong to a checkpoint

    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""

    def batches(self, epoch: int, start: int) -> Iterator[dict[str, Tensor]]:
        """The batches of an epoch for this process, without the first `start`, on the device.

        Where no sample of a batch can be used, the batch is an empty dictionary.
        """


def build_loader(
    dataset: Any,
    collator: Callable[[list[dict]], dict[str, Tensor]],
    args: TCLTrainingArguments,
    engine: Engine,
    agreement: Agreement,
    skipped: SkippedSamples,
) -> RunLoader:
    """Make the loader of a run.

    Args:
        dataset: records, map-style or a stream.
        collator: makes a batch of a list of records.
        skipped: the list of samples that cannot be used.

    Raises:
        TrainingError: if the arguments do not suit a stream.
        DataError: if there are no records.
    """
    if hasattr(collator, "for_run"):
        collator = collator.for_run(skipped)
    if isinstance(dataset, IterableDataset):
        return StreamedLoader(dataset, collator, args, engine, agreement, skipped)
    return ShuffledLoader(dataset, collator, args, engine, agreement)


class ShuffledLoader:
    """Map-style records in a random order, or in buckets of about equally long captions."""

    def __init__(
        self,
        dataset: Any,
        collator: Callable[[list[dict]], dict[str, Tensor]],
        args: TCLTrainingArguments,
        engine: Engine,
        agreement: Agreement,
    ):
        if len(dataset) == 0:
            raise DataError("There is nothing to train on: the data holds no records.")
        self.state: list[Any] = []
        self.batch_size = args.per_device_train_batch_size
        self.samples_per_batch = self.batch_size * agreement.world_size
        self.accumulation_steps = engine.accumulation_steps
        self.order = VisitSampler(len(dataset), args.seed)
        if args.train_sampling_strategy == "group_by_length":
            self.order = BucketSampler(CaptionLengths(dataset), args.seed, self.samples_per_batch)
        self.loader = engine.prepare_loader(
            DataLoader(
                VisitedSamples(dataset),
                sampler=self.order,
                drop_last=len(dataset) >= self.batch_size,
                batch_size=self.batch_size,
                collate_fn=collator,
                num_workers=args.dataloader_num_workers,
                generator=torch.Generator().manual_seed(args.seed),
                pin_memory=torch.cuda.is_available(),
                worker_init_fn=ignore_sigterm,
                persistent_workers=args.dataloader_num_workers > 0,  # The order is made here and not in the workers.
            )
        )

    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch, at least one."""
        return max(math.ceil(len(self.loader) / self.accumulation_steps), 1)

    def batches(self, epoch: int, start: int) -> Iterator[dict[str, Tensor]]:
        """See `RunLoader`."""
        self.order.begin(epoch, start * self.samples_per_batch)
        yield from self.loader


class StreamedLoader:
    """A stream of records, which has no known length: a run takes as many steps as it is told."""

    def __init__(
        self,
        dataset: IterableDataset,
        collator: Callable[[list[dict]], dict[str, Tensor]],
        args: TCLTrainingArguments,
        engine: Engine,
        agreement: Agreement,
        skipped: SkippedSamples,
    ):
        if args.max_steps <= 0:
            raise TrainingError("A stream has no known length: set max_steps to the number of steps to train for.")
        if args.train_sampling_strategy == "group_by_length":
            raise TrainingError(
                "train_sampling_strategy=group_by_length needs the lengths of all captions, and those of a stream are "
                "not known: leave out one of train_sampling_strategy and streaming."
            )
        self.max_steps, self.engine = args.max_steps, engine
        self.loader = StreamLoader(
            dataset,
            collator,
            args.per_device_train_batch_size,
            args.seed,
            num_workers=args.dataloader_num_workers,
            rank=agreement.rank,
            world_size=agreement.world_size,
            any_process=agreement.any,
            skipped=skipped,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=ignore_sigterm,
        )
        self.state: list[Any] = [self.loader]

    def steps_per_epoch(self) -> int:
        """All steps of the run."""
        return self.max_steps

    def batches(self, epoch: int, start: int) -> Iterator[dict[str, Tensor]]:
        """See `RunLoader`."""
        self.loader.begin(epoch, start)
        for batch in self.loader:
            yield self.engine.to_device(batch)
