"""Kept states: equal to those of the encoder, made once, and valid only for the same weights, views and images."""

import copy
import json
import pickle
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import small_patches, stir, tiny_processor, tiny_records
from safetensors.torch import load_file

from tcl_hf import TCLModel, TCLProcessor
from tcl_hf.data import kept_states
from tcl_hf.data.augmentation import TCLAugmentation
from tcl_hf.data.collators import TCLPreTrainingCollator
from tcl_hf.data.kept_states import StatesPlan, keep_states
from tcl_hf.data.records import FEATURES, DataError
from tcl_hf.data.sampling import VisitedSamples, VisitSampler
from tcl_hf.data.skipped import SkippedSamples

NUM_STATES = 17  # 4 x 4 patches and the class token


def new_model(lock: bool | int = True) -> TCLModel:
    torch.manual_seed(0)
    return stir(TCLModel(small_patches(lock_vision=lock))).eval()


def dataset(records: list[dict] | None = None) -> Dataset:
    return Dataset.from_list(tiny_records(10) if records is None else records, features=FEATURES)


def new_augmentation(**options) -> TCLAugmentation:
    pixels = tiny_processor().image_processor
    return TCLAugmentation(32, pixels.image_mean, pixels.image_std, **options)


def keep(folder, data=None, model=None, num_views=2, augmentation=None, **options):
    model = model or new_model()
    augmentation = augmentation or new_augmentation()
    encode = options.pop("encode", model.vision_model.encode_locked)
    return keep_states(
        dataset() if data is None else data,
        model.vision_model,
        encode,
        tiny_processor(),
        augmentation,
        num_views,
        folder,
        **options,
    )


def refuse_to_encode(pixels):
    raise AssertionError("States that are kept are not computed again.")


@pytest.fixture
def small_shards(monkeypatch):
    """Three images in a shard."""
    monkeypatch.setattr(kept_states, "SHARD_BYTES", 3 * 3 * NUM_STATES * 24 * 2)


@pytest.mark.parametrize("lock", [True, 1])
def test_states_are_those_of_the_encoder(tmp_path, lock):
    model, data = new_model(lock), dataset()
    kept = keep(tmp_path, data, model, batch_size=4)
    from PIL import Image

    for row in (0, 7):
        image = kept_states.open_image(data[row]["image"]).convert("RGB")
        assert isinstance(image, Image.Image)
        pixels = tiny_processor()(images=[image], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            expected = model.vision_model.encode_locked(pixels)[0]
        found = kept[row]["states"].plain()
        assert found.dtype == torch.float16
        assert found.shape == (NUM_STATES, 24)
        torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=1e-3)


def test_views_differ_and_do_not_depend_on_batches_workers_and_seed(tmp_path):
    first = keep(tmp_path / "a", batch_size=3)
    torch.manual_seed(5)
    second = keep(tmp_path / "b", batch_size=64, num_workers=1)
    for row in range(10):
        views = first.kept.views(row, [0, 1, 2])
        for one, other in zip(views, second.kept.views(row, [0, 1, 2]), strict=True):
            torch.testing.assert_close(one.float(), other.float(), rtol=2e-3, atol=2e-3)
        assert not torch.equal(views[1], views[2])
        assert not torch.equal(views[0], views[1])


@pytest.mark.parametrize(("plain_view", "numbers"), [(False, {1, 2}), (True, {0, 1, 2})])
def test_the_plain_image_is_among_the_views_to_train_on_if_that_is_asked_for(tmp_path, plain_view, numbers):
    kept = keep(tmp_path, plain_view=plain_view)
    states, views = kept[3]["states"], kept.kept.views(3, [0, 1, 2])

    def number_of(state):
        return next(number for number, view in enumerate(views) if torch.equal(view, state))

    assert {number_of(state) for state in states.all_to_train_on()} == numbers
    assert {number_of(state) for _ in range(40) for state in states.draw(1)} == numbers
    assert {number_of(state) for state in states.draw(len(numbers))} == numbers  # different ones


def test_some_records_keep_the_states_of_their_images(tmp_path):
    kept = keep(tmp_path, plain_view=True)
    some = kept.select([7, 2])
    assert [record["image_id"] for record in some] == ["7", "2"] and some.kept.plain_view
    assert torch.equal(some[1]["states"].plain(), kept[2]["states"].plain())


def test_states_are_made_once_and_shared(tmp_path):
    keep(tmp_path)
    again = keep(tmp_path, encode=refuse_to_encode)
    assert len(again) == 10
    (folder,) = tmp_path.iterdir()
    assert json.loads((folder / "manifest.json").read_text())["num_views"] == 2


