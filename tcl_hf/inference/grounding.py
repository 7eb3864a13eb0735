"""Grounding: Grad-CAM heat maps of phrases in an image, and points and boxes from these maps.

A heat map weights attention A by the gradient of a score, `A * max(d(score) / dA, 0)`, averaged over heads. The score
is the matching logit, which gives a map for each token, or the similarity of image and text, which gives one map.

Shapes: N pairs of an image and a text, L tokens, P patches = height x width of the patch grid, K boxes. Boxes (x1, y1,
x2, y2) and sizes (width, height) are in pixels of the original image, not of the image resized for the model.
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.modeling_tcl import MATCHES, TCLForImageTextRetrieval, TCLModel
from ..models.processing_tcl import MAX_TOKENS, MAX_WORDS, TCLProcessor
from ..models.tokenization_tcl import clean_caption_with_origins

HEAT_KINDS = ("matching", "similarity")  # the scores that have heat maps
AREA_EXPONENT = 0.5  # a box's heat is divided by its area to this power, as in the original for RefCOCO+

# Candidate boxes for images without a detector's proposals. Sides are shares of the square root of the image's area.
BOX_SCALES = (0.15, 0.25, 0.4, 0.6, 0.85)
BOX_ASPECT_RATIOS = (0.5, 1.0, 2.0)  # width / height
BOX_STEP = 0.25  # distance to the next box as a share of the side: neighbours have an IoU of 0.6

_HEAT_COLOR, _MAX_OPACITY = (255, 0, 0), 0.7
_BOX_COLOR = (0, 255, 0)

Span = tuple[int, int]  # first character, and the one after the last
Boxes: TypeAlias = Tensor | Sequence[Sequence[float]]  # (K, 4)


# Heat maps of tokens and texts


def matching_heat_map(
    model: TCLForImageTextRetrieval,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    pixel_values: Tensor,
    layer: int | None = None,
    interpolate_pos_encoding: bool = False,
) -> Tensor:
    """Heat maps (N, L, height, width) of each token, float32, for the logit that text and image match.

    They are computed in eval mode; the model's mode and its gradients do not change. Maps of padding are 0.

    Args:
        input_ids, attention_mask: texts (N, L).
        pixel_values: the image of each text (N, 3, height, width).
        layer: a fusion layer, counted from the first layer of the text model. In the last one only [CLS] reaches the
            score, so that the maps of all other tokens are 0. None chooses the lower middle of the fusion layers, which
            is the original's choice: layer 8 of 12, the third of six fusion layers.
        interpolate_pos_encoding: as in the model.

    Raises:
        ValueError: if `layer` is not a fusion layer, or images and texts differ in number.
    """
    text_model = model.tcl.text_model
    fusion_layers = range(text_model.config.fusion_layer, len(text_model.layers))
    if not fusion_layers:
        raise ValueError("The model has no fusion layers, which matching needs: use similarity_heat_map.")
    if layer is None:
        layer = fusion_layers[(len(fusion_layers) - 1) // 2]
    if layer not in fusion_layers:
        raise ValueError(f"layer={layer} is not a fusion layer: choose one of {list(fusion_layers)}.")
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
    return heat[..., 1:].unflatten(-1, model.tcl.config.vision_config.grid_of_states(*pixel_values.shape[-2:]))


def similarity_heat_map(
    model: TCLModel | TCLForImageTextRetrieval,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    pixel_values: Tensor,
    layer: int = -1,
    interpolate_pos_encoding: bool = False,
) -> Tensor:
    """Heat maps (N, height, width), float32, for the similarity of text and image divided by the temperature.

    They are computed in eval mode; the model's mode and its gradients do not change.

    Args:
        input_ids, attention_mask: texts (N, L).
        pixel_values: the image of each text (N, 3, height, width).
        layer: the vision layer whose class token's attention is weighted; negative numbers count from the last.
        interpolate_pos_encoding: as in the model.

    Raises:
        ValueError: if the layer does not exist, or images and texts differ in number.
    """
    tcl = model.base_model
    layers = tcl.vision_model.layers
    if not -len(layers) <= layer < len(layers):
        raise ValueError(
            f"layer={layer} is outside the vision encoder: choose one of {-len(layers)} to {len(layers) - 1}."
        )
    _check_pairs(input_ids, pixel_values)

    with _graph_from(layers[layer], model):
        text = tcl.text_features(tcl.encode_text(input_ids, attention_mask), attention_mask)  # (N, D)
        vision = tcl.vision_model(
            pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, output_attentions=True
        )
        score = (tcl.image_features(vision.last_hidden_state) * text).sum(-1) / tcl.temperature
        heat = _heat(score, vision.attentions[layer])  # (N, 1 + R + P, 1 + R + P), with R register tokens
    vision_config = tcl.config.vision_config
    of_patches = heat[:, 0, 1 + vision_config.num_register_tokens :]
    return of_patches.unflatten(-1, vision_config.grid(*pixel_values.shape[-2:]))


@contextmanager
def _graph_from(layer: nn.Module, model: nn.Module) -> Iterator[None]:
    """Run `model` in eval mode, with an autograd graph that begins at `layer`.

    The input of the layer becomes a leaf that requires a gradient. So parameters may be frozen, the caller may be under
    `no_grad` or `inference_mode`, and layers before this one keep no activations.
    """

    def begin(module: nn.Module, inputs: tuple) -> tuple:
        torch.set_grad_enabled(True)
        return (inputs[0].detach().requires_grad_(), *inputs[1:])

    modes = {module: module.training for module in model.modules()}
    hook = layer.register_forward_pre_hook(begin)
    model.eval()
    try:
        with torch.inference_mode(False), torch.no_grad():  # its exit also undoes the hook's set_grad_enabled
            yield
    finally:
        hook.remove()
        for module, mode in modes.items():
            module.training = mode


def _heat(score: Tensor, weights: Tensor) -> Tensor:
    """Attention (N, H, L, P) weighted by the positive part of its gradient of the score (N,), mean over heads."""
    (gradient,) = torch.autograd.grad(score.sum(), weights)
    return (weights.detach().float() * gradient.float().clamp(min=0)).mean(1)  # (N, L, P)


def _check_pairs(input_ids: Tensor, pixel_values: Tensor) -> None:
    if len(input_ids) != len(pixel_values):
        raise ValueError(
            f"Each text needs one image, but got {len(pixel_values)} images and {len(input_ids)} texts: "
            "repeat the image of several texts."
        )


# Phrases: their tokens, and their heat maps


def phrase_map(heat_maps: Tensor, tokens: Tensor) -> Tensor:
    """The mean (..., height, width) of the maps (..., L, height, width) of a phrase's tokens (..., L).

    K phrases (K, L) of one text (L, height, width) give (K, height, width); one phrase of each of N texts gives (N,
    height, width).

    Args:
        tokens: which tokens belong to the phrase, as `phrase_tokens` returns them.

    Raises:
        ValueError: if a phrase has no tokens, or `tokens` and `heat_maps` differ in length.
    """
    if tokens.shape[-1] != heat_maps.shape[-3]:
        raise ValueError(
            f"The phrase is marked among {tokens.shape[-1]} tokens, but there are maps of {heat_maps.shape[-3]}: pass "
            "the length of the padded text to phrase_tokens."
        )
    count = tokens.sum(-1)  # (...)
    if not count.all():
        raise ValueError("A phrase marks no token: take its tokens from phrase_tokens.")
    weights = tokens.to(heat_maps) / count[..., None]
    return torch.einsum("...lhw,...l->...hw", heat_maps, weights)


def phrase_span(caption: str, phrase: str) -> Span:
    """Start and end of a phrase in a caption: `caption[start:end]` is the phrase, apart from upper case.

    Whole words come first: "man" is found inside "woman" only if it does not occur as a word. Among equals the first
    place is taken.

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
    """Mark the tokens of a caption that hold characters of `caption[start:end]`: bool (L,).

    Args:
        caption: the text as it is given to the processor, before it is cleaned.
        start, end: the span of the phrase, as `phrase_span` finds it.
        max_length: as it is given to the processor.
        length: number of tokens of the padded batch; None for that of the caption alone.

    Raises:
        ValueError: if the span lies outside the caption, none of it is left after the clean-up, or some of it is cut
            off with the end of the caption.
    """
    _check_span(caption, start, end)
    span = range(start, end)
    uncut_tokens = _tokens_of(processor, caption, span, max_words=len(caption))
    tokens = _tokens_of(processor, caption, span, MAX_WORDS, truncation=True, max_length=max_length)
    if not uncut_tokens.any():
        raise _nothing_read(caption, start, end)
    if tokens.sum() < uncut_tokens.sum():
        raise ValueError(
            f"The model does not read all of {caption[start:end]!r}, characters {start} to {end} of {caption!r}: only "
            f"the first {MAX_WORDS} words and {max_length} tokens are kept; shorten the caption or raise max_length."
        )
    if length is None:
        return tokens
    if length < len(tokens):
        raise ValueError(
            f"length={length} is less than the {len(tokens)} tokens of {caption!r}: pass the length of the batch."
        )
    return F.pad(tokens, (0, length - len(tokens)))


