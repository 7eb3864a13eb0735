"""The tasks of TCL as transformers pipelines: `pipeline(task, model=folder)` after `import tcl_hf`.

| task | record | result |
|---|---|---|
| image-text-matching | `image`, `text` (one or several) | `score` that they match and `similarity` of each text |
| visual-question-answering | `image`, `question` | the best of given `candidates`, or a generated answer |
| visual-entailment, visual-reasoning | `image` or `images`, `text` | labels with scores |
| visual-grounding | `image`, `text`; optionally `phrase`, `boxes` | `box`, `score`, `point`, `heat_map` |

Shapes: B images, N texts of each, L tokens, C candidates.
"""

from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset
from transformers import AutoConfig, Pipeline, pipelines
from transformers.pipelines import PIPELINE_REGISTRY, PipelineException

from ..models.encoders import TCLPreTrainedModel
from ..models.modeling_tcl import MATCHES, TCLForImageTextRetrieval, TCLForPreTraining
from ..models.modeling_tcl_tasks import TCLForQuestionAnswering, TCLForVisualEntailment, TCLForVisualReasoning
from ..models.processing_tcl import MAX_QUESTION_TOKENS
from .grounding import (
    Boxes,
    Span,
    box_from_heat_map,
    box_scores,
    draw_heat_map,
    heat_point,
    phrase_heat_maps,
    phrase_span,
    sliding_boxes,
)
from .inputs import Record, are_several, open_image, paired


class _ImageTextPipeline(Pipeline):
    """The base of our pipelines: it takes records of an image and a text, and puts the model in eval mode."""

    _load_processor = True
    _load_tokenizer = _load_image_processor = _load_video_processor = _load_feature_extractor = False
    model_classes: tuple[type[TCLPreTrainedModel], ...]
    text_name = "text"
    has_all_texts = False  # Several texts belong to each image, and not one to each.
    # For a record and its images, and perhaps parameters: the tokens of the text, and what else the task needs of them.
    _prepare: Callable[..., Mapping[str, Any]]

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if not isinstance(self.model, self.model_classes):
            raise _wrong_model(self.task, type(self.model).__name__, self.model_classes)
        # Batches are padded by these. transformers takes them from the processor only where it opens that itself.
        self.tokenizer = self.tokenizer or self.processor.tokenizer
        self.image_processor = self.image_processor or self.processor.image_processor
        self.model.eval()

    def __call__(self, inputs: Any = None, text: str | Iterable[str] | None = None, **kwargs) -> Any:
        """Run on one record or several, or on images with their texts.

        Args:
            inputs: a record (a dictionary), or a list, generator or dataset of records; for the last two the result is
                an iterator. With `text`, an image, or a list, generator or column of a dataset of images, also as the
                keyword `image` or `images`. An image is PIL, a path, a URL, base64, bytes, or an array or tensor
                (H, W), (H, W, channels) or (channels, H, W) of numbers from 0 to 1, or of whole ones up to 255.
            text: the text of the image. Several are paired with several images; a single image or text goes with all.
            kwargs: parameters of the task, those of all transformers pipelines (`batch_size`, `num_workers`), and
                `timeout`, the seconds to wait for an image from a URL.

        Raises:
            ValueError: if a record or parameter is missing or wrong.
        """
        for name in ("image", "images"):
            inputs = kwargs.pop(name, inputs)
        text = kwargs.pop(self.text_name, text)
        if text is not None:
            inputs = self._records(inputs, text)
        elif are_several(inputs) and not isinstance(inputs, list | Dataset):
            # transformers accepts generators and PyTorch's datasets, but not those of the library `datasets`.
            records: Any = inputs
            inputs = Subset(records, range(len(records))) if isinstance(inputs, Sized) else (one for one in inputs)
        # transformers reads the first element of a list, even of an empty one.
        return [] if isinstance(inputs, list) and not inputs else super().__call__(inputs, **kwargs)

    def _records(self, images: Any, text: Any) -> Any:
        """The records of one image or several, with one text or several: a list of lists, a dataset of datasets."""
        if self.has_all_texts and are_several(text):
            text = list(text)
        many_texts = are_several(text) and not self.has_all_texts
        return paired(images, text, self.text_name, self._are_several_images(images), many_texts)

    def _are_several_images(self, images: Any) -> bool:
        """Whether images are those of several records: each a list or tuple, if the model reads more than one image."""
        if getattr(self.model, "images_per_text", 1) == 1 or not isinstance(images, list | tuple):
            return are_several(images)
        return any(map(are_several, images))

    def preprocess(self, record: Record, timeout: float | None = None, **parameters: Any) -> dict:
        """Pixels of the record's image or images, upright and in RGB, and what `_prepare` makes of its text."""
        if not isinstance(record, Mapping):
            raise ValueError(
                f"An input of type {type(record).__name__} is not a record: pass {{'image': ..., '{self.text_name}': "
                f"...}}, or an image and its {self.text_name}."
            )
        given, expected = record.get("images", record.get("image")), getattr(self.model, "images_per_text", 1)
        images = [open_image(image, timeout) for image in (given if are_several(given) else [given])]
        if len(images) != expected:
            raise ValueError(
                f"{type(self.model).__name__} reads {expected} image{'s' * (expected > 1)} with a text, but got "
                f"{len(images)}: pass them as {'image' if expected == 1 else 'images'}."
            )
        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"]
        prepared = self._prepare(record, images, **parameters)
        return {"pixel_values": pixels if expected == 1 else pixels[None], **prepared}

    def _text(self, record: Record) -> str:
        """The text of a record."""
        return _checked_text(record.get(self.text_name), self.text_name)


