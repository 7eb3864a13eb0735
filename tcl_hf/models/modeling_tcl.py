"""TCL and its heads for pre-training, retrieval and masked language modelling.

Reading order: `TCLModel` has the two encoders and five methods (encode image, encode text, fuse, image features, text
features). A head has `self.tcl` and a layer or two; `TCLTaughtModel` is the base class of heads with a momentum
teacher. Retrieval adds matching and the queues; pre-training is retrieval plus masked language modelling. The heads of
the other tasks are in `modeling_tcl_tasks`, the outputs in `outputs`, and the tensors of a training step in
`training_batch`.

Shapes: B images, N texts, P patches, L tokens, T selected tokens, M masked tokens, D feature dimensions, V words.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, BaseModelOutputWithPoolingAndCrossAttentions
from transformers.utils import can_return_tuple, logging

from .attention import KeyValue
from .configuration_tcl import MAX_TEMPERATURE, MIN_TEMPERATURE, TCLConfig
from .distributed import gather_own_first, gather_padded, is_distributed, whole
from .encoders import PredictsWords, TCLLMHead, TCLPreTrainedModel, TCLTextModel, TCLVisionModel
from .losses import (
    NO_IMAGE_ID,
    accuracy,
    cma_loss,
    imc_loss,
    itm_contrast_loss,
    itm_loss,
    lmi_loss,
    mlm_loss,
    pool_locals,
    positive_targets,
    sample_hard_negatives,
    similarity,
)
from .momentum import FeatureQueue, MomentumTeacher
from .outputs import TCLLossOutput, TCLMaskedLMOutput, TCLOutput
from .starting_points import StartsFromEncoders
from .training_batch import (
    HardNegatives,
    MaskedTokens,
    TrainingBatch,
    View,
    encode_view,
    fusion_rows,
)

logger = logging.get_logger(__name__)

MATCHES = 1  # index of "matches" among the two matching logits


def features_of(states: Tensor, projection: nn.Module) -> Tensor:
    """Project pooled states (..., width) to L2-normalised float32 features (..., D)."""
    return F.normalize(projection(states).float(), dim=-1)


def log_odds_of(logits: Tensor) -> Tensor:
    """The logarithm of the odds that a pair matches (...), of its two matching logits (..., 2)."""
    return logits[..., MATCHES] - logits[..., 1 - MATCHES]


def pooled(states: Tensor, mean: Callable[[], Tensor], pooling: str) -> Tensor:
    """Pool states (N, 1 + L, width), the first of which stands for the whole sample.

    Args:
        mean: computes the mean of the states of the sample's parts (N, width).
        pooling: "cls" for the first state, "mean" for the mean, "cls_mean" for both (N, 2 * width).
    """
    if pooling == "cls":
        return states[:, 0]
    return mean() if pooling == "mean" else torch.cat([states[:, 0], mean()], dim=-1)


def local_features_of(states: Tensor, projection: nn.Linear, pooling: str) -> Tensor:
    """Project the states of parts (N, L, width) to L2-normalised float32 features (N, L, D).

    Where a sample's features are made of two pooled states, a part takes the place of the mean, and nothing that of the
    class token, which is the same for all parts.
    """
    if pooling == "cls_mean":
        weight = projection.weight[:, states.shape[-1] :]
        return F.normalize(F.linear(states, weight, projection.bias).float(), dim=-1)
    return features_of(states, projection)


def _projection(width: int, pooling: str, projection_dim: int) -> nn.Linear:
    """The layer from pooled states to features."""
    return nn.Linear(width * (2 if pooling == "cls_mean" else 1), projection_dim)


class TCLModel(StartsFromEncoders, TCLPreTrainedModel):
    """The two encoders of TCL, projected to one space: features of images and texts, and their fusion."""

    pipeline_tag = "zero-shot-image-classification"

    def __init__(self, config: TCLConfig):
        super().__init__(config)
        self.vision_model = TCLVisionModel._from_config(config.vision_config)
        self.text_model = TCLTextModel._from_config(config.text_config)
        vision_width, text_width = config.vision_config.hidden_size, config.text_config.hidden_size
        self.visual_projection = _projection(vision_width, config.image_pooling, config.projection_dim)
        self.text_projection = _projection(text_width, config.text_pooling, config.projection_dim)
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

    def locked_parts(self, prefix: str = "") -> list[str]:
        """The names of the modules that are locked, behind a prefix."""
        towers = {"vision_model": self.vision_model, "text_model": self.text_model}
        return [f"{prefix}{tower}.{part}" for tower, model in towers.items() for part in model.locked_parts()]

    def train(self, mode: bool = True):
        """Set the mode as PyTorch does; locked parts stay in evaluation mode, so that their dropout changes no state.

        A locked part with adapters that are trained has the mode of the rest, because they have dropout of their own.
        """
        super().train(mode)
        for part in map(self.get_submodule, self.locked_parts()):
            if not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()
        return self

    def encode_image(self, pixel_values: Tensor, **kwargs) -> Tensor:
        """States of the class token and the patches (B, 1 + P, width) of images (B, 3, height, width).

        In place of images, `pixel_values` may be the states of the locked part of the encoder (B, 1 + P, width).
        """
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
            images: states (B, 1 + P, width), or the keys and values that `text_model.project_images` makes of them,
                which saves time where images are used more than once.
            image_index: the image of each text (N,). Without it every image serves N / B consecutive texts.
            kwargs: further arguments of [`TCLTextModel.fuse`].
        """
        if isinstance(images, Tensor):
            images = self.text_model.project_images(images)
        return self.text_model.fuse(text_states, attention_mask, images, image_index, **kwargs)

    def pool_image(self, states: Tensor) -> Tensor:
        """The states that the projection of images reads (B, width or 2 * width), of image states (B, 1 + P, width)."""
        return pooled(states, lambda: states[:, 1:].mean(1), self.config.image_pooling)

    def pool_text(self, states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The states that the projection of texts reads (N, width, or 2 * width), of text states (N, L, width)."""

        def mean() -> Tensor:
            if attention_mask is None:
                return states.mean(1)
            weights = attention_mask[..., None].to(states.dtype)
            return (states * weights).sum(1) / weights.sum(1).clamp(min=1)

        return pooled(states, mean, self.config.text_pooling)

    def image_features(self, states: Tensor) -> Tensor:
        """L2-normalised float32 features (B, D) of image states (B, 1 + P, width)."""
        return features_of(self.pool_image(states), self.visual_projection)

    def text_features(self, states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """L2-normalised float32 features (N, D) of text states (N, L, width) with their mask (N, L)."""
        return features_of(self.pool_text(states, attention_mask), self.text_projection)

    def patch_features(self, states: Tensor) -> Tensor:
        """L2-normalised float32 features (B, P, D) of the patches of image states (B, 1 + P, width)."""
        return local_features_of(states[:, 1:], self.visual_projection, self.config.image_pooling)

    def token_features(self, states: Tensor) -> Tensor:
        """L2-normalised float32 features (N, L - 1, D) of the tokens after [CLS] of text states (N, L, width)."""
        return local_features_of(states[:, 1:], self.text_projection, self.config.text_pooling)

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """Encode images (B, 3, height, width); `pooler_output` holds their L2-normalised features (B, D)."""
        output = self.vision_model(pixel_values, **kwargs)
        output.pooler_output = self.image_features(output.last_hidden_state)
        return output

    @can_return_tuple
    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """Encode token ids (N, L); `pooler_output` holds their L2-normalised features (N, D)."""
        output = self.text_model(input_ids, attention_mask, **kwargs)
        output.pooler_output = self.text_features(output.last_hidden_state, attention_mask)
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
        output_options = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        output: Any = TCLOutput()
        if pixel_values is not None:
            vision = self.vision_model(
                pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **output_options
            )
            # Features are set first, because transformers' feature pipelines take the first field.
            output.image_embeds = self.image_features(vision.last_hidden_state)
            output.vision_model_output = vision
        if input_ids is not None:
            text = self.text_model(input_ids, attention_mask, **output_options)
            output.text_embeds = self.text_features(text.last_hidden_state, attention_mask)
            output.text_model_output = text
        if pixel_values is not None and input_ids is not None:
            output.logits_per_image = similarity(output.image_embeds, output.text_embeds, self.temperature)
            output.logits_per_text = output.logits_per_image.mT
        return output


class TCLTaughtModel(StartsFromEncoders, TCLPreTrainedModel):
    """Base class of heads: `self.tcl`, heads on it, and a momentum teacher that holds copies of both.

    The teacher's outputs soften the targets by `alpha`. It moves when `update_teacher` is called: once for each
    optimizer step, before its first forward. A subclass ends its own `__init__` with `post_init`.
    """

    _tied_weights_keys: Any
    has_teacher = True  # unless the config leaves it out
    contrasts = False  # whether its losses use the projections and the temperature

    def __init__(self, config: TCLConfig, **taught_heads: nn.Module):
        """Build the model; `taught_heads` are heads that the teacher copies, as it does the encoders."""
        super().__init__(config)
        self.tcl = TCLModel(config)
        for name, head in taught_heads.items():
            self.add_module(name, head)
        self.teacher = None
        if config.use_momentum_teacher and self.has_teacher:
            self.teacher = MomentumTeacher(self.tcl.locked_parts("tcl."), tcl=self.tcl, **taught_heads)
            self.teacher.tcl.temperature = None  # the teacher's similarities are divided by the student's
            tied = self._tied_weights_keys or {}
            # Locked word embeddings belong to the student alone.
            owner = "" if config.lock_text is not False else "teacher."
            self._tied_weights_keys = tied | {f"teacher.{a}": f"{owner}{b}" for a, b in tied.items()}
        self.alpha = float(config.alpha)
        self._teacher_has_moved = False
        self._training_forwards = 0

    def post_init(self) -> None:
        """Draw the starting values; the teacher starts equal to its student."""
        super().post_init()
        if self.teacher is not None:
            self.teacher.copy_from(self)

    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True) -> None:
        """Tie the weights, freeze the parts that no loss uses, and copy from the student what a checkpoint lacks of the
        teacher."""
        # First the teacher's words, which are tied to its head: transformers warns of a checkpoint that lacks both.
        tied = (self._tied_weights_keys or {}).values()
        for key in sorted(key for key in missing_keys or () if key in tied and key.startswith("teacher.")):
            student = key.removeprefix("teacher.")
            if missing_keys and student not in missing_keys:
                self.get_parameter(key).data.copy_(self.get_parameter(student).data)
                missing_keys.discard(key)
        super().tie_weights(missing_keys, recompute_mapping)
        for part in [*self.idle_parts(), *map(self.get_submodule, self.tcl.locked_parts("tcl."))]:
            part.requires_grad_(False)  # A trained parameter that never gets a gradient would stop a distributed run.
        if missing_keys is not None:
            self.new_weights = frozenset(key for key in missing_keys if not key.startswith(("teacher.", "queue.")))
        if self.teacher is None:
            return
        missing_from_teacher = sorted(key for key in missing_keys or () if key.startswith("teacher."))
        for key in missing_from_teacher:
            student = self.get_parameter(key.removeprefix("teacher."))
            self.get_parameter(key).data.copy_(student.data)
            missing_keys.discard(key)
        if missing_from_teacher:
            logger.info("The parts of the teacher that the checkpoint lacks start as copies of the student.")
        self.teacher.requires_grad_(False)

    def idle_parts(self) -> list[nn.Module | nn.Parameter]:
        """The parts that no loss uses. They are kept, so that a fine-tuned checkpoint opens as a [`TCLModel`]."""
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
        self._teacher_has_moved = True

    def training_statistics(self) -> dict[str, Tensor]:
        """Numbers for the log of a training run, as scalars on the device.

        Under FSDP2 every process has to call it, because the sharded weights are gathered.

        Returns:
            `temperature`; with a teacher, `teacher_distance`, see `MomentumTeacher.distance_to`; with a queue that is
            not empty, `queue_spread`, see `FeatureQueue.spread`.
        """
        found = {"temperature": whole(self.tcl.temperature.detach()).squeeze()}
        if self.teacher is not None:
            found["teacher_distance"] = self.teacher.distance_to(self)
        queue = getattr(self, "queue", None)
        if queue is not None and len(queue.image):
            found["queue_spread"] = queue.spread()
        return found

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """Resize the vocabularies of student and teacher. The teacher keeps its words and takes new ones from the
        student."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        if self.teacher is not None:
            self.teacher.resize_to(self)
            self.tie_weights()
        return embeddings

    def soft_target_share(self, alpha: float | Tensor | None) -> float | Tensor:
        """The share of the teacher's targets in a loss: `alpha`, or else `self.alpha`; 0 without a teacher.

        A warning is logged once if the model trains and its teacher does not move.
        """
        if self.teacher is None:
            return 0.0
        # Not while compiling, because a number that changes at each forward would cause another compilation.
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._training_forwards += 1
            if self._training_forwards == 2 and not self._teacher_has_moved:
                logger.warning(
                    "The momentum teacher stands still: call update_teacher() before each optimizer step, or pass a "
                    "TCLMomentumCallback to the Trainer."
                )
        return self.alpha if alpha is None else alpha


def has_no_share(alpha: float | Tensor) -> bool:
    """Whether the teacher need not run because its targets have no share.

    A tensor is not read back from the device, and always counts as a share.
    """
    return isinstance(alpha, int | float) and alpha == 0


class TCLForImageTextRetrieval(TCLTaughtModel):
    """TCL with a matching head: similarity finds candidates, matching ranks them.

    For training it holds queues of the momentum teacher's features.
    """

    task = "retrieval"
    pipeline_tag = "zero-shot-image-classification"
    loss_names: tuple[str, ...] = ("loss", "loss_cma", "loss_imc", "loss_lmi", "loss_itm")
    contrasts = True
    drops_patches = False  # fine-tuning reads all patches, as inference does

    def __init__(self, config: TCLConfig, **taught_heads: nn.Module):
        """Build the model; `taught_heads` are heads of a subclass, which the teacher copies as it does the encoders."""
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

    @property
    def draws_negatives(self) -> bool:
        """Whether matching learns from drawn pairs, and not from all pairs of the batch."""
        return bool(self.config.itm_weight) and not self.config.itm_contrast

    def idle_parts(self) -> list[nn.Module | nn.Parameter]:
        """The parts that no objective with a weight above 0 uses."""
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
        text_index: Tensor | None = None,
    ) -> Tensor:
        """Matching logits (N, 2) of encoded texts (N, L, width), each with one image.

        Index 1 is "matches": its logit alone ranks candidates. The arguments are those of `TCLModel.fuse`.
        """
        cls_index = torch.zeros(text_states.shape[0], 1, dtype=torch.long, device=text_states.device)
        fused = self.tcl.fuse(
            text_states, attention_mask, images, image_index, token_index=cls_index, text_index=text_index
        )
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
            image_ids: ids of the images (N,). Rows with equal ids show the same image and are positives of each other.
            alpha: share of the teacher's targets; `self.alpha` if None, which starts as the config's.
            return_loss: `False` to compute no losses.
            use_itm_head: `False` to skip matching outside training.
            interpolate_pos_encoding: resize the image positions to images of another size.
            output_attentions: return the attention weights of both encoders and of the pairs, outside training.
            output_hidden_states: return the states of every layer of both encoders, outside training.

        Raises:
            ValueError: if a side is missing that is needed, or a training batch has more of one side than of the other.
        """
        inputs: tuple[Any, Any, Any] = (input_ids, pixel_values, attention_mask)
        given = pixel_values_augmented is not None or image_ids is not None
        if return_loss and (self.training or given):
            batch = TrainingBatch(*inputs, pixel_values_augmented, image_ids, None, interpolate_pos_encoding)
            return self._losses(batch, alpha)
        compared = self.tcl(*inputs, interpolate_pos_encoding, output_attentions, output_hidden_states)
        return self._with_matching(compared, attention_mask, use_itm_head, output_attentions)

    def _with_matching(
        self, compared: TCLOutput, attention_mask: Tensor | None, use_itm_head: bool, output_attentions: bool | None
    ) -> TCLLossOutput:
        """Similarities of images and texts, and matching logits where there are as many images as texts."""
        output = TCLLossOutput(**compared)
        logits = compared.logits_per_image
        if use_itm_head and logits is not None and logits.shape[0] == logits.shape[1]:
            text_states = compared.text_model_output.last_hidden_state
            image_states = compared.vision_model_output.last_hidden_state
            fused = self.tcl.fuse(text_states, attention_mask, image_states, output_attentions=bool(output_attentions))
            output.itm_logits = self.itm_head(fused.pooler_output)
            output.cross_attentions = fused.cross_attentions
        return output

    def _losses(self, batch: TrainingBatch, alpha: float | Tensor | None) -> TCLLossOutput:
        """The losses of one step, in the paper's order: two views, contrast, queues, matching and masked words."""
        if self.teacher is None:
            raise ValueError(
                "The losses need the momentum teacher, which use_momentum_teacher=False left out: load the model "
                "with use_momentum_teacher=True."
            )
        config, alpha = self.config, self.soft_target_share(alpha)
        contrasts = bool(config.cma_weight or config.imc_weight or config.lmi_weight)
        compares = contrasts or bool(config.itm_weight)
        predicts_words = batch.masked is not None
        distils_words = predicts_words and not has_no_share(alpha)

        # Only the student drops patches, because LMI pools the teacher's patches on their grid.
        patch_dropout = config.patch_dropout if self.training and self.drops_patches else 0.0
        student = encode_view(self.tcl, batch, batch.pixel_values, compares, predicts_words, patch_dropout)
        teacher: Any = None
        teacher_compares = contrasts or self.draws_negatives
        if teacher_compares or distils_words:
            with torch.no_grad():
                views = batch.pixel_values_augmented
                teacher = encode_view(self.teacher.tcl, batch, views, teacher_compares, distils_words)
        output = TCLLossOutput(image_embeds=student.image, text_embeds=student.text)
        if compares:
            output.logits_per_image = similarity(student.image, student.text, self.tcl.temperature).detach()
            output.logits_per_text = output.logits_per_image.mT
        if config.cma_weight or config.imc_weight:
            self._contrast(output, batch, student, teacher, alpha)
        if config.lmi_weight:
            self._compare_with_parts(output, batch, student, teacher)
        if config.itm_weight and config.itm_contrast:
            self._match_all(output, batch, student)
        if self.draws_negatives or predicts_words:
            self._match_and_predict(output, batch, student, teacher, alpha)

        for name in self.loss_names[1:]:
            loss = getattr(output, name)
            if loss is not None:
                weighted = getattr(config, f"{name.removeprefix('loss_')}_weight") * loss
                output.loss = weighted if output.loss is None else output.loss + weighted
        return output

    def _contrast(
        self, output: TCLLossOutput, batch: TrainingBatch, student: View, teacher: View | None, alpha: float | Tensor
    ) -> None:
        """Add the losses across modalities (CMA) and within them (IMC), and push the features to the queue."""
        config, temperature = self.config, self.tcl.temperature
        # The keys are those of all processes, the own batch first, so that the mean of all processes' losses is the
        # loss of the whole batch. Copied, as the backward pass reads them after the queue has gone on.
        image_keys = torch.cat([gather_own_first(teacher.image), self.queue.image])  # (K, D)
        text_keys = torch.cat([gather_own_first(teacher.text), self.queue.text])  # (K, D)
        ids = batch.image_ids
        targets = positive_targets(ids, torch.cat([gather_own_first(ids), self.queue.ids]))  # (N, K)
        if config.cma_weight:
            output.loss_i2t = cma_loss(student.image, teacher.image, text_keys, targets, temperature, alpha)
            output.loss_t2i = cma_loss(student.text, teacher.text, image_keys, targets, temperature, alpha)
            output.loss_cma = (output.loss_i2t + output.loss_t2i) / 2
        if config.imc_weight:
            output.loss_i2i = imc_loss(student.image, image_keys, targets, temperature)
            output.loss_t2t = imc_loss(student.text, text_keys, targets, temperature)
            output.loss_imc = (output.loss_i2i + output.loss_t2t) / 2
        if self.training:
            self.queue.push(teacher.image, teacher.text, ids)

    def _compare_with_parts(
        self, output: TCLLossOutput, batch: TrainingBatch, student: View, teacher: View | None
    ) -> None:
        """Add the losses of whole samples with their parts (LMI)."""
        config, temperature = self.config, self.tcl.temperature
        with torch.no_grad():
            grid = batch.patch_grid(config.vision_config)
            patches = self.teacher.tcl.patch_features(teacher.image_states)  # (N, P, D)
            regions = pool_locals(patches, grid, config.local_grid)
            tokens = self.teacher.tcl.token_features(teacher.text_states)  # (N, L - 1, D)
            token_mask = batch.attention_mask[:, 1:]
            if config.gather_negatives:
                regions, tokens = gather_own_first(regions), gather_padded(tokens)
                token_mask = gather_padded(token_mask)
        output.loss_lmi_image = lmi_loss(student.image, regions, temperature)
        output.loss_lmi_text = lmi_loss(student.text, tokens, temperature, token_mask)
        output.loss_lmi = (output.loss_lmi_image + output.loss_lmi_text) / 2

    def _match_all(self, output: TCLLossOutput, batch: TrainingBatch, student: View) -> None:
        """Add the loss of matching by contrast, over all pairs of an image and a text of the batch."""
        num_pairs = len(batch.input_ids)
        texts = torch.arange(num_pairs, device=batch.input_ids.device).repeat(num_pairs)  # for one image after another
        logits = self.match(student.text_states, batch.attention_mask, student.image_states, text_index=texts)
        log_odds = log_odds_of(logits.float()).view(num_pairs, num_pairs)  # (images, texts)
        targets = positive_targets(batch.image_ids, batch.image_ids)
        output.loss_itm = itm_contrast_loss(log_odds, targets)
        with torch.no_grad():
            found = torch.stack([targets.gather(1, x.argmax(1, keepdim=True)) for x in (log_odds, log_odds.mT)])
            output.itm_accuracy = (found > 0).float().mean()

    def _match_and_predict(
        self,
        output: TCLLossOutput,
        batch: TrainingBatch,
        student: View,
        teacher: Any,
        alpha: float | Tensor,
    ) -> None:
        """Add the losses of the fusion encoder, matching (ITM) and masked words (MLM), from one pass over all rows."""
        num_pairs = len(batch.input_ids)
        text_states, mask, image_states = student.text_states, batch.attention_mask, student.image_states
        negatives = None
        if self.draws_negatives:
            if self.config.gather_negatives and is_distributed():
                # Hard negatives may be those of other processes, which follow the own batch.
                text_states, image_states = (gather_padded(x, with_gradient=True) for x in (text_states, image_states))
                mask = gather_padded(mask)
            negatives = self._hard_negatives(batch, student, teacher)
        rows = fusion_rows(batch, student.masked_states, text_states, mask, negatives)
        fused = self.tcl.fuse(
            rows.text_states,
            rows.attention_mask,
            image_states,
            rows.image_index,
            token_index=rows.token_index,
            text_index=rows.text_index,
        ).last_hidden_state
        if negatives is not None:
            number = len(negatives.image) // num_pairs
            logits = self.itm_head(fused[: (1 + 2 * number) * num_pairs, 0])  # ((1 + 2 K) N, 2)
            labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
            labels[:num_pairs] = MATCHES
            exists = torch.cat([negatives.has_image.new_ones(num_pairs), negatives.has_image, negatives.has_text])
            output.loss_itm = itm_loss(logits, labels, exists, number)
            output.itm_accuracy = accuracy(logits, labels.masked_fill(~exists, -100))
        if batch.masked is not None:
            teacher_logits = None
            if not has_no_share(alpha):
                teacher_logits = self._words_of_teacher(batch, teacher)
            logits = self.lm_head(batch.masked.select(fused[-num_pairs:]))  # (N * M, V)
            words = batch.masked.selected_labels()
            output.loss_mlm = mlm_loss(logits, words, teacher_logits, alpha)
            output.mlm_accuracy = accuracy(logits, words)

    @torch.no_grad()
    def _words_of_teacher(self, batch: TrainingBatch, teacher: View) -> Tensor:
        """The teacher's logits of the masked words (N * M, V)."""
        fused = self.teacher.tcl.fuse(
            teacher.masked_states,
            batch.attention_mask,
            teacher.image_states,
            token_index=batch.masked.token_index(),
        )
        return self.teacher.lm_head(batch.masked.select(fused.last_hidden_state))

    @torch.no_grad()
    def _hard_negatives(self, batch: TrainingBatch, student: View, teacher: View) -> HardNegatives:
        """Draw hard negative images for each text and hard negative texts for each image."""
        ids = batch.image_ids
        keys: tuple[Tensor, ...] = (teacher.image, teacher.text, ids)
        if self.config.gather_negatives:
            keys = tuple(gather_own_first(x) for x in keys)
        image_keys, text_keys, key_ids = keys
        excluded = torch.eye(len(student.text), len(text_keys), dtype=torch.bool, device=student.text.device)
        excluded = excluded | (ids[:, None] == key_ids) & (key_ids != NO_IMAGE_ID)
        temperature = self.tcl.temperature
        more = {} if self.config.itm_negatives == 1 else {"number": min(self.config.itm_negatives, excluded.shape[1])}
        of_texts = self.config.itm_hardness * similarity(student.text, image_keys, temperature)  # (N, K)
        of_images = self.config.itm_hardness * similarity(student.image, text_keys, temperature)  # (N, K)
        image, has_image = sample_hard_negatives(of_texts, excluded, **more)
        text, has_text = sample_hard_negatives(of_images, excluded, **more)
        return HardNegatives(image, has_image, text, has_text)


