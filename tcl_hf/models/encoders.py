"""The encoders of TCL: images, texts, and the fusion of both, with the language-model head.

A text model is one stack: its first layers encode the text alone, the others fuse it with images through
cross-attention. Shapes: B images, N texts, P image states (class token and patches), L tokens, T selected tokens,
D width, H heads. In the vision encoder, P counts the patches alone, and R the register tokens.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, BaseModelOutputWithPoolingAndCrossAttentions
from transformers.modeling_utils import load_state_dict
from transformers.utils import can_return_tuple

from .attention import KeyValue, TCLAttention
from .checksums import verify_checksums, write_checksums
from .configuration_tcl import TCLConfig, TCLTextConfig, TCLVisionConfig, kept_patches
from .fitting import fit_shapes, part_of, repeat_fusion_layers, resize_positions, why_incomplete
from .input_checks import check_fusion_rows, check_mask
from .losses import pool_locals
from .momentum import SharedModule


@contextmanager
def eval_mode(model: PreTrainedModel) -> Iterator[None]:
    """Put a model in eval mode, and afterwards back in the mode in which it came."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class TCLPreTrainedModel(PreTrainedModel):
    """Loading, saving, starting values and abilities that all TCL models share."""

    config_class = TCLConfig
    base_model_prefix = "tcl"
    main_input_name = "pixel_values"
    input_modalities: tuple[str, ...] = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["TCLVisionLayer", "TCLTextLayer", "TCLVisionEmbeddings", "TCLTextEmbeddings"]
    _keep_in_fp32_modules_strict = ["temperature", "queue.image", "queue.text"]
    # Every class opens every checkpoint of a whole model, whatever heads were saved with it.
    _keys_to_ignore_on_load_unexpected = [r"^(teacher|queue|itm_head|lm_head|cls_head|ta_head|text_decoder)\."]
    _why_incomplete: str | None = None  # the problem of the checkpoint that the model was opened from
    is_quantized = False  # transformers sets it
    accepts_loss_kwargs = False  # every loss is a mean over its own batch
    loss_names: tuple[str, ...] = ("loss",)  # the losses of the output, to be logged; None where one is not computed
    # For model cards and repositories on the Hub.
    task = "pretraining"  # the task on the card of a model of which only the class is known
    pipeline_tag: str | None = None  # the Hub's name for the ability of the class, where it has one
    auto_model: str | None = None  # the Auto class that opens it from a repository, if transformers registers none

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights, except for that of the temperature, which is always float32."""
        shared: list[Any] = [part.owned_elsewhere[0] for part in self.modules() if isinstance(part, SharedModule)]
        weights = (
            weight
            for owner in (self, *shared)
            for name, weight in owner.named_parameters()
            if not name.endswith("temperature")
        )
        return next(weight.dtype for weight in weights if weight.is_floating_point())

    def _init_weights(self, module: nn.Module) -> None:
        """Draw PyTorch's own starting values, for everything that has none of its own in an encoder."""
        if isinstance(module, nn.Linear | nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = 1 / math.sqrt(module.weight[0].numel())
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, is_main_process: bool = True, **kwargs) -> None:
        """Save as transformers does, with the checksums of the weights beside them; the arguments are the same."""
        super().save_pretrained(save_directory, *args, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            write_checksums(save_directory)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *args, strict: bool = True, **kwargs
    ) -> Any:
        """Open as transformers does, with the same arguments. The weights of a folder are first compared with their
        checksums.

        Args:
            strict: refuse a checkpoint that lacks weights of this class, or has some that it has no place for. Heads
                that the checkpoint was saved without may start new, and what the teacher lacks is copied. `False`
                opens every checkpoint, as transformers does, and what is missing has random values.

        Raises:
            OSError: if there is no such checkpoint, or a file of it is damaged.
            ValueError: if it is a checkpoint of another model than TCL, or of another number of layers, or is cut.
        """
        if pretrained_model_name_or_path is not None and os.path.isdir(pretrained_model_name_or_path):
            verify_checksums(os.path.join(pretrained_model_name_or_path, kwargs.get("subfolder", "")))
        opened = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = opened[0] if isinstance(opened, tuple) else opened  # with `output_loading_info`
        if strict and model._why_incomplete is not None:
            raise ValueError(
                f"{pretrained_model_name_or_path or 'The checkpoint'} is not a whole {cls.__name__}: "
                f"{model._why_incomplete}. Open it with the config that it was saved with, get its files again, or "
                "pass strict=False to start what is missing from random values."
            )
        return opened

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        """Note what a checkpoint lacks or has too much, before transformers leaves out what it need not warn of."""
        if not self.is_quantized:  # A quantised checkpoint has other names.
            unexpected, names = loading_info.unexpected_keys, set(self.state_dict())
            self._why_incomplete = why_incomplete(self, names, loading_info.missing_keys, unexpected)
        super()._adjust_missing_and_unexpected_keys(loading_info)

    @staticmethod
    def _load_pretrained_model(
        model: "TCLPreTrainedModel",
        state_dict: dict[str, Tensor] | None,
        checkpoint_files: list[str] | None,
        load_config: Any,
        expected_keys: list[str] | None = None,
    ):
        """Fit a checkpoint to the model before transformers loads it."""
        if state_dict is None and checkpoint_files:
            state_dict = {}
            for file in checkpoint_files:
                if str(file).endswith(".safetensors"):
                    reader = safe_open(file, framework="pt")
                    names = reader.keys()
                    state_dict.update({name: reader.get_slice(name) for name in names})
                else:
                    state_dict.update(load_state_dict(file))
        if state_dict is not None:
            fitted = model.fit_state_dict(state_dict)
            if any(fitted.get(name) is not entry for name, entry in state_dict.items()):
                # Otherwise weights that stay on disk (`device_map`) would be read without being fitted.
                checkpoint_files = None
            state_dict = fitted
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys)

    def fit_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the entries of a TCL checkpoint as this model needs them.

        An encoder alone takes its part of a whole model. Learned image positions are resized to the model's grid.
        Fusion layers are repeated where the model reads more images per text. Queues of another size are left
        out, so that new ones start. Entries may be tensors, or safetensors slices, which are not read here.
        """
        text_config = getattr(self.config, "text_config", self.config)
        if isinstance(text_config, TCLTextConfig):
            state_dict = repeat_fusion_layers(state_dict, text_config)
        shapes = {key: tuple(value.shape) for key, value in self.state_dict().items()}
        return fit_shapes(state_dict, shapes, self.base_model_prefix)


class TCLVisionEmbeddings(nn.Module):
    """Class token and patches of an image, each with a learned position, and register tokens between them."""

    def __init__(self, config: TCLVisionConfig):
        super().__init__()
        self.config = config
        grid = config.image_size // config.patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + grid * grid, config.hidden_size))
        self.patch_embedding = nn.Conv2d(
            config.num_channels,
            config.hidden_size,
            kernel_size=config.patch_size,
            stride=config.patch_size,
            bias=config.patch_bias,
        )
        if config.num_register_tokens:
            self.register_tokens = nn.Parameter(torch.zeros(1, config.num_register_tokens, config.hidden_size))
        if config.pre_layer_norm:
            self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """Embed images (B, 3, height, width): (B, 1 + R + P, D).

        Raises:
            ValueError: if they do not divide into patches, or have another size than the model and positions are not
                to be interpolated.
        """
        size, patch = self.config.image_size, self.config.patch_size
        height, width = pixel_values.shape[-2:]
        if interpolate_pos_encoding:
            if height % patch or width % patch:
                raise ValueError(
                    f"pixel_values of {height} x {width} do not divide into patches of {patch} pixels: "
                    "resize the images to multiples of the patch."
                )
        elif (height, width) != (size, size):
            raise ValueError(
                f"pixel_values of {height} x {width} do not fit the model's {size} x {size}: resize the images, "
                f"load the model with image_size={height} or pass interpolate_pos_encoding=True."
            )
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        patches = patches.flatten(2).mT  # (B, P, D)
        positions: Tensor = self.position_embeddings
        if interpolate_pos_encoding:
            positions = resize_positions(positions, self.config.grid(height, width))
        states = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1) + positions
        if self.config.num_register_tokens:
            registers = self.register_tokens.expand(states.shape[0], -1, -1)
            states = torch.cat([states[:, :1], registers, states[:, 1:]], dim=1)
        return self.layer_norm(states) if self.config.pre_layer_norm else states


def drop_patches(states: Tensor, share: float, num_register_tokens: int = 0) -> Tensor:
    """Drop a random share of each image's patches: states (B, 1 + R + P, D) become (B, 1 + R + K, D).

    Every image keeps its class token, its register tokens, and the same number of patches, at least one. All patches
    are equally likely to be kept, and they stay in order. They are drawn on the device.
    """
    first_patch = 1 + num_register_tokens
    num_images, num_patches = states.shape[0], states.shape[1] - first_patch
    num_kept = kept_patches(num_patches, share)
    # Always in float32: half precision has so few values between 0 and 1 that patches would be drawn equal.
    drawn = torch.rand(num_images, num_patches, device=states.device, dtype=torch.float32).topk(num_kept).indices
    others = torch.arange(first_patch, device=states.device).expand(num_images, -1)
    kept = torch.cat([others, drawn.sort().values + first_patch], dim=1)  # (B, 1 + R + K)
    return states.gather(1, kept[..., None].expand(-1, -1, states.shape[-1]))


def drop_register_tokens(states: Tensor, num_register_tokens: int) -> Tensor:
    """Leave out the register tokens: states (B, 1 + R + P, D) become (B, 1 + P, D)."""
    if not num_register_tokens:
        return states
    return torch.cat([states[:, :1], states[:, 1 + num_register_tokens :]], dim=1)


class TCLVisionLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer."""

    def __init__(self, config: TCLVisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = TCLAttention(config, config.attention_dropout)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.has_gate = config.use_swiglu_ffn
        # With a gate, the first half of the rows projects to it.
        self.fc1 = nn.Linear(config.hidden_size, (1 + self.has_gate) * config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, Tensor | None]:
        attended, weights = self.self_attn(self.layer_norm1(hidden_states), output_attentions=output_attentions)
        hidden_states = hidden_states + attended
        fed = self.fc1(self.layer_norm2(hidden_states))
        if self.has_gate:
            gate, fed = fed.chunk(2, dim=-1)
            fed = self.activation(gate) * fed
        else:
            fed = self.activation(fed)
        return hidden_states + self.fc2(fed), weights


class TCLVisionModel(TCLPreTrainedModel):
    """Vision transformer that returns the states of the class token and of every patch."""

    config_class = TCLVisionConfig
    base_model_prefix = "vision_model"
    input_modalities = ("image",)
    _input_embed_layer = "patch_embedding"
    _keys_to_ignore_on_load_unexpected = [r"^(tcl\.)?(text_model|visual_projection|text_projection|temperature)"]

    def __init__(self, config: TCLVisionConfig):
        super().__init__(config)
        self.embeddings = TCLVisionEmbeddings(config)
        self.layers = nn.ModuleList(TCLVisionLayer(config) for _ in range(config.num_hidden_layers))
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=std)
            init.zeros_(module.bias)
        elif isinstance(module, TCLVisionEmbeddings):
            init.trunc_normal_(module.cls_token, std=std)
            init.trunc_normal_(module.position_embeddings, std=std)
            if self.config.num_register_tokens:
                init.trunc_normal_(module.register_tokens, std=std)
        else:
            super()._init_weights(module)

    def fit_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the entries of a checkpoint, of a vision encoder or a whole model, as this model needs them."""
        return super().fit_state_dict(part_of(state_dict, self.base_model_prefix))

    @property
    def num_locked_layers(self) -> int:
        """The number of layers that are locked, counted from the lowest."""
        lock = self.config.lock
        return len(self.layers) if lock is True else int(lock)

    def locked_parts(self) -> dict[str, nn.Module]:
        """The modules that are locked, by name."""
        return _locked_parts(self, self.config.lock, self.num_locked_layers, last="layer_norm")

    @property
    def locked_shape(self) -> tuple[int, int]:
        """The shape of one image's states after the locked part of the encoder, see `encode_locked`."""
        size = self.config.image_size
        if self.config.lock is True:
            return 1 + math.prod(self.config.grid_of_states(size, size)), self.config.hidden_size
        return 1 + self.config.num_register_tokens + math.prod(self.config.grid(size, size)), self.config.hidden_size

    def encode_locked(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """States (B, 1 + R + P, D) of images (B, 3, height, width) after the locked part of the encoder.

        `forward` takes them in place of the images. If the whole encoder is locked, they are its last hidden states
        (B, 1 + P, D).
        """
        hidden_states = self.embeddings(pixel_values, interpolate_pos_encoding)
        for layer in self.layers[: self.num_locked_layers]:
            hidden_states, _ = layer(hidden_states)
        return self._last_states(hidden_states, pixel_values) if self.config.lock is True else hidden_states

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        patch_dropout: float = 0.0,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Encode images.

        Args:
            pixel_values: images (B, 3, height, width), as the image processor makes them. If the lowest layers are
                locked, their states may be given instead (B, 1 + R + P, D), see `encode_locked`.
            interpolate_pos_encoding: resize the positions to images of another size.
            output_attentions: return the attention weights of every layer (B, H, 1 + R + P, 1 + R + P).
            output_hidden_states: return the states before the first and after every layer (B, 1 + R + P, D).
            patch_dropout: share of each image's patches to drop at random, below 1; P counts the patches that are left.

        Returns:
            `last_hidden_state` (B, 1 + P, D) and `pooler_output`, its class token (B, D).

        Raises:
            ValueError: if the images' size does not fit the model.
        """
        output_attentions, output_hidden_states = _output_flags(self.config, output_attentions, output_hidden_states)
        num_register_tokens = self.config.num_register_tokens
        num_locked, num_layers = self.num_locked_layers, len(self.layers)
        are_states = pixel_values.ndim == 3
        hidden_states = self._locked_states(pixel_values) if are_states else None
        if hidden_states is None:
            hidden_states = self.embeddings(pixel_values, interpolate_pos_encoding)
        collected = None
        for number in range(num_locked if are_states else 0, num_layers):
            if patch_dropout and number == num_locked:
                hidden_states = drop_patches(hidden_states, patch_dropout, num_register_tokens)
            if collected is None:
                collected = _Collected(hidden_states, output_attentions, output_hidden_states)
            hidden_states, weights = self.layers[number](hidden_states, output_attentions)
            collected.add(hidden_states, weights)
        if not (are_states and self.config.lock is True):
            hidden_states = self._last_states(hidden_states, pixel_values)
        if patch_dropout and num_locked == num_layers:
            hidden_states = drop_patches(hidden_states, patch_dropout)
        collected = collected or _Collected(hidden_states, output_attentions, output_hidden_states)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states,
            pooler_output=hidden_states[:, 0],
            hidden_states=collected.hidden_states,
            attentions=collected.attentions,
        )

    def _last_states(self, hidden_states: Tensor, pixel_values: Tensor) -> Tensor:
        """The states that the encoder returns, of those after its last layer; `pixel_values` are its input."""
        states = self.layer_norm(drop_register_tokens(hidden_states, self.config.num_register_tokens))
        if self.config.output_grid is None:
            return states
        size = pixel_values.shape[-2:] if pixel_values.ndim == 4 else (self.config.image_size, self.config.image_size)
        regions = pool_locals(states[:, 1:], self.config.grid(*size), self.config.output_grid)
        return torch.cat([states[:, :1], regions], dim=1)

    def _locked_states(self, states: Tensor) -> Tensor:
        """States of the locked part, which were given in place of images: as `encode_locked` returns them."""
        if self.config.lock is False:
            raise ValueError(
                f"pixel_values {tuple(states.shape)} are states and not images, but no layer of the vision encoder is "
                "locked: pass images (B, 3, height, width), or load the model with lock_vision."
            )
        num_states, width = self.locked_shape
        if states.shape[1:] != (num_states, width):
            raise ValueError(
                f"pixel_values {tuple(states.shape)} are not states of this vision encoder, which are (B, "
                f"{num_states}, {width}): keep the states anew for this model and image size."
            )
        return states.to(self.dtype)


class TCLTextEmbeddings(nn.Module):
    """Word, position and token type, normalised."""

    def __init__(self, config: TCLTextConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, num_past: int = 0) -> Tensor:
        """Embed token ids (N, L), or words already embedded (N, L, D), as (N, L, D); the token type is always 0.

        Args:
            num_past: how many tokens come before these, whose keys and values are cached.

        Raises:
            ValueError: if both or none are given, or there are more tokens than positions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("A text is given as input_ids or as inputs_embeds: pass exactly one of them.")
        words = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        length, limit = num_past + words.shape[1], self.position_embeddings.num_embeddings
        if length > limit:
            raise ValueError(f"The text has {length} tokens and the model {limit} positions: truncate the text.")
        # Positions are looked up and not sliced from the weights, which `device_map` may keep on another device until
        # the layer is called.
        positions = self.position_embeddings(torch.arange(num_past, length, device=words.device))  # (L, D)
        token_type = self.token_type_embeddings(torch.zeros(1, dtype=torch.long, device=words.device))  # (1, D)
        words = words + positions + token_type
        return self.dropout(self.layer_norm(words))


class TCLTextLayer(GradientCheckpointingLayer):
    """Post-norm transformer layer; a fusion layer attends to an image between self-attention and feed-forward."""

    def __init__(self, config: TCLTextConfig, number: int):
        super().__init__()
        dropout = config.attention_probs_dropout_prob
        self.number = number  # its place in the stack, and in a cache
        self.self_attn = TCLAttention(config, dropout, is_causal=config.causal)
        self.self_attn_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        if number >= config.fusion_layer:
            projects = (number - config.fusion_layer) % config.images_per_text == 0
            self.cross_attn = TCLAttention(config, dropout, config.encoder_hidden_size if projects else 0)
            self.cross_attn_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def project_image(self, image_states: Tensor) -> KeyValue:
        """Project image states (B, P, D) to the keys and values of this layer.

        A method of the layer, so that FSDP2 can be told to gather the layer's weights for it (`training.engine`).
        """
        return self.cross_attn.key_value(image_states)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        key: Tensor | None = None,
        value: Tensor | None = None,
        image_index: Tensor | None = None,
        output_attentions: bool = False,
        image_mask: Tensor | None = None,
        cache: Cache | None = None,
        token_index: Tensor | None = None,
        text_index: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the new states (N, L, D), the self-attention weights and the cross-attention weights.

        Args:
            text_index: the row of the given states that each new row continues (N,): self-attention reads no image, and
                so it is computed once for a text that several images share.
            key, value: keys and values of the images. They are two arguments and not a tuple because re-entrant
                gradient checkpointing sees only arguments that are tensors.
            token_index: tokens (N, T) whose new states (N, T, D) are computed, with `attention_mask` for these tokens;
                all tokens if None.
        """
        text_key_value = self.self_attn.key_value(hidden_states)
        if cache is not None:
            text_key_value = cache.update(*text_key_value, self.number)
        if token_index is not None:
            hidden_states = select_tokens(hidden_states, token_index)
        attended, weights = self.self_attn(hidden_states, attention_mask, text_key_value, output_attentions)
        hidden_states = self.self_attn_layer_norm(hidden_states + self.dropout(attended))
        if text_index is not None:
            hidden_states = hidden_states.index_select(0, text_index)
        cross_weights = None
        if key is not None:
            attended, cross_weights = self.cross_attn(
                hidden_states, image_mask, (key, value), output_attentions, image_index
            )
            hidden_states = self.cross_attn_layer_norm(hidden_states + self.dropout(attended))
        fed = self.fc2(self.activation(self.fc1(hidden_states)))
        return self.final_layer_norm(hidden_states + self.dropout(fed)), weights, cross_weights


def select_tokens(states: Tensor, token_index: Tensor) -> Tensor:
    """Select tokens (N, T) of states (N, L, D): (N, T, D)."""
    return states.gather(1, token_index[..., None].expand(-1, -1, states.shape[-1]))


class TCLTextPreTrainedModel(TCLPreTrainedModel):
    """Starting values of the text model and of the language-model head."""

    config_class = TCLTextConfig
    base_model_prefix = "text_model"

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear):
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)


class TCLTextModel(TCLTextPreTrainedModel):
    """Text encoder (`encode`, the first layers) and fusion encoder (`fuse`, the others) in one stack."""

    main_input_name = "input_ids"
    input_modalities = ("text",)
    _input_embed_layer = "word_embeddings"
    _keys_to_ignore_on_load_unexpected = [r"^(tcl\.)?(vision_model|visual_projection|text_projection|temperature)"]

    def __init__(self, config: TCLTextConfig):
        super().__init__(config)
        self.embeddings = TCLTextEmbeddings(config)
        self.layers = nn.ModuleList(
            TCLTextLayer(config, number) for number in range(config.fusion_layer + config.num_fusion_layers)
        )
        self.post_init()

    def locked_parts(self) -> dict[str, nn.Module]:
        """The modules that are locked, by name."""
        lock = self.config.lock
        return _locked_parts(self, lock, self.config.fusion_layer if lock is True else int(lock))

    @property
    def fusion_layers(self) -> nn.ModuleList:
        """The layers that attend to images."""
        return self.layers[self.config.fusion_layer :]

    def fit_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the entries of a checkpoint, of a text model or a whole model, as this model needs them."""
        return super().fit_state_dict(part_of(state_dict, self.base_model_prefix))

    def encode(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        cache: Cache | None = None,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """Run the first layers on token ids (N, L) with their mask (N, L): states of the text alone (N, L, D).

        Args:
            input_ids: token ids (N, L).
            attention_mask: 1 for tokens and 0 for padding, (N, L); all are tokens if None.
            inputs_embeds: words already embedded (N, L, D), in place of the ids.
            output_attentions, output_hidden_states: return those of every layer too.
            cache: keys and values of tokens before these.

        Raises:
            ValueError: if the mask is that of other texts.
        """
        num_past = cache.get_seq_length() if cache is not None else 0
        hidden_states = self.embeddings(input_ids, inputs_embeds, num_past)
        check_mask(attention_mask, hidden_states.shape[0], hidden_states.shape[1] if cache is None else None)
        mask = self._mask(hidden_states, attention_mask, cache)
        collected = _Collected(hidden_states, output_attentions, output_hidden_states)
        for layer in self.layers[: self.config.fusion_layer]:
            hidden_states, weights, _ = layer(hidden_states, mask, output_attentions=output_attentions, cache=cache)
            collected.add(hidden_states, weights)
        return _text_output(hidden_states, collected)

    def project_images(self, images: Tensor | tuple[Tensor, ...]) -> list[KeyValue]:
        """Project image states (B, P, D), once, to the keys and values of every fusion layer.

        Where a text has several images, fusion layer i reads `images[i % len(images)]`. Copies of a layer share the
        projection.
        """
        images = (images,) if isinstance(images, Tensor) else images
        copies, layers = self.config.images_per_text, self.fusion_layers
        return [layers[i - i % copies].project_image(images[i % len(images)]) for i in range(len(layers))]

    def fuse(
        self,
        text_states: Tensor,
        attention_mask: Tensor | None,
        images: list[KeyValue],
        image_index: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        image_mask: Tensor | None = None,
        cache: Cache | None = None,
        token_index: Tensor | None = None,
        text_index: Tensor | None = None,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """Run the fusion layers on states of texts (N, L, D), each attending to one of B images.

        With `text_index`, the T texts given are fewer than the N rows, and `attention_mask` and `token_index` are those
        of the texts.

        Args:
            images: keys and values for each fusion layer, from `project_images`.
            image_index: the image of each text (N,). Without it every image serves N / B consecutive texts, and nothing
                is copied.
            image_mask: 1 for image states that count, 0 for others (B, P); all count if None. (The decoder of answers
                reads a question as its "image", and questions are padded.)
            cache: keys and values of the tokens before these, to which those of these tokens are added.
            token_index: tokens (N, T) whose last states (N, T, D) are needed; all tokens if None. The last layer does
                not compute the others, if the attention implementation permits it; the states and weights that it
                returns, if asked for, are then of these tokens alone.
            text_index: the text of each row (N,). What the first layer does before it reads an image is then computed
                once for each text.

        Raises:
            ValueError: if texts, images and indices do not belong together, for example 4 texts with 3 images and no
                `image_index`; if `text_index` comes with `image_mask`, `cache`, or states or weights to return.
        """
        if text_index is not None and (
            image_mask is not None or cache is not None or output_attentions or output_hidden_states
        ):
            raise ValueError(
                "text_index shares texts among rows, which works without image_mask, cache, output_attentions and "
                "output_hidden_states alone: select the texts of the rows before fusing them."
            )
        self._check_rows(text_states, attention_mask, images, image_index, image_mask, cache, token_index, text_index)
        mask = self._mask(text_states, attention_mask, cache)
        if image_mask is not None:
            image_mask = self._image_mask(text_states, image_mask, image_index)
        # A causal mask, and a mask of padding for flash attention, assume that queries end where the keys end.
        needs_all = self.config.causal or "flash" in (self.config._attn_implementation or "")
        last_layer_selects = token_index is not None and not needs_all and len(self.fusion_layers) > 0
        collected = _Collected(text_states, output_attentions, output_hidden_states)
        for layer, (key, value) in zip(self.fusion_layers, images, strict=True):
            selects = last_layer_selects and layer is self.layers[-1]
            is_first = layer is self.fusion_layers[0]
            if selects and mask is not None:
                mask = self._mask(text_states, attention_mask, cache, token_index)
            text_states, weights, cross_weights = layer(
                text_states,
                mask,
                key,
                value,
                image_index,
                output_attentions,
                image_mask,
                cache,
                token_index if selects else None,
                text_index if is_first else None,
            )
            if text_index is not None and is_first:
                token_index = None if token_index is None else token_index.index_select(0, text_index)
                if attention_mask is not None and layer is not self.layers[-1]:
                    attention_mask = attention_mask.index_select(0, text_index)
                    mask = self._mask(text_states, attention_mask, cache)
            collected.add(text_states, weights, cross_weights)
        if token_index is not None and not last_layer_selects:
            text_states = select_tokens(text_states, token_index)
        return _text_output(text_states, collected)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | tuple[Tensor, ...] | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        image_index: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """Encode texts and, if images are given, fuse them.

        Args:
            input_ids: token ids (N, L).
            attention_mask: 1 for tokens, 0 for padding (N, L).
            inputs_embeds: embedded words (N, L, D) in place of `input_ids`.
            encoder_hidden_states: states of the images (B, P, D); a tuple of them for several images per text.
            image_index: the image of each text (N,). Without it every image serves N / B neighbouring texts.
            output_attentions: return the weights of every layer that ran, (N, H, L, L) and (N, H, L, P).
            output_hidden_states: return the states before the first and after every layer that ran.

        Returns:
            `last_hidden_state` (N, L, D) and `pooler_output`, its first token (N, D).

        Raises:
            ValueError: if texts, images and their index do not belong together, as for `fuse`.
        """
        output_flags = _output_flags(self.config, output_attentions, output_hidden_states)
        text = self.encode(input_ids, attention_mask, inputs_embeds, *output_flags)
        if encoder_hidden_states is None:
            return text
        images = self.project_images(encoder_hidden_states)
        fused = self.fuse(text.last_hidden_state, attention_mask, images, image_index, *output_flags)
        if text.hidden_states is not None:
            fused.hidden_states = text.hidden_states + fused.hidden_states[1:]
        if text.attentions is not None:
            fused.attentions = text.attentions + fused.attentions
        return fused

    def _check_rows(
        self,
        text_states: Tensor,
        attention_mask: Tensor | None,
        images: list[KeyValue],
        image_index: Tensor | None,
        image_mask: Tensor | None,
        cache: Cache | None,
        token_index: Tensor | None,
        text_index: Tensor | None,
    ) -> None:
        """Refuse arguments of `fuse` that do not belong together."""
        num_texts, length = text_states.shape[:2]
        num_images = [key.shape[0] for key, _ in images]
        indices = (image_index, text_index, token_index)
        length_of_mask = length if cache is None else None
        check_fusion_rows(num_texts, length_of_mask, attention_mask, num_images, image_mask, *indices, self.training)

    def _mask(
        self, states: Tensor, attention_mask: Tensor | None, cache: Cache | None, token_index: Tensor | None = None
    ) -> Tensor | None:
        """The tokens to which each token of states (N, L, D), or each token of `token_index` (N, T), attends.

        The mask has the form that the attention implementation needs; None if there is nothing to mask.
        """
        if self.config.causal:
            return create_causal_mask(self.config, states, attention_mask, cache)
        if attention_mask is None:
            return None
        queries = states if token_index is None else states.new_empty(*token_index.shape, 0)
        # To skip a mask of ones, transformers would have to read it back from the device.
        return create_bidirectional_mask(
            self.config, queries, attention_mask, states, allow_is_bidirectional_skip=False
        )

    def _image_mask(self, states: Tensor, image_mask: Tensor, image_index: Tensor | None) -> Tensor:
        """The image states (B, P) to which texts attend; neighbours that share an image are one row of queries."""
        if image_index is not None:
            image_mask = image_mask.index_select(0, image_index)
        queries = states.reshape(image_mask.shape[0], -1, states.shape[-1])
        keys = states.new_empty(*image_mask.shape, 0)
        return create_bidirectional_mask(self.config, queries, image_mask, keys, allow_is_bidirectional_skip=False)


class TCLLMHead(TCLTextPreTrainedModel):
    """Language-model head: from states (..., D) to logits over the vocabulary (..., V)."""

    def __init__(self, config: TCLTextConfig):
        super().__init__(config)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.decoder(self.layer_norm(self.activation(self.dense(hidden_states))))


class PredictsWords:
    """A model with a language-model head `lm_head`, whose last weights are the word embeddings."""

    lm_head: Any
    _tied_weights_keys: Any = {"lm_head.decoder.weight": "tcl.text_model.embeddings.word_embeddings.weight"}

    def get_output_embeddings(self) -> nn.Module:
        """The layer from states to words, whose weights are the word embeddings."""
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the layer from states to words."""
        self.lm_head.decoder = new_embeddings


def _locked_parts(encoder: Any, lock: bool | int, num_layers: int, last: str | None = None) -> dict[str, nn.Module]:
    """The embeddings and the lowest layers of an encoder, and its module `last` if the whole encoder is locked."""
    if lock is False:
        return {}
    parts = {"embeddings": encoder.embeddings} | {f"layers.{n}": encoder.layers[n] for n in range(num_layers)}
    if lock is True and last is not None:
        parts[last] = getattr(encoder, last)
    return parts


class _Collected:
    """The states and weights of a stack of layers, if they were asked for."""

    def __init__(self, hidden_states: Tensor, output_attentions: bool, output_hidden_states: bool):
        self.hidden_states: tuple[Tensor, ...] | None = (hidden_states,) if output_hidden_states else None
        self.attentions: tuple[Tensor, ...] | None = () if output_attentions else None
        self.cross_attentions: tuple[Tensor, ...] | None = () if output_attentions else None

    def add(self, hidden_states: Tensor, weights: Tensor | None, cross_weights: Tensor | None = None) -> None:
        if self.hidden_states is not None:
            self.hidden_states += (hidden_states,)
        if self.attentions is not None and weights is not None:
            self.attentions += (weights,)
        if self.cross_attentions is not None and cross_weights is not None:
            self.cross_attentions += (cross_weights,)


def _text_output(hidden_states: Tensor, collected: _Collected) -> BaseModelOutputWithPoolingAndCrossAttentions:
    return BaseModelOutputWithPoolingAndCrossAttentions(
        last_hidden_state=hidden_states,
        pooler_output=hidden_states[:, 0],
        hidden_states=collected.hidden_states,
        attentions=collected.attentions,
        cross_attentions=collected.cross_attentions or None,
    )


def _output_flags(config: Any, output_attentions: bool | None, output_hidden_states: bool | None) -> tuple[bool, bool]:
    """Whether to return attentions and hidden states: as the caller asked, or else as the config does."""
    attentions = getattr(config, "output_attentions", False) if output_attentions is None else output_attentions
    hidden = config.output_hidden_states if output_hidden_states is None else output_hidden_states
    return bool(attentions), bool(hidden)
