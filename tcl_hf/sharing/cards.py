"""Model cards: what a run measured, or what is published of a recipe, in the words and metadata of the Hub.

All cards have the template `card_template.md`.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..data.embedded.openmoji import ATTRIBUTION
from ..data.images import open_image
from ..evaluation.protocol import EvaluationProtocol
from ..models import modeling_tcl, modeling_tcl_tasks
from ..models.modeling_tcl import TCLForImageTextRetrieval, TCLForPreTraining
from ..models.modeling_tcl_tasks import TCLForQuestionAnswering

TEMPLATE = Path(__file__).with_name("card_template.md")
CARD = "README.md"
EXAMPLE = "example.png"  # the picture of a widget
PAPER = "arxiv:2202.10401"  # as a tag, the Hub shows a card under its paper
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
For research and for trying the package. It knows what its training data shows and no more; with little data it
recognises colours and coarse shapes. It has learned whatever bias is in its texts. It was not tested for any decision
about people."""

# The Hub's name for what a head does; it has none for statements about images.
_PIPELINE_TAGS = {
    TCLForPreTraining: "zero-shot-image-classification",
    TCLForImageTextRetrieval: "zero-shot-image-classification",
    TCLForQuestionAnswering: "visual-question-answering",
}
_EMBEDDED = ("openmoji", "scenes")  # data of OpenMoji pictures, whose licence a model of them takes over


@dataclass(frozen=True)
class Card:
    """What a card says.

    Args:
        name: of the model.
        task: what it was trained for, a key of `tasks.TASKS` or "pretraining".
        datasets: names of what it was trained on.
        summary: what it is, in a sentence or two.
        results: Markdown, with how they were measured.
        training: Markdown: how it was trained.
        metrics: the results as numbers, for the metadata; each is one of `said`.
        said: how they were measured: `dataset`, `split`, `protocol`, and what else there is to say.
        base_models: what it started from: Hub names, or folders, of which the name is told.
        pictures: files beside the card, and what they show.
        example: a record whose picture the widget shows.
        model_class: what opens it; the task's head if None.
        limits: Markdown.
    """

    name: str
    model_class: type
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
    limits: str = LIMITS

    def write(self, folder: Path) -> ModelCard:
        """Write the card, and the picture of its widget, into a folder."""
        pipeline_tag, model_class = _PIPELINE_TAGS.get(self.model_class), self.model_class.__name__
        emojis = any(name in _EMBEDDED for name in self.datasets)
        data = ModelCardData(
            license="cc-by-sa-4.0" if emojis else None,
            library_name="transformers",
            pipeline_tag=pipeline_tag,
            tags=["tcl", "vision-language", self.task.replace("_", "-"), PAPER],
            datasets=list(self.datasets) or None,
            base_model=[name_of_model(model) for model in self.base_models] or None,
            model_name=self.name,
            eval_results=eval_results(self.result_type, self.metrics, self.protocol) or None,
            widget=self._widget(folder, pipeline_tag),
        )
        load = (
            f"from tcl_hf import {model_class}, TCLProcessor\n\n"
            f'model = {model_class}.from_pretrained("{self.name}", use_momentum_teacher=False).eval()\n'
            f'processor = TCLProcessor.from_pretrained("{self.name}")'
        )
        card = ModelCard.from_template(
            data,
            template_path=str(TEMPLATE),
            name=self.name,
            summary=self.summary,
            load=load,
            results=self.results,
            pictures=self.pictures,
            training=self.training,
            limits=self.limits,
            credits=ATTRIBUTION if emojis else None,
            citation=CITATION,
        )
        card.save(folder / CARD)
        return card

    def _widget(self, folder: Path, pipeline_tag: str | None) -> list[dict[str, str]] | None:
        if self.example is None or pipeline_tag is None or "image" not in self.example:
            return None
        file = io.BytesIO()
        open_image(self.example["image"]).convert("RGB").save(file, "PNG")
        (folder / EXAMPLE).write_bytes(file.getvalue())
        asked = "text" if pipeline_tag == "visual-question-answering" else "candidate_labels"
        text = self.example.get("question") or ", ".join(self.example["captions"])
        return [{"src": EXAMPLE, asked: text}]


def name_of_model(model: str) -> str:
    """What a model is called on a card: its Hub name, or that of its folder."""
    return Path(model).resolve().name if Path(model).exists() else model


