"""Streams: an order of batches that does not depend on who makes them, and the loader that keeps to it.

A process reads its stream in lanes. Each epoch the shards are put in a new order and dealt out to the lanes of all
processes; shards that are left over are read by every lane, which keeps one row in so many. A lane shuffles its records
window by window and cuts them into batches. Batch `n` of a process is the batch `n // lanes` of lane `n % lanes`,
whichever worker makes it: the number of workers changes nothing, and a position is one number. To go on from there, a
lane skips the rows of earlier windows undecoded, and whole shards where it knows their sizes.
"""

import itertools
import lzma
import math
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import datasets
import pyarrow
import torch
from datasets import IterableDataset
from torch.utils.data import DataLoader, get_worker_info

from .pairs import DataError
from .sampling import Visit, mix_seeds
from .skipped import SkippedSamples

MAX_LANES = 8  # of a process: shards open at once, and workers that need not read the same shards
WINDOW = 4096  # records; some 200 MB of the pictures that img2dataset writes
_BROKEN_SHARD = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowInvalid)


class MixedPairs(torch.utils.data.IterableDataset):
    """Streams of records mixed by weight, for a [`StreamLoader`].

    Each record comes from one of the streams, drawn with these probabilities. There is no end and so no epoch: a stream
    that has been read begins again, in a new order. Iterated by itself, it gives each stream once, one after another.

    Args:
        streams: streams of records `image`, `captions`, `image_id`.
        weights: how often each is drawn, in proportion to the others.

    Raises:
        DataError: if the weights are not one positive number for each stream.
    """

    def __init__(self, streams: Sequence[IterableDataset], weights: Sequence[float]):
        if len(streams) != len(weights):
            raise DataError(f"{len(weights)} weights for {len(streams)} sources: give one for each (data_weights).")
        if not all(math.isfinite(weight) and weight > 0 for weight in weights):
            raise DataError(f"The weights {list(weights)} of the sources must be positive (data_weights).")
        self.streams, self.weights = list(streams), list(weights)

    def select_columns(self, columns: list[str]) -> IterableDataset:
        """These columns of all streams, one after another, once."""
        return datasets.concatenate_datasets([stream.select_columns(columns) for stream in self.streams])

    def __iter__(self) -> Iterator[dict]:
        yield from itertools.chain.from_iterable(self.streams)


