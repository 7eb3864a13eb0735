"""Foreign weights: checkpoints of the original code, and encoders of transformers to start from.

Foreign names appear in this module only. The original's are one table, `original_names`, read in both directions.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
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
from .encoders import resize_positions
from .modeling_tcl import TCLForPreTraining

# A row: the original's name, and ours. {n} is a layer, {first} the first of its copies, {p} weight or bias. Three names
# of ours are equal parts of one tensor of the original's; two rows with one name of ours are copies in the original.
_VISION = [
    ("cls_token", "embeddings.cls_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj.{p}", "embeddings.patch_embedding.{p}"),
    ("blocks.{n}.norm1.{p}", "layers.{n}.layer_norm1.{p}"),
    ("blocks.{n}.attn.qkv.{p}", *(f"layers.{{n}}.self_attn.{x}_proj.{{p}}" for x in "qkv")),
    ("blocks.{n}.attn.proj.{p}", "layers.{n}.self_attn.out_proj.{p}"),
    ("blocks.{n}.norm2.{p}", "layers.{n}.layer_norm2.{p}"),
    ("blocks.{n}.mlp.fc1.{p}", "layers.{n}.fc1.{p}"),
    ("blocks.{n}.mlp.fc2.{p}", "layers.{n}.fc2.{p}"),
    ("norm.{p}", "layer_norm.{p}"),
]
_TEXT = [
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
_FUSION = [
    ("encoder.layer.{n}.crossattention.self.query.{p}", "layers.{n}.cross_attn.q_proj.{p}"),
    ("encoder.layer.{n}.crossattention.self.key.{p}", "layers.{first}.cross_attn.k_proj.{p}"),
    ("encoder.layer.{n}.crossattention.self.value.{p}", "layers.{first}.cross_attn.v_proj.{p}"),
    ("encoder.layer.{n}.crossattention.output.dense.{p}", "layers.{n}.cross_attn.out_proj.{p}"),
    ("encoder.layer.{n}.crossattention.output.LayerNorm.{p}", "layers.{n}.cross_attn_layer_norm.{p}"),
]
_LM_HEAD = [
    ("transform.dense.{p}", "dense.{p}"),
    ("transform.LayerNorm.{p}", "layer_norm.{p}"),
    ("decoder.weight", "decoder.weight"),
    ("decoder.bias", "decoder.bias"),
    ("bias", "decoder.bias"),
]
_LINEAR = [("{p}", "{p}")]
# The original computes these anew; no weight is in them.
_RECOMPUTED = re.compile(r"text_(en|de)coder(_m)?\.(bert\.)?embeddings\.position_ids")

# What is in a checkpoint of each kind besides the encoders: a head's name with the original, ours, its table, and
# whether the teacher has a copy. Pre-training and answer decoders keep their text model under another name, "bert".
_HEADS: dict[str, list[tuple[str, str, list[tuple], bool]]] = {
    "pretrain": [
        ("text_encoder{m}.cls.predictions.", "lm_head.", _LM_HEAD, True),
        ("vision_proj{m}.", "tcl.visual_projection.", _LINEAR, True),
        ("text_proj{m}.", "tcl.text_projection.", _LINEAR, True),
        ("itm_head.", "itm_head.", _LINEAR, False),
    ],
    "retrieval": [
        ("vision_proj{m}.", "tcl.visual_projection.", _LINEAR, True),
        ("text_proj{m}.", "tcl.text_projection.", _LINEAR, True),
        ("itm_head.", "itm_head.", _LINEAR, False),
    ],
    "classification": [
        ("cls_head{m}.0.", "cls_head.0.", _LINEAR, True),
        ("cls_head{m}.2.", "cls_head.2.", _LINEAR, True),
    ],
    "question_answering": [("text_decoder{m}.cls.predictions.", "text_decoder.lm_head.", _LM_HEAD, True)],
    "text_assignment": [
        ("vision_proj.", "tcl.visual_projection.", _LINEAR, False),
        ("text_proj.", "tcl.text_projection.", _LINEAR, False),
        ("ta_head.", "ta_head.", _LINEAR, False),
    ],
}
_CONTRASTS = ("pretrain", "retrieval", "text_assignment")  # kinds with a temperature


@dataclass(frozen=True)
class NameRow:
    """One row of the table: a tensor of the original, the names of its equal parts with us, and its layout."""

    original: str
    ours: tuple[str, ...]
    transposed: bool = False
    shape: tuple[int, ...] | None = None  # the original's, where it has another number of dimensions


def kind_of(state_dict: Iterable[str]) -> str:
    """What an original checkpoint was trained for, by the names of its tensors: a key of the table of heads."""
    parts = {part for name in state_dict for part in name.split(".")[:2]}
    for kind, sign in (
        ("question_answering", "text_decoder"),
        ("pretrain", "bert"),
        ("classification", "cls_head"),
        ("text_assignment", "ta_head"),
    ):
        if parts & {sign, f"{sign}_m"}:
            return kind
    return "retrieval"


def original_names(config: TCLConfig, kind: str) -> list[NameRow]:
    """The table between the original's names and ours, for a checkpoint with all that its kind can have.

    Args:
        config: of our model; with `images_per_text=2` the original has two copies of each fusion layer, and of their
            keys and values.
        kind: see `kind_of`.
    """
    text = config.text_config
    fused = range(text.fusion_layer, text.fusion_layer + text.num_fusion_layers)
    bert = "bert." if kind == "pretrain" else ""
    parts: list[tuple[str, str, list[tuple], Iterable[int], bool]] = [
        ("visual_encoder{m}.", "tcl.vision_model.", _VISION, range(config.vision_config.num_hidden_layers), True),
        (f"text_encoder{{m}}.{bert}", "tcl.text_model.", _TEXT, range(fused.stop), True),
        (f"text_encoder{{m}}.{bert}", "tcl.text_model.", _FUSION, fused, True),
    ]
    if kind == "question_answering":
        decoder = range(text.num_hidden_layers - text.fusion_layer)
        parts += [("text_decoder{m}.bert.", "text_decoder.text_model.", _TEXT, decoder, True)]
        parts += [("text_decoder{m}.bert.", "text_decoder.text_model.", _FUSION, decoder, True)]
    parts += [(original, ours, table, (), taught) for original, ours, table, taught in _HEADS[kind]]
    rows = []
    for original_prefix, our_prefix, names, layers, taught in parts:
        for suffix, owner in (("", ""), ("_m", "teacher.")) if taught and kind != "text_assignment" else (("", ""),):
            for original, *targets in names:
                for n in layers if "{n}" in original else (0,):
                    copies = text.images_per_text if our_prefix == "tcl.text_model." else 1
                    first = n - (n - text.fusion_layer) % copies
                    for p in ("weight", "bias") if "{p}" in original else ("",):
                        rows.append(
                            NameRow(
                                original_prefix.format(m=suffix) + original.format(n=n, p=p),
                                tuple(owner + our_prefix + target.format(n=n, first=first, p=p) for target in targets),
                            )
                        )
    if kind in _CONTRASTS:
        rows.append(NameRow("temp", ("tcl.temperature",)))
    if kind in ("pretrain", "retrieval"):
        rows += [
            NameRow("image_queue", ("queue.image",), transposed=True),
            NameRow("text_queue", ("queue.text",), transposed=True),
            NameRow("queue_ptr", ("queue.cursor",)),
        ]
    if kind == "retrieval":
        rows.append(NameRow("idx_queue", ("queue.ids",), shape=(1, -1)))
    return rows


def from_original(state_dict: dict[str, Tensor], config: TCLConfig) -> dict[str, Tensor]:
    """Rename the tensors of an original checkpoint to ours.

    Args:
        state_dict: the original's "model" entry.
        config: configuration of our model, with the checkpoint's sizes.

    Returns:
        A state dict for the head that `kind_of` names.

    Raises:
        KeyError: if the checkpoint has a tensor that the table does not know.
    """
    state_dict = {key: value for key, value in state_dict.items() if not _RECOMPUTED.fullmatch(key)}
    rows = {row.original: row for row in original_names(config, kind_of(state_dict))}
    unknown = sorted(state_dict.keys() - rows.keys())
    if unknown:
        raise KeyError(
            f"The checkpoint has {len(unknown)} tensors that TCL does not: {', '.join(unknown[:5])}. "
            "Is it a TCL or ALBEF checkpoint of this config's sizes?"
        )
    return {name: part for key, value in state_dict.items() for name, part in _to_ours(rows[key], value)}


def _to_ours(row: NameRow, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    if row.transposed:
        value = value.T.contiguous()
    if row.shape is not None:
        value = value.flatten()
    yield from zip(row.ours, value.chunk(len(row.ours)) if len(row.ours) > 1 else (value,), strict=True)


@dataclass(frozen=True)
class StartingPoint:
    """Encoders to start from, in our names.

    Args:
        config: fields of our config for the part.
        state_dict: its weights, in the names of `TCLVisionModel` or `TCLTextModel`.
        lm_head: those of the language-model head, where the checkpoint has one.
        image_mean, image_std: what the vision encoder's images were normalised with.
    """

    config: dict[str, Any]
    state_dict: dict[str, Tensor]
    lm_head: dict[str, Tensor] | None = None
    image_mean: tuple[float, ...] = tuple(OPENAI_CLIP_MEAN)
    image_std: tuple[float, ...] = tuple(OPENAI_CLIP_STD)


# How the images of each family were normalised.
_NORMALISATION = {
    "vit": (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD),
    "dinov2": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
}

# transformers renames its layers between versions: both spellings are read.
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
    """Read a ViT or DINOv2 of transformers as our vision encoder, for images of `image_size` pixels.

    LayerScale folds into the linear layer before it; positions are resized bicubically. (Checkpoints of DeiT
    without distillation token are ViTs to transformers.)

    Raises:
        ValueError: for an architecture whose states our encoder can not reproduce.
    """
    foreign = AutoConfig.from_pretrained(name_or_path)
    if foreign.model_type not in _NORMALISATION:
        raise ValueError(
            f"{name_or_path} is a '{foreign.model_type}': the vision encoder starts from 'vit' or 'dinov2' "
            "(a pre-norm ViT with one class token and learned positions)."
        )
    if getattr(foreign, "use_swiglu_ffn", False) or not getattr(foreign, "qkv_bias", True):
        raise ValueError(
            f"{name_or_path} has gated feed-forward layers or no query biases, which our vision encoder does not: "
            "choose a model with use_swiglu_ffn=false and qkv_bias=true."
        )
    patch_size = foreign.patch_size
    config = {
        "hidden_size": foreign.hidden_size,
        "intermediate_size": getattr(foreign, "intermediate_size", None)
        or foreign.hidden_size * int(foreign.mlp_ratio),
        "num_hidden_layers": foreign.num_hidden_layers,
        "num_attention_heads": foreign.num_attention_heads,
        "patch_size": patch_size,
        "image_size": image_size or foreign.image_size,
        "hidden_act": foreign.hidden_act,
        "layer_norm_eps": foreign.layer_norm_eps,
    }
    model = _load_foreign(name_or_path, foreign, add_pooling_layer=False)
    state = _rename(model.state_dict(), _VISION_RENAMES, _VISION_DROPPED, name_or_path)
    for key in [key for key in state if ".layer_scale" in key]:
        layer, number = key.rsplit(".layer_scale", 1)
        scale = state.pop(key)
        state[f"{layer}.{_LAYER_SCALED[number]}.weight"] *= scale[:, None]
        state[f"{layer}.{_LAYER_SCALED[number]}.bias"] *= scale
    grid = TCLVisionConfig(**config).image_size // patch_size
    positions = "embeddings.position_embeddings"
    state[positions] = resize_positions(state[positions], grid)
    mean, std = _normalisation(name_or_path, foreign.model_type)
    return StartingPoint(config, state, image_mean=mean, image_std=std)


def read_text_encoder(name_or_path: str, fusion_layer: int | None = None, num_fusion_layers: int = 6) -> StartingPoint:
    """Read a BERT of transformers as our text model, with its language-model head if it has one.

    Args:
        fusion_layer: how many of its layers encode the text; all of them if None.
        num_fusion_layers: layers that fuse. They take what BERT layers are left; the others, and all
            cross-attention, start new.

    Raises:
        ValueError: if it is not a BERT, or one with other than absolute positions.
    """
    foreign = AutoConfig.from_pretrained(name_or_path)
    if foreign.model_type != "bert" or getattr(foreign, "position_embedding_type", "absolute") != "absolute":
        raise ValueError(
            f"{name_or_path} is a '{foreign.model_type}': the text model starts from a 'bert' with absolute positions."
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
        whole = _load_foreign(name_or_path, foreign, add_pooling_layer=False).state_dict()
    head = {k.removeprefix("cls.predictions."): v for k, v in whole.items() if k.startswith("cls.predictions.")}
    encoder = {k.removeprefix("bert."): v for k, v in whole.items() if not k.startswith("cls.")}
    state = _rename(encoder, _as_renames(_TEXT), _TEXT_DROPPED, name_or_path)
    lm_head = _rename(head, _as_renames(_LM_HEAD), _TEXT_DROPPED, name_or_path)
    beyond = tuple(f"layers.{n}." for n in range(num_layers, foreign.num_hidden_layers))
    state = {key: value for key, value in state.items() if not key.startswith(beyond)}
    return StartingPoint(config, state, lm_head or None)


def start_from_encoders(
    model: TCLForPreTraining, vision: StartingPoint | None = None, text: StartingPoint | None = None
) -> TCLForPreTraining:
    """Give a new model the weights of its starting points, student and teacher alike; the rest stays as drawn."""
    for part, encoder in ((vision, model.tcl.vision_model), (text, model.tcl.text_model)):
        if part is not None:
            result = encoder.load_state_dict(part.state_dict, strict=False)
            if result.unexpected_keys:
                raise ValueError(f"The model has no place for {', '.join(result.unexpected_keys[:5])}.")
    if text is not None and text.lm_head:
        model.lm_head.load_state_dict(text.lm_head)
    if model.teacher is not None:
        model.teacher.copy_from(model)
    return model


def _normalisation(name_or_path: str, model_type: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation that the encoder's images had: what stands beside it, or its family's."""
    mean, std = _NORMALISATION[model_type]
    try:
        beside, _ = ImageProcessingMixin.get_image_processor_dict(name_or_path)
    except OSError:
        beside = {}
    return tuple(beside.get("image_mean", mean)), tuple(beside.get("image_std", std))


def _load_foreign(name_or_path: str, config: PreTrainedConfig, **kwargs) -> PreTrainedModel:
    if config.model_type == "dinov2":
        kwargs.pop("add_pooling_layer", None)
    return AutoModel.from_pretrained(name_or_path, config=config, dtype=torch.float32, **kwargs)


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
            raise ValueError(f"{source} has a weight '{key}' that our encoders do not: it can not be a starting point.")
    return renamed


def _as_renames(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, str]]:
    """Rows of the original's table as patterns: BERT in transformers has the same names."""
    renames = []
    for original, ours in rows:
        ours = ours.replace("{first}", "{n}")  # one copy of each layer
        pattern = re.escape(original).replace(r"\{n\}", r"(\d+)").replace(r"\{p\}", r"(weight|bias)")
        for group, placeholder in enumerate(re.findall(r"\{[np]\}", ours), start=1):
            ours = ours.replace(placeholder, f"\\{group}")
        renames.append((pattern, ours))
    return renames
