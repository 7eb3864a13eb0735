"""A start for the projections in closed form: canonical correlation analysis of the encoders' pooled states.

Encoders that were trained separately are nearly aligned by a linear map. Gradient descent finds it in thousands of
steps, and disturbs the encoders on the way; two eigenvalue problems find it in a second.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data.captions import usable_captions
from ..data.images import IMAGE_ERRORS
from ..data.kept_states import plain_view_of
from ..models.encoders import eval_mode
from ..models.modeling_tcl import TCLModel, TCLTaughtModel
from ..models.processing_tcl import MAX_TOKENS, TCLProcessor
from .arguments import TrainingError

MAX_SAMPLES = 10_000  # more samples hardly change a map of a thousand numbers in and out
SMALLEST_DEVIATION = 0.01  # as a share of the mean one, because some dimensions of an encoder hardly change


@dataclass(frozen=True)
class AffineMap:
    """A linear layer: `weight` (D, width) and `bias` (D,)."""

    weight: Tensor
    bias: Tensor

    def __call__(self, states: Tensor) -> Tensor:
        """Map states (N, width) to (N, D)."""
        return states @ self.weight.mT + self.bias

    def set(self, layer: nn.Linear) -> None:
        """Give a layer this weight and bias."""
        with torch.no_grad():
            layer.weight.copy_(self.weight)
            layer.bias.copy_(self.bias)


def correlated_maps(
    images: Tensor, texts: Tensor, dim: int, ridge: float = 0.1, text_ridge: float | None = None
) -> tuple[AffineMap, AffineMap]:
    """Affine maps of two modalities to one space in which paired samples correlate most, strongest dimensions first.

    Both sides are standardised. Regularised canonical correlation analysis finds the directions (Hotelling 1936;
    ridge: Vinod 1976), and each is scaled by its correlation, so that a cosine weighs it by the square of the
    correlation: directions in which the modalities hardly agree would only add noise. All products are of float64,
    which autocast leaves as it is.

    Args:
        images, texts: pooled states of N pairs, (N, width of images) and (N, width of texts).
        dim: dimensions of the space (D), at most the smaller width; those beyond it are 0.
        ridge: added to the variance of each standardised dimension.
        text_ridge: the same for texts; `ridge` if None. A large one leaves the texts nearly where they are, and so
            keeps what their encoder knows of words that are not among the texts.
    """
    image_mean, image_scale = _moments(images)
    text_mean, text_scale = _moments(texts)
    image = ((images - image_mean) * image_scale).double()
    text = ((texts - text_mean) * text_scale).double()
    number = len(image)
    image_whitening = _whitening(image.mT @ image / number, ridge)
    text_whitening = _whitening(text.mT @ text / number, ridge if text_ridge is None else text_ridge)
    left, correlations, right = torch.linalg.svd(image_whitening @ (image.mT @ text / number) @ text_whitening)
    kept = min(dim, len(correlations))
    maps = []
    for whitening, directions, mean, scale in (
        (image_whitening, left[:, :kept], image_mean, image_scale),
        (text_whitening, right.mT[:, :kept], text_mean, text_scale),
    ):
        weight = torch.zeros(dim, len(mean), dtype=torch.float64)
        weight[:kept] = (whitening @ directions * correlations[:kept]).mT * scale
        maps.append(AffineMap(weight.to(mean.dtype), -(weight @ mean.double()).to(mean.dtype)))
    return maps[0], maps[1]


def _moments(states: Tensor) -> tuple[Tensor, Tensor]:
    """The mean (width,), and 1 over the standard deviation (width,), which is kept from being 0."""
    deviation = states.std(0)
    return states.mean(0), 1 / deviation.clamp(min=SMALLEST_DEVIATION * float(deviation.mean()))


def _whitening(covariance: Tensor, ridge: float) -> Tensor:
    """The inverse square root of a covariance (width, width) with a ridge."""
    values, vectors = torch.linalg.eigh(covariance + ridge * torch.eye(len(covariance), dtype=covariance.dtype))
    return vectors * values.rsqrt() @ vectors.mT


def align_projections(
    model: TCLTaughtModel,
    processor: TCLProcessor,
    samples: Any,
    *,
    ridge: float = 0.1,
    text_ridge: float | None = None,
    max_tokens: int = MAX_TOKENS,
    batch_size: int = 64,
    progress: bool = True,
) -> int:
    """Start a model's projections, and its teacher's, in closed form; return the number of pairs that decided.

    Args:
        samples: map-style records. The augmented views are used where states are kept of them, else the image as it is
            evaluated. At most `MAX_SAMPLES` records, spread evenly, are read, with all their captions.
        ridge, text_ridge: as in `correlated_maps`.
        max_tokens: longest text, [CLS] included.
        batch_size: images or texts in a forward pass.
        progress: show a progress bar.

    Raises:
        TrainingError: if there are too few pairs to learn from.
    """
    tcl: TCLModel = model.tcl
    rows = range(len(samples))
    if len(rows) > MAX_SAMPLES:
        rows = range(0, len(rows), -(-len(rows) // MAX_SAMPLES))
    with eval_mode(model):
        images, texts = _pooled_pairs(tcl, processor, samples, rows, max_tokens, batch_size, progress)
    if len(images) < 2:
        raise TrainingError(
            f"projection_start=cca needs pairs to start the projections from, and {len(images)} of {len(rows)} samples "
            "can be used: name more data, or set projection_start to random."
        )
    image_map, text_map = correlated_maps(images, texts, tcl.config.projection_dim, ridge, text_ridge)
    for owner in [tcl] if model.teacher is None else [tcl, model.teacher.tcl]:
        image_map.set(owner.visual_projection)
        text_map.set(owner.text_projection)
    return len(images)


@torch.no_grad()
def _pooled_pairs(
    tcl: TCLModel,
    processor: TCLProcessor,
    samples: Any,
    rows: Sequence[int],
    max_tokens: int,
    batch_size: int,
    progress: bool,
) -> tuple[Tensor, Tensor]:
    """Pooled states of images and texts, a row for each caption of each view: (N, width) of either."""
    images: list[Tensor] = []
    texts: list[str] = []
    numbers: list[list[int]] = []  # the texts of each image
    for first in tqdm(range(0, len(rows), batch_size), "Aligning the projections", disable=not progress, leave=False):
        inputs = []
        for row in rows[first : first + batch_size]:
            record = samples[row]
            try:
                captions = usable_captions(record, processor.clean_caption)
                views = _views(processor, record)
            except IMAGE_ERRORS:
                continue
            inputs += views
            for _ in views:
                numbers.append(list(range(len(texts), len(texts) + len(captions))))
            texts += captions
        for start in range(0, len(inputs), batch_size):
            states = tcl.encode_image(torch.stack(inputs[start : start + batch_size]).to(tcl.device))
            images += tcl.pool_image(states).float().cpu().unbind()
    pooled_texts = _pooled_texts(tcl, processor, texts, max_tokens, batch_size)
    if not images:
        return torch.zeros(0, 1), torch.zeros(0, 1)
    of_image = [image for image, own in zip(images, numbers, strict=True) for _ in own]
    return torch.stack(of_image), pooled_texts[[number for own in numbers for number in own]]


def _views(processor: TCLProcessor, record: dict) -> list[Tensor]:
    """The kept views of a record's image, or its pixels as it is evaluated."""
    if "states" in record:
        return [view.float() for view in record["states"].all_to_train_on()]
    return [plain_view_of(processor, record)]


def _pooled_texts(tcl: TCLModel, processor: TCLProcessor, texts: list[str], max_tokens: int, batch_size: int) -> Tensor:
    """Pooled states of texts (N, width), computed with texts of similar length together."""
    pooled: list[Any] = [None] * len(texts)
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        tokens = processor(text=[texts[n] for n in chosen], return_tensors="pt", max_length=max_tokens).to(tcl.device)
        states = tcl.encode_text(tokens["input_ids"], tokens["attention_mask"])
        for number, one in zip(chosen, tcl.pool_text(states, tokens["attention_mask"]).float().cpu(), strict=True):
            pooled[number] = one
    return torch.stack(pooled) if pooled else torch.zeros(0, 1)
