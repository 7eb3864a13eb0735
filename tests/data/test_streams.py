"""A stream gives each sample once per epoch, in an order that does not depend on the workers, from any batch on."""

import io
import itertools
import json
import os
import signal
import tarfile
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from helpers import encoded, png, small_patches, tiny_processor, write_tar
from PIL import Image

from tcl_hf import TCLForPreTraining
from tcl_hf.data.collators import TCLPreTrainingCollator
from tcl_hf.data.pairs import captions_of, load_pairs
from tcl_hf.data.records import FEATURES, DataError, as_records
from tcl_hf.data.sampling import Visit
from tcl_hf.data.skipped import SkippedSamples
from tcl_hf.data.streams import MixedStreams, StreamLoader, lanes_of_a_process
from tcl_hf.recipes.arguments import PretrainingDataArguments
from tcl_hf.recipes.build import load_pretraining_data
from tcl_hf.training.arguments import TCLTrainingArguments
from tcl_hf.training.loop import TrainingRun

OPENED = mp.get_context("fork").Value("i", 0)  # number of records read by all processes


def records_of(shards):
    """The records of shards, which are given by name and number of records."""
    for name, number in shards:
        for row in range(number):
            with OPENED.get_lock():
                OPENED.value += 1
            yield {"image": None, "captions": [f"{name} {row}"], "image_id": f"{name}{row}"}


def stream(*sizes, name="s"):
    shards = [(f"{name}{number}-", size) for number, size in enumerate(sizes)]
    return datasets.IterableDataset.from_generator(records_of, features=FEATURES, gen_kwargs={"shards": shards})


def names(*sizes, name="s"):
    return sorted(f"{name}{number}-{row}" for number, size in enumerate(sizes) for row in range(size))


def ids_and_visits(records):
    return [(record["image_id"], record["visit"]) for record in records]


def batches(dataset, epoch=0, start=0, loader=None, **options):
    options = {"batch_size": 3, "seed": 1, "window": 24} | options
    loader = loader or StreamLoader(dataset, ids_and_visits, **options)
    loader.begin(epoch, start)
    return list(loader)


def ids(made):
    return [image_id for batch in made for image_id, _ in batch or ()]


# Exactly once


@pytest.mark.parametrize("sizes", [(50,), (7, 0, 13), (5,) * 16, (3, 9, 1, 4, 20, 2, 2, 8, 6, 11, 1)])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_workers", [0, 3])
def test_each_sample_comes_once_per_epoch_over_ranks_and_workers(sizes, world_size, num_workers):
    for epoch in range(2 if num_workers == 0 else 1):
        seen = []
        for rank in range(world_size):
            options = {"rank": rank, "world_size": world_size, "num_workers": num_workers}
            seen += ids(batches(stream(*sizes), epoch, **options))
        assert sorted(seen) == names(*sizes)


def test_each_epoch_is_shuffled_anew_by_shard_and_within_windows():
    sizes = (40,) * 4
    orders = [ids(batches(stream(*sizes), epoch, window=80)) for epoch in (0, 1)]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])
    assert orders[0] == ids(batches(stream(*sizes), 0, window=80))
    assert orders[0] != ids(batches(stream(*sizes), 0, window=80, seed=2))
    rows = [int(image_id.split("-")[1]) for image_id in orders[0] if image_id.startswith("s0-")]
    assert rows != sorted(rows)
    # Each of four lanes has windows of 18 records (80 / 4, in whole batches of 3), and a record stays in its window.
    assert max(rows[:18]) == 17 and min(rows[18:36]) == 18


def test_a_visit_follows_from_seed_epoch_and_place_in_the_data():
    for world_size in (1, 2):
        seen = [
            id_and_visit
            for rank in range(world_size)
            for batch in batches(stream(2, 3), epoch=4, rank=rank, world_size=world_size)
            for id_and_visit in batch or ()
        ]
        expected = {(f"s{s}-{r}", Visit(1, 4, s * 2**32 + r)) for s, n in ((0, 2), (1, 3)) for r in range(n)}
        assert set(seen) == expected and len(seen) == 5


