"""The downstream tasks: what differs between them is a row of a table, `TASKS`.

A task has a head, a loader of its data, batches, an evaluator, and the metric by which its best model is known.
"""

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset
from tokenizers import AddedToken
from transformers import PreTrainedModel

from ..data.annotations.entailment import load_entailment
from ..data.annotations.phrases import load_phrases
from ..data.annotations.questions import load_questions, read_answer_list
from ..data.annotations.reasoning import load_reasoning
from ..data.collators import TCLPreTrainingCollator, TCLTaskCollator
from ..data.embedded.easy_vqa import load_easy_vqa
from ..data.embedded.scenes import load_scene_entailment, load_scene_phrases, load_scene_reasoning
from ..data.images import why_unusable
from ..data.pairs import DataError, load_pairs
from ..evaluation.answers import evaluate_answers
from ..evaluation.classes import evaluate_classes
from ..evaluation.grounding import evaluate_grounding
from ..evaluation.metrics import vqa_results
from ..evaluation.retrieval import evaluate_retrieval
from ..evaluation.shares import Evaluation
from ..inference.grounding import HEAT_KINDS
from ..models.configuration_tcl import TCLConfig
from ..models.encoders import TCLPreTrainedModel
from ..models.modeling_tcl import TCLForImageTextRetrieval
from ..models.modeling_tcl_tasks import (
    TCLForQuestionAnswering,
    TCLForTextAssignment,
    TCLForVisualEntailment,
    TCLForVisualReasoning,
)
from ..models.processing_tcl import TCLProcessor
from ..models.tokenization_tcl import clean_caption, clean_question
from .arguments import DataArguments, RecipeError
from .build import build_augmentation, name_of

ANSWERS = "answers.json"


@dataclass
class TaskArguments(DataArguments):
    """Which task, and on what data."""

    task: str = field(default="retrieval", metadata={"help": "The task."})
    annotations: list[str] = field(
        default_factory=list,
        metadata={"help": "Further files: the answers to VQA v2 questions, or the RefCOCO folder of ALBEF's lists."},
    )
    validation_annotations: list[str] = field(default_factory=list, metadata={"help": "The same, to evaluate on."})
    answer_list: str | None = field(
        default=None, metadata={"help": "JSON list of answers to choose from; those of the training data if not given."}
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "What the data is called in results; the name of its first source if not given."},
    )
    add_words: bool = field(
        default=False, metadata={"help": "Add words of the data that the tokenizer would cut to pieces."}
    )
    share_images: bool = field(
        default=False,
        metadata={"help": "Train on all texts about an image together, and count images in a batch: it is read once."},
    )
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Samples in a forward of the evaluation."})
    heat: str = field(default="matching", metadata={"help": "Score whose map shows where: 'matching' or 'similarity'."})
    heat_layer: int | None = field(
        default=None,
        metadata={"help": "Layer whose attention it is: of fusion for matching, of vision for similarity."},
    )
    half_precision_states: bool = field(
        default=False, metadata={"help": "Keep encoded states in float16 on the CPU while re-ranking: less memory."}
    )
    eval_captions: int | None = field(default=None, metadata={"help": "Captions per image to retrieve; all if None."})

    def __post_init__(self):
        if self.task not in TASKS:
            raise RecipeError(f"There is no task '{self.task}': choose one of {', '.join(TASKS)}.")
        if self.share_images and TASKS[self.task].makes_pairs:
            raise RecipeError(f"share_images: '{self.task}' draws one caption of an image; leave it out.")
        if self.heat not in HEAT_KINDS:
            raise RecipeError(f"heat: there is no map of '{self.heat}': choose one of {', '.join(HEAT_KINDS)}.")
        if self.dataset_name is None:
            self.dataset_name = name_of(self.data)


Evaluator = Callable[[Any, TCLProcessor, Sequence[dict], TaskArguments, list[str]], Evaluation]


@dataclass(frozen=True)
class Task:
    """One row of the table.

    Args:
        model_class: the head.
        load: reads a source's split.
        embedded: data that comes with the package, by name.
        evaluate: given model, processor, records, arguments and candidate answers; None if there is nothing to measure.
        metric: what tells the best model.
        makes_pairs: trained on images with captions by contrast; other heads read labels or answers.
        load_options: which arguments of files the loader takes.
    """

    model_class: type[TCLPreTrainedModel]
    load: Callable[..., Dataset]
    embedded: dict[str, Callable[[str], Dataset]]
    evaluate: Evaluator | None
    metric: str
    makes_pairs: bool = False
    load_options: tuple[str, ...] = ("image_root",)


