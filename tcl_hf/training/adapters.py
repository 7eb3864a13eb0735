"""LoRA through PEFT: a run trains adapters of most weights, and few parts in full.

The adapters are put into the model in place, so that it keeps its class and its methods. The momentum teacher gets none
and follows the weights that the student's amount to (`models.momentum.weights_of`). A run saves a whole model, with the
adapters added to its weights, or a folder of adapters that PEFT opens too:

    adapter_config.json, adapter_model.safetensors   in PEFT's format, with the parts that were trained in full
    model_config.json                                the config of the model that base and adapters make
"""

import copy
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import cached_file, find_adapter_config_file

from ..models import modeling_tcl, modeling_tcl_tasks
from ..models.checksums import verify_checksums, write_checksums
from ..models.configuration_tcl import TCLConfig
from ..models.momentum import weights_of
from .arguments import TCLTrainingArguments, TrainingError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MODEL_CONFIG = "model_config.json"  # not config.json, by which transformers would take the folder for a whole model

# All linear layers of the encoders' layers. In published comparisons, adapters of attention alone learn less with the
# same number of weights.
DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
# The parts that get adapters. All others, heads and projections, are small and trained in full.
_ENCODERS = ("tcl.vision_model.", "tcl.text_model.", "text_decoder.text_model.")
# The decoder of answers starts from layers that read images, but its own read questions: this part learns another task.
_RETRAINED = re.compile(r"text_decoder\.text_model\..*cross_attn")
_PREFIX = "base_model.model."  # before every name in a file of PEFT


class AdapterError(ValueError):
    """A folder of adapters that cannot be opened; the message gives the reason and the remedy."""


# Training


def add_lora(model: PreTrainedModel, args: TCLTrainingArguments) -> None:
    """Freeze a model in place but for new adapters, and for the parts that are trained in full.

    Only layers that would be trained without LoRA get adapters. Trained in full are all parts outside of the encoders,
    weights that the model's starting point lacked, and `modules_to_save`.

    Raises:
        TrainingError: if PEFT is missing, the fields do not fit the model, or its adapters cannot be saved as asked.
    """
    peft: Any = _peft(TrainingError)
    if hasattr(model, "peft_config"):
        raise TrainingError("The model has adapters already: merge them, or open its checkpoint again.")
    if args.lora_save == "adapter":
        _check_base(model)
    fields = dict(args.lora_fields or {})
    in_full = _trained_in_full(model, _as_list(fields.pop("modules_to_save", None)))
    wanted, excluded = fields.pop("target_modules", None), fields.pop("exclude_modules", None)
    targets = _targets(model, wanted, excluded, in_full)
    try:
        pattern = _pattern(targets, [name for name, _ in model.named_modules()])
        config = peft.LoraConfig(**fields, target_modules=pattern)
        peft.inject_adapter_in_model(config, model)
    except (TypeError, ValueError) as error:
        raise TrainingError(f"PEFT refuses the fields of lora: {error}") from error
    for name, parameter in model.named_parameters():
        if name in in_full:
            parameter.requires_grad_(True)