def test_an_id_that_is_a_row_number_gets_the_shard():
    rows = [{"image": {"bytes": png(n), "path": None}, "caption": "a"} for n in range(2)]
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    table = datasets.Dataset.from_list(rows, features=features)
    two_shards = datasets.concatenate_datasets([table.to_iterable_dataset()] * 2)
    assert sorted(ids(batches(as_records(two_shards, "here", None, None)))) == ["0#0", "0#1", "1#0", "1#1"]


def test_lanes_are_chosen_so_that_few_shards_are_read_twice():
    assert lanes_of_a_process([1], 1) == 1  # Every worker has to read the only file.
    assert lanes_of_a_process([1000], 1) == 8
    # With 5 lanes, 10 of 11 shards are dealt out and 1 is read by all: 15 / 5 each. With 8 lanes: (8 + 3 * 8) / 8.
    assert lanes_of_a_process([11], 1) == 5
    assert lanes_of_a_process([2], 1) == 2
    assert lanes_of_a_process([6], 1) == 6


# Order and position


def test_the_number_of_workers_changes_nothing():
    """With one or two shards, workers share a lane; five lanes cannot be divided evenly among the workers."""
    for sizes in ((40,), (20, 21), (9, 2, 0, 16, 5), (6,) * 8):
        expected = batches(stream(*sizes))
        assert sorted(ids(expected)) == names(*sizes)
        for num_workers in (1, 2, 4):
            assert batches(stream(*sizes), num_workers=num_workers) == expected


def test_a_run_resumes_at_any_batch_with_any_number_of_workers():
    for sizes in ((30,), (9, 2, 0, 16, 5)):
        expected = batches(stream(*sizes), epoch=1)
        for start in range(len(expected) + 1):
            assert batches(stream(*sizes), epoch=1, start=start) == expected[start:]
        for start, num_workers in ((1, 1), (4, 2), (5, 3), (7, 4)):
            assert batches(stream(*sizes), epoch=1, start=start, num_workers=num_workers) == expected[start:]


def test_resuming_collates_no_batch_again_and_reads_no_finished_shard():
    sizes = (30,) * 16
    loader = StreamLoader(stream(*sizes), ids_and_visits, 3, 1, window=24)
    expected = batches(None, loader=loader)
    start = len(expected) - 8  # Only the last batch of each of the eight lanes is missing.
    later = StreamLoader(stream(*sizes), ids_and_visits, 3, 1, window=24)
    later.load_state_dict(json.loads(json.dumps(loader.state_dict()), object_pairs_hook=_with_numbers))
    OPENED.value = 0
    assert batches(None, start=start, loader=later) == expected[start:]
    assert OPENED.value == 8 * 30  # Each lane reads only the second of its two shards.
    collated = []
    blind = StreamLoader(stream(*sizes), lambda records: collated.append(1) or {}, 3, 1, window=24)
    batches(None, start=start, loader=blind)
    assert len(collated) == 8


def _with_numbers(items):
    """JSON makes strings of the keys that are numbers."""
    return {int(key) if key.isdigit() else key: value for key, value in items}


def test_workers_report_the_sizes_of_shards():
    loader = StreamLoader(stream(5, 6, 7), ids_and_visits, 3, 1, num_workers=2)
    batches(None, loader=loader)
    assert loader.state_dict() == {"shard_sizes": {0: 5, 1: 6, 2: 7}}


def test_the_global_random_numbers_are_left_alone():
    torch.manual_seed(5)
    batches(stream(9, 9))
    after = torch.rand(())
    torch.manual_seed(5)
    assert torch.rand(()) == after


# Processes


