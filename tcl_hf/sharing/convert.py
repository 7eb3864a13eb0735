"""Convert checkpoints of the original code, TCL's and ALBEF's, to our models, and our models back to checkpoints.

`original_names` has the table of names, and `original_files` reads the files.
"""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..models.configuration_tcl import TCLConfig, TCLVisionConfig
from ..models.encoders import TCLPreTrainedModel
from ..models.losses import NO_IMAGE_ID
from ..models.modeling_tcl import TCLForMaskedLM, TCLModel
from ..models.processing_tcl import TCLProcessor
from .original_files import Checkpoint, CheckpointError, config_of, read_checkpoint
from .original_names import KINDS, POSITION_IDS, NameRow, kind_of, model_class_of, original_names

_SETTINGS = ("momentum", "alpha", "mlm_probability")  # settings that have the same names in the original and in ours
# Parts of the image encoder that the original does not have: they must be as they are by default.
_VISION_PARTS = ("pre_layer_norm", "patch_bias", "num_register_tokens", "use_swiglu_ffn")
# ALBEF's objectives, as fields of TCLConfig. Its checkpoints have the same names as TCL's, so they do not show them.
ALBEF = {"cma_weight": 1.0, "imc_weight": 0.0, "lmi_weight": 0.0}


@dataclass
class Report:
    """The outcome of a conversion: what happened to each tensor, by name.

    Args:
        model_class: our class that holds the checkpoint.
        used: for each tensor of the original that was used, its place in our model.
        dropped: for each tensor of the original that was not used, the reason.
        filled: for each tensor of our model that the original lacks, its value and the reason.
        notes: further remarks.
    """

    model_class: type[TCLPreTrainedModel]
    used: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    filled: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.model_class.__name__}: {len(self.used)} tensors used"]
        for fate, reasons in (("dropped", self.dropped), ("filled", self.filled)):
            for reason, number in Counter(reasons.values()).items():
                names = [name for name, its_reason in reasons.items() if its_reason == reason]
                lines.append(f"{fate}: {', '.join(names[:4])}{', ...' if number > 4 else ''} ({number}): {reason}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def from_original(state_dict: dict[str, Tensor], config: TCLConfig, report: Report | None = None) -> dict[str, Tensor]:
    """Rename the tensors of an original checkpoint to ours.

    Args:
        state_dict: the "model" entry of the original's file.
        config: configuration of our model, with the checkpoint's sizes.
        report: receives what happened to each tensor.

    Returns:
        A state dict for our class of this kind of checkpoint. Its tensors share memory with the original's.

    Raises:
        CheckpointError: if the checkpoint has a tensor that is not in the table, or copies that differ.
    """
    kind = kind_of(state_dict)
    report = Report(model_class_of(kind, config)) if report is None else report
    rows = {row.original: row for row in original_names(config, kind)}
    unknown = sorted(key for key in state_dict if key not in rows and not POSITION_IDS.fullmatch(key))
    if unknown:
        raise CheckpointError(
            f"The checkpoint has {len(unknown)} tensors that TCL does not have: {', '.join(unknown[:5])}. "
            "Check that it is a TCL or ALBEF checkpoint of this config's sizes."
        )
    ours: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        if key not in rows:
            report.dropped[key] = "positions are counted anew"
            continue
        names = rows[key].ours
        if names[0] not in ours:
            ours.update(_to_ours(rows[key], value))
            report.used[key] = ", ".join(names)
        elif torch.equal(ours[names[0]], value):
            report.used[key] = f"{names[0]}, as a copy"
        else:
            other = next(used for used in report.used if rows[used].ours[0] == names[0])
            raise CheckpointError(
                f"'{key}' and '{other}' must be copies of one tensor, but they differ: get the file again."
            )
    return ours


def _to_ours(row: NameRow, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and values of our tensors for one of the original."""
    if (row.transposed and value.ndim != 2) or (len(row.ours) > 1 and (not value.ndim or len(value) % len(row.ours))):
        needed = "two dimensions" if row.transposed else f"{len(row.ours)} equal parts"
        raise CheckpointError(f"'{row.original}' has the shape {tuple(value.shape)}, but must have {needed}.")
    if row.transposed:
        value = value.T.contiguous()
    if row.shape is not None:
        value = value.flatten()
    yield from zip(row.ours, value.chunk(len(row.ours)) if len(row.ours) > 1 else (value,), strict=True)


def to_original(model: TCLPreTrainedModel) -> dict[str, Tensor]:
    """Rename the tensors of one of our models to the original's names, with the copies and positions that it stores.

    Raises:
        CheckpointError: if the original has no such model, or no such image encoder.
    """
    kinds = {model_class: name for name, kind in KINDS.items() for model_class in kind.model_classes}
    if type(model) not in kinds:
        known = ", ".join(model_class.__name__ for model_class in kinds)
        raise CheckpointError(f"The original has no {type(model).__name__}: choose a checkpoint of {known}.")
    vision, original = model.config.vision_config, TCLVisionConfig()
    for name in _VISION_PARTS:
        if getattr(vision, name) != getattr(original, name):
            raise CheckpointError(
                f"The original's image encoder cannot hold vision_config.{name}={getattr(vision, name)}, which this "
                "model has from the encoder that it started from: share it in our format."
            )
    return dict(_original_tensors(model, kinds[type(model)]))


def _original_tensors(model: TCLPreTrainedModel, kind: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of `to_original` one by one, so that a caller need not hold all of them."""
    ours = model.state_dict()
    for row in original_names(model.config, kind):
        parts = [ours[name] for name in row.ours if name in ours]
        if parts:
            value = torch.cat(parts) if len(parts) > 1 else parts[0]
            value = value.T.contiguous() if row.transposed else value
            yield row.original, value if row.shape is None else value.view(row.shape)
            if row.original.endswith("position_embeddings.weight"):
                place = row.original.replace("position_embeddings.weight", "position_ids")
                yield place, torch.arange(len(value))[None]


def load_original(checkpoint: Checkpoint, **fields) -> tuple[TCLPreTrainedModel, Report]:
    """Make our model of an original checkpoint, with its weights, and report what happened to each tensor.

    Args:
        fields: numbers of heads and fields of `TCLConfig` that tensors do not show, see `config_of`; they override the
            checkpoint's own settings.

    Raises:
        CheckpointError: if tensors are missing or unknown, or contradict each other.
    """
    state_dict, kind = checkpoint.state_dict, kind_of(checkpoint.state_dict)
    settings = {name: checkpoint.settings[name] for name in _SETTINGS if name in checkpoint.settings}
    config = config_of(state_dict, **settings | fields)
    report = Report(model_class_of(kind, config), notes=list(checkpoint.notes))
    if settings:
        report.notes.append(f"from the file's own settings: {', '.join(f'{k}={v}' for k, v in settings.items())}")
    weights = from_original(state_dict, config, report)
    rows = original_names(config, kind)
    if not config.use_momentum_teacher:
        for row in rows:
            if row.ours[0].startswith("queue.") and weights.pop(row.ours[0], None) is not None:
                del report.used[row.original]
                report.dropped[row.original] = "queues serve a momentum teacher, which the checkpoint lacks"
    _check_and_fill(weights, rows, config, report)
    dtype = weights["tcl.vision_model.layer_norm.weight"].dtype
    return report.model_class.from_pretrained(None, config=config, state_dict=weights, dtype=dtype), report


def _check_and_fill(weights: dict[str, Tensor], rows: list[NameRow], config: TCLConfig, report: Report) -> None:
    """Compare names and shapes with those of our model, and fill what this kind of checkpoint does not have."""
    with torch.device("meta"):  # names and shapes suffice
        model = report.model_class(config)
    expected = {name: value.shape for name, value in model.state_dict().items()}
    for name, value in weights.items():
        if value.shape != expected.get(name, value.shape):
            raise CheckpointError(
                f"The shapes contradict each other: {name} is {tuple(value.shape)}, but by the sizes of the other "
                f"tensors it should be {tuple(expected[name])}."
            )
    listed = {name for row in rows for name in row.ours}
    missing = expected.keys() - weights.keys() - set(model.all_tied_weights_keys)
    for name in sorted(missing):
        if name == "queue.ids" and "queue.image" in weights:
            weights[name] = torch.full(expected[name], NO_IMAGE_ID)
            report.filled[name] = "no image ids: pre-training keeps none"
        elif name.startswith("queue.") and "queue.image" not in weights:
            report.filled[name] = "new: the checkpoint has no queues"
        elif name not in listed:
            report.filled[name] = "new and unused: a checkpoint of this kind does not compare images with texts"
        else:
            raise CheckpointError(
                f"The checkpoint lacks '{name}' (as our model calls it; {len(missing)} tensors are missing): it is "
                "incomplete or damaged, so get the file again."
            )


def convert(
    source: str | os.PathLike,
    folder: str | os.PathLike,
    processor: TCLProcessor | Callable[[], TCLProcessor | None] | None = None,
    **fields,
) -> Report:
    """Convert an original checkpoint to a folder that `from_pretrained` opens, which appears only when it is whole.

    Args:
        source: a file that `read_checkpoint` reads.
        folder: the folder to write; it must be empty if it exists.
        processor: saved with the model, and set to the model's image size; or a function that opens it, which is
            called when the source has been read.
        fields: see `load_original`.

    Raises:
        CheckpointError: if the source cannot be converted or the folder cannot be written.
    """
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise CheckpointError(f"{folder} is not empty: choose another folder.")
    model, report = load_original(read_checkpoint(source), **fields)
    if not isinstance(processor, TCLProcessor | None):
        processor = processor()
    if processor is not None:
        vocabulary = model.config.text_config.vocab_size
        if len(processor.tokenizer) != vocabulary:
            raise CheckpointError(
                f"The checkpoint has a vocabulary of {vocabulary} words, but the tokenizer has "
                f"{len(processor.tokenizer)}: name the tokenizer that the model was trained with."
            )
        processor.image_size = model.config.vision_config.image_size
        model.config.text_config.pad_token_id = processor.tokenizer.pad_token_id
        model.config.text_config.bos_token_id = processor.tokenizer.cls_token_id
        model.config.text_config.eos_token_id = processor.tokenizer.sep_token_id
    with _written_whole(Path(folder)) as unfinished:
        unfinished.mkdir(parents=True)
        model.save_pretrained(unfinished)
        if processor is not None:
            processor.save_pretrained(unfinished)
    return report


def check_conversion(source: str | os.PathLike, folder: str | os.PathLike) -> dict[str, Any]:
    """Open a converted folder, compare it with its source bit for bit, and run it on a batch of random numbers.

    Returns:
        `tensors`, the number of the source's tensors that are equal, and the means of the model's outputs, by name.

    Raises:
        CheckpointError: if a tensor differs or an output is not finite.
    """
    model, state_dict = open_saved(folder), read_checkpoint(source).state_dict
    num_equal = 0
    for name, value in _original_tensors(model, kind_of(state_dict)):
        if name in state_dict and not torch.equal(state_dict[name], value):
            raise CheckpointError(f"'{name}' differs between {source} and {folder}: convert it again.")
        num_equal += name in state_dict
    outputs = _probe(model)
    bad = [name for name, value in outputs.items() if not value.isfinite().all()]
    if bad:
        raise CheckpointError(
            f"{folder} computes {bad[0]} that are not finite: check that the weights of {source} are finite."
        )
    return {"tensors": num_equal} | {name: value.double().mean().item() for name, value in outputs.items()}


@torch.no_grad()
def _probe(model: TCLPreTrainedModel) -> dict[str, Tensor]:
    """Return states and logits of a model for two random images and texts, the same for all models of its sizes."""
    generator = torch.Generator().manual_seed(0)
    size, text = model.config.vision_config.image_size, model.config.text_config
    pixels = torch.randn(2, 3, size, size, generator=generator)
    ids = torch.randint(text.vocab_size, (2, min(8, text.max_position_embeddings)), generator=generator)
    states = model.tcl.encode_image(pixels)
    images = (states,) * text.images_per_text
    fused = model.tcl.text_model(ids, encoder_hidden_states=images).last_hidden_state
    outputs = {"image_states": states, "text_states": model.tcl.encode_text(ids), "fused_states": fused}
    for head in ("itm_head", "cls_head", "ta_head", "lm_head"):
        if hasattr(model, head):
            outputs[f"{head}_logits"] = getattr(model, head)(fused[:, 0])
    return outputs


def open_saved(folder: str | os.PathLike, **fields) -> TCLPreTrainedModel:
    """Open a folder as the class of ours that wrote it.

    Args:
        fields: fields of `TCLConfig` that replace the folder's.

    Raises:
        CheckpointError: if the folder does not hold a model of ours.
    """
    try:
        config = TCLConfig.from_pretrained(folder, **fields)
        return class_of(config).from_pretrained(folder, config=config)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder} cannot be opened: {error}") from error


def class_of(config: TCLConfig) -> type[TCLPreTrainedModel]:
    """The class of ours that wrote a config.

    Raises:
        CheckpointError: if it is none of ours.
    """
    written_by = (config.architectures or ["?"])[0]
    known: list[type[TCLPreTrainedModel]] = [TCLModel, TCLForMaskedLM]
    known += [model_class for kind in KINDS.values() for model_class in kind.model_classes]
    classes = {model_class.__name__: model_class for model_class in known}
    if written_by not in classes:
        raise CheckpointError(f"it holds a '{written_by}', which is not one of {', '.join(classes)}")
    return classes[written_by]


def write_original(folder: str | os.PathLike, file: str | os.PathLike) -> int:
    """Write a folder of ours as a `.pth` of the original, which appears only when it is whole.

    Returns:
        The number of its tensors.

    Raises:
        CheckpointError: if the folder cannot be opened, the original has no such model, or the file exists.
    """
    if os.path.exists(file):
        raise CheckpointError(f"{file} exists already: choose another name.")
    model = open_saved(folder)
    original = to_original(model)
    settings = {name: getattr(model.config, name) for name in _SETTINGS}
    settings |= {"image_res": model.config.vision_config.image_size, "queue_size": model.config.queue_size}
    settings |= {"vision_width": model.config.vision_config.hidden_size, "embed_dim": model.config.projection_dim}
    with _written_whole(Path(file)) as unfinished:
        torch.save({"model": original, "config": settings}, unfinished)
    return len(original)


@contextmanager
def _written_whole(final: Path) -> Iterator[Path]:
    """Yield a path to write to. It is renamed to `final` when the block ends, and removed if the block fails."""
    unfinished = final.with_name(f"{final.name}.unfinished-{os.getpid()}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        if final.is_dir():
            final.rmdir()  # an empty folder, which a rename does not replace everywhere
        unfinished.rename(final)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch and safetensors raise their own on a full disk
        raise CheckpointError(f"{final} could not be written, and nothing of it was kept: {error}") from error
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
        else:
            unfinished.unlink(missing_ok=True)
