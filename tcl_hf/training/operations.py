"""Operations and bytes of a pre-training step by part, in closed form from its config.

A step is a list of matrix products, and a few passes over all weights. Products count `2 * rows * inner * columns`
operations, as everywhere; an elementwise operation counts as none. Bytes are the least that must move: each product
reads its two operands and writes its result once, and what lies between two products is done on the way. Attention
scores never leave the chip, as in fused kernels; they are counted as computed once.

Shapes: B pairs, L tokens of a text, M masked ones, P states of an image (class token and patches), K keys.
"""

from dataclasses import dataclass
from typing import cast

from ..models.configuration_tcl import TCLConfig, TCLTextConfig, TCLVisionConfig, kept_patches

FLOAT = 4  # bytes of a float32


@dataclass(frozen=True)
class Work:
    """What a part of a step takes at least.

    Args:
        forward, backward: floating-point operations of its matrix products.
        bytes: read and written, forward and backward together.
    """

    forward: int = 0
    backward: int = 0
    bytes: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.forward + other.forward, self.backward + other.backward, self.bytes + other.bytes)

    def __mul__(self, times: int) -> "Work":
        return Work(self.forward * times, self.backward * times, self.bytes * times)

    @property
    def flops(self) -> int:
        """Operations of forward and backward."""
        return self.forward + self.backward

    @property
    def intensity(self) -> float:
        """Operations for each byte; 0 where nothing moves."""
        return self.flops / self.bytes if self.bytes else 0.0


@dataclass(frozen=True)
class FusedRows:
    """Rows of the fusion encoder.

    Args:
        rows: pairs of a text and an image.
        images: rows of keys and values that they read; texts of the same image that are neighbours share them.
        queries: tokens of each whose last states are used: so many run through the last layer, whose self-attention
            has keys and values of all tokens nevertheless.
    """

    rows: int
    images: int
    queries: int


NOTHING = Work()