def test_a_process_without_data_gives_empty_batches_until_all_are_done():
    """Two processes read one shard of 7 rows in batches of 1, so that one has 4 batches and the other 3."""
    made = [batches(stream(7), batch_size=1, rank=rank, world_size=2) for rank in (0, 1)]
    assert sorted(map(len, map(ids, made))) == [3, 4]
    rounds = iter([True] * 4 + [False])
    short = min((0, 1), key=lambda rank: len(made[rank]))
    padded = batches(stream(7), batch_size=1, rank=short, world_size=2, any_process=lambda has_batch: next(rounds))
    assert [bool(batch) for batch in padded] == [True] * 3 + [False]


def _rank(rank, folder, sizes):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)

    def any_process(has_batch):
        flag = torch.tensor(int(has_batch))
        torch.distributed.all_reduce(flag)
        return bool(flag)

    loader = StreamLoader(
        stream(*sizes),
        ids_and_visits,
        3,
        1,
        num_workers=2,
        rank=torch.distributed.get_rank(),
        world_size=torch.distributed.get_world_size(),
        any_process=any_process,
    )
    epochs = []
    for epoch in range(2):
        loader.begin(epoch)
        epochs.append([[image_id for image_id, _ in batch or ()] for batch in loader])
    (folder / f"{rank}.json").write_text(json.dumps(epochs))
    torch.distributed.destroy_process_group()


def test_two_real_processes_share_a_stream_and_end_together(tmp_path):
    sizes = (3, 9, 1, 4, 20, 2, 2)
    mp.start_processes(_rank, (tmp_path, sizes), nprocs=2, start_method="fork")
    by_rank = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for epoch in range(2):
        first, second = by_rank[0][epoch], by_rank[1][epoch]
        assert len(first) == len(second)  # Some of the batches are empty.
        assert sorted(itertools.chain(*first, *second)) == names(*sizes)


def left_out(sizes, world_size, epoch=0):
    """The number of samples that an epoch loses if every process cuts its batches to the smallest at a position."""
    made = [batches(stream(*sizes), epoch, rank=rank, world_size=world_size) for rank in range(world_size)]
    positions = itertools.zip_longest(*(map(len, of_rank) for of_rank in made), fillvalue=0)
    return sum(sum(numbers) - world_size * min(numbers) for numbers in positions)


@pytest.mark.parametrize("world_size", [2, 3])
def test_shards_of_one_size_dealt_out_evenly_leave_nothing_out(world_size):
    assert left_out((7,) * 6, world_size) == left_out((11,) * 12, world_size) == 0


@pytest.mark.parametrize("sizes", [(7,), (10,) * 5, (13,) * 7, (9,) * 11, (3, 9, 1, 4, 20, 2, 2, 8, 6, 11, 1)])
@pytest.mark.parametrize("world_size", [2, 3])
def test_unequal_processes_leave_out_no_more_than_the_documented_bound(sizes, world_size):
    lanes = lanes_of_a_process([len(sizes)], world_size)
    whole, left = divmod(len(sizes), world_size * lanes)
    by_size = sorted(sizes)
    difference = sum(by_size[-whole:]) - sum(by_size[:whole]) if whole else 0
    bound = (world_size - 1) * lanes * (left + difference)
    found = [left_out(sizes, world_size, epoch) for epoch in range(4)]
    assert max(found) <= bound
    if sizes == (7,):  # All processes share the only shard: 4 and 3 rows, or 3, 2 and 2.
        assert found == [1] * 4


# Mixtures


def mixture(weights=(3, 1)):
    return MixedStreams([stream(*(50,) * 8, name="a"), stream(3, 2, name="b")], weights)


def first_ids(dataset, number, start=0, **options):
    loader = StreamLoader(dataset, ids_and_visits, 4, 1, window=256, **options)
    loader.begin(0, start)
    return ids(itertools.islice(loader, number - start))


