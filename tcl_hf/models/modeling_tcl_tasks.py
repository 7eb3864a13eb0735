"""Heads of TCL for question answering, visual entailment, two-image reasoning, and the pre-training of the latter.

Each has `self.tcl` and a layer or two; all but text assignment learn with the momentum teacher. Each starts from a
pre-training checkpoint by `from_pretrained` alone: the decoder of answers is filled from the fusion layers, fusion
layers are repeated for two images, and the teacher's copies are filled in the same way.

Shapes: N texts, L tokens, A answers, C candidates, V words.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions, SequenceClassifierOutput
from transformers.utils import can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg

from .attention import KeyValue
from .configuration_tcl import TCLConfig, TCLTextConfig
from .encoders import PredictsWords, TCLLMHead, TCLTextModel, TCLTextPreTrainedModel, eval_mode
from .fitting import fill_decoder, shape_of
from .input_checks import check_index
from .losses import answer_loss, classification_loss, draw_two_images
from .modeling_tcl import TCLModel, TCLTaughtModel, has_no_share
from .outputs import TCLQuestionAnsweringOutput, TCLRankedAnswers

ENTAILMENT_LABELS = ("contradiction", "neutral", "entailment")  # in the order of the paper's code
REASONING_LABELS = ("False", "True")
ASSIGNMENT_LABELS = ("first", "second", "neither")


def _with_labels(config: TCLConfig, labels: tuple[str, ...], images_per_text: int = 1) -> TCLConfig:
    """A copy of the config for a number of images per text, with the task's labels unless it has labels of its own."""
    config = copy.deepcopy(config)
    _check_images_per_text(config, images_per_text)
    names = tuple(config.id2label.values())
    # transformers' default is two labels named LABEL_0 and LABEL_1.
    unnamed = len(names) in (2, len(labels)) and all(name.startswith("LABEL_") for name in names)
    of_another_task = names in (ENTAILMENT_LABELS, REASONING_LABELS, ASSIGNMENT_LABELS)
    if unnamed or of_another_task:
        config.id2label = dict(enumerate(labels))
        config.label2id = {name: number for number, name in config.id2label.items()}
    config.text_config.images_per_text = images_per_text
    return config


def _check_images_per_text(config: TCLConfig, images_per_text: int) -> None:
    found = config.text_config.images_per_text
    if found not in (1, images_per_text):
        raise ValueError(
            f"text_config.images_per_text={found}, so that each fusion layer has {found} copies, but this model reads "
            f"{images_per_text} image per text: start from a checkpoint that has one copy of each."
        )


