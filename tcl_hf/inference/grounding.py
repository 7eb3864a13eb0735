"""Where in an image is what a text speaks of: Grad-CAM heat maps of TCL, the words of a phrase, and boxes.

A heat map weights attention A by the gradient of a score, `A * max(d(score) / dA, 0)`, averaged over heads. The
score is that of matching, with a map for each token, or the similarity of image and text, with one map.

Shapes: N pairs of an image and a text, L tokens, P patches = height x width of the patch grid, K boxes. Boxes are
x1, y1, x2, y2 and sizes width, height, both in pixels of the image that a map is laid over, whatever its shape was
before it was resized for the model.
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.modeling_tcl import MATCHES, TCLForImageTextRetrieval, TCLModel
from ..models.processing_tcl import MAX_TOKENS, MAX_WORDS, TCLProcessor
from ..models.tokenization_tcl import TCLTokenizer, clean_caption_with_origins

HEAT_KINDS = ("matching", "similarity")  # of which score a map is
AREA_EXPONENT = 0.5  # of a box, by which its heat is divided: the original's for RefCOCO+

# Candidate boxes where no detector is at hand. Sides are shares of the square root of the image's area.
BOX_SCALES = (0.15, 0.25, 0.4, 0.6, 0.85)
BOX_ASPECT_RATIOS = (0.5, 1.0, 2.0)  # width / height
BOX_STEP = 0.25  # of a box's side, to the next box: neighbours overlap by an IoU of 0.6

_HEAT_COLOR, _MAX_OPACITY = (255, 0, 0), 0.7
_BOX_COLOR = (0, 255, 0)


def check_heat(heat: str) -> None:
    """Raise a ValueError where `heat` is none of `HEAT_KINDS`."""
    if heat not in HEAT_KINDS:
        raise ValueError(f"heat='{heat}' is no kind of heat map: choose one of {', '.join(HEAT_KINDS)}.")


def matching_heat_map(
    model: TCLForImageTextRetrieval,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    pixel_values: Tensor,
    layer: int | None = None,
    interpolate_pos_encoding: bool = False,
) -> Tensor:
    """Heat maps (N, L, height, width), float32, of each token for the logit that text and image match.

    Computed in eval mode; neither the model's mode nor its gradients change. Rows of padding are 0.

    Args:
        input_ids, attention_mask: texts (N, L).
        pixel_values: the image of each text (N, 3, height, width).
        layer: a fusion layer, counted in the whole text model; of the last one only [CLS] reaches the score, so that
            maps of all other tokens are 0. None for the lower middle of the fusion layers, which is the original's
            choice: 8 of 12 layers, the third of six fusion layers.
        interpolate_pos_encoding: as in the model.

    Raises:
        ValueError: if `layer` is no fusion layer, or images and texts differ in number.
    """
    text_model = model.tcl.text_model
    layers = range(len(text_model.layers))
    fusion_layers = layers[len(layers) - len(text_model.fusion_layers) :]
    if not fusion_layers:
        raise ValueError("The model has no fusion layer, which matching needs: use similarity_heat_map.")
    if layer is None:
        layer = fusion_layers[(len(fusion_layers) - 1) // 2]
    if layer not in fusion_layers:
        raise ValueError(f"layer={layer} is no fusion layer: choose one of {list(fusion_layers)}.")
    _check_pairs(input_ids, pixel_values)
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)

    with _graph_from(text_model.layers[layer], model):
        image_states = model.tcl.encode_image(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        text_states = model.tcl.encode_text(input_ids, attention_mask)
        fused = model.tcl.fuse(text_states, attention_mask, image_states, output_attentions=True)
        score = model.itm_head(fused.pooler_output)[:, MATCHES]
        heat = _heat(score, fused.cross_attentions[layer - fusion_layers[0]])  # (N, L, 1 + P)
    heat = heat * attention_mask[..., None]
    return heat[..., 1:].unflatten(-1, _grid(model.tcl, pixel_values))


def similarity_heat_map(
    model: TCLModel | TCLForImageTextRetrieval,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    pixel_values: Tensor,
    layer: int = -1,
    interpolate_pos_encoding: bool = False,
) -> Tensor:
    """Heat maps (N, height, width), float32, for the similarity of text and image divided by the temperature.

    Computed in eval mode; neither the model's mode nor its gradients change.

    Args:
        input_ids, attention_mask: texts (N, L).
        pixel_values: the image of each text (N, 3, height, width).
        layer: the vision layer whose class token's attention is weighted; negative numbers count from the last.
        interpolate_pos_encoding: as in the model.

    Raises:
        ValueError: if there is no such layer, or images and texts differ in number.
    """
    tcl = model.base_model
    layers = tcl.vision_model.layers
    if not -len(layers) <= layer < len(layers):
        raise ValueError(f"layer={layer} is no layer of the vision encoder: choose one of 0 to {len(layers) - 1}.")
    _check_pairs(input_ids, pixel_values)

    with _graph_from(layers[layer], model):
        text = tcl.text_features(tcl.encode_text(input_ids, attention_mask)[:, 0])  # (N, D)
        vision = tcl.vision_model(
            pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, output_attentions=True
        )
        score = (tcl.image_features(vision.pooler_output) * text).sum(-1) / tcl.temperature
        heat = _heat(score, vision.attentions[layer])  # (N, 1 + P, 1 + P)
    return heat[:, 0, 1:].unflatten(-1, _grid(tcl, pixel_values))


@contextmanager
def _graph_from(layer: nn.Module, model: nn.Module) -> Iterator[None]:
    """Run `model` in eval mode and keep a graph of nothing before `layer` and everything after.

    What enters the layer becomes a leaf that needs a gradient. So parameters may be frozen, the caller may be under
    `no_grad` or `inference_mode`, and memory is spent on the layers from this one on only.
    """

    def begin(module: nn.Module, inputs: tuple) -> tuple:
        torch.set_grad_enabled(True)
        return (inputs[0].detach().requires_grad_(), *inputs[1:])

    modes = {module: module.training for module in model.modules()}
    hook = layer.register_forward_pre_hook(begin)
    model.eval()
    try:
        with torch.inference_mode(False), torch.no_grad():  # leaving no_grad undoes the hook's set_grad_enabled
            yield
    finally:
        hook.remove()
        for module, mode in modes.items():
            module.training = mode


def _heat(score: Tensor, weights: Tensor) -> Tensor:
    """Attention (N, H, L, P) weighted by what it adds to its row's score (N,), mean over heads: (N, L, P)."""
    (gradient,) = torch.autograd.grad(score.sum(), weights)
    return (weights.detach().float() * gradient.float().clamp(min=0)).mean(1)


