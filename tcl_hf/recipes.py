"""Recipes: YAML files of arguments with command-line overrides, and the parts that they describe."""

import argparse
import dataclasses
import difflib
import glob
import json
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, IterableDataset
from transformers import HfArgumentParser

from .collators import TCLAugmentation, TCLPreTrainingCollator, why_unusable
from .configuration_tcl import TCLConfig, TCLTextConfig, TCLVisionConfig
from .data import DataError, load_pairs, train_tokenizer
from .encoders import TCLPreTrainedModel
from .image_processing_tcl import TCLImageProcessorPil
from .modeling_tcl import TCLForPreTraining
from .processing_tcl import TCLProcessor
from .starting_points import read_text_encoder, read_vision_encoder
from .streams import MixedPairs
from .tokenization_tcl import TCLTokenizer

logger = logging.getLogger(__name__)


_SIZES = ("vision_config", "text_config", "projection_dim")  # fields of a config that a checkpoint decides
_DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout")  # but not these, within them


class RecipeError(ValueError):
    """A recipe or command line that can not be used; the message says what, where, and the remedy."""


@dataclass
class DataArguments:
    """What to train on."""

    data: list[str] = field(
        default_factory=lambda: ["openmoji"],
        metadata={"help": "Sources of pairs: openmoji, JSON lists, tars, parquet, folders, or names on the Hub."},
    )
    data_weights: list[float] = field(
        default_factory=list,
        metadata={"help": "How often each source is drawn, in proportion; streams only. Each source once if empty."},
    )
    validation_data: list[str] = field(
        default_factory=list, metadata={"help": "Sources to evaluate on; those of --data if none are named."}
    )
    split: str = field(default="train", metadata={"help": "Split to train on."})
    validation_split: str = field(default="validation", metadata={"help": "Split to evaluate on; empty for none."})
    image_root: str | None = field(default=None, metadata={"help": "Folder of the images of JSON lists."})
    image_column: str | None = field(default=None, metadata={"help": "Column of the images, if unusual."})
    caption_column: str | None = field(default=None, metadata={"help": "Column of the captions, if unusual."})
    streaming: bool = field(default=False, metadata={"help": "Read the data while training."})
    max_tokens: int = field(default=25, metadata={"help": "Longest text, [CLS] included."})
    two_views: bool = field(default=True, metadata={"help": "A second view of the image for the teacher (ALBEF: no)."})
    crop_scale: list[float] = field(
        default_factory=lambda: [0.2, 1.0], metadata={"help": "Smallest and largest cropped share of an image."}
    )
    color_jitter: bool = field(default=True, metadata={"help": "Jitter, grey and blur (ALBEF: no)."})
    flip: bool = field(default=True, metadata={"help": "Mirror every other view."})
    num_operations: int = field(default=2, metadata={"help": "Further image operations drawn for a view."})
    eval_images: int = field(default=1000, metadata={"help": "Evaluate on at most so many images."})
    eval_k: int = field(default=32, metadata={"help": "Candidates re-ranked by matching."})


@dataclass
class ModelArguments:
    """What to train."""

    model: str | None = field(default=None, metadata={"help": "TCL checkpoint to go on from: folder or Hub name."})
    vision_model: str | None = field(default=None, metadata={"help": "ViT or DINOv2 of transformers to start from."})
    text_model: str | None = field(default=None, metadata={"help": "BERT of transformers to start from."})
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Tokenizer or vocab.txt; else the text model's, else one trained on the captions."},
    )
    vocab_size: int = field(default=30522, metadata={"help": "Largest vocabulary of a trained tokenizer."})
    image_size: int | None = field(
        default=None, metadata={"help": "Pixels of a side of the images; those of the model started from, or 256."}
    )
    fusion_layer: int | None = field(default=None, metadata={"help": "Layers of --text_model that encode the text."})
    num_fusion_layers: int = field(default=6, metadata={"help": "Layers that fuse, on top of these."})
    image_mean: list[float] | None = field(
        default=None, metadata={"help": "Mean of the images, by channel; the vision encoder's if not given."}
    )
    image_std: list[float] | None = field(
        default=None, metadata={"help": "Standard deviation of the images, by channel; likewise."}
    )
    config: str = field(
        default="{}", metadata={"help": "Fields of TCLConfig, vision_config and text_config among them, as JSON."}
    )
    config_fields: dict = field(init=False)

    def __post_init__(self):
        self.config_fields = _json_object(self.config)
        _check_fields(self.config_fields, TCLConfig, "config")
        _check_fields(self.config_fields.get("vision_config") or {}, TCLVisionConfig, "config.vision_config")
        _check_fields(self.config_fields.get("text_config") or {}, TCLTextConfig, "config.text_config")


