"""The parts of a run that its arguments describe: data, model, processor, collator."""

import glob
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset

from ..data.augmentation import TCLAugmentation
from ..data.collators import TCLPreTrainingCollator
from ..data.images import why_unusable
from ..data.pairs import DataError, load_pairs
from ..data.streams import MixedStreams
from ..data.tokenizer import train_tokenizer
from ..models.configuration_tcl import TCLConfig
from ..models.encoders import TCLPreTrainedModel
from ..models.image_processing_tcl import TCLImageProcessorPil
from ..models.modeling_tcl import TCLForPreTraining
from ..models.processing_tcl import TCLProcessor
from ..models.starting_points import read_text_encoder, read_vision_encoder
from ..models.tokenization_tcl import TCLTokenizer
from .arguments import DataArguments, ModelArguments, RecipeError

logger = logging.getLogger(__name__)


_SIZES = ("vision_config", "text_config", "projection_dim")  # fields of a config that a checkpoint decides
_DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout")  # but not these, within them


def load_data(args: DataArguments) -> tuple[Dataset | IterableDataset | MixedStreams, list[dict]]:
    """Load the pairs to train on, and the records to evaluate on.

    Without validation data of its own a run evaluates on the validation split of its data. Where there is none, it
    does not evaluate, and says so.
    """
    columns: dict[str, Any] = {
        "image_root": args.image_root,
        "image_column": args.image_column,
        "caption_column": args.caption_column,
    }
    pairs: Dataset | IterableDataset | MixedStreams
    if args.data_weights:
        if not args.streaming:
            raise DataError("data_weights mixes streams: set streaming to true, or leave the weights out.")
        streams = [load_pairs(source, args.split, streaming=True, **columns) for source in args.data]
        pairs = MixedStreams(streams, args.data_weights)
    else:
        pairs = load_pairs(args.data, args.split, streaming=args.streaming, **columns)
    if not args.validation_split:
        return pairs, []
    if not args.validation_data and any(os.path.isfile(source) or glob.has_magic(source) for source in args.data):
        logger.warning("Files have no validation split: nothing is evaluated unless you name --validation_data.")
        return pairs, []
    try:
        held_out = load_pairs(args.validation_data or args.data, args.validation_split, **columns)
    except DataError as error:
        if args.validation_data:
            raise
        logger.warning("Nothing is evaluated: %s", error)
        return pairs, []
    records = []
    for record in held_out.take(args.eval_images):
        reason = why_unusable(record)
        if reason is None:
            records.append(record)
        else:
            logger.warning("Not evaluated: %s (%s)", record.get("image_id"), reason)
    if not records:
        logger.warning("Nothing is evaluated: no sample of the split '%s' can be used.", args.validation_split)
    return pairs, records


def open_model(
    args: ModelArguments, model_class: type[TCLPreTrainedModel], to_train: bool = True
) -> tuple[Any, TCLProcessor]:
    """Open a TCL checkpoint as a head of `model_class`, with its processor; with a teacher if it is to be trained.

    The checkpoint keeps the sizes of its encoders; `config` has the last word on the other fields, `image_size` on the
    size of images.

    Raises:
        RecipeError: if there is no checkpoint, or the arguments contradict it.
    """
    if args.model is None:
        raise RecipeError("No checkpoint was named: say with --model what to start from.")
    if args.vision_model or args.text_model or args.tokenizer:
        raise RecipeError("--model brings its encoders and tokenizer: leave out the others.")
    try:
        processor = TCLProcessor.from_pretrained(args.model)
        fields = {name: value for name, value in args.config_fields.items() if name not in _SIZES}
        # A checkpoint for inference has no teacher, but whoever trains wants one; who evaluates does not.
        fields["use_momentum_teacher"] = to_train and fields.get("use_momentum_teacher", True)
        config = TCLConfig.from_pretrained(args.model, image_size=args.image_size, **fields)
        for part, known in (("vision_config", config.vision_config), ("text_config", config.text_config)):
            for name, value in args.config_fields.get(part, {}).items():
                if name in _DROPOUT:
                    setattr(known, name, value)
        config.text_config.bos_token_id = processor.tokenizer.cls_token_id
        config.text_config.eos_token_id = processor.tokenizer.sep_token_id
        processor.image_size = config.vision_config.image_size
        return model_class.from_pretrained(args.model, config=config), processor
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        raise RecipeError(f"{args.model} can not be opened: {error}") from error