def _check_pairs(input_ids: Tensor, pixel_values: Tensor) -> None:
    if len(input_ids) != len(pixel_values):
        raise ValueError(
            f"Heat maps need pairs, but got {len(pixel_values)} images and {len(input_ids)} texts: "
            "repeat the image of several texts."
        )


def _grid(tcl: TCLModel, pixel_values: Tensor) -> tuple[int, int]:
    """Patches along the height and the width of the images."""
    patch = tcl.config.vision_config.patch_size
    return pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch


# Texts: from the maps of tokens to those of a phrase.


def whole_text(heat_maps: Tensor) -> Tensor:
    """The map of the whole text (..., height, width), of its tokens' maps (..., L, height, width).

    Padding counts in the mean, as in the original: it scales a map, and changes nothing in it.
    """
    return heat_maps.mean(-3)


def phrase_map(heat_maps: Tensor, tokens: Tensor) -> Tensor:
    """The mean (..., height, width) of the maps (..., L, height, width) of a phrase's tokens (..., L).

    `tokens` is what `phrase_tokens` returns. Several phrases (K, L) of one text (L, height, width) give (K, height,
    width); one phrase for each of N texts gives (N, height, width).

    Raises:
        ValueError: if a phrase has no tokens, or is not as long as the text.
    """
    if tokens.shape[-1] != heat_maps.shape[-3]:
        raise ValueError(
            f"The phrase is marked among {tokens.shape[-1]} tokens, but there are maps of {heat_maps.shape[-3]}: pass "
            "the length of the padded text to phrase_tokens."
        )
    number = tokens.sum(-1)  # (...)
    if not number.all():
        raise ValueError("A phrase marks no token: take its tokens from phrase_tokens.")
    share = tokens.to(heat_maps) / number[..., None]
    return torch.einsum("...lhw,...l->...hw", heat_maps, share)