def _peft(error_class: type[Exception]) -> Any:
    """The package PEFT; an error of this class if it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise error_class("LoRA needs PEFT: pip install 'tcl_hf[interoperability]'.") from error
    return peft


def _check_base(model: PreTrainedModel) -> None:
    """Refuse a model whose adapters would have no whole model to be added to."""
    if not model.name_or_path:
        raise TrainingError(
            "lora_save: adapters alone need a checkpoint to be added to, and this model does not come from one: start "
            "from --model, or choose lora_save: merged."
        )
    if is_adapter(model.name_or_path):
        raise TrainingError(
            f"lora_save: adapters alone need a whole model to be added to, and {model.name_or_path} holds adapters: "
            "choose lora_save: merged."
        )


def check_output_dir(folder: Path, args: TCLTrainingArguments) -> None:
    """Refuse a folder that would hold a whole model and adapters, which libraries would take for one model.

    Raises:
        TrainingError: if the run saves the one and the folder holds the other.
    """
    saves_adapter = args.lora is not None and args.lora_save == "adapter"
    if saves_adapter and (folder / "config.json").exists():
        raise TrainingError(f"{folder} holds a whole model, and this run saves adapters: choose another output_dir.")
    if not saves_adapter and (folder / ADAPTER_CONFIG).exists():
        raise TrainingError(f"{folder} holds adapters, and this run saves a whole model: choose another output_dir.")


def _trained_in_full(model: PreTrainedModel, modules_to_save: list[str]) -> set[str]:
    """The names of the parameters that are trained in full."""
    new: frozenset[str] = getattr(model, "new_weights", frozenset())
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    in_full = {n for n in trained if not n.startswith(_ENCODERS) or n in new or _RETRAINED.match(n)}
    for module in modules_to_save:
        inside = {name for name in trained if f".{module}." in f".{name}"}
        if not inside:
            parts = sorted({name.rpartition(".")[0].rpartition(".")[2] for name in trained} - {""})
            raise TrainingError(
                f"lora.modules_to_save: {type(model).__name__} trains no module '{module}'. It has {', '.join(parts)}."
            )
        in_full |= inside
    return in_full


def _targets(
    model: PreTrainedModel, wanted: str | list[str] | None, excluded: str | list[str] | None, in_full: set[str]
) -> set[str]:
    """The names of the linear layers that get adapters.

    Args:
        wanted: ends of names, or a pattern of whole names, as PEFT reads them; `DEFAULT_TARGETS` if None.
        excluded: layers that get none, in the same form.
        in_full: names of parameters that are trained in full, whose layers get none.
    """
    free = {
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
        and layer.weight.requires_grad
        and not in_full & {f"{name}.{part}" for part, _ in layer.named_parameters()}
    }
    if wanted in (None, "all-linear"):
        wanted = list(DEFAULT_TARGETS)
    free -= _named(free, excluded or [])
    for one in [wanted] if isinstance(wanted, str) else [[end] for end in wanted or []]:
        if not _named(free, one):
            there = ", ".join(sorted({name.rpartition(".")[2] for name in free})) or "none"
            raise TrainingError(
                f"lora.target_modules: {one} matches no layer of {type(model).__name__} that can have an adapter. "
                f"Those that can are {there}; frozen layers and those that are trained in full have none."
            )
    return _named(free, wanted or [])


def _named(names: Iterable[str], wanted: str | list[str]) -> set[str]:
    """Those of the names that end with one of a list, or match a pattern as a whole."""
    if isinstance(wanted, str):
        return {name for name in names if re.fullmatch(wanted, name)}
    return {name for name in names if any(f".{name}".endswith(f".{end}") for end in wanted)}


def _pattern(chosen: set[str], names: Iterable[str]) -> str:
    """A pattern that matches exactly the chosen ones of the names; it is short if they are alike in all layers."""
    parts = {tuple(r"\d+" if part.isdigit() else re.escape(part) for part in name.split(".")) for name in chosen}
    pattern = "|".join(sorted(r"\.".join(part) for part in parts))
    return pattern if _named(names, pattern) == chosen else "|".join(map(re.escape, sorted(chosen)))


def _as_list(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def describe_lora(model: PreTrainedModel) -> str:
    """A sentence about the adapters of a model and the number of its trained weights; empty if it has no adapters."""
    if not hasattr(model, "peft_config"):
        return ""
    lora = model.peft_config["default"]
    layers = sorted({name.rpartition(".")[2] for name, part in model.named_modules() if hasattr(part, "lora_A")})
    students = {name: p for name, p in model.named_parameters() if not name.startswith("teacher.")}
    trained = sum(p.numel() for p in students.values() if p.requires_grad)
    total = sum(p.numel() for name, p in students.items() if ".lora_" not in name)
    return (
        f"It was trained with LoRA adapters of rank {lora.r} and lora_alpha {lora.lora_alpha} on {', '.join(layers)}; "
        f"with the parts that were trained in full, {trained:,} weights were trained for a model of {total:,}."
    )


# Saving


def save_adapted(model: PreTrainedModel, folder: Path, how: str) -> None:
    """Save a model with adapters as a whole model ("merged") or its adapters alone ("adapter")."""
    if how == "merged":
        model.save_pretrained(folder, state_dict=merged_state_dict(model))
    else:
        _save_adapters(model, folder)


@torch.no_grad()
def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model as if it had no adapters, with what they add in its weights; the model stays as it is."""
    merged = weights_of(model)
    state = {}
    for name, value in model.state_dict().items():
        plain = name.replace(".base_layer.", ".")
        if ".lora_" not in name:
            state[plain] = value if plain == name else merged[plain].detach()
    return state


