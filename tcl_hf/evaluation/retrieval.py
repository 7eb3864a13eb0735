"""Retrieval: recall by the similarity of features, and after the k most similar are ranked anew.

They are re-ranked by the matching logit alone, as in the paper, or by a combined score:

    similarity / temperature + rerank_weight * (logit of "matches" - logit of "does not match")

The first term is the logit of a pair in the contrastive losses, and the second the log-odds of the matching head. Both
are log-ratios of probabilities, and so they add. The log-odds are used and not the one logit, because the matching loss
leaves the sum of both logits undetermined: adding a number to both changes no probability, but would change the order.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data.captions import usable_captions
from ..data.kept_states import plain_view_of
from ..models.attention import KeyValue
from ..models.configuration_tcl import TCLConfig
from ..models.distributed import whole
from ..models.encoders import eval_mode
from ..models.losses import similarity as scaled_similarity
from ..models.modeling_tcl import MATCHES, TCLForImageTextRetrieval, log_odds_of
from ..models.processing_tcl import MAX_TOKENS, TCLProcessor
from .metrics import check_finite, retrieval_metrics
from .shares import gather_results, in_batches, may_stop, process_share

logger = logging.getLogger(__name__)

NOT_SCORED = -100.0  # the score of pairs outside the top k, as in the paper's code
_MAX_NAMED = 5  # images in a warning
NO_RECORD = -1  # the image of a text that belongs to no record
RERANK_WEIGHTS = (0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0)  # the weights that are tried; 0 ranks by similarity alone
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
        image_of_text: the image to which each text belongs (T,), `NO_RECORD` where it belongs to none.
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
    texts: list[str] | None = None,
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
        texts: texts to encode in place of the captions; they belong to no record.
    """
    device = model.device

    def kept(states: Tensor) -> Tensor:
        return states if states_dtype is None else states.to("cpu", states_dtype)

    if texts is None:
        captions = [usable_captions(record, processor.clean_caption)[:captions_per_image] for record in records]
        texts = [text for of_image in captions for text in of_image]
        image_of_text = torch.tensor([row for row, of_image in enumerate(captions) for _ in of_image])
    else:
        image_of_text = torch.full((len(texts),), NO_RECORD)
    image_rows, text_rows = process_share(len(records)), process_share(len(texts))
    image_states: list[Tensor] = []
    image_embeds: list[Tensor] = []
    text_states: list[Tensor] = []
    text_embeds: list[Tensor] = []
    bar = tqdm(total=len(image_rows) + len(text_rows), desc="Encoding", disable=not progress, leave=False)
    for rows in in_batches(image_rows, batch_size):
        views = torch.stack([plain_view_of(processor, records[row]) for row in rows])
        states = model.tcl.encode_image(views.to(device))
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
    image_features = torch.stack(gather_results(image_embeds, len(records)))
    text_features = torch.stack(gather_results(text_embeds, len(texts)))
    check_finite(image_features, "features of images", lambda row: records[row].get("image_id"))
    check_finite(text_features, "features of texts", lambda row: repr(texts[row][:60]))
    encoded = EncodedSamples(
        image_rows=image_rows,
        image_states=torch.stack(image_states),
        text_states=torch.stack(gather_results(text_states, len(texts))),
        attention_mask=tokens["attention_mask"].to(device),
        image_embeds=image_features,
        text_embeds=text_features,
        image_of_text=image_of_text.to(device),
        texts=texts,
    )
    check_finite(encoded.image_states, "states of images")
    check_finite(encoded.text_states, "states of texts")
    return encoded


def with_captions(records: Sequence[dict], processor: TCLProcessor) -> Sequence[dict]:
    """The records that have a caption which the model can read; the others are left out, and a warning names them.

    An image without a caption cannot be right, and would count as a miss.
    """
    rows, bad = [], []
    select_columns = getattr(records, "select_columns", None)  # so that no image is read for its captions
    for row, record in enumerate(records if select_columns is None else select_columns(["captions", "image_id"])):
        try:
            usable_captions(record, processor.clean_caption)
            rows.append(row)
        except ValueError as error:
            bad.append(f"{record.get('image_id')} ({error})")
    if not bad:
        return records
    logger.warning(
        "%d of %d images are left out, because they have no caption that can be read: %s",
        len(bad),
        len(records),
        ", ".join(bad[:_MAX_NAMED]),
    )
    select = getattr(records, "select", None)
    return select(rows) if select is not None else [records[row] for row in rows]


def can_match(config: TCLConfig) -> bool:
    """Whether a model scores pairs by matching, which is one of its objectives."""
    return bool(config.itm_weight)


