"""Hints: a wrong name leads to the right one."""

import re

import pytest

from tcl_hf.recipes.hints import OTHER_NAMES, hint
from tcl_hf.recipes.parsing import COMMANDS, EVALUATE, FINETUNE, PRETRAIN


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        # this package's former names
        ("epochs", "num_train_epochs"),
        ("batch_size", "per_device_train_batch_size"),
        ("batchsize", "per_device_train_batch_size"),
        ("eval_batch_size", "per_device_eval_batch_size"),
        ("num_workers", "dataloader_num_workers"),
        ("schedule", "lr_scheduler_type"),
        ("keep_best", "metric_for_best_model"),
        ("mixed_precision", "bf16"),
        ("bucket_by_length", "train_sampling_strategy"),
        ("push_checkpoints_to", "hub_model_id"),
        # transformers
        ("resume_from_checkpoint", "resume"),
        ("model_name_or_path", "model"),
        ("max_eval_samples", "eval_images"),
        ("max_length", "max_tokens"),
        ("group-by-length", "train_sampling_strategy"),
        # the original
        ("lr", "learning_rate"),
        ("min_lr", "min_learning_rate"),
        ("image_res", "image_size"),
        ("k_test", "eval_k"),
        # timm and others
        ("model_ema", "average_weights"),
        ("layer_wise_lr_decay", "layer_decay"),
        ("layerwise_lr_decay", "layer_decay"),
        ("backbone_lr", "part_learning_rates"),
        # a slip of the fingers
        ("learning_rat", "learning_rate"),
    ],
)
def test_a_name_from_elsewhere_leads_to_the_name_here(name, meant):
    assert hint(name, FINETUNE.reads) == f" (did you mean '{meant}'?)"


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("queue_size", "config"),
        ("fusion_layer", "config.text_config"),
        ("patch_size", "config.vision_config"),
        ("hidden_size", "config.text_config or config.vision_config"),
    ],
)
def test_a_field_of_the_model_leads_to_config(name, place):
    assert hint(name, EVALUATE.reads) == f" (it is a field of the model: set it in {place})"


def test_a_field_of_lora_leads_to_lora():
    assert hint("target_modules", FINETUNE.reads) == " (it is a field of LoRA: set it in lora)"
    assert hint("target_modules", EVALUATE.reads) == ""


def test_a_hint_names_only_what_the_command_reads():
    assert hint("batch_size", EVALUATE.reads) == " (did you mean 'per_device_eval_batch_size'?)"
    assert hint("epochs", EVALUATE.reads) == ""
    assert hint("xyzzy", PRETRAIN.reads) == ""


def test_every_other_name_means_an_argument_and_is_not_one():
    arguments = {name for command in COMMANDS for name in command.reads}
    for meant, others in OTHER_NAMES.items():
        assert meant in arguments
        for name in others.split():
            assert re.fullmatch(r"[a-z0-9_]+", name) and name not in arguments, name
