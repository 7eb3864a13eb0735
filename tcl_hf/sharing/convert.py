"""Checkpoints of the original code, TCL's and ALBEF's: read into our models, and written from them.

The names of the original appear in this module only. They are one table, `original_names`, read in both directions.
"""

import itertools
import math
import os
import re
import shutil
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..models.configuration_tcl import TCLConfig
from ..models.encoders import TCLPreTrainedModel
from ..models.losses import NO_IMAGE_ID
from ..models.modeling_tcl import TCLForImageTextRetrieval, TCLForMaskedLM, TCLForPreTraining, TCLModel
from ..models.modeling_tcl_tasks import (
    TCLForQuestionAnswering,
    TCLForTextAssignment,
    TCLForVisualEntailment,
    TCLForVisualReasoning,
)
from ..models.processing_tcl import TCLProcessor
from ..models.starting_points import BERT_NAMES, LM_HEAD_NAMES

HEAD_WIDTH = 64  # of the released models' attention; the number of heads is not in the file

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
_FUSION = [
    ("encoder.layer.{n}.crossattention.self.query.{p}", "layers.{n}.cross_attn.q_proj.{p}"),
    ("encoder.layer.{n}.crossattention.self.key.{p}", "layers.{first}.cross_attn.k_proj.{p}"),
    ("encoder.layer.{n}.crossattention.self.value.{p}", "layers.{first}.cross_attn.v_proj.{p}"),
    ("encoder.layer.{n}.crossattention.output.dense.{p}", "layers.{n}.cross_attn.out_proj.{p}"),
    ("encoder.layer.{n}.crossattention.output.LayerNorm.{p}", "layers.{n}.cross_attn_layer_norm.{p}"),
]
_LINEAR = [("{p}", "{p}")]
# The original computes these anew; no weight is in them.
_RECOMPUTED = re.compile(r"text_(en|de)coder(_m)?\.(bert\.)?embeddings\.position_ids")

# What is in a checkpoint of each kind besides the encoders: a head's name with the original, ours, its table, and
# whether the teacher has a copy. Pre-training and answer decoders keep their text model under another name, "bert".
_HEADS: dict[str, list[tuple[str, str, list[tuple], bool]]] = {
    "pretrain": [
        ("text_encoder{m}.cls.predictions.", "lm_head.", LM_HEAD_NAMES, True),
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
    "question_answering": [("text_decoder{m}.cls.predictions.", "text_decoder.lm_head.", LM_HEAD_NAMES, True)],
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
        (f"text_encoder{{m}}.{bert}", "tcl.text_model.", BERT_NAMES, range(fused.stop), True),
        (f"text_encoder{{m}}.{bert}", "tcl.text_model.", _FUSION, fused, True),
    ]
    if kind == "question_answering":
        decoder = range(text.num_hidden_layers - text.fusion_layer)
        parts += [("text_decoder{m}.bert.", "text_decoder.text_model.", BERT_NAMES, decoder, True)]
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


class CheckpointError(ValueError):
    """A checkpoint that can not be converted; the message says what, where, and the remedy."""


@dataclass(frozen=True)
class Checkpoint:
    """What a file of the original holds: its weights, its settings, and what could not be checked."""

    state_dict: dict[str, Tensor]
    settings: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Read the weights of a `.pth` of the original, or of a `.safetensors` with its names; no code in it can run.

    A `.pth` is a zip archive whose checksums are compared first, since torch reads past them. Those from before
    PyTorch 1.6, and safetensors, carry none.

    Raises:
        CheckpointError: if the file is missing, damaged, of another kind, or needs more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint file {path}.")
    unchecked: tuple[str, ...] = ()
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
            unchecked = ("not checked for damage: safetensors carry no checksums",)
        else:
            unchecked = _verify_archive(path)
            # Mapped where the format allows it: an optimizer's states stay on the disk.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=not unchecked)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle raises anything
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted:
            raise CheckpointError(
                f"{path} needs '{wanted[1].rstrip('.,')}' to be read, which is more than tensors and plain values: "
                "it is refused, since such a file can run code. Load it where you trust it and save its state dict."
            ) from error
        detail = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))  # behind advice to load it unsafely
        reason = (detail[1] if detail else str(error).strip().split("\n")[0])[:160] or type(error).__name__
        raise CheckpointError(f"{path} is damaged or no checkpoint ({reason}): get it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__} and no state dict: it is not the original's.")
    settings = content.get("config")
    weights = content.get("model", content)
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        found = ", ".join(map(str, list(content)[:5]))
        raise CheckpointError(f"{path} has no weights under 'model' (it has {found}): it is not the original's.")
    weights = {str(name): value for name, value in weights.items()}
    if weights and all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
    return Checkpoint(weights, settings if isinstance(settings, dict) else {}, unchecked)