def test_an_interrupted_making_goes_on_where_it_stopped(tmp_path, small_shards):
    model = new_model()
    encoded = []

    def interrupted(pixels):
        if len(encoded) == 3:
            raise KeyboardInterrupt
        encoded.append(len(pixels))
        return model.vision_model.encode_locked(pixels)

    with pytest.raises(KeyboardInterrupt):
        keep(tmp_path, model=model, encode=interrupted, batch_size=9)  # three images of three views
    (folder,) = tmp_path.iterdir()
    assert sorted(file.name for file in folder.glob("*.safetensors")) == [
        f"states-{n:05d}.safetensors" for n in range(3)
    ]
    counted = []

    def counting(pixels):
        counted.append(len(pixels))
        return model.vision_model.encode_locked(pixels)

    kept = keep(tmp_path, model=model, encode=counting, batch_size=9)
    assert counted == [3]  # the views of the tenth image
    whole = keep(tmp_path / "whole", model=model)
    for row in range(10):
        torch.testing.assert_close(kept.kept.views(row, [2]), whole.kept.views(row, [2]), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("damage", ["cut", "garbage", "gone"])
def test_a_damaged_shard_is_made_again(tmp_path, small_shards, damage):
    keep(tmp_path)
    (folder,) = tmp_path.iterdir()
    file = folder / "states-00001.safetensors"
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if damage == "cut" else b"\x00" * 100)
    model, counted = new_model(), []

    def counting(pixels):
        counted.append(len(pixels))
        return model.vision_model.encode_locked(pixels)

    keep(tmp_path, model=model, encode=counting)
    assert sum(counted) == 9
    assert load_file(file)["states"].shape == (3, 3, NUM_STATES, 24)


def changed_weights(data):
    model = new_model()
    with torch.no_grad():
        model.vision_model.layers[1].fc2.bias[3] += 1e-3
    return {"model": model}


def pooled_model():
    model = TCLModel(small_patches(lock_vision=True, vision_config={"output_grid": 2})).eval()
    model.load_state_dict(new_model().state_dict())
    return model


CHANGES = {
    "weights": changed_weights,
    "depth of the lock": lambda data: {"model": new_model(1)},
    "grid of the states": lambda data: {"model": pooled_model()},
    "number of views": lambda data: {"num_views": 1},
    "augmentation": lambda data: {"augmentation": new_augmentation(crop_scale=(0.9, 1.0))},
    "an image": lambda data: {"data": dataset([*data[:9], data[0]])},
    "an image more": lambda data: {"data": dataset([*data, tiny_records(11)[10]])},
}


@pytest.mark.parametrize("change", CHANGES)
def test_states_of_something_else_are_not_used(tmp_path, change):
    keep(tmp_path)
    keep(tmp_path, **CHANGES[change](tiny_records(10)))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_saved_model_and_processor_find_the_states_again(tmp_path):
    model = new_model()
    keep(tmp_path / "kept", model=model)
    model.save_pretrained(tmp_path / "saved")
    tiny_processor().save_pretrained(tmp_path / "saved")
    model, processor = (kind.from_pretrained(tmp_path / "saved") for kind in (TCLModel, TCLProcessor))
    pixels = processor.image_processor
    augmentation = TCLAugmentation(32, pixels.image_mean, pixels.image_std)
    vision_model = model.vision_model
    keep_states(dataset(), vision_model, refuse_to_encode, processor, augmentation, 2, tmp_path / "kept")


def test_captions_may_change(tmp_path):
    keep(tmp_path)
    records = [record | {"captions": ["another caption"]} for record in tiny_records(10)]
    keep(tmp_path, dataset(records), encode=refuse_to_encode)


def test_rows_with_the_same_image_share_its_states(tmp_path):
    records = tiny_records(3)
    kept = keep(tmp_path, dataset([*records, *records, records[1]]))
    assert kept.kept.plan.num_images == 3
    assert torch.equal(kept[1]["states"].plain(), kept[6]["states"].plain())
    assert not torch.equal(kept[0]["states"].plain(), kept[6]["states"].plain())


def test_batches_hold_two_different_views_drawn_by_the_visit(tmp_path):
    kept = keep(tmp_path, num_views=3)
    collator = TCLPreTrainingCollator(tiny_processor())
    samples = VisitedSamples(kept)
    visits = list(VisitSampler(len(kept), seed=1))
    batch = collator([samples[visit] for visit in visits])
    torch.manual_seed(9)
    again = collator([samples[visit] for visit in visits])
    assert batch["pixel_values"].shape == (10, NUM_STATES, 24)
    assert torch.equal(batch["pixel_values"], again["pixel_values"])
    chosen = set()
    for place, visit in enumerate(visits):
        views = kept.kept.views(visit.index, [1, 2, 3])
        pair = [
            next(n for n, view in enumerate(views) if torch.equal(view, batch[name][place]))
            for name in ("pixel_values", "pixel_values_augmented")
        ]
        assert pair[0] != pair[1]
        chosen.add(tuple(pair))
    assert len(chosen) > 2