def _retrieval(
    model: TCLForImageTextRetrieval,
    processor: TCLProcessor,
    records: Sequence[dict],
    args: TaskArguments,
    answers: list[str],
) -> Evaluation:
    metrics = evaluate_retrieval(
        model,
        processor,
        records,
        args.eval_k,
        args.eval_captions,
        args.per_device_eval_batch_size,
        torch.float16 if args.half_precision_states else None,
        progress=True,
    )
    return Evaluation(metrics)


def _answers(
    model: TCLForQuestionAnswering,
    processor: TCLProcessor,
    records: Sequence[dict],
    args: TaskArguments,
    answers: list[str],
) -> Evaluation:
    return evaluate_answers(
        model, processor, records, answers, args.eval_k, args.per_device_eval_batch_size, progress=True
    )


def _classes(
    model: PreTrainedModel,
    processor: TCLProcessor,
    records: Sequence[dict],
    args: TaskArguments,
    answers: list[str],
) -> Evaluation:
    return evaluate_classes(model, processor, records, args.per_device_eval_batch_size, args.max_tokens, progress=True)


def _grounding(
    model: TCLForImageTextRetrieval,
    processor: TCLProcessor,
    records: Sequence[dict],
    args: TaskArguments,
    answers: list[str],
) -> Evaluation:
    return evaluate_grounding(
        model,
        processor,
        records,
        args.heat_layer,
        args.per_device_eval_batch_size,
        args.max_tokens,
        progress=True,
        heat=args.heat,
    )


TASKS = {
    "retrieval": Task(
        TCLForImageTextRetrieval,
        load_pairs,
        {},
        _retrieval,
        "reranked_recall_mean",
        makes_pairs=True,
        load_options=("image_root", "image_column", "caption_column"),
    ),
    "question_answering": Task(
        TCLForQuestionAnswering,
        load_questions,
        {"easy_vqa": load_easy_vqa},
        _answers,
        "accuracy",
        load_options=("image_root", "annotations"),
    ),
    "visual_entailment": Task(
        TCLForVisualEntailment, load_entailment, {"scenes": load_scene_entailment}, _classes, "accuracy"
    ),
    "visual_reasoning": Task(
        TCLForVisualReasoning, load_reasoning, {"scenes": load_scene_reasoning}, _classes, "accuracy"
    ),
    "text_assignment": Task(
        TCLForTextAssignment,
        load_pairs,
        {},
        None,
        "",
        makes_pairs=True,
        load_options=("image_root", "image_column", "caption_column"),
    ),
    "grounding": Task(
        TCLForImageTextRetrieval,
        load_phrases,
        {"scenes": load_scene_phrases},
        _grounding,
        "pointing_accuracy",
        makes_pairs=True,
        load_options=("image_root", "annotations"),
    ),
}


def load_task(args: TaskArguments, validation: bool = False) -> Dataset:
    """Load what a task trains on, or the records it is evaluated on: at most `eval_images`, those that can be used.

    Raises:
        DataError: if there is nothing, or nothing that can be used.
    """
    task = TASKS[args.task]
    sources = args.validation_data or args.data if validation else args.data
    split = args.validation_split if validation else args.split
    options = {
        "image_root": args.image_root,
        "image_column": args.image_column,
        "caption_column": args.caption_column,
        "annotations": (args.validation_annotations or args.annotations if validation else args.annotations) or None,
    }
    options = {name: options[name] for name in task.load_options}
    if len(sources) == 1 and sources[0] in task.embedded:
        try:
            records = task.embedded[sources[0]](split)
        except ValueError as error:
            raise DataError(str(error)) from error
    else:
        records = task.load(sources, split, **options)
    if not validation:
        return records
    records = records.select(range(min(args.eval_images, len(records)))) if args.eval_images else records
    reasons = [why_unusable(record) for record in records]
    if any(reasons):
        bad = [number for number, reason in enumerate(reasons) if reason]
        datasets.logging.get_logger(__name__).warning(
            "Not evaluated: %d records, the first of them %s (%s)",
            len(bad),
            records[bad[0]].get("image_id"),
            reasons[bad[0]],
        )
        records = records.select([number for number, reason in enumerate(reasons) if not reason])
    if not len(records):
        raise DataError(f"No record of the split '{split}' of {', '.join(sources)} can be evaluated.")
    return records


