"""The start of a run: where kept states are refused."""

import pytest
from datasets import Dataset
from helpers import small_patches, tiny, tiny_records

from tcl_hf import TCLForPreTraining
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
            {"kept_views": 1, "streaming": True},
            1,
            "kept_views needs samples that can be read again, and a stream cannot",
        ),
    ],
)
def test_states_that_cannot_be_kept_are_refused(options, lock, message):
    with pytest.raises(RecipeError, match=f"^{message}"):
        check_kept_views(PretrainingDataArguments(**options), small_patches(lock_vision=lock))
    check_kept_views(PretrainingDataArguments(**options | {"kept_views": 0}), small_patches(lock_vision=lock))


def test_samples_that_are_a_stream_are_refused_before_anything_is_computed(tmp_path):
    model, processor = tiny(TCLForPreTraining, lock_vision=True)
    args = PretrainingDataArguments(kept_views=1, kept_states_dir=str(tmp_path / "states"))
    stream = Dataset.from_list(tiny_records(2)).to_iterable_dataset()
    with pytest.raises(RecipeError, match="a stream cannot: leave out one of both"):
        with_kept_states(args, TCLTrainingArguments(), model, processor, stream, None)
    assert not (tmp_path / "states").exists()
