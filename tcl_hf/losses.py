"""The five objectives of TCL as pure functions of tensors: CMA, IMC, LMI, ITM and MLM.

Names follow the paper ("Vision-Language Pre-Training with Triple Contrastive Learning", CVPR 2022):

- CMA, cross-modal alignment: an image and its text, against other texts and images.
- IMC, intra-modal contrast: a sample and another view of itself, within one modality.
- LMI, local mutual information: a whole sample and its own parts (patches, tokens).
- ITM, image-text matching: do the two sides of a fused pair belong together?
- MLM, masked language modelling, with the image as context.

Shapes: N samples of a batch, K keys (the teacher's batch, then the queue), L locals of a sample,
D feature dimensions, V words, M predicted tokens. Features are L2-normalised. Similarities and losses are
float32 whatever the model computes in. Nothing here reads a value back from the device.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

NO_IMAGE_ID = -100


def similarity(queries: Tensor, keys: Tensor, temperature: Tensor) -> Tensor:
    """Return `queries . keys / temperature` (N, K) in float32, for queries (N, D) and keys (K, D)."""
    with torch.autocast(queries.device.type, enabled=False):
        return queries.float() @ keys.float().mT / temperature.float()


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy (N,) of logits (N, K) against distributions over the same classes (N, K)."""
    return -(targets * F.log_softmax(logits, dim=-1)).sum(-1)


def positive_targets(ids: Tensor, key_ids: Tensor) -> Tensor:
    """Return the distribution (N, K) that spreads each query's mass evenly over the keys of the same image.

    `ids` (N,) are the batch's and `key_ids` (K,) those of the keys, the batch's own first. A query's own key is
    always positive; `NO_IMAGE_ID` matches nothing else.
    """
    same = (ids[:, None] == key_ids[None]) & (ids[:, None] != NO_IMAGE_ID)  # (N, K)
    own = torch.eye(len(ids), len(key_ids), dtype=torch.bool, device=ids.device)
    positives = (same | own).float()
    return positives / positives.sum(-1, keepdim=True)