def _check_span(caption: str, start: int, end: int) -> None:
    if not 0 <= start < end <= len(caption):
        raise ValueError(f"The span {start} to {end} is empty or outside the {len(caption)} characters of {caption!r}.")


def _nothing_read(caption: str, start: int, end: int) -> ValueError:
    return ValueError(
        f"The tokenizer reads nothing of {caption[start:end]!r}, characters {start} to {end} of {caption!r}: choose a "
        "span with letters or digits."
    )


def _tokens_of(processor: TCLProcessor, caption: str, span: range, max_words: int, **kwargs) -> Tensor:
    """Mark the tokens (L,) of a caption that hold a character of the span; special tokens hold none."""
    text, origins = caption, list(range(len(caption)))
    if processor.clean_text:
        text, origins = clean_caption_with_origins(caption, max_words, processor.tokenizer.do_lower_case)
    offsets = processor.tokenizer(text, return_offsets_mapping=True, **kwargs)["offset_mapping"]
    return torch.tensor([any(i in span for i in origins[start:end]) for start, end in offsets], dtype=torch.bool)


def phrase_heat_maps(
    model: TCLForImageTextRetrieval,
    processor: TCLProcessor,
    pixel_values: Tensor,
    captions: Sequence[str],
    spans: Sequence[Sequence[Span | None]],
    heat: str = "matching",
    layer: int | None = None,
    max_tokens: int = MAX_TOKENS,
    skip_unread: bool = False,
) -> list[list[Tensor | None]]:
    """The heat map (height, width), float32 on the CPU, of each phrase of each caption.

    Args:
        pixel_values: the image of each caption (N, 3, height, width).
        captions: N texts, before they are cleaned.
        spans: the phrases of each caption, as `phrase_span` finds them; None for the whole caption.
        heat: the score that a map explains. "matching" takes the mean of the maps of the phrase's tokens in its
            caption. "similarity" reads the phrase alone as the text.
        layer: for matching a fusion layer, see `matching_heat_map`; for similarity a vision layer, the last if None.
        max_tokens: longest text, [CLS] included.
        skip_unread: return None, without an error, for a phrase that the model does not read, or not all of it.

    Raises:
        ValueError: if `heat` or `layer` do not exist, or the model does not read a phrase: the clean-up leaves nothing
            of it, or it is cut off with the end of its caption.
    """
    if heat not in HEAT_KINDS:
        raise ValueError(f"heat='{heat}' does not exist: choose one of {', '.join(HEAT_KINDS)}.")
    phrases = [(row, span) for row, of_caption in enumerate(spans) for span in of_caption]
    found: list[list[Tensor | None]] = [[] for _ in captions]
    if not phrases:
        return found
    alone = heat == "similarity"
    texts, rows = list(captions), list(range(len(captions)))
    if alone:
        texts = [captions[row] if span is None else captions[row][slice(*span)] for row, span in phrases]
        rows = [row for row, _ in phrases]
    tokens = processor(text=texts, return_tensors="pt", max_length=max_tokens).to(model.device)
    pairs = tokens["input_ids"], tokens["attention_mask"], pixel_values.to(model.device)[rows]
    if alone:
        maps = similarity_heat_map(model, *pairs, -1 if layer is None else layer).cpu()
    else:
        maps = matching_heat_map(model, *pairs, layer).cpu()
    masks = tokens["attention_mask"].bool().cpu()

    for number, (row, span) in enumerate(phrases):
        try:
            if alone:
                if span is not None:
                    _check_span(captions[row], *span)
                    if masks[number].sum() == 1:  # [CLS] alone
                        raise _nothing_read(captions[row], *span)
                heat_map = maps[number]
            elif span is None:
                heat_map = phrase_map(maps[row], masks[row])
            else:
                marked = phrase_tokens(processor, captions[row], *span, max_tokens, masks.shape[1])
                heat_map = phrase_map(maps[row], marked)
        except ValueError:
            if not skip_unread:
                raise
            heat_map = None
        found[row].append(heat_map)
    return found


