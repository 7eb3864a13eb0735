"""Checkpoints fitted to a model: another grid of patches, two images for a text, one encoder, a decoder of answers.

Entries of a checkpoint are tensors, or safetensors slices, which are not read from disk before they are used.
"""

import math
import re
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .configuration_tcl import TCLTextConfig

_IMAGE_POSITIONS = re.compile(r"(^|vision_model\.)embeddings\.position_embeddings$")
_TEXT_LAYER = re.compile(r"(?P<stack>|(.*\.)?text_model\.)layers\.(?P<number>\d+)\.(?P<name>.*)")
_CROSS_KEY_VALUE = re.compile(r"\.cross_attn\.[kv]_proj\.")

# Heads of a task: a checkpoint may lack them as a whole, because it was saved by a model of another task.
_HEAD = re.compile(r"(itm_head|lm_head|cls_head|ta_head|text_decoder\.lm_head|text_decoder|teacher|queue)\.")
_UNUSED = re.compile(r"tcl\.(visual_projection|text_projection|temperature)")  # unless the losses contrast features


def why_incomplete(model: Any, names: set[str], missing: set[str], unexpected: set[str]) -> str | None:
    """Which weights a checkpoint lacks that cannot start new, and which ones the model has no place for, in words.

    Args:
        names: the entries of the model's state.
        missing: those that the checkpoint lacks, without what was copied to the teacher or is tied.
        unexpected: entries of the checkpoint that the model does not have.
    """
    tied = getattr(model, "all_tied_weights_keys", {})
    loaded = {head[1] for key in names - missing - set(tied) if (head := _HEAD.match(key))}
    lacking = sorted(key for key in missing if not _may_start_new(model, key, loaded))
    left_over = sorted(key for key in unexpected if not _HEAD.match(key) and not key.endswith("position_ids"))
    problems = [
        f"it lacks {len(lacking)} weights, such as {lacking[0]}" if lacking else "",
        f"it has {len(left_over)} weights for which the model has no place, such as {left_over[0]}"
        if left_over
        else "",
    ]
    return ", and ".join(filter(None, problems)) or None


def _may_start_new(model: Any, key: str, loaded: set[str]) -> bool:
    """Whether a weight is one of a head of which the checkpoint has nothing, or one that no loss uses."""
    if _UNUSED.match(key):
        return not getattr(model, "contrasts", False)
    head = _HEAD.match(key)
    if head is None:
        return False
    if head[1] == "text_decoder" and _CROSS_KEY_VALUE.search(key):  # see `fill_decoder`
        text = model.config.text_config
        return text.encoder_hidden_size != text.hidden_size
    return head[1] in ("teacher", "queue") or head[1] not in loaded


def shape_of(entry: Any) -> tuple[int, ...]:
    """The shape of an entry of a checkpoint."""
    return tuple(entry.shape if isinstance(entry, Tensor) else entry.get_shape())


def copy_of(entry: Any) -> Tensor:
    """A copy of an entry of a checkpoint. The entry itself under two names would be one memory for two weights."""
    return entry[:].clone()


def fit_shapes(
    state_dict: dict[str, Any], shapes: dict[str, tuple[int, ...]], base_model_prefix: str
) -> dict[str, Any]:
    """Resize learned image positions to the model's grid, and leave out queues of another size.

    Args:
        state_dict: entries of a checkpoint.
        shapes: the shape of every entry of the model.
        base_model_prefix: a name may have this prefix in the checkpoint and not in the model, or the reverse.
    """
    prefix = f"{base_model_prefix}."
    fitted = {}
    for key, value in state_dict.items():
        found = shape_of(value)
        shape = shapes.get(key, shapes.get(prefix + key, shapes.get(key.removeprefix(prefix), found)))
        if shape != found and _IMAGE_POSITIONS.search(key) and shape[-1] == found[-1]:
            value = resize_positions(value[:], math.isqrt(shape[1] - 1))
        elif shape != found and key.startswith("queue."):  # the whole queue starts new
            rest = {k: v for k, v in state_dict.items() if not k.startswith("queue.")}
            return fit_shapes(rest, shapes, base_model_prefix)
        fitted[key] = value
    return fitted


