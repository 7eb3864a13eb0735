"""Retrieval: recall by the similarity of features, and after the k most similar are re-ranked by matching."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data.images import open_image
from ..models.attention import KeyValue
from ..models.encoders import eval_mode
from ..models.losses import similarity as scaled_similarity
from ..models.modeling_tcl import MATCHES, TCLForImageTextRetrieval
from ..models.processing_tcl import MAX_TOKENS, TCLProcessor
from .metrics import retrieval_metrics
from .shares import gather_results, in_batches, process_share

NOT_SCORED = -100.0  # the score of pairs outside the top k, as in the paper's code
MAX_PADDING = 1 / 8  # largest share of padding in a group; a smaller one makes groups too small for fast products


def candidates(similarity: Tensor, k: int) -> list[Tensor]:
    """The texts to score with each image: those in the image's top k, and those that have the image in theirs.

    Args:
        similarity: cosine similarities (I, T).
        k: candidates of each image and of each text.

    Returns:
        For each image the indices of its texts, ascending. No pair occurs twice.
    """
    num_images, num_texts = similarity.shape
    chosen = torch.zeros_like(similarity, dtype=torch.bool)
    chosen.scatter_(1, similarity.topk(min(k, num_texts), dim=1).indices, True)
    chosen.scatter_(0, similarity.topk(min(k, num_images), dim=0).indices, True)
    return [row.nonzero().flatten() for row in chosen]


def sizes_by_length(lengths: list[int], size: int) -> list[int]:
    """Sizes of groups of texts with ascending lengths: at most `size` texts, and little padding.

    A group ends before the text that would make more than `MAX_PADDING` of its tokens padding.
    """
    sizes: list[int] = []
    count = tokens = 0
    for length in lengths:
        if count == size or (count + 1) * length * (1 - MAX_PADDING) > tokens + length:
            sizes.append(count)
            count = tokens = 0
        count, tokens = count + 1, tokens + length
    return sizes + [count] * bool(count)


@dataclass
class EncodedSamples:
    """The images and texts of a data set after the encoders, before fusion.

    Args:
        image_rows: the images whose states this process keeps, because it scores them (I / processes).
        image_states: their states (len(image_rows), 1 + P, width), with the dtype and on the device asked for.
        text_states: states of all texts, padded (T, L, width), likewise.
        attention_mask: 1 for tokens, 0 for padding (T, L).
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
def encode_samples(
    model: TCLForImageTextRetrieval,
    processor: TCLProcessor,
    records: Sequence[dict],
    captions_per_image: int | None = None,
    batch_size: int = 64,
    states_dtype: torch.dtype | None = None,
    progress: bool = False,
    max_tokens: int = MAX_TOKENS,
) -> EncodedSamples:
    """Encode the images and captions of records, with the model in the mode that it is in.

    Each process encodes its share. It keeps the states of its images; features and the states of texts are gathered.

    Args:
        captions_per_image: number of captions to use of each record, the first ones; all if None.
        batch_size: images or texts in a forward.
        states_dtype: move states to the CPU with this dtype, for example `torch.float16`: the memory that a large data
            set needs depends on their size, not on the model's. None leaves them as they are.
        progress: show a progress bar.
        max_tokens: longest text, [CLS] included.
    """
    device = model.device

    def kept(states: Tensor) -> Tensor:
        return states if states_dtype is None else states.to("cpu", states_dtype)

    captions = [record["captions"][:captions_per_image] for record in records]
    texts = [text for of_image in captions for text in of_image]
    image_of_text = torch.tensor([row for row, of_image in enumerate(captions) for _ in of_image])
    image_rows, text_rows = process_share(len(records)), process_share(len(texts))
    image_states: list[Tensor] = []
    image_embeds: list[Tensor] = []
    text_states: list[Tensor] = []
    text_embeds: list[Tensor] = []
    bar = tqdm(total=len(image_rows) + len(text_rows), desc="Encoding", disable=not progress, leave=False)
    for rows in in_batches(image_rows, batch_size):
        states = model.tcl.encode_image(_images_or_states(processor, [records[row] for row in rows]).to(device))
        image_embeds += model.tcl.image_features(states).unbind()
        image_states += kept(states).unbind()
        bar.update(len(rows))
    tokens = processor(text=texts, return_tensors="pt", max_length=max_tokens)
    for rows in in_batches(text_rows, batch_size):
        mask = tokens["attention_mask"][rows].to(device)
        states = model.tcl.encode_text(tokens["input_ids"][rows].to(device), mask)
        text_embeds += model.tcl.text_features(states, mask).unbind()
        text_states += kept(states).unbind()
        bar.update(len(rows))
    bar.close()
    return EncodedSamples(
        image_rows=image_rows,
        image_states=torch.stack(image_states),
        text_states=torch.stack(gather_results(text_states, len(texts))),
        attention_mask=tokens["attention_mask"].to(device),
        image_embeds=torch.stack(gather_results(image_embeds, len(records))),
        text_embeds=torch.stack(gather_results(text_embeds, len(texts))),
        image_of_text=image_of_text.to(device),
        texts=texts,
    )


