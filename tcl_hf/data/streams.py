"""Streams: batches in an order that does not depend on the number of workers, from any position on.

A process reads its stream in several lanes, each of which makes batches by itself:

- In each epoch, the shards (files) are put in a new order and dealt out to the lanes of all processes. Shards that are
  left over are read by every lane, and each lane keeps its share of their rows.
- A lane collects a window of records, shuffles them, and cuts them into batches.
- The process takes one batch from each lane in turn. That is a round. Batch `n` comes from lane `n % lanes`, in round
  `n // lanes`, so that a position in the stream is one number.

For example, one process with two lanes and five shards in the order C A E B D:

    lane 0 reads C, E and every other row of D       batch      0  1  2  3  4  5
    lane 1 reads A, B and the other rows of D        of lane    0  1  0  1  0  1
                                                     in round   0  0  1  1  2  2

Workers share the lanes. Two workers take a lane each; four workers take turns: the first and the third are on lane 0,
and one makes the batches of the even rounds, the other those of the odd rounds.

To start at a later position, a lane skips the rows of earlier windows without decoding their images, and it skips whole
shards if their sizes are in the checkpoint.
"""

import itertools
import lzma
import math
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import pyarrow
import torch
from datasets import IterableDataset
from torch.utils.data import DataLoader, get_worker_info

from .records import DataError
from .sampling import Visit, mix_seeds
from .skipped import SkippedSamples
from .workers import Workers

MAX_LANES = 8  # In each process. A lane keeps a shard open; workers on the same lane read the same shards.
WINDOW = 4096  # records; about 200 MB of images as img2dataset writes them
_BROKEN_SHARD = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowInvalid)


class MixedStreams(torch.utils.data.IterableDataset):
    """Streams of records that a [`StreamLoader`] mixes by weight.

    The loader draws the stream of each record with probabilities in proportion to the weights. A stream that has been
    read to its end begins again in a new order, so that a mixture has no end and no epochs. Iterating over the object
    itself gives the records of each stream once, one stream after another.

    Args:
        streams: streams of records `image`, `captions`, `image_id`.
        weights: how often each stream is drawn, relative to the others.

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
        """Some columns of all streams, one stream after another, once."""
        return datasets.concatenate_datasets([stream.select_columns(columns) for stream in self.streams])

    def __iter__(self) -> Iterator[dict]:
        yield from itertools.chain.from_iterable(self.streams)


class StreamLoader:
    """The batches of a stream for one process: the same for any number of workers, and from any position on.

    In an epoch, the processes together read each record once. They may have different numbers of batches: a process
    that has no more gives empty dictionaries while others go on, as it does for a batch without a usable sample.

    Args:
        dataset: a stream of records, or `MixedStreams`.
        collator: makes a batch of a list of records; each record has its `visit`.
        batch_size: records in a batch of this process; the last batches of a lane may be smaller.
        seed: the order and the visits follow from it.
        num_workers: number of processes that read and collate; with 0, this process does it.
        rank, world_size: the number of this process and the number of all. The order depends on both.
        window: number of records that are shuffled with each other, over all lanes of the process. They are held in
            memory with undecoded images.
        any_process: returns whether its argument is true in any process. All processes call it at the same positions.
        skipped: lists the shards that cannot be read to their end.
        pin_memory: as in PyTorch's `DataLoader`.
        workers: starts and ends the processes.

    Raises:
        DataError: while iterating, if a source of a mixture has no records.
    """

    def __init__(
        self,
        dataset: IterableDataset | MixedStreams,
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
        workers: Workers | None = None,
    ):
        self.lanes = _Lanes(dataset, collator, batch_size, seed, rank, world_size, window, skipped)
        self.any_process = any_process
        num_lanes = self.lanes.num_lanes
        self.num_workers = num_workers if num_workers <= num_lanes else num_workers // num_lanes * num_lanes
        self.pin_memory, self.workers = pin_memory, workers or Workers()

    def begin(self, epoch: int, start: int = 0) -> None:
        """Set the epoch of the next iteration, and the number of this process's batches that are done already."""
        self.lanes.epoch, self.lanes.start = epoch, start

    def state_dict(self) -> dict[str, dict[int, int]]:
        """The sizes of the shards read so far. They make resuming faster and change nothing else."""
        return {"shard_sizes": dict(self.lanes.sizes)}

    def load_state_dict(self, state: dict[str, dict[int, int]]) -> None:
        """Take over the sizes of shards from a checkpoint."""
        self.lanes.sizes.update(state["shard_sizes"])

    def __iter__(self) -> Iterator[Any]:
        loader = DataLoader(
            self.lanes,
            batch_size=None,
            collate_fn=tuple,  # An item is a tuple already. PyTorch's default would convert every batch once more.
            generator=torch.Generator(),  # Without one, PyTorch draws from its global generator.
            pin_memory=self.pin_memory,
            **self.workers.options(self.num_workers),
        )
        batches = self._batches(loader)
        position_of_next, batch = next(batches, (None, None))
        for position in itertools.count(self.lanes.start):
            begins_round = position == self.lanes.start or position % self.lanes.num_lanes == 0
            if begins_round and not self.any_process(position_of_next is not None):
                return
            if position_of_next == position:
                yield batch
                position_of_next, batch = next(batches, (None, None))
            else:  # The lane of this position has ended.
                yield {}

    def _batches(self, loader: DataLoader) -> Iterator[tuple[int, Any]]:
        """The batches with their positions, in order, without the placeholders."""
        for position, batch, sizes in self.workers.iterate(loader):
            self.lanes.sizes.update(sizes)
            if batch is not None:
                yield position, batch


