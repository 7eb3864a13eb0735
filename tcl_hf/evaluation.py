"""The evaluators of all tasks: they run models over records and feed the metrics.

Every evaluator shares its work over the processes of a distributed run, and every process gets the whole result.

Shapes: I images, T texts, D feature dimensions, K candidates. Scores (I, T) are higher for better pairs.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .collators import TCLTaskCollator, encode_answers, open_image
from .encoders import KeyValue
from .grounding import (
    check_heat,
    heat_point,
    matching_heat_map,
    phrase_map,
    phrase_tokens,
    rank_boxes,
    similarity_heat_map,
    sliding_boxes,
)
from .losses import similarity as scaled_similarity
from .metrics import (
    accuracy,
    consistency,
    majority_share,
    normalize_answer,
    per_label_scores,
    phrase_recall,
    pointing_accuracy,
    retrieval_metrics,
    vqa_accuracies,
)
from .modeling_tcl import MATCHES, TCLForImageTextRetrieval
from .modeling_tcl_tasks import TCLForQuestionAnswering
from .processing_tcl import MAX_TOKENS, TCLProcessor

NOT_SCORED = -100.0  # what the paper's code gives to pairs outside the top k
MAX_PADDING = 1 / 8  # share of the tokens fused at once; with less, groups become too small for fast products


def candidates(similarity: Tensor, k: int) -> list[Tensor]:
    """Which texts to score with each image: its own top k, and those in whose top k it is.

    Args:
        similarity: cosine similarities (I, T).
        k: candidates of each image and of each text.

    Returns:
        For each image the indices of its texts, ascending; each pair stands there once.
    """
    num_images, num_texts = similarity.shape
    chosen = torch.zeros_like(similarity, dtype=torch.bool)
    chosen.scatter_(1, similarity.topk(min(k, num_texts), dim=1).indices, True)
    chosen.scatter_(0, similarity.topk(min(k, num_images), dim=0).indices, True)
    return [row.nonzero().flatten() for row in chosen]


@dataclass
class EncodedPairs:
    """A data set as the encoders see it.

    Args:
        image_rows: the images whose states this process keeps, those it shall score (I / processes).
        image_states: their states (len(image_rows), 1 + P, width), where and as precise as was asked for.
        text_states: states of each text, padded (T, L, width), likewise.
        attention_mask: which of them are tokens (T, L).
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
def encode_pairs(
    model: TCLForImageTextRetrieval,
    processor: TCLProcessor,
    records: Sequence[dict],
    captions_per_image: int | None = None,
    batch_size: int = 64,
    states_dtype: torch.dtype | None = None,
    progress: bool = False,
) -> EncodedPairs:
    """Encode the images and captions of records; the model's mode is the caller's.

    Each process encodes its share. States of images stay with it; features, and states of texts, are exchanged.

    Args:
        captions_per_image: use only so many of each record's captions; all if None.
        batch_size: images or texts at once.
        states_dtype: keep states so on the CPU, for example `torch.float16`: their size, and not the model's, decides
            how much memory a large data set needs. None keeps them as they are.
        progress: show a progress bar.
    """
    device = model.device

    def kept(states: Tensor) -> Tensor:
        return states if states_dtype is None else states.to("cpu", states_dtype)

    captions = [record["captions"][:captions_per_image] for record in records]
    texts = [text for own in captions for text in own]
    image_of_text = torch.tensor([number for number, own in enumerate(captions) for _ in own])
    image_rows, text_rows = own_share(len(records)), own_share(len(texts))
    image_states, image_embeds, text_states, text_embeds = [], [], [], []
    bar = tqdm(total=len(image_rows) + len(text_rows), desc="Encoding", disable=not progress, leave=False)
    for rows in batches(image_rows, batch_size):
        images = [open_image(records[row]["image"]).convert("RGB") for row in rows]
        pixel_values = processor(images=images, return_tensors="pt")["pixel_values"].to(device)
        states = model.tcl.encode_image(pixel_values)
        image_embeds += model.tcl.image_features(states[:, 0]).unbind()
        image_states += kept(states).unbind()
        bar.update(len(rows))
    tokens = processor(text=texts, return_tensors="pt")
    for rows in batches(text_rows, batch_size):
        mask = tokens["attention_mask"][rows].to(device)
        states = model.tcl.encode_text(tokens["input_ids"][rows].to(device), mask)
        text_embeds += model.tcl.text_features(states[:, 0]).unbind()
        text_states += kept(states).unbind()
        bar.update(len(rows))
    bar.close()
    return EncodedPairs(
        image_rows=image_rows,
        image_states=torch.stack(image_states),
        text_states=torch.stack(exchange(text_states, len(texts))),
        attention_mask=tokens["attention_mask"].to(device),
        image_embeds=torch.stack(exchange(image_embeds, len(records))),
        text_embeds=torch.stack(exchange(text_embeds, len(texts))),
        image_of_text=image_of_text.to(device),
        texts=texts,
    )