# Places in an image: from a map to points and boxes


def box_scores(heat_map: Tensor, boxes: Boxes, image_size: tuple[int, int]) -> Tensor:
    """The heat (K,) inside boxes (K, 4), divided by the square root of their area.

    The map (height, width) is resized to the image. Corners are cut to integers, with x2 and y2 excluded, but the area
    is that of the box as given. A box between two pixels has the score 0.

    Raises:
        ValueError: if a box has no area or leaves the image, or `heat_map` is not a single map.
    """
    boxes = _checked_boxes(boxes, image_size)
    heat = _resize(heat_map, image_size).cpu().double()
    integral = F.pad(heat.cumsum(0).cumsum(1), (1, 0, 1, 0))  # [y, x] is the heat above and left of the pixel
    x1, y1, x2, y2 = boxes.long().unbind(-1)
    inside = integral[y2, x2] - integral[y1, x2] - integral[y2, x1] + integral[y1, x1]
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return (inside / area**AREA_EXPONENT).float().to(heat_map.device)


def rank_boxes(heat_map: Tensor, boxes: Boxes, image_size: tuple[int, int]) -> Tensor:
    """The order (K,) of boxes by `box_scores`, best first; boxes with equal scores keep their order."""
    return box_scores(heat_map, boxes, image_size).argsort(descending=True, stable=True)