def phrase_span(caption: str, phrase: str) -> tuple[int, int]:
    """Where a phrase starts and ends in a caption: `caption[start:end]` is the phrase, but for upper case.

    The first place where it stands as words of its own ("man" is not looked for in "woman"), or else the first place.

    Raises:
        ValueError: if the phrase is empty or the caption does not contain it.
    """
    pattern = re.escape(phrase)
    for wanted in (rf"(?<!\w){pattern}(?!\w)", pattern):
        found = re.search(wanted, caption, re.IGNORECASE) if phrase else None
        if found:
            return found.span()
    raise ValueError(f"The phrase {phrase!r} does not occur in {caption!r}: pass words of the caption as they stand.")


def phrase_tokens(
    processor: TCLProcessor,
    caption: str,
    start: int,
    end: int,
    max_length: int = MAX_TOKENS,
    length: int | None = None,
) -> Tensor:
    """Which tokens of a caption, as the processor makes them, hold characters of `caption[start:end]`: bool (L,).

    Args:
        caption: the text as given to the processor, before it is cleaned.
        start, end: the span of the phrase in it, as `phrase_span` finds it.
        max_length: as given to the processor.
        length: number of tokens of the padded batch; None for the caption's own.

    Raises:
        ValueError: if the span lies outside the caption, nothing of it is left after the clean-up, or some of it is
            cut off with the end of the caption.
    """
    if not 0 <= start < end <= len(caption):
        raise ValueError(f"The span {start} to {end} is empty or outside the {len(caption)} characters of {caption!r}.")
    if processor.clean_text:
        cut, origins = clean_caption_with_origins(caption, MAX_WORDS)
        uncut, uncut_origins = clean_caption_with_origins(caption, len(caption))
    else:
        cut, origins = uncut, uncut_origins = caption, list(range(len(caption)))
    span = range(start, end)
    everywhere = _tokens_of(processor.tokenizer, uncut, [origin in span for origin in uncut_origins])
    tokens = _tokens_of(
        processor.tokenizer, cut, [origin in span for origin in origins], truncation=True, max_length=max_length
    )
    if not everywhere.any():
        raise ValueError(
            f"Of {caption[start:end]!r}, characters {start} to {end} of {caption!r}, the tokenizer reads nothing: "
            "choose a span with letters or digits."
        )
    if tokens.sum() < everywhere.sum():
        raise ValueError(
            f"The model does not read all of {caption[start:end]!r}, characters {start} to {end} of {caption!r}: only "
            f"the first {MAX_WORDS} words and {max_length} tokens are kept; shorten the caption or raise max_length."
        )
    if length is None:
        return tokens
    if length < len(tokens):
        raise ValueError(f"length={length} is less than the {len(tokens)} tokens of {caption!r}: pass the batch's.")
    return F.pad(tokens, (0, length - len(tokens)))


def _tokens_of(tokenizer: TCLTokenizer, text: str, chosen: list[bool], **kwargs) -> Tensor:
    """Which tokens (L,) of a text hold one of its chosen characters; special tokens hold none."""
    offsets = tokenizer(text, return_offsets_mapping=True, **kwargs)["offset_mapping"]
    return torch.tensor([any(chosen[start:end]) for start, end in offsets], dtype=torch.bool)


# Images: from a map to places and boxes.


