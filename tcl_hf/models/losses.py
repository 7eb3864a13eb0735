"""The five objectives of TCL as pure functions of tensors: CMA, IMC, LMI, ITM and MLM.

Names follow the paper ("Vision-Language Pre-Training with Triple Contrastive Learning", CVPR 2022):

- CMA, cross-modal alignment: an image and its text, against other texts and images.
- IMC, intra-modal contrast: a sample and another view of itself, within one modality.
- LMI, local mutual information: a whole sample and its own parts (patches, tokens).
- ITM, image-text matching: whether the two sides of a fused pair belong together.
- MLM, masked language modelling, with the image as context.

Shapes: N samples of a batch, K keys (the teacher's batch, then the queue), L locals of a sample,
D feature dimensions, V words, M predicted tokens. Features are L2-normalised. Similarities and losses are
float32 whatever precision the model computes in. No function here reads a value back from the device.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

NO_IMAGE_ID = -100
LMI_GROUP = 128  # samples whose similarities to all locals are in memory at once


def similarity(queries: Tensor, keys: Tensor, temperature: Tensor) -> Tensor:
    """Return `queries . keys / temperature` (..., N, K) in float32, for queries (..., N, D) and keys (..., K, D)."""
    with torch.autocast(queries.device.type, enabled=False):
        queries = queries.float() / temperature.float()  # fewer numbers to divide than similarities
        return queries @ keys.float().mT


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy (N,) of logits (N, K) against distributions over the same classes (N, K)."""
    return -(targets * F.log_softmax(logits, dim=-1)).sum(-1)


def positive_targets(ids: Tensor, key_ids: Tensor) -> Tensor:
    """Return the distribution (N, K) that spreads each query's mass evenly over the keys of the same image.

    `ids` (N,) are those of the batch, and `key_ids` (K,) those of the keys, the batch's own first. A query's own key is
    always positive; a query with `NO_IMAGE_ID` has no other positive key.
    """
    same = (ids[:, None] == key_ids[None]) & (ids[:, None] != NO_IMAGE_ID)  # (N, K)
    own = torch.eye(len(ids), len(key_ids), dtype=torch.bool, device=ids.device)
    positives = (same | own).float()
    return positives / positives.sum(-1, keepdim=True)


def cma_loss(
    queries: Tensor, teacher_queries: Tensor, keys: Tensor, targets: Tensor, temperature: Tensor, alpha: float | Tensor
) -> Tensor:
    """Cross-modal alignment in one direction: find the text of an image among the text keys, or the reverse.

    The target of a query is `(1 - alpha) * targets + alpha * teacher`, where the teacher's distribution is the
    softmax of its own similarities to the same keys; no gradient flows through it.

    Args:
        queries: student features of one modality (N, D).
        teacher_queries: teacher features of the same samples and modality (N, D).
        keys: teacher features of the other modality, of the batch and then of the queue (K, D).
        targets: distribution over the keys (N, K), see `positive_targets`.
    """
    with torch.no_grad():
        soft = similarity(teacher_queries, keys, temperature).softmax(-1)  # (N, K)
        mixed = (1 - alpha) * targets + alpha * soft
    return soft_cross_entropy(similarity(queries, keys, temperature), mixed).mean()


def imc_loss(queries: Tensor, keys: Tensor, targets: Tensor, temperature: Tensor) -> Tensor:
    """Intra-modal contrast in one modality: find the teacher's view of the same sample among the keys.

    The targets are never softened by the teacher. The arguments are those of `cma_loss`, but for the keys, which have
    the modality of the queries.
    """
    return soft_cross_entropy(similarity(queries, keys, temperature), targets).mean()


def pool_locals(patches: Tensor, grid: tuple[int, int], size: int) -> Tensor:
    """Average patch features (N, height * width, D) over `size` x `size` regions: (N, size * size, D).

    The features are normalised before pooling and not after. The grid may have any size; where `size` divides it, the
    regions are the means over blocks.
    """
    planes = patches.mT.unflatten(-1, grid)  # (N, D, height, width)
    return F.adaptive_avg_pool2d(planes, size).flatten(-2).mT


