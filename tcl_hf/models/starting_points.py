"""Encoders of transformers from which a new TCL starts: families of ViT and BERT, read as our encoders.

A family is supported if our encoder computes the same states of the class token and the patches, or of the words. (The
final norm, which CLIP applies to its class token alone, is applied to all of ours.)
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PreTrainedConfig
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
_NORMALISATION: dict[str, tuple[Sequence[float], Sequence[float]]] = {
    "vit": (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD)
}
_NORMALISATION |= dict.fromkeys(
    ("vit_mae", "vit_msn", "deit", "dinov2", "dinov2_with_registers"), (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
)
_NORMALISATION |= dict.fromkeys(
    (
        "clip",
        "clip_vision_model",
        "chinese_clip",
        "chinese_clip_vision_model",
        "altclip",
        "metaclip_2",
        "blip",
        "flava",
    ),
    (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
)
# Why our encoders do not compute the states of other well-known families.
_UNSUPPORTED = {
    "dinov3_vit": "it rotates by positions",
    "siglip": "it has no class token",
    "siglip2": "it has no class token",
    "ijepa": "it has no class token",
    "aimv2": "it has no class token",
    "tipsv2": "its register token is a second class token, which our encoder would not return",
    "radio": "it cuts its positions out of a larger grid and has several class tokens",
    "beit": "its positions are relative",
    "data2vec-vision": "its positions are relative",
    "swin": "its patches merge from stage to stage",
    "swinv2": "its patches merge from stage to stage",
    "hiera": "its patches merge from stage to stage",
    "distilbert": "it has no token types",
    "roberta": "its positions start behind the padding id",
    "xlm-roberta": "its positions start behind the padding id",
    "mpnet": "its positions are relative",
    "modernbert": "it rotates by positions",
}

# transformers has renamed its layers between versions and families: the patterns match all spellings.
_LAYER = r"(?:encoder\.layers?|layers)\.(\d+)\."
_VISION_RENAMES = [
    (r"embeddings\.(?:cls_token|class_embedding)", r"embeddings.cls_token"),
    (r"embeddings\.position_embeddings?(?:\.weight)?", r"embeddings.position_embeddings"),
    (r"embeddings\.(register_tokens|distillation_token)", r"embeddings.\1"),
    (r"embeddings\.(?:patch_embeddings\.projection|patch_embedding)\.(\w+)", r"embeddings.patch_embedding.\1"),
    (r"pre_layrnorm\.(\w+)", r"embeddings.layer_norm.\1"),
    (_LAYER + r"(?:norm1|layernorm_before|layer_norm1)\.(\w+)", r"layers.\1.layer_norm1.\2"),
    (_LAYER + r"(?:norm2|layernorm_after|layer_norm2)\.(\w+)", r"layers.\1.layer_norm2.\2"),
    (_LAYER + r"(?:attention|self_attn)\.([qkv])_proj\.(\w+)", r"layers.\1.self_attn.\2_proj.\3"),
    (_LAYER + r"attention\.attention\.([qkv])\w+\.(\w+)", r"layers.\1.self_attn.\2_proj.\3"),
    (_LAYER + r"self_attn\.qkv\.(\w+)", r"layers.\1.self_attn.qkv.\2"),
    (
        _LAYER + r"(?:attention\.(?:o_proj|output\.dense)|self_attn\.(?:out_proj|projection))\.(\w+)",
        r"layers.\1.self_attn.out_proj.\2",
    ),
    (_LAYER + r"(?:mlp\.fc1|intermediate\.dense)\.(\w+)", r"layers.\1.fc1.\2"),
    (_LAYER + r"mlp\.(gate|up)_proj\.(\w+)", r"layers.\1.\2.\3"),
    (_LAYER + r"(?:mlp\.fc2|mlp\.down_proj|output\.dense)\.(\w+)", r"layers.\1.fc2.\2"),
    (_LAYER + r"layer_scale([12])\.lambda1", r"layers.\1.layer_scale\2"),
    (r"(?:layernorm|post_layernorm)\.(\w+)", r"layer_norm.\1"),
]
_VISION_DROPPED = re.compile(r"embeddings\.mask_token|pooler\..*")
_TEXT_DROPPED = re.compile(r"pooler\..*|embeddings\.(position_ids|token_type_ids)")
_POSITIONS, _REGISTERS = "embeddings.position_embeddings", "embeddings.register_tokens"
_LAYER_SCALED = {"1": "self_attn.out_proj", "2": "fc2"}  # the linear layer before each LayerScale


def read_vision_encoder(name_or_path: str, image_size: int | None = None) -> StartingPoint:
    """Read a vision encoder of transformers as ours, for images of `image_size` pixels.

    The families are ViT, DeiT, MAE, MSN, DINOv2 with and without registers, CLIP and the models with its vision tower,
    BLIP and FLAVA. LayerScale folds into the linear layer before it, and the position of DeiT's distillation token into
    the token. Projections without bias get a bias of zeros; positions are resized bicubically. (Checkpoints of DeiT
    without distillation token are ViTs to transformers.)

    Raises:
        ValueError: for an architecture whose states our encoder cannot reproduce, or a checkpoint that lacks weights.
    """
    whole = _supported_config(name_or_path)
    foreign = _vision_part(whole, "config")
    state = _rename(_vision_weights(name_or_path, whole), _VISION_RENAMES, _VISION_DROPPED, name_or_path)
    _fit_embeddings(state)
    for number in range(foreign.num_hidden_layers):
        _fit_layer(state, f"layers.{number}.")
    has_gate = getattr(foreign, "use_swiglu_ffn", False)
    config = {
        "hidden_size": foreign.hidden_size,
        "intermediate_size": state["layers.0.fc2.weight"].shape[1],
        "num_hidden_layers": foreign.num_hidden_layers,
        "num_attention_heads": foreign.num_attention_heads,
        "patch_size": foreign.patch_size,
        "image_size": image_size or foreign.image_size,
        "hidden_act": "silu" if has_gate else foreign.hidden_act,
        "layer_norm_eps": foreign.layer_norm_eps,
        "pre_layer_norm": "embeddings.layer_norm.weight" in state,
        "patch_bias": "embeddings.patch_embedding.bias" in state,
        "num_register_tokens": state[_REGISTERS].shape[1] if _REGISTERS in state else 0,
        "use_swiglu_ffn": has_gate,
    }
    grid = TCLVisionConfig(**config).image_size // foreign.patch_size
    state[_POSITIONS] = resize_positions(state[_POSITIONS], grid, whole.model_type == "dinov2_with_registers")
    mean, std = _normalisation(name_or_path, whole.model_type)
    return StartingPoint(config, state, image_mean=mean, image_std=std)


def read_image_format(name_or_path: str, image_size: int | None = None) -> dict[str, Any]:
    """Arguments of an image processor for a vision encoder's images: `size`, `image_mean` and `image_std`."""
    whole = _supported_config(name_or_path)
    side = image_size or _vision_part(whole, "config").image_size
    mean, std = _normalisation(name_or_path, whole.model_type)
    return {"size": {"height": side, "width": side}, "image_mean": mean, "image_std": std}


