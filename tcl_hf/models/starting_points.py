"""Encoders of transformers from which a new TCL starts: families of ViT and BERT, read as our encoders.

A family is supported if our encoder computes the same last hidden state.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from .configuration_tcl import TCLConfig, TCLVisionConfig
from .fitting import resize_positions

# Rows: the name in transformers' BERT, which the original shares, and ours. {n} is a layer, {p} weight or bias.
BERT_NAMES = [
    ("embeddings.word_embeddings.weight", "embeddings.word_embeddings.weight"),
    ("embeddings.position_embeddings.weight", "embeddings.position_embeddings.weight"),
    ("embeddings.token_type_embeddings.weight", "embeddings.token_type_embeddings.weight"),
    ("embeddings.LayerNorm.{p}", "embeddings.layer_norm.{p}"),
    ("encoder.layer.{n}.attention.self.query.{p}", "layers.{n}.self_attn.q_proj.{p}"),
    ("encoder.layer.{n}.attention.self.key.{p}", "layers.{n}.self_attn.k_proj.{p}"),
    ("encoder.layer.{n}.attention.self.value.{p}", "layers.{n}.self_attn.v_proj.{p}"),
    ("encoder.layer.{n}.attention.output.dense.{p}", "layers.{n}.self_attn.out_proj.{p}"),
    ("encoder.layer.{n}.attention.output.LayerNorm.{p}", "layers.{n}.self_attn_layer_norm.{p}"),
    ("encoder.layer.{n}.intermediate.dense.{p}", "layers.{n}.fc1.{p}"),
    ("encoder.layer.{n}.output.dense.{p}", "layers.{n}.fc2.{p}"),
    ("encoder.layer.{n}.output.LayerNorm.{p}", "layers.{n}.final_layer_norm.{p}"),
]
LM_HEAD_NAMES = [
    ("transform.dense.{p}", "dense.{p}"),
    ("transform.LayerNorm.{p}", "layer_norm.{p}"),
    ("decoder.weight", "decoder.weight"),
    ("decoder.bias", "decoder.bias"),
    ("bias", "decoder.bias"),
]


@dataclass(frozen=True)
class StartingPoint:
    """An encoder to start from, in our names.

    Args:
        config: fields of our config for this encoder.
        state_dict: its weights, in the names of `TCLVisionModel` or `TCLTextModel`.
        lm_head: weights of the language-model head, where the checkpoint has one.
        image_mean, image_std: mean and standard deviation by which the vision encoder's images were normalised.
    """

    config: dict[str, Any]
    state_dict: dict[str, Tensor]
    lm_head: dict[str, Tensor] | None = None
    image_mean: tuple[float, ...] = tuple(OPENAI_CLIP_MEAN)
    image_std: tuple[float, ...] = tuple(OPENAI_CLIP_STD)


# How the images of each family were normalised.
_NORMALISATION = {"vit": (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD)}
_NORMALISATION |= dict.fromkeys(("vit_mae", "vit_msn", "dinov2"), (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
# Why our encoders do not compute the states of other well-known families.
_UNSUPPORTED = {
    "deit": "it reads a distillation token beside the class token (a DeiT without one is a 'vit')",
    "dinov2_with_registers": "it reads register tokens beside the class token",
    "dinov3_vit": "it rotates by positions and reads register tokens",
    "clip": "it normalises the patches before its first layer",
    "siglip": "it has no class token",
    "beit": "its positions are relative",
    "swin": "its patches merge from stage to stage",
    "distilbert": "it has no token types",
    "roberta": "its positions start behind the padding id",
    "xlm-roberta": "its positions start behind the padding id",
    "mpnet": "its positions are relative",
    "modernbert": "it rotates by positions",
}

# transformers has renamed its layers between versions: the patterns match both spellings.
_VISION_RENAMES = [
    (r"embeddings\.(cls_token|position_embeddings)", r"embeddings.\1"),
    (r"embeddings\.patch_embeddings\.projection\.(\w+)", r"embeddings.patch_embedding.\1"),
    (r"(?:encoder\.layer|layers)\.(\d+)\.(?:norm1|layernorm_before)\.(\w+)", r"layers.\1.layer_norm1.\2"),
    (r"(?:encoder\.layer|layers)\.(\d+)\.(?:norm2|layernorm_after)\.(\w+)", r"layers.\1.layer_norm2.\2"),
    (r"(?:encoder\.layer|layers)\.(\d+)\.attention\.([qkv])_proj\.(\w+)", r"layers.\1.self_attn.\2_proj.\3"),
    (r"encoder\.layer\.(\d+)\.attention\.attention\.([qkv])\w+\.(\w+)", r"layers.\1.self_attn.\2_proj.\3"),
    (
        r"(?:encoder\.layer|layers)\.(\d+)\.attention\.(?:o_proj|output\.dense)\.(\w+)",
        r"layers.\1.self_attn.out_proj.\2",
    ),
    (r"(?:encoder\.layer|layers)\.(\d+)\.(?:mlp\.fc1|intermediate\.dense)\.(\w+)", r"layers.\1.fc1.\2"),
    (r"(?:encoder\.layer|layers)\.(\d+)\.(?:mlp\.fc2|output\.dense)\.(\w+)", r"layers.\1.fc2.\2"),
    (r"encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1", r"layers.\1.layer_scale\2"),
    (r"layernorm\.(\w+)", r"layer_norm.\1"),
]
_VISION_DROPPED = re.compile(r"embeddings\.mask_token|pooler\..*")
_TEXT_DROPPED = re.compile(r"pooler\..*|embeddings\.(position_ids|token_type_ids)")
_LAYER_SCALED = {"1": "self_attn.out_proj", "2": "fc2"}  # the linear layer before each LayerScale


def read_vision_encoder(name_or_path: str, image_size: int | None = None) -> StartingPoint:
    """Read a ViT, DeiT, MAE, MSN or DINOv2 of transformers as our vision encoder, for images of `image_size` pixels.

    LayerScale folds into the linear layer before it; positions are resized bicubically. (Checkpoints of DeiT
    without distillation token are ViTs to transformers.)

    Raises:
        ValueError: for an architecture whose states our encoder cannot reproduce.
    """
    foreign = _vision_config(name_or_path)
    if getattr(foreign, "use_swiglu_ffn", False) or not getattr(foreign, "qkv_bias", True):
        raise ValueError(
            f"{name_or_path} has gated feed-forward layers or no query biases, which our vision encoder does not "
            "support: choose a model with use_swiglu_ffn=false and qkv_bias=true."
        )
    config = {
        "hidden_size": foreign.hidden_size,
        "intermediate_size": getattr(foreign, "intermediate_size", None)
        or foreign.hidden_size * int(foreign.mlp_ratio),
        "num_hidden_layers": foreign.num_hidden_layers,
        "num_attention_heads": foreign.num_attention_heads,
        "patch_size": foreign.patch_size,
        "image_size": image_size or foreign.image_size,
        "hidden_act": foreign.hidden_act,
        "layer_norm_eps": foreign.layer_norm_eps,
    }
    model = _load_foreign(name_or_path, foreign)
    state = _rename(model.state_dict(), _VISION_RENAMES, _VISION_DROPPED, name_or_path)
    for key in [key for key in state if ".layer_scale" in key]:
        layer, number = key.rsplit(".layer_scale", 1)
        scale = state.pop(key)
        state[f"{layer}.{_LAYER_SCALED[number]}.weight"] *= scale[:, None]
        state[f"{layer}.{_LAYER_SCALED[number]}.bias"] *= scale
    grid = TCLVisionConfig(**config).image_size // foreign.patch_size
    positions = "embeddings.position_embeddings"
    state[positions] = resize_positions(state[positions], grid)
    mean, std = _normalisation(name_or_path, foreign.model_type)
    return StartingPoint(config, state, image_mean=mean, image_std=std)


def read_image_format(name_or_path: str, image_size: int | None = None) -> dict[str, Any]:
    """Arguments of an image processor for a vision encoder's images: `size`, `image_mean` and `image_std`."""
    foreign = _vision_config(name_or_path)
    side = image_size or foreign.image_size
    mean, std = _normalisation(name_or_path, foreign.model_type)
    return {"size": {"height": side, "width": side}, "image_mean": mean, "image_std": std}


