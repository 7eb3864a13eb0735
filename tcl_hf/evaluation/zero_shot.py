"""Zero-shot classification: an image gets the class whose texts have the features that are most similar to its own."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from ..data.images import open_image
from ..models.encoders import TCLPreTrainedModel, eval_mode
from ..models.losses import similarity
from ..models.processing_tcl import MAX_TOKENS, TCLProcessor
from .metrics import accuracy, check_finite, majority_share, mean_per_class_accuracy, top_k_accuracy
from .shares import Evaluation, gather_results, in_batches, process_share

PLACE = "{}"  # where a template takes the name of a class
TEMPLATES = ("{}", "a photo of a {}.", "a picture of a {}.", "an image of a {}.")
NUM_BEST = 5  # classes of an image that are counted by `top5` and listed with its prediction


def check_templates(templates: Sequence[str]) -> None:
    """Check that there are templates, and that each takes the name of a class.

    Raises:
        ValueError: otherwise; it names the template.
    """
    if not templates:
        raise ValueError(f"There are no templates: give at least one, such as '{PLACE}'.")
    for template in templates:
        if PLACE not in template:
            raise ValueError(f"the template '{template}' has no {PLACE}: write it where the name of a class belongs.")


def fill_templates(templates: Iterable[str], name: str) -> list[str]:
    """Return the texts about a class: each template with the name of the class in place of `{}`."""
    return [template.replace(PLACE, name) for template in templates]


def class_features(text_features: Tensor) -> Tensor:
    """Return one normalised feature for each class (C, D): the mean of the normalised features of its texts (C, T, D).

    This is the ensemble of prompts of CLIP (arXiv:2103.00020, section 3.1.4).
    """
    return F.normalize(text_features.float().mean(1), dim=-1)


def best_classes(images: Tensor, classes: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """Return the most probable classes of each image, best first, at most `NUM_BEST`.

    Args:
        images: normalised features (N, D).
        classes: normalised features (C, D).
        temperature: the similarities are divided by it, and their softmax over all classes are the probabilities.

    Returns:
        The probabilities and the numbers of the classes, both (N, min(C, `NUM_BEST`)).
    """
    probabilities = similarity(images, classes, temperature).softmax(-1)  # (N, C)
    best = probabilities.topk(min(NUM_BEST, len(classes)), dim=-1)
    return best.values, best.indices


def classification_metrics(ranked: Tensor, labels: Tensor, num_classes: int) -> dict[str, float]:
    """Return metrics in percent: `top1`, `top5`, `mean_per_class` and `most_frequent_label`.

    `top5` is left out if there are no more than five classes, because it would be 100. `mean_per_class` is the mean of
    the accuracies within the classes that occur, and `most_frequent_label` the share of the label that occurs most
    often.

    Args:
        ranked: the numbers of the most probable classes, best first (N, min(num_classes, `NUM_BEST`)).
        labels: the numbers of the true classes (N,).
        num_classes: number of classes to choose from.
    """
    metrics = {"top1": accuracy(ranked[:, 0], labels)}
    if num_classes > NUM_BEST:
        metrics["top5"] = top_k_accuracy(ranked, labels)
    metrics["mean_per_class"] = mean_per_class_accuracy(ranked[:, 0], labels)
    metrics["most_frequent_label"] = majority_share(labels)
    return metrics


@torch.no_grad()
def encode_classes(
    model: TCLPreTrainedModel,
    processor: TCLProcessor,
    classes: Sequence[str],
    templates: Sequence[str] = TEMPLATES,
    batch_size: int = 64,
    max_tokens: int = MAX_TOKENS,
    progress: bool = False,
) -> Tensor:
    """Return the features of classes (C, D), with the model in the mode that it is in.

    Each process encodes the texts of its share of the classes.

    Args:
        classes: their names.
        templates: texts with `{}`, which stands for the name.
        batch_size: texts in a forward pass.
        max_tokens: longest text, [CLS] included.
        progress: show a progress bar.
    """
    share = process_share(len(classes))
    texts = [text for number in share for text in fill_templates(templates, classes[number])]
    features: list[Tensor] = []
    bar = tqdm(total=len(texts), desc="Encoding classes", disable=not progress, leave=False)
    for batch in in_batches(texts, batch_size):
        tokens = processor(text=batch, return_tensors="pt", max_length=max_tokens)
        input_ids, mask = (tokens[name].to(model.device) for name in ("input_ids", "attention_mask"))
        features += model.base_model.get_text_features(input_ids, mask).pooler_output.unbind()
        bar.update(len(batch))
    bar.close()
    own = class_features(torch.stack(features).unflatten(0, (len(share), -1))).unbind() if share else ()
    return torch.stack(gather_results(list(own), len(classes))).to(model.device)  # (C, D)


@torch.no_grad()
def evaluate_zero_shot(
    model: TCLPreTrainedModel,
    processor: TCLProcessor,
    records: Sequence[dict],
    classes: Sequence[str],
    templates: Sequence[str] = TEMPLATES,
    batch_size: int = 64,
    max_tokens: int = MAX_TOKENS,
    progress: bool = False,
) -> Evaluation:
    """Classify images by the similarity of their features to those of texts about the classes.

    The metrics are those of `classification_metrics`. Each prediction has `image_id`, `label` and `scores`, the
    probabilities of the five most probable classes, best first.

    Args:
        model: a `TCLModel`, or a head on one that has its projections. Its mode is restored.
        records: images with a label, which is one of the classes.
        classes: names of all classes.
        templates: texts with `{}`, which stands for the name of a class.
        batch_size: images or texts in a forward pass.
        max_tokens: longest text, [CLS] included.
        progress: show progress bars.

    Raises:
        ValueError: if there are no classes or no templates, a template lacks `{}`, or a label is not a class.
    """
    check_templates(templates)
    if not classes:
        raise ValueError("There are no classes: give their names.")
    ids, labels = zip(*((record["image_id"], record["label"]) for record in records), strict=True)
    true = _class_numbers(ids, labels, classes)
    tcl = model.base_model
    rows = process_share(len(ids))
    results: list[tuple[list[float], list[int]]] = []  # probabilities and numbers of the best classes of each record
    with eval_mode(model):
        of_classes = encode_classes(model, processor, classes, templates, batch_size, max_tokens, progress)
        bar = tqdm(total=len(rows), desc="Classifying", disable=not progress, leave=False)
        for batch in in_batches(rows, batch_size):
            images = [open_image(records[row]["image"]).convert("RGB") for row in batch]
            pixel_values = processor(images=images, return_tensors="pt")["pixel_values"].to(model.device)
            features = tcl.get_image_features(pixel_values).pooler_output
            best = best_classes(features, of_classes, tcl.temperature)
            results += zip(*(part.tolist() for part in best), strict=True)
            bar.update(len(batch))
        bar.close()
    probabilities, ranked = zip(*gather_results(results, len(ids)), strict=True)
    check_finite(torch.tensor(probabilities), "probabilities of classes", ids.__getitem__)
    predictions = []
    for image_id, best_of_one, scores in zip(ids, ranked, probabilities, strict=True):
        names = [classes[number] for number in best_of_one]
        scores_of_names = dict(zip(names, scores, strict=True))
        predictions.append({"image_id": image_id, "label": names[0], "scores": scores_of_names})
    return Evaluation(classification_metrics(torch.tensor(ranked), true, len(classes)), predictions)


def _class_numbers(ids: Sequence[str], labels: Sequence[str], classes: Sequence[str]) -> Tensor:
    """The number of each record's class (N,)."""
    number_of = {name: number for number, name in enumerate(classes)}
    for image_id, label in zip(ids, labels, strict=True):
        if label not in number_of:
            raise ValueError(
                f"Record {image_id} has the label '{label}', which is not among the {len(classes)} classes: add it to "
                "them, or leave the record out."
            )
    return torch.tensor([number_of[label] for label in labels])