class _FusedClassifier(TCLTaughtModel):
    """Classifies texts about one or several images by the fused state of [CLS]."""

    auto_model = "AutoModelForSequenceClassification"
    labels: tuple[str, ...]
    images_per_text = 1

    def __init__(self, config: TCLConfig):
        config = _with_labels(config, self.labels, self.images_per_text)
        width = config.text_config.hidden_size
        head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, config.num_labels))
        super().__init__(config, cls_head=head)
        self.post_init()

    def fit_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the entries of a TCL checkpoint as this model needs them; a head for other classes starts new."""
        last = "cls_head.2.weight"
        if last in state_dict and shape_of(state_dict[last])[0] != self.config.num_labels:
            heads = ("cls_head.", "teacher.cls_head.")
            state_dict = {key: value for key, value in state_dict.items() if not key.startswith(heads)}
        return super().fit_state_dict(state_dict)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_index: Tensor | None = None,
        labels: Tensor | None = None,
        alpha: float | Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """Classify texts about images.

        Args:
            input_ids: token ids (N, L).
            pixel_values: images (B, 3, height, width); several for each text as (B, images, 3, height, width).
            attention_mask: 1 for tokens, 0 for padding (N, L).
            image_index: the image (or images) of each text, as a row of `pixel_values` (N,); without it text n is about
                row n. An image that several texts share is encoded once.
            labels: numbers of the classes (N,); -100 for texts that do not count.
            alpha: share of the teacher's targets; `self.alpha` if None, which starts as the config's.
            interpolate_pos_encoding: resize the image positions to images of another size.
            output_attentions, output_hidden_states: return those of the text and fusion layers.

        Returns:
            `logits` (N, classes) and, with labels, `loss`.

        Raises:
            ValueError: if texts or images are missing, if there are not as many images as the model reads, or if
                texts and images differ in number and `image_index` is missing.
        """
        expected = self.images_per_text
        slots = (expected,) if expected > 1 else ()
        if pixel_values is not None and (pixel_values.ndim < 3 or _slots(pixel_values, expected) != slots):
            shape = "(B, 3, height, width)" if expected == 1 else f"(B, {expected}, 3, height, width)"
            raise ValueError(f"{type(self).__name__} reads pixel_values {shape}, but got {tuple(pixel_values.shape)}.")
        inputs = (input_ids, attention_mask, pixel_values, image_index, interpolate_pos_encoding)
        output = _fused(
            self.tcl, *inputs, output_attentions=output_attentions, output_hidden_states=output_hidden_states
        )
        logits = self.cls_head(output.pooler_output)
        loss = None
        if labels is not None:
            alpha, teacher_logits = self.soft_target_share(alpha), None
            if not has_no_share(alpha):
                with torch.no_grad():
                    taught = _fused(self.teacher.tcl, *inputs)
                    teacher_logits = self.teacher.cls_head(taught.pooler_output)
            loss = classification_loss(logits, labels, teacher_logits, alpha)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=output.hidden_states, attentions=output.attentions
        )


def _slots(pixel_values: Tensor, images_per_text: int) -> tuple[int, ...]:
    """The dimensions between that of the batch and those of an image, or of the states that are kept of it."""
    are_states = pixel_values.ndim == (3 if images_per_text == 1 else 4)
    return tuple(pixel_values.shape[1 : -2 if are_states else -3])


def _fused(
    tcl: TCLModel,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    pixel_values: Tensor | None,
    image_index: Tensor | None,
    interpolate_pos_encoding: bool,
    **output_options: bool | None,
) -> Any:
    """The text model's output for texts (N, L) about images (B, ..., 3, height, width), of student or teacher.

    Text n is about row `image_index[n]` of the images, or about row n if `image_index` is None.
    """
    if input_ids is None or pixel_values is None:
        raise ValueError("A text or a question is about an image: pass both input_ids and pixel_values.")
    if image_index is None and len(input_ids) != len(pixel_values):
        raise ValueError(
            f"There are {len(input_ids)} texts about {len(pixel_values)} images: pass image_index, the image of each "
            "text."
        )
    slots = tcl.config.text_config.images_per_text
    of_each = pixel_values.shape[1 + len(_slots(pixel_values, slots)) :]  # the shape of an image, or of its states
    states = tcl.encode_image(pixel_values.reshape(-1, *of_each), interpolate_pos_encoding=interpolate_pos_encoding)
    images = states.unflatten(0, (len(pixel_values), -1)).unbind(1)  # per slot (B, 1 + P, width)
    return tcl.text_model(
        input_ids, attention_mask, encoder_hidden_states=images, image_index=image_index, **output_options
    )


class TCLForVisualEntailment(_FusedClassifier):
    """TCL for visual entailment (SNLI-VE): an image entails a text, contradicts it, or neither."""

    task = "visual_entailment"
    labels = ENTAILMENT_LABELS


class TCLForVisualReasoning(_FusedClassifier):
    """TCL for two-image reasoning (NLVR2): a text is true of two images, or it is not.

    Every fusion layer is doubled: the first copy attends to the left image and the second to the right image. Both
    share the projections to keys and values.
    """

    task = "visual_reasoning"
    labels = REASONING_LABELS
    images_per_text = 2


class TCLForTextAssignment(TCLTaughtModel):
    """TCL that assigns a text to one of two images, or to neither: the pre-training for [`TCLForVisualReasoning`].

    It has no momentum teacher.
    """

    task = "text_assignment"
    auto_model = "AutoModelForSequenceClassification"
    has_teacher = False

    def __init__(self, config: TCLConfig):
        super().__init__(_with_labels(config, ASSIGNMENT_LABELS, images_per_text=2))
        self.ta_head = nn.Linear(self.config.text_config.hidden_size, len(ASSIGNMENT_LABELS))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        first_image_index: Tensor | None = None,
        second_image_index: Tensor | None = None,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """Assign texts to one of two images.

        Args:
            input_ids: token ids (N, L).
            pixel_values: images (B, 3, height, width); where two images are drawn, image n belongs to text n.
            attention_mask: 1 for tokens, 0 for padding (N, L).
            first_image_index, second_image_index: the two images of each text (N,). Without them two images are drawn
                for every text, similar ones more often, and `labels` with them.
            labels: 0 if the text belongs to the first image, 1 if to the second, 2 if to neither (N,); -100 where the
                batch has too few images to draw two.
            interpolate_pos_encoding: resize the image positions to images of another size.

        Returns:
            `logits` (N, 3) and, with drawn or given labels, `loss`.

        Raises:
            ValueError: if texts or images are missing, if only one of the two indices is given, or if one names an
                image that is not there.
        """
        if input_ids is None or pixel_values is None:
            raise ValueError("TCLForTextAssignment reads texts about images: pass both input_ids and pixel_values.")
        if (first_image_index is None) != (second_image_index is None):
            raise ValueError("A text has two images: pass both first_image_index and second_image_index, or neither.")
        states = self.tcl.encode_image(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        if first_image_index is None:
            if len(pixel_values) != len(input_ids):
                raise ValueError(
                    f"Two images are drawn for each text, whose own image must be given, but got {len(pixel_values)} "
                    f"images and {len(input_ids)} texts: pass as many images as texts, or first_image_index and "
                    "second_image_index."
                )
            with torch.no_grad():
                drawn = draw_two_images(self.tcl.image_features(states))
            first_image_index, second_image_index, labels = drawn
        else:
            indices: dict[str, Any] = {"first": first_image_index, "second": second_image_index}
            for name, index in indices.items():
                check_index(f"{name}_image_index", index, len(input_ids), len(states), "images", self.training)
        images = (states[first_image_index], states[second_image_index])
        fused = self.tcl.text_model(input_ids, attention_mask, encoder_hidden_states=images)
        logits = self.ta_head(fused.pooler_output)
        loss = None if labels is None else classification_loss(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class TCLAnswerDecoder(PredictsWords, TCLTextPreTrainedModel, GenerationMixin):
    """A causal text model with a language-model head, which reads a fused question in place of an image."""

    base_model_prefix = "text_model"
    main_input_name = "input_ids"
    _supports_flash_attn = False  # see TCLForQuestionAnswering
    _tied_weights_keys = {"lm_head.decoder.weight": "text_model.embeddings.word_embeddings.weight"}

    def __init__(self, config: TCLTextConfig):
        super().__init__(config)
        self.text_model = TCLTextModel(config)  # type: ignore[arg-type]
        self.lm_head = TCLLMHead(config)  # type: ignore[arg-type]
        self.post_init()

    def decode(
        self,
        input_ids: Tensor,
        questions: list[KeyValue],
        question_mask: Tensor | None = None,
        question_index: Tensor | None = None,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        **output_options,
    ) -> Any:
        """States (A, L, width) of answers (A, L), each of which reads a question.

        Args:
            questions: keys and values of Q questions for each layer, from `text_model.project_images`.
            question_mask: 1 for tokens of the questions, 0 for padding (Q, P).
            question_index: the question of each answer (A,). Without it each question serves A / Q neighbours.
        """
        states = self.text_model.encode(input_ids, attention_mask, cache=cache).last_hidden_state
        options = output_options | {"image_mask": question_mask, "cache": cache}
        return self.text_model.fuse(states, attention_mask, questions, question_index, **options)

    def next_tokens(
        self, questions: Tensor, answer_ids: Tensor, question_mask: Tensor | None, question_index: Tensor | None
    ) -> Tensor:
        """Logits (A, L, V) of the tokens after those of answers (A, L) to questions with states (Q, P, width).

        Args:
            questions: states of the questions (Q, P, width).
            answer_ids: token ids of the answers (A, L).
            question_mask: 1 for tokens of the questions and 0 for padding, (Q, P).
            question_index: the question of each answer (A,); answer i belongs to question i if None.
        """
        projected = self.text_model.project_images(questions)
        return self.lm_head(self.decode(answer_ids, projected, question_mask, question_index).last_hidden_state)

    @deprecate_kwarg("past_key_values", version="6.0.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        cache: Any = None,
        use_cache: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> CausalLMOutputWithCrossAttentions:
        """Logits (A, L, V) of the next tokens, in the form that transformers' generation calls.

        Args:
            encoder_hidden_states: fused states of the questions (A, P, width). With a cache they are projected once.
            encoder_attention_mask: 1 for tokens of the questions, 0 for padding (A, P).
        """
        if use_cache and not isinstance(cache, EncoderDecoderCache):
            cache = EncoderDecoderCache(cache or DynamicCache(), DynamicCache())
        if cache is not None and cache.is_updated.get(0):
            questions = [(layer.keys, layer.values) for layer in cache.cross_attention_cache.layers]
        else:
            questions = self.text_model.project_images(encoder_hidden_states)  # type: ignore[arg-type]
            if cache is not None:
                for number, (key, value) in enumerate(questions):
                    cache.cross_attention_cache.update(key, value, number)
                    cache.is_updated[number] = True
        options: dict[str, Any] = {
            "cache": None if cache is None else cache.self_attention_cache,
            "output_attentions": bool(output_attentions),
            "output_hidden_states": bool(output_hidden_states),
        }
        output = self.decode(input_ids, questions, encoder_attention_mask, attention_mask=attention_mask, **options)
        return CausalLMOutputWithCrossAttentions(
            logits=self.lm_head(output.last_hidden_state),
            cache=cache,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            cross_attentions=output.cross_attentions,
        )


def _rows_of_cache(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """A cache with the keys and values of some rows (R,) of another cache."""
    chosen = DynamicCache()
    for number, layer in enumerate(cache.layers):
        chosen.update(layer.keys[rows], layer.values[rows], number)
    return chosen


class TCLForQuestionAnswering(TCLTaughtModel):
    """TCL that answers questions about images (VQA): a causal decoder reads the question fused with its image.

    `rank_answers` chooses among given answers, `generate` writes one.
    """

    task = "question_answering"
    pipeline_tag = "visual-question-answering"
    # Flash attention cannot mask the padding of questions where answers have another length.
    _supports_flash_attn = False
    # The decoder ties its own weights; they are named here so that the teacher's are tied too.
    _tied_weights_keys = {
        "text_decoder.lm_head.decoder.weight": "text_decoder.text_model.embeddings.word_embeddings.weight"
    }

    def __init__(self, config: TCLConfig):
        text = config.text_config
        _check_images_per_text(config, 1)
        decoder_config = TCLTextConfig(
            **text.to_dict()
            | {
                "num_hidden_layers": text.num_hidden_layers - text.fusion_layer,
                "fusion_layer": 0,
                "images_per_text": 1,
                "causal": True,
                "lock": False,
                "encoder_hidden_size": text.hidden_size,
            }
        )
        decoder_config._attn_implementation = text._attn_implementation
        super().__init__(config, text_decoder=TCLAnswerDecoder._from_config(decoder_config))
        self.post_init()

    def fit_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the entries of a TCL checkpoint as this model needs them; its fusion layers fill the decoder."""
        return super().fit_state_dict(fill_decoder(state_dict, self.config.text_config))

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """Resize the vocabularies of questions and answers, in student and teacher."""
        self.text_decoder.resize_token_embeddings(*args, **kwargs)
        return super().resize_token_embeddings(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        answer_weights: Tensor | None = None,
        question_index: Tensor | None = None,
        image_index: Tensor | None = None,
        alpha: float | Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs,
    ) -> TCLQuestionAnsweringOutput:
        """Read questions about images; with answers, compute their loss.

        Args:
            input_ids: token ids of the questions (N, L).
            pixel_values: images (B, 3, height, width).
            attention_mask: 1 for tokens, 0 for padding (N, L).
            labels: token ids of answers (A, L), from [CLS] to [SEP], -100 for padding.
            answer_weights: weight of each answer (A,), the share of people who gave it; 1 if None.
            question_index: the question of each answer (A,); without it answer n belongs to question n.
            image_index: the image of each question (N,); without it question n is about image n. An image that several
                questions share is encoded once.
            alpha: share of the teacher's targets; `self.alpha` if None, which starts as the config's.
            interpolate_pos_encoding: resize the image positions to images of another size.

        Raises:
            ValueError: if questions or images are missing, if answers and questions differ in number and
                `question_index` is missing, or if an index or the weights do not belong to the rows.
        """
        inputs = (input_ids, attention_mask, pixel_values, image_index, interpolate_pos_encoding)
        questions = _fused(self.tcl, *inputs).last_hidden_state  # (N, L, width)
        if labels is None:
            return TCLQuestionAnsweringOutput(encoder_last_hidden_state=questions)
        if question_index is None and len(labels) != len(questions):
            raise ValueError(
                f"There are {len(labels)} answers to {len(questions)} questions: pass question_index, the question of "
                "each answer."
            )
        if question_index is not None:
            check_index(
                "question_index", question_index, len(labels), len(questions), "questions", self.training, "answers"
            )
        if answer_weights is not None and len(answer_weights) != len(labels):
            raise ValueError(
                f"answer_weights has {len(answer_weights)} entries for {len(labels)} answers: pass one each."
            )
        alpha = self.soft_target_share(alpha)
        answer_ids = labels.masked_fill(labels == -100, self.config.text_config.pad_token_id or 0)[:, :-1]
        answers = (answer_ids, attention_mask, question_index)
        logits = self.text_decoder.next_tokens(questions, *answers)
        teacher_logits = None
        if not has_no_share(alpha):
            with torch.no_grad():
                taught = _fused(self.teacher.tcl, *inputs).last_hidden_state
                teacher_logits = self.teacher.text_decoder.next_tokens(taught, *answers)
        if answer_weights is None:
            answer_weights = torch.ones(len(labels), device=labels.device)
        loss = answer_loss(logits, labels[:, 1:], answer_weights, len(questions), teacher_logits, alpha)
        return TCLQuestionAnsweringOutput(loss, logits, questions)

    @torch.no_grad()
    def rank_answers(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        candidate_ids: Tensor,
        candidate_mask: Tensor,
        k: int = 128,
        attention_mask: Tensor | None = None,
        image_index: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        chunk_size: int = 2048,
    ) -> TCLRankedAnswers:
        """Rank given answers to questions about images.

        The k candidates with the most probable first tokens are scored by the log-probability of all their tokens plus
        that of the first token. It counts twice, as in the original, because published numbers are computed so. A
        question's keys and values are projected once, [CLS] is read once for all candidates, and tokens that predict
        nothing are not read.

        Args:
            input_ids, pixel_values, attention_mask, image_index: N questions, as in `forward`.
            candidate_ids: token ids of C answers (C, L), [CLS] to [SEP], padded.
            candidate_mask: 1 for tokens of the candidates, 0 for padding (C, L).
            k: number of candidates scored in full; all of them if there are fewer.
            chunk_size: number of tokens whose logits are in memory at once.

        Raises:
            ValueError: as in `forward`, and if the candidates' mask has another shape than their ids.
        """
        if candidate_ids.shape != candidate_mask.shape:
            shapes = f"{tuple(candidate_ids.shape)} and {tuple(candidate_mask.shape)}"
            raise ValueError(
                f"candidate_ids and candidate_mask have the shapes {shapes}: pass a number for each token."
            )
        inputs = (input_ids, attention_mask, pixel_values, image_index, interpolate_pos_encoding)
        with eval_mode(self):
            questions = _fused(self.tcl, *inputs).last_hidden_state
            return self._rank(questions, attention_mask, candidate_ids, candidate_mask, k, chunk_size)

    def _rank(
        self,
        questions: Tensor,
        question_mask: Tensor | None,
        candidate_ids: Tensor,
        candidate_mask: Tensor,
        k: int,
        chunk_size: int,
    ) -> TCLRankedAnswers:
        """`rank_answers` for the states of questions (N, L, width)."""
        decoder = self.text_decoder
        projected = decoder.text_model.project_images(questions)
        cache = DynamicCache()
        start_ids = candidate_ids[:1, :1].expand(len(questions), 1)
        start = decoder.decode(start_ids, projected, question_mask, cache=cache).last_hidden_state
        first_tokens = decoder.lm_head(start[:, 0]).float().log_softmax(-1)  # (N, V)
        first, indices = first_tokens[:, candidate_ids[:, 1]].topk(min(k, len(candidate_ids)))  # (N, k)
        scores = 2 * first

        # Answers of one length are read together: most have one or two tokens, and padding would be most of the
        # work. [CLS] and the first token are scored already, and [SEP], the last one, predicts nothing.
        answer_ids = candidate_ids[indices].flatten(0, 1)  # (N * k, L)
        lengths = candidate_mask[indices].sum(-1).flatten()
        rest = torch.zeros(len(lengths), device=scores.device)
        for length in lengths[lengths > 2].unique().tolist():
            rows = (lengths == length).nonzero().flatten()
            ids, targets = answer_ids[rows, 1 : length - 1], answer_ids[rows, 2:length]  # (R, length - 2)
            question_index = rows // indices.shape[1]
            past = _rows_of_cache(cache, question_index)
            read = decoder.decode(ids, projected, question_mask, question_index, cache=past)
            states = read.last_hidden_state.flatten(0, 1)
            chunks = zip(states.split(chunk_size), targets.flatten().split(chunk_size), strict=True)
            losses = [F.cross_entropy(decoder.lm_head(x).float(), y, reduction="none") for x, y in chunks]
            rest[rows] = -torch.cat(losses).view(len(rows), -1).sum(-1)
        scores = scores + rest.view_as(scores)
        scores, order = scores.sort(-1, descending=True)
        return TCLRankedAnswers(indices.gather(-1, order), scores.softmax(-1), scores)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        image_index: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **generation_kwargs,
    ) -> Tensor:
        """Write answers to questions about images, through transformers' generation.

        Args:
            input_ids, pixel_values, attention_mask, image_index: N questions, as in `forward`.
            generation_kwargs: arguments of `GenerationMixin.generate`, such as `max_new_tokens` (10 by default),
                `num_beams` and `do_sample`.

        Returns:
            Token ids from [CLS] to [SEP], as `generate` of transformers returns them.
        """
        text = self.config.text_config
        inputs = (input_ids, attention_mask, pixel_values, image_index, interpolate_pos_encoding)
        questions = _fused(self.tcl, *inputs).last_hidden_state
        if not {"max_new_tokens", "max_length", "generation_config"} & generation_kwargs.keys():
            generation_kwargs["max_new_tokens"] = 10
        ends = {"bos_token_id": text.bos_token_id, "eos_token_id": text.eos_token_id, "pad_token_id": text.pad_token_id}
        return self.text_decoder.generate(
            input_ids=torch.full((len(questions), 1), text.bos_token_id, device=questions.device),
            encoder_hidden_states=questions,
            encoder_attention_mask=attention_mask,
            **ends | generation_kwargs,
        )


__all__ = [
    "TCLAnswerDecoder",
    "TCLForQuestionAnswering",
    "TCLForTextAssignment",
    "TCLForVisualEntailment",
    "TCLForVisualReasoning",
]
