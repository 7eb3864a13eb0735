"""The order of map-style samples follows from seed and epoch, and a run resumes it at any batch."""

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from helpers import png, tiny_processor, tiny_records

from tcl_hf.data.collators import TCLPreTrainingCollator
from tcl_hf.data.pairs import DataError
from tcl_hf.data.sampling import (
    BucketSampler,
    CaptionLengths,
    Visit,
    VisitedSamples,
    VisitSampler,
    shuffle_images,
)
from tcl_hf.models.tokenization_tcl import clean_caption


def test_visits_of_an_epoch_are_a_permutation_that_follows_from_the_seed():
    sampler = VisitSampler(50, seed=1)
    orders = []
    for epoch in (0, 1):
        sampler.begin(epoch)
        orders.append([visit.index for visit in sampler])
        assert sorted(orders[-1]) == list(range(50))
    assert orders[0] != orders[1]
    again = VisitSampler(50, seed=1)
    assert [visit.index for visit in again] == orders[0]
    assert [visit.index for visit in VisitSampler(50, seed=2)] != orders[0]


def test_a_resumed_epoch_continues_where_it_stopped():
    sampler = VisitSampler(20, seed=0)
    sampler.begin(3)
    whole = list(sampler)
    sampler.begin(3, start=7)
    assert list(sampler) == whole[7:]


def test_visits_have_different_entropy():
    visits = {Visit(s, e, i).entropy() for s in range(3) for e in range(3) for i in range(100)}
    assert len(visits) == 900


def test_batches_do_not_depend_on_the_workers():
    dataset = datasets.Dataset.from_list(tiny_records(8))
    batches = []
    for workers in (0, 1, 2):
        torch.manual_seed(workers)
        loader = torch.utils.data.DataLoader(
            VisitedSamples(dataset),
            sampler=VisitSampler(8, seed=0),
            batch_size=4,
            num_workers=workers,
            collate_fn=TCLPreTrainingCollator(tiny_processor()),
        )
        batches.append(list(loader))
    for other in batches[1:]:
        for a, b in zip(batches[0], other, strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_resumed_epoch_continues_at_any_batch_with_another_number_of_workers():
    dataset = datasets.Dataset.from_list(tiny_records(10))
    sampler = VisitSampler(10, seed=0)

    def visits(start, num_workers):
        sampler.begin(1, 2 * start)
        loader = torch.utils.data.DataLoader(
            VisitedSamples(dataset),
            sampler=sampler,
            batch_size=2,
            num_workers=num_workers,
            collate_fn=lambda records: [(record["image_id"], record["visit"]) for record in records],
        )
        return list(loader)

    whole = visits(0, 0)
    assert sorted(image_id for batch in whole for image_id, _ in batch) == [str(n) for n in range(10)]
    for start, num_workers in ((0, 2), (1, 0), (2, 1), (3, 2), (4, 0), (5, 2)):
        assert visits(start, num_workers) == whole[start:]


def samples_with_captions(number: int, longest: int = 20) -> datasets.Dataset:
    """Samples with three captions each of 1 to `longest` words."""
    words = np.random.default_rng(0).integers(1, longest + 1, (number, 3))
    return datasets.Dataset.from_dict({"captions": [[" ".join(["dog"] * n) for n in row] for row in words]})


def bucket_sampler(number: int = 107, group_size: int = 4, window: int = 5, seed: int = 0) -> BucketSampler:
    return BucketSampler(CaptionLengths(samples_with_captions(number)), seed, group_size, window)


def test_lengths_are_the_numbers_of_cleaned_words_and_of_characters():
    texts = ["A dog .", "it's  brown/white - isn't it ?", "...", "", "zwei Hunde über Gräben", "一只狗在跑", "3 dogs\n"]
    dataset = datasets.Dataset.from_dict({"image": [b""] * 4, "captions": [texts, None, [], [None, "two dogs"]]})
    lengths = CaptionLengths(dataset)
    assert lengths.first.tolist() == [0, 7, 7, 7, 9]
    assert lengths.words.tolist() == [len(clean_caption(text).split()) for text in texts] + [0, 2]
    assert lengths.words[:4].tolist() == [2, 5, 0, 0]
    assert lengths.characters.tolist() == [*map(len, texts), 0, 8]
    assert lengths.of(Visit(0, 0, 1)) == (0, 0)
    chosen = CaptionLengths(dataset.select([3, 1]))
    assert chosen.first.tolist() == [0, 2, 2] and chosen.words.tolist() == [0, 2]


def test_a_visit_has_the_length_of_the_caption_that_the_collator_takes():
    records = [{"image": {"bytes": png(0)}, "captions": [" ".join(["dog"] * n) for n in range(1, 9)]}] * 40
    lengths = CaptionLengths(datasets.Dataset.from_list(records))
    visits = [Visit(3, 1, index) for index in range(40)]
    rows = [{**records[visit.index], "visit": visit} for visit in visits]
    batch = TCLPreTrainingCollator(tiny_processor())(rows)
    taken = batch["attention_mask"].sum(1) - 1  # [CLS] is not a word.
    assert [lengths.of(visit)[0] for visit in visits] == taken.tolist()
    assert set(taken.tolist()) == set(range(1, 9))


@pytest.mark.parametrize("number", [107, 104, 21, 4, 3])
def test_buckets_hold_each_sample_once_in_an_order_of_seed_and_epoch(number):
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0)):
        sampler = bucket_sampler(number, seed=seed)
        sampler.begin(epoch)
        visits = list(sampler)
        assert len(visits) == len(sampler) and {(visit.seed, visit.epoch) for visit in visits} == {(seed, epoch)}
        orders.append([visit.index for visit in visits])
        assert sorted(orders[-1]) == list(range(number))
    assert orders[0] == orders[3]
    if number > 20:
        assert orders[0] != orders[1] and orders[0] != orders[2]