@torch.no_grad()
def matching_logits(
    model: TCLForImageTextRetrieval,
    encoded: EncodedSamples,
    chosen: list[Tensor],
    batch_size: int = 64,
    progress: bool = False,
) -> Tensor:
    """Both matching logits (I, T, 2) of the chosen pairs, `NOT_SCORED` elsewhere.

    An image's keys and values are projected once for all its candidates, each pair is scored once, and candidates of
    similar length are fused together, so that little padding is computed.

    Args:
        chosen: for each image the texts to score with it, see `candidates`.
        batch_size: the most texts that are fused with an image at once.
        progress: show a progress bar, with the time left.
    """
    device, dtype = encoded.image_embeds.device, model.tcl.dtype
    found = torch.full((len(chosen), len(encoded.attention_mask), 2), NOT_SCORED, device=device)
    lengths = encoded.attention_mask.sum(-1)
    total = sum(len(chosen[row]) for row in encoded.image_rows)
    bar = tqdm(total=total, desc="Matching", unit="pair", disable=not progress, leave=False)
    for row, states in zip(encoded.image_rows, encoded.image_states, strict=True):
        may_stop()
        image: list[KeyValue] = model.tcl.text_model.project_images(states[None].to(device, dtype))
        texts = chosen[row][lengths[chosen[row]].argsort()]
        for group in texts.split(sizes_by_length(lengths[texts].tolist(), batch_size)):
            length = int(lengths[group[-1]])
            text_states = encoded.text_states[group.to(encoded.text_states.device), :length].to(device, dtype)
            logits = model.match(text_states, encoded.attention_mask[group, :length], image)
            found[row, group] = logits.float()
            bar.update(len(group))
    bar.close()
    logits = torch.stack(gather_results([found[row] for row in encoded.image_rows], len(found)))
    check_finite(logits, "rows of matching logits of images")
    return logits


def matching_scores(
    model: TCLForImageTextRetrieval, encoded: EncodedSamples, k: int, batch_size: int = 64, progress: bool = False
) -> Tensor:
    """The logit of "matches" for the candidate pairs of both directions, `NOT_SCORED` elsewhere (I, T).

    The paper's code ranks by this logit alone.

    Args:
        k: candidates by similarity of each image and of each text.
        batch_size, progress: as in `matching_logits`.
    """
    chosen = candidates(encoded.similarity(), k)
    return matching_logits(model, encoded, chosen, batch_size, progress)[..., MATCHES]


def combined_scores(similarity: Tensor, logits: Tensor, temperature: Tensor | float, rerank_weight: float) -> Tensor:
    """The combined score (I, T): `similarity / temperature + rerank_weight * log-odds of matching`.

    Args:
        similarity: cosine similarities (I, T).
        logits: both matching logits of each pair (I, T, 2).
        temperature: the one that divides similarities in the contrastive losses.
        rerank_weight: weight of the log-odds; 0 gives the order by similarity.
    """
    return similarity / temperature + rerank_weight * log_odds_of(logits)


def _only_top(scores: Tensor, similarity: Tensor, k: int, dim: int, other: float = NOT_SCORED) -> Tensor:
    """The scores (I, T) of the k most similar pairs along a dimension, and `other` elsewhere."""
    top = similarity.topk(min(k, similarity.shape[dim]), dim=dim).indices
    return torch.full_like(scores, other).scatter(dim, top, scores.gather(dim, top))


def reranked_metrics(
    scores: Tensor, similarity: Tensor, image_of_text: Tensor, k: int, other: float = NOT_SCORED
) -> dict[str, float]:
    """Recalls in percent when scores order the k most similar candidates of each image and of each text.

    Pairs that only the other direction chose are not among this direction's k candidates. Mean ranks are left out,
    because all pairs outside the k candidates rank equally.

    Args:
        scores: the new scores (I, T), which are read for candidates only.
        similarity: cosine similarities (I, T), which choose the candidates.
        image_of_text: the image to which each text belongs (T,).
        k: candidates of each image and of each text.
        other: the score of all other pairs, below those of the candidates.
    """
    by_image, by_text = (_only_top(scores, similarity, k, dim, other) for dim in (1, 0))
    metrics = retrieval_metrics(by_image, by_text, image_of_text)
    return {name: value for name, value in metrics.items() if "rank" not in name}


def combined_metrics(
    similarity: Tensor,
    logits: Tensor,
    temperature: Tensor | float,
    image_of_text: Tensor,
    k: int,
    rerank_weight: float,
) -> dict[str, float]:
    """Recalls in percent when the combined score orders the k most similar candidates.

    Arguments as in `combined_scores` and `reranked_metrics`.
    """
    scores = combined_scores(similarity, logits, temperature, rerank_weight)
    return reranked_metrics(scores, similarity, image_of_text, k, other=-torch.inf)


def choose_rerank_weight(
    similarity: Tensor,
    logits: Tensor,
    temperature: Tensor | float,
    image_of_text: Tensor,
    k: int,
    weights: Sequence[float] = RERANK_WEIGHTS,
) -> float:
    """The weight with the highest recall@1, the mean of both directions, on these data.

    The mean of all recalls decides between equal ones, and then the smaller weight. Results have to be reported on
    other data, on which the weight was not chosen.

    Args:
        weights: the weights to try.

    The other arguments are those of `combined_metrics`.
    """

    def merit(weight: float) -> tuple[float, float, float]:
        metrics = combined_metrics(similarity, logits, temperature, image_of_text, k, weight)
        return metrics["recall@1"], metrics["recall_mean"], -weight

    return max(weights, key=merit)


