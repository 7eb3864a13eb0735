"""The identity of a run: the facts that its result follows from, which every checkpoint lists.

A run that goes on has to have the same identity. `ON_RESUME` says what becomes of each argument that was changed
meanwhile: nothing, a line in the log, or a refusal that names it.
"""

import hashlib
import json
import logging
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..data.fingerprints import fingerprint_of
from ..models.processing_tcl import TCLProcessor
from .arguments import TCLTrainingArguments, TrainingError

logger = logging.getLogger(__name__)

FREE, LOGGED, REFUSED = "free", "logged", "refused"


@dataclass(frozen=True)
class Rule:
    """The consequence of a change of arguments for a run that goes on.

    Args:
        kind: `FREE`, `LOGGED` or `REFUSED`.
        what: what the arguments decide, for the documentation.
        names: the arguments.
    """

    kind: str
    what: str
    names: tuple[str, ...]


ON_RESUME = (
    Rule(FREE, "where and how often the run writes", (
        "output_dir", "overwrite_output_dir", "logging_steps", "save_steps", "save_total_limit", "report_to",
        "push_to_hub", "hub_model_id", "kept_states_dir",
    )),
    Rule(FREE, "how it is carried out", (
        "resume", "ignore_random_states", "dataloader_num_workers", "per_device_eval_batch_size", "max_bad_share",
    )),
    Rule(FREE, "what its report shows", ("baselines", "baseline_samples", "free_texts")),
    Rule(LOGGED, "its length and its learning rates", (
        "num_train_epochs", "max_steps", "learning_rate", "min_learning_rate", "warmup_learning_rate", "warmup_steps",
        "lr_scheduler_type", "part_learning_rates", "layer_decay", "max_grad_norm",
    )),
    Rule(LOGGED, "its evaluation, and the form of its model", (
        "eval_steps", "validation_data", "validation_split", "validation_annotations", "eval_images", "eval_k",
        "eval_captions", "eval_max_tokens", "rerank_weight", "half_precision_states", "heat", "heat_layer",
        "templates", "answer_list", "dataset_name", "average_weights", "lora_save",
    )),
    Rule(LOGGED, "memory for time, with equal numbers up to rounding", ("gradient_checkpointing",)),
    Rule(LOGGED, "where its data and its start are: the samples are compared, and the start is not read again", (
        "data", "annotations", "image_root", "allow_outside_root", "model", "vision_model", "text_model", "tokenizer",
    )),
    Rule(REFUSED, "the order of samples and the random numbers", (
        "seed", "per_device_train_batch_size", "gradient_accumulation_steps", "train_sampling_strategy",
        "share_images",
    )),
    Rule(REFUSED, "the samples and their views", (
        "task", "split", "streaming", "data_weights", "validation_share", "tuning_images", "image_column",
        "caption_column", "label_column", "class_names", "add_words", "max_tokens", "two_views", "crop_scale",
        "color_jitter", "flip", "shuffle_images", "num_operations", "kept_views", "plain_view",
    )),
    Rule(REFUSED, "the model, by the fields of its config, and its start", (
        "config", "image_size", "add_sep_token", "vocab_size", "fusion_layer", "num_fusion_layers",
        "projection_start", "projection_ridge", "fusion_start", "image_mean", "image_std", "lora",
    )),
    Rule(REFUSED, "the optimizer, the precision, and which model is the best", (
        "weight_decay", "decay_rule", "adam_beta1", "adam_beta2", "bf16", "fp16", "torch_compile", "alpha_ramp",
        "metric_for_best_model",
    )),
)  # fmt: skip

_KINDS = {name: rule.kind for rule in ON_RESUME for name in rule.names}
# Facts beside the arguments that may change: they move the last digits of the losses.
_LOGGED_FACTS = ("engine.device", "engine.threads", "engine.torch")
# Facts of which only a hash is known, and what differs where it differs.
_HASHES = {
    "data.rows": "the samples or their order",
    "data.files": "the files of the stream or their order",
    "tokenizer.fingerprint": "the words of the tokenizer or their numbers",
}
_OBJECTS = ("lora", "part_learning_rates")  # arguments that are given as JSON or as mappings
# Fields of a config that training changes, or that do not say how the model computes.
_NOT_OF_MODEL = ("architectures", "dtype", "rerank_weight", "trained_on", "transformers_version", "_name_or_path")