def test_one_window_is_cut_by_length_and_its_batches_are_shuffled():
    captions = [[" ".join(["dog"] * n)] for n in range(1, 33)]
    lengths = CaptionLengths(datasets.Dataset.from_dict({"captions": captions}))
    sampler, firsts = BucketSampler(lengths, seed=0, group_size=4), []
    for epoch in range(3):
        sampler.begin(epoch)
        words = [visit.index + 1 for visit in sampler]
        batches = [words[begin : begin + 4] for begin in range(0, 32, 4)]
        assert sorted(batches) == [[first, first + 1, first + 2, first + 3] for first in range(1, 33, 4)]
        firsts.append([batch[0] for batch in batches])
    assert len(set(map(tuple, firsts))) == 3 and sorted(firsts[0]) not in firsts


def test_characters_order_texts_without_spaces():
    captions = [["狗" * n] for n in (5, 1, 8, 2, 7, 3, 6, 4)]
    sampler = BucketSampler(CaptionLengths(datasets.Dataset.from_dict({"captions": captions})), 0, group_size=4)
    lengths = [len(captions[visit.index][0]) for visit in sampler]
    assert sorted([lengths[:4], lengths[4:]]) == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_windows_follow_the_shuffled_order_and_an_incomplete_group_stays_last():
    sampler, shuffled = bucket_sampler(107, group_size=4, window=5), VisitSampler(107, seed=0)
    ours, theirs = ([visit.index for visit in one] for one in (sampler, shuffled))
    for begin in range(0, 104, 20):
        end = min(begin + 20, 104)
        assert set(ours[begin:end]) == set(theirs[begin:end])
    assert ours[104:] == theirs[104:]


