"""The order in which map-style samples are visited, and the random numbers of each visit.

A visit is the use of one sample in one epoch. Its seed follows from the run's seed, the epoch and the sample's index,
so that a sample gets the same views, caption and masks in any process.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, concatenate_datasets
from torch.utils.data import Sampler

from .images import identity_of
from .records import DataError

_WORD = r"[^\s/-]*[\pL\pN][^\s/-]*"  # a word of a cleaned caption, in the syntax of RE2


def mix_seeds(*numbers: int) -> int:
    """A seed of 64 bits that follows from the numbers and their order, by the finaliser of splitmix64.

    `numpy.random.SeedSequence` would do the same, but it would change every order, so that a run could not be resumed
    exactly from a checkpoint that was written before.
    """
    mixed = 0
    for number in numbers:
        mixed = (mixed + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
    return mixed


@dataclass(frozen=True)
class Visit:
    """One visit of a sample. All its random choices follow from these three numbers."""

    seed: int
    epoch: int
    index: int

    def entropy(self) -> int:
        """The seed of this visit's random choices."""
        return mix_seeds(self.seed, self.epoch, self.index)

    def caption(self, number: int) -> int:
        """The index of the caption that a collator will take from a record with `number` captions.

        Collators draw the caption first, so that this is the first number of the visit's generator.
        """
        if number < 2:
            return 0
        return int(torch.randint(number, (), generator=torch.Generator().manual_seed(self.entropy())))


class VisitSampler(Sampler[Visit]):
    """The visits of one epoch, in an order that follows from seed and epoch.

    `begin` chooses the epoch, and how many visits a resumed run has made already.
    """

    def __init__(self, num_samples: int, seed: int):
        self.num_samples, self.seed = num_samples, seed
        self.epoch, self.start = 0, 0

    def begin(self, epoch: int, start: int = 0) -> None:
        """Set the epoch of the next iteration, and the number of its visits that are done already."""
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
    """The numbers of words and characters of every caption of a data set, read once and without the images.

    Words are counted instead of tokens, because that is twenty times faster and nearly proportional.

    Raises:
        DataError: if the records have no captions.
    """

    def __init__(self, dataset: Dataset):
        if "captions" not in getattr(dataset, "column_names", ()):
            raise DataError(
                "train_sampling_strategy=group_by_length puts captions of about the same length together, but these "
                "records have no captions: leave it out."
            )
        numbers, words, characters = [], [], []
        for table in dataset.select_columns(["captions"]).with_format("arrow").iter(100_000):
            column = pc.cast(table["captions"].combine_chunks(), pa.list_(pa.string()))
            texts = column.flatten()
            numbers.append(pc.fill_null(pc.list_value_length(column), 0).to_numpy())
            words.append(pc.fill_null(pc.count_substring_regex(texts, _WORD), 0).to_numpy())
            characters.append(pc.fill_null(pc.utf8_length(texts), 0).to_numpy())
        self.first = np.concatenate([[0], *numbers]).cumsum()  # (samples + 1,): where a sample's captions begin
        self.words, self.characters = np.concatenate(words), np.concatenate(characters)

    def __len__(self) -> int:
        return len(self.first) - 1

    def of(self, visit: Visit) -> tuple[int, int]:
        """The numbers of words and characters of the caption that this visit takes.

        Characters decide among captions with as many words, and order languages that do not put spaces between words.
        If some of a sample's captions cannot be used, the collator may take another one: the lengths are an estimate.
        """
        first, end = self.first[visit.index : visit.index + 2].tolist()
        if first == end:
            return 0, 0
        caption = first + visit.caption(end - first)
        return int(self.words[caption]), int(self.characters[caption])


class BucketSampler(VisitSampler):
    """The visits of one epoch in groups of about equally long captions, so that little padding is computed.

    The shuffled order is cut into windows. Within a window, visits are sorted by the length of the caption that they
    take, cut into groups, and the groups are put in random order. The last visits, which do not fill a group, stay at
    the end: a loader that drops them leaves out the same visits as it would without groups.

    Args:
        lengths: the lengths of the captions.
        seed: the order follows from it and from the epoch.
        group_size: visits in a group; one batch of every process.
        window: groups in a window. A larger number leaves less padding but mixes the samples less. (Flickr8k in groups
            of 32: with 10 groups, 8 % of the tokens are padding, with 50 groups 2 %.)
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
            if end <= self.start:  # The run was interrupted after this window.
                continue
            window = sorted(self._visits(order[begin:end]), key=self.lengths.of)
            generator = torch.Generator().manual_seed(mix_seeds(self.seed, self.epoch, -1, begin))
            groups = torch.randperm(len(window) // size, generator=generator).tolist()
            visits = (visit for group in groups for visit in window[group * size : (group + 1) * size])
            yield from islice(visits, max(self.start - begin, 0), None)
        yield from self._visits(order[max(self.start, num_grouped) :])


class VisitedSamples(torch.utils.data.Dataset):
    """The records of a map-style data set, looked up by visit; each carries its visit."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, visit: Visit) -> dict:
        return {**self.dataset[visit.index], "visit": visit}


def image_column(dataset: Dataset) -> str:
    """The column that holds the image or images of a record."""
    return "images" if "images" in dataset.column_names else "image"


def rows_by_image(dataset: Dataset) -> list[list[int]]:
    """The numbers of the records about the same image (or images), for each image in the order of the data set."""
    rows: dict[tuple, list[int]] = {}
    column = image_column(dataset)
    for row, images in enumerate(dataset.select_columns([column])[column]):
        images = images if isinstance(images, list) else [images]
        rows.setdefault(tuple(map(identity_of, images)), []).append(row)
    return list(rows.values())


def shuffle_images(dataset: Dataset, seed: int = 0) -> Dataset:
    """The records, each with the image (or images) of a record about another image, to measure what texts alone allow.

    Each image occurs as often as before.

    Raises:
        DataError: if more than half of the records are about one image.
    """
    groups = rows_by_image(dataset)
    random.Random(seed).shuffle(groups)
    largest = max(map(len, groups), default=0)
    if 2 * largest > len(dataset):
        raise DataError(
            f"shuffle_images: {largest} of {len(dataset)} records are about one image, so that not each of them can "
            "get another one: leave shuffle_images out, or name more data."
        )
    order = np.array([row for group in groups for row in group])
    other = np.empty_like(order)
    other[order] = np.roll(order, -largest)  # further along than the records about the same image
    column = image_column(dataset)
    images = dataset.select(other).select_columns([column]).flatten_indices()
    shuffled = concatenate_datasets([dataset.remove_columns(column), images], axis=1)
    return shuffled.select_columns(dataset.column_names)


class SharedImages(torch.utils.data.Dataset):
    """The records of a data set by image: an item holds all records about the same image (or images) as `records`.

    Images are the same if their bytes are equal, or, without bytes, their paths.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset
        self.groups = rows_by_image(dataset)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> dict:
        records = [self.dataset[row] for row in self.groups[index]]
        return {"image_id": records[0].get("image_id"), "records": records}