def _vision_config(name_or_path: str) -> PreTrainedConfig:
    """The config of a vision model of a family that ours can start from."""
    foreign = AutoConfig.from_pretrained(name_or_path)
    if foreign.model_type not in _NORMALISATION:
        raise ValueError(
            f"{name_or_path} is a '{foreign.model_type}'{_why_not(foreign)}: the vision encoder starts from "
            f"{_either(_NORMALISATION)} (a pre-norm ViT with one class token and learned positions)."
        )
    return foreign


def read_text_encoder(name_or_path: str, fusion_layer: int | None = None, num_fusion_layers: int = 6) -> StartingPoint:
    """Read a BERT of transformers as our text model, with its language-model head if it has one.

    Args:
        fusion_layer: how many of its layers encode the text; all of them if None.
        num_fusion_layers: layers that fuse. The BERT's remaining layers become the first of these; the others, and all
            cross-attention, start new.

    Raises:
        ValueError: if it is not a BERT, or its positions are not absolute.
    """
    foreign = AutoConfig.from_pretrained(name_or_path)
    if foreign.model_type != "bert" or getattr(foreign, "position_embedding_type", "absolute") != "absolute":
        raise ValueError(
            f"{name_or_path} is a '{foreign.model_type}'{_why_not(foreign)}: the text model starts from a 'bert' "
            "with absolute positions."
        )
    fusion_layer = foreign.num_hidden_layers if fusion_layer is None else fusion_layer
    num_layers = fusion_layer + num_fusion_layers
    same = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "max_position_embeddings",
        "type_vocab_size",
        "hidden_act",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "layer_norm_eps",
        "pad_token_id",
    ]
    config = {name: getattr(foreign, name) for name in same}
    config |= {"num_hidden_layers": num_layers, "fusion_layer": fusion_layer}
    with_lm_head = any(name.endswith(("ForMaskedLM", "ForPreTraining")) for name in foreign.architectures or ())
    if with_lm_head:
        whole = AutoModelForMaskedLM.from_pretrained(name_or_path, config=foreign, dtype=torch.float32).state_dict()
    else:
        whole = _load_foreign(name_or_path, foreign).state_dict()
    head = {k.removeprefix("cls.predictions."): v for k, v in whole.items() if k.startswith("cls.predictions.")}
    encoder = {k.removeprefix("bert."): v for k, v in whole.items() if not k.startswith("cls.")}
    state = _rename(encoder, _as_renames(BERT_NAMES), _TEXT_DROPPED, name_or_path)
    lm_head = _rename(head, _as_renames(LM_HEAD_NAMES), _TEXT_DROPPED, name_or_path)
    beyond = tuple(f"layers.{n}." for n in range(num_layers, foreign.num_hidden_layers))
    state = {key: value for key, value in state.items() if not key.startswith(beyond)}
    return StartingPoint(config, state, lm_head or None)


