"""Grounding: whether the heat map of a phrase points at its boxes."""

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data.images import open_image
from ..inference.grounding import heat_point, phrase_heat_maps, rank_boxes, sliding_boxes
from ..models.encoders import eval_mode
from ..models.modeling_tcl import TCLForImageTextRetrieval
from ..models.processing_tcl import MAX_TOKENS, TCLProcessor
from .metrics import check_finite, phrase_recall, pointing_accuracy
from .shares import Evaluation, gather_results, in_batches, process_share

CANDIDATES_KEPT = 10  # the largest k of the recalls


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
    """Locate phrases by their Grad-CAM heat maps, and score the hottest points and the best boxes in percent.

    `pointing_accuracy` is the share of phrases whose map is highest inside one of their boxes. `any_recall@k` is the
    share of phrases for which one of the k best candidate boxes has an IoU of 0.5 with a true one, `merged_recall@k`
    with the one box that encloses all true ones. Candidates are the record's proposals, or else a fixed set of boxes.
    Phrases without a box, and those that truncation cuts off, are not counted; `phrases` is the number of those that
    are.

    Further metrics are baselines that need no model: a random point (its accuracy is the mean share of the boxes'
    area), the centre of the image, the whole image, and a box in its middle with half its sides.

    Args:
        records: images with captions and phrases, see `data.annotations.phrases`.
        layer, max_tokens, heat: as in `phrase_heat_maps`.
        batch_size: captions in a forward.
        progress: show a progress bar.

    Raises:
        ValueError: if `heat` or `layer` do not exist.
    """
    captions = [
        (record, number, phrases)
        for record in records
        for number in range(len(record["captions"]))
        if (phrases := [p for p in record["phrases"] if p["caption_index"] == number and p["boxes"]])
    ]
    results: list[list[dict]] = []  # the phrases of each caption
    share = process_share(len(captions))
    bar = tqdm(total=len(share), desc="Grounding", unit="caption", disable=not progress, leave=False)
    with eval_mode(model), bar:
        for rows in in_batches(share, batch_size):
            results += _locate(model, processor, [captions[row] for row in rows], heat, layer, max_tokens)
            bar.update(len(rows))
    located = [phrase for phrases in gather_results(results, len(captions)) for phrase in phrases]
    predictions = [
        {name: phrase[name] for name in ("image_id", "phrase_id", "phrase")}
        | {"point": list(phrase["point"]), "box": phrase["ranked"][0].tolist()}
        for phrase in located
    ]
    return Evaluation(_grounding_metrics(located), predictions)


def _locate(
    model: TCLForImageTextRetrieval,
    processor: TCLProcessor,
    captions: list[tuple[dict, int, list[dict]]],
    heat: str,
    layer: int | None,
    max_tokens: int,
) -> list[list[dict]]:
    """For each caption the phrases that the model reads: point, ranked boxes, true boxes, types and image size."""
    images = [open_image(record["image"]).convert("RGB") for record, _, _ in captions]
    pixel_values = processor(images=images, return_tensors="pt")["pixel_values"]
    texts = [record["captions"][number] for record, number, _ in captions]
    spans = [[(phrase["start"], phrase["end"]) for phrase in phrases] for _, _, phrases in captions]
    heat_maps = phrase_heat_maps(
        model, processor, pixel_values, texts, spans, heat, layer, max_tokens, skip_unread=True
    )
    results: list[list[dict]] = []
    for (record, _, phrases), text, image, maps in zip(captions, texts, images, heat_maps, strict=True):
        image_id, size = record["image_id"], image.size
        for heat_map in maps:
            if heat_map is not None:
                check_finite(heat_map[None], "heat maps", f"of image {image_id}".format)
        scale = _scale_of_boxes(record, size)
        proposals = torch.tensor(record["proposals"]) * scale if record.get("proposals") else sliding_boxes(size)
        results.append(
            [
                {
                    "image_id": image_id,
                    "phrase_id": phrase["phrase_id"],
                    "phrase": text[phrase["start"] : phrase["end"]],
                    "point": heat_point(heat_map, size),
                    "ranked": proposals[rank_boxes(heat_map, proposals, size)[:CANDIDATES_KEPT]],
                    "boxes": torch.tensor(phrase["boxes"]) * scale,
                    "types": phrase["types"],
                    "size": size,
                }
                for phrase, heat_map in zip(phrases, maps, strict=True)
                if heat_map is not None
            ]
        )
    return results


def _scale_of_boxes(record: dict, size: tuple[int, int]) -> Tensor:
    """Factors (4,) from the boxes of a record to the pixels of its image, whose file may have been resized.

    Raises:
        ValueError: if the image has other proportions than the boxes were drawn on.
    """
    width, height = record.get("width") or size[0], record.get("height") or size[1]
    across, down = size[0] / width, size[1] / height
    # A resized side is rounded to a whole pixel.
    if abs(width * down - size[0]) > 1 + down and abs(height * across - size[1]) > 1 + across:
        raise ValueError(
            f"The image {record['image_id']} has {size[0]} x {size[1]} pixels, but its boxes were drawn on {width} x "
            f"{height}, which are other proportions: give the image that they belong to."
        )
    return torch.tensor([across, down, across, down])


def _grounding_metrics(located: list[dict]) -> dict[str, float]:
    if not located:
        return {"phrases": 0}
    boxes, types = [p["boxes"] for p in located], [p["types"] for p in located]
    sizes = torch.tensor([p["size"] for p in located], dtype=torch.float64)  # (N, 2)
    points = torch.tensor([p["point"] for p in located], dtype=torch.float64)
    metrics: dict[str, float] = {"phrases": len(located)}
    metrics |= {f"pointing_{name}": value for name, value in pointing_accuracy(points, boxes, types).items()}
    for protocol in ("any", "merged"):
        recall = phrase_recall([p["ranked"] for p in located], boxes, types, protocol=protocol)
        metrics |= {f"{protocol}_{name}": value for name, value in recall.items() if "upper_bound" not in name}
    metrics["random_point"] = 100 * sum(_covered_share(p["boxes"], *p["size"]) for p in located) / len(located)
    metrics["center_point"] = pointing_accuracy(sizes / 2, boxes)["accuracy"]
    middle = torch.cat([sizes / 4, 3 * sizes / 4], dim=1)
    whole = torch.cat([torch.zeros_like(sizes), sizes], dim=1)
    for name, guesses in (("center_box", middle), ("whole_image", whole)):
        recall = phrase_recall([box[None] for box in guesses], boxes, ks=(1,))
        metrics[f"{name}_any_recall@1"] = recall["recall@1"]
    return metrics


def _covered_share(boxes: Tensor, width: int, height: int) -> float:
    """Share of an image's pixels that lie in any of the boxes."""
    covered = torch.zeros(height, width, dtype=torch.bool)
    for x1, y1, x2, y2 in boxes.round().int().tolist():
        covered[max(y1, 0) : y2, max(x1, 0) : x2] = True
    return covered.double().mean().item()