def eval_results(result_type: str, metrics: dict[str, float], protocol: EvaluationProtocol | None) -> list[EvalResult]:
    """Metrics as a card's metadata has them; those of single labels, and counts, are left to the table."""
    said = protocol.to_dict() if protocol else {}
    how: dict[str, Any] = {name: said[name] for name in ("protocol", "k", "resolution", "heat") if name in said}
    left_out = ("step", "epoch", "records", "phrases")
    return [
        EvalResult(
            task_type=result_type,
            dataset_type=said["dataset"],
            dataset_name=said["dataset"],
            dataset_split=said["split"],
            metric_type=name,
            metric_name=name,
            metric_value=round(value, 2),
            metric_args=how,
        )
        for name, value in metrics.items()
        if said.get("split") and name not in left_out and "/" not in name
    ]


def add_results(folder: Path, result_type: str, metrics: dict[str, float], protocol: EvaluationProtocol) -> None:
    """Add measured results to the metadata of a folder's card, in place of earlier ones of the same measurement."""
    if not (folder / CARD).is_file():
        return
    card = ModelCard.load(folder / CARD)
    new = eval_results(result_type, metrics, protocol)
    known = [old for old in card.data.eval_results or [] if not any(_same(old, result) for result in new)]
    if known or new:
        card.data.model_name = card.data.model_name or folder.resolve().name
        card.data.eval_results = [*known, *new]
        card.save(folder / CARD)


def _same(a: EvalResult, b: EvalResult) -> bool:
    def measurement(result: EvalResult) -> tuple:
        return result.task_type, result.dataset_type, result.dataset_split, result.metric_name, result.metric_args

    return measurement(a) == measurement(b)


def plain_card(name: str, model_class: str, trained_on: Sequence[dict[str, Any]] | None, origin: str = "") -> Card:
    """The card of a folder that no run of ours left one in, such as a converted one.

    Args:
        model_class: the class that wrote it.
        trained_on: the config's.
        origin: where it came from, in a sentence.
    """
    datasets = list(dict.fromkeys(data for step in trained_on or () for data in step["data"]))
    learned = f" It has learned from {', '.join(datasets)}." if datasets else ""
    return Card(
        name=name,
        model_class=getattr(modeling_tcl_tasks, model_class, None) or getattr(modeling_tcl, model_class),
        task="pretraining",
        result_type="",
        datasets=datasets,
        summary=f"A model of {METHOD}. {origin}{learned}".strip(),
        results="Nothing was measured of it here: `scripts/evaluate.py` does, and adds the results to this card.",
        training="How it was trained is not known to this card.",
        limits=_LIMITS_OF_OTHERS,
    )


_LIMITS_OF_OTHERS = """\
For research. It has learned whatever bias is in its pictures and texts, and was not tested here for any decision about
people. Its licence is that of whoever trained it."""

# Results that are published of the paper's recipes and were checked; in percent unless said.
_PUBLISHED = {
    "tcl_4m": """\
| recall in % | image to text @1 | @5 | @10 | text to image @1 | @5 | @10 |
|---|---|---|---|---|---|---|
| COCO, 5,000 test images, zero-shot | 71.4 | 90.8 | 95.4 | 53.5 | 79.0 | 87.1 |
| Flickr30k test, zero-shot | 89.4 | 98.6 | 99.6 | 73.4 | 92.2 | 95.5 |

Mean losses of the first epochs in the author's log (MLM, contrast, matching): 2.017, 2.352, 0.451; 1.364, 2.032, 0.347;
1.303, 1.949, 0.316; 1.265, 1.900, 0.300.""",
    "tcl_retrieval_coco": """\
On Flickr30k, which the paper calls zero-shot and we `zero_shot_from_coco`: recall@1 of 93.0 % image to text and 79.6 %
text to image.""",
}


def paper_card(recipe: str, task: str, datasets: Sequence[str], base_model: str | None) -> Card:
    """The card of one of the paper's recipes, of which no weights were trained here."""
    published = _PUBLISHED.get(recipe)
    results = "No weights of this recipe were trained or measured by this project. "
    results += f"Published by the authors:\n\n{published}" if published else "It quotes no published figures."
    script = "pretrain" if task == "pretraining" else "finetune"
    start = " --model FOLDER" if base_model else ""
    return Card(
        name=recipe,
        model_class=TCLForPreTraining,
        task=task,
        result_type="",
        datasets=datasets,
        summary=f"The paper's recipe for {task.replace('_', ' ')}: {METHOD}. Weights that the authors trained with it "
        "open here after `python scripts/convert_checkpoint.py SOURCE FOLDER`.",
        results=results,
        training="On 8 GPUs:\n\n```\naccelerate launch --multi_gpu --num_processes 8 "
        f"scripts/{script}.py --recipe {recipe}{start}\n```",
        base_models=[base_model] if base_model else [],
        limits=_LIMITS_OF_OTHERS,
    )
