"""TCL as a textbook would write it: the slow, obvious version with which the benchmarks compare ours.

Every formula has the form that it has in the paper. Attention weights are computed explicitly; an image's keys and
values are projected again for each text that reads it; true pairs, negative pairs and masked texts pass through the
fusion encoder one after the other; logits are computed for every token, masked or not; all logits of LMI are in memory
at once; hard negatives are drawn sample by sample. The code is as efficient as one may expect of any PyTorch code: it
computes whole batches and all heads at once, and makes no copies that its formulas do not need.
`tests/benchmarks/test_plain.py` compares its results with ours.

Parameters and buffers have our names, so that `PlainTCL(config).load_state_dict(ours.state_dict())` loads our weights;
it draws no starting values. The queues are row-major, Q x D (the original's are D x Q).

Reading order: layers, encoders, losses, the pre-training step; then features, re-ranked retrieval, and answers to
questions. Shapes: N texts, as many images (B in retrieval), P patches, L tokens, D feature dimensions, K keys, V words.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tcl_hf import TCLConfig, TCLTextConfig, TCLVisionConfig
from tcl_hf.evaluation.retrieval import NOT_SCORED, EncodedSamples
from tcl_hf.models.configuration_tcl import MAX_TEMPERATURE, MIN_TEMPERATURE
from tcl_hf.models.losses import NO_IMAGE_ID
from tcl_hf.models.modeling_tcl import MATCHES
from tcl_hf.models.outputs import TCLLossOutput, TCLRankedAnswers

# Layers


class Attention(nn.Module):
    """Multi-head attention from states to sources, which are the states themselves or those of an image."""

    def __init__(self, width: int, source_width: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(source_width, width)
        self.v_proj = nn.Linear(source_width, width)
        self.out_proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: Tensor, sources: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend from states (N, L, width) to sources (N, P, source width); the mask is added to the scores."""
        query = self._heads(self.q_proj(states))  # (N, heads, L, width / heads)
        key = self._heads(self.k_proj(sources))  # (N, heads, P, width / heads)
        value = self._heads(self.v_proj(sources))
        scores = query @ key.mT / math.sqrt(query.shape[-1])  # (N, heads, L, P)
        if mask is not None:
            scores = scores + mask
        weights = self.dropout(scores.softmax(-1))
        return self.out_proj((weights @ value).transpose(1, 2).flatten(2))

    def _heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def additive_mask(mask: Tensor, causal: bool = False) -> Tensor:
    """A mask (N, 1, 1 or L, L) to add to scores: 0 for tokens, the lowest number for padding (0 in the mask (N, L))."""
    visible = mask[:, None, None, :].bool()
    if causal:
        length = mask.shape[1]
        visible = visible & torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    return torch.zeros(visible.shape, device=mask.device).masked_fill(~visible, torch.finfo(torch.float32).min)


class VisionLayer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: TCLVisionConfig):
        super().__init__()
        width = config.hidden_size
        self.layer_norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.self_attn = Attention(width, width, config.num_attention_heads, config.attention_dropout)
        self.layer_norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(width, config.intermediate_size)
        self.activation = nn.GELU()
        self.fc2 = nn.Linear(config.intermediate_size, width)

    def forward(self, states: Tensor) -> Tensor:
        normed = self.layer_norm1(states)
        states = states + self.self_attn(normed, normed)
        return states + self.fc2(self.activation(self.fc1(self.layer_norm2(states))))


class TextLayer(nn.Module):
    """Post-norm transformer layer; a fusion layer attends to an image between self-attention and feed-forward."""

    def __init__(self, config: TCLTextConfig, fuses: bool):
        super().__init__()
        width, heads, dropout = config.hidden_size, config.num_attention_heads, config.attention_probs_dropout_prob
        self.self_attn = Attention(width, width, heads, dropout)
        self.self_attn_layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        if fuses:
            self.cross_attn = Attention(width, config.encoder_hidden_size, heads, dropout)
            self.cross_attn_layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(width, config.intermediate_size)
        self.activation = nn.GELU()
        self.fc2 = nn.Linear(config.intermediate_size, width)
        self.final_layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, states: Tensor, mask: Tensor, image_states: Tensor | None = None, image_mask: Tensor | None = None
    ) -> Tensor:
        states = self.self_attn_layer_norm(states + self.dropout(self.self_attn(states, states, mask)))
        if image_states is not None:
            attended = self.cross_attn(states, image_states, image_mask)
            states = self.cross_attn_layer_norm(states + self.dropout(attended))
        fed = self.fc2(self.activation(self.fc1(states)))
        return self.final_layer_norm(states + self.dropout(fed))