class StreamLoader:
    """Batches of a stream for one process: the same whatever the number of workers, and from any position.

    Over all processes an epoch has each record once. Processes may have different numbers of batches: where one has
    none while others go on, it gives empty dictionaries, as for a batch of bad samples.

    Args:
        pairs: a stream of records, or `MixedPairs`.
        collator: makes a batch of a list of records, each with its `visit`.
        batch_size: records in a batch of this process; the last batches of a lane may be smaller.
        seed: order and visits follow from it.
        num_workers: processes that read and collate; 0 for this one.
        rank, world_size: this process and the number of all; both change the order.
        window: records that are shuffled with each other, over all lanes of the process; they are held undecoded.
        any_process: whether its argument is true in any process, called by all at the same positions.
        skipped: where shards are noted that can not be read to their end.
        pin_memory, worker_init_fn: as in PyTorch's `DataLoader`.

    Raises:
        DataError: while iterating, if a source of a mixture has no records.
    """

    def __init__(
        self,
        pairs: IterableDataset | MixedPairs,
        collator: Callable[[list[dict]], Any],
        batch_size: int,
        seed: int,
        *,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        window: int = WINDOW,
        any_process: Callable[[bool], bool] = bool,
        skipped: SkippedSamples | None = None,
        pin_memory: bool = False,
        worker_init_fn: Callable[[int], None] | None = None,
    ):
        self.dataset = _Lanes(pairs, collator, batch_size, seed, rank, world_size, window, skipped)
        self.any_process = any_process
        lanes = self.dataset.num_lanes
        self.num_workers = num_workers if num_workers <= lanes else num_workers // lanes * lanes
        self.pin_memory, self.worker_init_fn = pin_memory, worker_init_fn

    def begin(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch of the next iteration, and how many of its batches (of this process) are done."""
        self.dataset.epoch, self.dataset.start = epoch, start

    def state_dict(self) -> dict[str, dict[int, int]]:
        """The rows of the shards read so far; they only make going on cheaper."""
        return {"shard_sizes": dict(self.dataset.sizes)}

    def load_state_dict(self, state: dict[str, dict[int, int]]) -> None:
        """Take over known sizes of shards."""
        self.dataset.sizes.update(state["shard_sizes"])

    def __iter__(self) -> Iterator[Any]:
        lanes = self.dataset.num_lanes
        loader = DataLoader(
            self.dataset,
            batch_size=None,
            collate_fn=_as_is,  # that of PyTorch would go through every batch
            num_workers=self.num_workers,
            generator=torch.Generator(),  # else PyTorch's global one is drawn from
            pin_memory=self.pin_memory,
            worker_init_fn=self.worker_init_fn,
        )
        made = self._received(loader)
        slot, batch = next(made, (None, None))
        for position in itertools.count(self.dataset.start):
            asks = position == self.dataset.start or position % lanes == 0
            if asks and not self.any_process(slot is not None):
                return
            if slot != position:  # this lane has ended
                yield {}
                continue
            yield batch
            slot, batch = next(made, (None, None))

    def _received(self, loader: DataLoader) -> Iterator[tuple[int, Any]]:
        """Positions and batches as they come from the workers, in order; placeholders are left out."""
        for slot, batch, sizes in loader:
            self.dataset.sizes.update(sizes)
            if batch is not None:
                yield slot, batch


class _Lanes(torch.utils.data.IterableDataset):
    """The lanes of one process, as one of its workers reads them: items (position, batch, sizes of shards).

    PyTorch takes items from its workers in turn. Each worker so gives an item for each of its lanes in each round, one
    without a batch where there is nothing to do, until all its lanes have ended.
    """

    def __init__(
        self,
        pairs: IterableDataset | MixedPairs,
        collator: Callable[[list[dict]], Any],
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        window: int,
        skipped: SkippedSamples | None,
    ):
        streams = pairs.streams if isinstance(pairs, MixedPairs) else [pairs]
        self.weights = torch.tensor(pairs.weights, dtype=torch.double) if isinstance(pairs, MixedPairs) else None
        numbers = [stream.num_shards for stream in streams]
        first_shards = itertools.accumulate(numbers, initial=0)
        self.sources = list(zip(streams, first_shards, numbers, strict=False))  # the last sum is that of all
        self.collator, self.batch_size, self.seed, self.skipped = collator, batch_size, seed, skipped
        self.rank, self.world_size = rank, world_size
        self.num_lanes = lanes_of_a_process(numbers, world_size)
        self.window = max(window // self.num_lanes // batch_size, 1) * batch_size  # of one lane, in whole batches
        self.epoch = self.start = 0
        self.sizes: dict[int, int] = {}  # rows by shard, shards counted over all sources
        self.news: dict[int, int] = {}  # those that the loader has not heard of

    def __iter__(self) -> Iterator[tuple[int, Any, dict[int, int]]]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        share = max(num_workers // self.num_lanes, 1)  # workers on a lane, which take its batches in turn
        turn, first = divmod(worker, self.num_lanes)
        # As many for each worker; numbers beyond the lanes keep the turns in step.
        lanes = range(first, -(-self.num_lanes // num_workers) * num_workers, num_workers)
        running = {lane: self._own_batches(lane, turn, share) for lane in lanes if lane < self.num_lanes}
        round_ = self.start // (self.num_lanes * share) * share + turn
        while running:
            for lane in lanes:
                position, batch = round_ * self.num_lanes + lane, None
                if lane in running and position >= self.start:
                    records = next(running[lane], None)
                    if records is None:
                        del running[lane]
                    else:
                        batch = self.collator(records)
                news, self.news = self.news, {}
                yield position, batch, news
            round_ += share

    def _own_batches(self, lane: int, turn: int, share: int) -> Iterator[list[dict]]:
        """Of a lane's batches from the position of the start on, those of one of the workers on it."""
        first_round = max(-(-(self.start - lane) // self.num_lanes), 0)
        return itertools.islice(self._batches(lane, first_round), (turn - first_round) % share, None, share)

    def _batches(self, lane: int, first_round: int) -> Iterator[list[dict]]:
        """The records of a lane's batches, shuffled window by window."""
        first_window, done = divmod(first_round * self.batch_size, self.window)
        lane += self.rank * self.num_lanes
        readers = [
            self._records(source, lane, int(drawn))
            for source, drawn in enumerate(self._drawn_before(lane, first_window))
        ]
        for number in itertools.count(first_window):
            if self.weights is None:
                records = list(itertools.islice(readers[0], self.window))
            else:
                records = [next(readers[source]) for source in self._draws(lane, number).tolist()]
            if not records:
                return
            order = torch.randperm(len(records), generator=_generator(self.seed, self.epoch, 1, lane, number))
            records = [records[row] for row in order.tolist()][done:]
            done = 0
            while records:  # those that are given away are not held any longer
                batch, records = records[: self.batch_size], records[self.batch_size :]
                yield batch

    def _draws(self, lane: int, window: int) -> torch.Tensor:
        """The source of each record of a window (window,)."""
        generator = _generator(self.seed, self.epoch, 2, lane, window)
        return torch.multinomial(self.weights, self.window, replacement=True, generator=generator)

    def _drawn_before(self, lane: int, first_window: int) -> torch.Tensor:
        """How many records of each source a lane has had before a window (sources,)."""
        if self.weights is None:
            return torch.tensor([first_window * self.window])
        drawn = torch.zeros(len(self.sources), dtype=torch.long)
        for window in range(first_window):
            drawn += torch.bincount(self._draws(lane, window), minlength=len(drawn))
        return drawn

    def _records(self, source: int, lane: int, skip: int) -> Iterator[dict]:
        """The records of a source for one of the lanes of all processes, without the first `skip`.

        Those of a mixture come pass after pass.
        """
        _, first_shard, num_shards = self.sources[source]
        lanes = self.num_lanes * self.world_size
        dealt = num_shards - num_shards % lanes
        empty_passes = 0
        for number in itertools.count() if self.weights is not None else [self.epoch]:
            order = torch.randperm(num_shards, generator=_generator(self.seed, number, 3, source)).tolist()
            # Leftover shards are divided by row; who has the first row changes, so that each lane gets some of few.
            turn = (lane + number) % lanes
            parts = [(shard, 0, 1) for shard in order[lane:dealt:lanes]]
            parts += [(shard, turn, lanes) for shard in order[dealt:]]
            is_empty = True
            for shard, first, step in parts:
                rows = self.sizes.get(first_shard + shard)
                if rows is not None and (own := len(range(first, rows, step))) <= skip:
                    skip -= own
                    is_empty = is_empty and not own
                    continue
                rows = 0
                for rows, record in enumerate(self._shard(source, shard, Visit(self.seed, number, -1 - lane)), 1):
                    if (rows - 1) % step != first:
                        continue
                    is_empty = False
                    if skip:
                        skip -= 1
                        continue
                    yield self._visited(record, number, first_shard + shard, rows - 1)
                self.sizes[first_shard + shard] = self.news[first_shard + shard] = rows
            empty_passes = empty_passes + 1 if is_empty else 0
            if empty_passes == lanes and self.weights is not None:
                raise DataError(
                    f"Source {source + 1} of the mixture holds no records: leave it out, or check its split."
                )

    def _shard(self, source: int, shard: int, visit: Visit) -> Iterator[dict]:
        """The records of one shard; if it breaks off, those before, and it is listed with its visit by this lane."""
        stream, first_shard, num_shards = self.sources[source]
        image_id: object = "none"
        try:
            # Plain iteration would divide the shard over the loader's workers once more.
            for columns in stream.shard(num_shards=num_shards, index=shard).iter(batch_size=1):
                record = {name: values[0] for name, values in columns.items()}
                image_id = record.get("image_id")
                yield record
        except _BROKEN_SHARD as error:
            if self.skipped is not None:
                reason = f"{type(error).__name__}: {error}; the rest of the shard is left out, after {image_id}"
                self.skipped.add(f"shard {first_shard + shard}", reason, visit)

    def _visited(self, record: dict, number: int, shard: int, row: int) -> dict:
        """A record with its visit; an id that is only a row is one of the whole stream with the shard's number."""
        image_id = record.get("image_id")
        if isinstance(image_id, str) and image_id.startswith("#"):
            image_id = f"{shard}{image_id}"
        return {**record, "image_id": image_id, "visit": Visit(self.seed, number, shard << 32 | row)}


def lanes_of_a_process(num_shards: Sequence[int], world_size: int) -> int:
    """The number of lanes with which the shards of some sources are read the fewest times, where workers are many."""

    def reads(lanes: int) -> float:
        total = lanes * world_size
        return sum(number - number % total + number % total * total for number in num_shards) / lanes

    return min(range(1, MAX_LANES + 1), key=reads)


def _as_is(item: Any) -> Any:
    return item


def _generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(mix_seeds(*numbers) >> 1)