def parse_recipe(types: Sequence[type], recipe: str | os.PathLike, argv: Sequence[str] | None = None) -> tuple:
    """Parse a recipe and the command line over it: `--recipe FILE --name value ...`.

    Args:
        types: dataclasses of arguments.
        recipe: the recipe used where the command line names none.
        argv: the command line; that of the process if None.

    `--config` changes the fields it names and leaves the recipe's others.

    Returns:
        One object of each type.

    Raises:
        RecipeError: for a file that is not there, a key or option that does not exist, or a value of a wrong type.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(types)
    parser.add_argument("--recipe", default=str(recipe), help="YAML file of arguments (default: %(default)s)")
    known = {f.name for t in types for f in dataclasses.fields(t)}
    chosen = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chosen.add_argument("--recipe", default=str(recipe))
    path = chosen.parse_known_args(argv)[0].recipe
    argv = [*_recipe_as_argv(Path(path), known), *argv]
    *parsed, _, unknown = parser.parse_args_into_dataclasses(
        [*argv, *_merged_configs(argv)], return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise RecipeError(f"There is no option {unknown[0]}{_did_you_mean(unknown[0].lstrip('-'), known)}.")
    return tuple(parsed)


def _check_fields(fields: dict, config_class: type, where: str) -> None:
    known = {field.name for field in dataclasses.fields(config_class)}
    for name in fields:
        if name not in known:
            raise RecipeError(f"{where} has no field '{name}'{_did_you_mean(name, known)}.")


class _Parser(HfArgumentParser):
    def error(self, message: str):
        raise RecipeError(f"{message[0].upper()}{message[1:]} (--help lists the options).")


def _recipe_as_argv(path: Path, known: set[str]) -> list[str]:
    """The entries of a recipe as options, so that both are checked alike."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError as error:
        raise RecipeError(f"There is no recipe {path}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path} is not a list of `name: value`.")
    argv = []
    for key, value in values.items():
        if key not in known:
            raise RecipeError(f"{path}: there is no argument '{key}'{_did_you_mean(str(key), known)}.")
        if value is None or value == []:
            continue
        if isinstance(value, dict):
            value = json.dumps(value)
        argv += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return argv


def _merged_configs(argv: list[str]) -> list[str]:
    """All configs of a command line as one, where it has several; a later one has the last word on a field."""
    option = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    option.add_argument("--config", action="append", default=[])
    configs = [_json_object(config) for config in option.parse_known_args(argv)[0].config]
    merged: dict = {}
    for config in configs:
        for name, value in config.items():
            both = isinstance(value, dict) and isinstance(merged.get(name), dict)
            merged[name] = merged[name] | value if both else value
    return ["--config", json.dumps(merged)] if len(configs) > 1 else []


