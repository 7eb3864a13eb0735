"""Hints for wrong names of arguments."""

import difflib
from collections.abc import Collection
from dataclasses import fields

from ..models.configuration_tcl import TCLConfig, TCLTextConfig, TCLVisionConfig
from ..training.arguments import LORA_FIELDS

# Names of an argument elsewhere: in transformers and its example scripts, in the original code, in former versions of
# this package, and in short. Arguments whose other names are all like them are left out, see `did_you_mean`.
OTHER_NAMES = {
    "model": "model_name_or_path model_name pretrained_model_name_or_path checkpoint",
    "image_size": "image_res size resolution",
    "config": "config_name config_overrides distill temp embed_dim",
    "data": "train_file train_dir",
    "validation_data": "validation_file validation_dir test_file",
    "image_root": "data_dir vqa_root vg_root",
    "annotations": "ann_root",
    "max_tokens": "max_length max_seq_length",
    "eval_max_tokens": "max_length max_seq_length",
    "label_column": "label_column_name",
    "class_names": "classnames classes id2label",
    "templates": "template prompts prompt_templates hypothesis_template",
    "eval_images": "max_eval_samples",
    "eval_k": "k_test k",
    "per_device_train_batch_size": "per_gpu_train_batch_size batch_size batch_size_train",
    "per_device_eval_batch_size": "per_gpu_eval_batch_size batch_size batch_size_test eval_batch_size",
    "dataloader_num_workers": "preprocessing_num_workers num_workers",
    "num_train_epochs": "max_epoch epochs num_epochs",
    "max_steps": "steps num_train_steps",
    "learning_rate": "lr",
    "min_learning_rate": "min_lr",
    "warmup_learning_rate": "warmup_lr",
    "part_learning_rates": "lr_mult vision_lr text_lr backbone_lr head_lr",
    "layer_decay": "layer_wise_lr_decay llrd",
    "lr_scheduler_type": "lr_scheduler sched schedule",
    "alpha_ramp": "warm_up",
    "max_grad_norm": "clip_grad_norm gradient_clipping",
    "bf16": "mixed_precision precision half_precision amp bfloat16",
    "fp16": "float16",
    "train_sampling_strategy": "group_by_length bucket_by_length",
    "logging_steps": "logging_strategy log_every",
    "eval_steps": "eval_strategy evaluation_strategy eval_every",
    "metric_for_best_model": "load_best_model_at_end keep_best",
    "average_weights": "ema use_ema model_ema",
    "save_total_limit": "keep_checkpoints",
    "lora": "use_lora use_peft peft_config lora_config adapter",
    "resume": "resume_from_checkpoint",
    "hub_model_id": "push_to_hub_model_id push_checkpoints_to",
    "results": "output",
}


def names_of(*types: type) -> frozenset[str]:
    """The names of the fields that dataclasses are made of."""
    return frozenset(one.name for group in types for one in fields(group) if one.init)


_CONFIGS = {"config": TCLConfig, "config.text_config": TCLTextConfig, "config.vision_config": TCLVisionConfig}
CONFIG_FIELDS = {place: names_of(config) - {"lock"} for place, config in _CONFIGS.items()}  # a lock has a name on top
CONFIG_TYPES = {place: dict(config.__annotations__) for place, config in _CONFIGS.items()}  # without inherited ones


def hint(name: str, known: Collection[str]) -> str:
    """A hint for the name of an argument that does not exist: " (did you mean 'x'?)", or nothing.

    Args:
        known: the arguments that exist.
    """
    for meant, others in OTHER_NAMES.items():
        if meant in known and _bare(name) in map(_bare, others.split()):
            return f" (did you mean '{meant}'?)"
    places = [place for place, names in CONFIG_FIELDS.items() if name in names]
    if places and "config" in known:
        return f" (it is a field of the model: set it in {' or '.join(places)})"
    if name in LORA_FIELDS and "lora" in known:
        return " (it is a field of LoRA: set it in lora)"
    return did_you_mean(name, known)


def did_you_mean(name: str, known: Collection[str]) -> str:
    """A hint that names the known name most like this one, or nothing where none is like it."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def _bare(name: str) -> str:
    return name.replace("-", "").replace("_", "").lower()