# Encoders


class VisionEmbeddings(nn.Module):
    """Patches of an image, preceded by a class token, each with a learned position."""

    def __init__(self, config: TCLVisionConfig):
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        num_patches = (config.image_size // patch) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + num_patches, width))
        self.patch_embedding = nn.Conv2d(config.num_channels, width, kernel_size=patch, stride=patch)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embedding(pixel_values).flatten(2).mT  # (N, P, width)
        return torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1) + self.position_embeddings


class VisionModel(nn.Module):
    """From images (N, 3, height, width) to states of the class token and of every patch (N, 1 + P, width)."""

    def __init__(self, config: TCLVisionConfig):
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        states = self.embeddings(pixel_values)
        for layer in self.layers:
            states = layer(states)
        return self.layer_norm(states)


class TextEmbeddings(nn.Module):
    """Word, position and token type 0, normalised."""

    def __init__(self, config: TCLTextConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor) -> Tensor:
        positions = self.position_embeddings(torch.arange(input_ids.shape[1], device=input_ids.device))
        token_types = self.token_type_embeddings(torch.zeros_like(input_ids))
        return self.dropout(self.layer_norm(self.word_embeddings(input_ids) + positions + token_types))


class TextModel(nn.Module):
    """Text encoder (`encode`, the first layers) and fusion encoder (`fuse`, the others)."""

    def __init__(self, config: TCLTextConfig):
        super().__init__()
        self.fusion_layer, self.causal = config.fusion_layer, config.causal
        self.embeddings = TextEmbeddings(config)
        self.layers = nn.ModuleList(
            TextLayer(config, fuses=number >= config.fusion_layer) for number in range(config.num_hidden_layers)
        )

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """States (N, L, width) of token ids (N, L) without any image."""
        mask = additive_mask(attention_mask, self.causal)
        states = self.embeddings(input_ids)
        for layer in self.layers[: self.fusion_layer]:
            states = layer(states, mask)
        return states

    def fuse(
        self, states: Tensor, attention_mask: Tensor, image_states: Tensor, image_mask: Tensor | None = None
    ) -> Tensor:
        """Fuse states of texts (N, L, width) with those of one image each (N, 1 + P, image width)."""
        mask = additive_mask(attention_mask, self.causal)
        image_mask = None if image_mask is None else additive_mask(image_mask)
        for layer in self.layers[self.fusion_layer :]:
            states = layer(states, mask, image_states, image_mask)
        return states


class LMHead(nn.Module):
    """From states (..., width) to logits over the vocabulary (..., V)."""

    def __init__(self, config: TCLTextConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = nn.GELU()
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, states: Tensor) -> Tensor:
        return self.decoder(self.layer_norm(self.activation(self.dense(states))))


@dataclass
class Encoded:
    """States and features of a batch."""

    image_states: Tensor  # (N, 1 + P, width)
    text_states: Tensor  # (N, L, width)
    image: Tensor  # (N, D)
    text: Tensor  # (N, D)


