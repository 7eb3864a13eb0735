"""The names of the original's tensors beside ours: one table, which is read in both directions.

The names of the original appear in this module, in `original_files` and in `convert` only.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..models.configuration_tcl import TCLConfig
from ..models.modeling_tcl import TCLForImageTextRetrieval, TCLForPreTraining, TCLTaughtModel
from ..models.modeling_tcl_tasks import (
    TCLForQuestionAnswering,
    TCLForTextAssignment,
    TCLForVisualEntailment,
    TCLForVisualReasoning,
)
from ..models.starting_points import BERT_NAMES, LM_HEAD_NAMES

# In each row, the original's name comes first and ours follow. {n} is the number of a layer, {first} the first of its
# copies, and {p} weight or bias. Three names of ours are equal parts of one tensor of the original. Where two rows
# share a name of ours, the original keeps two copies of one tensor.
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
_FUSION = [
    ("encoder.layer.{n}.crossattention.self.query.{p}", "layers.{n}.cross_attn.q_proj.{p}"),
    ("encoder.layer.{n}.crossattention.self.key.{p}", "layers.{first}.cross_attn.k_proj.{p}"),
    ("encoder.layer.{n}.crossattention.self.value.{p}", "layers.{first}.cross_attn.v_proj.{p}"),
    ("encoder.layer.{n}.crossattention.output.dense.{p}", "layers.{n}.cross_attn.out_proj.{p}"),
    ("encoder.layer.{n}.crossattention.output.LayerNorm.{p}", "layers.{n}.cross_attn_layer_norm.{p}"),
]
_LINEAR = [("{p}", "{p}")]
# The original stores these numbers, which our models compute.
POSITION_IDS = re.compile(r"text_(en|de)coder(_m)?\.(bert\.)?embeddings\.position_ids")


@dataclass(frozen=True)
class NameRow:
    """One row of the table: a tensor of the original, and where our model has it.

    Args:
        original: its name in the original.
        ours: the names of its equal parts in our model.
        transposed: whether our model holds its transpose.
        shape: its shape in the original, where ours has another number of dimensions.
    """

    original: str
    ours: tuple[str, ...]
    transposed: bool = False
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class _Part:
    """A module whose tensors one list of names covers.

    Args:
        original: prefix of its names in the original; {m} is empty for the student and "_m" for the teacher.
        ours: prefix of its names in our model.
        names: the names after the prefixes.
        layers: the numbers of its layers.
        in_teacher: whether the teacher has a copy.
    """

    original: str
    ours: str
    names: list[tuple]
    layers: Iterable[int] = ()
    in_teacher: bool = True


@dataclass(frozen=True)
class _Kind:
    """The checkpoints that the original's code for one task saves.

    Args:
        model_classes: our classes that hold them; the last one reads two images per text if there are two.
        sign: a part of tensors' names that only this kind has; None for the kind that remains.
        heads: the modules besides the encoders.
        others: the tensors besides modules.
        text_encoder: prefix of the text encoder's names.
    """

    model_classes: tuple[type[TCLTaughtModel], ...]
    sign: str | None
    heads: tuple[_Part, ...]
    others: tuple[NameRow, ...] = ()
    text_encoder: str = "text_encoder{m}."


_PROJECTIONS = (
    _Part("vision_proj{m}.", "tcl.visual_projection.", _LINEAR),
    _Part("text_proj{m}.", "tcl.text_projection.", _LINEAR),
)
_MATCHING = _Part("itm_head.", "itm_head.", _LINEAR, in_teacher=False)
_TEMPERATURE = NameRow("temp", ("tcl.temperature",))
_QUEUES = (
    NameRow("image_queue", ("queue.image",), transposed=True),
    NameRow("text_queue", ("queue.text",), transposed=True),
    NameRow("queue_ptr", ("queue.cursor",)),
)
# A checkpoint is of the first kind whose sign it has. Answer decoders come first, because their text model is called
# "bert" too.
KINDS = {
    "question_answering": _Kind(
        (TCLForQuestionAnswering,),
        "text_decoder",
        (_Part("text_decoder{m}.cls.predictions.", "text_decoder.lm_head.", LM_HEAD_NAMES),),
    ),
    "pretrain": _Kind(
        (TCLForPreTraining,),
        "bert",
        (_Part("text_encoder{m}.cls.predictions.", "lm_head.", LM_HEAD_NAMES), *_PROJECTIONS, _MATCHING),
        (_TEMPERATURE, *_QUEUES),
        text_encoder="text_encoder{m}.bert.",
    ),
    "classification": _Kind(
        (TCLForVisualEntailment, TCLForVisualReasoning),
        "cls_head",
        (_Part("cls_head{m}.0.", "cls_head.0.", _LINEAR), _Part("cls_head{m}.2.", "cls_head.2.", _LINEAR)),
    ),
    "text_assignment": _Kind(
        (TCLForTextAssignment,), "ta_head", (*_PROJECTIONS, _Part("ta_head.", "ta_head.", _LINEAR)), (_TEMPERATURE,)
    ),
    "retrieval": _Kind(
        (TCLForImageTextRetrieval,),
        None,
        (*_PROJECTIONS, _MATCHING),
        (_TEMPERATURE, *_QUEUES, NameRow("idx_queue", ("queue.ids",), shape=(1, -1))),
    ),
}


def kind_of(names: Iterable[str]) -> str:
    """Return the kind of an original checkpoint, a key of `KINDS`, by the names of its tensors."""
    parts = {part for name in names for part in name.split(".")[:2]}
    return next(name for name, kind in KINDS.items() if kind.sign is None or parts & {kind.sign, f"{kind.sign}_m"})


def model_class_of(kind: str, config: TCLConfig) -> type[TCLTaughtModel]:
    """Return our class for checkpoints of a kind."""
    return KINDS[kind].model_classes[-1 if config.text_config.images_per_text == 2 else 0]


def original_names(config: TCLConfig, kind: str) -> list[NameRow]:
    """Return the table of all tensors that a checkpoint of a kind can have.

    Args:
        config: configuration of our model. With `images_per_text=2`, the original has two copies of each fusion layer,
            and of its keys and values.
        kind: a key of `KINDS`.
    """
    text = config.text_config
    rows: list[NameRow] = []
    has_teacher = all(model_class.has_teacher for model_class in KINDS[kind].model_classes)
    for part in _parts(config, kind):
        copies = text.images_per_text if part.ours == "tcl.text_model." else 1
        for suffix, owner in (("", ""), ("_m", "teacher."))[: 2 if part.in_teacher and has_teacher else 1]:
            for original, *ours in part.names:
                for n in part.layers if "{n}" in original else (0,):
                    first = n - (n - text.fusion_layer) % copies
                    for p in ("weight", "bias") if "{p}" in original else ("",):
                        fields = {"m": suffix, "n": n, "first": first, "p": p}
                        names = tuple(f"{owner}{part.ours}{name}".format(**fields) for name in ours)
                        rows.append(NameRow(f"{part.original}{original}".format(**fields), names))
    return [*rows, *KINDS[kind].others]


def _parts(config: TCLConfig, kind: str) -> list[_Part]:
    """Return the modules of a checkpoint of a kind: encoders, decoder and heads."""
    text, text_encoder = config.text_config, KINDS[kind].text_encoder
    fused = range(text.fusion_layer, text.fusion_layer + text.num_fusion_layers)
    parts = [
        _Part("visual_encoder{m}.", "tcl.vision_model.", _VISION, range(config.vision_config.num_hidden_layers)),
        _Part(text_encoder, "tcl.text_model.", BERT_NAMES, range(fused.stop)),
        _Part(text_encoder, "tcl.text_model.", _FUSION, fused),
    ]
    if kind == "question_answering":
        layers = range(text.num_hidden_layers - text.fusion_layer)
        parts.append(_Part("text_decoder{m}.bert.", "text_decoder.text_model.", BERT_NAMES, layers))
        parts.append(_Part("text_decoder{m}.bert.", "text_decoder.text_model.", _FUSION, layers))
    return [*parts, *KINDS[kind].heads]