@torch.no_grad()
def matching_scores(
    model: TCLForImageTextRetrieval,
    pairs: EncodedPairs,
    k: int,
    batch_size: int = 64,
    progress: bool = False,
) -> Tensor:
    """Matching logits of the candidate pairs of both directions, `NOT_SCORED` elsewhere (I, T).

    An image's keys and values are projected once for all its candidates, each pair is scored once, and candidates of
    about the same length go together, so that little padding is computed.

    Args:
        k: candidates by similarity of each image and of each text.
        batch_size: texts fused with an image at once, at most.
        progress: show a progress bar, with the time left.
    """
    similarity = pairs.similarity()  # (I, T)
    scores = torch.full_like(similarity, NOT_SCORED)
    chosen = candidates(similarity, k)
    lengths = pairs.attention_mask.sum(-1)
    device, dtype = similarity.device, model.tcl.dtype
    total = sum(len(chosen[row]) for row in pairs.image_rows)
    bar = tqdm(total=total, desc="Matching", unit="pair", disable=not progress, leave=False)
    for row, states in zip(pairs.image_rows, pairs.image_states, strict=True):
        image: list[KeyValue] = model.tcl.text_model.project_images(states[None].to(device, dtype))
        texts = chosen[row][lengths[chosen[row]].argsort()]
        for some in texts.split(sizes_by_length(lengths[texts].tolist(), batch_size)):
            length = int(lengths[some[-1]])
            words = pairs.text_states[some.to(pairs.text_states.device), :length].to(device, dtype)
            logits = model.match(words, pairs.attention_mask[some, :length], image)
            scores[row, some] = logits[:, MATCHES].float()
            bar.update(len(some))
    bar.close()
    return torch.stack(exchange([scores[row] for row in pairs.image_rows], len(scores)))


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
) -> dict[str, float]:
    """Recall in percent by similarity, and by matching among the k most similar (`reranked_...`).

    Mean ranks are by similarity only: re-ranking orders the k candidates and leaves all others equal.

    Args:
        model: a head with matching; it is left in the mode in which it came.
        records: images with captions, each image once.
        k: candidates to re-rank; None for similarity alone.
        captions_per_image, batch_size, states_dtype: as in `encode_pairs`.
    """
    with evaluating(model):
        pairs = encode_pairs(model, processor, records, captions_per_image, batch_size, states_dtype, progress)
        similarity = pairs.similarity()
        metrics = retrieval_metrics(similarity, similarity, pairs.image_of_text)
        if k is not None:
            scores = matching_scores(model, pairs, k, progress=progress)
            # A pair that only the other direction chose was not among this one's k.
            image_scores = _only_top(scores, similarity, k, dim=1)
            text_scores = _only_top(scores, similarity, k, dim=0)
            reranked = retrieval_metrics(image_scores, text_scores, pairs.image_of_text)
            metrics |= {f"reranked_{name}": value for name, value in reranked.items() if "rank" not in name}
    return metrics


def chance_recall(num_images: int, k: int = 1) -> float:
    """Recall at k in percent of a random order, with one text per image."""
    return 100 * min(k, num_images) / num_images


