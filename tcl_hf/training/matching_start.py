"""A start for matching in closed form: a fusion layer whose matching logits follow the similarity.

New fusion layers know nothing of how texts and images correspond, and learn it slowly from few pairs. One layer can be
given what the projections know: its self-attention pools the text and projects it, its cross-attention does so with the
image, and its feed-forward network multiplies both. For an even function g, a product is a sum of squares:
`g(x + y) - g(x - y)` is `2 g''(0) x y` and terms of the fourth order, and the even part of GELU is such a function, so
that four units multiply two numbers. The layer norms in between make the scalar product a cosine, nearly.

Shapes: N pairs, D features, w width of the text, d width of a head, r dimensions that are multiplied.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.captions import usable_captions
from ..data.images import IMAGE_ERRORS
from ..data.kept_states import plain_view_of
from ..models.attention import TCLAttention
from ..models.encoders import eval_mode
from ..models.losses import similarity
from ..models.modeling_tcl import TCLForImageTextRetrieval, TCLModel, log_odds_of
from ..models.processing_tcl import MAX_TOKENS, TCLProcessor
from .arguments import TrainingError

MAX_SAMPLES = 1000  # enough for the sizes of features
NUM_WITH_STATES = 64  # the samples whose states are all kept; all pairs among them calibrate the head
TEXT_TO_REST = 3.0  # size of the projected text beside what [CLS] holds, in a sum that is normalised afterwards
UNIT_INPUT = 0.3  # scale of a unit's input, small enough for g to be nearly a square
PRODUCT = 10.0  # size of the product among the states, whose norm is the square root of w
ALONE, WITHOUT = 8.0, -4.0  # a class token's logit beside the others', for attention to it alone or not at all


@dataclass
class _Samples:
    """The samples that the closed form reads (N): their pooled states, and all states of the first ones (n)."""

    image: Tensor  # (N, width or 2 * width)
    text: Tensor  # (N, w or 2 * w)
    image_states: Tensor  # (n, 1 + P, width)
    text_states: Tensor  # (n, L, w)
    attention_mask: Tensor  # (n, L)


def start_matching(
    model: TCLForImageTextRetrieval,
    processor: TCLProcessor,
    samples: Any,
    *,
    max_tokens: int = MAX_TOKENS,
    batch_size: int = 64,
) -> float:
    """Start the only fusion layer, the teacher's too, and the matching head in closed form.

    The log-odds of a pair are then nearly its similarity divided by the temperature, less a constant that lies between
    those of matching and of other pairs. What this does not need keeps its values, and changes no output.

    Args:
        samples: map-style records. At most `MAX_SAMPLES`, spread evenly, are read, with their first captions.
        max_tokens: longest text, [CLS] included.
        batch_size: images or texts in a forward pass.

    Returns:
        The correlation of log-odds and similarities, over pairs that match and pairs that do not.

    Raises:
        TrainingError: if the model has another number of fusion layers than one, the layer is too narrow, or there are
            too few samples.
    """
    tcl: TCLModel = model.tcl
    size = multiplied_dimensions(tcl)
    layer: Any = tcl.text_model.fusion_layers[0]
    with torch.no_grad(), eval_mode(model):
        read = _read(tcl, processor, samples, max_tokens, batch_size)
        x, y = tcl.text_projection(read.text).float(), tcl.visual_projection(read.image).float()  # (N, D)
        basis = _shared_basis(x, y, size)  # (D, r)
        width = tcl.config.text_config.hidden_size
        texts, images, product = _directions(width, size).to(x).split([size, size, 1], dim=1)  # (w, r), (w, r), (w, 1)
        for norm in (layer.self_attn_layer_norm, layer.cross_attn_layer_norm, layer.final_layer_norm):
            nn.init.ones_(norm.weight)
            nn.init.zeros_(norm.bias)

        text_size = TEXT_TO_REST * read.text_states[:, 0].norm(dim=-1).mean() / (x @ basis).norm(dim=-1).mean()
        is_token = read.attention_mask.bool()
        telling = _telling_class(read.text_states[:, 0], read.text_states[:, 1:][is_token[:, 1:]])
        parts = _parts(tcl.text_projection, tcl.config.text_pooling, of_class=ALONE, of_mean=None)
        _pool_and_project(layer.self_attn, parts, tcl.text_projection.bias, telling, basis, texts * text_size)

        # The layer norm leaves the text this share of the norm, and the image gets as much.
        share = TEXT_TO_REST / (1 + TEXT_TO_REST**2) ** 0.5
        image_size = share * width**0.5 / (y @ basis).norm(dim=-1).mean()
        telling = _telling_class(read.image_states[:, 0], read.image_states[:, 1:].flatten(0, 1))
        parts = _parts(tcl.visual_projection, tcl.config.image_pooling, of_class=ALONE, of_mean=WITHOUT)
        _pool_and_project(layer.cross_attn, parts, tcl.visual_projection.bias, telling, basis, images * image_size)

        _multiply(layer, texts, images, product)
        correlation = _calibrate(model, read, product)
        if model.teacher is not None:
            model.teacher.tcl.text_model.fusion_layers[0].load_state_dict(layer.state_dict())
    return correlation


def multiplied_dimensions(tcl: TCLModel) -> int:
    """The number of dimensions of the features that the fusion layer of a model multiplies (r), a multiple of d.

    Raises:
        TrainingError: if the model has another number of fusion layers than one, does not match, or is too narrow.
    """
    config = tcl.config.text_config
    if config.num_fusion_layers != 1:
        raise TrainingError(
            f"fusion_start=similarity starts one fusion layer, and the model has {config.num_fusion_layers}: set "
            "num_fusion_layers to 1, or fusion_start to random."
        )
    if not tcl.config.itm_weight:
        raise TrainingError(
            "fusion_start=similarity starts matching, and itm_weight is 0: set itm_weight above 0, or fusion_start to "
            "random."
        )
    head = config.hidden_size // config.num_attention_heads
    poolings = (tcl.config.image_pooling, tcl.config.text_pooling)
    heads = config.num_attention_heads // max(1 + (pooling == "cls_mean") for pooling in poolings)
    # Text and image have directions of their own; two are left, for the product and for the mean, which norms remove.
    heads = min(heads, (config.hidden_size - 2) // (2 * head), config.intermediate_size // (4 * head))
    if not heads:
        raise TrainingError(
            f"fusion_start=similarity needs a wider fusion layer than one with hidden_size={config.hidden_size}, "
            f"num_attention_heads={config.num_attention_heads} and intermediate_size={config.intermediate_size}: set "
            "fusion_start to random."
        )
    return head * min(heads, -(-tcl.config.projection_dim // head))


def _read(tcl: TCLModel, processor: TCLProcessor, samples: Any, max_tokens: int, batch_size: int) -> _Samples:
    pooled: list[tuple[Tensor, Tensor]] = []
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    rows = range(0, len(samples), max(1, -(-len(samples) // MAX_SAMPLES)))
    for first in range(0, len(rows), batch_size):
        images: list[Tensor] = []
        texts: list[str] = []
        for record in (samples[row] for row in rows[first : first + batch_size]):
            try:
                caption = usable_captions(record, processor.clean_caption)[0]
                images.append(plain_view_of(processor, record))
            except IMAGE_ERRORS:
                continue
            texts.append(caption)
        if not texts:
            continue
        tokens = processor(text=texts, return_tensors="pt", max_length=max_tokens).to(tcl.device)
        image = tcl.encode_image(torch.stack(images).to(tcl.device)).float()
        text = tcl.encode_text(tokens["input_ids"], tokens["attention_mask"]).float()
        pooled.append((tcl.pool_image(image), tcl.pool_text(text, tokens["attention_mask"])))
        if sum(len(one) for one, _, _ in kept) < NUM_WITH_STATES:
            kept.append((image, text, tokens["attention_mask"]))
    number = sum(len(one) for one, _ in pooled)
    if number < 2:
        raise TrainingError(
            f"fusion_start=similarity needs pairs to start from, and {number} of {len(samples)} samples can be used: "
            "name more data, or set fusion_start to random."
        )
    length = max(mask.shape[1] for _, _, mask in kept)
    padded = [(one, F.pad(text, (0, 0, 0, length - text.shape[1]))) for one, text, _ in kept]
    masks = [F.pad(mask, (0, length - mask.shape[1])) for _, _, mask in kept]
    image, text = (torch.cat([pair[side] for pair in pooled]) for side in (0, 1))
    image_states, text_states = (torch.cat([pair[side] for pair in padded])[:NUM_WITH_STATES] for side in (0, 1))
    return _Samples(image, text, image_states, text_states, torch.cat(masks)[:NUM_WITH_STATES])


def _shared_basis(x: Tensor, y: Tensor, size: int) -> Tensor:
    """Orthonormal directions (D, r) in which features of texts (N, D) and of images (N, D) are largest.

    Columns beyond D are 0.
    """
    moments = sum(z.mT @ z / z.square().sum() for z in (x, y))
    directions = torch.linalg.eigh(moments.double()).eigenvectors.flip(1)[:, :size].to(x.dtype)
    return F.pad(directions, (0, size - directions.shape[1]))


def _directions(width: int, size: int) -> Tensor:
    """Orthonormal columns (w, 2 * r + 1), also orthogonal to a column of ones; always the same."""
    drawn = torch.randn(width, 2 * size + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.linalg.qr(torch.cat([torch.ones(width, 1, dtype=torch.float64), drawn], dim=1)).Q[:, 1:]


def _telling_class(classes: Tensor, others: Tensor) -> Tensor:
    """The direction (width,) whose product with a class token (n, width) is about 1 more than with other states.

    It is that of linear regression, in which the class tokens count as much as all other states (m, width).
    """
    states = torch.cat([classes, others]).double()
    weights = torch.cat([torch.full((len(x), 1), 1 / len(x)).to(states) for x in (classes, others)])
    inputs = F.pad(states, (0, 1), value=1.0)
    labels = torch.zeros_like(weights)
    labels[: len(classes)] = 1
    products = inputs.mT @ (inputs * weights)
    ridge = 1e-5 * products.diagonal().mean() * torch.eye(len(products)).to(products)
    return torch.linalg.solve(products + ridge, inputs.mT @ (labels * weights))[:-1, 0].to(classes.dtype)


def _parts(
    projection: nn.Linear, pooling: str, of_class: float, of_mean: float | None
) -> list[tuple[Tensor, float | None]]:
    """The parts of a projection: the weight of each pooled state (D, width), and the logit of a class token for it."""
    choices: dict[str, list[float | None]] = {"cls": [of_class], "mean": [of_mean], "cls_mean": [of_class, of_mean]}
    logits = choices[pooling]
    return list(zip(projection.weight.chunk(len(logits), dim=1), logits, strict=True))


def _pool_and_project(
    attention: TCLAttention,
    parts: list[tuple[Tensor, float | None]],
    bias: Tensor,
    telling: Tensor,
    basis: Tensor,
    directions: Tensor,
) -> None:
    """Make an attention add the features of what it attends to, along its own directions.

    Args:
        parts: the weights of the features (D, width), and the logit of a class token beside other states for each; None
            to attend to all states alike.
        bias: that of the features (D,).
        telling: see `_telling_class`.
        basis: the dimensions of the features that are used (D, r).
        directions: where they go, scaled (w, r).
    """
    size, head = basis.shape[1], attention.head_dim
    attention.out_proj.weight.zero_()
    attention.out_proj.bias.zero_()
    for number, (weight, logit) in enumerate(parts):
        rows = slice(number * size, (number + 1) * size)
        attention.q_proj.weight[rows] = 0
        attention.q_proj.bias[rows] = 0
        if logit is not None:
            first_rows = slice(number * size, (number + 1) * size, head)
            attention.q_proj.bias[first_rows] = 1
            attention.k_proj.weight[first_rows] = telling * logit / attention.scaling
        attention.v_proj.weight[rows] = basis.mT @ weight
        attention.v_proj.bias[rows] = basis.mT @ bias if number == 0 else 0
        attention.out_proj.weight[:, rows] = directions


def _multiply(layer: Any, texts: Tensor, images: Tensor, product: Tensor) -> None:
    """Make a feed-forward network add the scalar product of two parts of its input, along `product` (w, 1).

    Args:
        texts, images: the directions of the parts (w, r).
    """
    width, size = texts.shape
    step = torch.tensor(UNIT_INPUT).to(texts)
    curvature = (layer.activation(step) + layer.activation(-step) - 2 * layer.activation(0 * step)) / step**2
    gain = PRODUCT / (4 * curvature * UNIT_INPUT**2 * width / 2)  # each part has half of the squared norm, w
    layer.fc2.weight.zero_()
    layer.fc2.bias.zero_()
    for number, (of_text, of_image) in enumerate([(1, 1), (-1, -1), (1, -1), (-1, 1)]):
        units = slice(number * size, (number + 1) * size)
        layer.fc1.weight[units] = UNIT_INPUT * (of_text * texts + of_image * images).mT
        layer.fc1.bias[units] = 0
        layer.fc2.weight[:, units] = gain * of_text * of_image * product


def _calibrate(model: TCLForImageTextRetrieval, read: _Samples, product: Tensor) -> float:
    """Let the matching head read the product, on the scale of similarities; return the correlation with these."""
    tcl, head, number = model.tcl, model.itm_head, len(read.image_states)
    head.weight.copy_(torch.cat([-product, product], dim=1).mT)
    head.bias.zero_()
    texts = torch.arange(number, device=head.weight.device).repeat(number)
    logits = model.match(read.text_states, read.attention_mask, read.image_states, text_index=texts)
    log_odds = log_odds_of(logits.float()).view(number, number)  # (images, texts)
    features = tcl.image_features(read.image_states), tcl.text_features(read.text_states, read.attention_mask)
    expected = similarity(*features, tcl.temperature)
    centred, wanted = log_odds - log_odds.mean(), expected - expected.mean()
    slope = (centred * wanted).sum() / centred.square().sum()
    between = (expected.diagonal().mean() + expected.mean()) / 2
    offset = slope * log_odds.mean() - expected.mean() + between
    head.weight.mul_(slope)
    head.bias.copy_(torch.stack([offset, -offset]) / 2)
    return float((centred * wanted).sum() / (centred.norm() * wanted.norm()))
