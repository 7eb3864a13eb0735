"""Groups of parameters for the optimizer, and the learning rate of a step."""

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..models.modeling_tcl import TCLModel
from .arguments import TCLTrainingArguments, TrainingError

STAIR = 100  # steps for which the paper's warm-up keeps one learning rate
PARTS = ("vision", "text", "fusion", "projections", "heads", "temperature")


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


@dataclass(frozen=True)
class Place:
    """Where a parameter stands in a model.

    Args:
        part: one of `PARTS`.
        layers_above: layers of its part that follow; 0 in the last layer, and in parts without layers.
    """

    part: str
    layers_above: int = 0


def places_of(model: nn.Module) -> dict[nn.Parameter, Place]:
    """The place of every parameter of a model, which is a [`TCLModel`] or has one.

    Vision, text and fusion layers are counted apart, because each of the three is the last one before a loss: features
    are read from the last layer of both encoders, and matches and words from the last fusion layer. Embeddings come
    before the first layer. Copies of a fusion layer, for several images per text, stand in one place. All that is
    outside the `TCLModel` is a head.
    """
    tcl = next(module for module in model.modules() if isinstance(module, TCLModel))  # The teacher's comes later.
    vision, text, fusion = tcl.vision_model, tcl.text_model, tcl.text_model.fusion_layers
    copies = text.config.images_per_text
    stacks = {
        "vision": [vision.embeddings, *vision.layers],
        "text": [text.embeddings, *text.layers[: text.config.fusion_layer]],
        "fusion": [fusion[first : first + copies] for first in range(0, len(fusion), copies)],
    }
    places = {tcl.temperature: Place("temperature")}
    for part, stack in stacks.items():
        for number, level in enumerate(stack, 1):
            places |= {parameter: Place(part, len(stack) - number) for parameter in level.parameters()}
    projections = nn.ModuleList([tcl.visual_projection, tcl.text_projection])
    # What is left of an encoder follows its last layer. Words that a head shares with the encoder are in place already.
    for part, module in (("vision", vision), ("text", text), ("projections", projections), ("heads", model)):
        for parameter in module.parameters():
            places.setdefault(parameter, Place(part))
    return places


def split_by_rate(groups: list[dict], model: nn.Module, args: TCLTrainingArguments) -> tuple[list[dict], list[float]]:
    """Split groups of a model's parameters into groups of one learning rate.

    Returns:
        The groups, and for each of them the factor of the schedule's learning rate: the rate of its part, divided by
        `learning_rate`, times `layer_decay` for each layer of the part that follows. Without rates by part or layer
        these are the given groups with factors of 1.

    Raises:
        TrainingError: for the rate of a part that the model does not have or does not train.
    """
    if not args.part_rates and args.layer_decay == 1:
        return groups, [1.0] * len(groups)
    places = places_of(model)
    trained = {places[parameter].part for group in groups for parameter in group["params"]}
    for part in args.part_rates:
        if part not in trained:
            raise TrainingError(
                f"part_learning_rates: this model trains no part '{part}', but "
                f"{', '.join(part for part in PARTS if part in trained)}: name one of these, or leave it out."
            )
    split, factors = [], []
    for group in groups:
        of_one_rate: dict[tuple[str, int], list[nn.Parameter]] = {}  # by part and number of layers above
        for parameter in group["params"]:
            place = places[parameter]
            part = place.part if place.part in args.part_rates else ""  # Parts without a rate of their own share one.
            layers_above = place.layers_above if args.layer_decay < 1 else 0
            of_one_rate.setdefault((part, layers_above), []).append(parameter)
        for (part, layers_above), parameters in of_one_rate.items():
            split.append(group | {"params": parameters})
            share = args.part_rates[part] / args.learning_rate if part else 1.0
            factors.append(share * args.layer_decay**layers_above)
    return split, factors


def trained_groups(model: nn.Module, args: TCLTrainingArguments) -> tuple[list[dict], list[float]]:
    """The optimizer's groups of a model's trained parameters, and the factor of the learning rate of each.

    Raises:
        TrainingError: if nothing is trained, or for the rate of a part that the model does not have or does not train.
    """
    check_something_is_trained(model)
    return split_by_rate(parameter_groups(model, args.weight_decay, args.decay_rule), model, args)


def check_something_is_trained(model: nn.Module) -> None:
    """Refuse a model without an objective, or all of whose parameters are locked or serve no objective.

    Raises:
        TrainingError: naming the weights that are 0 and the locks.
    """
    config: Any = getattr(model, "config", None)
    weights = [loss.replace("loss_", "") + "_weight" for loss in getattr(model, "loss_names", ())[1:]]
    without_objective = bool(weights) and not any(getattr(config, name) for name in weights)
    if not without_objective and any(parameter.requires_grad for parameter in model.parameters()):
        return
    locks = [f"{name}={lock}" for name in ("lock_vision", "lock_text") if (lock := getattr(config, name, False))]
    reasons = [f"{', '.join(weights)} are 0"] * without_objective + [f"the locks are {', '.join(locks)}"] * bool(locks)
    raise TrainingError(
        f"Nothing is trained: {' and '.join(reasons) or 'no parameter requires a gradient'}; give an objective a "
        "weight above 0, or unlock an encoder, in the config."
    )


def learning_rate(args: TCLTrainingArguments, step: int, epoch: int, num_steps: int) -> float:
    """The learning rate of an optimizer step, counted from 0, where no part or layer has a rate of its own.

    "cosine" warms up linearly and then follows a cosine to the last step. "paper" warms up in stairs of 100 steps
    within the first epoch, and then takes one value for each epoch from the cosine over all epochs.

    Args:
        args: the schedule and its rates.
        step: the optimizer step.
        epoch: the epoch that it belongs to, from 0.
        num_steps: steps of the whole run.
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