def test_a_mixture_has_the_requested_shares_and_no_end():
    seen = first_ids(mixture(), 250)
    assert len(seen) == 1000
    share = sum(image_id.startswith("a") for image_id in seen) / 1000
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / 1000) ** 0.5
    counts = Counter(image_id for image_id in seen if image_id.startswith("b"))
    assert set(counts) == set(names(3, 2, name="b"))  # Eight lanes read these five samples again and again.
    visits = [
        visit for batch in itertools.islice(StreamLoader(mixture(), ids_and_visits, 4, 1), 250) for _, visit in batch
    ]
    assert len(set(visits)) == 1000


def test_a_mixture_resumes_anywhere_with_any_number_of_workers():
    expected = first_ids(mixture(), 300)
    for start, num_workers in ((0, 2), (7, 0), (129, 0), (200, 3)):
        assert first_ids(mixture(), 300, start, num_workers=num_workers) == expected[4 * start :]


def test_a_mixture_reads_its_columns_once():
    words = mixture().select_columns(["captions"])
    assert len(list(words)) == 405
    assert len(list(mixture())) == 405


def test_a_recipe_mixes_sources_by_weight(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "0.tar", [(f"{name}.png", png(0)), (f"{name}.txt", name.encode())])
    sources = {"data": [str(tmp_path / "one"), str(tmp_path / "two")], "validation_split": ""}
    dataset, records = load_pretraining_data(PretrainingDataArguments(**sources, data_weights=[9, 1], streaming=True))
    assert records is None and list(captions_of(dataset)) == ["one", "two"]
    share = sum(image_id == "one" for image_id in first_ids(dataset, 250)) / 1000
    assert abs(share - 0.9) < 4 * (0.9 * 0.1 / 1000) ** 0.5
    with pytest.raises(DataError, match="data_weights mixes streams"):
        load_pretraining_data(PretrainingDataArguments(**sources, data_weights=[9, 1]))


def test_impossible_mixtures_are_refused():
    with pytest.raises(DataError, match="1 weights for 2 sources"):
        mixture((1.0,))
    with pytest.raises(DataError, match="must be positive"):
        mixture((1.0, 0.0))
    with pytest.raises(DataError, match="Source 2 of the mixture holds no records"):
        batches(MixedStreams([stream(3), stream(0)], (1, 1)))


# Bad data


def test_a_shard_that_breaks_off_is_listed_and_the_others_are_read(tmp_path):
    for number in range(3):
        files = [
            (f"{number}{row}.{kind}", png(row) if kind == "png" else b"a dog")
            for row in range(4)
            for kind in ("png", "txt")
        ]
        write_tar(tmp_path / f"{number}.tar", files)
    with tarfile.open(tmp_path / "1.tar") as tar:
        third = tar.getmember("12.png").offset_data
    os.truncate(tmp_path / "1.tar", third + 10)
    skipped = SkippedSamples(tmp_path / "skipped.jsonl")
    seen = ids(batches(load_pairs(str(tmp_path), streaming=True), skipped=skipped))
    assert sorted(seen) == ["00", "01", "02", "03", "10", "11", "20", "21", "22", "23"]
    (line,) = map(json.loads, (tmp_path / "skipped.jsonl").read_text().splitlines())
    assert line["image_id"] == "shard 1"
    assert "unexpected end of data" in line["reason"] and "after 11" in line["reason"]


class Deadly(TCLPreTrainingCollator):
    """Kills its worker at one sample, as a crash in a decoder or the kernel would."""

    def _sample(self, record):
        if record["image_id"] == "s0-7":
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._sample(record)


def test_a_worker_that_dies_names_its_sample():
    skipped = SkippedSamples()
    collator = Deadly(tiny_processor()).for_run(skipped)
    loader = StreamLoader(stream(40), collator, 4, 0, num_workers=2)
    with (
        pytest.raises(DataError, match=r"worker \d+ last began 's0-7'.*lower dataloader_num_workers"),
        skipped.naming_dead_workers(),
    ):
        list(loader)
    with pytest.raises(RuntimeError, match="something else"), skipped.naming_dead_workers():
        raise RuntimeError("something else")


# Data of which two in a hundred samples are broken


