"""Grounding: whether the heat map of a phrase points at its boxes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data.images import open_image
from ..inference.grounding import (
    check_heat,
    heat_point,
    matching_heat_map,
    phrase_map,
    phrase_tokens,
    rank_boxes,
    similarity_heat_map,
    sliding_boxes,
)
from ..models.modeling_tcl import TCLForImageTextRetrieval
from ..models.processing_tcl import MAX_TOKENS, TCLProcessor
from .metrics import phrase_recall, pointing_accuracy
from .shares import Evaluation, batches, evaluating, exchange, own_share


def evaluate_grounding(
    model: TCLForImageTextRetrieval,
    processor: TCLProcessor,
    records: Sequence[dict],
    layer: int | None = None,
    batch_size: int = 32,
    max_tokens: int = MAX_TOKENS,
    progress: bool = False,
    heat: str = "matching",
) -> Evaluation:
    """Where phrases are, by Grad-CAM of the matching of image and caption, or of the similarity of image and phrase.

    `pointing_accuracy` is the share of phrases whose map is highest inside one of their boxes; `recall@k` that of
    phrases for which one of the k best candidate boxes overlaps a true one by half (`any_...`), or the one box that
    encloses all true ones (`merged_...`). Candidates are the record's proposals, or else a fixed set of boxes. Phrases
    without a box, and those that truncation cuts off, are not counted; `phrases` says how many were.

    Beside it stands what needs no model: a random point (the mean share of the boxes' area), the centre of the image,
    the whole image, and a box in its middle with half its sides.

    Args:
        layer: whose attention is read: a fusion layer for matching, see `matching_heat_map`, or a vision layer for
            similarity, the last one if None.
        heat: "matching", with the maps of the phrase's tokens in its caption; or "similarity", with the phrase alone as
            the text.
    """
    check_heat(heat)
    captions = [
        (record, number, phrases)
        for record in records
        for number in range(len(record["captions"]))
        if (phrases := [p for p in record["phrases"] if p["caption_index"] == number and p["boxes"]])
    ]
    own: list[list[dict]] = []
    share = own_share(len(captions))
    bar = tqdm(total=len(share), desc="Grounding", unit="caption", disable=not progress, leave=False)
    with evaluating(model):
        for rows in batches(share, batch_size):
            own += _ground(model, processor, [captions[row] for row in rows], heat, layer, max_tokens)
            bar.update(len(rows))
    bar.close()
    found = [phrase for phrases in exchange(own, len(captions)) for phrase in phrases]
    return Evaluation(_grounding_metrics(found), [_as_prediction(phrase) for phrase in found])


def _ground(
    model: TCLForImageTextRetrieval,
    processor: TCLProcessor,
    captions: list[tuple[dict, int, list[dict]]],
    heat: str,
    layer: int | None,
    max_tokens: int,
) -> list[list[dict]]:
    """For each caption its phrases that can be found in it: point, ranked boxes, true boxes, types, image size."""
    images = [open_image(record["image"]).convert("RGB") for record, _, _ in captions]
    spans = [
        (row, record["captions"][number], phrase)
        for row, (record, number, phrases) in enumerate(captions)
        for phrase in phrases
    ]
    map_of = _similarity_maps if heat == "similarity" else _matching_maps
    results: list[list[dict]] = [[] for _ in captions]
    for (row, text, phrase), one in zip(spans, map_of(model, processor, images, spans, layer, max_tokens), strict=True):
        if one is None:  # cut off by truncation, or of deleted characters only
            continue
        record, size = captions[row][0], images[row].size
        proposals = torch.tensor(record["proposals"]) if record.get("proposals") else sliding_boxes(size)
        results[row].append(
            {
                "image_id": record["image_id"],
                "phrase_id": phrase["phrase_id"],
                "phrase": text[phrase["start"] : phrase["end"]],
                "point": heat_point(one, size),
                "ranked": proposals[rank_boxes(one, proposals, size)[:10]],
                "boxes": torch.tensor(phrase["boxes"]),
                "types": phrase["types"],
                "size": size,
            }
        )
    return results


_Span = tuple[int, str, dict]  # row of the image, caption, phrase


def _matching_maps(
    model: TCLForImageTextRetrieval,
    processor: TCLProcessor,
    images: list,
    spans: list[_Span],
    layer: int | None,
    max_tokens: int,
) -> list[Tensor | None]:
    """A map for each phrase from those of its caption's tokens; None where it has no token."""
    texts = list({row: text for row, text, _ in spans}.values())  # every caption here has phrases
    inputs = processor(images=images, text=texts, return_tensors="pt", max_length=max_tokens).to(model.device)
    maps = matching_heat_map(model, inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values"], layer).cpu()
    found: list[Tensor | None] = []
    for row, text, phrase in spans:
        try:
            tokens = phrase_tokens(processor, text, phrase["start"], phrase["end"], max_tokens, maps.shape[1])
        except ValueError:
            found.append(None)
        else:
            found.append(phrase_map(maps[row], tokens))
    return found


def _similarity_maps(
    model: TCLForImageTextRetrieval,
    processor: TCLProcessor,
    images: list,
    spans: list[_Span],
    layer: int | None,
    max_tokens: int,
) -> list[Tensor | None]:
    """A map for each phrase as a text of its own; None where nothing of it is left."""
    texts = [text[phrase["start"] : phrase["end"]] for _, text, phrase in spans]
    tokens = processor(text=texts, return_tensors="pt", max_length=max_tokens).to(model.device)
    pixels = processor(images=images, return_tensors="pt")["pixel_values"].to(model.device)
    pixels = pixels[[row for row, _, _ in spans]]
    layer = -1 if layer is None else layer
    maps = similarity_heat_map(model, tokens["input_ids"], tokens["attention_mask"], pixels, layer).cpu()
    lengths = tokens["attention_mask"].sum(-1).tolist()
    return [one if length > 1 else None for one, length in zip(maps, lengths, strict=True)]


def _grounding_metrics(found: list[dict]) -> dict[str, float]:
    if not found:
        return {"phrases": 0}
    boxes, types = [p["boxes"] for p in found], [p["types"] for p in found]
    sizes = torch.tensor([p["size"] for p in found], dtype=torch.float64)  # (N, 2)
    metrics: dict[str, float] = {"phrases": len(found)}
    points = torch.tensor([p["point"] for p in found], dtype=torch.float64)
    metrics |= {f"pointing_{name}": value for name, value in pointing_accuracy(points, boxes, types).items()}
    for protocol in ("any", "merged"):
        recall = phrase_recall([p["ranked"] for p in found], boxes, types, protocol=protocol)
        metrics |= {f"{protocol}_{name}": value for name, value in recall.items() if "upper_bound" not in name}
    areas = [_covered_share(own, width, height) for own, (width, height) in zip(boxes, sizes.tolist(), strict=True)]
    metrics["random_point"] = 100 * sum(areas) / len(areas)
    metrics["center_point"] = pointing_accuracy(sizes / 2, boxes)["accuracy"]
    middle = torch.cat([sizes / 4, 3 * sizes / 4], dim=1)
    whole = torch.cat([torch.zeros_like(sizes), sizes], dim=1)
    for name, guess in (("center_box", middle), ("whole_image", whole)):
        recall = phrase_recall([box[None] for box in guess], boxes, ks=(1,))
        metrics[f"{name}_any_recall@1"] = recall["recall@1"]
    return metrics


def _covered_share(boxes: Tensor, width: float, height: float) -> float:
    """Share of an image's pixels that lie in any of the boxes."""
    covered = torch.zeros(int(height), int(width), dtype=torch.bool)
    for x1, y1, x2, y2 in boxes.round().int().tolist():
        covered[max(y1, 0) : y2, max(x1, 0) : x2] = True
    return covered.double().mean().item()


def _as_prediction(phrase: dict) -> dict[str, Any]:
    point, box = phrase["point"], phrase["ranked"][0].tolist()
    return {name: phrase[name] for name in ("image_id", "phrase_id", "phrase")} | {"point": list(point), "box": box}
