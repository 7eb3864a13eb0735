"""Retrieval: recall by similarity, and re-ranked by matching."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data.images import open_image
from ..models.encoders import KeyValue
from ..models.losses import similarity as scaled_similarity
from ..models.modeling_tcl import MATCHES, TCLForImageTextRetrieval
from ..models.processing_tcl import MAX_TOKENS, TCLProcessor
from .metrics import retrieval_metrics
from .shares import batches, evaluating, exchange, own_share

NOT_SCORED = -100.0  # what the paper's code gives to pairs outside the top k
MAX_PADDING = 1 / 8  # share of the tokens fused at once; with less, groups become too small for fast products


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
        image_rows: the images whose states this process keeps, those it shall score (I / processes).
        image_states: their states (len(image_rows), 1 + P, width), where and as precise as was asked for.
        text_states: states of each text, padded (T, L, width), likewise.
        attention_mask: which of them are tokens (T, L).
        image_embeds, text_embeds: L2-normalised features (I, D) and (T, D).
        image_of_text: the image to which each text belongs (T,).
        texts: the texts themselves.
    """

    image_rows: list[int]
    image_states: Tensor
    text_states: Tensor
    attention_mask: Tensor
    image_embeds: Tensor
    text_embeds: Tensor
    image_of_text: Tensor
    texts: list[str]

    def similarity(self) -> Tensor:
        """Cosine similarities of all images and texts (I, T), in float32 under autocast too."""
        return scaled_similarity(self.image_embeds, self.text_embeds, torch.ones((), device=self.image_embeds.device))


@torch.no_grad()
def encode_pairs(
    model: TCLForImageTextRetrieval,
    processor: TCLProcessor,
    records: Sequence[dict],
    captions_per_image: int | None = None,
    batch_size: int = 64,
    states_dtype: torch.dtype | None = None,
    progress: bool = False,
    max_tokens: int = MAX_TOKENS,
) -> EncodedPairs:
    """Encode the images and captions of records; the model's mode is the caller's.

    Each process encodes its share. States of images stay with it; features, and states of texts, are exchanged.

    Args:
        captions_per_image: use only so many of each record's captions; all if None.
        batch_size: images or texts at once.
        states_dtype: keep states so on the CPU, for example `torch.float16`: their size, and not the model's, decides
            how much memory a large data set needs. None keeps them as they are.
        progress: show a progress bar.
        max_tokens: longest text, [CLS] included.
    """
    device = model.device

    def kept(states: Tensor) -> Tensor:
        return states if states_dtype is None else states.to("cpu", states_dtype)

    captions = [record["captions"][:captions_per_image] for record in records]
    texts = [text for own in captions for text in own]
    image_of_text = torch.tensor([number for number, own in enumerate(captions) for _ in own])
    image_rows, text_rows = own_share(len(records)), own_share(len(texts))
    image_states, image_embeds, text_states, text_embeds = [], [], [], []
    bar = tqdm(total=len(image_rows) + len(text_rows), desc="Encoding", disable=not progress, leave=False)
    for rows in batches(image_rows, batch_size):
        images = [open_image(records[row]["image"]).convert("RGB") for row in rows]
        pixel_values = processor(images=images, return_tensors="pt")["pixel_values"].to(device)
        states = model.tcl.encode_image(pixel_values)
        image_embeds += model.tcl.image_features(states[:, 0]).unbind()
        image_states += kept(states).unbind()
        bar.update(len(rows))
    tokens = processor(text=texts, return_tensors="pt", max_length=max_tokens)
    for rows in batches(text_rows, batch_size):
        mask = tokens["attention_mask"][rows].to(device)
        states = model.tcl.encode_text(tokens["input_ids"][rows].to(device), mask)
        text_embeds += model.tcl.text_features(states[:, 0]).unbind()
        text_states += kept(states).unbind()
        bar.update(len(rows))
    bar.close()
    return EncodedPairs(
        image_rows=image_rows,
        image_states=torch.stack(image_states),
        text_states=torch.stack(exchange(text_states, len(texts))),
        attention_mask=tokens["attention_mask"].to(device),
        image_embeds=torch.stack(exchange(image_embeds, len(records))),
        text_embeds=torch.stack(exchange(text_embeds, len(texts))),
        image_of_text=image_of_text.to(device),
        texts=texts,
    )


