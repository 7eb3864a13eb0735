"""How a result was measured."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class EvaluationProtocol:
    """The conditions of a result. Every table, card and file of results states them.

    Args:
        task: the task, a key of `recipes.tasks.TASKS`.
        dataset: name of the data.
        split: name of its split.
        records: number of records that were evaluated.
        protocol: what the model was trained on before, see `recipes.results.protocol_name`.
        resolution: pixels of a side of the images.
        k: candidates that were re-ranked or scored in full; None for tasks without candidates.
        heat: for grounding, the score whose heat map was used.
        classes: for classification, the number of classes to choose from.
        templates: for classification, the texts with `{}` in place of the name of a class.
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
    classes: int | None = None
    templates: list[str] | None = None
    images_shuffled: bool = False

    def __str__(self) -> str:
        """The protocol as a sentence."""
        conditions = [f"the protocol {self.protocol}", f"the resolution {self.resolution}"]
        conditions += [f"k = {self.k}"] if self.k is not None else []
        conditions += [f"the heat map of {self.heat}"] if self.heat is not None else []
        conditions += [f"{self.classes} classes"] if self.classes is not None else []
        conditions += (
            [f"{len(self.templates)} templates" if len(self.templates) > 1 else "1 template"]
            if self.templates is not None
            else []
        )
        conditions += ["the images shuffled"] if self.images_shuffled else []
        return (
            f"These are results for the task {self.task}, on {self.records} samples of the split {self.split} of "
            f"{self.dataset}, with {', '.join(conditions[:-1])} and {conditions[-1]}."
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields that apply to the task, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None and value is not False}
