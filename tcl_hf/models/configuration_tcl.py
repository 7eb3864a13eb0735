"""Configurations of TCL: sizes from the paper, one weight for each pre-training objective."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.001, 0.5  # the paper's code keeps tau in this range
# Sizes far beyond those of any model are mistakes or attacks: 100,000 layers take hours to build.
_MOST = {
    "num_hidden_layers": 1000,
    "hidden_size": 100_000,
    "encoder_hidden_size": 100_000,
    "intermediate_size": 1_000_000,
    "num_attention_heads": 10_000,
    "image_size": 100_000,
    "num_channels": 1000,
    "vocab_size": 10_000_000,
    "max_position_embeddings": 1_000_000,
    "type_vocab_size": 1000,
    "images_per_text": 100,
}
POOLINGS = ("cls", "mean", "cls_mean")


def _check_model_type(where: str, found: str | None, expected: str) -> None:
    """Refuse the config of another model, from which transformers would take the fields that have the same names."""
    if found not in (None, "", expected):
        raise ValueError(
            f"{where} is the config of a '{found}' and not of a '{expected}': TCLModel.from_vision_text_pretrained "
            "starts a new TCL from encoders of other models."
        )


class _OfOneType:
    """A config of an encoder, which is made of the dictionary of its own model type alone."""

    model_type: ClassVar[str]

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """Make a config of its dictionary, as transformers does.

        Raises:
            ValueError: for the dictionary of another model.
        """
        _check_model_type(config_dict.get("_name_or_path") or "It", config_dict.get("model_type"), cls.model_type)
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]


@strict
class TCLVisionConfig(_OfOneType, PreTrainedConfig):
    """Sizes of the vision encoder; the defaults are ViT-B/16 at 256 pixels, as in the paper.

    The first four arguments are for encoders to start from, which have such parts; the paper's has none of them.

    Args:
        pre_layer_norm: normalise the states before the first layer, as CLIP does.
        patch_bias: whether the convolution that embeds the patches has a bias; CLIP's has none.
        num_register_tokens: tokens between the class token and the patches, which the layers read and write. They have
            no position, and the model does not return their last states (arXiv 2309.16588: 4).
        use_swiglu_ffn: the feed-forward layers multiply their hidden states by a gate, the activation of a second
            projection of the same size, as in DINOv2-giant.
        output_grid: the encoder returns the means of its patch states over `output_grid` x `output_grid` regions (None:
            the states of all patches). Fusion then reads fewer states, where many small patches serve a fine encoder.
        lock: the lowest layers that are locked, see [`TCLConfig`], which sets it from `lock_vision`.

    Raises:
        ValueError: if the image does not divide into patches or the width into heads, or a number is negative.
    """

    model_type = "tcl_vision_model"
    base_config_key = "vision_config"

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 256
    patch_size: int = 16
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    attention_dropout: float | int = 0.0
    initializer_range: float = 0.02
    pre_layer_norm: bool = False
    patch_bias: bool = True
    num_register_tokens: int = 0
    use_swiglu_ffn: bool = False
    output_grid: int | None = None
    lock: bool | int = False

    def __post_init__(self, **kwargs):
        if self.patch_size < 1 or self.image_size < self.patch_size or self.image_size % self.patch_size:
            raise ValueError(
                f"vision_config.image_size={self.image_size} does not divide into patches of "
                f"{self.patch_size} pixels: choose a multiple of vision_config.patch_size."
            )
        if self.num_register_tokens < 0:
            raise ValueError(
                f"vision_config.num_register_tokens={self.num_register_tokens} is negative: choose 0 for none, or more."
            )
        if self.output_grid is not None and self.output_grid < 1:
            raise ValueError(f"vision_config.output_grid={self.output_grid} must be 1 or more, or None for all.")
        _check_sizes("vision_config", self)
        _check_heads("vision_config", self.hidden_size, self.num_attention_heads)
        super().__post_init__(**kwargs)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches along the height and the width of images of a size in pixels."""
        return height // self.patch_size, width // self.patch_size

    def grid_of_states(self, height: int, width: int) -> tuple[int, int]:
        """The patch states that the encoder returns, along the height and the width of images of a size in pixels."""
        return self.grid(height, width) if self.output_grid is None else (self.output_grid, self.output_grid)