def sliding_boxes(image_size: tuple[int, int]) -> Tensor:
    """Candidate boxes (K, 4) all over an image, for data without a detector's proposals.

    Each of `BOX_SCALES` is combined with each of `BOX_ASPECT_RATIOS` and cut to the image where it is larger. Boxes of
    one shape are spread evenly from border to border, at most `BOX_STEP` of a side apart. Corners are whole numbers,
    the order is always the same, and no box occurs twice.

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
    """Starts and ends of a box's side along the image's, from border to border."""
    side = min(max(round(side), 1), length)
    count = math.ceil((length - side) / (BOX_STEP * side)) + 1
    starts = [round(i * (length - side) / max(count - 1, 1)) for i in range(count)]
    return [(start, start + side) for start in starts]


def heat_point(heat_map: Tensor, image_size: tuple[int, int]) -> tuple[float, float]:
    """The point (x, y) of the pointing game: the middle of the hottest pixel of the map resized to the image.

    A map of zeros points at the middle of the image.

    Raises:
        ValueError: if `heat_map` is not a single map.
    """
    heat = _resize(heat_map, image_size)
    if not heat.any():
        return image_size[0] / 2, image_size[1] / 2
    y, x = divmod(int(heat.argmax()), image_size[0])
    return x + 0.5, y + 0.5


def box_from_heat_map(
    heat_map: Tensor, image_size: tuple[int, int], threshold: float = 0.5
) -> tuple[int, int, int, int]:
    """The box around the region of the hottest pixel, in a map resized to the image.

    The region is all pixels with at least `threshold` of the greatest heat that connect to the hottest one through
    their sides. The box of a map of zeros is the image.

    Raises:
        ValueError: if the threshold is not above 0 and at most 1, or `heat_map` is not a single map.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold} is not a share of the maximum: choose one above 0 and at most 1.")
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
    """The region (height, width) and all pixels that it reaches along a column, then a row, of allowed pixels."""
    for _ in range(2):
        region, allowed = region.mT, allowed.mT
        # Pixels of one run have the same number of pixels that are not allowed before them; each row starts a new run.
        runs = F.pad(~allowed, (1, 0), value=True).flatten().cumsum(0).view(len(allowed), -1)[:, 1:]
        reached = torch.zeros(int(runs.max()) + 1, dtype=torch.bool)
        reached[runs[region]] = True
        region = reached[runs] & allowed
    return region