@torch.no_grad()
def _save_adapters(model: PreTrainedModel, folder: Path) -> None:
    """Save the adapters and the parameters that were trained in full, in PEFT's format, with the model's config.

    PEFT replaces whole modules (`modules_to_save`). It loads other tensors, such as the temperature, by their names.
    """
    peft: Any = _peft(AdapterError)
    new: frozenset[str] = getattr(model, "new_weights", frozenset())
    in_full = {
        name: parameter
        for name, parameter in model.named_parameters()
        if ".lora_" not in name and (parameter.requires_grad or name in new)
    }
    replaced = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.LayerNorm)
        and {f"{name}.{part}" for part, _ in module.named_parameters()} <= in_full.keys()
    ]
    # PEFT also replaces the teacher's modules of these names, if it is given a model that has a teacher.
    taught = {name: p for name, p in model.named_parameters() if name.startswith("teacher.")}
    of_teacher = {name: p for name, p in taught.items() if name.removeprefix("teacher.").rpartition(".")[0] in replaced}
    state = peft.get_peft_model_state_dict(model, save_embedding_layers=False) | in_full | of_teacher
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{_PREFIX}{name}": value.detach().cpu().contiguous() for name, value in state.items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    write_checksums(folder)
    config = copy.deepcopy(model.peft_config["default"])  # type: ignore[attr-defined]
    config.modules_to_save, config.inference_mode = replaced or None, True
    config.base_model_name_or_path = model.name_or_path
    config.auto_mapping = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    config.save_pretrained(folder)
    model.config.architectures = [type(model).__name__]
    model.config.to_json_file(folder / MODEL_CONFIG)


# Opening


def is_adapter(name_or_path: str) -> bool:
    """Whether a folder or a repository holds adapters and not a whole model."""
    return find_adapter_config_file(str(name_or_path)) is not None


def config_of(name_or_path: str, **fields: Any) -> TCLConfig:
    """The config of a model, given as a whole or as adapters; `fields` replace its own.

    Raises:
        OSError: if there is no such checkpoint.
    """
    source = name_or_path
    if is_adapter(source):
        own = cached_file(source, MODEL_CONFIG, _raise_exceptions_for_missing_entries=False)
        source = own or _base_of(source)  # PEFT alone writes no config of the model
    return TCLConfig.from_pretrained(source, **fields)


def open_checkpoint(name_or_path: str, model_class: Any, config: TCLConfig) -> Any:
    """Open a whole model, or adapters with the model that they belong to, as a whole model of `model_class`.

    Adapters are added to the weights, and a teacher starts as a copy of the student.

    Raises:
        AdapterError: if PEFT is missing, or the model that the adapters belong to cannot be opened.
        OSError, ValueError, RuntimeError: as `from_pretrained`.
    """
    if not is_adapter(name_or_path):
        return model_class.from_pretrained(name_or_path, config=config)
    peft: Any = _peft(AdapterError)
    if Path(name_or_path).is_dir():
        verify_checksums(name_or_path)
    own = config_of(name_or_path, use_momentum_teacher=False)
    own_class = _class_named((own.architectures or [""])[0]) or model_class
    with_base = peft.PeftModel.from_pretrained(_open_base(name_or_path, own_class, own), name_or_path)
    state = with_base.merge_and_unload().state_dict()
    model = model_class.from_pretrained(None, config=config, state_dict=state)
    model.name_or_path = model.config.name_or_path = name_or_path
    return model


def _open_base(name_or_path: str, model_class: Any, config: TCLConfig) -> Any:
    """The model that adapters belong to, with as many words as theirs."""
    base, words = _base_of(name_or_path), config.text_config.vocab_size
    try:
        config = copy.deepcopy(config)
        config.text_config.vocab_size = config_of(base).text_config.vocab_size
        model = open_checkpoint(base, model_class, config)
    except (OSError, ValueError) as error:
        raise AdapterError(f"it holds adapters of {base}, and {error}") from error
    if words != config.text_config.vocab_size:
        model.resize_token_embeddings(words, mean_resizing=False)
    return model


def _base_of(name_or_path: str) -> str:
    """The name or folder of the model that adapters belong to."""
    base = _peft(AdapterError).PeftConfig.from_pretrained(name_or_path).base_model_name_or_path
    if not base:
        raise AdapterError(f"{ADAPTER_CONFIG} does not name the model that the adapters belong to.")
    return base


def _class_named(name: str) -> Any:
    """The class of ours of this name; None if there is none."""
    return getattr(modeling_tcl, name, None) or getattr(modeling_tcl_tasks, name, None)
