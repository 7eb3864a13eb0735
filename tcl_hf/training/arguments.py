"""The arguments of a training run."""

import difflib
import json
import math
from dataclasses import dataclass, field
from typing import Any

# The fields of PEFT's LoraConfig that a run takes. Others would change the base weights or the layers themselves.
LORA_FIELDS = (
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "modules_to_save"),
    *("rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
)
_OTHER_LORA_NAMES = {"rank": "r", "lora_r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}


# The least and the most that a number of a run may be.
_LEAST: dict[str, float] = {
    **dict.fromkeys(("num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"), 1),
    **dict.fromkeys(("logging_steps", "save_total_limit"), 1),
    **dict.fromkeys(("seed", "eval_steps", "save_steps", "dataloader_num_workers", "warmup_steps"), 0),
    **dict.fromkeys(("learning_rate", "min_learning_rate", "warmup_learning_rate", "weight_decay"), 0),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "max_grad_norm", "max_bad_share"), 0),
}
_MOST: dict[str, float] = {"seed": 2**32 - 1, "max_bad_share": 1}  # numpy takes seeds of 32 bits


class TrainingError(ValueError):
    """Arguments of a run that contradict each other; the message says what, and the remedy."""


@dataclass
class TCLTrainingArguments:
    """How to train."""

    output_dir: str = field(default="runs/tcl", metadata={"help": "Folder of the model, metrics and checkpoints."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, order, augmentation and masking."})
    num_train_epochs: int = field(default=30, metadata={"help": "Passes over the data."})
    max_steps: int = field(default=-1, metadata={"help": "Stop after N optimizer steps; -1 for the end of all epochs."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Pairs in a forward of one process."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Forwards in an optimizer step."})
    lr_scheduler_type: str = field(
        default="cosine",
        metadata={
            "help": "cosine: linear warm-up, then cosine, per step; paper: warm-up in stairs, then cosine by epoch.",
            "choices": ["cosine", "paper"],
        },
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "Highest learning rate."})
    min_learning_rate: float = field(default=1e-5, metadata={"help": "Last learning rate."})
    warmup_learning_rate: float = field(default=1e-5, metadata={"help": "First learning rate."})
    warmup_steps: int = field(default=2000, metadata={"help": "Optimizer steps of warm-up."})
    part_learning_rates: dict[str, float] | str | None = field(
        default="{}",
        metadata={
            "help": "Highest learning rates of parts (vision, text, fusion, projections, heads, temperature), as JSON; "
            "the other parts take learning_rate."
        },
    )
    part_rates: dict[str, float] = field(init=False)
    layer_decay: float = field(
        default=1.0,
        metadata={"help": "Factor of the learning rate from a layer of an encoder to the layer below it; 1 for none."},
    )
    weight_decay: float = field(default=0.02, metadata={"help": "Decay of AdamW."})
    decay_rule: str = field(
        default="matrices",
        metadata={
            "help": "matrices: weights of linear layers, convolutions and embeddings decay; "
            "original: also the temperature, class token and image positions.",
            "choices": ["matrices", "original"],
        },
    )
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW's first beta."})
    adam_beta2: float = field(default=0.999, metadata={"help": "AdamW's second beta."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Clip the gradient to this norm; 0 for no clipping."})
    bf16: bool = field(
        default=False,
        metadata={"help": "Autocast to bfloat16, except on CPUs without it; else the precision of the launcher."},
    )
    fp16: bool = field(default=False, metadata={"help": "Autocast to float16; else the precision of the launcher."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute activations: less memory."})
    torch_compile: bool = field(default=False, metadata={"help": "Compile the forward."})
    train_sampling_strategy: str = field(
        default="random",
        metadata={
            "help": "random: any sample beside any other; group_by_length: batches of captions of about the same "
            "length, which need less padding.",
            "choices": ["random", "group_by_length"],
        },
    )
    dataloader_num_workers: int = field(default=4, metadata={"help": "Processes that prepare batches."})
    logging_steps: int = field(default=50, metadata={"help": "Write the mean losses every N steps."})
    alpha_ramp: bool = field(
        default=True, metadata={"help": "Raise alpha from 0 over the first epoch (paper: not for visual entailment)."}
    )
    eval_steps: int = field(default=0, metadata={"help": "Evaluate every N steps; 0 for the end only."})
    metric_for_best_model: str = field(
        default="", metadata={"help": "Keep the model with the highest value of this metric; that of the end if empty."}
    )
    average_weights: bool = field(
        default=False,
        metadata={
            "help": "Evaluate and save the teacher's weights, a moving average of the student's, as the model's."
        },
    )
    save_steps: int = field(default=0, metadata={"help": "Write a checkpoint every N steps; 0 for none."})
    save_total_limit: int = field(default=2, metadata={"help": "Number of checkpoints that are kept."})
    push_to_hub: bool = field(default=False, metadata={"help": "Push every checkpoint in the background."})
    hub_model_id: str | None = field(
        default=None, metadata={"help": "Repository on the Hub for push_to_hub: user/name; made if it is missing."}
    )
    resume: bool = field(default=False, metadata={"help": "Go on from the newest checkpoint in output_dir."})
    ignore_random_states: bool = field(
        default=False,
        metadata={"help": "Resume with other random numbers where those of the checkpoint cannot be used."},
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Replace the run or model that output_dir holds, which is refused otherwise."},
    )
    lora: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": f"Train LoRA adapters: fields of PEFT's LoraConfig as JSON ({', '.join(LORA_FIELDS)})."},
    )
    lora_fields: dict[str, Any] | None = field(init=False)
    lora_save: str = field(
        default="merged",
        metadata={
            "help": "merged: save a whole model, with the adapters added to its weights; adapter: save the adapters, "
            "and the parts that were trained in full.",
            "choices": ["merged", "adapter"],
        },
    )
    report_to: list[str] = field(
        default_factory=list, metadata={"help": "Trackers: tensorboard, wandb, trackio, or others of Accelerate."}
    )
    max_bad_share: float = field(default=0.1, metadata={"help": "Stop when a larger share of the samples is bad."})

    def __post_init__(self):
        self._check_numbers()
        if self.bf16 and self.fp16:
            raise TrainingError("bf16 and fp16 are both true: choose one of them.")
        if self.push_to_hub and not self.hub_model_id:
            raise TrainingError("push_to_hub needs a repository: name it with hub_model_id, as user/name.")
        if not 0 < self.layer_decay <= 1:
            raise TrainingError(
                f"layer_decay={self.layer_decay} must be above 0 and at most 1, which gives all layers the same rate."
            )
        self.part_rates = _part_rates(self.part_learning_rates or {})
        if self.part_rates and self.learning_rate <= 0:
            raise TrainingError(
                f"learning_rate={self.learning_rate} must be above 0 with part_learning_rates, because the rates of "
                "parts follow its schedule."
            )
        self.lora_fields = None if self.lora is None else read_lora(self.lora)

    def _check_numbers(self) -> None:
        """Refuse numbers that no run can have."""
        for name, least in _LEAST.items():
            value, most = getattr(self, name), _MOST.get(name, math.inf)
            if not (least <= value <= most and math.isfinite(value)):
                limit = f"at least {least}" if most == math.inf else f"between {least} and {most}"
                raise TrainingError(f"{name} must be {limit}, got {value}.")
        for name in ("adam_beta1", "adam_beta2"):
            if getattr(self, name) >= 1:
                raise TrainingError(f"{name} must be below 1, got {getattr(self, name)}.")
        if self.max_steps < 1 and self.max_steps != -1:
            raise TrainingError(f"max_steps must be at least 1, or -1 for the end of all epochs, got {self.max_steps}.")

    @property
    def mixed_precision(self) -> str | None:
        """The precision that was asked for, in Accelerate's words; None for that of the launcher."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else None


def _part_rates(given: Any) -> dict[str, float]:
    """The learning rates by part, which are given as a mapping or as JSON.

    Raises:
        TrainingError: if they are not a mapping of parts to numbers above 0.
    """
    try:
        mapping = json.loads(given) if isinstance(given, str) else given
        rates = {str(part): float(rate) for part, rate in mapping.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise TrainingError(
            f"part_learning_rates is not a mapping of parts to learning rates, but {given}: write for example "
            '{"vision": 1e-5, "heads": 1e-4}.'
        ) from error
    for part, rate in rates.items():
        if not (0 < rate < math.inf):
            raise TrainingError(
                f"part_learning_rates: the rate of '{part}' must be above 0, got {rate:g}: leave the part out to "
                "train it at learning_rate, or lock an encoder with lock_vision or lock_text in the config to keep its "
                "weights as they are."
            )
    return rates


def read_lora(lora: dict[str, Any] | str) -> dict[str, Any]:
    """The fields of LoRA, which are an object or JSON of one.

    Raises:
        TrainingError: if they are not an object, a field does not exist, or the rank is not at least 1.
    """
    try:
        fields = json.loads(lora) if isinstance(lora, str) else lora
    except json.JSONDecodeError as error:
        raise TrainingError(f"lora is not JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise TrainingError(f"lora is not an object, but {lora}: give fields of LoRA by name, such as {{r: 16}}.")
    for name in fields:
        if name not in LORA_FIELDS:
            close = [_OTHER_LORA_NAMES.get(name), *difflib.get_close_matches(name, LORA_FIELDS, n=1)]
            hint = next((f" (did you mean '{meant}'?)" for meant in close if meant), "")
            raise TrainingError(f"lora has no field '{name}'{hint}: its fields are {', '.join(LORA_FIELDS)}.")
    rank = fields.get("r", 1)
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise TrainingError(f"lora.r must be a whole number of at least 1, got {rank!r}.")
    return fields
