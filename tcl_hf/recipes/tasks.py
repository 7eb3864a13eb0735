"""The tasks: all that differs between them is a row of the table `TASKS`."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset

from ..data.annotations.classification import load_classification
from ..data.annotations.entailment import load_entailment
from ..data.annotations.phrases import load_phrases
from ..data.annotations.questions import load_questions
from ..data.annotations.reasoning import load_reasoning
from ..data.augmentation import TCLAugmentation
from ..data.collators import TCLPreTrainingCollator, TCLTaskCollator
from ..data.embedded.easy_vqa import load_easy_vqa
from ..data.embedded.scenes import load_scene_entailment, load_scene_phrases, load_scene_reasoning
from ..data.pairs import load_pairs
from ..evaluation.answers import evaluate_answers
from ..evaluation.classes import evaluate_classes
from ..evaluation.grounding import evaluate_grounding
from ..evaluation.metrics import vqa_results
from ..evaluation.retrieval import evaluate_retrieval, tune_rerank_weight
from ..evaluation.shares import Evaluation
from ..evaluation.zero_shot import evaluate_zero_shot
from ..models.configuration_tcl import TCLConfig
from ..models.encoders import TCLPreTrainedModel
from ..models.modeling_tcl import TCLForImageTextRetrieval, TCLForPreTraining, TCLModel
from ..models.modeling_tcl_tasks import (
    TCLForQuestionAnswering,
    TCLForTextAssignment,
    TCLForVisualEntailment,
    TCLForVisualReasoning,
)
from ..models.processing_tcl import MAX_QUESTION_TOKENS, MAX_TOKENS, TCLProcessor
from .arguments import DataArguments, TrainingDataArguments

# Arguments that not every task reads, by the part of a task that reads them.
_OF_PAIRS = ("image_root", "allow_outside_root", "image_column", "caption_column")
_OF_ANNOTATIONS = ("image_root", "allow_outside_root", "annotations")
_OF_EVALUATION = (
    *("validation_data", "eval_images", "eval_max_tokens", "per_device_eval_batch_size"),
    *("eval_steps", "metric_for_best_model"),
)
_OF_RETRIEVAL = ("eval_k", "half_precision_states", "rerank_weight")


def build_augmentation(args: TrainingDataArguments, processor: TCLProcessor) -> TCLAugmentation:
    """Make the augmentation that the arguments describe."""
    pixels = processor.image_processor
    size, mean, std = pixels.size["height"], pixels.image_mean, pixels.image_std
    crop_scale = tuple(args.crop_scale)
    return TCLAugmentation(size, mean, std, crop_scale, args.color_jitter, args.flip, args.num_operations)


@dataclass(frozen=True)
class PairBatches:
    """Training batches of images with a caption each.

    Args:
        mask_words: mask words, if the model predicts them.
        with_image_ids: number the images, so that other captions of an image are not negatives of it.
    """

    options = ("two_views",)
    mask_words: bool = False
    with_image_ids: bool = False

    def collator(
        self, args: TrainingDataArguments, config: TCLConfig, processor: TCLProcessor
    ) -> TCLPreTrainingCollator:
        """Make the collator, of the arguments, the model's config and the processor."""
        return TCLPreTrainingCollator(
            processor,
            build_augmentation(args, processor),
            args.max_tokens,
            two_views=args.two_views,
            mlm_probability=config.mlm_probability if self.mask_words and config.mlm_weight else 0.0,
            with_image_ids=self.with_image_ids,
        )