def box_scores(heat_map: Tensor, boxes: Tensor | Sequence[Sequence[float]], image_size: tuple[int, int]) -> Tensor:
    """The heat (K,) inside of boxes (K, 4), over the square root of their area.

    The map (height, width) is resized to the image; corners are cut to integers (x2 and y2 excluded), the area is
    that of the box as given. A box between two pixels has the score 0.

    Raises:
        ValueError: if a box has no area or leaves the image, or the map is no single map.
    """
    boxes = _checked_boxes(boxes, image_size)
    heat = _resize(heat_map, image_size).cpu().double()
    integral = F.pad(heat.cumsum(0).cumsum(1), (1, 0, 1, 0))  # [y, x]: the heat above and left of the pixel
    x1, y1, x2, y2 = boxes.long().unbind(-1)
    inside = integral[y2, x2] - integral[y1, x2] - integral[y2, x1] + integral[y1, x1]
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return (inside / area**AREA_EXPONENT).float().to(heat_map.device)


def rank_boxes(heat_map: Tensor, boxes: Tensor | Sequence[Sequence[float]], image_size: tuple[int, int]) -> Tensor:
    """The order (K,) of boxes by `box_scores`, best first, equals as they came: `boxes[order[0]]` is the answer."""
    return box_scores(heat_map, boxes, image_size).argsort(descending=True, stable=True)


def sliding_boxes(image_size: tuple[int, int]) -> Tensor:
    """Boxes (K, 4) of every scale and aspect ratio all over an image, where there is no detector to propose any.

    Each of `BOX_SCALES` with each of `BOX_ASPECT_RATIOS`, cut to the image where it is larger, spread evenly from
    border to border at most `BOX_STEP` of a side apart. Corners are whole numbers; the order is always the same, and
    there are no two equal boxes.

    Raises:
        ValueError: if the image has no pixels.
    """
    _check_size(image_size)
    image_width, image_height = image_size
    boxes = []
    for scale in BOX_SCALES:
        for ratio in BOX_ASPECT_RATIOS:
            side = scale * (image_width * image_height) ** 0.5
            widths = _places(image_width, side * ratio**0.5)
            heights = _places(image_height, side / ratio**0.5)
            boxes += [(x1, y1, x2, y2) for y1, y2 in heights for x1, x2 in widths]
    return torch.tensor(list(dict.fromkeys(boxes)), dtype=torch.float32)


def _places(length: int, side: float) -> list[tuple[int, int]]:
    """Starts and ends of a side laid along a length, from border to border."""
    whole = min(max(round(side), 1), length)
    number = math.ceil((length - whole) / (BOX_STEP * whole)) + 1
    starts = [round(i * (length - whole) / max(number - 1, 1)) for i in range(number)]
    return [(start, start + whole) for start in starts]


def heat_point(heat_map: Tensor, image_size: tuple[int, int]) -> tuple[float, float]:
    """The point (x, y) of the pointing game: the middle of the hottest pixel, the map resized to the image.

    A map of zeros points at the middle of the image.

    Raises:
        ValueError: if the map is no single map.
    """
    heat = _resize(heat_map, image_size)
    if not heat.any():
        return image_size[0] / 2, image_size[1] / 2
    y, x = divmod(int(heat.argmax()), image_size[0])
    return x + 0.5, y + 0.5