@strict
class TCLTextConfig(_OfOneType, PreTrainedConfig):
    """Sizes of the text model; the defaults are BERT-base, its last six layers fusing text with the image.

    The first `fusion_layer` layers are the text encoder, the others the fusion encoder, whose
    cross-attention reads image states of width `encoder_hidden_size` (set by [`TCLConfig`]).

    Args:
        images_per_text: copies of each fusion layer, one after the other, which share their keys and values: with
            several images per text, each copy reads a different image (2 for NLVR2).
        causal: a token attends only to itself and to those before it, as in the decoder of answers.
        bos_token_id, eos_token_id: [CLS] and [SEP], with which answers begin and end.
        lock: the lowest layers that are locked, see [`TCLConfig`], which sets it from `lock_text`.

    Raises:
        ValueError: if `fusion_layer` lies outside the stack or the width does not divide into heads.
    """

    model_type = "tcl_text_model"
    base_config_key = "text_config"

    vocab_size: int = 30522
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    fusion_layer: int = 6
    num_attention_heads: int = 12
    encoder_hidden_size: int = 768
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    pad_token_id: int | None = 0
    bos_token_id: int | None = 101
    eos_token_id: int | None = 102
    images_per_text: int = 1
    causal: bool = False
    tie_word_embeddings: bool = True
    lock: bool | int = False

    def __post_init__(self, **kwargs):
        if self.images_per_text < 1:
            raise ValueError(f"text_config.images_per_text={self.images_per_text} must be 1 or more.")
        if not 0 <= self.fusion_layer <= self.num_hidden_layers:
            raise ValueError(
                f"text_config.fusion_layer={self.fusion_layer} lies outside the "
                f"{self.num_hidden_layers} layers of the text model: choose 0 to {self.num_hidden_layers}."
            )
        _check_sizes("text_config", self)
        _check_heads("text_config", self.hidden_size, self.num_attention_heads)
        super().__post_init__(**kwargs)

    @property
    def num_fusion_layers(self) -> int:
        """Layers that attend to images, copies included."""
        return (self.num_hidden_layers - self.fusion_layer) * self.images_per_text