def _verify_archive(path: Path) -> tuple[str, ...]:
    """Compare the checksums of a zip archive; for another file, say that there are none."""
    with path.open("rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"
    if not is_archive:
        return ("not checked for damage: files from before PyTorch 1.6 carry no checksums",)
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged (its part '{damaged}' has another checksum): get it again.")
    return ()


def config_of(
    state_dict: dict[str, Tensor], vision_heads: int | None = None, text_heads: int | None = None, **fields
) -> TCLConfig:
    """Read the configuration of an original checkpoint from the shapes of its tensors.

    Args:
        vision_heads, text_heads: attention heads, which no shape tells; 64 wide each if None.
        fields: of `TCLConfig`, which no tensor tells.

    Raises:
        CheckpointError: if a tensor that tells a size is missing or contradicts another, or the widths do not divide
            into heads.
    """
    kind = kind_of(state_dict)
    bert = "text_encoder.bert." if kind == "pretrain" else "text_encoder."

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        if name not in state_dict:
            raise CheckpointError(f"The checkpoint has no '{name}': it is not TCL's or ALBEF's, or a part is missing.")
        found = tuple(state_dict[name].shape)
        if len(found) != dimensions:
            raise CheckpointError(f"'{name}' has the shape {found}, but {dimensions} dimensions were expected.")
        return found

    def layers(pattern: str) -> list[int]:
        matches = (re.match(pattern, name) for name in state_dict)
        return sorted({int(match[1]) for match in matches if match})

    def heads(width: int, asked: int | None, what: str) -> int:
        if asked is None and width % HEAD_WIDTH:
            raise CheckpointError(
                f"The {what} encoder is {width} wide, which are no heads of {HEAD_WIDTH} as in the released models: "
                f"say how many it has with --{what}-heads."
            )
        number = width // HEAD_WIDTH if asked is None else asked
        if number < 1 or width % number:
            raise CheckpointError(f"The {what} encoder is {width} wide, which does not divide into {number} heads.")
        return number

    width, _, patch, _ = shape("visual_encoder.patch_embed.proj.weight", 4)
    _, positions, _ = shape("visual_encoder.pos_embed", 3)
    grid = math.isqrt(positions - 1) if positions > 1 else 0
    if grid < 1 or grid * grid != positions - 1:
        raise CheckpointError(f"'visual_encoder.pos_embed' has {positions} positions, which are no square and a class.")
    vision = {
        "hidden_size": width,
        "patch_size": patch,
        "image_size": grid * patch,
        "num_hidden_layers": len(layers(r"visual_encoder\.blocks\.(\d+)\.")),
        "intermediate_size": shape("visual_encoder.blocks.0.mlp.fc1.weight", 2)[0],
        "num_attention_heads": heads(width, vision_heads, "vision"),
    }
    vocabulary, width = shape(f"{bert}embeddings.word_embeddings.weight", 2)
    all_layers = layers(re.escape(bert) + r"encoder\.layer\.(\d+)\.")
    fused = layers(re.escape(bert) + r"encoder\.layer\.(\d+)\.crossattention\.")
    if not fused or fused != list(range(fused[0], fused[-1] + 1)) or all_layers != list(range(fused[-1] + 1)):
        raise CheckpointError(
            f"The text layers {all_layers}, of which {fused or 'none'} have cross-attention, are no encoder followed "
            "by fusion layers: some are missing."
        )
    images_per_text = 2 if kind == "text_assignment" or _has_pairs_of_layers(state_dict, bert, fused) else 1
    if len(fused) % images_per_text:
        raise CheckpointError(f"The {len(fused)} fusion layers are no pairs, as a model of two images has them.")
    text = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": fused[0] + len(fused) // images_per_text,
        "fusion_layer": fused[0],
        "images_per_text": images_per_text,
        "intermediate_size": shape(f"{bert}encoder.layer.0.intermediate.dense.weight", 2)[0],
        "max_position_embeddings": shape(f"{bert}embeddings.position_embeddings.weight", 2)[0],
        "type_vocab_size": shape(f"{bert}embeddings.token_type_embeddings.weight", 2)[0],
        "num_attention_heads": heads(width, text_heads, "text"),
    }
    if "vision_proj.weight" in state_dict:
        fields["projection_dim"] = shape("vision_proj.weight", 2)[0]
    if "image_queue" in state_dict:
        fields["queue_size"] = shape("image_queue", 2)[1]
    fields["use_momentum_teacher"] = any(name.startswith("visual_encoder_m.") for name in state_dict)
    if "cls_head.2.weight" in state_dict:
        fields["num_labels"] = shape("cls_head.2.weight", 2)[0]
    try:
        return TCLConfig(vision_config=vision, text_config=text, **fields)
    except ValueError as error:
        raise CheckpointError(f"The shapes of the checkpoint contradict each other: {error}") from error


