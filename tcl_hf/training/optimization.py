"""Groups of parameters for the optimizer, and the learning rate of a step."""

import math

from torch import nn

from .arguments import TCLTrainingArguments

STAIR = 100  # steps for which the paper's warm-up keeps one learning rate


def parameter_groups(model: nn.Module, weight_decay: float, rule: str = "matrices") -> list[dict]:
    """AdamW's groups of trainable parameters: those that decay, and those that do not.

    Args:
        weight_decay: the decay of the first group.
        rule: "matrices" decays weights with two or four dimensions (linear layers, embeddings, convolutions);
            "original" decays all but biases and one-dimensional weights, and so also the temperature, the class token
            and the image positions.
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
    within the first epoch, and then takes one value for each epoch from the cosine over all epochs.
    """
    low, high = args.min_learning_rate, args.learning_rate
    if args.lr_scheduler_type == "paper":
        if epoch == 0:
            share = min(1.0, step // STAIR * STAIR / max(args.warmup_steps, 1))
            return args.warmup_learning_rate + share * (high - args.warmup_learning_rate)
        return low + 0.5 * (high - low) * (1 + math.cos(math.pi * epoch / args.num_train_epochs))
    if step < args.warmup_steps:
        return args.warmup_learning_rate + step / args.warmup_steps * (high - args.warmup_learning_rate)
    share = (step - args.warmup_steps) / max(num_steps - args.warmup_steps, 1)
    return low + 0.5 * (high - low) * (1 + math.cos(math.pi * min(share, 1.0)))