def test_an_unreadable_image_is_skipped_when_it_is_drawn(tmp_path):
    records = tiny_records(5)
    records[2]["image"] = {"bytes": b"not an image", "path": None}
    kept = keep(tmp_path, dataset(records))
    skipped = SkippedSamples(tmp_path / "skipped.jsonl")
    collator = TCLPreTrainingCollator(tiny_processor()).for_run(skipped)
    batch = collator([kept[row] for row in range(5)])
    assert len(batch["pixel_values"]) == 4
    assert "could not be read" in (tmp_path / "skipped.jsonl").read_text()


def test_two_processes_share_the_work(tmp_path, small_shards):
    model = new_model()
    with pytest.raises(DataError, match="lacks 2 of 4 shards"):  # the other process has not made its own
        keep(tmp_path, model=model, rank=0, world_size=2)
    kept = keep(tmp_path, model=model, rank=1, world_size=2)
    assert len(kept) == 10


def test_kept_states_travel_to_workers(tmp_path):
    kept = keep(tmp_path)
    expected = kept[4]["states"].plain()
    for other in (pickle.loads(pickle.dumps(kept)), copy.deepcopy(kept)):
        assert torch.equal(other[4]["states"].plain(), expected)
    assert kept.column_names == dataset().column_names
    assert [record["image_id"] for record in kept] == [record["image_id"] for record in dataset()]


def test_too_little_space_is_said_before_an_image_is_read(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(free=2**28 + 1000))
    needed = 10 * 3 * NUM_STATES * 24 * 2
    with pytest.raises(DataError, match=rf"needs {needed / 1e9:.2f} GB for the states of 10 images with 2 views"):
        keep(tmp_path, encode=refuse_to_encode)


@pytest.mark.parametrize("left", ["a file in its place", "a file above it"])
def test_a_folder_that_cannot_be_written_is_named(tmp_path, left):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" if left == "a file in its place" else tmp_path / "file" / "states"
    with pytest.raises(
        DataError, match=rf"The folder {folder}/\w+ for kept states cannot be written \(Not a dir.*: name"
    ):
        keep(folder)


def test_a_record_without_an_image_is_one_that_cannot_be_read(tmp_path):
    kept = keep(tmp_path, dataset([*tiny_records(2), tiny_records(1)[0] | {"image": None}]))
    assert len(kept) == 3
    with pytest.raises(ValueError, match="could not be read when its states were made"):
        kept[2]["states"].plain()


def test_an_unlocked_encoder_is_refused(tmp_path):
    with pytest.raises(DataError, match="kept_views=2 keeps the states of locked layers, but no layer"):
        keep(tmp_path, model=new_model(False))


def test_records_with_several_images_are_refused(tmp_path):
    data = Dataset.from_list([{"images": [{"bytes": b"", "path": None}], "captions": ["a"]}])
    with pytest.raises(DataError, match="with one image each, and these have the columns images, captions"):
        keep(tmp_path, data)


def test_states_beyond_half_precision_are_refused(tmp_path):
    with pytest.raises(DataError, match="too large for half precision"):
        keep(tmp_path, encode=lambda pixels: torch.full((len(pixels), NUM_STATES, 24), 1e6))


def test_the_plan_counts_bytes():
    plan = StatesPlan("x", num_images=1000, num_views=4, num_states=257, width=384)
    assert plan.bytes_per_image == 5 * 257 * 384 * 2
    assert plan.num_bytes == 986_880_000
    assert plan.images_per_shard == 272
    assert plan.num_shards == 4
    assert list(plan.images_of(3)) == list(range(816, 1000))


def test_a_full_disk_keeps_what_was_written(tmp_path, small_shards, monkeypatch):
    real, written = kept_states.save_file, []

    def save(tensors, file):
        if len(written) == 2:
            Path(file).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        written.append(file)
        real(tensors, file)

    monkeypatch.setattr(kept_states, "save_file", save)
    with pytest.raises(DataError, match=r"could not be written \(.*No space left on device\): what was written"):
        keep(tmp_path)
    (folder,) = tmp_path.iterdir()
    assert len(list(folder.glob("*.safetensors"))) == 2
    assert not list(folder.glob("*.tmp"))