@torch.no_grad()
def matching_scores(
    model: TCLForImageTextRetrieval,
    pairs: EncodedPairs,
    k: int,
    batch_size: int = 64,
    progress: bool = False,
) -> Tensor:
    """Matching logits of the candidate pairs of both directions, `NOT_SCORED` elsewhere (I, T).

    An image's keys and values are projected once for all its candidates, each pair is scored once, and candidates of
    about the same length go together, so that little padding is computed.

    Args:
        k: candidates by similarity of each image and of each text.
        batch_size: texts fused with an image at once, at most.
        progress: show a progress bar, with the time left.
    """
    similarity = pairs.similarity()  # (I, T)
    scores = torch.full_like(similarity, NOT_SCORED)
    chosen = candidates(similarity, k)
    lengths = pairs.attention_mask.sum(-1)
    device, dtype = similarity.device, model.tcl.dtype
    total = sum(len(chosen[row]) for row in pairs.image_rows)
    bar = tqdm(total=total, desc="Matching", unit="pair", disable=not progress, leave=False)
    for row, states in zip(pairs.image_rows, pairs.image_states, strict=True):
        image: list[KeyValue] = model.tcl.text_model.project_images(states[None].to(device, dtype))
        texts = chosen[row][lengths[chosen[row]].argsort()]
        for some in texts.split(sizes_by_length(lengths[texts].tolist(), batch_size)):
            length = int(lengths[some[-1]])
            words = pairs.text_states[some.to(pairs.text_states.device), :length].to(device, dtype)
            logits = model.match(words, pairs.attention_mask[some, :length], image)
            scores[row, some] = logits[:, MATCHES].float()
            bar.update(len(some))
    bar.close()
    return torch.stack(exchange([scores[row] for row in pairs.image_rows], len(scores)))


@torch.no_grad()
def evaluate_retrieval(
    model: TCLForImageTextRetrieval,
    processor: TCLProcessor,
    records: Sequence[dict],
    k: int | None = 32,
    captions_per_image: int | None = None,
    batch_size: int = 64,
    states_dtype: torch.dtype | None = None,
    progress: bool = False,
    max_tokens: int = MAX_TOKENS,
) -> dict[str, float]:
    """Recall in percent by similarity, and by matching among the k most similar (`reranked_...`).

    Mean ranks are by similarity only: re-ranking orders the k candidates and leaves all others equal.

    Args:
        model: a head with matching; it is left in the mode in which it came.
        records: images with captions, each image once.
        k: candidates to re-rank; None for similarity alone.
        captions_per_image, batch_size, states_dtype, max_tokens: as in `encode_pairs`.
    """
    with evaluating(model):
        pairs = encode_pairs(
            model, processor, records, captions_per_image, batch_size, states_dtype, progress, max_tokens
        )
        similarity = pairs.similarity()
        metrics = retrieval_metrics(similarity, similarity, pairs.image_of_text)
        if k is not None:
            scores = matching_scores(model, pairs, k, progress=progress)
            # A pair that only the other direction chose was not among this one's k.
            image_scores = _only_top(scores, similarity, k, dim=1)
            text_scores = _only_top(scores, similarity, k, dim=0)
            reranked = retrieval_metrics(image_scores, text_scores, pairs.image_of_text)
            metrics |= {f"reranked_{name}": value for name, value in reranked.items() if "rank" not in name}
    return metrics


def chance_recall(num_images: int, k: int = 1) -> float:
    """Recall at k in percent of a random order, with one text per image."""
    return 100 * min(k, num_images) / num_images


def _only_top(scores: Tensor, similarity: Tensor, k: int, dim: int) -> Tensor:
    top = similarity.topk(min(k, similarity.shape[dim]), dim=dim).indices
    return torch.full_like(scores, NOT_SCORED).scatter(dim, top, scores.gather(dim, top))


def sizes_by_length(lengths: list[int], size: int) -> list[int]:
    """How many of the next texts to take together, of ascending lengths: at most `size`, and little padding.

    A group ends before the text with which more than `MAX_PADDING` of its tokens would be padding.
    """
    sizes: list[int] = []
    count = tokens = 0
    for length in lengths:
        if count == size or (count + 1) * length * (1 - MAX_PADDING) > tokens + length:
            sizes.append(count)
            count = tokens = 0
        count, tokens = count + 1, tokens + length
    return sizes + [count] * bool(count)
