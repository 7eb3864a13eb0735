"""The start of a run: which states are kept, and where that is refused."""

import pytest
import torch
from datasets import Dataset
from helpers import small_patches, tiny, tiny_records

from tcl_hf import TCLForPreTraining
from tcl_hf.data.kept_states import plain_view_of
from tcl_hf.recipes.arguments import PretrainingDataArguments, RecipeError
from tcl_hf.recipes.starting import check_kept_views, with_kept_states
from tcl_hf.training.arguments import TCLTrainingArguments


@pytest.mark.parametrize(
    ("options", "lock", "message"),
    [
        (
            {"kept_views": 2},
            False,
            "kept_views=2 keeps the states of locked layers, and lock_vision is false: set lock_v",
        ),
        ({"kept_views": -1}, True, "kept_views=-1 is negative: name a number of views, or 0 to read pixels"),
        (
            {"plain_view": True},
            False,
            "plain_view=true keeps the states of locked layers, and lock_vision is false: set lock_vision in the "
            "config, or leave out plain_view",
        ),
        (
            {"kept_views": 1, "streaming": True},
            1,
            "kept_views=1 needs samples that can be read again, and a stream cannot",
        ),
    ],
)
def test_states_that_cannot_be_kept_are_refused(options, lock, message):
    with pytest.raises(RecipeError, match=f"^{message}"):
        check_kept_views(PretrainingDataArguments(**options), small_patches(lock_vision=lock))
    check_kept_views(
        PretrainingDataArguments(**options | {"kept_views": 0, "plain_view": False}), small_patches(lock_vision=lock)
    )


def test_states_of_the_image_as_it_is_evaluated_are_kept_alone(tmp_path):
    model, processor = tiny(TCLForPreTraining, lock_vision=True)
    options = {"plain_view": True, "kept_states_dir": str(tmp_path / "states")}
    samples, records = with_kept_states(
        PretrainingDataArguments(**options),
        TCLTrainingArguments(),
        model,
        processor,
        Dataset.from_list(tiny_records(3)),
        Dataset.from_list(tiny_records(2)),
    )
    assert (samples.kept.plan.num_views, len(samples), len(records)) == (0, 3, 2)
    trained_on, *others = samples[1]["states"].all_to_train_on()
    assert not others and torch.equal(trained_on, samples[1]["states"].plain())
    pixels = plain_view_of(processor, samples.dataset[1])
    expected = model.eval().tcl.vision_model.encode_locked(pixels[None])[0]
    assert torch.allclose(trained_on.float(), expected, atol=2e-3)  # half precision


def test_samples_that_are_a_stream_are_refused_before_anything_is_computed(tmp_path):
    model, processor = tiny(TCLForPreTraining, lock_vision=True)
    args = PretrainingDataArguments(kept_views=1, kept_states_dir=str(tmp_path / "states"))
    stream = Dataset.from_list(tiny_records(2)).to_iterable_dataset()
    with pytest.raises(RecipeError, match="a stream cannot: leave out kept_views and plain_view"):
        with_kept_states(args, TCLTrainingArguments(), model, processor, stream, None)
    assert not (tmp_path / "states").exists()
