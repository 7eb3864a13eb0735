"""The loaders of a run, map-style and streamed."""

import math
from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader

from ..data.pairs import DataError
from ..data.sampling import BucketSampler, CaptionLengths, VisitedSamples, VisitSampler
from ..data.skipped import SkippedSamples
from ..data.streams import StreamLoader
from .agreement import Agreement
from .arguments import TCLTrainingArguments, TrainingError
from .interruption import ignore_sigterm
from .progress import Progress


def build_loader(
    pairs, collator: Callable, args: TCLTrainingArguments, agreement: Agreement, skipped: SkippedSamples
) -> tuple[DataLoader | StreamLoader, VisitSampler | StreamLoader]:
    """A loader whose order and whose samples' random choices follow from the seed alone, and what sets its position."""
    pin_memory = torch.cuda.is_available()
    if isinstance(pairs, torch.utils.data.IterableDataset):
        if args.max_steps <= 0:
            raise TrainingError("A stream has no known length: say how long to train with max_steps.")
        if args.train_sampling_strategy == "group_by_length":
            raise TrainingError(
                "train_sampling_strategy=group_by_length needs the lengths of all captions, which a stream does not "
                "know: leave out one of train_sampling_strategy and streaming."
            )
        stream = StreamLoader(
            pairs,
            collator,
            args.per_device_train_batch_size,
            args.seed,
            num_workers=args.dataloader_num_workers,
            rank=agreement.rank,
            world_size=agreement.world_size,
            any_process=agreement.any,
            skipped=skipped,
            pin_memory=pin_memory,
            worker_init_fn=ignore_sigterm,
        )
        return stream, stream
    if len(pairs) == 0:
        raise DataError("There is nothing to train on: the data holds no pairs.")
    order = VisitSampler(len(pairs), args.seed)
    if args.train_sampling_strategy == "group_by_length":
        order = BucketSampler(CaptionLengths(pairs), args.seed, args.per_device_train_batch_size * agreement.world_size)
    loader = DataLoader(
        VisitedSamples(pairs),
        sampler=order,
        drop_last=len(pairs) >= args.per_device_train_batch_size,
        batch_size=args.per_device_train_batch_size,
        collate_fn=collator,
        num_workers=args.dataloader_num_workers,
        generator=torch.Generator().manual_seed(args.seed),
        pin_memory=pin_memory,
        worker_init_fn=ignore_sigterm,
        persistent_workers=args.dataloader_num_workers > 0,  # the order is made here, not in the workers
    )
    return loader, order


def steps_per_epoch(loader: DataLoader | StreamLoader, args: TCLTrainingArguments, accumulation: int) -> int:
    """Optimizer steps in an epoch; of a stream, all."""
    if isinstance(loader, StreamLoader):
        return args.max_steps
    return max(math.ceil(len(loader) / accumulation), 1)


def batches_of_epoch(
    loader, order, progress: Progress, args: TCLTrainingArguments, accelerator: Accelerator
) -> Iterator[dict]:
    """The epoch's batches that are still to come, on the device."""
    if isinstance(loader, StreamLoader):
        loader.begin(progress.epoch, progress.batch)
        for batch in loader:
            yield send_to_device(batch, accelerator.device, non_blocking=True)
    else:
        order.begin(progress.epoch, progress.batch * args.per_device_train_batch_size * accelerator.num_processes)
        yield from loader