class ImageTextMatchingPipeline(_ImageTextPipeline):
    """Score how well texts match an image: {"image": ..., "text": one or several}.

    The result for a text is a dictionary of `text`, `score` (the probability that it matches) and `similarity` (the
    cosine of the features); for several texts it is a list in their order. If images and texts are two arguments, each
    image is scored with all texts. An image is encoded, and projected to keys and values, once for all its texts.
    """

    model_classes = (TCLForImageTextRetrieval, TCLForPreTraining)
    has_all_texts = True

    def _sanitize_parameters(self, timeout: float | None = None) -> tuple[dict, dict, dict]:
        return _given(timeout=timeout), {}, {}

    def _prepare(self, record: Record, images: list[Image.Image]) -> dict:
        """Tokens of the texts (1, N, L).

        They are padded to the maximal length, so that transformers can stack images; it fills up images that have
        fewer texts than others with rows of padding.
        """
        text = record.get("text")
        texts: list[Any] = list(text) if are_several(text) else [text]  # type: ignore[arg-type]
        if not texts:
            raise ValueError("The list of texts is empty: pass at least one.")
        texts = [_checked_text(one, "text") for one in texts]
        tokens = self.processor(text=texts, padding="max_length", return_tensors="pt")
        return {name: tokens[name][None] for name in ("input_ids", "attention_mask")} | {
            "text": text if isinstance(text, str) else texts
        }

    def _forward(self, inputs: dict) -> dict:
        input_ids, attention_mask = inputs["input_ids"], inputs["attention_mask"]  # (B, N, L)
        size, length = input_ids.shape[:2], int(attention_mask.sum(-1).max())
        input_ids, attention_mask = (x[..., :length].flatten(0, 1) for x in (input_ids, attention_mask))
        tcl = self.model.tcl
        images = tcl.encode_image(inputs["pixel_values"])
        texts = tcl.encode_text(input_ids, attention_mask)
        logits = self.model.match(texts, attention_mask, images)  # (B * N, 2)
        text_features = tcl.text_features(texts, attention_mask).view(*size, -1)
        return {
            "score": logits.float().softmax(-1)[:, MATCHES].view(size),
            "similarity": torch.einsum("bd,bnd->bn", tcl.image_features(images), text_features),
            "text": inputs["text"],
        }

    def postprocess(self, outputs: dict) -> dict | list[dict]:
        """`text`, `score` and `similarity` of each text."""
        text = outputs["text"]
        texts = [text] if isinstance(text, str) else text
        rows = zip(texts, outputs["score"][0].tolist(), outputs["similarity"][0].tolist(), strict=False)
        results = [{"text": one, "score": score, "similarity": similarity} for one, score, similarity in rows]
        return results[0] if isinstance(text, str) else results