def _json_object(text: str) -> dict:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise RecipeError(f"--config is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise RecipeError("--config is no object: give fields of TCLConfig by name.")
    return value


def _did_you_mean(key: str, known: set[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def load_data(args: DataArguments) -> tuple[Dataset | IterableDataset | MixedPairs, list[dict]]:
    """Load the pairs to train on, and the records to evaluate on.

    Without validation data of its own a run evaluates on the validation split of its data. Where there is none, it
    does not evaluate, and says so.
    """
    columns: dict[str, Any] = {
        "image_root": args.image_root,
        "image_column": args.image_column,
        "caption_column": args.caption_column,
    }
    pairs: Dataset | IterableDataset | MixedPairs
    if args.data_weights:
        if not args.streaming:
            raise DataError("data_weights mixes streams: set streaming to true, or leave the weights out.")
        streams = [load_pairs(source, args.split, streaming=True, **columns) for source in args.data]
        pairs = MixedPairs(streams, args.data_weights)
    else:
        pairs = load_pairs(args.data, args.split, streaming=args.streaming, **columns)
    if not args.validation_split:
        return pairs, []
    if not args.validation_data and any(os.path.isfile(source) or glob.has_magic(source) for source in args.data):
        logger.warning("Files have no validation split: nothing is evaluated unless you name --validation_data.")
        return pairs, []
    try:
        held_out = load_pairs(args.validation_data or args.data, args.validation_split, **columns)
    except DataError as error:
        if args.validation_data:
            raise
        logger.warning("Nothing is evaluated: %s", error)
        return pairs, []
    records = []
    for record in held_out.take(args.eval_images):
        reason = why_unusable(record)
        if reason is None:
            records.append(record)
        else:
            logger.warning("Not evaluated: %s (%s)", record.get("image_id"), reason)
    if not records:
        logger.warning("Nothing is evaluated: no sample of the split '%s' can be used.", args.validation_split)
    return pairs, records


def open_model(
    args: ModelArguments, model_class: type[TCLPreTrainedModel], to_train: bool = True
) -> tuple[Any, TCLProcessor]:
    """Open a TCL checkpoint as a head of `model_class`, with its processor; with a teacher if it is to be trained.

    The checkpoint keeps the sizes of its encoders; `config` has the last word on the other fields, `image_size` on the
    size of images.

    Raises:
        RecipeError: if there is no checkpoint, or the arguments contradict it.
    """
    if args.model is None:
        raise RecipeError("No checkpoint was named: say with --model what to start from.")
    if args.vision_model or args.text_model or args.tokenizer:
        raise RecipeError("--model brings its encoders and tokenizer: leave out the others.")
    try:
        processor = TCLProcessor.from_pretrained(args.model)
        fields = {name: value for name, value in args.config_fields.items() if name not in _SIZES}
        # A checkpoint for inference has no teacher, but whoever trains wants one; who evaluates does not.
        fields["use_momentum_teacher"] = to_train and fields.get("use_momentum_teacher", True)
        config = TCLConfig.from_pretrained(args.model, image_size=args.image_size, **fields)
        for part, known in (("vision_config", config.vision_config), ("text_config", config.text_config)):
            for name, value in args.config_fields.get(part, {}).items():
                if name in _DROPOUT:
                    setattr(known, name, value)
        config.text_config.bos_token_id = processor.tokenizer.cls_token_id
        config.text_config.eos_token_id = processor.tokenizer.sep_token_id
        processor.image_size = config.vision_config.image_size
        return model_class.from_pretrained(args.model, config=config), processor
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        raise RecipeError(f"{args.model} can not be opened: {error}") from error


def build_model(args: ModelArguments, captions: Iterable[str]) -> tuple[TCLForPreTraining, TCLProcessor]:
    """Make the model to pre-train and its processor.

    The model goes on from a TCL checkpoint (see `open_model`), starts from encoders of transformers, or is new;
    `config` has the last word on its fields, `image_size` on the size. The normalisation of images follows the vision
    encoder.

    Args:
        captions: texts to train a tokenizer on, where none is given; read only then.

    Raises:
        RecipeError: if the arguments contradict each other or the parts do not fit.
    """
    if args.model is not None:
        return open_model(args, TCLForPreTraining)
    try:
        vision = read_vision_encoder(args.vision_model, args.image_size) if args.vision_model else None
        text = None
        if args.text_model:
            text = read_text_encoder(args.text_model, args.fusion_layer, args.num_fusion_layers)
        tokenizer = _tokenizer(args, captions)
        fields = dict(args.config_fields)
        known = text.config["vocab_size"] if text else 0
        ids = {"vocab_size": max(len(tokenizer), known), "pad_token_id": tokenizer.pad_token_id}
        ids |= {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
        fields["text_config"] = fields.get("text_config", {}) | ids
        model = TCLForPreTraining.from_vision_text_pretrained(vision, text, image_size=args.image_size, **fields)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        raise RecipeError(str(error)) from error
    size = model.config.vision_config.image_size
    image_processor = TCLImageProcessorPil(size={"height": size, "width": size})
    if vision is not None:
        image_processor.image_mean, image_processor.image_std = vision.image_mean, vision.image_std
    image_processor.image_mean = args.image_mean or image_processor.image_mean
    image_processor.image_std = args.image_std or image_processor.image_std
    return model, TCLProcessor(image_processor, tokenizer)


def name_of(sources: Sequence[str]) -> str:
    """What data is called in results: the first source's name without folder, ending and split."""
    stem = Path(sources[0].rstrip("/")).name.split(".")[0].split("*")[0] if sources else "?"
    words = [word for word in stem.replace("-", "_").split("_") if word not in ("train", "val", "dev", "test")]
    return "_".join(word for word in words if word) or stem


def build_augmentation(data: DataArguments, processor: TCLProcessor) -> TCLAugmentation:
    """Make the augmentation that the arguments describe."""
    pixels = processor.image_processor
    return TCLAugmentation(
        pixels.size["height"],
        pixels.image_mean,
        pixels.image_std,
        crop_scale=tuple(data.crop_scale),
        color_jitter=data.color_jitter,
        flip=data.flip,
        num_operations=data.num_operations,
    )


def build_collator(data: DataArguments, config: TCLConfig, processor: TCLProcessor) -> TCLPreTrainingCollator:
    """Make the collator of a pre-training run."""
    return TCLPreTrainingCollator(
        processor,
        build_augmentation(data, processor),
        data.max_tokens,
        two_views=data.two_views,
        mlm_probability=config.mlm_probability if config.mlm_weight else 0.0,
    )


def _tokenizer(args: ModelArguments, captions: Iterable[str]) -> TCLTokenizer:
    """The tokenizer that was named, that of the text model, or a new one."""
    source = args.tokenizer or args.text_model
    if source is None:
        return train_tokenizer(captions, args.vocab_size)
    if os.path.isfile(source):
        return TCLTokenizer(source)
    return TCLTokenizer.from_pretrained(source)
