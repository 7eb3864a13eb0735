"""Parameter groups, learning rates and the norm of the gradient."""

import math

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from .arguments import TCLTrainingArguments
from .engine import whole


def parameter_groups(model: nn.Module, weight_decay: float, rule: str = "matrices") -> list[dict]:
    """AdamW's groups of trainable parameters: those that decay, and those that do not.

    Args:
        rule: "matrices" decays weights with two or four dimensions (linear, embedding, convolution); "original"
            all but biases and one-dimensional ones, so also the temperature, class token and image positions.
    """

    def decays(name: str, parameter: nn.Parameter) -> bool:
        if rule == "original":
            return parameter.ndim != 1 and not name.endswith(".bias")
        return parameter.ndim in (2, 4)

    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"params": [p for name, p in trained if decays(name, p)], "weight_decay": weight_decay},
        {"params": [p for name, p in trained if not decays(name, p)], "weight_decay": 0.0},
    ]


def learning_rate(args: TCLTrainingArguments, step: int, epoch: int, num_steps: int) -> float:
    """The learning rate of an optimizer step, counted from 0.

    "cosine" warms up linearly and then follows a cosine to the last step. "paper" warms up in stairs of 100 steps
    within the first epoch, and then takes one value per epoch from the cosine over all epochs.
    """
    low, high = args.min_learning_rate, args.learning_rate
    if args.lr_scheduler_type == "paper":
        if epoch == 0:
            stair = 100
            share = min(1.0, step // stair * stair / max(args.warmup_steps, 1))
            return args.warmup_learning_rate + share * (high - args.warmup_learning_rate)
        return low + 0.5 * (high - low) * (1 + math.cos(math.pi * epoch / args.num_train_epochs))
    if step < args.warmup_steps:
        return args.warmup_learning_rate + step / args.warmup_steps * (high - args.warmup_learning_rate)
    share = (step - args.warmup_steps) / max(num_steps - args.warmup_steps, 1)
    return low + 0.5 * (high - low) * (1 + math.cos(math.pi * min(share, 1.0)))


def gradient_norm(accelerator: Accelerator, model: nn.Module, max_norm: float) -> Tensor | None:
    """Norm of the whole gradient, before clipping where it is clipped; None where the engine does not tell."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:  # it has clipped and stepped already, in `backward`
        norm = accelerator.clip_grad_norm_(model.parameters(), max_norm)
        return None if norm is None else torch.tensor(float(norm), device=accelerator.device)
    if max_norm > 0:
        return whole(accelerator.clip_grad_norm_(model.parameters(), max_norm))
    accelerator.unscale_gradients()
    return whole(torch.nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None))