def cma_loss(
    image: Tensor,
    text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    image_keys: Tensor,
    text_keys: Tensor,
    targets: Tensor,
    temperature: Tensor,
    alpha: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Cross-modal alignment: find the text of an image among the text keys, and the reverse.

    The target of a query is `(1 - alpha) * targets + alpha * teacher`, where the teacher's distribution is the
    softmax of its own similarities to the same keys; no gradient flows through it.

    Args:
        image, text: student features (N, D).
        teacher_image, teacher_text: teacher features (N, D).
        image_keys, text_keys: teacher features of the batch, then of the queue (K, D).
        targets: distribution over the keys (N, K), see `positive_targets`.

    Returns:
        The losses image-to-text and text-to-image, each a scalar.
    """

    def one_way(student: Tensor, teacher: Tensor, keys: Tensor) -> Tensor:
        with torch.no_grad():
            soft = similarity(teacher, keys, temperature).softmax(-1)  # (N, K)
            mixed = (1 - alpha) * targets + alpha * soft
        return soft_cross_entropy(similarity(student, keys, temperature), mixed).mean()

    return one_way(image, teacher_image, text_keys), one_way(text, teacher_text, image_keys)


def imc_loss(
    image: Tensor, text: Tensor, image_keys: Tensor, text_keys: Tensor, targets: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor]:
    """Intra-modal contrast: find the teacher's view of the same sample among the keys of its own modality.

    The targets are never softened. Arguments as in `cma_loss`.

    Returns:
        The losses image-to-image and text-to-text, each a scalar.
    """
    image_to_image = soft_cross_entropy(similarity(image, image_keys, temperature), targets).mean()
    text_to_text = soft_cross_entropy(similarity(text, text_keys, temperature), targets).mean()
    return image_to_image, text_to_text


def pool_locals(patches: Tensor, grid: tuple[int, int], size: int) -> Tensor:
    """Average patch features (N, height * width, D) over `size` x `size` regions: (N, size * size, D).

    The features are normalised before and not after. Any grid will do; where it divides evenly this is the
    mean over blocks.
    """
    planes = patches.mT.unflatten(-1, grid)  # (N, D, height, width)
    return F.adaptive_avg_pool2d(planes, size).flatten(-2).mT


def lmi_loss(features: Tensor, local_features: Tensor, temperature: Tensor, mask: Tensor | None = None) -> Tensor:
    """Local mutual information: each local of a sample against all locals of the other rows.

    With `s_ijk = features_i . local_jk / temperature`, the loss of local k of sample i is
    `-log(e^s_iik / (e^s_iik + sum over j != i and all k' of e^s_ijk'))`. The sum over the others does not depend
    on k, so the largest tensor is the similarity itself, (N, N, L).

    Args:
        features: student features of whole samples (N, D).
        local_features: teacher features of their parts (N, L, D).
        mask: which locals are real (N, L); all of them if None.

    Returns:
        Mean over the real locals of a sample, then over the samples that have any; 0 if none has.
    """
    num_samples, num_locals, _ = local_features.shape
    logits = similarity(features, local_features.flatten(0, 1), temperature)  # (N, N * L)
    logits = logits.unflatten(-1, (num_samples, num_locals))  # (N, N, L)
    if mask is None:
        mask = torch.ones(num_samples, num_locals, dtype=torch.bool, device=logits.device)
    mask = mask.bool()
    own = torch.eye(num_samples, dtype=torch.bool, device=logits.device)
    # A finite floor: logsumexp over nothing but -inf has no gradient, and a batch of one has no other row.
    floor = torch.finfo(logits.dtype).min
    others = logits.masked_fill(own[..., None] | ~mask, floor).flatten(1).logsumexp(-1)  # (N,)
    positives = logits.diagonal().mT  # (N, L): logits[i, i]
    per_local = F.softplus(others[:, None] - positives)  # -log(e^p / (e^p + e^others))
    per_sample = (per_local * mask).sum(-1) / mask.sum(-1).clamp(min=1)
    return _masked_mean(per_sample, mask.any(-1))


def sample_hard_negatives(logits: Tensor, excluded: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one column for each row of logits (N, N) from its softmax with the excluded columns set to 0.

    A softmax draw is the argmax of logits minus the log of exponential noise (the Gumbel-max trick): the
    distribution of `torch.multinomial` without reading anything back, and without underflow.

    Args:
        logits: similarities divided by the temperature (N, N).
        excluded: columns a row must not draw (N, N), at least its own.

    Returns:
        The drawn columns (N,), and whether the row had any to draw (N,); the index of a row that had none is
        meaningless and its pair must be left out.
    """
    noise = torch.empty_like(logits).exponential_().log()
    index = (logits - noise).masked_fill(excluded, -torch.inf).argmax(-1)
    return index, ~excluded.all(-1)


def itm_loss(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Image-text matching: mean two-way cross-entropy of logits (M, 2) over the pairs that exist.

    Args:
        labels: 1 where the pair matches, 0 where it does not (M,).
        mask: `False` for pairs without an admissible negative (M,).
    """
    return _masked_mean(F.cross_entropy(logits.float(), labels, reduction="none"), mask)


def mlm_loss(
    logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None, alpha: float | Tensor = 0.0
) -> Tensor:
    """Masked language modelling: `(1 - alpha) * CE + alpha * soft CE` against the teacher's softmax.

    Args:
        logits: student logits (M, V).
        labels: the words that were masked (M,), -100 for rows that do not count.
        teacher_logits: the teacher's for the same tokens (M, V); None for hard labels alone.

    Returns:
        Mean over the rows that count, 0 if there is none.
    """
    counts = labels != -100
    hard = _masked_mean(F.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="none"), counts)
    if teacher_logits is None:
        return hard
    soft_targets = teacher_logits.detach().float().softmax(-1)
    soft = _masked_mean(soft_cross_entropy(logits.float(), soft_targets), counts)
    return (1 - alpha) * hard + alpha * soft


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the values (M,) where the mask (M,) holds; 0 where it holds nowhere."""
    return values.where(mask, 0).sum() / mask.sum().clamp(min=1)