@dataclass(frozen=True)
class TextBatches:
    """Training batches of texts about images, with answers or labels.

    Args:
        with_labels: read labels, by their numbers in the model's config.
    """

    options = ("share_images",)
    with_labels: bool = False

    def collator(self, args: TrainingDataArguments, config: TCLConfig, processor: TCLProcessor) -> TCLTaskCollator:
        """Make the collator, of the arguments, the model's config and the processor."""
        label2id = dict(config.label2id) if self.with_labels else None
        return TCLTaskCollator(processor, build_augmentation(args, processor), args.max_tokens, label2id=label2id)

    def evaluation_collator(self, config: TCLConfig, processor: TCLProcessor) -> TCLTaskCollator:
        """Make the collator of an evaluation, which needs no answers."""
        label2id = dict(config.label2id) if self.with_labels else None
        return TCLTaskCollator(processor, label2id=label2id, with_answers=False)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One row of the table.

    Args:
        model_class: the head.
        load: reads the samples of a split, by default images with captions: `load(sources, split, **options)`.
        load_options: the arguments that it takes as options.
        batches: the batches for training, which make their collator; None if the task is evaluated only.
        result_type: the Hub's name for the task of a result.
        evaluate: returns the `Evaluation` of a model, given model, processor, records, arguments and the answers or
            classes to choose from; None if there is nothing to measure.
        evaluation_options: the arguments that only some evaluations read.
        embedded: functions that load a split of data that comes with the package, by the name of the data.
        result_files: files beside `evaluation.json` that a server takes, and what makes their content of predictions.
        evaluates_states: whether it can be evaluated on kept states, without the pixels of images.
        is_downstream: whether the task is fine-tuned from a checkpoint, and evaluated by `evaluate.py`; pre-training is
            measured as retrieval.
    """

    model_class: type[TCLPreTrainedModel]
    load: Callable[..., Any] = load_pairs
    load_options: tuple[str, ...] = _OF_PAIRS
    batches: PairBatches | TextBatches | None
    result_type: str
    evaluate: Callable[[Any, TCLProcessor, Sequence[dict], Any, list[str]], Evaluation] | None = None
    evaluation_options: tuple[str, ...] = ()
    embedded: dict[str, Callable[[str], Dataset]] = field(default_factory=dict)
    result_files: dict[str, Callable[[list[dict]], Any]] = field(default_factory=dict)
    evaluates_states: bool = False
    is_downstream: bool = True

    @property
    def options(self) -> set[str]:
        """The arguments that this task reads, of those that not every task reads."""
        for_validation = (f"validation_{name}" for name in self.load_options)
        of_evaluation = (*_OF_EVALUATION, *self.evaluation_options) if self.evaluate else ()
        of_training = self.batches.options if self.batches else ()
        return {*self.load_options, *for_validation, *of_training, *of_evaluation}


# Evaluations


def _limits(args: DataArguments, max_tokens: int = MAX_TOKENS) -> dict[str, Any]:
    """The options that all evaluations take: size of batches, longest text (`max_tokens` by default), progress bar."""
    max_tokens = args.eval_max_tokens or max_tokens
    return {"batch_size": args.per_device_eval_batch_size, "max_tokens": max_tokens, "progress": True}


def _retrieval_options(args: DataArguments) -> dict[str, Any]:
    """The options of retrieval: candidates, captions of an image, precision of states, and the limits."""
    states_dtype = torch.float16 if args.half_precision_states else None
    return _limits(args) | {"k": args.eval_k, "captions_per_image": args.eval_captions, "states_dtype": states_dtype}


def _evaluate_retrieval(model, processor, records, args, answers) -> Evaluation:
    options = _retrieval_options(args) | {"rerank_weight": args.rerank_weight}
    return Evaluation(evaluate_retrieval(model, processor, records, **options))


def choose_rerank_weight_on(
    model: TCLForImageTextRetrieval, processor: TCLProcessor, records: Sequence[dict], args: DataArguments
) -> float:
    """The weight of the combined score that is best on records which results are not reported on.

    Args:
        model, processor: those to evaluate.
        records: the records.
        args: the number of candidates, the batch size, and the other arguments of the evaluation.
    """
    return tune_rerank_weight(model, processor, records, **_retrieval_options(args))


def _evaluate_answers(model, processor, records, args, answers) -> Evaluation:
    return evaluate_answers(model, processor, records, answers, args.eval_k, **_limits(args, MAX_QUESTION_TOKENS))


def _evaluate_statements(model, processor, records, args, answers) -> Evaluation:
    return evaluate_classes(model, processor, records, **_limits(args))


def _evaluate_grounding(model, processor, records, args, answers) -> Evaluation:
    return evaluate_grounding(model, processor, records, args.heat_layer, heat=args.heat, **_limits(args))


def _evaluate_classification(model, processor, records, args, answers) -> Evaluation:
    return evaluate_zero_shot(model, processor, records, answers, args.templates, **_limits(args))


def _answers_for_server(predictions: list[dict]) -> list[dict[str, Any]]:
    return vqa_results({prediction["question_id"]: prediction["answer"] for prediction in predictions})


# The table

TASKS = {
    "pretraining": Task(
        model_class=TCLForPreTraining,
        batches=PairBatches(mask_words=True),
        result_type="image-text-retrieval",
        evaluate=_evaluate_retrieval,
        evaluation_options=(*_OF_RETRIEVAL, "eval_captions"),
        is_downstream=False,
        evaluates_states=True,
    ),
    "retrieval": Task(
        model_class=TCLForImageTextRetrieval,
        batches=PairBatches(with_image_ids=True),
        result_type="image-text-retrieval",
        evaluate=_evaluate_retrieval,
        evaluation_options=(*_OF_RETRIEVAL, "eval_captions"),
        evaluates_states=True,
    ),
    "question_answering": Task(
        model_class=TCLForQuestionAnswering,
        load=load_questions,
        load_options=_OF_ANNOTATIONS,
        batches=TextBatches(),
        result_type="visual-question-answering",
        evaluate=_evaluate_answers,
        evaluation_options=("eval_k", "answer_list"),
        embedded={"easy_vqa": load_easy_vqa},
        result_files={"vqa_results.json": _answers_for_server},
        evaluates_states=True,
    ),
    "visual_entailment": Task(
        model_class=TCLForVisualEntailment,
        load=load_entailment,
        load_options=("image_root", "allow_outside_root"),
        batches=TextBatches(with_labels=True),
        result_type="visual-entailment",
        evaluate=_evaluate_statements,
        embedded={"scenes": load_scene_entailment},
        evaluates_states=True,
    ),
    "visual_reasoning": Task(
        model_class=TCLForVisualReasoning,
        load=load_reasoning,
        load_options=("image_root", "allow_outside_root"),
        batches=TextBatches(with_labels=True),
        result_type="visual-reasoning",
        evaluate=_evaluate_statements,
        embedded={"scenes": load_scene_reasoning},
    ),
    "text_assignment": Task(model_class=TCLForTextAssignment, batches=PairBatches(), result_type="text-assignment"),
    "classification": Task(
        model_class=TCLModel,
        load=load_classification,
        load_options=("image_column", "label_column", "class_names"),
        batches=None,
        result_type="zero-shot-image-classification",
        evaluate=_evaluate_classification,
        evaluation_options=("templates",),
    ),
    "grounding": Task(
        model_class=TCLForImageTextRetrieval,
        load=load_phrases,
        load_options=_OF_ANNOTATIONS,
        batches=PairBatches(with_image_ids=True),
        result_type="visual-grounding",
        evaluate=_evaluate_grounding,
        evaluation_options=("heat", "heat_layer"),
        embedded={"scenes": load_scene_phrases},
    ),
}


def readers_of(option: str) -> list[str]:
    """The tasks that read an argument; none if it does not depend on the task."""
    return [name for name, task in TASKS.items() if option in task.options]


def ignored_options(task: str, given: Iterable[str]) -> list[str]:
    """Those of the given arguments that this task ignores."""
    return sorted(option for option in given if readers_of(option) and task not in readers_of(option))
