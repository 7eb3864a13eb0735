"""The baselines of a report: linear maps, fitted to the training data of the run."""

import random
from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from ..data.kept_states import SamplesWithStates
from ..evaluation.baselines import (
    FrozenFeatures,
    frozen_features,
    linear_on_features,
    ridge_baseline,
    ridge_on_features,
)
from ..training.agreement import processes
from ..training.arguments import TCLTrainingArguments
from ..training.precision import in_precision_of
from .arguments import ModelArguments, PretrainingDataArguments
from .build import build_model

RIDGE_ON_PIXELS = "ridge on coarse pixels"
RIDGE_ON_FEATURES = "ridge on the same frozen features"
LINEAR_ON_FEATURES = "linear head on the same frozen features"


def measure_baselines(
    data_args: PretrainingDataArguments,
    model_args: ModelArguments,
    args: TCLTrainingArguments,
    pairs: Any,
    records: Sequence[dict],
) -> dict[str, dict[str, float]]:
    """The recalls in percent of each baseline that applies, by its name in the table of results.

    Ridge regression on pixels applies to the embedded pictures. Those on frozen features apply to a run that started
    from a named vision encoder and a named text encoder: they read the features of these two, as they were before
    training, of at most `baseline_samples` samples. They are computed in the precision of the run, or of the states
    that are kept. Nothing applies to a stream.

    Args:
        args: the run's, which name its precision.
        pairs: the data that the run trained on, perhaps with kept states.
        records: the held-out data, likewise.
    """
    found: dict[str, dict[str, float]] = {}
    if not data_args.baselines or not isinstance(pairs, Dataset | SamplesWithStates):
        return found
    if data_args.data == ["openmoji"]:
        found[RIDGE_ON_PIXELS] = ridge_baseline(list(pairs), list(records))
    if model_args.vision_model and model_args.text_model:
        model, processor = build_model(model_args, ())  # read anew, because training has changed the run's encoders
        encoders = model.tcl.to(processes().device)
        options: dict[str, Any] = {"batch_size": data_args.per_device_eval_batch_size, "progress": True}
        chosen: Any = some_of(pairs, data_args.baseline_samples)
        with in_precision_of(args):  # but not the fits, in which rounded numbers would add up
            train = frozen_features(encoders, processor, chosen, max_tokens=data_args.max_tokens, **options)
            held_out = frozen_features(encoders, processor, records, data_args.eval_captions, **options)
        number = f" ({len(chosen):,} samples)" if len(chosen) < len(pairs) else ""
        found |= {f"{name}{number}": metrics for name, metrics in baselines_on_features(train, held_out).items()}
    return found


def some_of(pairs: Dataset | SamplesWithStates, number: int) -> Dataset | SamplesWithStates:
    """At most this many samples, drawn with a fixed seed, in the order of the data."""
    if len(pairs) <= number:
        return pairs
    return pairs.select(sorted(random.Random(0).sample(range(len(pairs)), number)))


def baselines_on_features(train: FrozenFeatures, held_out: FrozenFeatures) -> dict[str, dict[str, float]]:
    """The recalls in percent of ridge regression and of a linear head on frozen features."""
    data = (train.image, train.text, held_out.image, held_out.text, held_out.image_of_text)
    return {
        RIDGE_ON_FEATURES: ridge_on_features(*data, train_image_of_text=train.image_of_text),
        LINEAR_ON_FEATURES: linear_on_features(*data, train_image_of_text=train.image_of_text),
    }