def lmi_loss(features: Tensor, local_features: Tensor, temperature: Tensor, mask: Tensor | None = None) -> Tensor:
    """Local mutual information: each local of a sample against all locals of the other rows.

    With `s_ijk = features_i . local_jk / temperature`, the loss of local k of sample i is
    `-log(e^s_iik / (e^s_iik + sum over j != i and all k' of e^s_ijk'))`. The sum over the others does not depend
    on k, so it is computed once for each sample.

    Args:
        features: student features of whole samples (N, D).
        local_features: teacher features of the parts (M, L, D) of these samples, and after them of others, if any.
        mask: which locals are real (M, L); all of them if None.

    Returns:
        Mean over the real locals of a sample, then over the samples that have any; 0 if none has.

    Raises:
        ValueError: if the locals require a gradient, which would not be computed.
    """
    if local_features.requires_grad and torch.is_grad_enabled():
        raise ValueError("local_features have a gradient, but LMI learns from the teacher's: detach them.")
    if mask is None:
        mask = torch.ones(local_features.shape[:2], dtype=torch.bool, device=features.device)
    mask = mask.bool()
    with torch.autocast(features.device.type, enabled=False):
        queries, local_features = features.float() / temperature.float(), local_features.float()  # (N, D), (M, L, D)
        others, mean_key = _log_sum_over_others(queries, local_features, mask)
        # The gradient of a log of summed exponentials is the mean of its keys, which is computed already.
        others = others + ((queries - queries.detach()) * mean_key).sum(-1)  # (N,)
        own = local_features[: len(features)]
        positives = (queries[:, None] @ own.mT)[:, 0]  # (N, L)
    per_local = F.softplus(others[:, None] - positives)  # -log(e^p / (e^p + e^others))
    mask = mask[: len(features)]
    per_sample = (per_local * mask).sum(-1) / mask.sum(-1).clamp(min=1)
    return _masked_mean(per_sample, mask.any(-1))


@torch.no_grad()
def _log_sum_over_others(queries: Tensor, local_features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """For each query (N, D) the log of the sum of `e^(query . local)` over the real locals of other rows (M, L, D).

    Returns it (N,), and the mean of these locals weighted by their summands (N, D). The similarities (N, M * L) are
    computed for a group of queries at a time.
    """
    num_rows, num_locals, _ = local_features.shape
    # Finite, because a batch of one has no other row, and a text may have no local.
    nothing = torch.finfo(queries.dtype).min
    if not num_locals:
        return queries.new_full(queries.shape[:1], nothing), torch.zeros_like(queries)
    keys = local_features.flatten(0, 1)  # (M * L, D)
    row_of_key = torch.arange(num_rows, device=keys.device).repeat_interleave(num_locals)
    sums, means = [], []
    for first in range(0, len(queries), LMI_GROUP):
        logits = queries[first : first + LMI_GROUP] @ keys.mT  # (n, M * L)
        rows = torch.arange(first, first + len(logits), device=keys.device)[:, None]
        logits.masked_fill_((row_of_key == rows) | ~mask.flatten(), nothing)
        largest = logits.amax(-1, keepdim=True)
        summands = logits.sub_(largest).exp_()
        total = summands.sum(-1, keepdim=True)
        sums.append((largest + total.log())[:, 0])
        means.append(summands @ keys / total)
    return torch.cat(sums), torch.cat(means)


def sample_hard_negatives(logits: Tensor, excluded: Tensor, number: int = 1) -> tuple[Tensor, Tensor]:
    """Draw columns for each row of logits (N, M) from its softmax with the excluded columns set to 0.

    A softmax draw is the argmax of logits minus the log of exponential noise (the Gumbel-max trick): the
    distribution of `torch.multinomial` without reading anything back, and without underflow. Several draws, without
    replacement, are the columns with the largest values (Gumbel-top-k, arXiv 1903.06059).

    Args:
        logits: similarities divided by the temperature (N, M).
        excluded: columns that a row must not draw (N, M), at least its own.
        number: columns that are drawn for each row (K), at most M.

    Returns:
        The drawn columns (K * N,), the first ones of all rows and then the second ones, and whether a row had so many
        columns to draw (K * N,). An index without one is meaningless, and its pair must be left out.
    """
    noise = torch.empty_like(logits).exponential_().log()
    keys = (logits - noise).masked_fill(excluded, -torch.inf)
    if number == 1:
        return keys.argmax(-1), ~excluded.all(-1)
    index = keys.topk(number, dim=-1).indices  # (N, K)
    exists = (~excluded).sum(-1, keepdim=True) > torch.arange(number, device=index.device)
    return index.mT.flatten(), exists.mT.flatten()


def itm_loss(logits: Tensor, labels: Tensor, mask: Tensor, num_negatives: int = 1) -> Tensor:
    """Image-text matching: mean two-way cross-entropy of logits (M, 2) over the pairs that exist.

    Args:
        labels: 1 where the pair matches, 0 where it does not (M,).
        mask: `False` for pairs without an admissible negative (M,).
        num_negatives: negatives of each text and of each image. They share the weight of one, so that matching pairs
            keep a third of the loss.
    """
    losses = F.cross_entropy(logits.float(), labels, reduction="none")
    if num_negatives == 1:
        return _masked_mean(losses, mask)
    weights = torch.where(labels == 1, 1.0, 1 / num_negatives).where(mask, 0)
    return (losses.where(mask, 0) * weights).sum() / weights.sum().clamp(min=1)


def itm_contrast_loss(log_odds: Tensor, targets: Tensor) -> Tensor:
    """Matching by contrast: find the text of each image among the texts of the batch, and the image of each text.

    Args:
        log_odds: logits of "matches" less those of "does not match", of N images (rows) and N texts (N, N).
        targets: distribution over the texts for each image, and over the images for each text (N, N), see
            `positive_targets`.
    """
    log_odds = log_odds.float()
    return (soft_cross_entropy(log_odds, targets).mean() + soft_cross_entropy(log_odds.mT, targets).mean()) / 2


def distilled_cross_entropy(
    logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None, alpha: float | Tensor = 0.0
) -> Tensor:
    """Return `(1 - alpha) * CE + alpha * soft CE` (M,) of logits (M, V), in float32; 0 where a label is -100.

    Args:
        labels: the right classes (M,), -100 for rows that do not count.
        teacher_logits: the teacher's logits for the same rows (M, V), whose softmax is the soft target; None for hard
            labels alone.
    """
    hard = F.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="none")
    if teacher_logits is None:
        return hard
    soft = soft_cross_entropy(logits.float(), teacher_logits.detach().float().softmax(-1)).where(labels != -100, 0)
    return (1 - alpha) * hard + alpha * soft


