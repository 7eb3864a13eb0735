"""What tells early that a run goes wrong: numbers for the log, and warnings.

Nothing here reads from the device but at the lines of the log.
"""

import logging
import math
from typing import Any

import torch
from torch import Tensor

from ..models.modeling_tcl import MAX_TEMPERATURE, MIN_TEMPERATURE
from ..models.momentum import weights_of
from .engine import whole

logger = logging.getLogger(__name__)

SPIKE = 1.5  # times the mean of the lines before, from which a loss is called a spike
MEMORY = 0.9  # share of that mean kept at each line
LEAST_SPREAD = 0.01  # of the queues' features, below which they are all alike
LARGEST_DISTANCE = 0.5  # of the teacher, relative to the student, above which it has lost it


def batch_statistics(output: Any) -> dict[str, Tensor]:
    """Numbers of a training forward, as scalars on the device: cosine similarities of pairs and of others, accuracies.

    Args:
        output: of a head with `image_embeds` and `text_embeds` (N, D), or of any other; accuracies where it has them.
    """
    found = {}
    for name in ("itm_accuracy", "mlm_accuracy"):
        value = getattr(output, name, None)
        if value is not None:
            found[name] = value
    image, text = getattr(output, "image_embeds", None), getattr(output, "text_embeds", None)
    if image is not None and text is not None and len(image) == len(text):
        image, text = image.detach(), text.detach()
        pairs = (image * text).sum()
        found["positive_similarity"] = pairs / len(image)
        if len(image) > 1:
            others = image.sum(0) @ text.sum(0) - pairs  # every image with every text, but its own
            found["negative_similarity"] = others / (len(image) * (len(image) - 1))
    return found


@torch.no_grad()
def model_statistics(model: Any, pairs_per_step: int) -> dict[str, float]:
    """Numbers of a model with teacher and queues; none of what it has not.

    `teacher_distance` is the norm of the difference to the student, relative to the student's; `queue_age` the
    optimizer steps that a feature stays in the queues; `queue_spread` 1 minus the length of their mean feature: 0 if
    all are alike.

    Args:
        pairs_per_step: of all processes, in an optimizer step.
    """
    found = {}
    teacher, queue = getattr(model, "teacher", None), getattr(model, "queue", None)
    if teacher is not None:
        students = weights_of(model)
        own = dict(teacher.named_parameters())
        differences = torch._foreach_sub(list(own.values()), [students[name] for name in own])
        norms = [whole(torch.nn.utils.get_total_norm(x)) for x in (differences, [students[name] for name in own])]
        found["teacher_distance"] = (norms[0] / norms[1]).item()
    if queue is not None and len(queue.image):
        found["queue_age"] = len(queue.image) / pairs_per_step
        spread = [1 - features.float().mean(0).norm() for features in (queue.image, queue.text)]
        found["queue_spread"] = min(spread[0].item(), spread[1].item())
    return found


class Monitor:
    """Warns of lines of the log that look wrong; part of every checkpoint."""

    def __init__(self):
        self.mean_loss = math.nan

    def state_dict(self) -> dict[str, float]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, float]) -> None:
        vars(self).update(state)

    def watch(self, line: dict[str, float]) -> list[str]:
        """Log what looks wrong in a line, and return it."""
        found = []
        if line["loss"] > SPIKE * self.mean_loss:
            found.append(
                f"the loss is {line['loss']:.3g}, and was {self.mean_loss:.3g} on average: a spike; lower the learning "
                "rate or clip the gradient (max_grad_norm)"
            )
        if line.get("queue_spread", 1.0) < LEAST_SPREAD:
            found.append("the queues' features are all alike: the encoders have collapsed")
        if line.get("teacher_distance", 0.0) > LARGEST_DISTANCE:
            found.append(
                f"the teacher is {line['teacher_distance']:.2f} of the student's length away: it does not keep up; "
                "lower the learning rate or the momentum"
            )
        if not MIN_TEMPERATURE < line.get("temperature", 0.07) < MAX_TEMPERATURE:
            found.append(f"the temperature is {line['temperature']:g}, at the end of its range")
        known = not math.isnan(self.mean_loss)
        self.mean_loss = MEMORY * self.mean_loss + (1 - MEMORY) * line["loss"] if known else line["loss"]
        for warning in found:
            logger.warning("Step %d: %s.", line["step"], warning)
        return found
