"""Recipes: YAML files of arguments, with the command line over them."""

import argparse
import dataclasses
import difflib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers import HfArgumentParser

from ..models.configuration_tcl import TCLConfig, TCLTextConfig, TCLVisionConfig
from ..models.processing_tcl import MAX_TOKENS

RECIPES = Path(__file__).parent


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
    max_tokens: int = field(
        default=MAX_TOKENS, metadata={"help": "Longest text, [CLS] included; the paper pre-trains with 25."}
    )
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
    argv = [*_recipe_as_argv(recipe_file(path), known), *argv]
    *parsed, _, unknown = parser.parse_args_into_dataclasses(
        [*argv, *_merged_configs(argv)], return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise RecipeError(f"There is no option {unknown[0]}{did_you_mean(unknown[0].lstrip('-'), known)}.")
    return tuple(parsed)


def _check_fields(fields: dict, config_class: type, where: str) -> None:
    known = {field.name for field in dataclasses.fields(config_class)}
    for name in fields:
        if name not in known:
            raise RecipeError(f"{where} has no field '{name}'{did_you_mean(name, known)}.")


def recipe_file(name: str) -> Path:
    """The file of a recipe: one of the package's by its name, such as `openmoji`, or any by its path."""
    ours = RECIPES / f"{name}.yaml"
    return ours if ours.exists() else Path(name)


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
            raise RecipeError(f"{path}: there is no argument '{key}'{did_you_mean(str(key), known)}.")
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


def did_you_mean(key: str, known: set[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""