class TCLForPreTraining(PredictsWords, TCLForImageTextRetrieval):
    """TCL as it is pre-trained: retrieval plus masked language modelling."""

    task = "pretraining"
    loss_names = (*TCLForImageTextRetrieval.loss_names, "loss_mlm")
    drops_patches = True  # in train mode, the share `config.patch_dropout` of them

    def __init__(self, config: TCLConfig):
        super().__init__(config, lm_head=TCLLMHead(config.text_config))  # type: ignore[arg-type]

    def idle_parts(self) -> list[nn.Module | nn.Parameter]:
        """The parts that no objective with a weight above 0 uses.

        The last weights of the language-model head are the word embeddings, which are always used.
        """
        head = self.lm_head
        idle: list[Any] = [] if self.config.mlm_weight else [head.dense, head.layer_norm, head.decoder.bias]
        return super().idle_parts() + idle

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
        inputs: tuple[Any, Any, Any] = (input_ids, pixel_values, attention_mask)
        given = any(x is not None for x in (pixel_values_augmented, mlm_labels, image_ids))
        if not (return_loss and (self.training or given)):
            compared = self.tcl(*inputs, interpolate_pos_encoding, output_attentions, output_hidden_states)
            return self._with_matching(compared, attention_mask, use_itm_head, output_attentions)
        masked = None
        if self.config.mlm_weight:
            if mlm_input_ids is None or mlm_labels is None:
                raise ValueError(
                    "Masked language modelling needs mlm_input_ids and mlm_labels: use the TCLPreTrainingCollator, "
                    "or a config with mlm_weight=0."
                )
            masked = MaskedTokens(mlm_input_ids, mlm_labels, mlm_positions)
        batch = TrainingBatch(*inputs, pixel_values_augmented, image_ids, masked, interpolate_pos_encoding)
        return self._losses(batch, alpha)


class TCLForMaskedLM(PredictsWords, TCLPreTrainedModel):
    """TCL with its language-model head: fill in the masked words of a text about an image."""

    pipeline_tag = "zero-shot-image-classification"  # its encoders open as TCLModel

    def __init__(self, config: TCLConfig):
        super().__init__(config)
        self.tcl = TCLModel(config)
        self.lm_head = TCLLMHead(config.text_config)  # type: ignore[arg-type]
        self.post_init()

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
        options = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        output = self.tcl.text_model(input_ids, attention_mask, encoder_hidden_states=image_states, **options)
        logits = self.lm_head(output.last_hidden_state)
        loss = None if labels is None else mlm_loss(logits.flatten(0, 1), labels.flatten())
        return TCLMaskedLMOutput(loss, logits, output.hidden_states, output.attentions, output.cross_attentions)


__all__ = ["TCLForImageTextRetrieval", "TCLForMaskedLM", "TCLForPreTraining", "TCLModel", "TCLTaughtModel"]