def samples(folder):
    """Write tars with 289 plain samples, 5 unusual and 6 broken ones.

    Returns the ids of the good samples, and the ids of the broken ones with the reasons that must be listed.
    """
    picture = Image.open(io.BytesIO(png(0))).convert("RGB")
    photo = encoded(picture.resize((400, 300)), "JPEG")
    rotated = Image.Exif()
    rotated[0x0112] = 6
    plain = {f"plain{number}": {"png": png(number % 7), "txt": b"a dog"} for number in range(289)}
    unusual = {
        "cmyk": {"jpg": encoded(picture.convert("CMYK"), "JPEG"), "txt": b"a dog"},
        "deep": {"png": encoded(Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40)), "PNG"), "txt": b"a"},
        "palette": {"png": encoded(picture.convert("P"), "PNG"), "txt": b"a dog"},
        "moving": {"gif": encoded(picture, "GIF", save_all=True, append_images=[picture.rotate(90)]), "txt": b"a dog"},
        "turned": {"jpg": encoded(picture, "JPEG", exif=rotated), "txt": b"a dog" * 1_000_000},
    }
    broken = {
        "truncated": ({"jpg": photo[: len(photo) // 2], "txt": b"a dog"}, "OSError: image file is truncated"),
        "nothing": ({"jpg": b"", "txt": b"a dog"}, "ValueError: an image of zero bytes"),
        "bomb": ({"png": encoded(Image.new("1", (20_000, 20_000)), "PNG"), "txt": b"a dog"}, "DecompressionBombError"),
        "lost": ({"txt": b"a dog"}, "ValueError: no image"),
        "silent": ({"png": png(0), "json": b'{"caption": null}'}, "ValueError: no caption"),
        "latin": ({"png": png(0), "txt": "caf\u00e9".encode("latin-1")}, "ValueError: a caption that is not UTF-8"),
    }
    every = list((plain | unusual | {key: files for key, (files, _) in broken.items()}).items())
    for number in range(5):
        files = [(f"{key}.{kind}", content) for key, sample in every[number::5] for kind, content in sample.items()]
        write_tar(folder / f"{number}.tar", files)
    return {*plain, *unusual}, {key: reason for key, (_, reason) in broken.items()}


class Seen(TCLPreTrainingCollator):
    """Keeps the ids of the samples that could be used."""

    def _sample(self, record):
        sample = super()._sample(record)
        self.ids.append(record["image_id"])
        return sample


@pytest.mark.parametrize("streaming", [True, False])
def test_a_run_on_partly_broken_data_lists_the_broken_samples_and_uses_the_others(tmp_path, streaming):
    good, broken = samples(tmp_path)
    dataset = load_pairs(str(tmp_path), streaming=streaming)
    processor = tiny_processor(8)
    collator = Seen(processor, two_views=False, mlm_probability=0.0)
    collator.ids = []
    if streaming:
        listed = tmp_path / "skipped.jsonl"
        skipped = SkippedSamples(listed)
        loader = StreamLoader(dataset, collator.for_run(skipped), 10, 0, skipped=skipped)
        assert all(batch["pixel_values"].isfinite().all() for batch in loader if batch)
    else:
        args = TCLTrainingArguments(
            output_dir=str(tmp_path / "run"),
            num_train_epochs=1,
            per_device_train_batch_size=10,
            dataloader_num_workers=0,
        )
        patch = {"vision_config": {"image_size": 8, "patch_size": 8}, "mlm_weight": 0.0, "lmi_weight": 0.0}
        TrainingRun(TCLForPreTraining(small_patches(**patch)), dataset, collator, processor, args).train()
        listed = tmp_path / "run" / "skipped.jsonl"
    assert sorted(collator.ids) == sorted(good)
    lines = [json.loads(line) for line in listed.read_text().splitlines()]
    assert sorted(line["image_id"] for line in lines) == sorted(broken)
    for line in lines:
        assert line["reason"].startswith(broken[line["image_id"]]), line