def resize_positions(positions: Tensor, grid: int | tuple[int, int], antialias: bool = False) -> Tensor:
    """Resize learned positions (1, 1 + P, D) of a square grid to another grid, bicubically; the class token's stays.

    Args:
        antialias: average over all old positions that a new one covers, as DINOv2 with registers does.

    Raises:
        ValueError: if the patches are not a square grid.
    """
    grid = (grid, grid) if isinstance(grid, int) else grid
    old_grid = math.isqrt(positions.shape[1] - 1)
    if old_grid * old_grid != positions.shape[1] - 1:
        raise ValueError(f"{positions.shape[1] - 1} patch positions are not a square grid: they cannot be resized.")
    if grid == (old_grid, old_grid):
        return positions
    planes = positions[:, 1:].mT.unflatten(-1, (old_grid, old_grid))  # (1, D, old, old)
    planes = F.interpolate(planes.float(), size=grid, mode="bicubic", align_corners=False, antialias=antialias)
    return torch.cat([positions[:, :1], planes.flatten(-2).mT.to(positions.dtype)], dim=1)


def part_of(state_dict: dict[str, Any], part: str) -> dict[str, Any]:
    """The entries of one encoder of a whole model, in the encoder's own names; all entries of any other checkpoint."""
    cut = {key: key.removeprefix("tcl.") for key in state_dict if not key.startswith("teacher.")}
    whole = {key: name.removeprefix(f"{part}.") for key, name in cut.items() if name.startswith(f"{part}.")}
    return {name: state_dict[key] for key, name in whole.items()} or state_dict


def repeat_fusion_layers(state_dict: dict[str, Any], config: TCLTextConfig) -> dict[str, Any]:
    """Make `images_per_text` copies of every fusion layer of a checkpoint that has one of each.

    The copies of layer `fusion_layer + i` begin at layer `fusion_layer + images_per_text * i`. Only the first of them
    has the projections to keys and values, which all share. A checkpoint that already has the copies is returned as it
    is.
    """
    copies, first = config.images_per_text, config.fusion_layer
    layers = {key: match for key in state_dict if (match := _TEXT_LAYER.fullmatch(key))}
    num_layers = 1 + max((int(match["number"]) for match in layers.values()), default=-1)
    if copies == 1 or num_layers != config.num_hidden_layers:
        return state_dict
    repeated = {}
    for key, value in state_dict.items():
        number = int(layers[key]["number"]) if key in layers else -1
        if number < first:
            repeated[key] = value
            continue
        for copy in range(copies):
            if copy == 0 or not _CROSS_KEY_VALUE.search(key):
                place = first + copies * (number - first) + copy
                name = f"{layers[key]['stack']}layers.{place}.{layers[key]['name']}"
                repeated[name] = value if copy == 0 else copy_of(value)
    return repeated


def fill_decoder(state_dict: dict[str, Any], config: TCLTextConfig) -> dict[str, Any]:
    """Add a decoder of answers to a checkpoint without one: copies of embeddings, fusion layers and LM head.

    Decoder layer i is fusion layer i. Its keys and values start new where the states of images, for which they were
    trained, have another width than the states of questions.
    """
    if any("text_decoder." in key for key in state_dict):
        return state_dict
    same_width = config.encoder_hidden_size == config.hidden_size
    filled = dict(state_dict)
    for key, value in state_dict.items():
        owner, name = ("teacher.", key.removeprefix("teacher.")) if key.startswith("teacher.") else ("", key)
        name = name.removeprefix("tcl.")
        if name.startswith(("lm_head.", "text_model.embeddings.")):
            filled[f"{owner}text_decoder.{name}"] = copy_of(value)
        elif name.startswith("text_model.layers."):
            number, rest = name.removeprefix("text_model.layers.").split(".", 1)
            layer = int(number) - config.fusion_layer
            fits = same_width or not rest.startswith(("cross_attn.k_proj", "cross_attn.v_proj"))
            if layer >= 0 and fits:
                filled[f"{owner}text_decoder.text_model.layers.{layer}.{rest}"] = copy_of(value)
    return filled
