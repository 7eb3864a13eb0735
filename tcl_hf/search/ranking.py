"""A model with its processor, ready to search: features, states and matching; and re-ranking as a plain function.

Shapes: N images, P patches, L tokens, D feature dimensions.
"""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..data.images import IMAGE_ERRORS, open_image
from ..evaluation.retrieval import can_match, combined_scores
from ..evaluation.shares import in_batches
from ..models.modeling_tcl import MATCHES, TCLForImageTextRetrieval, TCLModel
from ..models.processing_tcl import TCLProcessor
from ..recipes.arguments import CheckpointArguments
from ..recipes.build import open_model
from .storage import SearchError

logger = logging.getLogger(__name__)

DEMO = "openmoji"  # the recipe of the demo, after which its runs are named
NUM_READERS = min(8, os.cpu_count() or 1)  # threads that decode: Pillow decodes and resizes outside Python's lock


@dataclass
class EncodedText:
    """A text after its encoder: states (1, L, width) with their mask (1, L), and features (D,)."""

    states: Tensor
    attention_mask: Tensor
    features: Tensor


class SearchModel:
    """A model with its processor, in eval mode and without a teacher.

    Args:
        model: a folder, a name on the Hub, or a loaded model.
        processor: that of a loaded model.
        device: device to compute on; for a loaded model its own if None, else the CPU.

    Raises:
        SearchError: if the model has no features to compare, or comes without a processor.
        RecipeError: if it cannot be opened.
    """

    def __init__(self, model: Any, processor: TCLProcessor | None = None, device: torch.device | str | None = None):
        self.name = ""
        if isinstance(model, str | os.PathLike):
            name = os.fspath(model)
            self.name = os.path.abspath(name) if os.path.isdir(name) else name
            model, opened = open_model(CheckpointArguments(model=name), TCLForImageTextRetrieval, to_train=False)
            processor = processor or opened
        elif not isinstance(model, TCLModel) and not isinstance(getattr(model, "tcl", None), TCLModel):
            raise SearchError(
                f"{type(model).__name__} is not a TCL model: give a folder, a name on the Hub, or a model."
            )
        if processor is None:
            raise SearchError(f"A loaded {type(model).__name__} needs its processor: give processor=... too.")
        self.model, self.processor = model.eval() if device is None else model.eval().to(device), processor
        self.tcl: TCLModel = model if isinstance(model, TCLModel) else model.tcl
        new: frozenset[str] = getattr(model, "new_weights", frozenset())
        if any("_projection." in name for name in new):
            raise SearchError(
                f"{self.name or type(model).__name__} has no projections of images and texts, so that its features "
                "mean nothing: search with a model that was pre-trained or fine-tuned for retrieval."
            )
        has_head = hasattr(model, "match") and not any(name.startswith("itm_head.") for name in new)
        self.can_match = has_head and can_match(model.config)
        self.rerank_weight: float | None = model.config.rerank_weight if self.can_match else None

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.tcl.device

    def pixel_values(self, image: Image.Image) -> Tensor:
        """The pixels (3, H, W) of an image in RGB."""
        return self.processor.image_processor(image, return_tensors="pt")["pixel_values"][0]

    @torch.no_grad()
    def encode_images(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """States (N, 1 + P, width) and L2-normalised features (N, D) of images (N, 3, H, W)."""
        states = self.tcl.encode_image(pixel_values.to(self.device, self.tcl.dtype))
        return states, self.tcl.image_features(states)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> list[EncodedText]:
        """Texts after their encoder, which reads all of them in one forward.

        Raises:
            SearchError: if one of them has no word that the model reads.
        """
        for text in texts:
            check_text(text, self.processor)
        tokens = self.processor(text=list(texts), return_tensors="pt").to(self.device)
        mask = tokens["attention_mask"]
        states = self.tcl.encode_text(tokens["input_ids"], mask)
        features = self.tcl.text_features(states, mask)
        lengths = mask.sum(-1).tolist()
        return [
            EncodedText(states[row : row + 1, :length], mask[row : row + 1, :length], features[row])
            for row, length in enumerate(lengths)
        ]

    def encode_text(self, text: str) -> EncodedText:
        """A text after its encoder.

        Raises:
            SearchError: if it has no word that the model reads.
        """
        return self.encode_texts([text])[0]

    @torch.no_grad()
    def matching_logits(self, text: EncodedText, image_states: Tensor) -> Tensor:
        """Both matching logits (N, 2) of a text with images, given their states (N, 1 + P, width), in float32.

        What the fusion layers compute of the text alone is computed once for all images.
        """
        images = self.tcl.text_model.project_images(image_states.to(self.device, self.tcl.dtype))
        rows = torch.arange(len(image_states), device=self.device)
        match = self.model.match
        return match(text.states, text.attention_mask, images, rows, torch.zeros_like(rows)).float()

    def scores(self, similarity: Tensor, logits: Tensor) -> Tensor:
        """The scores (N,) by which images are ranked, of similarities (N,) and matching logits (N, 2).

        That is the combined score if the model's config has its weight, see `evaluation.retrieval`, and else the logit
        of "matches" alone, as in the paper.
        """
        if self.rerank_weight is None:
            return logits[:, MATCHES]
        temperature = self.tcl.temperature.detach().float()
        return combined_scores(similarity, logits, temperature, self.rerank_weight)

    def fingerprint(self) -> tuple[str, str]:
        """A hash of the weights that make the features of images, and the pixels that they are made of, in words.

        The text encoder is not part of it: models that share a locked vision encoder and its projection make the same
        vectors of images.
        """
        config = self.tcl.config.vision_config
        names = ("layer_norm_eps", "hidden_act", "num_attention_heads", "patch_size", "output_grid")
        facts = [self.tcl.config.image_pooling, *(getattr(config, name) for name in names)]
        weights = _hash_of(
            facts, {name: self.tcl.get_submodule(name) for name in ("vision_model", "visual_projection")}
        )
        pixels = self.processor.image_processor
        size = f"{int(pixels.size['height'])} x {int(pixels.size['width'])} pixels"
        numbers = [[round(float(value), 6) for value in values] for values in (pixels.image_mean, pixels.image_std)]
        return weights, f"{size}, mean {numbers[0]}, std {numbers[1]}"

    def weights(self) -> str:
        """A hash of all weights, on which similarities and matching depend."""
        parts = {"tcl": self.tcl} | ({"itm_head": self.model.itm_head} if self.can_match else {})
        return _hash_of(self.tcl.config.image_pooling, parts)


def _hash_of(facts: Any, parts: dict[str, torch.nn.Module]) -> str:
    """A hash of some facts and of the weights of modules."""
    digest = hashlib.blake2b(json.dumps(facts).encode(), digest_size=16)
    for part, module in parts.items():
        for key, weight in sorted(module.state_dict().items()):
            digest.update(f"{part}.{key}".encode())
            digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def default_model() -> str:
    """The folder of the newest run of the demo.

    Raises:
        SearchError: if there is none.
    """
    found = [path.parent for path in Path("runs").glob(f"{DEMO}*/config.json")]
    if not found:
        raise SearchError(
            f"No model was named, and there is none of the demo in runs/{DEMO}: name one with --model, or make one "
            "with `tcl-hf demo`."
        )
    return str(max(found, key=lambda folder: (folder / "config.json").stat().st_mtime_ns))


def check_text(text: Any, processor: TCLProcessor) -> None:
    """Refuse a text of which nothing is left once the processor has cleaned it.

    Raises:
        SearchError: with the remedy.
    """
    if not isinstance(text, str) or not text.strip():
        raise SearchError(f"The text {text!r} is empty: write at least one word.")
    special = {*processor.tokenizer.all_special_ids} - {processor.tokenizer.mask_token_id}
    if special.issuperset(processor(text=[text])["input_ids"][0]):
        raise SearchError(f"The text {text[:60]!r} has no word that the model reads: write at least one.")


def read_rgb(image: Any) -> Image.Image:
    """An image in any form of `data.images.open_image`, decoded, upright and in RGB."""
    with open_image(image) as opened:
        return opened.convert("RGB")


@dataclass
class Ranking:
    """Images ranked for a text.

    Args:
        order: numbers of the images, best first (N,).
        scores: what they are ordered by, in the order in which they were given (N,).
        logits: the logits of "matches" (N,).
        matching: the probabilities that they match (N,).
        similarity: cosine similarities of their features with those of the text (N,).
    """

    order: list[int]
    scores: Tensor
    logits: Tensor
    matching: Tensor
    similarity: Tensor


def rank(
    query: str, images: Sequence[Any], model: Any, processor: TCLProcessor | None = None, *, batch_size: int = 64
) -> Ranking:
    """Rank images for a text by matching, or by the combined score if the model's config has its weight.

    Args:
        query: the text.
        images: paths, bytes, PIL images, or the images of records.
        model: a folder, a name on the Hub, a loaded model, or a `SearchModel`.
        processor: that of a loaded model.
        batch_size: images in a forward.

    Raises:
        SearchError: if the model cannot match, the text is empty, or an image cannot be read.
    """
    searcher = model if isinstance(model, SearchModel) else SearchModel(model, processor)
    check_can_match(searcher)
    text = searcher.encode_text(query)
    logits, similarity = [torch.zeros(0, 2)], [torch.zeros(0)]
    for start in range(0, len(images), batch_size):
        states, features = searcher.encode_images(read_pixels(searcher, images[start : start + batch_size], start))
        logits.append(searcher.matching_logits(text, states).cpu())
        similarity.append((features @ text.features).cpu())
    both, similar = torch.cat(logits), torch.cat(similarity)
    scores = searcher.scores(similar, both)
    order = scores.argsort(descending=True, stable=True).tolist()
    return Ranking(order, scores, both[:, MATCHES], both.softmax(-1)[:, MATCHES], similar)


def check_can_match(searcher: SearchModel) -> None:
    """Refuse a model without a trained matching head.

    Raises:
        SearchError: with the remedy.
    """
    if not searcher.can_match:
        raise SearchError(
            f"{searcher.name or type(searcher.model).__name__} cannot match, because it has no matching head that was "
            "trained: rank by similarity, or with a model that was pre-trained with itm_weight above 0."
        )


def read_pixels(searcher: SearchModel, images: Sequence[Any], first: int = 0) -> Tensor:
    """The pixels (N, 3, H, W) of images, decoded by several threads.

    Args:
        first: number of the first image, for the message.

    Raises:
        SearchError: if one of them cannot be read.
    """

    def pixels_of(numbered: tuple[int, Any]) -> Tensor:
        number, image = numbered
        try:
            return searcher.pixel_values(read_rgb(image))
        except IMAGE_ERRORS as error:
            place = f" ({image})" if isinstance(image, str | os.PathLike) else ""
            raise SearchError(f"Image {number}{place} cannot be read: {error}") from error

    with ThreadPoolExecutor(NUM_READERS) as readers:
        return torch.stack(list(readers.map(pixels_of, enumerate(images, first))))


class _MetricsOfModel:
    """Takes the place of a model card's data, where the evaluators of sentence-transformers leave their metrics."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}

    def set_evaluation_metrics(self, evaluator: Any, metrics: dict[str, float], *unused: Any) -> None:
        """Keep the metrics of an evaluator."""
        self.metrics |= metrics


class TCLCrossEncoder:
    """TCL with the interface of a `CrossEncoder` of sentence-transformers: it scores pairs of a text and an image.

    A score is the logit of "matches" of the matching head. Each text and each image is encoded once in a call.

    Args:
        model: a folder, a name on the Hub, or a loaded model.
        processor: that of a loaded model.
        device: device to compute on.
    """

    def __init__(self, model: Any, processor: TCLProcessor | None = None, device: str | None = None):
        self.searcher = SearchModel(model, processor, device)
        self.model_card_data = _MetricsOfModel()
        check_can_match(self.searcher)

    def predict(
        self,
        sentences: Sequence[Any],
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        **unused: Any,
    ) -> Any:
        """The scores (N,) of pairs (text, image), or the score of one pair.

        Args:
            sentences: pairs of a text and an image: a path, bytes or a PIL image.
            batch_size: images in a forward.
            show_progress_bar: show one.
            convert_to_numpy, convert_to_tensor: the type of the result; a list of scalars if both are False.
        """
        single = len(sentences) == 2 and isinstance(sentences[0], str) and not isinstance(sentences[1], list | tuple)
        pairs = [tuple(sentences)] if single else [tuple(pair) for pair in sentences]
        texts = {text: self.searcher.encode_text(text) for text in dict.fromkeys(text for text, _ in pairs)}
        scores = torch.zeros(len(pairs))
        rows_of: dict[Any, list[int]] = {}
        for row, (_, image) in enumerate(pairs):
            rows_of.setdefault(image if isinstance(image, str | bytes | os.PathLike) else id(image), []).append(row)
        groups = list(rows_of.values())
        bar = tqdm(total=len(pairs), desc="Matching", unit="pair", disable=not show_progress_bar, leave=False)
        for batch in in_batches(groups, batch_size):
            images = [pairs[rows[0]][1] for rows in batch]
            states, _ = self.searcher.encode_images(read_pixels(self.searcher, images))
            place_of = {row: place for place, rows in enumerate(batch) for row in rows}
            for text in dict.fromkeys(pairs[row][0] for row in place_of):
                rows = [row for row in place_of if pairs[row][0] == text]
                own = states[[place_of[row] for row in rows]]
                scores[rows] = self.searcher.matching_logits(texts[text], own)[:, MATCHES].cpu()
                bar.update(len(rows))
        bar.close()
        found: Any = scores[0] if single else scores
        if convert_to_tensor:
            return found
        return np.asarray(found) if convert_to_numpy else list(found)

    def rank(
        self,
        query: str,
        documents: Sequence[Any],
        top_k: int | None = None,
        return_documents: bool = False,
        **options: Any,
    ) -> list[dict[str, Any]]:
        """The images for a text, best first: `corpus_id`, `score` and, if asked for, the image itself as `text`.

        Args:
            query: the text.
            documents: the images.
            top_k: how many to return; all if None.
            return_documents: whether each result holds its image too.
            options: those of `predict`.
        """
        scores = self.predict([(query, document) for document in documents], convert_to_tensor=True, **options)
        order = scores.argsort(descending=True, stable=True).tolist()[:top_k]
        found = [{"corpus_id": row, "score": scores[row].item()} for row in order]
        return [one | {"text": documents[one["corpus_id"]]} for one in found] if return_documents else found
