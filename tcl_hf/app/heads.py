"""The models behind a service or an app, by what they can do: embed, match, ground, answer, judge one picture or two.

A model is opened once and used by all that it can do. The pipelines of `inference` prepare an input and finish its
output, so that a service returns what they return; between the two, several inputs are stacked into one batch.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import pipeline

from ..evaluation.retrieval import can_match
from ..models.encoders import TCLPreTrainedModel
from ..models.modeling_tcl import TCLForImageTextRetrieval, TCLModel
from ..models.modeling_tcl_tasks import TCLForQuestionAnswering, TCLForVisualEntailment, TCLForVisualReasoning
from ..models.processing_tcl import TCLProcessor
from ..recipes.arguments import CheckpointArguments, RecipeError
from ..recipes.build import open_model
from ..recipes.model_folder import ANSWERS, file_of
from ..search import ImageIndex, SearchError, SearchModel
from ..search.ranking import EncodedText, check_text
from ..sharing.convert import class_of
from ..sharing.original_files import CheckpointError
from ..training.adapters import config_of
from .limits import RequestError

logger = logging.getLogger(__name__)

DEMO = "runs/openmoji"  # the model that `tcl-hf demo` makes

# What a head is needed for, and the class of a model that has it.
VERBS: dict[str, str] = {
    "embed": "TCLModel, TCLForImageTextRetrieval or TCLForPreTraining",
    "match": "TCLForImageTextRetrieval or TCLForPreTraining with itm_weight above 0",
    "ground": "TCLForImageTextRetrieval or TCLForPreTraining with itm_weight above 0",
    "answer": "TCLForQuestionAnswering",
    "judge": "TCLForVisualEntailment",
    "judge_two": "TCLForVisualReasoning",
}
_PIPELINES = {
    "match": "image-text-matching",
    "ground": "visual-grounding",
    "answer": "visual-question-answering",
    "judge": "visual-entailment",
    "judge_two": "visual-reasoning",
}


@dataclass
class OpenedModel:
    """A model in evaluation mode with its processor, and the answers that it chooses among, if it has any."""

    name: str
    model: TCLPreTrainedModel
    processor: TCLProcessor
    answers: list[str] | None = None

    @classmethod
    def open(cls, name: str, device: str | None = None) -> "OpenedModel":
        """Open a folder, or a model of the Hub, as the class that wrote it, without a teacher.

        Args:
            device: such as "cuda:1"; a GPU if there is one, else the CPU, if None.

        Raises:
            RecipeError: if it cannot be opened.
        """
        if name == DEMO and not os.path.isdir(name):
            raise RecipeError(f"There is no {DEMO}: make it with `tcl-hf demo`, or name a model with --model.")
        try:
            model_class = class_of(config_of(name))
        except (CheckpointError, OSError, ValueError, TypeError) as error:
            raise RecipeError(f"{name} cannot be opened: {error}") from error
        model, processor = open_model(CheckpointArguments(model=name), model_class, to_train=False)
        model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval().requires_grad_(False)
        file = file_of(name, ANSWERS)
        answers = None if file is None else json.loads(file.read_text(encoding="utf-8"))
        return cls(name, model, processor, answers)

    @property
    def verbs(self) -> list[str]:
        """The verbs that the model can do, as trained heads of it permit."""
        model, found = self.model, []
        if isinstance(model, TCLModel | TCLForImageTextRetrieval):
            found.append("embed")
        if isinstance(model, TCLForImageTextRetrieval) and can_match(model.config):
            found += ["match", "ground"]
        if isinstance(model, TCLForQuestionAnswering):
            found.append("answer")
        if isinstance(model, TCLForVisualEntailment):
            found.append("judge")
        if isinstance(model, TCLForVisualReasoning):
            found.append("judge_two")
        return found


@dataclass
class Prepared:
    """An input of a head that waits for its batch: inputs of the same `kind` may share one."""

    kind: tuple
    inputs: dict[str, Any]
    forward: dict[str, Any]
    finish: dict[str, Any]


class Head:
    """A head of a model, with the pipeline that prepares its inputs and finishes its outputs."""

    def __init__(self, verb: str, opened: OpenedModel):
        self.verb, self.opened = verb, opened
        model = opened.model
        self.pipe: Any = pipeline(_PIPELINES[verb], model=model, processor=opened.processor, device=model.device)

    def prepare(self, record: Mapping[str, Any], **parameters: Any) -> Prepared:
        """The input that the model reads of a record of the pipeline. It may run in any thread.

        Raises:
            RequestError: with the status 422, if the record or a parameter is wrong.
        """
        try:
            before, forward, finish = self.pipe._sanitize_parameters(**parameters)
            inputs = self.pipe.preprocess(record, **before)
        except ValueError as error:
            raise RequestError(422, str(error)) from error
        of_candidates = tuple(parameters.get("candidates") or ())
        others = sorted((name, value) for name, value in forward.items() if name != "candidates")
        shapes = tuple(value.shape[1] for value in inputs.values() if isinstance(value, Tensor) and value.dim() == 3)
        return Prepared((self.verb, of_candidates, *others, shapes), inputs, forward, finish)

    def run(self, batch: Sequence[Prepared]) -> list[Any]:
        """The results of a batch of one kind, as the pipeline gives them one by one.

        Raises:
            RequestError: with the status 422, if the model cannot read one of them.
        """
        try:
            outputs = self.pipe.forward(_stacked([one.inputs for one in batch]), **batch[0].forward)
        except ValueError as error:  # a phrase that the model does not read, for example
            raise RequestError(422, str(error)) from error
        return [self.pipe.postprocess(_row(outputs, number), **one.finish) for number, one in enumerate(batch)]

    def __call__(self, record: Mapping[str, Any], **parameters: Any) -> Any:
        """The result of one record.

        Raises:
            RequestError: as `prepare`.
        """
        return self.run([self.prepare(record, **parameters)])[0]


def _stacked(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Inputs of one batch: tensors, padded at the end of their last dimension, and lists of everything else."""
    stacked: dict[str, Any] = {}
    for name, first in rows[0].items():
        values = [row[name] for row in rows]
        if isinstance(first, Tensor):
            longest = max(value.shape[-1] for value in values)
            padded = [torch.nn.functional.pad(value, (0, longest - value.shape[-1])) for value in values]
            stacked[name] = torch.cat(padded)
        else:
            stacked[name] = values
    return stacked


