"""TCL and its heads for pre-training, retrieval and masked language modelling.

Reading order: `TCLModel` holds the two encoders and five verbs (encode image, encode text, fuse, image
features, text features). A head holds `self.tcl` and a layer or two; `TCLTaughtModel` is what heads with a momentum
teacher share. Retrieval adds matching and the queues; pre-training is retrieval plus masked language modelling. The
heads of the other tasks are in `modeling_tcl_tasks`.

Shapes: B images, N texts, P patches, L tokens, D feature dimensions, V words.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, BaseModelOutputWithPoolingAndCrossAttentions
from transformers.utils import ModelOutput, can_return_tuple, logging

from .configuration_tcl import TCLConfig
from .distributed import gather_own_first, gather_padded, is_distributed
from .encoders import KeyValue, TCLLMHead, TCLPreTrainedModel, TCLTextModel, TCLVisionModel
from .losses import (
    NO_IMAGE_ID,
    accuracy,
    cma_loss,
    imc_loss,
    itm_loss,
    lmi_loss,
    mlm_loss,
    pool_locals,
    positive_targets,
    sample_hard_negatives,
    similarity,
)
from .momentum import FeatureQueue, MomentumTeacher
from .starting_points import StartingPoint, read_text_encoder, read_vision_encoder

logger = logging.get_logger(__name__)

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.001, 0.5  # the paper's code keeps tau in this range
MATCHES = 1  # index of "matches" among the two matching logits


@dataclass
class TCLOutput(ModelOutput):
    """Output of [`TCLModel`].

    Args:
        logits_per_image: cosine similarities divided by the temperature (B, N); with images and texts.
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

    The losses are scalars and None where the objective has weight 0 or no loss was asked for. `loss` is their
    sum, weighted by the config.

    Args:
        loss: the total.
        loss_cma, loss_imc, loss_lmi: mean of the two directions or modalities that follow.
        loss_itm, loss_mlm: matching and masked language modelling.
        loss_i2t, loss_t2i: CMA from image to text, and back.
        loss_i2i, loss_t2t: IMC of images, and of texts.
        loss_lmi_image, loss_lmi_text: LMI of images with their patches, and of texts with their tokens.
        logits_per_image: cosine similarities of images and texts divided by the temperature (B, N).
        logits_per_text: the same, transposed (N, B).
        itm_logits: matching logits (N, 2) of the pairs (text n, image n); index 1 is "matches". Inference only, and
            with as many images as texts; `match` takes any pairs.
        itm_accuracy, mlm_accuracy: shares of right matches and words, scalars. Training only.
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
class TCLMaskedLMOutput(ModelOutput):
    """Output of [`TCLForMaskedLM`].

    Args:
        loss: mean cross-entropy over the masked tokens, if labels were given.
        logits: scores over the vocabulary (N, L, V).
        hidden_states, attentions, cross_attentions: of every layer, if asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


def features_of(states: Tensor, projection: nn.Module) -> Tensor:
    """Project states (..., width) to L2-normalised float32 features (..., D)."""
    return F.normalize(projection(states).float(), dim=-1)


class StartsFromEncoders:
    """What makes a new TCL of encoders that were trained alone."""

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision_model: str | StartingPoint | None = None,
        text_model: str | StartingPoint | None = None,
        *,
        image_size: int | None = None,
        fusion_layer: int | None = None,
        num_fusion_layers: int = 6,
        vision_config: dict[str, Any] | None = None,
        text_config: dict[str, Any] | None = None,
        **fields,
    ) -> Any:
        """Make a new model whose encoders are those of transformers models, student and teacher alike.

        `TCLProcessor.from_vision_text_pretrained` makes the processor that goes with it.

        Args:
            vision_model: folder or Hub name of a ViT, DeiT, MAE, MSN or DINOv2; None starts it new.
            text_model: folder or Hub name of a BERT; None starts it new.
            image_size: pixels of a side of the images; the vision model's own if None.
            fusion_layer: how many of the BERT's layers encode the text; all if None.
            num_fusion_layers: layers that fuse, on top of these. They take what BERT layers are left; the others, and
                all cross-attention, start new.
            vision_config, text_config: further fields of the encoders, or all of one that starts new.
            fields: of [`TCLConfig`].

        Raises:
            ValueError: for an encoder whose states ours can not reproduce.
        """
        vision = read_vision_encoder(vision_model, image_size) if isinstance(vision_model, str) else vision_model
        text = text_model
        if isinstance(text_model, str):
            text = read_text_encoder(text_model, fusion_layer, num_fusion_layers)
        vision_fields = (vision.config if vision else {}) | (vision_config or {})
        if image_size is not None:
            vision_fields["image_size"] = image_size
        text_fields = (text.config if text else {}) | (text_config or {})
        model = cls(TCLConfig(vision_config=vision_fields, text_config=text_fields, **fields))  # type: ignore[call-arg]
        tcl = model.base_model  # type: ignore[attr-defined]
        for part, encoder in ((vision, tcl.vision_model), (text, tcl.text_model)):
            if part is not None:
                result = encoder.load_state_dict(part.state_dict, strict=False)
                if result.unexpected_keys:
                    raise ValueError(f"The model has no place for {', '.join(result.unexpected_keys[:5])}.")
        if text is not None and text.lm_head and hasattr(model, "lm_head"):
            model.lm_head.load_state_dict(text.lm_head)
        if getattr(model, "teacher", None) is not None:
            model.teacher.copy_from(model)  # type: ignore[attr-defined]
        return model


class TCLModel(StartsFromEncoders, TCLPreTrainedModel):
    """The two encoders of TCL, projected to one space: features of images and texts, and their fusion."""

    pipeline_tag = "zero-shot-image-classification"

    def __init__(self, config: TCLConfig):
        super().__init__(config)
        self.vision_model = TCLVisionModel._from_config(config.vision_config)
        self.text_model = TCLTextModel._from_config(config.text_config)
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim)
        self.temperature = nn.Parameter(torch.tensor(float(config.temperature_init_value)))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TCLModel) and module.temperature is not None:
            init.constant_(module.temperature, self.config.temperature_init_value)

    def get_input_embeddings(self) -> nn.Module:
        """The word embeddings."""
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embeddings."""
        self.text_model.set_input_embeddings(value)

    def encode_image(self, pixel_values: Tensor, **kwargs) -> Tensor:
        """States of the class token and the patches (B, 1 + P, width) of images (B, 3, height, width)."""
        return self.vision_model(pixel_values, **kwargs).last_hidden_state

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """States (N, L, width) of token ids (N, L), before any image."""
        return self.text_model.encode(input_ids, attention_mask).last_hidden_state

    def fuse(
        self,
        text_states: Tensor,
        attention_mask: Tensor | None,
        images: Tensor | list[KeyValue],
        image_index: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """Fuse states of texts (N, L, width) with images.

        Args:
            images: states (B, 1 + P, width), or what `text_model.project_images` made of them, which is cheaper
                where an image is used again.
            image_index: the image of each text (N,), or of the last R texts (R,). Without it, and for the texts before
                these, every image serves as many neighbouring texts as any other.
        """
        if isinstance(images, Tensor):
            images = self.text_model.project_images(images)
        return self.text_model.fuse(text_states, attention_mask, images, image_index, **kwargs)

    def image_features(self, states: Tensor) -> Tensor:
        """Project image states (..., width) to L2-normalised float32 features (..., D)."""
        return features_of(states, self.visual_projection)

    def text_features(self, states: Tensor) -> Tensor:
        """Project text states (..., width) to L2-normalised float32 features (..., D)."""
        return features_of(states, self.text_projection)

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """Encode images (B, 3, height, width); `pooler_output` holds their L2-normalised features (B, D)."""
        output = self.vision_model(pixel_values, **kwargs)
        output.pooler_output = self.image_features(output.pooler_output)
        return output

    @can_return_tuple
    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """Encode token ids (N, L); `pooler_output` holds their L2-normalised features (N, D)."""
        output = self.text_model(input_ids, attention_mask, **kwargs)
        output.pooler_output = self.text_features(output.pooler_output)
        return output

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> TCLOutput:
        """Encode images, texts, or both.

        Args:
            input_ids: token ids (N, L), starting with [CLS] and without [SEP], as [`TCLTokenizer`] makes them.
            pixel_values: images (B, 3, height, width).
            attention_mask: 1 for tokens, 0 for padding (N, L).
            interpolate_pos_encoding: resize the image positions to images of another size.
            output_attentions: return the attention weights of both encoders.
            output_hidden_states: return the states of every layer of both encoders.

        Raises:
            ValueError: if neither images nor texts are given.
        """
        if input_ids is None and pixel_values is None:
            raise ValueError("TCLModel got neither pixel_values nor input_ids: pass images, texts or both.")
        what = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        output = TCLOutput()
        if pixel_values is not None:
            vision = self.vision_model(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **what)
            # Features first: transformers' feature pipelines take the first field.
            output.image_embeds = self.image_features(vision.pooler_output)
            output.vision_model_output = vision
        if input_ids is not None:
            text = self.text_model(input_ids, attention_mask, **what)
            output.text_embeds = self.text_features(text.pooler_output)
            output.text_model_output = text
        if pixel_values is not None and input_ids is not None:
            output.logits_per_image = similarity(output.image_embeds, output.text_embeds, self.temperature)
            output.logits_per_text = output.logits_per_image.mT
        return output


@dataclass
class MaskedTokens:
    """A text with masked tokens: what the model reads, what it shall predict, and where.

    Args:
        input_ids: token ids with masks (N, L).
        labels: the masked tokens' own ids, -100 elsewhere (N, L).
        positions: positions of the masked tokens, padded with -1 (N, M); None to predict at every position.
    """

    input_ids: Tensor
    labels: Tensor
    positions: Tensor | None

    def tokens(self) -> Tensor | None:
        """Positions whose last states are needed (N, 1 + M): [CLS], then the masked ones; None if all are."""
        return None if self.positions is None else F.pad(self.positions.clamp(min=0), (1, 0))

    def select(self, states: Tensor) -> Tensor:
        """The states (N * M, width) at the masked positions, of those at `tokens` (N, 1 + M, width)."""
        length = self.labels.shape[1]  # states may be padded to the longest text of any process
        return (states[:, :length] if self.positions is None else states[:, 1:]).flatten(0, 1)

    def selected_labels(self) -> Tensor:
        """The labels (N * M,) at the masked positions, -100 for padding."""
        if self.positions is None:
            return self.labels.flatten()
        labels = self.labels.gather(1, self.positions.clamp(min=0))
        return labels.masked_fill(self.positions < 0, -100).flatten()


@dataclass
class _Pairs:
    """A batch to train on: image n belongs to text n."""

    pixel_values: Tensor  # (N, 3, height, width): view a, the student's
    pixel_values_augmented: Tensor  # view b, the teacher's
    input_ids: Tensor  # (N, L)
    attention_mask: Tensor  # (N, L)
    image_ids: Tensor | None  # (N,)
    masked: MaskedTokens | None
    interpolate_pos_encoding: bool


@dataclass
class _View:
    """One encoder's view of a batch; texts as they are and with masks are None where no objective needs them."""

    image_states: Tensor  # (N, 1 + P, width), P the patches that the encoder saw
    image: Tensor  # (N, D)
    text_states: Tensor = None  # (N, L, width)
    text: Tensor = None  # (N, D)
    masked_states: Tensor = None  # (N, L, width)


class TCLTaughtModel(StartsFromEncoders, TCLPreTrainedModel):
    """What all heads share: `self.tcl`, heads on it, and a momentum teacher that holds copies of them.

    The teacher's outputs soften the targets by `alpha`. It moves when `update_teacher` is called: once for each
    optimizer step, before its first forward. A subclass ends its own `__init__` with `post_init`.
    """

    accepts_loss_kwargs = False  # every loss is a mean over its own batch
    has_teacher = True  # where the config wants one
    contrasts = False  # whether its losses use the projections and the temperature

    def __init__(self, config: TCLConfig, **taught_heads: nn.Module):
        """Build the model; `taught_heads` are the heads that the teacher copies besides the encoders."""
        super().__init__(config)
        self.tcl = TCLModel(config)
        for name, head in taught_heads.items():
            self.add_module(name, head)
        self.teacher = None
        if config.use_momentum_teacher and self.has_teacher:
            self.teacher = MomentumTeacher(tcl=self.tcl, **taught_heads)
            self.teacher.tcl.temperature = None  # the student's serves both
            tied = self._tied_weights_keys or {}
            self._tied_weights_keys = tied | {f"teacher.{a}": f"teacher.{b}" for a, b in tied.items()}
        self.alpha = float(config.alpha)
        self._teacher_has_moved = False
        self._training_forwards = 0

    def post_init(self) -> None:
        """Draw the starting values; the teacher starts equal to its student."""
        super().post_init()
        if self.teacher is not None:
            self.teacher.copy_from(self)

    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True) -> None:
        """Tie the weights, keep still what no loss uses, and fill what a checkpoint lacks of the teacher."""
        super().tie_weights(missing_keys, recompute_mapping)
        for part in self.idle_parts():  # a parameter that never has a gradient would stop a distributed run
            part.requires_grad_(False)
        if self.teacher is None:
            return
        missing_from_teacher = sorted(key for key in missing_keys or () if key.startswith("teacher."))
        for key in missing_from_teacher:
            student = self.get_parameter(key.removeprefix("teacher."))
            self.get_parameter(key).data.copy_(student.data)
            missing_keys.discard(key)
        if missing_from_teacher:
            logger.info("What the checkpoint lacks of the teacher starts as a copy of the student.")
        self.teacher.requires_grad_(False)

    def idle_parts(self) -> list[nn.Module | nn.Parameter]:
        """What no loss uses; it stays, so that a fine-tuned checkpoint opens as a [`TCLModel`]."""
        tcl = self.tcl
        return [] if self.contrasts else [tcl.visual_projection, tcl.text_projection, tcl.temperature]

    @torch.no_grad()
    def update_teacher(self) -> None:
        """Move the teacher a step towards the student, in place, and keep the temperature in its range.

        Call it once for each optimizer step, before the step's first forward; `TCLMomentumCallback` does so in
        transformers' `Trainer`.
        """
        self.tcl.temperature.clamp_(MIN_TEMPERATURE, MAX_TEMPERATURE)
        if self.teacher is not None:
            self.teacher.update(self, self.config.momentum)
            if self.teacher.tcl.dtype != torch.float32:
                logger.warning_once(
                    f"The momentum teacher is {self.teacher.tcl.dtype}, too coarse for its small steps: it stands "
                    "still. Load the model in float32 and train under bf16 autocast."
                )
        self._teacher_has_moved = True

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """Resize the vocabulary, the teacher's too: it keeps its own words and takes new ones from the student."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        if self.teacher is not None:
            self.teacher.resize_to(self)
            self.tie_weights()
        return embeddings

    def soft_target_share(self, alpha: float | Tensor | None) -> float | Tensor:
        """The share of the teacher's targets in a loss: `alpha`, or else `self.alpha`; 0 without a teacher.

        Says once if the model trains and its teacher does not move.
        """
        if self.teacher is None:
            return 0.0
        # Not while compiling: a number that changes at each forward would compile it again.
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._training_forwards += 1
            if self._training_forwards == 2 and not self._teacher_has_moved:
                logger.warning(
                    "The momentum teacher stands still: call update_teacher() before each optimizer step, or give "
                    "the Trainer a TCLMomentumCallback."
                )
        return self.alpha if alpha is None else alpha


def has_no_share(alpha: float | Tensor) -> bool:
    """Whether the teacher's targets certainly do not count, so that it need not run; a tensor is not read."""
    return isinstance(alpha, int | float) and alpha == 0