@strict
class TCLConfig(PreTrainedConfig):
    """Configuration of TCL: two encoders, and how they are pre-trained.

    The total loss is the sum of the five objectives times their weights. The defaults are TCL's; ALBEF is
    `cma_weight=1, imc_weight=0, lmi_weight=0`, and CMA alone is CLIP with a momentum queue. An objective with
    weight 0 is not computed.

    Args:
        vision_config, text_config: dictionaries or configs of the encoders.
        projection_dim: width of the space in which images and texts are compared (paper: 256).
        temperature_init_value: starting value of tau, which divides every similarity (paper: 0.07).
        momentum: share of the teacher that each update keeps (paper: 0.995).
        queue_size: features of each modality kept as negatives (paper: 65,536); 0 for none.
        alpha: share of the teacher's soft targets (paper: 0.4).
        itm_negatives: hard negative images of each text, and texts of each image, in matching (paper: 1).
        itm_hardness: the negatives are drawn from the softmax of `itm_hardness` times the similarities divided by tau
            (paper: 1; 0 draws all alike). Fusion layers that start new learn nothing from hard negatives alone.
        itm_contrast: whether matching is trained by contrast, over all pairs of an image and a text of the process's
            batch: the log-odds of "matches" are the logits of a softmax over all texts of the batch, and over all
            images (paper: False, a yes or no for each drawn pair). Nothing is then drawn by `itm_negatives` and
            `itm_hardness`. It is cheap with one fusion layer, of which matching reads [CLS] alone.
        mlm_probability: share of the tokens masked (paper: 0.15).
        patch_dropout: share of the patches that the student does not read in a step of pre-training, drawn for each
            image (FLIP, arXiv 2212.00794: 0.5 and 0.75; paper: 0). The teacher, evaluation and fine-tuning read all
            patches.
        image_pooling, text_pooling: the states of a sample that the projection to features reads: "cls", that of the
            class token or [CLS] (paper); "mean", the mean over the patches, or over the tokens with [CLS]; "cls_mean",
            both, one behind the other. Encoders that were trained without contrast keep much in their patches, and
            sentence encoders keep it in the mean over the tokens.
        lock_vision, lock_text: layers of the encoders that are locked: True for all of them, or the number of the
            lowest ones, with the embeddings (LiT, arXiv 2111.07991; paper: False). A locked layer has no gradient, and
            the teacher has no copy of it, but uses that of the student. With a locked vision encoder, its states can be
            given in place of pixels, see [`TCLVisionModel`].
        local_grid: patch features are averaged to `local_grid` x `local_grid` regions for LMI (paper: 4).
        gather_negatives: whether LMI and ITM take negatives from the samples of all processes, with gradients; if not,
            from their own process, as in the paper's code. (CMA and IMC always use the keys of all processes.)
        use_momentum_teacher: `False` leaves teacher and queues out of the heads, for inference at half the memory.
        rerank_weight: weight of matching in the combined score, by which candidates of retrieval are ranked (see
            `evaluation/retrieval.py`); None if it was not chosen.
        trained_on: the data that the weights were trained on, `{"task": ..., "data": [...]}` for each training, from
            which evaluation derives its protocol.

    Raises:
        ValueError: for a weight, share or size outside its range.
    """

    model_type = "tcl"
    sub_configs_defaults = {"vision_config": TCLVisionConfig, "text_config": TCLTextConfig}

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    projection_dim: int = 256
    temperature_init_value: float = 0.07
    momentum: float | int = 0.995
    queue_size: int = 65536
    alpha: float | int = 0.4
    itm_negatives: int = 1
    itm_hardness: float | int = 1.0
    itm_contrast: bool = False
    mlm_probability: float | int = 0.15
    patch_dropout: float | int = 0.0
    image_pooling: str = "cls"
    text_pooling: str = "cls"
    lock_vision: bool | int = False
    lock_text: bool | int = False
    local_grid: int = 4
    cma_weight: float | int = 1 / 3
    imc_weight: float | int = 1 / 3
    lmi_weight: float | int = 1 / 3
    itm_weight: float | int = 1.0
    mlm_weight: float | int = 1.0
    gather_negatives: bool = False
    use_momentum_teacher: bool = True
    rerank_weight: float | int | None = None
    trained_on: list | None = None
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True

    @classmethod
    def from_dict(cls, config_dict: dict, image_size: int | None = None, **kwargs):
        """Make a config of its dictionary, as transformers does.

        Args:
            image_size: pixels of a side of the images in place of the dictionary's. By this argument any
                `from_pretrained` opens a checkpoint at another resolution, and resizes its positions.

        Raises:
            ValueError: for the dictionary of another model, from which transformers would take the fields that fit.
        """
        found = config_dict.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise ValueError(
                f"{config_dict.get('_name_or_path') or 'The checkpoint'} holds a '{found}' model and not a TCL: "
                "use TCLModel.from_vision_text_pretrained to start a new TCL from encoders."
            )
        if image_size is not None:
            vision_config = dict(config_dict["vision_config"]) | {"image_size": image_size}
            config_dict = config_dict | {"vision_config": vision_config}
        # transformers would set them on the finished config, unchecked and without their effect on the encoders'.
        names = cls.__annotations__.keys() & kwargs.keys() - cls.sub_configs_defaults.keys()
        config_dict = config_dict | {name: kwargs.pop(name) for name in names}
        return super().from_dict(config_dict, **kwargs)

    def __post_init__(self, **kwargs):
        parts: dict[str, Any] = {"vision_config": TCLVisionConfig, "text_config": TCLTextConfig}
        for name, config_class in parts.items():
            given: Any = getattr(self, name)
            found = given.get("model_type") if isinstance(given, dict) else getattr(given, "model_type", None)
            _check_model_type(name, found, config_class.model_type)
        super().__post_init__(**kwargs)
        self.text_config.encoder_hidden_size = self.vision_config.hidden_size
        for name in ("image_pooling", "text_pooling"):
            if getattr(self, name) not in POOLINGS:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose one of {', '.join(POOLINGS)}.")
        self.vision_config.lock = _checked_lock("lock_vision", self.lock_vision, self.vision_config.num_hidden_layers)
        self.text_config.lock = _checked_lock("lock_text", self.lock_text, self.text_config.fusion_layer)
        for name in ("momentum", "alpha", "mlm_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is not a share: choose a number from 0 to 1.")
        if not 0 <= self.patch_dropout < 1:
            raise ValueError(
                f"patch_dropout={self.patch_dropout} leaves no patch or is not a share: choose 0, which keeps all "
                "patches, or a number between 0 and 1."
            )
        if self.patch_dropout and self.vision_config.output_grid is not None:
            raise ValueError(
                f"patch_dropout={self.patch_dropout} leaves no grid of patches for vision_config.output_grid="
                f"{self.vision_config.output_grid}: choose one of them."
            )
        if self.itm_hardness < 0:
            raise ValueError(f"itm_hardness={self.itm_hardness} prefers easy negatives: choose 0, for any, or more.")
        for name in ("cma_weight", "imc_weight", "lmi_weight", "itm_weight", "mlm_weight", "queue_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is negative: choose 0, which leaves it out, or more.")
        for name in ("projection_dim", "local_grid", "itm_negatives"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more.")
        if self.rerank_weight is not None and self.rerank_weight < 0:
            raise ValueError(
                f"rerank_weight={self.rerank_weight} is negative: choose 0, which ranks by similarity alone, or more."
            )
        if not MIN_TEMPERATURE <= self.temperature_init_value <= MAX_TEMPERATURE:
            raise ValueError(
                f"temperature_init_value={self.temperature_init_value} lies outside [{MIN_TEMPERATURE}, "
                f"{MAX_TEMPERATURE}], the range in which training keeps the temperature: choose a value inside."
            )


def _checked_lock(name: str, lock: bool | int, num_layers: int) -> bool | int:
    """A lock that the encoder can have, with False in place of 0."""
    if not 0 <= lock <= num_layers:
        raise ValueError(
            f"{name}={lock} locks layers that are not there, because the encoder has {num_layers}: choose true for the "
            f"whole encoder, or 0 to {num_layers} of its lowest layers."
        )
    return lock or False


def kept_patches(num_patches: int, patch_dropout: float) -> int:
    """The number of patches of an image that are left when a share of them is dropped; at least one."""
    return max(1, round(num_patches * (1 - patch_dropout)))


def _check_sizes(where: str, config: Any) -> None:
    """Refuse sizes below 1, and those with which building the model would take hours or all memory."""
    for name, most in _MOST.items():
        size = getattr(config, name, 1)
        least = 0 if name == "num_hidden_layers" else 1
        if not least <= size <= most:
            raise ValueError(f"{where}.{name}={size} must be from {least} to {most:,}.")


def _check_heads(where: str, hidden_size: int, num_attention_heads: int) -> None:
    if num_attention_heads < 1 or hidden_size % num_attention_heads:
        raise ValueError(
            f"{where}.hidden_size={hidden_size} does not divide into {num_attention_heads} heads: "
            f"choose a divisor as {where}.num_attention_heads."
        )


__all__ = ["TCLConfig", "TCLTextConfig", "TCLVisionConfig"]