def classification_loss(
    logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None, alpha: float | Tensor = 0.0
) -> Tensor:
    """Mean of `distilled_cross_entropy` over the rows that count, 0 if there are none; the arguments are the same."""
    return _masked_mean(distilled_cross_entropy(logits, labels, teacher_logits, alpha), labels != -100)


def mlm_loss(
    logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None, alpha: float | Tensor = 0.0
) -> Tensor:
    """Masked language modelling: `classification_loss` over the masked tokens.

    Args:
        logits: student logits (M, V).
        labels: the words that were masked (M,), -100 for rows that do not count.
        teacher_logits: the teacher's logits for the same tokens (M, V).
    """
    return classification_loss(logits, labels, teacher_logits, alpha)


def answer_loss(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    num_questions: int,
    teacher_logits: Tensor | None = None,
    alpha: float | Tensor = 0.0,
) -> Tensor:
    """Question answering: the answers' cross-entropies, summed over tokens, weighted, and divided by the questions.

    Args:
        logits: logits of the token after each of an answer's tokens (N, L, V).
        labels: the tokens after each (N, L), -100 after the end.
        weights: weight of each answer (N,), the share of people who gave it.
        num_questions: number of questions to which the N answers belong.
        teacher_logits: the teacher's logits (N, L, V).
    """
    teacher_logits = None if teacher_logits is None else teacher_logits.flatten(0, 1)
    per_token = distilled_cross_entropy(logits.flatten(0, 1), labels.flatten(), teacher_logits, alpha)
    return (weights * per_token.view_as(labels).sum(-1)).sum() / num_questions


def draw_two_images(image: Tensor, temperature: float = 0.07) -> tuple[Tensor, Tensor, Tensor]:
    """Draw two images for each text of a batch, and label to which of them, if any, the text belongs.

    With probability 2/3 one of them is the text's own image, first (label 0) or second (label 1); else neither is
    (label 2). The others are drawn from the softmax of the images' similarities to the own image, without that image
    and without replacement, as the largest of logits with Gumbel noise.

    Args:
        image: image features (N, D), L2-normalised; image n belongs to text n.
        temperature: number that divides the similarities (paper's code: 0.07).

    Returns:
        Rows of the first and of the second images (N,), and labels (N,): -100 where the batch has too few other images.
    """
    num_images = len(image)
    own = torch.arange(num_images, device=image.device)
    noise = torch.empty(num_images, num_images, device=image.device).exponential_().log()
    logits = similarity(image, image, torch.tensor(temperature, device=image.device)) - noise
    order = logits.masked_fill(torch.eye(num_images, dtype=torch.bool, device=image.device), -torch.inf)
    order = order.argsort(-1, descending=True)  # the own image last
    other, second_other = order[:, 0], order[:, min(1, num_images - 1)]
    with_own = torch.rand(num_images, device=image.device) > 1 / 3
    own_first = torch.rand(num_images, device=image.device) < 0.5
    first = torch.where(with_own & own_first, own, other)
    second = torch.where(with_own, torch.where(own_first, other, own), second_other)
    labels = torch.where(with_own, torch.where(own_first, 0, 1), 2)
    others_needed = torch.where(with_own, 1, 2)
    return first, second, labels.masked_fill(others_needed > num_images - 1, -100)


@torch.no_grad()
def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of rows (M, V) whose largest logit is that of their label (M,); labels of -100 do not count."""
    return _masked_mean((logits.argmax(-1) == labels).float(), labels != -100)


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the values (M,) where the mask (M,) holds; 0 where it holds nowhere."""
    return values.where(mask, 0).sum() / mask.sum().clamp(min=1)