def build_task_collator(args: TaskArguments, config: TCLConfig, processor: TCLProcessor):
    """Make the collator of a fine-tuning run."""
    augmentation = build_augmentation(args, processor)
    if TASKS[args.task].makes_pairs:
        return TCLPreTrainingCollator(
            processor,
            augmentation,
            args.max_tokens,
            two_views=args.two_views,
            mlm_probability=0.0,
            with_image_ids=TASKS[args.task].evaluate is not None,
        )
    has_classes = TASKS[args.task].evaluate is _classes
    return TCLTaskCollator(
        processor, augmentation, args.max_tokens, label2id=dict(config.label2id) if has_classes else None
    )


def candidate_answers(args: TaskArguments, records: Dataset | None, folder: str | None = None) -> list[str]:
    """The answers to choose from: the list that was named, that of the model's folder, or those of training data.

    Those of training data come most frequent first. Other tasks than question answering have none.
    """
    if TASKS[args.task].evaluate is not _answers:
        return []
    if args.answer_list is not None:
        return read_answer_list(args.answer_list)
    if folder is not None and (Path(folder) / ANSWERS).exists():
        return read_answer_list(str(Path(folder) / ANSWERS))
    if records is None:
        raise RecipeError("There are no answers to choose from: name a JSON list of them with --answer_list.")
    counts = Counter(answer for answers in records.select_columns(["answers"])["answers"] for answer in answers)
    return [answer for answer, _ in counts.most_common()]


def add_words(model: PreTrainedModel, processor: TCLProcessor, records: Dataset) -> list[str]:
    """Add the words of a task's texts and answers that the tokenizer cuts to pieces or does not know; return them.

    For small vocabularies: what was trained on names of things lacks the words of questions.
    """
    columns = [name for name in ("question", "captions", "answers") if name in records.column_names]
    words: set[str] = set()
    for record in records.select_columns(columns):
        for column in columns:
            texts = [record[column]] if isinstance(record[column], str) else record[column]
            for text in texts:
                words.update((clean_question(text) if column == "question" else clean_caption(text)).split())
    pieces = {word: processor.tokenizer.tokenize(word) for word in words}
    new = sorted(word for word, own in pieces.items() if len(own) != 1 or own[0] == processor.tokenizer.unk_token)
    processor.tokenizer.add_tokens([AddedToken(word, single_word=True) for word in new])
    model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    return new


def shuffle_images(records: Sequence[dict], seed: int = 0) -> list[dict]:
    """The records, each with the image of another one: what a model reaches that only reads."""
    order = list(range(len(records)))
    random.Random(seed).shuffle(order)
    neighbour = dict(zip(order, [*order[1:], *order[:1]], strict=True))
    column = "images" if "images" in records[0] else "image"
    return [record | {column: records[neighbour[row]][column]} for row, record in enumerate(records)]


def protocol(config: TCLConfig, task: str, dataset_name: str) -> str:
    """What an evaluation is called, by what the model has learned from.

    `finetuned` on the data set itself, `pretrained_on_<data>` if it was seen in pre-training only,
    `zero_shot_from_<data>` if the model was fine-tuned for the task on another set, else `zero_shot`. (The paper's
    "zero-shot" Flickr30k numbers are those of a COCO-tuned model: `zero_shot_from_coco`.)
    """
    history = config.trained_on or []
    tuned = [name for step in history if step["task"] == task for name in step["data"]]
    if dataset_name in tuned:
        return "finetuned"
    if any(dataset_name in step["data"] for step in history):
        return f"pretrained_on_{dataset_name}"
    return f"zero_shot_from_{tuned[-1]}" if tuned else "zero_shot"


def statement(args: DataArguments, config: TCLConfig, dataset: str, task: str, num_records: int) -> dict[str, Any]:
    """What every result must be read with: protocol, data, split, candidates and resolution."""
    said: dict[str, Any] = {
        "task": task,
        "dataset": dataset,
        "split": args.validation_split,
        "records": num_records,
        "protocol": protocol(config, task, dataset),
        "resolution": config.vision_config.image_size,
    }
    if task in ("retrieval", "question_answering"):
        said["k"] = args.eval_k
    if task == "grounding" and isinstance(args, TaskArguments):
        said["heat"] = args.heat
    return said


def write_results(folder: Path, evaluation: Evaluation, said: dict[str, Any]) -> None:
    """Write `evaluation.json`, `predictions.json`, and for answers the results file that the VQA server takes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(said | {"metrics": evaluation.metrics}, indent=2) + "\n")
    if evaluation.predictions:
        (folder / "predictions.json").write_text(json.dumps(evaluation.predictions) + "\n")
    if said["task"] == "question_answering":
        answers = {prediction["question_id"]: prediction["answer"] for prediction in evaluation.predictions}
        (folder / "vqa_results.json").write_text(json.dumps(vqa_results(answers)) + "\n")
