"""Hints for wrong names of arguments."""

import difflib
from collections.abc import Collection
from dataclasses import fields

from ..models.configuration_tcl import TCLConfig, TCLTextConfig, TCLVisionConfig

# Names that people bring along, and the arguments that they mean; of several the first that the command has.
OTHER_NAMES: dict[str, tuple[str, ...]] = {
    # transformers and its example scripts
    "model_name_or_path": ("model",),
    "model_name": ("model",),
    "pretrained_model_name_or_path": ("model",),
    "tokenizer_name": ("tokenizer",),
    "config_name": ("config",),
    "config_overrides": ("config",),
    "train_file": ("data",),
    "train_dir": ("data",),
    "data_dir": ("image_root", "data"),
    "validation_file": ("validation_data",),
    "validation_dir": ("validation_data",),
    "test_file": ("validation_data",),
    "max_eval_samples": ("eval_images",),
    "max_length": ("max_tokens", "eval_max_tokens"),
    "max_seq_length": ("max_tokens", "eval_max_tokens"),
    "preprocessing_num_workers": ("dataloader_num_workers",),
    "per_gpu_train_batch_size": ("per_device_train_batch_size",),
    "per_gpu_eval_batch_size": ("per_device_eval_batch_size",),
    "resume_from_checkpoint": ("resume",),
    "overwrite_output_dir": ("output_dir",),
    "eval_strategy": ("eval_steps",),
    "evaluation_strategy": ("eval_steps",),
    "logging_strategy": ("logging_steps",),
    "save_strategy": ("save_steps",),
    "load_best_model_at_end": ("metric_for_best_model",),
    "lr_scheduler": ("lr_scheduler_type",),
    "num_warmup_steps": ("warmup_steps",),
    "warmup_ratio": ("warmup_steps",),
    "group_by_length": ("train_sampling_strategy",),
    "push_to_hub_model_id": ("hub_model_id",),
    # the original's configuration and command line
    "checkpoint": ("model",),
    "image_res": ("image_size",),
    "text_encoder": ("text_model",),
    "batch_size": ("per_device_train_batch_size", "per_device_eval_batch_size"),
    "batch_size_train": ("per_device_train_batch_size",),
    "batch_size_test": ("per_device_eval_batch_size",),
    "batch_size_test_text": ("per_device_eval_batch_size",),
    "ann_root": ("annotations",),
    "vqa_root": ("image_root",),
    "vg_root": ("image_root",),
    "k_test": ("eval_k",),
    "max_epoch": ("num_train_epochs",),
    "lr": ("learning_rate",),
    "min_lr": ("min_learning_rate",),
    "warmup_lr": ("warmup_learning_rate",),
    "warmup_epochs": ("warmup_steps",),
    "warm_up": ("alpha_ramp",),
    "sched": ("lr_scheduler_type",),
    "distill": ("config",),
    "temp": ("config",),
    "embed_dim": ("config",),
    # this package's former names, and short ones
    "epochs": ("num_train_epochs",),
    "num_epochs": ("num_train_epochs",),
    "steps": ("max_steps",),
    "num_train_steps": ("max_steps",),
    "eval_batch_size": ("per_device_eval_batch_size",),
    "num_workers": ("dataloader_num_workers",),
    "schedule": ("lr_scheduler_type",),
    "keep_best": ("metric_for_best_model",),
    "mixed_precision": ("bf16",),
    "precision": ("bf16",),
    "half_precision": ("bf16", "half_precision_states"),
    "amp": ("bf16",),
    "float16": ("fp16",),
    "bfloat16": ("bf16",),
    "bucket_by_length": ("train_sampling_strategy",),
    "push_checkpoints_to": ("hub_model_id",),
    "log_every": ("logging_steps",),
    "eval_every": ("eval_steps",),
    "save_every": ("save_steps",),
    "keep_checkpoints": ("save_total_limit",),
    "accumulation_steps": ("gradient_accumulation_steps",),
    "beta1": ("adam_beta1",),
    "beta2": ("adam_beta2",),
    "clip_grad_norm": ("max_grad_norm",),
    "gradient_clipping": ("max_grad_norm",),
    "compile": ("torch_compile",),
    "output": ("output_dir", "results"),
    "k": ("eval_k",),
    "size": ("image_size",),
    "resolution": ("image_size",),
}
_OTHER_NAMES = {name.replace("_", ""): meant for name, meant in OTHER_NAMES.items()}
CONFIG_FIELDS = {
    field.name: part
    for part, config_class in (
        ("config.text_config", TCLTextConfig),
        ("config.vision_config", TCLVisionConfig),
        ("config", TCLConfig),  # last, because a field of the whole model comes before one of a part
    )
    for field in fields(config_class)
}


def hint(name: str, known: Collection[str]) -> str:
    """A hint for the name of an argument that does not exist: " (did you mean 'x'?)", or nothing.

    Args:
        known: the arguments that exist.
    """
    meant = _OTHER_NAMES.get(name.replace("-", "").replace("_", "").lower(), ())
    for candidate in meant:
        if candidate in known:
            return f" (did you mean '{candidate}'?)"
    if name in CONFIG_FIELDS and "config" in known:
        return f" (it is a field of the model: set it in {CONFIG_FIELDS[name]})"
    return did_you_mean(name, known)


def did_you_mean(name: str, known: Collection[str]) -> str:
    """A hint that names the known name most like this one, or nothing where none is like it."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""