def _has_pairs_of_layers(state_dict: dict[str, Tensor], bert: str, fused: list[int]) -> bool:
    """Whether each two fusion layers share keys and values, as for two images; their names tell nothing."""
    if "cls_head.2.weight" not in state_dict:
        return False
    names = [f"{bert}encoder.layer.{n}.crossattention.self.key.weight" for n in fused]
    keys = [state_dict[name] for name in names if name in state_dict]
    return any(torch.equal(*pair) for pair in zip(keys[::2], keys[1::2], strict=False))


@dataclass
class Report:
    """What became of every tensor, and of what our model has besides: by name, why.

    Args:
        model_class: what it is a checkpoint of, with us.
        used: tensors of the original, and where they are with us.
        dropped: tensors of the original that are not.
        filled: tensors of ours that the original lacks.
        notes: what else there is to know.
    """

    model_class: str = ""
    used: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    filled: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.model_class}: {len(self.used)} tensors used"]
        for what in ("dropped", "filled"):
            rows: dict[str, str] = getattr(self, what)
            for reason, number in Counter(rows.values()).items():
                names = [name for name, own in rows.items() if own == reason]
                lines.append(f"{what}: {', '.join(names[:4])}{', ...' if number > 4 else ''} ({number}): {reason}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def from_original(state_dict: dict[str, Tensor], config: TCLConfig, report: Report | None = None) -> dict[str, Tensor]:
    """Rename the tensors of an original checkpoint to ours.

    Args:
        state_dict: the original's "model" entry.
        config: configuration of our model, with the checkpoint's sizes.
        report: takes down what becomes of each tensor.

    Returns:
        A state dict for the model of `kind_of`. Its parts are views of the original's tensors.

    Raises:
        CheckpointError: if the checkpoint has a tensor that the table does not know, or copies that differ.
    """
    report = Report() if report is None else report
    rows = {row.original: row for row in original_names(config, kind_of(state_dict))}
    ours: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    unknown = []
    for key, value in state_dict.items():
        if _RECOMPUTED.fullmatch(key):
            report.dropped[key] = "positions are counted anew"
        elif key not in rows:
            unknown.append(key)
        elif rows[key].ours[0] in ours:
            if not torch.equal(ours[rows[key].ours[0]], value):
                raise CheckpointError(
                    f"'{key}' and '{origin[rows[key].ours[0]]}' are copies of one tensor, and differ."
                )
            report.used[key] = f"{rows[key].ours[0]}, as a copy"
        else:
            for name, part in _to_ours(rows[key], value):
                ours[name], origin[name] = part, key
            report.used[key] = ", ".join(rows[key].ours)
    if unknown:
        raise CheckpointError(
            f"The checkpoint has {len(unknown)} tensors that TCL does not: {', '.join(sorted(unknown)[:5])}. "
            "Is it a TCL or ALBEF checkpoint of this config's sizes?"
        )
    return ours


def _to_ours(row: NameRow, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    if (row.transposed and value.ndim != 2) or (len(row.ours) > 1 and (not value.ndim or len(value) % len(row.ours))):
        raise CheckpointError(f"'{row.original}' has the shape {tuple(value.shape)}, which can not be.")
    if row.transposed:
        value = value.T.contiguous()
    if row.shape is not None:
        value = value.flatten()
    yield from zip(row.ours, value.chunk(len(row.ours)) if len(row.ours) > 1 else (value,), strict=True)


def to_original(model: TCLPreTrainedModel) -> dict[str, Tensor]:
    """Rename the tensors of one of our models to the original's, with the copies and positions that it keeps.

    Raises:
        CheckpointError: if the original has no such model.
    """
    kinds = [kind for kind, classes in _CLASSES.items() if type(model) in classes]
    if not kinds:
        known = ", ".join(known.__name__ for classes in _CLASSES.values() for known in classes)
        raise CheckpointError(f"The original has no {type(model).__name__}: choose a checkpoint of {known}.")
    return dict(_original_tensors(model, kinds[0]))


def _original_tensors(model: TCLPreTrainedModel, kind: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `to_original`, made one by one."""
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


_CLASSES: dict[str, tuple[type[TCLPreTrainedModel], ...]] = {
    "pretrain": (TCLForPreTraining,),
    "retrieval": (TCLForImageTextRetrieval,),
    "classification": (TCLForVisualEntailment, TCLForVisualReasoning),
    "question_answering": (TCLForQuestionAnswering,),
    "text_assignment": (TCLForTextAssignment,),
}
_SETTINGS = ("momentum", "alpha", "mlm_probability")  # the original's settings that are ours, under the same names


def load_original(
    checkpoint: Checkpoint, vision_heads: int | None = None, text_heads: int | None = None, **fields
) -> tuple[TCLPreTrainedModel, Report]:
    """Make the model that an original checkpoint is of, with its weights, and say what became of each tensor.

    Args:
        vision_heads, text_heads: see `config_of`.
        fields: of `TCLConfig`, which no tensor tells; they go before the checkpoint's own settings.

    Raises:
        CheckpointError: if tensors are missing, unknown, or contradict each other.
    """
    state_dict, report = checkpoint.state_dict, Report(notes=list(checkpoint.notes))
    known = {name: checkpoint.settings[name] for name in _SETTINGS if name in checkpoint.settings}
    if known:
        report.notes.append(f"from the file's own settings: {', '.join(f'{k}={v}' for k, v in known.items())}")
    config = config_of(state_dict, vision_heads, text_heads, **known | fields)
    kind, images_per_text = kind_of(state_dict), config.text_config.images_per_text
    model_class = _CLASSES[kind][-1 if images_per_text == 2 else 0]
    report.model_class = model_class.__name__
    weights = from_original(state_dict, config, report)
    if not config.use_momentum_teacher:
        for row in original_names(config, kind):
            if row.ours[0].startswith("queue.") and weights.pop(row.ours[0], None) is not None:
                del report.used[row.original]
                report.dropped[row.original] = "queues serve a momentum teacher, which the checkpoint lacks"

    with torch.device("meta"):  # for names and shapes
        model = model_class(config)
    expected = {name: value.shape for name, value in model.state_dict().items()}
    for name, value in weights.items():
        if value.shape != expected.get(name, value.shape):
            raise CheckpointError(
                f"The shapes contradict each other: {name} is {tuple(value.shape)}, and by the other tensors' sizes "
                f"should be {tuple(expected[name])}."
            )
    missing = expected.keys() - weights.keys() - set(model.all_tied_weights_keys)
    for name in sorted(missing):
        if name == "queue.ids" and "queue.image" in weights:
            weights[name] = torch.full(expected[name], NO_IMAGE_ID)
            report.filled[name] = "no image ids: pre-training keeps none"
        elif name.startswith("queue.") and "queue.image" not in weights:
            report.filled[name] = "new: the checkpoint has no queues"
        elif kind not in _CONTRASTS and name.removeprefix("teacher.").startswith(_OF_CONTRAST):
            report.filled[name] = "new and unused: a checkpoint of this kind compares nothing"
        else:
            raise CheckpointError(
                f"The checkpoint lacks '{name}' (by our name; {len(missing)} are missing): it is cut, or damaged."
            )
    dtype = weights["tcl.vision_model.layer_norm.weight"].dtype
    return model_class.from_pretrained(None, config=config, state_dict=weights, dtype=dtype), report


# ALBEF's objectives, as fields of TCLConfig. Its checkpoints have the names of TCL's: nothing in them tells.
ALBEF = {"cma_weight": 1.0, "imc_weight": 0.0, "lmi_weight": 0.0}
_OF_CONTRAST = ("tcl.visual_projection.", "tcl.text_projection.", "tcl.temperature")


def convert(
    source: str | os.PathLike,
    folder: str | os.PathLike,
    processor: TCLProcessor | None = None,
    vision_heads: int | None = None,
    text_heads: int | None = None,
    **fields,
) -> Report:
    """Convert an original checkpoint to a folder that `from_pretrained` opens, which appears only when it is whole.

    Args:
        source: what `read_checkpoint` reads.
        folder: to write; it must not be there, or be empty.
        processor: saved with the model, for images of the model's size.
        vision_heads, text_heads, fields: see `load_original`.

    Raises:
        CheckpointError: for a source that can not be converted, or a folder that can not be written.
    """
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise CheckpointError(f"{folder} is not empty: choose another folder.")
    model, report = load_original(read_checkpoint(source), vision_heads, text_heads, **fields)
    if processor is not None:
        vocabulary = model.config.text_config.vocab_size
        if len(processor.tokenizer) != vocabulary:
            raise CheckpointError(
                f"The checkpoint knows {vocabulary} words and the tokenizer {len(processor.tokenizer)}: name the "
                "tokenizer that it was trained with."
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
        `tensors`, how many of the source's are equal, and the means of the model's outputs on the batch, by name.

    Raises:
        CheckpointError: if a tensor differs or an output is not finite.
    """
    model, state_dict = open_saved(folder), read_checkpoint(source).state_dict
    num_equal = 0
    for name, value in _original_tensors(model, kind_of(state_dict)):
        if name in state_dict and not torch.equal(state_dict[name], value):
            raise CheckpointError(f"'{name}' of {source} and of {folder} differ: convert it again.")
        num_equal += name in state_dict
    outputs = probe(model)
    bad = [name for name, value in outputs.items() if not value.isfinite().all()]
    if bad:
        raise CheckpointError(f"{folder} gives {bad[0]} that are not finite: are the weights of {source} whole?")
    return {"tensors": num_equal} | {name: value.double().mean().item() for name, value in outputs.items()}


@torch.no_grad()
def probe(model: TCLPreTrainedModel, seed: int = 0) -> dict[str, Tensor]:
    """States and logits of a model for two random images and texts of a seed, the same for every model of its sizes."""
    generator = torch.Generator().manual_seed(seed)
    size, text = model.config.vision_config.image_size, model.config.text_config
    pixels = torch.randn(2, 3, size, size, generator=generator)
    ids = torch.randint(text.vocab_size, (2, min(8, text.max_position_embeddings)), generator=generator)
    was_training = model.training
    model.eval()
    states = model.tcl.encode_image(pixels)
    images = (states,) * text.images_per_text
    fused = model.tcl.text_model(ids, encoder_hidden_states=images).last_hidden_state
    outputs = {"image_states": states, "text_states": model.tcl.encode_text(ids), "fused_states": fused}
    for head in ("itm_head", "cls_head", "ta_head", "lm_head"):
        if hasattr(model, head):
            outputs[f"{head}_logits"] = getattr(model, head)(fused[:, 0])
    model.train(was_training)
    return outputs


def open_saved(folder: str | os.PathLike, **fields) -> TCLPreTrainedModel:
    """Open a folder as the class of ours that wrote it.

    Args:
        fields: of `TCLConfig`, in place of the folder's.

    Raises:
        CheckpointError: if there is no model of ours.
    """
    try:
        config = TCLConfig.from_pretrained(folder, **fields)
        wrote = (config.architectures or ["?"])[0]
        everything: Iterable[type] = (*itertools.chain(*_CLASSES.values()), TCLModel, TCLForMaskedLM)
        classes: dict[str, Any] = {known.__name__: known for known in everything}
        if wrote not in classes:
            raise CheckpointError(f"it holds a '{wrote}', not one of {', '.join(classes)}")
        return classes[wrote].from_pretrained(folder, config=config)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder} can not be opened: {error}") from error


def write_original(folder: str | os.PathLike, file: str | os.PathLike) -> int:
    """Write a folder of ours as a `.pth` of the original's, which appears only when it is whole.

    Returns:
        The number of its tensors.

    Raises:
        CheckpointError: if the folder can not be opened, the original has no such model, or the file is there.
    """
    if os.path.exists(file):
        raise CheckpointError(f"{file} is there already: choose another name.")
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
    """A path to write to, renamed when the block ends well; removed, with a sentence, when the disk is full."""
    unfinished = final.with_name(f"{final.name}.unfinished-{os.getpid()}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        if final.is_dir():
            final.rmdir()  # empty
        unfinished.rename(final)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch and safetensors have their own
        raise CheckpointError(f"{final} could not be written ({error}): nothing of it was kept.") from error
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
        else:
            unfinished.unlink(missing_ok=True)
