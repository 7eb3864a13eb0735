"""The loader of a run: shuffled map-style data or a stream behind one interface.

The order of a loader, and the random choices of every sample, follow from the seed alone.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ..data.pairs import DataError
from ..data.sampling import BucketSampler, CaptionLengths, VisitedSamples, VisitSampler
from ..data.skipped import SkippedSamples
from ..data.streams import StreamLoader
from ..data.workers import Workers
from .arguments import TCLTrainingArguments, TrainingError
from .engine import Engine

Collator = Callable[[list[dict]], dict[str, Tensor]]


class RunLoader:
    """The batches of a run for one process.

    Args:
        dataset: records, map-style or a stream.
        collator: makes a batch of a list of records.
        skipped: the list of samples that cannot be used.

    Attributes:
        steps_per_epoch: optimizer steps in an epoch.
        state: the objects that belong to a checkpoint, by name.

    Raises:
        TrainingError: if the arguments do not suit a stream.
        DataError: if there are no records.
    """

    def __init__(
        self, dataset: Any, collator: Collator, args: TCLTrainingArguments, engine: Engine, skipped: SkippedSamples
    ):
        self.args, self.engine, self.skipped = args, engine, skipped
        self.collator = collator.for_run(skipped) if hasattr(collator, "for_run") else collator
        self.workers = Workers()
        self.pin_memory = torch.cuda.is_available()
        self.state: dict[str, Any] = {}
        if isinstance(dataset, IterableDataset):
            self._read_stream(dataset)
        else:
            self._shuffle(dataset)

    def _shuffle(self, dataset: Any) -> None:
        """Read map-style records in a random order, or in buckets of about equally long captions."""
        if len(dataset) == 0:
            raise DataError("There is nothing to train on: the data holds no records.")
        args, batch_size = self.args, self.args.per_device_train_batch_size
        self.visits_per_batch = batch_size * self.engine.accelerator.num_processes
        self.order: VisitSampler | StreamLoader = VisitSampler(len(dataset), args.seed)
        if args.train_sampling_strategy == "group_by_length":
            self.order = BucketSampler(CaptionLengths(dataset), args.seed, self.visits_per_batch)
        loader = DataLoader(
            VisitedSamples(dataset),
            sampler=self.order,
            drop_last=len(dataset) >= batch_size,
            batch_size=batch_size,
            collate_fn=self.collator,
            generator=torch.Generator().manual_seed(args.seed),
            persistent_workers=args.dataloader_num_workers > 0,  # The order is made here and not in the workers.
            pin_memory=self.pin_memory,
            **self.workers.options(args.dataloader_num_workers),
        )
        self.loader = self.engine.accelerator.prepare(loader)  # It gives each process its own batches.
        self.steps_per_epoch = max(math.ceil(len(self.loader) / self.engine.accumulation_steps), 1)

    def _read_stream(self, dataset: IterableDataset) -> None:
        """Read a stream. Its length is not known, and so all steps of the run count as one epoch."""
        args, engine = self.args, self.engine
        if args.max_steps <= 0:
            raise TrainingError("A stream has no known length: set max_steps to the number of steps to train for.")
        if args.train_sampling_strategy == "group_by_length":
            raise TrainingError(
                "train_sampling_strategy=group_by_length needs the lengths of all captions, and those of a stream are "
                "not known: leave out one of train_sampling_strategy and streaming."
            )
        self.loader = self.order = StreamLoader(
            dataset,
            self.collator,
            args.per_device_train_batch_size,
            args.seed,
            rank=engine.accelerator.process_index,
            world_size=engine.accelerator.num_processes,
            any_process=engine.agreement.any,
            skipped=self.skipped,
            num_workers=args.dataloader_num_workers,
            pin_memory=self.pin_memory,
            workers=self.workers,
        )
        self.state = {"stream": self.loader}
        self.visits_per_batch, self.steps_per_epoch = 1, args.max_steps  # A stream counts batches itself.

    def batches(self, epoch: int, start: int) -> Iterator[dict[str, Tensor]]:
        """The batches of an epoch, without the first `start`, on the device.

        Where no sample of a batch can be used, the batch is an empty dictionary.
        """
        self.order.begin(epoch, start * self.visits_per_batch)
        for batch in self.loader:
            yield send_to_device(batch, self.engine.device, non_blocking=True)

    def close(self) -> None:
        """End the workers; the loader cannot be used afterwards."""
        self.workers.attend(getattr(self.loader, "_iterator", None))  # that of the workers which stay for all epochs
        self.workers.end()