class VisualQuestionAnsweringPipeline(_ImageTextPipeline):
    """Answer a question about an image: {"image": ..., "question": ...}.

    With `candidates` the result is a list of the best `top_k` (5), each a dictionary of `answer` and `score`, its
    probability among the `k` (128) candidates with the most probable first tokens. Without, it is a list of one
    dictionary with the generated `answer`, and other parameters go to the model's `generate`.
    """

    model_classes = (TCLForQuestionAnswering,)
    text_name = "question"

    def _sanitize_parameters(
        self,
        candidates: list[str] | None = None,
        top_k: int | None = None,
        k: int | None = None,
        timeout: float | None = None,
        **generate_kwargs,
    ) -> tuple[dict, dict, dict]:
        forward = _given(k=k) | generate_kwargs
        if candidates is not None:
            if isinstance(candidates, str) or not len(candidates):
                raise ValueError(
                    f"candidates={candidates!r} must be a list of at least one answer, or None to generate one."
                )
            checked = [_checked_text(candidate, "candidate") for candidate in candidates]
            forward["candidates"] = self.processor.encode_answers(checked)
        return _given(timeout=timeout), forward, _given(candidates=candidates, top_k=top_k)

    def _prepare(self, record: Record, images: list[Image.Image]) -> Mapping[str, Any]:
        """Tokens of the question."""
        question = self.processor.clean_question(self._text(record))
        longest = min(MAX_QUESTION_TOKENS, self.model.config.text_config.max_position_embeddings)
        return self.processor.tokenizer(question, truncation=True, max_length=longest, return_tensors="pt")

    def _forward(self, inputs: dict, candidates: tuple[Tensor, Tensor] | None = None, k: int = 128, **kwargs) -> dict:
        if candidates is None:
            answers = self.model.generate(**inputs, **kwargs)
            # (B, sequences, L), with several sequences if `num_return_sequences` is given
            return {"answer_ids": answers.unflatten(0, (len(inputs["input_ids"]), -1))}
        if kwargs:
            raise ValueError(f"{', '.join(kwargs)}: candidates are ranked without generation; leave out one of both.")
        candidate_ids, candidate_mask = (tensor.to(self.device) for tensor in candidates)
        ranked = self.model.rank_answers(**inputs, candidate_ids=candidate_ids, candidate_mask=candidate_mask, k=k)
        return {"score": ranked.probabilities, "index": ranked.indices}

    def postprocess(self, outputs: dict, candidates: list[str] | None = None, top_k: int = 5) -> list[dict]:
        """`answer` and, for candidates, `score`, best first."""
        if candidates is None:
            texts = self.tokenizer.batch_decode(outputs["answer_ids"][0], skip_special_tokens=True)
            return [{"answer": text.strip()} for text in texts]
        best = zip(outputs["score"][0].tolist(), outputs["index"][0].tolist(), strict=True)
        return [{"answer": candidates[index], "score": score} for score, index in best][:top_k]