class Encoders(nn.Module):
    """Vision encoder, text and fusion encoder, and the projections of both to one space."""

    def __init__(self, config: TCLConfig):
        super().__init__()
        self.vision_model = VisionModel(config.vision_config)
        self.text_model = TextModel(config.text_config)
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim)

    def image_features(self, states: Tensor) -> Tensor:
        """L2-normalised features (..., D) of image states (..., width)."""
        return F.normalize(self.visual_projection(states), dim=-1)

    def text_features(self, states: Tensor) -> Tensor:
        """L2-normalised features (..., D) of text states (..., width)."""
        return F.normalize(self.text_projection(states), dim=-1)

    def encode(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        """Encode images and texts, without fusing them."""
        image_states = self.vision_model(pixel_values)
        text_states = self.text_model.encode(input_ids, attention_mask)
        image, text = self.image_features(image_states[:, 0]), self.text_features(text_states[:, 0])
        return Encoded(image_states, text_states, image, text)


class Queue(nn.Module):
    """The teacher's most recent features and their image ids; a push overwrites the oldest rows."""

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.register_buffer("image", torch.zeros(size, dim))
        self.register_buffer("text", torch.zeros(size, dim))
        self.register_buffer("ids", torch.full((size,), NO_IMAGE_ID))
        self.register_buffer("cursor", torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def push(self, image: Tensor, text: Tensor, ids: Tensor) -> None:
        """Store features (N, D) of both modalities with their image ids (N,)."""
        size = len(self.ids)
        if size == 0:
            return
        # If the batch is larger than the queue, its last rows are kept.
        rows = (self.cursor + torch.arange(len(ids), device=ids.device))[-size:] % size
        self.image[rows], self.text[rows], self.ids[rows] = image[-size:], text[-size:], ids[-size:]
        self.cursor = (self.cursor + len(ids)) % size


# Losses


def positive_targets(ids: Tensor, queue_ids: Tensor) -> Tensor:
    """Targets (N, N + Q) over batch and queue: the sample itself and others of the same image share the mass."""
    key_ids = torch.cat([ids, queue_ids])
    positive = (ids[:, None] == key_ids) & (ids[:, None] != NO_IMAGE_ID)
    positive[:, : len(ids)].fill_diagonal_(True)
    return positive / positive.sum(-1, keepdim=True)


def contrastive_loss(queries: Tensor, keys: Tensor, targets: Tensor, temperature: Tensor) -> Tensor:
    """Mean cross-entropy of `queries . keys / temperature` (N, K) against target distributions (N, K)."""
    log_p = F.log_softmax(queries @ keys.mT / temperature, dim=-1)
    return -(targets * log_p).sum(-1).mean()


def pool_locals(patches: Tensor, grid: tuple[int, int], size: int) -> Tensor:
    """Average features of a grid of patches (N, P, D) to `size` x `size` regions (N, size * size, D)."""
    return F.adaptive_avg_pool2d(patches.mT.unflatten(-1, grid), size).flatten(2).mT


def plain_lmi_loss(features: Tensor, local_features: Tensor, temperature: Tensor, mask: Tensor | None = None) -> Tensor:
    """Local mutual information: a cross-entropy over [the local | all locals of the other rows] with class 0.

    Args:
        features: student features of whole samples (N, D).
        local_features: teacher features of their parts (N, L, D).
        mask: which locals are real (N, L); all of them if None.

    Returns:
        Mean over the real locals of a sample, then over the samples that have any; 0 if none has.
    """
    num_samples, num_locals, _ = local_features.shape
    if mask is None:
        mask = torch.ones(num_samples, num_locals, device=features.device)
    mask = mask.bool()
    positive = (features[:, None] * local_features).sum(-1) / temperature  # (N, L)
    negative = features @ local_features.flatten(0, 1).mT / temperature  # (N, N * L)
    own = torch.eye(num_samples, dtype=torch.bool, device=features.device).repeat_interleave(num_locals, dim=1)
    negative = negative.masked_fill(own | ~mask.flatten(), -torch.inf)
    negative = negative[:, None].expand(-1, num_locals, -1)  # (N, L, N * L)
    logits = torch.cat([positive[..., None], negative], dim=-1)  # (N, L, 1 + N * L)
    labels = torch.zeros(num_samples * num_locals, dtype=torch.long, device=features.device)
    per_local = F.cross_entropy(logits.flatten(0, 1), labels, reduction="none").view_as(positive)
    per_sample = (per_local * mask).sum(-1) / mask.sum(-1).clamp(min=1)
    return per_sample.sum() / mask.any(-1).sum().clamp(min=1)


def mlm_loss(logits: Tensor, labels: Tensor, teacher_logits: Tensor, alpha: float) -> Tensor:
    """Masked language modelling on logits (N, L, V) of all tokens: the mean over tokens with a label (N, L)."""
    num_masked = (labels != -100).sum().clamp(min=1)
    hard = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    soft = -(teacher_logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)  # (N, L)
    return ((1 - alpha) * hard + alpha * (soft * (labels != -100)).sum()) / num_masked


@torch.no_grad()
def draw_negatives(logits: Tensor, excluded: Tensor) -> Tensor:
    """For each row of logits (N, M) a column (N,), drawn from its softmax without the excluded columns (N, M).

    A row whose columns are all excluded gets 0, which is meaningless.
    """
    p = logits.masked_fill(excluded, -torch.inf).softmax(-1)
    nothing_left = excluded.all(-1).tolist()
    drawn = []
    for row in range(len(p)):
        drawn.append(0 if nothing_left[row] else torch.multinomial(p[row], 1).item())
    return torch.tensor(drawn, device=logits.device)


# Pre-training


class PlainTCL(nn.Module):
    """TCL with matching and language-model head, momentum teacher and queues; all five objectives, always."""

    def __init__(self, config: TCLConfig):
        super().__init__()
        self.config = config
        self.tcl = Encoders(config)
        self.itm_head = nn.Linear(config.text_config.hidden_size, 2)
        self.lm_head = LMHead(config.text_config)
        self.teacher = nn.ModuleDict({"tcl": copy.deepcopy(self.tcl), "lm_head": copy.deepcopy(self.lm_head)})
        for owner in (self, self.teacher):  # the last weights of each head are the word embeddings
            tcl, lm_head = owner.get_submodule("tcl"), owner.get_submodule("lm_head")
            lm_head.decoder.weight = tcl.text_model.embeddings.word_embeddings.weight
        self.teacher.requires_grad_(False)
        self.tcl.temperature = nn.Parameter(
            torch.tensor(float(config.temperature_init_value))
        )  # added here, so that the teacher has none
        self.queue = Queue(config.queue_size, config.projection_dim)

    @torch.no_grad()
    def update_teacher(self) -> None:
        """Move the teacher a step towards the student, and keep the temperature in its range; called once a step."""
        self.tcl.temperature.clamp_(MIN_TEMPERATURE, MAX_TEMPERATURE)
        m = self.config.momentum
        for name, p_m in self.teacher.named_parameters():
            p = self.get_parameter(name)
            p_m.data = p_m.data * m + p.data * (1 - m)

    def match(self, text_states: Tensor, attention_mask: Tensor, image_states: Tensor) -> Tensor:
        """Matching logits (N, 2) of encoded texts (N, L, width) with one image each (N, 1 + P, width)."""
        return self.itm_head(self.tcl.text_model.fuse(text_states, attention_mask, image_states)[:, 0])

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor,
        pixel_values_augmented: Tensor,
        mlm_input_ids: Tensor,
        mlm_labels: Tensor,
        mlm_positions: Tensor | None = None,
        image_ids: Tensor | None = None,
        alpha: float | None = None,
        negative_image: Tensor | None = None,
        negative_text: Tensor | None = None,
    ) -> TCLLossOutput:
        """The losses of a batch of pairs, named as ours; train mode pushes to the queue.

        Args:
            mlm_positions: not used; every token is predicted.
            alpha: share of the teacher's soft targets; the config's if None.
            negative_image, negative_text: a negative image for each text and a negative text for each image, as rows
                of the batch (N,); drawn if None.

        The other arguments are those of `TCLForPreTraining`.
        """
        config, temperature = self.config, self.tcl.temperature
        alpha = config.alpha if alpha is None else alpha
        if image_ids is None:
            image_ids = torch.full((len(input_ids),), NO_IMAGE_ID, device=input_ids.device)

        # View a of the images is the student's, view b the teacher's; the texts differ by their dropout.
        student = self.tcl.encode(pixel_values, input_ids, attention_mask)
        with torch.no_grad():
            teacher = self.teacher["tcl"].encode(pixel_values_augmented, input_ids, attention_mask)
            image_keys = torch.cat([teacher.image, self.queue.image])  # (K, D)
            text_keys = torch.cat([teacher.text, self.queue.text])
            hard = positive_targets(image_ids, self.queue.ids)  # (N, K)
            soft_i2t = F.softmax(teacher.image @ text_keys.mT / temperature, dim=-1)
            soft_t2i = F.softmax(teacher.text @ image_keys.mT / temperature, dim=-1)

        # CMA: across modalities
        loss_i2t = contrastive_loss(student.image, text_keys, (1 - alpha) * hard + alpha * soft_i2t, temperature)
        loss_t2i = contrastive_loss(student.text, image_keys, (1 - alpha) * hard + alpha * soft_t2i, temperature)
        # IMC: within a modality
        loss_i2i = contrastive_loss(student.image, image_keys, hard, temperature)
        loss_t2t = contrastive_loss(student.text, text_keys, hard, temperature)
        grid = tuple(side // config.vision_config.patch_size for side in pixel_values_augmented.shape[-2:])
        loss_lmi_image, loss_lmi_text = self._lmi_losses(student, teacher, grid, attention_mask)
        negatives = (negative_image, negative_text)
        losses = {
            "cma": (loss_i2t + loss_t2i) / 2,
            "imc": (loss_i2i + loss_t2t) / 2,
            "lmi": (loss_lmi_image + loss_lmi_text) / 2,
            "itm": self._itm_loss(student, teacher, attention_mask, image_ids, *negatives),
            "mlm": self._mlm_loss(student, teacher, attention_mask, mlm_input_ids, mlm_labels, alpha),
        }
        if self.training:
            self.queue.push(teacher.image, teacher.text, image_ids)
        return TCLLossOutput(
            loss=sum(getattr(config, f"{name}_weight") * loss for name, loss in losses.items()),
            **{f"loss_{name}": loss for name, loss in losses.items()},
            loss_i2t=loss_i2t,
            loss_t2i=loss_t2i,
            loss_i2i=loss_i2i,
            loss_t2t=loss_t2t,
            loss_lmi_image=loss_lmi_image,
            loss_lmi_text=loss_lmi_text,
            image_embeds=student.image,
            text_embeds=student.text,
        )

    def _lmi_losses(
        self, student: Encoded, teacher: Encoded, grid: tuple[int, ...], attention_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """LMI: images with their regions, and texts with their tokens."""
        tcl = self.teacher["tcl"]
        with torch.no_grad():
            patches = tcl.image_features(teacher.image_states[:, 1:])  # (N, P, D)
            regions = pool_locals(patches, grid, self.config.local_grid)
            tokens = tcl.text_features(teacher.text_states[:, 1:])  # (N, L - 1, D)
        loss_image = plain_lmi_loss(student.image, regions, self.tcl.temperature)
        return loss_image, plain_lmi_loss(student.text, tokens, self.tcl.temperature, attention_mask[:, 1:])

    def _itm_loss(
        self,
        student: Encoded,
        teacher: Encoded,
        attention_mask: Tensor,
        image_ids: Tensor,
        negative_image: Tensor | None,
        negative_text: Tensor | None,
    ) -> Tensor:
        """ITM: true pairs, and each text with a similar image and each image with a similar text of another pair."""
        excluded = (image_ids[:, None] == image_ids) & (image_ids != NO_IMAGE_ID)
        excluded = excluded.fill_diagonal_(True)
        if negative_image is None:
            negative_image = draw_negatives(student.text @ teacher.image.mT / self.tcl.temperature, excluded)
        if negative_text is None:
            negative_text = draw_negatives(student.image @ teacher.text.mT / self.tcl.temperature, excluded)
        rows = (~excluded.all(-1)).nonzero().flatten()  # all N, except for those whose image all others share
        text_rows = torch.cat([rows, negative_text[rows]])  # (2 N,)
        image_rows = torch.cat([negative_image[rows], rows])
        texts, images = student.text_states, student.image_states
        true_pairs = self.match(texts, attention_mask, images)  # (N, 2)
        negative_pairs = self.match(texts[text_rows], attention_mask[text_rows], images[image_rows])
        labels = torch.zeros(len(true_pairs) + len(negative_pairs), dtype=torch.long, device=texts.device)
        labels[: len(true_pairs)] = MATCHES
        return F.cross_entropy(torch.cat([true_pairs, negative_pairs]), labels)

    def _mlm_loss(
        self,
        student: Encoded,
        teacher: Encoded,
        attention_mask: Tensor,
        mlm_input_ids: Tensor,
        mlm_labels: Tensor,
        alpha: float,
    ) -> Tensor:
        """MLM: texts with masked tokens, through both encoders again."""
        text_model = self.tcl.text_model
        masked_states = text_model.encode(mlm_input_ids, attention_mask)
        logits = self.lm_head(text_model.fuse(masked_states, attention_mask, student.image_states))  # (N, L, V)
        with torch.no_grad():
            text_model = self.teacher["tcl"].text_model
            masked_states = text_model.encode(mlm_input_ids, attention_mask)
            fused = text_model.fuse(masked_states, attention_mask, teacher.image_states)
            teacher_logits = self.teacher["lm_head"](fused)
        return mlm_loss(logits, mlm_labels, teacher_logits, alpha)


# Features, retrieval and answers


@torch.no_grad()
def plain_features(
    model: PlainTCL,
    pixel_values: Tensor | None = None,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Normalised features (B, D) of images (B, 3, height, width) and (N, D) of texts (N, L), None where not given."""
    image, text = None, None
    if pixel_values is not None:
        image = model.tcl.image_features(model.tcl.vision_model(pixel_values)[:, 0])
    if input_ids is not None:
        text = model.tcl.text_features(model.tcl.text_model.encode(input_ids, attention_mask)[:, 0])
    return image, text


@torch.no_grad()
def plain_rerank(
    model: PlainTCL,
    pairs: EncodedSamples,
    k: int,
    images: Sequence[int] | None = None,
    texts: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Matching logits of each image with its k most similar texts, and of each text with its k most similar images.

    Args:
        k: candidates of an image and of a text.
        images, texts: rows to do this for; all if None.

    Returns:
        Two matrices (B, N), image to text and text to image, with `NOT_SCORED` for all other pairs.
    """
    similarity = pairs.image_embeds @ pairs.text_embeds.mT  # (B, N)
    num_images, num_texts = similarity.shape
    image_to_text, text_to_image = (torch.full_like(similarity, NOT_SCORED) for _ in range(2))
    for i in range(num_images) if images is None else images:
        top = similarity[i].topk(min(k, num_texts)).indices
        image_states = pairs.image_states[i].repeat(len(top), 1, 1)  # (k, 1 + P, width)
        logits = model.match(pairs.text_states[top], pairs.attention_mask[top], image_states)
        image_to_text[i, top] = logits[:, MATCHES]
    for t in range(num_texts) if texts is None else texts:
        top = similarity[:, t].topk(min(k, num_images)).indices
        text_states = pairs.text_states[t].repeat(len(top), 1, 1)  # (k, L, width)
        attention_mask = pairs.attention_mask[t].repeat(len(top), 1)
        logits = model.match(text_states, attention_mask, pairs.image_states[top])
        text_to_image[top, t] = logits[:, MATCHES]
    return image_to_text, text_to_image


class PlainAnswerDecoder(nn.Module):
    """A causal text model with a language-model head, which reads a fused question in place of an image.

    It takes the config and the state of `TCLForQuestionAnswering.text_decoder`.
    """

    def __init__(self, config: TCLTextConfig):
        super().__init__()
        self.text_model = TextModel(config)
        self.lm_head = LMHead(config)
        self.lm_head.decoder.weight = self.text_model.embeddings.word_embeddings.weight

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, question_states: Tensor, question_mask: Tensor
    ) -> Tensor:
        """Logits (A, L, V) of the next token after each of A answers (A, L), with one question each (A, P, width)."""
        states = self.text_model.encode(input_ids, attention_mask)
        return self.lm_head(self.text_model.fuse(states, attention_mask, question_states, question_mask))


@torch.no_grad()
def plain_rank_answers(
    decoder: PlainAnswerDecoder,
    question_states: Tensor,
    question_mask: Tensor,
    candidate_ids: Tensor,
    candidate_mask: Tensor,
    k: int,
) -> TCLRankedAnswers:
    """Rank given answers to questions, best first.

    The k candidates with the most probable first tokens are read in full. The first token counts twice.

    Args:
        question_states: states of N questions fused with their images (N, P, width).
        question_mask: 1 for tokens of the questions, 0 for padding (N, P).
        candidate_ids: token ids of C answers (C, L), [CLS] to [SEP], padded.
        candidate_mask: 1 for tokens of the candidates, 0 for padding (C, L).
    """
    num_questions, k = len(question_states), min(k, len(candidate_ids))
    start = candidate_ids[:1, :1].expand(num_questions, 1)
    logits = decoder(start, torch.ones_like(start), question_states, question_mask)[:, 0]  # (N, V)
    first, chosen = logits.log_softmax(-1)[:, candidate_ids[:, 1]].topk(k)  # (N, k)

    input_ids, attention_mask = candidate_ids[chosen.flatten()], candidate_mask[chosen.flatten()]  # (N * k, L)
    question_states, question_mask = (x.repeat_interleave(k, dim=0) for x in (question_states, question_mask))
    log_p = decoder(input_ids, attention_mask, question_states, question_mask).log_softmax(-1)  # (N * k, L, V)
    log_p = log_p[:, :-1].gather(-1, input_ids[:, 1:, None])[..., 0]  # (N * k, L - 1): of each next token
    scores = first + (log_p * attention_mask[:, 1:]).sum(-1).view_as(first)
    scores, order = scores.sort(-1, descending=True)
    return TCLRankedAnswers(chosen.gather(-1, order), scores.softmax(-1), scores)