def _supported_config(name_or_path: str) -> PreTrainedConfig:
    """The config of a model of a family whose vision encoder ours can start from."""
    foreign = AutoConfig.from_pretrained(name_or_path)
    if foreign.model_type not in _NORMALISATION:
        raise ValueError(
            f"{name_or_path} is a '{foreign.model_type}'{_why_not(foreign)}: the vision encoder starts from "
            f"{_either(_NORMALISATION)} (a pre-norm ViT with one class token and learned positions)."
        )
    return foreign


def _vision_part(whole: Any, kind: str) -> Any:
    """The vision encoder's "config" or "model" in one of images and texts; `whole` itself if it is of images alone."""
    return getattr(whole, f"vision_{kind}", getattr(whole, f"image_{kind}", whole))


def _vision_weights(name_or_path: str, config: PreTrainedConfig) -> dict[str, Tensor]:
    """The weights of a vision encoder of transformers, in its names."""
    model, info = _load_foreign(name_or_path, config, output_loading_info=True)
    tower = _vision_part(model, "model")
    prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is tower)
    missing = (key.removeprefix(prefix) for key in sorted(info["missing_keys"]) if key.startswith(prefix))
    # transformers would start a missing weight anew, and only warn.
    for key in missing:
        if not _VISION_DROPPED.fullmatch(key):
            raise ValueError(f"{name_or_path} lacks the weight '{key}': get the files of the checkpoint again.")
    return tower.state_dict()


def _fit_embeddings(state: dict[str, Tensor]) -> None:
    """Give the embeddings our shapes, and make a distillation token, which has a position, a register token."""
    positions = state[_POSITIONS].view(1, -1, state[_POSITIONS].shape[-1])
    state["embeddings.cls_token"] = state["embeddings.cls_token"].view(1, 1, -1)
    distillation = state.pop("embeddings.distillation_token", None)
    if distillation is not None:
        state[_REGISTERS] = distillation + positions[:, 1:2]
        positions = torch.cat([positions[:, :1], positions[:, 2:]], dim=1)
    state[_POSITIONS] = positions


def _fit_layer(state: dict[str, Tensor], layer: str) -> None:
    """Give a layer, whose names begin with `layer`, our linear layers: each with a bias, and none with a LayerScale."""
    for p in ("weight", "bias"):
        joint = state.pop(f"{layer}self_attn.qkv.{p}", None)
        if joint is not None:
            state |= {f"{layer}self_attn.{x}_proj.{p}": part for x, part in zip("qkv", joint.chunk(3), strict=True)}
        if f"{layer}gate.{p}" in state:
            state[f"{layer}fc1.{p}"] = torch.cat([state.pop(f"{layer}{half}.{p}") for half in ("gate", "up")])
    for x in "qkv":
        weight = state[f"{layer}self_attn.{x}_proj.weight"]
        state.setdefault(f"{layer}self_attn.{x}_proj.bias", weight.new_zeros(len(weight)))
    for number, linear in _LAYER_SCALED.items():
        scale = state.pop(f"{layer}layer_scale{number}", None)
        if scale is not None:
            state[f"{layer}{linear}.weight"] *= scale[:, None]
            state[f"{layer}{linear}.bias"] *= scale


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


def _load_foreign(name_or_path: str, config: PreTrainedConfig, **kwargs) -> Any:
    without_pooler = {"add_pooling_layer": False} if config.model_type in ("vit", "bert") else {}
    return AutoModel.from_pretrained(name_or_path, config=config, dtype=torch.float32, **without_pooler, **kwargs)


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
            vision_model: folder or Hub name of a vision encoder that `read_vision_encoder` reads, such as a ViT,
                DINOv2 or CLIP; None starts it new.
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