class VisualEntailmentPipeline(_ImageTextPipeline):
    """Classify a text about an image, or about as many as the model reads: {"image" or "images": ..., "text": ...}.

    The result is a list of `label` and `score` of the classes, best first, cut to `top_k` if that is given.
    """

    model_classes: tuple[type[TCLPreTrainedModel], ...] = (TCLForVisualEntailment, TCLForVisualReasoning)

    def _sanitize_parameters(self, top_k: int | None = None, timeout: float | None = None) -> tuple[dict, dict, dict]:
        return _given(timeout=timeout), {}, _given(top_k=top_k)

    def _prepare(self, record: Record, images: list[Image.Image]) -> Mapping[str, Any]:
        """Tokens of the text."""
        return self.processor(text=[self._text(record)], return_tensors="pt")

    def _forward(self, inputs: dict) -> dict:
        return {"logits": self.model(**inputs).logits}

    def postprocess(self, outputs: dict, top_k: int | None = None) -> list[dict]:
        """`label` and `score` of the classes, best first."""
        scores, order = outputs["logits"][0].float().softmax(-1).sort(descending=True)
        names = self.model.config.id2label
        rows = zip(scores.tolist(), order.tolist(), strict=True)
        return [{"label": names[number], "score": score} for score, number in rows][:top_k]


class VisualReasoningPipeline(VisualEntailmentPipeline):
    """Classify a text about two images as "True" or "False": {"images": [..., ...], "text": ...}."""

    model_classes = (TCLForVisualReasoning,)


class VisualGroundingPipeline(_ImageTextPipeline):
    """Locate a text, or a phrase of it, in an image: {"image": ..., "text": ...}.

    A record or the call may also have `phrase`, words of the text or the start and end of their span, and `boxes`,
    candidates (x1, y1, x2, y2) in pixels; those of the record take precedence. The result has `heat_map`, a tensor on
    the grid of patches; `point`, its hottest pixel; and `box` with its `score`, the heat inside over the square root of
    the area. The box is the best of the candidates. Without candidates it is the box around the hottest pixel, or with
    `sliding=True` the best of boxes of all sizes all over the image. With `draw=True`, `drawn` is the image with map
    and box.

    `heat` is the score that the map explains: "matching", with the phrase's tokens in its text, or "similarity", with
    the phrase alone as the text, which a small model learns earlier. `layer` and `threshold` are those of
    `grounding.phrase_heat_maps` and `grounding.box_from_heat_map`.
    """

    model_classes = (TCLForImageTextRetrieval, TCLForPreTraining)

    def _sanitize_parameters(
        self,
        phrase: str | Span | None = None,
        boxes: Boxes | None = None,
        layer: int | None = None,
        sliding: bool | None = None,
        threshold: float | None = None,
        draw: bool | None = None,
        timeout: float | None = None,
        heat: str | None = None,
    ) -> tuple[dict, dict, dict]:
        record = _given(phrase=phrase, boxes=boxes, timeout=timeout)
        return record, _given(layer=layer, heat=heat), _given(sliding=sliding, threshold=threshold, draw=draw)

    def _prepare(
        self, record: Record, images: list[Image.Image], phrase: str | Span | None = None, boxes: Boxes | None = None
    ) -> dict:
        """The text with the span of the phrase, the image itself, and the candidate boxes."""
        (image,), text = images, self._text(record)
        in_record = _given(phrase=record.get("phrase"), boxes=record.get("boxes"))
        phrase, boxes = in_record.get("phrase", phrase), in_record.get("boxes", boxes)
        if boxes is not None:
            boxes = [[float(corner) for corner in box] for box in boxes]
            if not boxes:
                raise ValueError("boxes is empty: pass at least one candidate, or None to find a box without any.")
            box_scores(torch.zeros(1, 1), boxes, image.size)  # raises an error for a wrong box before the model runs
        span = phrase_span(text, phrase) if isinstance(phrase, str) else phrase
        return {"text_and_span": (text, span), "image": image, "boxes": boxes}

    def _forward(self, inputs: dict, **kwargs) -> dict:
        pairs = inputs["text_and_span"]
        texts, spans = zip(*(pairs if isinstance(pairs, list) else [pairs]), strict=True)  # a list only in batches
        phrases = [[span] for span in spans]
        maps: list[list[Any]] = phrase_heat_maps(
            self.model, self.processor, inputs["pixel_values"], texts, phrases, **kwargs
        )
        heat_maps = torch.stack([heat_map for (heat_map,) in maps])  # (B, height, width)
        return {"heat_map": heat_maps, "image": inputs["image"], "boxes": inputs["boxes"]}

    def postprocess(
        self, outputs: dict, sliding: bool = False, threshold: float = 0.5, draw: bool = False
    ) -> dict[str, Any]:
        """`box`, `score`, `point`, `heat_map`, and with `draw` also `drawn`.

        Args:
            outputs: those of `_forward`, with the heat map.
            sliding: propose the box that holds the most heat for its size, in place of the region of the hottest pixel.
            threshold: share of the highest heat that pixels of the region have.
            draw: draw map and box into the image.
        """
        heat_map, image, boxes = outputs["heat_map"][0], outputs["image"], outputs["boxes"]
        if boxes is None and sliding:
            boxes = sliding_boxes(image.size).tolist()
        elif boxes is None:
            boxes = [box_from_heat_map(heat_map, image.size, threshold)]
        scores = box_scores(heat_map, boxes, image.size)
        best = int(scores.argsort(descending=True, stable=True)[0])
        result = {
            "box": tuple(boxes[best]),
            "score": scores[best].item(),
            "point": heat_point(heat_map, image.size),
            "heat_map": heat_map,
        }
        return result | ({"drawn": draw_heat_map(image, heat_map, [boxes[best]])} if draw else {})