def box_from_heat_map(
    heat_map: Tensor, image_size: tuple[int, int], threshold: float = 0.5
) -> tuple[int, int, int, int]:
    """The box around the hottest pixel and all it is connected to through pixels nearly as hot.

    These have at least `threshold` of its heat, the map resized to the image; pixels connect through their sides. The
    box of a map of zeros is the image.

    Raises:
        ValueError: if the threshold is not above 0 and at most 1, or the map is no single map.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold} is no share of the maximum: choose one above 0 and at most 1.")
    heat = _resize(heat_map, image_size).cpu()
    hot = heat >= threshold * heat.max()
    region = torch.zeros_like(hot)
    region.flatten()[heat.argmax()] = True
    grown = _spread(region, hot)
    while not torch.equal(grown, region):
        region, grown = grown, _spread(grown, hot)
    rows, columns = region.any(1).nonzero(), region.any(0).nonzero()
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _spread(region: Tensor, allowed: Tensor) -> Tensor:
    """The region (height, width), and what can be reached from it along a column and then a row of allowed pixels."""
    for _ in range(2):
        region, allowed = region.mT, allowed.mT
        # Allowed pixels without a gap have the same number of other pixels before them; a gap ends every row.
        runs = F.pad(~allowed, (1, 0), value=True).flatten().cumsum(0).view(len(allowed), -1)[:, 1:]
        reached = torch.zeros(int(runs.max()) + 1, dtype=torch.bool)
        reached[runs[region]] = True
        region = reached[runs] & allowed
    return region


def draw_heat_map(image: Image.Image, heat_map: Tensor, boxes: Tensor | Sequence[Sequence[float]] = ()) -> Image.Image:
    """The image in RGB, the redder the hotter relative to the map's maximum, with green boxes.

    Raises:
        ValueError: if a box has no area or leaves the image, or the map is no single map.
    """
    heat = _resize(heat_map, image.size).cpu().clamp(min=0)
    opacity = (heat / heat.max().clamp(min=torch.finfo(heat.dtype).tiny) * _MAX_OPACITY * 255).byte()
    image = image.convert("RGB")
    drawn = Image.composite(Image.new("RGB", image.size, _HEAT_COLOR), image, Image.fromarray(opacity.numpy()))
    pen = ImageDraw.Draw(drawn)
    for x1, y1, x2, y2 in _checked_boxes(boxes, image.size).long().tolist():
        corners = (x1, y1, max(x2 - 1, x1), max(y2 - 1, y1))  # PIL draws the last pixel, too
        pen.rectangle(corners, outline=_BOX_COLOR, width=max(1, min(image.size) // 100))
    return drawn


def _resize(heat_map: Tensor, image_size: tuple[int, int]) -> Tensor:
    """A map (height, width) at the size of an image, bicubically."""
    _check_size(image_size)
    if heat_map.dim() != 2:
        raise ValueError(f"heat_map has the shape {tuple(heat_map.shape)}, but one map (height, width) is needed.")
    width, height = image_size
    planes = heat_map.detach().float()[None, None]
    return F.interpolate(planes, size=(height, width), mode="bicubic", align_corners=False)[0, 0]


def _check_size(image_size: tuple[int, int]) -> None:
    if min(image_size) < 1:
        raise ValueError(f"image_size={tuple(image_size)} has no pixels: pass (width, height), as PIL's `image.size`.")


def _checked_boxes(boxes: Tensor | Sequence[Sequence[float]], image_size: tuple[int, int]) -> Tensor:
    """The boxes (K, 4) in float64 on the CPU."""
    if not isinstance(boxes, Tensor):
        rows = [[float(corner) for corner in box] for box in boxes]
        boxes = torch.tensor(rows, dtype=torch.float64) if rows else torch.empty(0, 4)
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes have the shape {tuple(boxes.shape)}, but (K, 4) is needed: x1, y1, x2, y2 of each.")
    boxes = boxes.detach().cpu().double()
    width, height = image_size
    x1, y1, x2, y2 = boxes.unbind(-1)
    # Corners are cut to integers, so that a fraction of a pixel beyond the border is none. NaN is never inside.
    inside = (x1 > -1) & (y1 > -1) & (x2 < width + 1) & (y2 < height + 1) & (x1 < x2) & (y1 < y2)
    if not inside.all():
        number = int((~inside).nonzero()[0])
        raise ValueError(
            f"boxes[{number}] = {boxes[number].tolist()} has no area or leaves the image of {width} x {height} pixels: "
            "boxes are x1, y1, x2, y2; cut them to the image."
        )
    return boxes