def _only_top(scores: Tensor, similarity: Tensor, k: int, dim: int) -> Tensor:
    top = similarity.topk(min(k, similarity.shape[dim]), dim=dim).indices
    return torch.full_like(scores, NOT_SCORED).scatter(dim, top, scores.gather(dim, top))


@dataclass
class Evaluation:
    """What an evaluator found: metrics by name, and a prediction for each record or phrase."""

    metrics: dict[str, float]
    predictions: list[dict[str, Any]] = field(default_factory=list)


@torch.no_grad()
def evaluate_classes(
    model: PreTrainedModel,
    processor: TCLProcessor,
    records: Sequence[dict],
    batch_size: int = 64,
    max_tokens: int = MAX_TOKENS,
    progress: bool = False,
) -> Evaluation:
    """Accuracy in percent of a head with classes, beside that of the most frequent label, and scores by label.

    Records with a `pair_id` also give NLVR2's consistency. Each prediction has `image_id`, `label` and `scores`.
    """
    names = [model.config.id2label[number] for number in range(model.config.num_labels)]
    collator = TCLTaskCollator(processor, max_tokens=max_tokens, label2id=model.config.label2id)
    own: list[tuple[list[float], int]] = []
    with evaluating(model):
        for batch in _inputs(collator, records, batch_size, model.device, progress):
            labels = batch.pop("labels")
            own += zip(model(**batch).logits.float().softmax(-1).tolist(), labels.tolist(), strict=True)
    shares, labels = zip(*exchange(own, len(records)), strict=True)
    predicted, true = torch.tensor(shares).argmax(-1), torch.tensor(labels)
    metrics = {"accuracy": accuracy(predicted, true), "most_frequent_label": majority_share(true)}
    metrics |= per_label_scores(predicted, true, names)
    pair_ids = [pair_id for record in records if (pair_id := record.get("pair_id"))]
    if model.images_per_text > 1 and len(pair_ids) == len(records):
        metrics["consistency"] = consistency(predicted, true, pair_ids)
    predictions = [
        {"image_id": record["image_id"], "label": names[number], "scores": dict(zip(names, share, strict=True))}
        for record, number, share in zip(records, predicted.tolist(), shares, strict=True)
    ]
    return Evaluation(metrics, predictions)