def _given(**parameters: Any) -> dict[str, Any]:
    """The parameters that are not None; the others keep the defaults of the function they would be passed to."""
    return {name: value for name, value in parameters.items() if value is not None}


def _checked_text(text: Any, name: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{name}={text!r:.60} is not a text: pass a {name} with at least one word.")
    return text


def _wrong_model(task: str, name: str, expected: tuple[type, ...]) -> PipelineException:
    return PipelineException(
        task,
        name,
        f"{task} needs the heads of {' or '.join(cls.__name__ for cls in expected)}, but the model is {name}.",
    )


class _OpenedAsSaved:
    """Open a checkpoint as the class it was saved as, if a task can use that, and without a teacher.

    transformers would take the first class that opens it, but every TCL class opens every TCL checkpoint, and gives it
    random heads where it has none.
    """

    model_classes: tuple[type[TCLPreTrainedModel], ...]

    @classmethod
    def from_pretrained(cls, name: str, _from_pipeline: str = "", **kwargs) -> TCLPreTrainedModel:
        saved_as = AutoConfig.from_pretrained(name, **kwargs).architectures or ["of an unknown class"]
        for model_class in cls.model_classes:
            if model_class.__name__ in saved_as:
                return model_class.from_pretrained(name, **{"use_momentum_teacher": False} | kwargs)
        raise _wrong_model(_from_pipeline, saved_as[0], cls.model_classes)


def register_pipelines() -> None:
    """Register the tasks with transformers' `pipeline`."""
    # transformers 5 removed this task from its own, and refuses its name before it looks among registered ones.
    getattr(pipelines, "REMOVED_TASKS", {}).pop("visual-question-answering", None)
    for task, pipeline_class in {
        "image-text-matching": ImageTextMatchingPipeline,
        "visual-question-answering": VisualQuestionAnsweringPipeline,
        "visual-entailment": VisualEntailmentPipeline,
        "visual-reasoning": VisualReasoningPipeline,
        "visual-grounding": VisualGroundingPipeline,
    }.items():
        opener = type("OpenedAsSaved", (_OpenedAsSaved,), {"model_classes": pipeline_class.model_classes})
        PIPELINE_REGISTRY.register_pipeline(task, pipeline_class, pt_model=opener, type="multimodal")
        # With it a saved pipeline would contain this file as remote code, which users of this package do not need.
        del pipeline_class._registered_impl
