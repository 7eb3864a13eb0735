"""The handler of Inference Endpoints: a repository that was pushed with its code answers requests by its head.

It is copied into the repository as `handler.py`, and uses transformers and torch alone.

| head | `inputs` | answer |
|---|---|---|
| pre-training, retrieval | `image`, `text` (one or several) | `text`, `score` of matching, `similarity` of each |
| the same, and the model without a head | a text, or `image` or `text` alone | `embedding`, L2-normalised |
| question answering | `image`, `question`; parameters `candidates`, `top_k` | `answer` and, for candidates, `score` |
| visual entailment, two-image reasoning | `image` or `images`, `text` | `label` and `score`, best first |

An image is the base64 of its file. A request that is wrong is answered with {"error": sentence}.
"""

import base64
import binascii
import io
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module

MATCHES = 1  # index of the logit "image and text match"
MAX_PIXELS = 40_000_000
MAX_TEXTS = 256
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


class RequestError(ValueError):
    """A request that cannot be answered; the message names the value, the place and the remedy."""


class EndpointHandler:
    """Answers requests with the model of a folder.

    Args:
        path: the folder; that of this file if empty.
    """

    def __init__(self, path: str = ""):
        path = str(path) or str(Path(__file__).parent)
        self.kind = AutoConfig.from_pretrained(path, trust_remote_code=True).architectures[0]
        definition = f"class {self.kind}("
        module = next(file.stem for file in sorted(Path(path).glob("modeling_*.py")) if definition in file.read_text())
        model_class = get_class_from_dynamic_module(f"{module}.{self.kind}", path)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = model_class.from_pretrained(path, use_momentum_teacher=False).to(self.device).eval()
        self.processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
        answers = Path(path) / "answers.json"
        self.answers = json.loads(answers.read_text(encoding="utf-8")) if answers.is_file() else None

    def __call__(self, data: dict[str, Any]) -> Any:
        """The answer to a request with `inputs`, and perhaps `parameters`."""
        try:
            return self._answer(data.get("inputs"), data.get("parameters") or {})
        except RequestError as error:
            return {"error": str(error)}

    @torch.inference_mode()
    def _answer(self, inputs: Any, parameters: dict[str, Any]) -> Any:
        record = {"text": inputs} if isinstance(inputs, str) else inputs
        if not isinstance(record, dict) or not isinstance(parameters, dict):
            raise RequestError("inputs is not a record: send {'inputs': {'image': base64, 'text': ...}}.")
        unknown = record.keys() - {"image", "images", "text", "question"}
        unknown |= parameters.keys() - {"candidates", "top_k"}
        if unknown:
            raise RequestError(f"{', '.join(sorted(unknown))}: this is not read; send image, text or question.")
        images = record.get("images") or ([record["image"]] if record.get("image") is not None else [])
        if not isinstance(images, list) or len(images) > 2:
            raise RequestError("images is not a list of one or two pictures.")
        pictures = [_picture(image) for image in images]
        if self.kind == "TCLForQuestionAnswering":
            return self._questions(pictures, record.get("question"), parameters)
        if hasattr(self.model, "images_per_text"):
            return self._judgement(pictures, record.get("text"), parameters)
        return self._features(pictures, record.get("text"))

    def _features(self, pictures: list[Image.Image], text: Any) -> Any:
        """Matching of a picture and texts, or the embedding of either."""
        tcl = self.model.base_model
        if text is None and len(pictures) == 1:
            return {"embedding": tcl.image_features(tcl.encode_image(self._pixels(pictures))).float()[0].tolist()}
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, list) or not 0 < len(texts) <= MAX_TEXTS or len(pictures) > 1:
            raise RequestError(f"Send one image, and as text one or a list of at most {MAX_TEXTS}.")
        tokens = self._tokens([_text(one, "text") for one in texts])
        states = tcl.encode_text(tokens["input_ids"], tokens["attention_mask"])
        features = tcl.text_features(states, tokens["attention_mask"]).float()  # (N, D)
        if not pictures:
            embeddings = [{"embedding": row} for row in features.tolist()]
            return embeddings[0] if isinstance(text, str) else embeddings
        image_states = tcl.encode_image(self._pixels(pictures))
        similarity = (tcl.image_features(image_states).float() @ features.T)[0].tolist()
        rows = [{"text": one, "similarity": value} for one, value in zip(texts, similarity, strict=True)]
        if hasattr(self.model, "match") and self.model.config.itm_weight:
            index = torch.zeros(len(texts), dtype=torch.long, device=self.device)
            logits = self.model.match(states, tokens["attention_mask"], image_states, index)
            scores = logits.float().softmax(-1)[:, MATCHES].tolist()
            rows = [row | {"score": score} for row, score in zip(rows, scores, strict=True)]
        return rows[0] if isinstance(text, str) else rows

    def _judgement(self, pictures: list[Image.Image], text: Any, parameters: dict[str, Any]) -> Any:
        """Labels of a statement about one picture or two."""
        expected = self.model.images_per_text
        if len(pictures) != expected:
            raise RequestError(f"{self.kind} reads {expected} picture(s) with a text, but got {len(pictures)}.")
        pixels = self._pixels(pictures)
        tokens = self._tokens([_text(text, "text")])
        logits = self.model(pixel_values=pixels if expected == 1 else pixels[None], **tokens).logits
        scores, order = logits[0].float().softmax(-1).sort(descending=True)
        names = self.model.config.id2label
        rows = zip(scores.tolist(), order.tolist(), strict=True)
        return [{"label": names[number], "score": score} for score, number in rows][: _top_k(parameters, len(names))]

    def _questions(self, pictures: list[Image.Image], question: Any, parameters: dict[str, Any]) -> Any:
        """Answers to a question, among candidates or generated."""
        if len(pictures) != 1:
            raise RequestError(f"A question is about one picture, but got {len(pictures)}: send it as image.")
        cleaned = self.processor.clean_question(_text(question, "question"))
        tokens = self.processor.tokenizer(cleaned, truncation=True, max_length=50, return_tensors="pt").to(self.device)
        asked = {"pixel_values": self._pixels(pictures), "input_ids": tokens["input_ids"]}
        asked["attention_mask"] = tokens["attention_mask"]
        candidates = parameters.get("candidates") or self.answers
        if not candidates:
            ids = self.model.generate(**asked)
            texts = self.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
            return [{"answer": text.strip()} for text in texts]
        if not isinstance(candidates, list):
            raise RequestError("candidates is not a list of answers.")
        ids, mask = self.processor.encode_answers([_text(one, "candidate") for one in candidates])
        ranked = self.model.rank_answers(
            **asked, candidate_ids=ids.to(self.device), candidate_mask=mask.to(self.device)
        )
        best = zip(ranked.probabilities[0].tolist(), ranked.indices[0].tolist(), strict=True)
        return [{"answer": candidates[index], "score": score} for score, index in best][: _top_k(parameters, 5)]

    def _pixels(self, pictures: list[Image.Image]) -> torch.Tensor:
        return self.processor(images=pictures, return_tensors="pt")["pixel_values"].to(self.device)

    def _tokens(self, texts: list[str]) -> dict[str, torch.Tensor]:
        tokens = self.processor(text=texts, return_tensors="pt").to(self.device)
        return {name: tokens[name] for name in ("input_ids", "attention_mask")}


def _text(text: Any, name: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise RequestError(f"{name}={text!r:.60} is not a text: send a {name} with at least one word.")
    return text


def _top_k(parameters: dict[str, Any], default: int) -> int:
    number = parameters.get("top_k", default)
    if not isinstance(number, int) or number < 1:
        raise RequestError(f"top_k={number!r:.60} is not a whole number of at least 1.")
    return number


def _picture(coded: Any) -> Image.Image:
    """The picture whose file is given as base64; its size is checked before it is decoded."""
    if isinstance(coded, Image.Image):  # endpoints open a request that is a picture alone
        return coded
    if not isinstance(coded, str):
        raise RequestError("image is not a text: send the base64 of the picture's file.")
    try:
        content = base64.b64decode(coded.partition(",")[2] if coded.startswith("data:") else coded, validate=True)
        picture = Image.open(io.BytesIO(content), formats=FORMATS)
        if picture.width * picture.height > MAX_PIXELS:
            raise RequestError(
                f"{picture.width} x {picture.height} pixels are more than {MAX_PIXELS // 10**6} million."
            )
        picture.load()
    except RequestError:
        raise
    except (binascii.Error, ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise RequestError("image cannot be read: send the base64 of a JPEG, PNG or WebP file.") from error
    return picture
