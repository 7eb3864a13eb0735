"""Entailment and reasoning: the accuracy of a head with classes."""

import logging
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ..data.collators import TCLTaskCollator
from ..models.encoders import eval_mode
from ..models.processing_tcl import MAX_TOKENS, TCLProcessor
from .metrics import accuracy, check_finite, consistency, is_pair_id, majority_share, per_label_scores
from .shares import Evaluation, collated_batches, gather_results

logger = logging.getLogger(__name__)


@torch.no_grad()
def evaluate_classes(
    model: PreTrainedModel,
    processor: TCLProcessor,
    records: Sequence[dict],
    batch_size: int = 64,
    max_tokens: int = MAX_TOKENS,
    progress: bool = False,
) -> Evaluation:
    """Accuracy in percent of a head with classes, the share of the most frequent label, and scores by label.

    Records with a `pair_id` of NLVR2's form also give its consistency. Each prediction has `image_id`, `label` and
    `scores`.

    Args:
        records: an image or two, a caption and a label each.
        batch_size: texts in a forward.
        max_tokens: longest text, [CLS] included.
        progress: show a progress bar.

    Raises:
        ValueError: if a record cannot be read, its label is not one of the model's, or a logit is not finite.
    """
    names = [model.config.id2label[number] for number in range(model.config.num_labels)]
    collator = TCLTaskCollator(processor, max_tokens=max_tokens, label2id=model.config.label2id)
    results: list[tuple[list[float], int]] = []  # probabilities and label of each record
    with eval_mode(model):
        for batch in collated_batches(collator, records, batch_size, model.device, progress):
            labels = batch.pop("labels")
            results += zip(model(**batch).logits.float().softmax(-1).tolist(), labels.tolist(), strict=True)
    probabilities, numbers = zip(*gather_results(results, len(records)), strict=True)
    check_finite(torch.tensor(probabilities), "probabilities of labels", lambda row: records[row]["image_id"])
    predicted, true = torch.tensor(probabilities).argmax(-1), torch.tensor(numbers)
    metrics = {"accuracy": accuracy(predicted, true), "most_frequent_label": majority_share(true)}
    metrics |= per_label_scores(predicted, true, names)
    pair_ids = [pair_id for record in records if (pair_id := record.get("pair_id"))]
    if model.images_per_text > 1 and len(pair_ids) == len(records):
        unknown = [pair_id for pair_id in pair_ids if not is_pair_id(pair_id)]
        if unknown:
            logger.warning(
                "The consistency is left out, because %d identifiers are not of NLVR2's form split-set-pair-sentence, "
                "the first of them %r.",
                len(unknown),
                unknown[0],
            )
        else:
            metrics["consistency"] = consistency(predicted, true, pair_ids)
    predictions = [
        {"image_id": record["image_id"], "label": names[number], "scores": dict(zip(names, scores, strict=True))}
        for record, number, scores in zip(records, predicted.tolist(), probabilities, strict=True)
    ]
    return Evaluation(metrics, predictions)