def kind_of(name: str) -> str:
    """The consequence of a change of a fact for a run that goes on: `FREE`, `LOGGED` or `REFUSED`."""
    return LOGGED if name in _LOGGED_FACTS else _KINDS.get(name, REFUSED)


def names_of_kind(kind: str) -> frozenset[str]:
    """The arguments of a kind."""
    return frozenset(name for name, own in _KINDS.items() if own == kind)


def settings_of(*arguments: Any) -> dict[str, Any]:
    """The values of arguments by name, as JSON holds them.

    Args:
        arguments: objects of dataclasses of arguments; one may be None.
    """
    given = {one.name: getattr(part, one.name) for part in arguments if part for one in fields(part) if one.init}
    for name in _OBJECTS:
        if isinstance(given.get(name), str):
            given[name] = json.loads(given[name])
    return json.loads(json.dumps(given))


def identity_of_run(
    args: TCLTrainingArguments,
    recipe: dict[str, Any],
    model: PreTrainedModel,
    processor: TCLProcessor,
    dataset: Any,
    engine: dict[str, Any],
) -> dict[str, Any]:
    """The facts that the result of a run follows from, by name, as JSON holds them.

    Args:
        recipe: further arguments of the run by name.
        engine: facts about the launch.
    """
    config = {name: value for name, value in model.config.to_dict().items() if name not in _NOT_OF_MODEL}
    images = {name: value for name, value in processor.image_processor.to_dict().items() if name != "auto_map"}
    facts = {name: value for name, value in (recipe | settings_of(args)).items() if name != "config"}
    facts |= _flat("config", config) | {"config.class": type(model).__name__}
    facts |= _flat("processor", images) | {"tokenizer.fingerprint": fingerprint_of_tokenizer(processor.tokenizer)}
    facts |= _flat("data", fingerprint_of(dataset))
    facts |= _flat("engine", engine | {"torch": torch.__version__, "threads": torch.get_num_threads()})
    return json.loads(json.dumps(facts, default=str))


def _flat(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    """The values of nested mappings by names with dots."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(f"{prefix}.{name}", value) if isinstance(value, dict) else {f"{prefix}.{name}": value}
    return flat


def fingerprint_of_tokenizer(tokenizer: Any) -> str:
    """A hash of the words of a tokenizer with their numbers, and of how it cuts a text with many traits."""
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    probe = tokenizer("A Naïve Café's two-image 狗, dogs' [MASK] ÉTÉ 3.14 straße!", truncation=False)["input_ids"]
    content = json.dumps([words, list(probe), tokenizer.clean_up_text], ensure_ascii=True)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def check_identity(checkpoint: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to go on from the checkpoint of another run, and log what may change and did.

    Facts that only one of the two has are passed over: another version of the package may have added them.

    Raises:
        TrainingError: naming all that differs, and how to start anew from the weights.
    """
    changed = sorted(name for name in before.keys() & now.keys() if before[name] != now[name])
    refused = [name for name in changed if kind_of(name) == REFUSED]
    if refused:
        listed = "; ".join(_in_words(name, before[name], now[name]) for name in refused)
        raise TrainingError(
            f"{checkpoint} is of a run with other settings: {listed}. Set them as they were, or "
            f"{start_anew(checkpoint)}."
        )
    for name in changed:
        if kind_of(name) == LOGGED:
            logger.info("Resumed with another %s: %s, which was %s.", name, _short(now[name]), _short(before[name]))


def start_anew(checkpoint: Path) -> str:
    """How to start a new run from the weights of a checkpoint, as the end of a sentence."""
    is_model = os.path.isfile(checkpoint / "config.json")
    return f"start anew from its weights with --model {checkpoint if is_model else 'FOLDER'} and another output_dir"


def _in_words(name: str, before: Any, now: Any) -> str:
    """A difference, as a part of a sentence."""
    if name in _HASHES:
        return f"{_HASHES[name]} differ"
    return f"{name} was {_short(before)} and is now {_short(now)}"


def _short(value: Any) -> str:
    """A value in a sentence, cut if it is long."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