def operations(
    config: TCLConfig, num_pairs: int, num_tokens: int, num_masked: int, bytes_per_number: int = FLOAT
) -> dict[str, Work]:
    """What the matrix products of one process' step take, by part; parts that the weights leave out are not there.

    The operations equal those that `torch.utils.flop_counter` counts with eager attention. Gradient checkpointing,
    which computes the forward a second time, and padding are not considered.

    Args:
        config: sizes, and the weights of the objectives.
        num_pairs: images, and texts (B).
        num_tokens: tokens of each text, [CLS] included (L).
        num_masked: masked tokens of each text, as `mlm_positions` has columns (M).
        bytes_per_number: of weights and states, 2 under bf16 autocast; similarities are float32 in any precision.

    Raises:
        ValueError: if there is no pair or token, or more masked tokens than there are.
    """
    if num_pairs < 1 or num_tokens < 1 or not 0 <= num_masked <= num_tokens:
        raise ValueError(
            f"num_pairs={num_pairs}, num_tokens={num_tokens} and num_masked={num_masked} are no batch: choose 1 or "
            "more pairs and tokens, and no more masked tokens than tokens."
        )
    vision, text = cast(TCLVisionConfig, config.vision_config), cast(TCLTextConfig, config.text_config)
    contrasts = bool(config.cma_weight or config.imc_weight or config.lmi_weight)
    matches, predicts = bool(config.itm_weight), bool(config.mlm_weight)
    compares = contrasts or matches
    distils = predicts and config.alpha > 0
    student_texts = num_pairs * (compares + predicts)  # texts as they are, and with masks
    teacher_texts = num_pairs * (compares + distils)
    num_patches = (vision.image_size // vision.patch_size) ** 2
    num_states = {"student": 1 + kept_patches(num_patches, config.patch_dropout), "teacher": 1 + num_patches}

    # What the fusion encoder sees: one true pair and two hard negatives for ITM, masked texts for MLM. Of all rows, as
    # many tokens leave the last layer: [CLS] and the masked ones, or [CLS] as many times.
    queries = 1 + num_masked * predicts
    student_rows = FusedRows(num_pairs * (3 * matches + predicts), num_pairs * (1 + matches), queries)
    teacher_rows = FusedRows(num_pairs * distils, num_pairs, queries)

    parts = {
        "image encoder, student": image_encoder(vision, num_pairs, num_states["student"]),
        "image encoder, teacher": image_encoder(vision, num_pairs, num_states["teacher"], taught=True)
        * (compares or distils),
        "text encoder, student": text_encoder(text, student_texts, num_tokens),
        "text encoder, teacher": text_encoder(text, teacher_texts, num_tokens, taught=True),
    }
    for name, rows, gradients in (("student", student_rows, 2), ("teacher", teacher_rows, 0)):
        keys_and_values = product(num_pairs * num_states[name], vision.hidden_size, text.hidden_size, gradients) * 2
        parts[f"keys and values of images, {name}"] = keys_and_values * (text.num_fusion_layers * bool(rows.rows))
        parts[f"fusion encoder, {name}"] = fusion_encoder(text, rows, num_tokens, num_states[name], gradients)
    parts |= {
        "matching head": product(3 * num_pairs, text.hidden_size, 2) * matches,
        "language-model head, student": language_model_head(text, num_pairs * num_masked) * predicts,
        "language-model head, teacher": language_model_head(text, num_pairs * num_masked, gradients=0) * distils,
        "projections, student": projections(config, num_pairs, num_pairs * compares, gradients=2 * contrasts),
        "projections, teacher": projections(config, num_pairs, num_pairs * compares, gradients=0)
        * (compares or distils)
        + projections(config, num_pairs * num_patches, num_pairs * (num_tokens - 1), gradients=0)
        * bool(config.lmi_weight),
    }
    parts = {name: Work(w.forward, w.backward, w.bytes * bytes_per_number // FLOAT) for name, w in parts.items()}

    def similarities(num_keys: int, gradients: int = 1) -> Work:
        """Of the features of one modality with keys; no gradient reaches the keys, which are the teacher's."""
        return product(num_pairs, config.projection_dim, num_keys, gradients)

    def locals_of_all(num_locals: int) -> Work:
        """Of the features with all locals, and the gradient beside it at once; and of each with its own."""
        own = product(1, config.projection_dim, num_locals, gradients=1) * num_pairs
        return similarities(num_pairs * num_locals, gradients=0) * 2 + own

    num_keys = num_pairs + config.queue_size
    parts |= {
        # Both directions, student and teacher.
        "CMA": (similarities(num_keys) + similarities(num_keys, gradients=0)) * (2 * bool(config.cma_weight)),
        "IMC": similarities(num_keys) * (2 * bool(config.imc_weight)),
        "LMI": (locals_of_all(config.local_grid**2) + locals_of_all(num_tokens - 1)) * bool(config.lmi_weight),
        # The logits that are returned, and those that hard negatives are drawn from, in both directions.
        "similarities in the batch": similarities(num_pairs, gradients=0) * (compares + 2 * matches),
    }
    return {name: work for name, work in parts.items() if work.flops}


def updates(num_trained: int, num_taught: int) -> dict[str, Work]:
    """The passes over all weights of a step, in float32: the teacher's update and AdamW, by numbers of parameters."""
    return {
        "teacher's update": Work(bytes=(2 + 1) * FLOAT * num_taught),  # reads teacher and student
        "AdamW": Work(bytes=(4 + 3) * FLOAT * num_trained),  # reads weight, gradient, two moments; writes all but one
    }


def product(rows: int, inner: int, columns: int, gradients: int = 2) -> Work:
    """A product (rows, inner) x (inner, columns), and as many as it has operands with a gradient.

    Each gradient is a product of the result's gradient with the other operand: the same three matrices.
    """
    flops = 2 * rows * inner * columns
    if not flops:
        return NOTHING
    moved = rows * inner + inner * columns + rows * columns
    return Work(flops, gradients * flops, (1 + gradients) * FLOAT * moved)


def attention(rows: int, queries: int, keys: int, width: int, gradients: int = 2, key_rows: int = 0) -> Work:
    """Scores of `queries` with `keys` in each row, and the values they weight; `gradients` is 2 or 0.

    The width is that of all heads together. With `key_rows` several rows of queries share one of keys and values.
    Backward reads queries, keys, values, output and its gradient, and writes three gradients: twice the forward.
    """
    flops = 2 * (2 * rows * queries * keys * width)
    moved = 2 * (rows * queries + (key_rows or rows) * keys) * width
    return Work(flops, gradients * flops, (1 + gradients) * FLOAT * moved)


def image_encoder(config: TCLVisionConfig, num_images: int, num_states: int, taught: bool = False) -> Work:
    """All patches of the images, then layers on the states of each, the class token's and those of patches."""
    gradients = 0 if taught else 2
    width, inner = config.hidden_size, config.intermediate_size
    num_patches = (config.image_size // config.patch_size) ** 2
    states = num_images * num_states
    patches = product(
        num_images * num_patches,
        config.num_channels * config.patch_size**2,
        width,
        gradients=0 if taught else 1,  # pixels need none
    )
    layer = (
        product(states, width, width, gradients) * 4  # queries, keys, values, output
        + attention(num_images, num_states, num_states, width, gradients)
        + product(states, width, inner, gradients)
        + product(states, inner, width, gradients)
    )
    return patches + layer * config.num_hidden_layers


def text_encoder(config: TCLTextConfig, num_texts: int, num_tokens: int, taught: bool = False) -> Work:
    """The first layers of the text model on texts of L tokens."""
    layer = text_layer(config, num_texts, num_tokens, num_tokens, gradients=0 if taught else 2)
    return layer * config.fusion_layer


def fusion_encoder(
    config: TCLTextConfig, fused: FusedRows, num_tokens: int, num_states: int, gradients: int = 2
) -> Work:
    """The other layers, on rows of L tokens each with an image of P states; keys and values of images not included."""
    if not fused.rows or not config.num_fusion_layers:
        return NOTHING
    layer, last = (
        text_layer(config, fused.rows, queries, num_tokens, num_states, gradients, fused.images)
        for queries in (num_tokens, fused.queries)
    )
    return layer * (config.num_fusion_layers - 1) + last


def text_layer(
    config: TCLTextConfig,
    rows: int,
    queries: int,
    num_tokens: int,
    num_states: int = 0,
    gradients: int = 2,
    num_images: int = 0,
) -> Work:
    """A layer of the text model on rows of L tokens, of which only some have queries and go on from there.

    Args:
        queries: tokens of a row that attend and are fed forward.
        num_tokens: tokens of a row that have keys and values (L).
        num_states: states of the image that the queries attend to (P); 0 for a layer without cross-attention.
        num_images: rows of keys and values that the rows attend to; as many as these if 0.
    """
    width, inner = config.hidden_size, config.intermediate_size
    work = (
        product(rows * num_tokens, width, width, gradients) * 2  # keys, values
        + product(rows * queries, width, width, gradients) * 2  # queries, output
        + attention(rows, queries, num_tokens, width, gradients)
        + product(rows * queries, width, inner, gradients)
        + product(rows * queries, inner, width, gradients)
    )
    if num_states:
        work += product(rows * queries, width, width, gradients) * 2  # queries, output
        work += attention(rows, queries, num_states, width, gradients, num_images)
    return work


def language_model_head(config: TCLTextConfig, num_words: int, gradients: int = 2) -> Work:
    """From states to logits over the vocabulary, for so many words."""
    width = config.hidden_size
    return product(num_words, width, width, gradients) + product(num_words, width, config.vocab_size, gradients)


def projections(config: TCLConfig, num_image_states: int, num_text_states: int, gradients: int) -> Work:
    """Of states of both modalities to the space in which they are compared."""
    vision, text = cast(TCLVisionConfig, config.vision_config), cast(TCLTextConfig, config.text_config)
    image = product(num_image_states, vision.hidden_size, config.projection_dim, gradients)
    return image + product(num_text_states, text.hidden_size, config.projection_dim, gradients)
