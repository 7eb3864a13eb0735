"""Files of the original code: their tensors, read without running code in them, and the sizes of the model in them."""

import math
import os
import pickletools
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..models.configuration_tcl import TCLConfig
from .original_names import KINDS, kind_of

HEAD_WIDTH = 64  # width of an attention head in the released models; the file does not contain the number of heads


class CheckpointError(ValueError):
    """A checkpoint that cannot be converted or opened; the message names the problem, its place and the remedy."""


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a file of the original.

    Args:
        state_dict: its weights.
        settings: its configuration; empty if it has none.
        notes: what could not be checked, as phrases.
    """

    state_dict: dict[str, Tensor]
    settings: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Read the weights of a `.pth` of the original, or of a `.safetensors` with its names. Code in it cannot run.

    A `.pth` is a zip archive, whose checksums are compared first, because torch does not compare them. Files from
    before PyTorch 1.6 and safetensors have no checksums.

    Raises:
        CheckpointError: if the file is missing, damaged, of another kind, or needs more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint file {path}: check the path.")
    content, notes = _load(path)
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__} instead of a state dict: choose a checkpoint of TCL or ALBEF."
        )
    settings = content.get("config")
    weights = content.get("model", content)
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        found = ", ".join(map(str, list(content)[:5]))
        raise CheckpointError(
            f"{path} has no weights under 'model' (it has {found}): choose a checkpoint of TCL or ALBEF."
        )
    weights = {str(name): value for name, value in weights.items()}
    if weights and all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
    return Checkpoint(weights, settings if isinstance(settings, dict) else {}, notes)


def _load(path: Path) -> tuple[Any, tuple[str, ...]]:
    """Return the contents of a file, and what could not be checked."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path), ("not checked for damage: safetensors carry no checksums",)
        notes = _verify_archive(path)
        # A zip archive is mapped, so that the states of an optimizer stay on the disk. Older files cannot be mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=not notes), notes
    except Exception as error:  # a damaged pickle can raise any exception
        found = re.search(r"GLOBAL (\S+)", str(error))
        wanted = found[1].rstrip(".,") if found else _called_in(path)
        if wanted:
            raise CheckpointError(
                f"{path} needs '{wanted}' to be read, which is more than tensors and plain values. "
                "It is refused, because such a file can run code: open it where you trust it, and save its state dict."
            ) from error
        # torch puts advice to load the file unsafely before the reason.
        detail = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
        reason = (detail[1] if detail else str(error).strip().split("\n")[0])[:160] or type(error).__name__
        raise CheckpointError(f"{path} is damaged or is not a checkpoint ({reason}): get the file again.") from error


def _called_in(path: Path) -> str:
    """The first function or class that a plain pickle names, read without running it; empty if there is none.

    `torch.load` reads pickles of protocol 2 only, and calls others damaged.
    """
    texts: list[str] = []
    try:
        with path.open("rb") as file:
            for operation, argument, _ in pickletools.genops(file):
                if operation.name in ("GLOBAL", "INST"):
                    return str(argument).replace(" ", ".")
                if operation.name == "STACK_GLOBAL":
                    return ".".join(texts[-2:])
                if isinstance(argument, str):
                    texts.append(argument)
    except Exception:  # Not a pickle, or a damaged one.
        return ""
    return ""


def _verify_archive(path: Path) -> tuple[str, ...]:
    """Compare the checksums of a zip archive; for another file, return a note that it has none."""
    with path.open("rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"
    if not is_archive:
        return ("not checked for damage: files from before PyTorch 1.6 carry no checksums",)
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"its part '{damaged}' has another checksum")
    return ()


def config_of(
    state_dict: dict[str, Tensor], vision_heads: int | None = None, text_heads: int | None = None, **fields
) -> TCLConfig:
    """Read the configuration of an original checkpoint from the shapes of its tensors.

    Args:
        vision_heads, text_heads: numbers of attention heads, which shapes do not show; by default each is 64 wide.
        fields: fields of `TCLConfig` that tensors do not show.

    Raises:
        CheckpointError: if a tensor that gives a size is missing or contradicts another one, or a width cannot be
            divided into heads.
    """
    vision = _vision_sizes(state_dict, vision_heads)
    text = _text_sizes(state_dict, text_heads)
    if "vision_proj.weight" in state_dict:
        fields["projection_dim"] = _shape(state_dict, "vision_proj.weight", 2)[0]
    if "image_queue" in state_dict:
        fields["queue_size"] = _shape(state_dict, "image_queue", 2)[1]
    fields["use_momentum_teacher"] = any(name.startswith("visual_encoder_m.") for name in state_dict)
    if "cls_head.2.weight" in state_dict:
        fields["num_labels"] = _shape(state_dict, "cls_head.2.weight", 2)[0]
    try:
        return TCLConfig(vision_config=vision, text_config=text, **fields)
    except ValueError as error:
        raise CheckpointError(f"The shapes of the checkpoint contradict each other: {error}") from error