@torch.no_grad()
def answer_questions(
    model: TCLForQuestionAnswering,
    processor: TCLProcessor,
    records: Sequence[dict],
    answers: list[str],
    k: int = 128,
    batch_size: int = 32,
    max_tokens: int = 50,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """The best of the given answers to each question: `question_id`, `answer`, `score`."""
    candidate_ids = encode_answers(processor.tokenizer, answers).to(model.device)
    candidate_mask = (candidate_ids != -100).long()
    candidate_ids = candidate_ids.masked_fill(candidate_mask == 0, processor.tokenizer.pad_token_id)
    collator = TCLTaskCollator(processor, max_tokens=max_tokens, with_answers=False, max_question_words=50)
    own: list[tuple[int, float]] = []
    with evaluating(model):
        for batch in _inputs(collator, records, batch_size, model.device, progress):
            ranked = model.rank_answers(**batch, candidate_ids=candidate_ids, candidate_mask=candidate_mask, k=k)
            own += zip(ranked.indices[:, 0].tolist(), ranked.probabilities[:, 0].tolist(), strict=True)
    return [
        {"question_id": record["question_id"], "answer": answers[number], "score": score}
        for record, (number, score) in zip(records, exchange(own, len(records)), strict=True)
    ]


def evaluate_answers(
    model: TCLForQuestionAnswering,
    processor: TCLProcessor,
    records: Sequence[dict],
    answers: list[str],
    k: int = 128,
    batch_size: int = 32,
    progress: bool = False,
) -> Evaluation:
    """Accuracy in percent of ranked answers.

    Questions with several human answers are scored as the official VQA evaluation does, those with one by equality
    after its normalisation. An answer that is a list, with commas, must have the same items in any order. Beside it
    stands what the most frequent answer would reach, and the share of questions whose answer is among the candidates.
    """
    predictions = answer_questions(model, processor, records, answers, k, batch_size, progress=progress)
    return Evaluation(answer_metrics(predictions, records, answers), predictions)


def answer_metrics(
    predictions: list[dict[str, Any]], records: Sequence[dict], candidates: list[str]
) -> dict[str, float]:
    """Metrics of answers to questions: see `evaluate_answers`. None where the records have no answers."""
    truth = [record["answers"] for record in records]
    if not all(truth):
        return {}
    if any(len(given) > 1 for given in truth):
        annotations = [
            {"question_id": r["question_id"], "answers": [{"answer": given} for given in r["answers"]]}
            | {name: r[name] for name in ("answer_type", "question_type") if r.get(name)}
            for r in records
        ]
        official = vqa_accuracies({p["question_id"]: p["answer"] for p in predictions}, annotations)
        return {"accuracy": official.pop("overall"), **official}
    right = [_items(p["answer"]) == _items(given[0]) for p, given in zip(predictions, truth, strict=True)]
    counts = Counter(_items(given[0]) for given in truth)
    known = {_items(answer) for answer in candidates}
    return {
        "accuracy": 100 * sum(right) / len(right),
        "most_frequent_answer": 100 * counts.most_common(1)[0][1] / len(truth),
        "answer_is_a_candidate": 100 * sum(_items(given[0]) in known for given in truth) / len(truth),
    }


def _items(answer: str) -> frozenset[str]:
    return frozenset(normalize_answer(item) for item in answer.split(","))


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


def _inputs(
    collator: TCLTaskCollator, records: Sequence[dict], batch_size: int, device: torch.device, progress: bool
) -> Iterator[dict[str, Tensor]]:
    """Batches of this process's share of the records, on the device."""
    rows = own_share(len(records))
    bar = tqdm(total=len(rows), desc="Evaluating", disable=not progress, leave=False)
    for some in batches(rows, batch_size):
        batch = collator(_by_image([records[row] for row in some]))
        if len(batch["input_ids"]) < len(some):
            raise ValueError(f"A record can not be evaluated: {collator.skipped.last}. Leave it out of the data.")
        yield {name: value.to(device) for name, value in batch.items()}
        bar.update(len(some))
    bar.close()


def _by_image(records: list[dict]) -> list[dict]:
    """Neighbours about the same image as one, which is then read and encoded once."""

    def image(record: dict) -> object:
        return record["images"] if "images" in record else record.get("image")

    groups: list[list[dict]] = []
    for record in records:
        if groups and image(groups[-1][0]) == image(record):
            groups[-1].append(record)
        else:
            groups.append([record])
    return [{"image_id": own[0].get("image_id"), "records": own} for own in groups]


class evaluating:
    """A model in eval mode within a `with` block, and in the mode in which it came after it."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.was_training = model, model.training

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *error) -> None:
        self.model.train(self.was_training)


def own_share(number: int) -> list[int]:
    """Which of so many items this process works on: each n-th of n processes."""
    if dist.is_available() and dist.is_initialized():
        return list(range(dist.get_rank(), number, dist.get_world_size()))
    return list(range(number))


def exchange(own: list, number: int) -> list:
    """The results of all processes in the order of the items, from those of `own_share`."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return own
    shares: list[list] = [[] for _ in range(dist.get_world_size())]
    on_cpu = [item.cpu() if isinstance(item, Tensor) else item for item in own]
    dist.all_gather_object(shares, on_cpu)
    device = own[0].device if own and isinstance(own[0], Tensor) else None
    items = [shares[row % len(shares)][row // len(shares)] for row in range(number)]
    return items if device is None else [item.to(device) for item in items]


def batches(items: list, size: int) -> Iterator[list]:
    """Items in lists of `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def sizes_by_length(lengths: list[int], size: int) -> list[int]:
    """How many of the next texts to take together, of ascending lengths: at most `size`, and little padding.

    A group ends before the text with which more than `MAX_PADDING` of its tokens would be padding.
    """
    sizes: list[int] = []
    count = tokens = 0
    for length in lengths:
        if count == size or (count + 1) * length * (1 - MAX_PADDING) > tokens + length:
            sizes.append(count)
            count = tokens = 0
        count, tokens = count + 1, tokens + length
    return sizes + [count] * bool(count)
