"""Numbers that no run can have are refused before anything is read or written."""

import math

import pytest

from tcl_hf.training.arguments import TCLTrainingArguments, TrainingError


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, got 0."),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1, got 0."),
        ({"num_train_epochs": 0}, "num_train_epochs must be at least 1, got 0."),
        ({"max_steps": 0}, "max_steps must be at least 1, or -1 for the end of all epochs, got 0."),
        ({"max_steps": -2}, "max_steps must be at least 1, or -1 for the end of all epochs, got -2."),
        ({"logging_steps": 0}, "logging_steps must be at least 1, got 0."),
        ({"save_steps": -1}, "save_steps must be at least 0, got -1."),
        ({"save_total_limit": 0}, "save_total_limit must be at least 1, got 0."),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers must be at least 0, got -1."),
        ({"seed": -1}, "seed must be between 0 and 4294967295, got -1."),
        ({"seed": 2**32}, "seed must be between 0 and 4294967295, got 4294967296."),
        ({"learning_rate": math.nan}, "learning_rate must be at least 0, got nan."),
        ({"learning_rate": math.inf}, "learning_rate must be at least 0, got inf."),
        ({"adam_beta2": 1.0}, "adam_beta2 must be below 1, got 1.0."),
        ({"max_bad_share": 1.5}, "max_bad_share must be between 0 and 1, got 1.5."),
    ],
)
def test_numbers_out_of_range_are_refused_with_the_range(given, message):
    with pytest.raises(TrainingError) as refused:
        TCLTrainingArguments(**given)
    assert str(refused.value) == message


def test_the_ends_of_the_ranges_are_allowed():
    TCLTrainingArguments(seed=2**32 - 1, max_steps=1, eval_steps=0, save_steps=0, warmup_steps=0, max_bad_share=1.0)