def _vision_sizes(state_dict: dict[str, Tensor], num_heads: int | None) -> dict[str, int]:
    """Return the fields of `TCLVisionConfig`."""
    width, _, patch, _ = _shape(state_dict, "visual_encoder.patch_embed.proj.weight", 4)
    _, positions, _ = _shape(state_dict, "visual_encoder.pos_embed", 3)
    grid = math.isqrt(positions - 1) if positions > 1 else 0
    if grid < 1 or grid * grid != positions - 1:
        raise CheckpointError(
            f"'visual_encoder.pos_embed' has {positions} positions, but must have one for the class and a square of "
            "them for the patches: choose a checkpoint of TCL or ALBEF."
        )
    return {
        "hidden_size": width,
        "patch_size": patch,
        "image_size": grid * patch,
        "num_hidden_layers": len(_layer_numbers(state_dict, "visual_encoder.blocks.")),
        "intermediate_size": _shape(state_dict, "visual_encoder.blocks.0.mlp.fc1.weight", 2)[0],
        "num_attention_heads": _num_heads(width, num_heads, "vision"),
    }


def _text_sizes(state_dict: dict[str, Tensor], num_heads: int | None) -> dict[str, int]:
    """Return the fields of `TCLTextConfig`."""
    kind = kind_of(state_dict)
    prefix = KINDS[kind].text_encoder.format(m="")
    vocabulary, width = _shape(state_dict, f"{prefix}embeddings.word_embeddings.weight", 2)
    layers = _layer_numbers(state_dict, f"{prefix}encoder.layer.")
    fused = _layer_numbers(state_dict, f"{prefix}encoder.layer.", "crossattention.")
    if not fused or fused != list(range(fused[0], fused[-1] + 1)) or layers != list(range(fused[-1] + 1)):
        raise CheckpointError(
            f"The checkpoint has the text layers {layers}, and those with cross-attention are {fused or 'none'}. This "
            "is not an encoder followed by fusion layers: some are missing, so get the file again."
        )
    images_per_text = 2 if kind == "text_assignment" or _has_pairs_of_layers(state_dict, prefix, fused) else 1
    if len(fused) % images_per_text:
        raise CheckpointError(
            f"The checkpoint has {len(fused)} fusion layers, but a model of two images has an even number: get the "
            "file again."
        )
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": fused[0] + len(fused) // images_per_text,
        "fusion_layer": fused[0],
        "images_per_text": images_per_text,
        "intermediate_size": _shape(state_dict, f"{prefix}encoder.layer.0.intermediate.dense.weight", 2)[0],
        "max_position_embeddings": _shape(state_dict, f"{prefix}embeddings.position_embeddings.weight", 2)[0],
        "type_vocab_size": _shape(state_dict, f"{prefix}embeddings.token_type_embeddings.weight", 2)[0],
        "num_attention_heads": _num_heads(width, num_heads, "text"),
    }


def _shape(state_dict: dict[str, Tensor], name: str, num_dimensions: int) -> tuple[int, ...]:
    if name not in state_dict:
        raise CheckpointError(
            f"The checkpoint has no '{name}': it is not a checkpoint of TCL or ALBEF, or a part is missing."
        )
    found = tuple(state_dict[name].shape)
    if len(found) != num_dimensions:
        raise CheckpointError(f"'{name}' has the shape {found}, but {num_dimensions} dimensions were expected.")
    return found


def _layer_numbers(state_dict: dict[str, Tensor], prefix: str, part: str = "") -> list[int]:
    """Return the numbers of the layers under a prefix that have a part, in order."""
    pattern = re.compile(rf"{re.escape(prefix)}(\d+)\.{re.escape(part)}")
    return sorted({int(match[1]) for match in map(pattern.match, state_dict) if match})


def _num_heads(width: int, num_heads: int | None, encoder: str) -> int:
    """Return the number of attention heads of an encoder: the given one, or as many as are `HEAD_WIDTH` wide."""
    number = width // HEAD_WIDTH if num_heads is None else num_heads
    if number < 1 or width % number or (num_heads is None and width % HEAD_WIDTH):
        heads = f"heads of {HEAD_WIDTH} as in the released models" if num_heads is None else f"{num_heads} heads"
        raise CheckpointError(
            f"The {encoder} encoder is {width} wide, which cannot be divided into {heads}: give the number of its "
            f"heads with --{encoder}-heads."
        )
    return number


def _has_pairs_of_layers(state_dict: dict[str, Tensor], prefix: str, fused: list[int]) -> bool:
    """Return whether neighbouring fusion layers share keys and values, as in a model of two images.

    The names do not differ from those of a model of one image.
    """
    if "cls_head.2.weight" not in state_dict:
        return False
    names = [f"{prefix}encoder.layer.{n}.crossattention.self.key.weight" for n in fused]
    keys = [state_dict[name] for name in names if name in state_dict]
    return any(torch.equal(*pair) for pair in zip(keys[::2], keys[1::2], strict=False))
