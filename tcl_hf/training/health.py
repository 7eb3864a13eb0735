"""The health of a run: numbers by which trouble is seen early, and warnings.

The numbers stay on the device until a line of the log is written.
"""

import logging
import math
from typing import Any

from torch import Tensor

from ..models.configuration_tcl import MAX_TEMPERATURE, MIN_TEMPERATURE
from .states import take_over

logger = logging.getLogger(__name__)

SPIKE = 1.5  # A loss above this multiple of the mean of the lines before is a spike.
MEMORY = 0.9  # the share of that mean that is kept at each line
LEAST_SPREAD = 0.01  # Below this spread the features of a queue are all alike.
LARGEST_DISTANCE = 0.5  # Above this distance, relative to the student's norm, the teacher has lost the student.


def batch_statistics(output: Any) -> dict[str, Tensor]:
    """Statistics of a training forward, as scalars on the device; those that the output allows.

    `positive_similarity` is the mean cosine similarity of an image and its text, `negative_similarity` that of an image
    and the other texts of the batch; `itm_accuracy` and `mlm_accuracy` are the output's own.

    Args:
        output: the output of a head, perhaps with `image_embeds` and `text_embeds` (N, D).
    """
    names = ("itm_accuracy", "mlm_accuracy")
    statistics = {name: value for name in names if (value := getattr(output, name, None)) is not None}
    image, text = getattr(output, "image_embeds", None), getattr(output, "text_embeds", None)
    if image is not None and text is not None and len(image) == len(text):
        image, text = image.detach(), text.detach()
        positive = (image * text).sum()
        statistics["positive_similarity"] = positive / len(image)
        if len(image) > 1:
            negative = image.sum(0) @ text.sum(0) - positive  # every image with every text but its own
            statistics["negative_similarity"] = negative / (len(image) * (len(image) - 1))
    return statistics


class Monitor:
    """Warns of lines of the log that look wrong. It remembers earlier lines, and so belongs to every checkpoint."""

    def __init__(self):
        self.mean_loss = math.nan

    def state_dict(self) -> dict[str, float]:
        """The state that a checkpoint keeps."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take over the state that a checkpoint has kept."""
        take_over(self, state)

    def watch(self, line: dict[str, float]) -> list[str]:
        """Log a warning for everything that looks wrong in a line of the log, and return the warnings."""
        warnings = []
        if line["loss"] > SPIKE * self.mean_loss:
            warnings.append(
                f"the loss is {line['loss']:.3g}, and was {self.mean_loss:.3g} on average: a spike; lower the learning "
                "rate or clip the gradient (max_grad_norm)"
            )
        if line.get("queue_spread", 1.0) < LEAST_SPREAD:
            warnings.append("the features of a queue are all alike: the encoders have collapsed")
        if line.get("teacher_distance", 0.0) > LARGEST_DISTANCE:
            warnings.append(
                f"the teacher is {line['teacher_distance']:.2f} of the student's length away: it does not keep up; "
                "lower the learning rate or the momentum"
            )
        if "temperature" in line and not MIN_TEMPERATURE < line["temperature"] < MAX_TEMPERATURE:
            warnings.append(f"the temperature is {line['temperature']:g}, at the end of its range")
        is_first = math.isnan(self.mean_loss)
        self.mean_loss = line["loss"] if is_first else MEMORY * self.mean_loss + (1 - MEMORY) * line["loss"]
        for warning in warnings:
            logger.warning("Step %d: %s.", line["step"], warning)
        return warnings