def _row(outputs: Mapping[str, Any], number: int) -> dict[str, Any]:
    """The outputs of one input of a batch, as a pipeline passes them on: tensors keep their first dimension."""
    return {name: x[number : number + 1] if isinstance(x, Tensor) else x[number] for name, x in outputs.items()}


class Embedder:
    """Features of texts and pictures of a model that has projections, in batches."""

    def __init__(self, opened: OpenedModel):
        self.opened = opened
        self.searcher = SearchModel(opened.model, opened.processor)
        self.searcher.name = opened.name
        self.dimensions = opened.model.config.projection_dim

    def pixels(self, image: Image.Image) -> Tensor:
        """Pixels (3, height, width) of a picture as the model reads them. It may run in any thread."""
        return self.searcher.pixel_values(image)

    def images(self, pixels: Sequence[Tensor]) -> Sequence[Tensor]:
        """L2-normalised features (D,) of pictures, given their `pixels`."""
        return list(self.searcher.encode_images(torch.stack(list(pixels)))[1].float().cpu())

    def texts(self, texts: Sequence[str]) -> list[EncodedText]:
        """Texts after their encoder, with their features."""
        return self.searcher.encode_texts(texts)


def check_readable(text: str, processor: TCLProcessor, place: str = "text") -> None:
    """Refuse a text of which nothing is left once the model's clean-up has left out its punctuation.

    Raises:
        RequestError: with the status 422.
    """
    try:
        check_text(text, processor)
    except SearchError as error:
        raise RequestError(422, f"{place}: {error}") from error


class Heads:
    """Several models, and for each verb the first of them that can do it.

    Raises:
        RecipeError: if a model cannot be opened, or there is none.
    """

    def __init__(self, names: Sequence[str], device: str | None = None):
        if not names:
            raise RecipeError("There is no model: name one with --model.")
        self.opened = [OpenedModel.open(name, device) for name in names]
        self.embedders: list[Embedder] = []
        self.by_verb: dict[str, Head] = {}
        for opened in self.opened:
            logger.info("%s: %s", opened.name, ", ".join(opened.verbs) or "no head to serve")
            for verb in opened.verbs:
                if verb == "embed":
                    self.embedders.append(Embedder(opened))
                elif verb not in self.by_verb:
                    self.by_verb[verb] = Head(verb, opened)

    @property
    def embedder(self) -> Embedder | None:
        """The first model that embeds."""
        return self.embedders[0] if self.embedders else None

    def why_absent(self, verb: str) -> str:
        """Why no head can do this, with the remedy, in a sentence."""
        names = ", ".join(f"{one.name} is a {type(one.model).__name__}" for one in self.opened)
        return f"Nothing here can {verb.replace('_', ' ')}: {names}; add --model with a {VERBS[verb]}."


def open_index(path: str, heads: Heads) -> ImageIndex:
    """Open an index of pictures with the model that embeds here.

    Raises:
        SearchError: if there is no index, or it was made with another model.
        RecipeError: if no model embeds.
    """
    if heads.embedder is None:
        raise RecipeError(heads.why_absent("embed"))
    return ImageIndex.open(path, heads.embedder.searcher)
