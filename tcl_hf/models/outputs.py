"""The outputs of the models: their fields, with shapes.

Shapes: B images, N texts, P patches, L tokens, D feature dimensions, V words, A answers, k ranked candidates.
"""

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    BaseModelOutputWithPoolingAndCrossAttentions,
    MaskedLMOutput,
)
from transformers.utils import ModelOutput


@dataclass
class TCLOutput(ModelOutput):
    """Output of [`TCLModel`].

    Args:
        logits_per_image: cosine similarities divided by the temperature (B, N), if images and texts were given.
        logits_per_text: the same, transposed (N, B).
        image_embeds: L2-normalised image features (B, D).
        text_embeds: L2-normalised text features (N, D).
        vision_model_output: output of the vision encoder.
        text_model_output: output of the text encoder.
    """

    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None
    text_model_output: BaseModelOutputWithPoolingAndCrossAttentions | None = None


@dataclass
class TCLLossOutput(ModelOutput):
    """Output of [`TCLForImageTextRetrieval`] and [`TCLForPreTraining`].

    The losses are scalars. They are None where the objective has weight 0 or no loss was asked for. `loss` is their
    sum, weighted by the config.

    Args:
        loss: the total.
        loss_cma, loss_imc, loss_lmi: means of the two directions or modalities below.
        loss_itm, loss_mlm: matching and masked language modelling.
        loss_i2t, loss_t2i: CMA from image to text, and from text to image.
        loss_i2i, loss_t2t: IMC of images, and of texts.
        loss_lmi_image, loss_lmi_text: LMI of images with their patches, and of texts with their tokens.
        logits_per_image: cosine similarities of images and texts divided by the temperature (B, N).
        logits_per_text: the same, transposed (N, B).
        itm_logits: matching logits (N, 2) of text n with image n; index 1 is "matches". They are computed at inference,
            for as many images as texts; `match` takes any pairs.
        itm_accuracy, mlm_accuracy: shares of matches and of words that were predicted right, scalars. Training only.
        image_embeds, text_embeds: L2-normalised features (B, D) and (N, D).
        cross_attentions: weights of each fusion layer for the pairs (N, heads, L, 1 + P), if asked for.
        vision_model_output, text_model_output: outputs of the encoders. Inference only.
    """

    loss: Tensor | None = None
    loss_cma: Tensor | None = None
    loss_imc: Tensor | None = None
    loss_lmi: Tensor | None = None
    loss_itm: Tensor | None = None
    loss_mlm: Tensor | None = None
    loss_i2t: Tensor | None = None
    loss_t2i: Tensor | None = None
    loss_i2i: Tensor | None = None
    loss_t2t: Tensor | None = None
    loss_lmi_image: Tensor | None = None
    loss_lmi_text: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    itm_logits: Tensor | None = None
    itm_accuracy: Tensor | None = None
    mlm_accuracy: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None
    text_model_output: BaseModelOutputWithPoolingAndCrossAttentions | None = None


@dataclass
class TCLMaskedLMOutput(MaskedLMOutput):
    """Output of [`TCLForMaskedLM`].

    Args:
        loss: mean cross-entropy over the masked tokens, if labels were given.
        logits: scores over the vocabulary (N, L, V).
        hidden_states, attentions, cross_attentions: those of every layer, if asked for.
    """

    cross_attentions: tuple[Tensor, ...] | None = None


@dataclass
class TCLQuestionAnsweringOutput(ModelOutput):
    """Output of [`TCLForQuestionAnswering`].

    Args:
        loss: the loss of the answers, if they were given as labels.
        logits: logits of the answers' next tokens (A, L, V), if answers were given.
        encoder_last_hidden_state: states of the questions fused with their images (N, L, width).
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    encoder_last_hidden_state: Tensor | None = None


@dataclass
class TCLRankedAnswers(ModelOutput):
    """The best of given candidates for each question, best first.

    Args:
        indices: rows of the chosen candidates (N, k).
        probabilities: softmax of the scores over these k (N, k).
        scores: log-probability of the first token plus that of the whole answer (N, k).
    """

    indices: Tensor | None = None
    probabilities: Tensor | None = None
    scores: Tensor | None = None


__all__ = ["TCLLossOutput", "TCLMaskedLMOutput", "TCLOutput", "TCLQuestionAnsweringOutput", "TCLRankedAnswers"]