class TCLForImageTextRetrieval(TCLTaughtModel):
    """TCL with a matching head: similarity finds candidates, matching ranks them.

    For training it holds queues of the momentum teacher's features.
    """

    task = "retrieval"
    pipeline_tag = "zero-shot-image-classification"
    contrasts = True
    drops_patches = False  # fine-tuning sees the images that it will be used on

    def __init__(self, config: TCLConfig, **taught_heads: nn.Module):
        """Build the model; `taught_heads` are heads of a subclass that the teacher copies besides the encoders."""
        text_config = config.text_config
        if (config.itm_weight or config.mlm_weight) and text_config.fusion_layer == text_config.num_hidden_layers:
            raise ValueError(
                f"text_config.fusion_layer={text_config.fusion_layer} leaves no fusion layer, which matching and "
                "masked language modelling need: choose a smaller one, or itm_weight=0 and mlm_weight=0."
            )
        super().__init__(config, **taught_heads)
        self.itm_head = nn.Linear(text_config.hidden_size, 2)
        self.queue = FeatureQueue(config.queue_size, config.projection_dim) if config.use_momentum_teacher else None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, FeatureQueue):
            module.reset()
        else:
            super()._init_weights(module)

    def idle_parts(self) -> list[nn.Module | nn.Parameter]:
        """What no objective of a weight above 0 uses."""
        config, tcl = self.config, self.tcl
        idle: list[nn.Module | nn.Parameter] = []
        if not (config.cma_weight or config.imc_weight or config.lmi_weight):
            idle += [tcl.visual_projection, tcl.text_projection, tcl.temperature]
        if not config.itm_weight:
            idle.append(self.itm_head)
            if not (config.mlm_weight and hasattr(self, "lm_head")):
                idle += tcl.text_model.fusion_layers
        return idle

    def match(
        self,
        text_states: Tensor,
        attention_mask: Tensor | None,
        images: Tensor | list[KeyValue],
        image_index: Tensor | None = None,
    ) -> Tensor:
        """Matching logits (N, 2) of encoded texts (N, L, width), each with one image; arguments as in `TCLModel.fuse`.

        Index 1 is "matches": its logit alone ranks candidates.
        """
        first = torch.zeros(text_states.shape[0], 1, dtype=torch.long, device=text_states.device)
        fused = self.tcl.fuse(text_states, attention_mask, images, image_index, positions=first)
        return self.itm_head(fused.pooler_output)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values_augmented: Tensor | None = None,
        image_ids: Tensor | None = None,
        alpha: float | Tensor | None = None,
        return_loss: bool = True,
        use_itm_head: bool = True,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> TCLLossOutput:
        """Compare images and texts; in training, compute the losses.

        Losses are computed in train mode, and in eval mode when `pixel_values_augmented` or `image_ids` are
        given; only train mode pushes features to the queues.

        Args:
            input_ids: token ids (N, L).
            pixel_values: images (B, 3, height, width); for the losses and for matching, image n belongs to text n.
            attention_mask: 1 for tokens, 0 for padding (N, L).
            pixel_values_augmented: another view of the images, for the teacher; the same view if None.
            image_ids: (N,) equal where two rows show the same image, which are then positives of each other.
            alpha: share of the teacher's targets; `self.alpha` if None, which starts as the config's.
            return_loss: `False` to compute no losses.
            use_itm_head: `False` to skip matching outside training.
            interpolate_pos_encoding: resize the image positions to images of another size.
            output_attentions: return the attention weights of both encoders and of the pairs, outside training.
            output_hidden_states: return the states of every layer of both encoders, outside training.

        Raises:
            ValueError: if a side is missing that is needed, or the two sides of a training batch differ in number.
        """
        given = pixel_values_augmented is not None or image_ids is not None
        if return_loss and (self.training or given):
            pairs = self._pairs(
                input_ids,
                pixel_values,
                attention_mask,
                pixel_values_augmented,
                image_ids,
                None,
                interpolate_pos_encoding,
            )
            return self._losses(pairs, self.soft_target_share(alpha))
        return self._compare(
            input_ids,
            pixel_values,
            attention_mask,
            use_itm_head,
            interpolate_pos_encoding,
            output_attentions,
            output_hidden_states,
        )

    def _compare(
        self,
        input_ids: Tensor | None,
        pixel_values: Tensor | None,
        attention_mask: Tensor | None,
        use_itm_head: bool,
        interpolate_pos_encoding: bool,
        output_attentions: bool | None,
        output_hidden_states: bool | None,
    ) -> TCLLossOutput:
        compared = self.tcl(
            input_ids,
            pixel_values,
            attention_mask,
            interpolate_pos_encoding=interpolate_pos_encoding,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        output = TCLLossOutput(**compared)
        logits = compared.logits_per_image
        if use_itm_head and logits is not None and logits.shape[0] == logits.shape[1]:
            fused = self.tcl.fuse(
                compared.text_model_output.last_hidden_state,
                attention_mask,
                compared.vision_model_output.last_hidden_state,
                output_attentions=bool(output_attentions),
            )
            output.itm_logits = self.itm_head(fused.pooler_output)
            output.cross_attentions = fused.cross_attentions
        return output

    def _pairs(
        self,
        input_ids: Tensor | None,
        pixel_values: Tensor | None,
        attention_mask: Tensor | None,
        pixel_values_augmented: Tensor | None,
        image_ids: Tensor | None,
        masked: MaskedTokens | None,
        interpolate_pos_encoding: bool,
    ) -> _Pairs:
        """Check what training needs, and fill in what may be left out."""
        if input_ids is None or pixel_values is None or len(input_ids) != len(pixel_values):
            texts = 0 if input_ids is None else len(input_ids)
            images = 0 if pixel_values is None else len(pixel_values)
            raise ValueError(
                f"The losses need pairs, but got {images} images and {texts} texts: pass as many pixel_values as "
                "input_ids, or return_loss=False."
            )
        if self.teacher is None:
            raise ValueError(
                "The losses need the momentum teacher, which use_momentum_teacher=False left out: load the model "
                "with use_momentum_teacher=True."
            )
        return _Pairs(
            pixel_values,
            pixel_values if pixel_values_augmented is None else pixel_values_augmented,
            input_ids,
            torch.ones_like(input_ids) if attention_mask is None else attention_mask,
            image_ids,
            masked,
            interpolate_pos_encoding,
        )

    def _losses(self, pairs: _Pairs, alpha: float | Tensor) -> TCLLossOutput:
        """One step's losses, in the paper's order: two views, contrast, queues, matching and masked words."""
        config, masked = self.config, pairs.masked
        compares = bool(config.cma_weight or config.imc_weight or config.lmi_weight or config.itm_weight)
        distils_words = masked is not None and not has_no_share(alpha)
        texts = pairs.input_ids if compares else None

        # The student's alone: LMI pools the teacher's patches on their grid.
        patch_dropout = config.patch_dropout if self.training and self.drops_patches else 0.0
        student = _view(self.tcl, pairs, pairs.pixel_values, texts, masked, patch_dropout)
        teacher = None
        if compares or distils_words:
            with torch.no_grad():
                teacher = _view(
                    self.teacher.tcl, pairs, pairs.pixel_values_augmented, texts, masked if distils_words else None
                )
        output = TCLLossOutput(image_embeds=student.image, text_embeds=student.text)
        if compares:
            output.logits_per_image = similarity(student.image, student.text, self.tcl.temperature).detach()
            output.logits_per_text = output.logits_per_image.mT
            self._contrast(output, pairs, student, teacher, alpha)
        self._match_and_predict(output, pairs, student, teacher, alpha, distils_words)

        for name in ("cma", "imc", "lmi", "itm", "mlm"):
            loss = getattr(output, f"loss_{name}")
            if loss is not None:
                weighted = getattr(config, f"{name}_weight") * loss
                output.loss = weighted if output.loss is None else output.loss + weighted
        return output

    def _contrast(
        self, output: TCLLossOutput, pairs: _Pairs, student: _View, teacher: _View | None, alpha: float | Tensor
    ) -> None:
        """Add the losses across modalities (CMA), within them (IMC), and of wholes with parts (LMI)."""
        config, temperature, mask = self.config, self.tcl.temperature, pairs.attention_mask
        if config.cma_weight or config.imc_weight:
            # Of all processes, the own batch first: so each loss is its share of that of the whole batch.
            # Copied, as the backward pass reads them after the queue has gone on.
            image_keys = torch.cat([gather_own_first(teacher.image), self.queue.image])  # (K, D)
            text_keys = torch.cat([gather_own_first(teacher.text), self.queue.text])  # (K, D)
            ids = pairs.image_ids
            if ids is None:
                ids = torch.full(mask.shape[:1], NO_IMAGE_ID, device=mask.device)
            targets = positive_targets(ids, torch.cat([gather_own_first(ids), self.queue.ids]))  # (N, K)
            if config.cma_weight:
                output.loss_i2t, output.loss_t2i = cma_loss(
                    student.image,
                    student.text,
                    teacher.image,
                    teacher.text,
                    image_keys,
                    text_keys,
                    targets,
                    temperature,
                    alpha,
                )
                output.loss_cma = (output.loss_i2t + output.loss_t2i) / 2
            if config.imc_weight:
                output.loss_i2i, output.loss_t2t = imc_loss(
                    student.image, student.text, image_keys, text_keys, targets, temperature
                )
                output.loss_imc = (output.loss_i2i + output.loss_t2t) / 2
            if self.training:
                self.queue.push(teacher.image, teacher.text, pairs.image_ids)
        if config.lmi_weight:
            with torch.no_grad():
                patch = config.vision_config.patch_size
                height, width = pairs.pixel_values_augmented.shape[-2:]
                patches = self.teacher.tcl.image_features(teacher.image_states[:, 1:])  # (N, P, D)
                regions = pool_locals(patches, (height // patch, width // patch), config.local_grid)
                tokens = self.teacher.tcl.text_features(teacher.text_states[:, 1:])  # (N, L - 1, D)
                token_mask = mask[:, 1:]
                if config.gather_negatives:
                    regions, tokens = gather_own_first(regions), gather_padded(tokens)
                    token_mask = gather_padded(token_mask)
            output.loss_lmi_image = lmi_loss(student.image, regions, temperature)
            output.loss_lmi_text = lmi_loss(student.text, tokens, temperature, token_mask)
            output.loss_lmi = (output.loss_lmi_image + output.loss_lmi_text) / 2

    def _match_and_predict(
        self,
        output: TCLLossOutput,
        pairs: _Pairs,
        student: _View,
        teacher: _View | None,
        alpha: float | Tensor,
        distils_words: bool,
    ) -> None:
        """Add the losses of the fusion encoder, matching (ITM) and masked words (MLM), from one pass of all pairs."""
        masked = pairs.masked
        num_pairs, length = pairs.attention_mask.shape
        # What negatives are drawn from, the own batch first.
        text_states, mask, image_states = student.text_states, pairs.attention_mask, student.image_states
        gathers = bool(self.config.itm_weight) and self.config.gather_negatives and is_distributed()
        if gathers:
            text_states, image_states = (gather_padded(x, with_gradient=True) for x in (text_states, image_states))
            mask = gather_padded(mask)
        padding = (0, 0, 0, mask.shape[1] - length)  # to the longest text of any process

        # The texts that an image is fused with are neighbours, which share its keys and values: the true one, a
        # negative one, the masked one. After all these come the true ones once more, each with a negative image.
        texts, masks, tokens, hard_image = [], [], [], None
        wanted = mask.new_zeros(num_pairs, 1, dtype=torch.long)  # (N, 1 + M); None for all tokens
        wanted = wanted if masked is None else masked.tokens()
        first = None if wanted is None else torch.zeros_like(wanted)  # [CLS], as many times
        if self.config.itm_weight:
            hard_image, has_image, hard_text, has_text = self._hard_negatives(pairs, student, teacher)
            texts += [text_states[:num_pairs], text_states[hard_text]]
            masks += [mask[:num_pairs], mask[hard_text]]
            tokens += [first, first]
        if masked is not None:
            texts.append(F.pad(student.masked_states, padding))
            masks.append(F.pad(pairs.attention_mask, padding[2:]))
            tokens.append(wanted)
        if not texts:
            return

        def in_rows(parts: list[Tensor]) -> Tensor:
            rows = torch.stack(parts, dim=1).flatten(0, 1)
            return rows if hard_image is None else torch.cat([rows, parts[0]])

        image_index = hard_image
        if gathers:  # the images are those of all processes, and neighbours are not told apart by their number
            own = torch.arange(num_pairs, device=mask.device).repeat_interleave(len(texts))
            image_index = torch.cat([own, hard_image])
        positions = None if wanted is None else in_rows(tokens)
        fused = self.tcl.fuse(in_rows(texts), in_rows(masks), image_states, image_index, positions=positions)
        by_image, with_hard_image = fused.last_hidden_state.tensor_split([num_pairs * len(texts)])
        by_image = by_image.unflatten(0, (num_pairs, -1))  # (N, texts, 1 + M, width)

        if self.config.itm_weight:
            firsts = torch.cat([by_image[:, 0, 0], with_hard_image[:, 0], by_image[:, 1, 0]])  # (3 N, width)
            matches = self.itm_head(firsts)  # (3 N, 2)
            labels = torch.zeros(3 * num_pairs, dtype=torch.long, device=mask.device)
            labels[:num_pairs] = MATCHES
            exists = torch.cat([torch.ones_like(has_image), has_image, has_text])
            output.loss_itm = itm_loss(matches, labels, exists)
            output.itm_accuracy = accuracy(matches, labels.masked_fill(~exists, -100))
        if masked is not None:
            teacher_logits = None
            if distils_words:
                with torch.no_grad():
                    taught = self.teacher.tcl.fuse(
                        teacher.masked_states, pairs.attention_mask, teacher.image_states, positions=wanted
                    )
                    teacher_logits = self.teacher.lm_head(masked.select(taught.last_hidden_state))
            logits = self.lm_head(masked.select(by_image[:, -1]))  # (N * M, V)
            words = masked.selected_labels()
            output.loss_mlm = mlm_loss(logits, words, teacher_logits, alpha)
            output.mlm_accuracy = accuracy(logits, words)

    @torch.no_grad()
    def _hard_negatives(
        self, pairs: _Pairs, student: _View, teacher: _View | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For each text an image and for each image a text that do not belong to it, and whether there is one."""
        ids, image_keys, text_keys = pairs.image_ids, teacher.image, teacher.text
        if self.config.gather_negatives:
            image_keys, text_keys = gather_own_first(image_keys), gather_own_first(text_keys)
        excluded = torch.eye(len(student.text), len(text_keys), dtype=torch.bool, device=student.text.device)
        if ids is not None:
            all_ids = gather_own_first(ids) if self.config.gather_negatives else ids
            excluded = excluded | (ids[:, None] == all_ids) & (all_ids != NO_IMAGE_ID)
        temperature = self.tcl.temperature
        image, has_image = sample_hard_negatives(similarity(student.text, image_keys, temperature), excluded)
        text, has_text = sample_hard_negatives(similarity(student.image, text_keys, temperature), excluded)
        return image, has_image, text, has_text


def _view(
    tcl: TCLModel,
    pairs: _Pairs,
    pixel_values: Tensor,
    input_ids: Tensor | None,
    masked: MaskedTokens | None,
    patch_dropout: float = 0.0,
) -> _View:
    """Encode a batch by one model; texts and masked texts, where given, run as one."""
    image_states = tcl.encode_image(
        pixel_values, interpolate_pos_encoding=pairs.interpolate_pos_encoding, patch_dropout=patch_dropout
    )
    view = _View(image_states, tcl.image_features(image_states[:, 0]))
    texts = [] if input_ids is None else [input_ids]
    if masked is not None:
        texts.append(masked.input_ids)
    if texts:
        states = tcl.encode_text(torch.cat(texts), pairs.attention_mask.repeat(len(texts), 1)).chunk(len(texts))
        if input_ids is not None:
            view.text_states, view.text = states[0], tcl.text_features(states[0][:, 0])
        if masked is not None:
            view.masked_states = states[-1]
    return view


class TCLForPreTraining(TCLForImageTextRetrieval):
    """TCL as it is pre-trained: retrieval plus masked language modelling."""

    task = "pretraining"
    drops_patches = True  # a share of `config.patch_dropout`, in train mode
    _tied_weights_keys = {"lm_head.decoder.weight": "tcl.text_model.embeddings.word_embeddings.weight"}

    def __init__(self, config: TCLConfig):
        super().__init__(config, lm_head=TCLLMHead(config.text_config))  # type: ignore[arg-type]

    def idle_parts(self) -> list[nn.Module | nn.Parameter]:
        """What no objective of a weight above 0 uses. The head's words are the input's, and never idle."""
        head = self.lm_head
        idle = [] if self.config.mlm_weight else [head.dense, head.layer_norm, head.decoder.bias]
        return super().idle_parts() + idle

    def get_output_embeddings(self) -> nn.Module:
        """The layer from states to words, whose weights are the word embeddings."""
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the layer from states to words."""
        self.lm_head.decoder = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values_augmented: Tensor | None = None,
        mlm_input_ids: Tensor | None = None,
        mlm_labels: Tensor | None = None,
        mlm_positions: Tensor | None = None,
        image_ids: Tensor | None = None,
        alpha: float | Tensor | None = None,
        return_loss: bool = True,
        use_itm_head: bool = True,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> TCLLossOutput:
        """Compute the losses of a batch of pairs; without training inputs, compare images and texts.

        Losses are computed in train mode, and in eval mode when any of `pixel_values_augmented`, `mlm_labels` or
        `image_ids` is given. [`TCLPreTrainingCollator`] makes all inputs.

        Args:
            mlm_input_ids: the texts with masked tokens (N, L).
            mlm_labels: the masked tokens' own ids, -100 elsewhere (N, L).
            mlm_positions: positions of the masked tokens, padded with -1 (N, M): only these are predicted. None
                predicts every position, for the same loss.

        The other arguments are those of [`TCLForImageTextRetrieval`].

        Raises:
            ValueError: as there, and if masked texts are missing while `mlm_weight` is above 0.
        """
        given = any(x is not None for x in (pixel_values_augmented, mlm_labels, image_ids))
        if not (return_loss and (self.training or given)):
            return self._compare(
                input_ids,
                pixel_values,
                attention_mask,
                use_itm_head,
                interpolate_pos_encoding,
                output_attentions,
                output_hidden_states,
            )
        masked = None
        if self.config.mlm_weight:
            if mlm_input_ids is None or mlm_labels is None:
                raise ValueError(
                    "Masked language modelling needs mlm_input_ids and mlm_labels: use the TCLPreTrainingCollator, "
                    "or a config with mlm_weight=0."
                )
            masked = MaskedTokens(mlm_input_ids, mlm_labels, mlm_positions)
        pairs = self._pairs(
            input_ids,
            pixel_values,
            attention_mask,
            pixel_values_augmented,
            image_ids,
            masked,
            interpolate_pos_encoding,
        )
        return self._losses(pairs, self.soft_target_share(alpha))


class TCLForMaskedLM(TCLPreTrainedModel):
    """TCL with its language-model head: fill in the masked words of a text about an image."""

    pipeline_tag = "zero-shot-image-classification"  # its encoders open as TCLModel
    _tied_weights_keys = {"lm_head.decoder.weight": "tcl.text_model.embeddings.word_embeddings.weight"}
    accepts_loss_kwargs = False

    def __init__(self, config: TCLConfig):
        super().__init__(config)
        self.tcl = TCLModel(config)
        self.lm_head = TCLLMHead(config.text_config)  # type: ignore[arg-type]
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The layer from states to words, whose weights are the word embeddings."""
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the layer from states to words."""
        self.lm_head.decoder = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> TCLMaskedLMOutput:
        """Predict the words of texts about images.

        Args:
            input_ids: token ids with masks (N, L).
            pixel_values: images (B, 3, height, width); each serves N / B neighbouring texts.
            attention_mask: 1 for tokens, 0 for padding (N, L).
            labels: ids to predict, -100 where nothing is to be predicted (N, L).
            interpolate_pos_encoding: resize the image positions to images of another size.
            output_attentions, output_hidden_states: return those of the text and fusion layers.

        Raises:
            ValueError: if texts or images are missing.
        """
        if input_ids is None or pixel_values is None:
            raise ValueError("TCLForMaskedLM reads texts about images: pass both input_ids and pixel_values.")
        image_states = self.tcl.encode_image(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        output = self.tcl.text_model(
            input_ids,
            attention_mask,
            encoder_hidden_states=image_states,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        logits = self.lm_head(output.last_hidden_state)
        loss = None if labels is None else mlm_loss(logits.flatten(0, 1), labels.flatten())
        return TCLMaskedLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            cross_attentions=output.cross_attentions,
        )


__all__ = [
    "TCLForImageTextRetrieval",
    "TCLForMaskedLM",
    "TCLForPreTraining",
    "TCLLossOutput",
    "TCLMaskedLMOutput",
    "TCLModel",
    "TCLOutput",
    "TCLTaughtModel",
]