def _why_not(config: PreTrainedConfig) -> str:
    reason = _UNSUPPORTED.get(config.model_type.removesuffix("_vision_model"))
    return f", and {reason}" if reason else ""


def _either(names: Iterable[str]) -> str:
    *others, last = (f"'{name}'" for name in names)
    return f"{', '.join(others)} or {last}"


def _normalisation(name_or_path: str, model_type: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the encoder's images: those of the image processor beside it, or its family's."""
    mean, std = _NORMALISATION[model_type]
    try:
        image_processor, _ = ImageProcessingMixin.get_image_processor_dict(name_or_path)
    except OSError:
        image_processor = {}
    return tuple(image_processor.get("image_mean", mean)), tuple(image_processor.get("image_std", std))


def _load_foreign(name_or_path: str, config: PreTrainedConfig) -> PreTrainedModel:
    without_pooler = {"add_pooling_layer": False} if config.model_type in ("vit", "bert") else {}
    return AutoModel.from_pretrained(name_or_path, config=config, dtype=torch.float32, **without_pooler)


def _rename(
    state_dict: dict[str, Tensor], renames: list[tuple[str, str]], dropped: re.Pattern, source: str
) -> dict[str, Tensor]:
    renamed = {}
    for key, value in state_dict.items():
        if dropped.fullmatch(key):
            continue
        for pattern, ours in renames:
            if re.fullmatch(pattern, key):
                renamed[re.sub(pattern, ours, key)] = value.clone()
                break
        else:
            raise ValueError(
                f"{source} has a weight '{key}' that our encoders do not have: start from another checkpoint."
            )
    return renamed


def _as_renames(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, str]]:
    """Rows of a table of names as patterns."""
    renames = []
    for original, ours in rows:
        ours = ours.replace("{first}", "{n}")  # one copy of each layer
        pattern = re.escape(original).replace(r"\{n\}", r"(\d+)").replace(r"\{p\}", r"(weight|bias)")
        for group, placeholder in enumerate(re.findall(r"\{[np]\}", ours), start=1):
            ours = ours.replace(placeholder, f"\\{group}")
        renames.append((pattern, ours))
    return renames


class StartsFromEncoders:
    """A new TCL from two encoders that were trained separately."""

    new_weights: frozenset[str] = frozenset()  # names of the parameters that the model's starting point lacked

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision_model: str | StartingPoint | None = None,
        text_model: str | StartingPoint | None = None,
        *,
        image_size: int | None = None,
        fusion_layer: int | None = None,
        num_fusion_layers: int = 6,
        vision_config: dict[str, Any] | None = None,
        text_config: dict[str, Any] | None = None,
        **fields,
    ) -> Any:
        """Make a new model whose encoders are those of transformers models, student and teacher alike.

        `TCLProcessor.from_vision_text_pretrained` makes the processor for it.

        Args:
            vision_model: folder or Hub name of a ViT, DeiT, MAE, MSN or DINOv2; None starts it new.
            text_model: folder or Hub name of a BERT; None starts it new.
            image_size: pixels of a side of the images; the vision model's own if None.
            fusion_layer: how many of the BERT's layers encode the text; all if None.
            num_fusion_layers: layers that fuse, on top of these. The BERT's remaining layers become the first of these;
                the others, and all cross-attention, start new.
            vision_config, text_config: further fields of the encoders' configs, or all fields of one that starts new.
            fields: fields of [`TCLConfig`].

        Raises:
            ValueError: for an encoder whose states ours cannot reproduce.
        """
        vision, text = vision_model, text_model
        if isinstance(vision, str):
            vision = read_vision_encoder(vision, image_size)
        if isinstance(text, str):
            text = read_text_encoder(text, fusion_layer, num_fusion_layers)
        vision_fields = (vision.config if vision else {}) | (vision_config or {})
        if image_size is not None:
            vision_fields["image_size"] = image_size
        text_fields = (text.config if text else {}) | (text_config or {})
        model = cls(TCLConfig(vision_config=vision_fields, text_config=text_fields, **fields))  # type: ignore[call-arg]
        tcl = model.base_model  # type: ignore[attr-defined]
        started: set[int] = set()  # weights that come from one of the encoders
        for part, encoder in ((vision, tcl.vision_model), (text, tcl.text_model)):
            if part is not None:
                result = encoder.load_state_dict(part.state_dict, strict=False)
                if result.unexpected_keys:
                    raise ValueError(f"The model has no place for {', '.join(result.unexpected_keys[:5])}.")
                started |= {id(encoder.get_parameter(name)) for name in part.state_dict}
        if text is not None and text.lm_head and hasattr(model, "lm_head"):
            model.lm_head.load_state_dict(text.lm_head)
            started |= {id(weight) for weight in model.lm_head.parameters()}
        weights = model.named_parameters()  # type: ignore[attr-defined]
        is_new = ((name, id(weight) not in started) for name, weight in weights if not name.startswith("teacher."))
        model.new_weights = frozenset(name for name, new in is_new if new)
        if getattr(model, "teacher", None) is not None:
            model.teacher.copy_from(model)  # type: ignore[attr-defined]
        return model