@torch.no_grad()
def tune_rerank_weight(
    model: TCLForImageTextRetrieval,
    processor: TCLProcessor,
    records: Sequence[dict],
    k: int = 32,
    captions_per_image: int | None = None,
    batch_size: int = 64,
    states_dtype: torch.dtype | None = None,
    progress: bool = False,
    max_tokens: int = MAX_TOKENS,
) -> float:
    """Choose the weight of the combined score on records that results are not reported on.

    Arguments as in `evaluate_retrieval`.
    """
    records = with_captions(records, processor)
    with eval_mode(model):
        encoded = encode_samples(
            model, processor, records, captions_per_image, batch_size, states_dtype, progress, max_tokens
        )
        similarity = encoded.similarity()
        logits = matching_logits(model, encoded, candidates(similarity, k), progress=progress)
    return choose_rerank_weight(similarity, logits, temperature_of(model), encoded.image_of_text, k)


def temperature_of(model: TCLForImageTextRetrieval) -> Tensor:
    """The temperature of a model, a scalar, which FSDP2 may have sharded."""
    return whole(model.tcl.temperature.detach()).squeeze()


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
    rerank_weight: float | None = None,
) -> dict[str, float]:
    """Recall in percent by similarity, by matching among the k most similar (`reranked_...`), and by both together.

    The recalls by the combined score (`combined_...`) and its `rerank_weight` are there if the weight is set. A model
    that cannot match is ranked by similarity alone. Mean ranks are by similarity only, because re-ranking orders the k
    candidates and leaves all others equal.

    Args:
        model: a head with matching. Its mode is restored.
        records: images with captions; no image occurs twice.
        k: candidates to re-rank; None for similarity alone.
        captions_per_image, batch_size, states_dtype, progress, max_tokens: as in `encode_samples`.
        rerank_weight: weight of matching in the combined score; that of the model's config if None.
    """
    rerank_weight = model.config.rerank_weight if rerank_weight is None else rerank_weight
    records = with_captions(records, processor)
    with eval_mode(model):
        encoded = encode_samples(
            model, processor, records, captions_per_image, batch_size, states_dtype, progress, max_tokens
        )
        similarity, image_of_text = encoded.similarity(), encoded.image_of_text
        metrics = retrieval_metrics(similarity, similarity, image_of_text)
        if k is None or not can_match(model.config):
            return metrics
        logits = matching_logits(model, encoded, candidates(similarity, k), progress=progress)
    reranked = reranked_metrics(logits[..., MATCHES], similarity, image_of_text, k)
    metrics |= {f"reranked_{name}": value for name, value in reranked.items()}
    if rerank_weight is not None:
        combined = combined_metrics(similarity, logits, temperature_of(model), image_of_text, k, rerank_weight)
        metrics |= {f"combined_{name}": value for name, value in combined.items()}
        metrics["rerank_weight"] = rerank_weight
    return metrics


@torch.no_grad()
def search_images(
    model: TCLForImageTextRetrieval,
    processor: TCLProcessor,
    records: Sequence[dict],
    texts: list[str],
    number: int,
    k: int = 32,
    batch_size: int = 64,
) -> Tensor:
    """The best images for each text, best first, as rows of the records (T, min(number, I)).

    They are ranked by the combined score among the k most similar if the model's config has its weight and the model
    learns matching, and else by similarity.

    Args:
        model: a head with matching. Its mode is restored.
        records: the images to search.
        texts: the texts to search for; they need not be captions of the records.
        number: images to return for each text.
        k: candidates by similarity of each text; at least `number`.
        batch_size: images or texts in a forward.
    """
    number = min(number, len(records))
    weight = model.config.rerank_weight if model.config.itm_weight else None
    with eval_mode(model):
        encoded = encode_samples(model, processor, records, batch_size=batch_size, texts=texts)
        scores = similarity = encoded.similarity()  # (I, T)
        if weight is not None:
            top = similarity.topk(min(max(k, number), len(records)), dim=0).indices
            is_candidate = torch.zeros_like(similarity, dtype=torch.bool).scatter(0, top, True)
            logits = matching_logits(model, encoded, [row.nonzero().flatten() for row in is_candidate], batch_size)
            scores = combined_scores(similarity, logits, temperature_of(model), weight)
            scores = scores.masked_fill(~is_candidate, -torch.inf)
    return scores.topk(number, dim=0).indices.T


def chance_recall(num_images: int, k: int = 1) -> float:
    """Recall at k in percent of a random order, with one text per image."""
    return 100 * min(k, num_images) / num_images