def _images_or_states(processor: TCLProcessor, records: list[dict]) -> Tensor:
    """The pixels of the records' images (B, 3, H, W), or the states that are kept of all of them (B, 1 + P, width)."""
    if all("states" in record for record in records):
        # In float32, because autocast on CPUs cannot stack half precision.
        return torch.stack([record["states"].plain().float() for record in records])
    images = [open_image(record["image"]).convert("RGB") for record in records]
    return processor(images=images, return_tensors="pt")["pixel_values"]


@torch.no_grad()
def matching_scores(
    model: TCLForImageTextRetrieval, encoded: EncodedSamples, k: int, batch_size: int = 64, progress: bool = False
) -> Tensor:
    """Matching logits of the candidate pairs of both directions, `NOT_SCORED` elsewhere (I, T).

    An image's keys and values are projected once for all its candidates, each pair is scored once, and candidates of
    similar length are fused together, so that little padding is computed.

    Args:
        k: candidates by similarity of each image and of each text.
        batch_size: the most texts that are fused with an image at once.
        progress: show a progress bar, with the time left.
    """
    similarity = encoded.similarity()  # (I, T)
    scores = torch.full_like(similarity, NOT_SCORED)
    chosen = candidates(similarity, k)
    lengths = encoded.attention_mask.sum(-1)
    device, dtype = similarity.device, model.tcl.dtype
    total = sum(len(chosen[row]) for row in encoded.image_rows)
    bar = tqdm(total=total, desc="Matching", unit="pair", disable=not progress, leave=False)
    for row, states in zip(encoded.image_rows, encoded.image_states, strict=True):
        image: list[KeyValue] = model.tcl.text_model.project_images(states[None].to(device, dtype))
        texts = chosen[row][lengths[chosen[row]].argsort()]
        for group in texts.split(sizes_by_length(lengths[texts].tolist(), batch_size)):
            length = int(lengths[group[-1]])
            text_states = encoded.text_states[group.to(encoded.text_states.device), :length].to(device, dtype)
            logits = model.match(text_states, encoded.attention_mask[group, :length], image)
            scores[row, group] = logits[:, MATCHES].float()
            bar.update(len(group))
    bar.close()
    return torch.stack(gather_results([scores[row] for row in encoded.image_rows], len(scores)))


def _only_top(scores: Tensor, similarity: Tensor, k: int, dim: int) -> Tensor:
    """The scores (I, T) of the k most similar pairs along a dimension, `NOT_SCORED` elsewhere."""
    top = similarity.topk(min(k, similarity.shape[dim]), dim=dim).indices
    return torch.full_like(scores, NOT_SCORED).scatter(dim, top, scores.gather(dim, top))


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

    Mean ranks are by similarity only, because re-ranking orders the k candidates and leaves all others equal.

    Args:
        model: a head with matching. Its mode is restored.
        records: images with captions; no image occurs twice.
        k: candidates to re-rank; None for similarity alone.
        captions_per_image, batch_size, states_dtype, progress, max_tokens: as in `encode_samples`.
    """
    with eval_mode(model):
        encoded = encode_samples(
            model, processor, records, captions_per_image, batch_size, states_dtype, progress, max_tokens
        )
        similarity = encoded.similarity()
        metrics = retrieval_metrics(similarity, similarity, encoded.image_of_text)
        if k is not None:
            scores = matching_scores(model, encoded, k, progress=progress)
            # Pairs that only the other direction chose are not among this direction's k candidates.
            image_scores = _only_top(scores, similarity, k, dim=1)
            text_scores = _only_top(scores, similarity, k, dim=0)
            reranked = retrieval_metrics(image_scores, text_scores, encoded.image_of_text)
            metrics |= {f"reranked_{name}": value for name, value in reranked.items() if "rank" not in name}
    return metrics


def chance_recall(num_images: int, k: int = 1) -> float:
    """Recall at k in percent of a random order, with one text per image."""
    return 100 * min(k, num_images) / num_images
