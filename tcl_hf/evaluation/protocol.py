"""How a result was measured."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class EvaluationProtocol:
    """All that a result must be read with; every table, card and file of results states it.

    Args:
        task: the task, a key of `recipes.tasks.TASKS`.
        dataset: what the data is called.
        split: the split of it.
        records: number of records that were evaluated.
        protocol: what the model had learned from before, see `recipes.tasks.protocol_name`.
        resolution: pixels of a side of the images.
        k: candidates that were re-ranked or scored in full; None where there are none.
        heat: the score whose heat map was read, of grounding.
        images_shuffled: whether each record had the image of another one.
    """

    task: str
    dataset: str
    split: str
    records: int
    protocol: str
    resolution: int
    k: int | None = None
    heat: str | None = None
    images_shuffled: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The fields that apply, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None and value is not False}
