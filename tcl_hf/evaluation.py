"""Evaluators: they run a model over records and feed the metrics.

Shapes: I images, T texts, D feature dimensions. Scores (I, T) are higher for better pairs.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .collators import open_image
from .encoders import KeyValue
from .metrics import retrieval_metrics
from .modeling_tcl import MATCHES, TCLForImageTextRetrieval
from .processing_tcl import TCLProcessor

NOT_SCORED = -100.0  # what the paper's code gives to pairs outside the top k


def candidates(similarity: Tensor, k: int) -> list[Tensor]:
    """Which texts to score with each image: its own top k, and those in whose top k it is.

    Args:
        similarity: cosine similarities (I, T).
        k: candidates of each image and of each text.

    Returns:
        For each image the indices of its texts, ascending; each pair stands there once.
    """
    num_images, num_texts = similarity.shape
    chosen = torch.zeros_like(similarity, dtype=torch.bool)
    chosen.scatter_(1, similarity.topk(min(k, num_texts), dim=1).indices, True)
    chosen.scatter_(0, similarity.topk(min(k, num_images), dim=0).indices, True)
    return [row.nonzero().flatten() for row in chosen]


@dataclass
class EncodedPairs:
    """A data set as the encoders see it.

    Args:
        image_states: states of each image (I, 1 + P, width).
        text_states: states of each text, padded (T, L, width).
        attention_mask: which of them are tokens (T, L).
        image_embeds, text_embeds: L2-normalised features (I, D) and (T, D).
        image_of_text: the image to which each text belongs (T,).
        texts: the texts themselves.
    """

    image_states: Tensor
    text_states: Tensor
    attention_mask: Tensor
    image_embeds: Tensor
    text_embeds: Tensor
    image_of_text: Tensor
    texts: list[str]


@torch.no_grad()
def encode_pairs(
    model: TCLForImageTextRetrieval,
    processor: TCLProcessor,
    records: list[dict],
    captions_per_image: int | None = None,
    batch_size: int = 64,
) -> EncodedPairs:
    """Encode the images and captions of records, in eval mode.

    Args:
        captions_per_image: use only so many of each record's captions; all if None.
        batch_size: images or texts at once.
    """
    device = model.device
    captions = [record["captions"][:captions_per_image] for record in records]
    texts = [text for own in captions for text in own]
    image_of_text = torch.tensor([number for number, own in enumerate(captions) for _ in own])
    image_states, text_states = [], []
    for batch in _batches(records, batch_size):
        images = [open_image(record["image"]).convert("RGB") for record in batch]
        pixel_values = processor(images=images, return_tensors="pt")["pixel_values"].to(device)
        image_states.append(model.tcl.encode_image(pixel_values))
    tokens = processor(text=texts, return_tensors="pt").to(device)
    for ids, mask in zip(
        tokens["input_ids"].split(batch_size), tokens["attention_mask"].split(batch_size), strict=True
    ):
        text_states.append(model.tcl.encode_text(ids, mask))
    images, words = torch.cat(image_states), torch.cat(text_states)
    return EncodedPairs(
        image_states=images,
        text_states=words,
        attention_mask=tokens["attention_mask"],
        image_embeds=model.tcl.image_features(images[:, 0]),
        text_embeds=model.tcl.text_features(words[:, 0]),
        image_of_text=image_of_text.to(device),
        texts=texts,
    )


@torch.no_grad()
def matching_scores(
    model: TCLForImageTextRetrieval,
    pairs: EncodedPairs,
    k: int,
    batch_size: int = 256,
    progress: bool = False,
) -> Tensor:
    """Matching logits of the candidate pairs of both directions, `NOT_SCORED` elsewhere (I, T).

    An image's keys and values are projected once for all its candidates, and each pair is scored once.

    Args:
        k: candidates by similarity of each image and of each text.
        batch_size: texts fused with an image at once.
        progress: show a progress bar.
    """
    similarity = pairs.image_embeds @ pairs.text_embeds.mT  # (I, T)
    scores = torch.full_like(similarity, NOT_SCORED)
    chosen = candidates(similarity, k)
    for number, texts in enumerate(tqdm(chosen, desc="Matching", disable=not progress, leave=False)):
        image: list[KeyValue] = model.tcl.text_model.project_images(pairs.image_states[number : number + 1])
        for some in texts.split(batch_size):
            logits = model.match(pairs.text_states[some], pairs.attention_mask[some], image)
            scores[number, some] = logits[:, MATCHES].float()
    return scores


@torch.no_grad()
def evaluate_retrieval(
    model: TCLForImageTextRetrieval,
    processor: TCLProcessor,
    records: list[dict],
    k: int | None = 32,
    captions_per_image: int | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> dict[str, float]:
    """Recall in percent by similarity, and by matching among the k most similar (`reranked_...`).

    Args:
        model: a head with matching; it is left in the mode in which it came.
        records: images with captions, each image once.
        k: candidates to re-rank; None for similarity alone.
        captions_per_image, batch_size: as in `encode_pairs`.
    """
    was_training = model.training
    model.eval()
    try:
        pairs = encode_pairs(model, processor, records, captions_per_image, batch_size)
        similarity = pairs.image_embeds @ pairs.text_embeds.mT
        metrics = retrieval_metrics(similarity, similarity, pairs.image_of_text)
        if k is not None:
            scores = matching_scores(model, pairs, k, progress=progress)
            # A pair that only the other direction chose was not among this one's k.
            image_scores = _only_top(scores, similarity, k, dim=1)
            text_scores = _only_top(scores, similarity, k, dim=0)
            reranked = retrieval_metrics(image_scores, text_scores, pairs.image_of_text)
            metrics |= {f"reranked_{name}": value for name, value in reranked.items()}
    finally:
        model.train(was_training)
    return metrics


def chance_recall(num_images: int, k: int = 1) -> float:
    """Recall at k in percent of a random order, with one text per image."""
    return 100 * min(k, num_images) / num_images


def _only_top(scores: Tensor, similarity: Tensor, k: int, dim: int) -> Tensor:
    top = similarity.topk(min(k, similarity.shape[dim]), dim=dim).indices
    return torch.full_like(scores, NOT_SCORED).scatter(dim, top, scores.gather(dim, top))


def _batches(items: list, size: int) -> Iterator[list]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