def build_model(args: ModelArguments, captions: Iterable[str]) -> tuple[TCLForPreTraining, TCLProcessor]:
    """Make the model to pre-train and its processor.

    The model goes on from a TCL checkpoint (see `open_model`), starts from encoders of transformers, or is new;
    `config` has the last word on its fields, `image_size` on the size. The normalisation of images follows the vision
    encoder.

    Args:
        captions: texts to train a tokenizer on, where none is given; read only then.

    Raises:
        RecipeError: if the arguments contradict each other or the parts do not fit.
    """
    if args.model is not None:
        return open_model(args, TCLForPreTraining)
    try:
        vision = read_vision_encoder(args.vision_model, args.image_size) if args.vision_model else None
        text = None
        if args.text_model:
            text = read_text_encoder(args.text_model, args.fusion_layer, args.num_fusion_layers)
        tokenizer = _tokenizer(args, captions)
        fields = dict(args.config_fields)
        known = text.config["vocab_size"] if text else 0
        ids = {"vocab_size": max(len(tokenizer), known), "pad_token_id": tokenizer.pad_token_id}
        ids |= {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
        fields["text_config"] = fields.get("text_config", {}) | ids
        model = TCLForPreTraining.from_vision_text_pretrained(vision, text, image_size=args.image_size, **fields)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        raise RecipeError(str(error)) from error
    size = model.config.vision_config.image_size
    image_processor = TCLImageProcessorPil(size={"height": size, "width": size})
    if vision is not None:
        image_processor.image_mean, image_processor.image_std = vision.image_mean, vision.image_std
    image_processor.image_mean = args.image_mean or image_processor.image_mean
    image_processor.image_std = args.image_std or image_processor.image_std
    return model, TCLProcessor(image_processor, tokenizer)


def name_of(sources: Sequence[str]) -> str:
    """What data is called in results: the first source's name without folder, ending and split."""
    stem = Path(sources[0].rstrip("/")).name.split(".")[0].split("*")[0] if sources else "?"
    words = [word for word in stem.replace("-", "_").split("_") if word not in ("train", "val", "dev", "test")]
    return "_".join(word for word in words if word) or stem


def build_augmentation(data: DataArguments, processor: TCLProcessor) -> TCLAugmentation:
    """Make the augmentation that the arguments describe."""
    pixels = processor.image_processor
    return TCLAugmentation(
        pixels.size["height"],
        pixels.image_mean,
        pixels.image_std,
        crop_scale=tuple(data.crop_scale),
        color_jitter=data.color_jitter,
        flip=data.flip,
        num_operations=data.num_operations,
    )


def build_collator(data: DataArguments, config: TCLConfig, processor: TCLProcessor) -> TCLPreTrainingCollator:
    """Make the collator of a pre-training run."""
    return TCLPreTrainingCollator(
        processor,
        build_augmentation(data, processor),
        data.max_tokens,
        two_views=data.two_views,
        mlm_probability=config.mlm_probability if config.mlm_weight else 0.0,
    )


def _tokenizer(args: ModelArguments, captions: Iterable[str]) -> TCLTokenizer:
    """The tokenizer that was named, that of the text model, or a new one."""
    source = args.tokenizer or args.text_model
    if source is None:
        return train_tokenizer(captions, args.vocab_size)
    if os.path.isfile(source):
        return TCLTokenizer(source)
    return TCLTokenizer.from_pretrained(source)