@dataclass(eq=False)
class _Lanes(torch.utils.data.IterableDataset):
    """The lanes of one process. Each worker iterates over a copy, and reads only its own lanes.

    An item is a position, its batch, and the sizes of the shards that the worker has read to their end since its last
    item. PyTorch takes one item from each worker in turn. To keep this order equal to that of the positions, every
    worker gives equally many items in a round. Where it has no batch to give, the item is a placeholder without one.
    """

    dataset: IterableDataset | MixedStreams
    collator: Callable[[list[dict]], Any]
    batch_size: int
    seed: int
    rank: int
    world_size: int
    window: int
    skipped: SkippedSamples | None

    def __post_init__(self):
        is_mixed = isinstance(self.dataset, MixedStreams)
        streams = self.dataset.streams if is_mixed else [self.dataset]
        self.weights = torch.tensor(self.dataset.weights, dtype=torch.double) if is_mixed else None
        numbers = [stream.num_shards for stream in streams]
        first_shards = itertools.accumulate(numbers, initial=0)
        # A stream, the number of its first shard when the shards of all sources are counted, and how many it has.
        self.sources = list(zip(streams, first_shards, numbers, strict=False))
        self.num_lanes = lanes_of_a_process(numbers, self.world_size)
        # From here on, the records in a window of one lane.
        self.window = max(self.window // self.num_lanes // self.batch_size, 1) * self.batch_size
        self.epoch = self.start = 0
        self.sizes: dict[int, int] = {}  # rows by shard; shards are counted over all sources
        self.new_sizes: dict[int, int] = {}  # those that no item has carried to the loader yet

    def __iter__(self) -> Iterator[tuple[int, Any, dict[int, int]]]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        workers_per_lane = max(num_workers // self.num_lanes, 1)
        turn, first_lane = divmod(worker, self.num_lanes)
        # All workers get equally many lanes. Those beyond the last lane do not exist: they give placeholders.
        lanes_per_worker = math.ceil(self.num_lanes / num_workers)
        lanes = range(first_lane, lanes_per_worker * num_workers, num_workers)
        running = {
            lane: self._batches_of_worker(lane, turn, workers_per_lane) for lane in lanes if lane < self.num_lanes
        }
        round_number = self.start // (self.num_lanes * workers_per_lane) * workers_per_lane + turn
        while running:
            for lane in lanes:
                position, batch = round_number * self.num_lanes + lane, None
                if lane in running and position >= self.start:
                    records = next(running[lane], None)
                    if records is None:
                        del running[lane]
                    else:
                        batch = self.collator(records)
                new_sizes, self.new_sizes = self.new_sizes, {}
                yield position, batch, new_sizes
            round_number += workers_per_lane

    def _batches_of_worker(self, lane: int, turn: int, workers_per_lane: int) -> Iterator[list[dict]]:
        """The records of the batches that one worker makes of a lane, from the start position on."""
        first_round = max(math.ceil((self.start - lane) / self.num_lanes), 0)
        batches = self._batches_of_lane(lane, first_round)
        return itertools.islice(batches, (turn - first_round) % workers_per_lane, None, workers_per_lane)

    def _batches_of_lane(self, lane: int, first_round: int) -> Iterator[list[dict]]:
        """The records of all batches of a lane from a round on, shuffled window by window."""
        first_window, done = divmod(first_round * self.batch_size, self.window)
        lane += self.rank * self.num_lanes  # From here on, lanes are counted over all processes.
        readers = [
            self._records(source, lane, int(number))
            for source, number in enumerate(self._drawn_before(lane, first_window))
        ]
        for window in itertools.count(first_window):
            if self.weights is None:
                records = list(itertools.islice(readers[0], self.window))
            else:
                records = [next(readers[source]) for source in self._draw_sources(lane, window).tolist()]
            if not records:
                return
            order = torch.randperm(len(records), generator=_generator(self.seed, self.epoch, 1, lane, window))
            records = [records[row] for row in order.tolist()][done:]
            done = 0
            while records:  # The list shrinks, so that the images of earlier batches are freed.
                batch, records = records[: self.batch_size], records[self.batch_size :]
                yield batch

    def _draw_sources(self, lane: int, window: int) -> torch.Tensor:
        """The source of each record in a window of a mixture: (window,)."""
        generator = _generator(self.seed, self.epoch, 2, lane, window)
        weights: Any = self.weights  # Only a mixture has them.
        return torch.multinomial(weights, self.window, replacement=True, generator=generator)

    def _drawn_before(self, lane: int, first_window: int) -> torch.Tensor:
        """The number of records that a lane has taken from each source before a window: (sources,)."""
        if self.weights is None:
            return torch.tensor([first_window * self.window])
        drawn = torch.zeros(len(self.sources), dtype=torch.long)
        for window in range(first_window):
            drawn += torch.bincount(self._draw_sources(lane, window), minlength=len(drawn))
        return drawn

    def _records(self, source: int, lane: int, skip: int) -> Iterator[dict]:
        """The records that one of the lanes of all processes reads from a source, without the first `skip`.

        A source of a mixture is read again and again: pass 0, 1, 2 and so on. Otherwise there is one pass, whose number
        is the epoch.
        """
        first_shard = self.sources[source][1]
        is_mixed = self.weights is not None
        empty_passes = 0
        for pass_number in itertools.count() if is_mixed else [self.epoch]:
            is_empty = True
            for shard, first_row, step in self._parts(source, lane, pass_number):
                rows = self.sizes.get(first_shard + shard)
                part_size = None if rows is None else len(range(first_row, rows, step))
                if part_size is not None and part_size <= skip:
                    skip -= part_size
                    is_empty = is_empty and part_size == 0
                    continue
                visit_of_shard = Visit(self.seed, pass_number, -1 - lane)
                for row, record in enumerate(self._shard(source, shard, visit_of_shard)):
                    if row % step != first_row:
                        continue
                    is_empty = False
                    if skip:
                        skip -= 1
                        continue
                    yield self._with_visit(record, pass_number, first_shard + shard, row)
            empty_passes = empty_passes + 1 if is_empty else 0
            # A lane that gets none of few rows in one pass gets some in a later one, see `_parts`.
            if is_mixed and empty_passes == self.num_lanes * self.world_size:
                raise DataError(
                    f"Source {source + 1} of the mixture holds no records: leave it out, or check its split."
                )

    def _parts(self, source: int, lane: int, pass_number: int) -> list[tuple[int, int, int]]:
        """The parts of a source that a lane reads in a pass: shard, first row, and the step from row to row."""
        num_shards = self.sources[source][2]
        num_lanes = self.num_lanes * self.world_size
        order = torch.randperm(num_shards, generator=_generator(self.seed, pass_number, 3, source)).tolist()
        num_dealt = num_shards - num_shards % num_lanes
        # A shard that is left over may have fewer rows than there are lanes. Therefore another lane reads its first row
        # in each pass.
        first_row = (lane + pass_number) % num_lanes
        dealt = [(shard, 0, 1) for shard in order[lane:num_dealt:num_lanes]]
        return dealt + [(shard, first_row, num_lanes) for shard in order[num_dealt:]]

    def _shard(self, source: int, shard: int, visit: Visit) -> Iterator[dict]:
        """The records of one shard; its size is noted at the end.

        If the shard breaks off, it ends with its last good record, and the shard is listed with this visit.
        """
        stream, first_shard, num_shards = self.sources[source]
        rows = 0
        image_id: object = "none"
        try:
            # `iter` with a batch size is used, because plain iteration would divide the shard among the workers again.
            for columns in stream.shard(num_shards=num_shards, index=shard).iter(batch_size=1):
                record = {name: values[0] for name, values in columns.items()}
                image_id = record.get("image_id")
                yield record
                rows += 1
        except _BROKEN_SHARD as error:
            if self.skipped is not None:
                reason = f"{type(error).__name__}: {error}; the rest of the shard is left out, after {image_id}"
                self.skipped.add(f"shard {first_shard + shard}", reason, visit)
        self.sizes[first_shard + shard] = self.new_sizes[first_shard + shard] = rows

    def _with_visit(self, record: dict, pass_number: int, shard: int, row: int) -> dict:
        """A record with its visit. An id like "#7", which is a row number, gets the shard's number in front."""
        image_id = record.get("image_id")
        if isinstance(image_id, str) and image_id.startswith("#"):
            image_id = f"{shard}{image_id}"
        return {**record, "image_id": image_id, "visit": Visit(self.seed, pass_number, shard << 32 | row)}


def lanes_of_a_process(num_shards: Sequence[int], world_size: int) -> int:
    """The number of lanes with which shards are read the fewest times, if there is a worker for each lane.

    Args:
        num_shards: number of shards of each source.
        world_size: number of processes, which have equally many lanes.
    """

    def reads_per_lane(lanes: int) -> float:
        total = lanes * world_size
        return sum(number - number % total + number % total * total for number in num_shards) / lanes

    return min(range(1, MAX_LANES + 1), key=reads_per_lane)


def _generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(mix_seeds(*numbers) >> 1)
