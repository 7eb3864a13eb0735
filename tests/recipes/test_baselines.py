"""The baselines of a report are those that apply to its run."""

import pytest
import torch
from datasets import Dataset
from helpers import tiny, tiny_records

from tcl_hf import TCLForPreTraining
from tcl_hf.data.kept_states import keep_states
from tcl_hf.evaluation.baselines import FrozenFeatures
from tcl_hf.recipes import baselines
from tcl_hf.recipes.arguments import ModelArguments, PretrainingDataArguments
from tcl_hf.training.arguments import TCLTrainingArguments

ENCODERS = {"vision_model": "a vision encoder", "text_model": "a text encoder"}


@pytest.fixture(autouse=True)
def started(monkeypatch):
    """A tiny model stands in for that which the encoders start."""
    monkeypatch.setattr(baselines, "build_model", lambda *_: tiny(TCLForPreTraining))


def measure(model_args, pairs=None, records=None, **data_args):
    pairs = Dataset.from_list(tiny_records(8)) if pairs is None else pairs
    arguments = PretrainingDataArguments(**data_args), ModelArguments(**model_args), TCLTrainingArguments()
    return baselines.measure_baselines(*arguments, pairs, records or tiny_records(4))


def test_the_baselines_that_apply_are_measured_in_the_order_of_the_table():
    names = ["ridge on coarse pixels", "ridge on the same frozen features", "linear head on the same frozen features"]
    found = measure(ENCODERS, data=["openmoji"])
    assert list(found) == names and all(0 <= metrics["recall@1"] <= 100 for metrics in found.values())
    assert list(measure(ENCODERS, data=["pairs.json"])) == names[1:]
    assert list(measure({}, data=["openmoji"])) == names[:1]
    assert measure({"vision_model": "a vision encoder"}, data=["pairs.json"]) == {}


def test_no_baseline_is_measured_for_streams_or_where_they_are_switched_off():
    assert measure(ENCODERS, baselines=False) == {}
    stream = Dataset.from_list(tiny_records(8)).to_iterable_dataset()
    assert measure(ENCODERS, stream, streaming=True) == {}


def test_at_most_so_many_samples_are_read_as_the_arguments_allow_and_the_table_states_it():
    assert list(measure(ENCODERS, data=["pairs.json"], baseline_samples=3)) == [
        "ridge on the same frozen features (3 samples)",
        "linear head on the same frozen features (3 samples)",
    ]
    pairs = Dataset.from_list(tiny_records(8))
    ids = baselines.some_of(pairs, 3)["image_id"]
    assert len(ids) == 3 and ids == sorted(ids) == baselines.some_of(pairs, 3)["image_id"]
    assert baselines.some_of(pairs, 8) is pairs


def test_kept_states_take_the_place_of_pixels(tmp_path, monkeypatch):
    """They differ by the rounding of float16 only, and the images are not opened again."""
    model, processor = tiny(TCLForPreTraining, lock_vision=True)
    monkeypatch.setattr(baselines, "build_model", lambda *_: (model, processor))
    read = []
    monkeypatch.setattr(baselines, "baselines_on_features", lambda train, held_out: read.append(train.image) or {})
    pairs = Dataset.from_list(tiny_records(8))
    vision_model = model.tcl.vision_model
    kept = keep_states(pairs, vision_model, vision_model.encode_locked, processor, None, 0, tmp_path)
    measure(ENCODERS, pairs, data=["pairs.json"], baseline_samples=5)
    monkeypatch.setattr("tcl_hf.evaluation.baselines.open_image", None)
    measure(ENCODERS, kept, kept.select(range(4)), data=["pairs.json"], baseline_samples=5)
    from_pixels, from_states = read
    assert from_pixels.shape == (5, 48)
    torch.testing.assert_close(from_states, from_pixels, rtol=1e-3, atol=1e-3)


def test_features_from_elsewhere_have_the_same_baselines():
    """Features of texts equal those of their images: both baselines find the pairs."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2040, 16, generator=generator)
    train = FrozenFeatures(image[40:], image[40:].repeat(2, 1), torch.arange(2000).repeat(2))
    held_out = FrozenFeatures(image[:40], image[:40], torch.arange(40))
    found = baselines.baselines_on_features(train, held_out)
    assert [metrics["recall@1"] > 80 for metrics in found.values()] == [True, True]
