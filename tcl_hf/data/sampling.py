"""The order of map-style samples, and the random numbers of each visit."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch.utils.data import Sampler

from .pairs import DataError

_WORD = r"[^\s/-]*[\pL\pN][^\s/-]*"  # of a cleaned caption, as RE2 writes it


def mix_seeds(*numbers: int) -> int:
    """A seed of 64 bits that follows from numbers and their order."""
    mixed = 0
    for number in numbers:  # splitmix64's finaliser on each
        mixed = (mixed + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
    return mixed


@dataclass(frozen=True)
class Visit:
    """One visit of a sample: all its random choices follow from these numbers, whichever process makes them."""

    seed: int
    epoch: int
    index: int

    def entropy(self) -> int:
        """A seed for the choices of this visit."""
        return mix_seeds(self.seed, self.epoch, self.index)

    def caption(self, number: int) -> int:
        """Which of a record's captions a collator takes: its first choice, foreseen."""
        if number < 2:
            return 0
        return int(torch.randint(number, (), generator=torch.Generator().manual_seed(self.entropy())))


class VisitSampler(Sampler[Visit]):
    """The visits of one epoch, shuffled by seed and epoch; `start` skips those of a run that goes on."""

    def __init__(self, num_samples: int, seed: int):
        self.num_samples, self.seed = num_samples, seed
        self.epoch, self.start = 0, 0

    def begin(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch of the next iteration, and how many of its visits are done."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[Visit]:
        yield from self._visits(self._order()[self.start :])

    def _order(self) -> list[int]:
        generator = torch.Generator().manual_seed(Visit(self.seed, self.epoch, -1).entropy() >> 1)
        return torch.randperm(self.num_samples, generator=generator).tolist()

    def _visits(self, order: list[int]) -> Iterator[Visit]:
        for index in order:
            yield Visit(self.seed, self.epoch, index)


class CaptionLengths:
    """Words and characters of every caption of map-style records, read once and without the images.

    Words follow tokens closely and are counted twenty times faster.

    Raises:
        DataError: for records without captions.
    """

    def __init__(self, pairs: Dataset):
        if "captions" not in getattr(pairs, "column_names", ()):
            raise DataError(
                "train_sampling_strategy=group_by_length puts captions of about the same length together, and these "
                "records have none: leave it out."
            )
        numbers, words, characters = [], [], []
        for table in pairs.select_columns(["captions"]).with_format("arrow").iter(100_000):
            column = pc.cast(table["captions"].combine_chunks(), pa.list_(pa.string()))
            texts = column.flatten()
            numbers.append(pc.fill_null(pc.list_value_length(column), 0).to_numpy())
            words.append(pc.fill_null(pc.count_substring_regex(texts, _WORD), 0).to_numpy())
            characters.append(pc.fill_null(pc.utf8_length(texts), 0).to_numpy())
        self.first = np.concatenate([[0], *numbers]).cumsum()  # of each sample among all captions
        self.words, self.characters = np.concatenate(words), np.concatenate(characters)

    def __len__(self) -> int:
        return len(self.first) - 1

    def of(self, visit: Visit) -> tuple[int, int]:
        """Words of the caption that is taken, and among equal ones (all, where words are not spaced) characters.

        Where some of a sample's captions can not be used it may be another's: the order is a guess, not a promise.
        """
        first, end = self.first[visit.index : visit.index + 2].tolist()
        if first == end:
            return 0, 0
        caption = first + visit.caption(end - first)
        return int(self.words[caption]), int(self.characters[caption])


class BucketSampler(VisitSampler):
    """The visits of one epoch in groups of about equally long captions, so that little padding is computed.

    Within windows of the shuffled order visits are sorted by the length of the caption that they take; the groups of a
    window come in random order. What does not fill a group stays at the end, so that a loader which drops it leaves out
    what it would without groups.

    Args:
        lengths: of the captions of each sample.
        group_size: visits of a group: one batch of each process.
        window: groups in a window. More leave less padding (of Flickr8k's captions by 32: 10 leave 8 %, 50 leave 2 %)
            and mix the samples less.
    """

    def __init__(self, lengths: CaptionLengths, seed: int, group_size: int, window: int = 50):
        super().__init__(len(lengths), seed)
        self.lengths, self.group_size, self.window = lengths, group_size, window

    def __iter__(self) -> Iterator[Visit]:
        size = self.group_size
        num_grouped = self.num_samples // size * size
        order = self._order()
        for begin in range(0, num_grouped, self.window * size):
            end = min(begin + self.window * size, num_grouped)
            if end <= self.start:  # done before the run went on
                continue
            window = sorted(self._visits(order[begin:end]), key=self.lengths.of)
            generator = torch.Generator().manual_seed(mix_seeds(self.seed, self.epoch, -1, begin))
            groups = torch.randperm(len(window) // size, generator=generator).tolist()
            visits = (visit for group in groups for visit in window[group * size : (group + 1) * size])
            yield from islice(visits, max(self.start - begin, 0), None)
        yield from self._visits(order[max(self.start, num_grouped) :])


class VisitedPairs(torch.utils.data.Dataset):
    """Records of a map-style data set, looked up by visit."""

    def __init__(self, pairs: Dataset):
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, visit: Visit) -> dict:
        return {**self.pairs[visit.index], "visit": visit}


class SharedImages(torch.utils.data.Dataset):
    """Records by image: an item holds as `records` all that are about the same one (or the same several).

    Images are the same where their path is, or without a path their bytes.
    """

    def __init__(self, records: Dataset):
        self.records = records
        rows: dict[tuple, list[int]] = {}
        column = "images" if "images" in records.column_names else "image"
        for row, sources in enumerate(records.select_columns([column])[column]):
            sources = sources if isinstance(sources, list) else [sources]
            rows.setdefault(tuple(map(_identity, sources)), []).append(row)
        self.groups = list(rows.values())

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> dict:
        columns = self.records[self.groups[index]]
        records = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return {"image_id": records[0].get("image_id"), "records": records}


def _identity(image: dict) -> str | bytes:
    return image.get("path") or hashlib.blake2b(image["bytes"], digest_size=16).digest()