def test_buckets_leave_a_fraction_of_the_padding():
    lengths = CaptionLengths(samples_with_captions(1600))

    def padding(sampler) -> float:
        words = torch.tensor([lengths.of(visit)[0] for visit in sampler]).view(-1, 16)
        return 1 - words.sum().item() / (16 * words.max(dim=1).values.sum().item())

    # A random group has 16 captions of 1 to 20 words. The longest has 19.2 words on average, and the mean is 10.5. The
    # 800 captions of a window of 50 groups have 40 of each length, so that in most groups all have the same length.
    assert padding(VisitSampler(1600, seed=0)) == pytest.approx(1 - 10.5 / 19.2, abs=0.02)
    assert padding(BucketSampler(lengths, seed=0, group_size=16)) < 0.04


def test_buckets_resume_at_any_batch():
    sampler = bucket_sampler(107, group_size=4, window=5)
    sampler.begin(2)
    whole = list(sampler)
    for start in range(0, 108, 4):
        sampler.begin(2, start)
        assert list(sampler) == whole[start:]


@pytest.mark.parametrize("number", [104, 107, 110])
def test_processes_share_buckets_and_have_equally_many_batches(number):
    """In a step, all processes get captions of about the same length, also after a run was resumed."""
    lengths = CaptionLengths(samples_with_captions(number))
    alone = [visit.index for visit in VisitSampler(number, seed=0)]

    def batches(rank: int, start: int) -> list[list[int]]:
        sampler = BucketSampler(lengths, seed=0, group_size=8)
        sampler.begin(0, start * 8)
        loader = torch.utils.data.DataLoader(
            VisitedSamples(samples_with_captions(number)),
            sampler=sampler,
            batch_size=4,
            drop_last=True,
            collate_fn=lambda records: [record["visit"].index for record in records],
        )
        options = {"put_on_device": False, "dispatch_batches": False}
        return list(prepare_data_loader(loader, num_processes=2, process_index=rank, **options))

    first, second = batches(0, 0), batches(1, 0)
    assert len(first) == len(second) == 13
    assert sorted(index for batch in first + second for index in batch) == sorted(alone[:104])
    for one, other in zip(first, second, strict=True):
        # Both batches are halves of one sorted group.
        words = [[lengths.of(Visit(0, 0, index))[0] for index in batch] for batch in (one, other)]
        assert max(words[0]) <= min(words[1])
    assert batches(0, 5) == first[5:] and batches(1, 5) == second[5:]


def test_records_without_captions_are_refused():
    with pytest.raises(DataError, match=r"train_sampling_strategy=group_by_length puts captions .* leave it out"):
        CaptionLengths(datasets.Dataset.from_dict({"question": ["what?"]}))


def about_images(numbers: list[int], column: str = "image") -> datasets.Dataset:
    """A record for each number, about the image (or the two images) of this number."""
    image = {"bytes": None, "path": ""}
    images = [image | {"bytes": png(number)} for number in numbers]
    features = datasets.Image(decode=False)
    if column == "images":
        images, features = [[one, one] for one in images], datasets.List(features)
    columns = {"label": list(range(len(numbers))), column: images, "image_id": [str(number) for number in numbers]}
    features = datasets.Features(
        {"label": datasets.Value("int64"), column: features, "image_id": datasets.Value("string")}
    )
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.mark.parametrize("column", ["image", "images"])
def test_shuffled_images_are_those_of_records_about_other_images(column):
    numbers = [0, 1, 0, 2, 0, 3, 3, 1]
    records = about_images(numbers, column)
    shuffled = shuffle_images(records)
    assert shuffled.features == records.features
    assert shuffled["label"] == records["label"] and shuffled["image_id"] == records["image_id"]
    before, after = ([str(image) for image in dataset[column]] for dataset in (records, shuffled))
    assert sorted(before) == sorted(after)
    assert all(one != other for one, other in zip(before, after, strict=True))
    assert [str(image) for image in shuffle_images(records)[column]] == after


def test_shuffling_is_refused_where_one_image_has_most_of_the_records():
    with pytest.raises(DataError, match="3 of 5 records are about one image"):
        shuffle_images(about_images([0, 0, 1, 0, 2]))
