"""Export of TCL in three parts: images to features, texts to features, and pairs to matching logits.

Each part is a module that takes and returns tensors. `export_programs` exports them with `torch.export`, `export_onnx`
writes ONNX files. The numbers of images, texts and tokens are dynamic; the size of an image is the model's.

Shapes: B images, N texts, P patches, L tokens, D feature dimensions.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..models.modeling_tcl import TCLForImageTextRetrieval


class ImageFeatures(nn.Module):
    """The image encoder: features for search, and states for matching."""

    outputs = ("image_embeds", "image_states")

    def __init__(self, model: TCLForImageTextRetrieval):
        super().__init__()
        self.tcl = model.tcl

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """L2-normalised features (B, D) and states (B, 1 + P, width) of images (B, 3, height, width)."""
        states = self.tcl.encode_image(pixel_values)
        return self.tcl.image_features(states), states


class TextFeatures(nn.Module):
    """The text encoder: features for search, and states for matching."""

    outputs = ("text_embeds", "text_states")

    def __init__(self, model: TCLForImageTextRetrieval):
        super().__init__()
        self.tcl = model.tcl

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """L2-normalised features (N, D) and states (N, L, width) of token ids (N, L) with their mask (N, L)."""
        states = self.tcl.encode_text(input_ids, attention_mask)
        return self.tcl.text_features(states, attention_mask), states


class MatchingLogits(nn.Module):
    """The fusion encoder and the matching head."""

    outputs = ("itm_logits",)

    def __init__(self, model: TCLForImageTextRetrieval):
        super().__init__()
        self.text_model, self.itm_head = model.tcl.text_model, model.itm_head

    def forward(
        self, text_states: Tensor, attention_mask: Tensor, image_states: Tensor, image_index: Tensor
    ) -> tuple[Tensor]:
        """Matching logits (N, 2) of texts with one image each; index 1 is "matches".

        Args:
            text_states, attention_mask: states (N, L, width) and mask (N, L) of the texts.
            image_states: states (B, 1 + P, width) of the images.
            image_index: the image of each text (N,); several texts may share one.
        """
        images = self.text_model.project_images(image_states)
        fused = self.text_model.fuse(text_states, attention_mask, images, image_index)
        return (self.itm_head(fused.pooler_output),)


@dataclass
class _Part:
    """A part to export: the module, example inputs, and their dynamic sizes."""

    module: Any
    inputs: tuple[Tensor, ...]
    dynamic_shapes: tuple[dict[int, Any], ...]


def _parts(model: TCLForImageTextRetrieval) -> dict[str, _Part]:
    if not isinstance(model, TCLForImageTextRetrieval):
        raise ValueError(
            f"{type(model).__name__} has no matching head: open the checkpoint as TCLForImageTextRetrieval."
        )
    if model.training:
        raise ValueError("The model is in train mode, and its dropout would be exported: call model.eval() first.")
    vision, text = model.config.vision_config, model.config.text_config
    images, texts, tokens = Dim("images"), Dim("texts"), Dim("tokens", max=text.max_position_embeddings)
    pixel_values = model.itm_head.weight.new_zeros(2, vision.num_channels, vision.image_size, vision.image_size)
    image_states = pixel_values.new_zeros(2, 1 + (vision.image_size // vision.patch_size) ** 2, vision.hidden_size)
    text_states = pixel_values.new_zeros(3, 4, text.hidden_size)
    input_ids = torch.zeros(3, 4, dtype=torch.long, device=model.device)
    attention_mask = torch.ones_like(input_ids)
    image_index = torch.zeros_like(input_ids[:, 0])
    of_texts = {0: texts, 1: tokens}
    return {
        "image_features": _Part(ImageFeatures(model).eval(), (pixel_values,), ({0: images},)),
        "text_features": _Part(TextFeatures(model).eval(), (input_ids, attention_mask), (of_texts, of_texts)),
        "matching_logits": _Part(
            MatchingLogits(model).eval(),
            (text_states, attention_mask, image_states, image_index),
            (of_texts, of_texts, {0: images}, {0: texts}),
        ),
    }


def export_programs(model: TCLForImageTextRetrieval) -> dict[str, ExportedProgram]:
    """Export `image_features`, `text_features` and `matching_logits` of a model in eval mode with `torch.export`.

    Raises:
        ValueError: if the model has no matching head or is in train mode.
    """
    return {
        name: torch.export.export(part.module, part.inputs, dynamic_shapes=part.dynamic_shapes)
        for name, part in _parts(model).items()
    }


def export_onnx(model: TCLForImageTextRetrieval, folder: str | Path) -> list[Path]:
    """Write `image_features.onnx`, `text_features.onnx` and `matching_logits.onnx` of a model in eval mode.

    Inputs have the names of the parts' `forward` arguments, outputs those of their `outputs`. The package `onnxscript`
    must be installed.

    Raises:
        ValueError: if the model has no matching head or is in train mode.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    files = []
    for name, part in _parts(model).items():
        files.append(Path(folder) / f"{name}.onnx")
        torch.onnx.export(
            part.module,
            part.inputs,
            files[-1],
            dynamic_shapes=part.dynamic_shapes,
            output_names=part.module.outputs,
            verbose=False,
        )
    return files