def draw_heat_map(image: Image.Image, heat_map: Tensor, boxes: Boxes = ()) -> Image.Image:
    """The image in RGB, redder where the map is hotter relative to its maximum, with green boxes.

    Raises:
        ValueError: if a box has no area or leaves the image, or `heat_map` is not a single map.
    """
    heat = _resize(heat_map, image.size).cpu().clamp(min=0)
    opacity = (heat / heat.max().clamp(min=torch.finfo(heat.dtype).tiny) * _MAX_OPACITY * 255).byte()
    image = image.convert("RGB")
    drawn = Image.composite(Image.new("RGB", image.size, _HEAT_COLOR), image, Image.fromarray(opacity.numpy()))
    pen = ImageDraw.Draw(drawn)
    for x1, y1, x2, y2 in _checked_boxes(boxes, image.size).long().tolist():
        corners = (x1, y1, max(x2 - 1, x1), max(y2 - 1, y1))  # PIL includes the last pixel
        pen.rectangle(corners, outline=_BOX_COLOR, width=max(1, min(image.size) // 100))
    return drawn


def _resize(heat_map: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Resize a map (height, width) to the size of an image, bicubically."""
    _check_size(image_size)
    if heat_map.dim() != 2:
        raise ValueError(f"heat_map has the shape {tuple(heat_map.shape)}, but one map (height, width) is needed.")
    width, height = image_size
    planes = heat_map.detach().float()[None, None]
    return F.interpolate(planes, size=(height, width), mode="bicubic", align_corners=False)[0, 0]


def _check_size(image_size: tuple[int, int]) -> None:
    if min(image_size) < 1:
        raise ValueError(
            f"image_size={tuple(image_size)} has no pixels: pass (width, height) as in PIL's `image.size`."
        )


def _checked_boxes(boxes: Boxes, image_size: tuple[int, int]) -> Tensor:
    """The boxes (K, 4) in float64 on the CPU."""
    if not isinstance(boxes, Tensor):
        rows = [[float(corner) for corner in box] for box in boxes]
        boxes = torch.tensor(rows, dtype=torch.float64) if rows else torch.empty(0, 4)
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes have the shape {tuple(boxes.shape)}, but (K, 4) is needed: x1, y1, x2, y2 of each.")
    boxes = boxes.detach().cpu().double()
    width, height = image_size
    x1, y1, x2, y2 = boxes.unbind(-1)
    # Corners are cut to integers later, so a fraction of a pixel beyond the border is allowed. NaN is never inside.
    inside = (x1 > -1) & (y1 > -1) & (x2 < width + 1) & (y2 < height + 1) & (x1 < x2) & (y1 < y2)
    if not inside.all():
        number = int((~inside).nonzero()[0])
        raise ValueError(
            f"boxes[{number}] = {boxes[number].tolist()} has no area or leaves the image of {width} x {height} pixels: "
            "pass x1, y1, x2, y2, cut to the image."
        )
    return boxes
