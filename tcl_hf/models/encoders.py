"""The encoders of TCL: images, texts, and the fusion of both, with the language-model head.

A text model is one stack: its first layers encode the text alone, the others fuse it with images through
cross-attention. Shapes: B images, N texts, P image states (class token and patches), L tokens, D width,
H heads.
"""

import math
import os
import re
from collections.abc import Callable
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, BaseModelOutputWithPoolingAndCrossAttentions
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, load_state_dict
from transformers.utils import can_return_tuple

from .checksums import verify_checksums, write_checksums
from .configuration_tcl import TCLConfig, TCLTextConfig, TCLVisionConfig, kept_patches

KeyValue = tuple[Tensor, Tensor]
_IMAGE_POSITIONS = re.compile(r"(^|vision_model\.)embeddings\.position_embeddings$")
_TEXT_LAYER = re.compile(r"(?P<stack>|(.*\.)?text_model\.)layers\.(?P<number>\d+)\.(?P<name>.*)")
_CROSS_KEY_VALUE = re.compile(r"\.cross_attn\.[kv]_proj\.")


class TCLPreTrainedModel(PreTrainedModel):
    """Loading, starting values and abilities that all TCL models share."""

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
    # For model cards and repositories on the Hub.
    task = "pretraining"  # the task on the card of a model of which only the class is known
    pipeline_tag: str | None = None  # the Hub's name for the ability of the class, where it has one
    auto_model: str | None = None  # the Auto class that opens it from a repository, if transformers registers none

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights: not that of the temperature, which comes first and stays float32 in any."""
        weights = (weight for name, weight in self.named_parameters() if not name.endswith("temperature"))
        return next(weight.dtype for weight in weights if weight.is_floating_point())

    def _init_weights(self, module: nn.Module) -> None:
        """PyTorch's own starting values for everything that is not a part of an encoder."""
        if isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = 1 / math.sqrt(module.in_features)
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, is_main_process: bool = True, **kwargs) -> None:
        """Save as transformers does, with the checksums of the weights beside them; arguments as there."""
        super().save_pretrained(save_directory, *args, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            write_checksums(save_directory)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, *args, **kwargs) -> Any:
        """Open as transformers does; a folder's weights are compared with their checksums first. Arguments as there.

        Raises:
            OSError: if there is no such checkpoint, or a file of it is damaged.
            ValueError: if it is another model's.
        """
        if pretrained_model_name_or_path is not None and os.path.isdir(pretrained_model_name_or_path):
            verify_checksums(os.path.join(pretrained_model_name_or_path, kwargs.get("subfolder", "")))
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

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
                checkpoint_files = None  # weights left on disk (`device_map`) would be read from there, not fitted
            state_dict = fitted
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys)

    def fit_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the entries of a TCL checkpoint as this model needs them.

        An encoder alone takes its part of a whole model. Learned image positions are resized to the model's grid.
        Fusion layers are repeated where the model reads more images per text. Queues of another size are left
        out, so that new ones start. Entries may be tensors or safetensors slices, which stay unread.
        """
        text_config = getattr(self.config, "text_config", self.config)
        if isinstance(text_config, TCLTextConfig):
            state_dict = repeat_fusion_layers(state_dict, text_config)
        shapes = {key: tuple(value.shape) for key, value in self.state_dict().items()}
        prefix = f"{self.base_model_prefix}."
        fitted = {}
        for key, value in state_dict.items():
            shape = shapes.get(key, shapes.get(prefix + key, shapes.get(key.removeprefix(prefix))))
            found = shape_of(value)
            if shape is not None and shape != found:
                if _IMAGE_POSITIONS.search(key) and shape[-1] == found[-1]:
                    value = resize_positions(value[:], math.isqrt(shape[1] - 1))
                elif key.startswith("queue."):
                    return self.fit_state_dict({k: v for k, v in state_dict.items() if not k.startswith("queue.")})
            fitted[key] = value
        return fitted


def shape_of(entry: Any) -> tuple[int, ...]:
    """The shape of an entry of a checkpoint: a tensor, or a safetensors slice."""
    return tuple(entry.shape if isinstance(entry, Tensor) else entry.get_shape())


def copy_of(entry: Any) -> Tensor:
    """A copy of an entry of a checkpoint; the entry itself under two names would be one memory for two weights."""
    return entry[:].clone()


def part_of(state_dict: dict[str, Any], part: str) -> dict[str, Any]:
    """The entries of one encoder of a whole model, in the encoder's own names; all of them if it is no whole model."""
    cut = {key: key.removeprefix("tcl.") for key in state_dict if not key.startswith("teacher.")}
    whole = {key: name.removeprefix(f"{part}.") for key, name in cut.items() if name.startswith(f"{part}.")}
    return {name: state_dict[key] for key, name in whole.items()} or state_dict


def repeat_fusion_layers(state_dict: dict[str, Any], config: TCLTextConfig) -> dict[str, Any]:
    """Make `images_per_text` copies of every fusion layer of a checkpoint that has one of each.

    Layer `fusion_layer + i` becomes those from `fusion_layer + images_per_text * i` on; keys and values stay with the
    first of them, which all share. A checkpoint that has the copies already is returned as it is.
    """
    copies, first = config.images_per_text, config.fusion_layer
    layers = {key: match for key in state_dict if (match := _TEXT_LAYER.fullmatch(key))}
    num_layers = 1 + max((int(match["number"]) for match in layers.values()), default=-1)
    if copies == 1 or num_layers != config.num_hidden_layers:
        return state_dict
    repeated = {}
    for key, value in state_dict.items():
        number = int(layers[key]["number"]) if key in layers else -1
        if number < first:
            repeated[key] = value
            continue
        for copy in range(copies):
            if copy == 0 or not _CROSS_KEY_VALUE.search(key):
                place = first + copies * (number - first) + copy
                name = f"{layers[key]['stack']}layers.{place}.{layers[key]['name']}"
                repeated[name] = value if copy == 0 else copy_of(value)
    return repeated


def resize_positions(positions: Tensor, grid: int | tuple[int, int]) -> Tensor:
    """Resize learned positions (1, 1 + P, D) of a square grid to another grid, bicubically; the class token's stays.

    Raises:
        ValueError: if the patches are not a square grid.
    """
    grid = (grid, grid) if isinstance(grid, int) else grid
    old_grid = math.isqrt(positions.shape[1] - 1)
    if old_grid * old_grid != positions.shape[1] - 1:
        raise ValueError(f"{positions.shape[1] - 1} patch positions are not a square grid: they can not be resized.")
    if grid == (old_grid, old_grid):
        return positions
    planes = positions[:, 1:].mT.unflatten(-1, (old_grid, old_grid))  # (1, D, old, old)
    planes = F.interpolate(planes.float(), size=grid, mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], planes.flatten(-2).mT.to(positions.dtype)], dim=1)


def drop(states: Tensor, p: float, training: bool) -> Tensor:
    """Dropout, as `F.dropout`; on a CPU from 31 random bits a number, which are drawn in a third of its time."""
    if not training or not 0 < p < 1 or states.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(states, p, training)
    kept = torch.empty(states.shape, dtype=torch.int32, device=states.device).random_() >= round(p * 2**31)
    return states * (kept / (1 - p)).to(states.dtype)


class TCLDropout(nn.Dropout):
    """A module for `drop`."""

    def forward(self, states: Tensor) -> Tensor:
        return drop(states, self.p, self.training)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    is_causal: bool = False,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Textbook attention that also returns its weights (N, H, L, P)."""
    scores = (query * scaling) @ key.mT  # a query has fewer numbers than it has scores
    if attention_mask is None and is_causal and query.shape[2] > 1:  # masks that say no more are left out for sdpa
        attention_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    output = drop(weights, dropout, module.training) @ value
    return output.transpose(1, 2).contiguous(), weights


class TCLAttention(nn.Module):
    """Multi-head attention of hidden states to themselves, or to keys and values made elsewhere.

    Args:
        key_value_size: width of the states that keys and values are made of; 0 for an attention that is always given
            those of another.
        is_causal: a query sees the keys up to its own.
    """

    def __init__(
        self,
        config: TCLVisionConfig | TCLTextConfig,
        dropout: float,
        key_value_size: int | None = None,
        is_causal: bool = False,
    ):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = dropout
        self.is_causal = is_causal
        key_value_size = config.hidden_size if key_value_size is None else key_value_size
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        if key_value_size:
            self.k_proj = nn.Linear(key_value_size, config.hidden_size)
            self.v_proj = nn.Linear(key_value_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def key_value(self, states: Tensor) -> KeyValue:
        """Project states (B, P, D) to keys and values, each (B, H, P, D / H)."""
        key, value = self.k_proj(states), self.v_proj(states)
        return tuple(x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in (key, value))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        key_value: KeyValue | None = None,
        output_attentions: bool = False,
        index: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from hidden states (N, L, D); return states of the same shape and, if asked for, the weights.

        Args:
            key_value: keys and values of B rows; those of the hidden states themselves if None. Each serves N / B
                neighbours.
            index: which of the B serves each of the last R rows (R,); the first N - R are served as neighbours.
        """
        key, value = key_value if key_value is not None else self.key_value(hidden_states)
        query = self.q_proj(hidden_states)
        what = (attention_mask, output_attentions)
        if index is None:
            output, weights = self._attend(query, key, value, *what)
        else:
            chosen = key.index_select(0, index), value.index_select(0, index)
            neighbours, others = query.split((query.shape[0] - index.shape[0], index.shape[0]))
            output, weights = self._attend(others, *chosen, *what)
            if index.shape[0] != query.shape[0]:
                first, first_weights = self._attend(neighbours, key, value, *what)
                output = torch.cat([first, output])
                weights = torch.cat([first_weights, weights]) if output_attentions else None
        return self.out_proj(output), weights

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, output_attentions: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from projected queries (N, L, D) to keys and values of B rows (B, H, P, D / H).

        The N / B neighbours that a row serves are laid out as one longer row of queries, so that nothing is copied.
        """
        num_rows, length, _ = query.shape
        implementation = self.config._attn_implementation
        if output_attentions:
            implementation = _implementation_with_weights(implementation)
        elif implementation == "sdpa" and self.training and self.dropout and query.device.type == "cpu":
            # PyTorch has no fused kernel for dropout there, and its plain one scales the keys beside the queries.
            implementation = "eager"
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output, weights = attend(
            self,
            # Shapes and not `len`, which would fix the number for torch.export.
            query.view(key.shape[0], -1, key.shape[1], self.head_dim).transpose(1, 2),  # (B, H, N / B * L, D / H)
            key,
            value,
            attention_mask,
            dropout=self.dropout if self.training else 0.0,
            scaling=self.scaling,
            is_causal=self.is_causal,
        )
        if output_attentions and key.shape[0] != num_rows:  # (B, H, N / B * L, P) -> (N, H, L, P)
            weights = weights.unflatten(2, (-1, length)).transpose(1, 2).flatten(0, 1)
        return output.reshape(num_rows, length, -1), weights if output_attentions else None


def _implementation_with_weights(implementation: str | None) -> str:
    if implementation in (None, "eager", "sdpa"):
        return "eager"
    raise ValueError(
        f"attn_implementation='{implementation}' has no attention weights to return: "
        "load the model with attn_implementation='sdpa' or 'eager' for output_attentions=True."
    )


def select_tokens(states: Tensor, positions: Tensor) -> Tensor:
    """The states (N, M, D) at positions (N, M) of states (N, L, D)."""
    return states.gather(1, positions[..., None].expand(-1, -1, states.shape[-1]))


class TCLVisionEmbeddings(nn.Module):
    """Patches of an image, preceded by a class token, each with a learned position."""

    def __init__(self, config: TCLVisionConfig):
        super().__init__()
        self.config = config
        grid = config.image_size // config.patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + grid * grid, config.hidden_size))
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """Embed images (B, 3, height, width): (B, 1 + P, D)."""
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
        positions = self.position_embeddings
        if interpolate_pos_encoding:
            positions = resize_positions(positions, (height // patch, width // patch))
        return torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1) + positions


def drop_patches(states: Tensor, share: float) -> Tensor:
    """Keep the class token and so many random patches of each image: (B, 1 + P, D) becomes (B, 1 + K, D).

    The same number of every image, at least one; any is as likely as another, and they stay in their order. They are
    drawn on the device.
    """
    num_images, num_patches = states.shape[0], states.shape[1] - 1
    num_kept = kept_patches(num_patches, share)
    # float32 whatever the states are: the few values of half precision would be drawn twice.
    drawn = torch.rand(num_images, num_patches, device=states.device, dtype=torch.float32).topk(num_kept).indices
    kept = F.pad(drawn.sort().values + 1, (1, 0))  # (B, 1 + K), the class token's 0 first
    return states.gather(1, kept[..., None].expand(-1, -1, states.shape[-1]))


class TCLVisionLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer."""

    def __init__(self, config: TCLVisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = TCLAttention(config, config.attention_dropout)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, Tensor | None]:
        attended, weights = self.self_attn(self.layer_norm1(hidden_states), output_attentions=output_attentions)
        hidden_states = hidden_states + attended
        fed = self.fc2(self.activation(self.fc1(self.layer_norm2(hidden_states))))
        return hidden_states + fed, weights


class TCLVisionModel(TCLPreTrainedModel):
    """Vision transformer that returns the states of the class token and of every patch."""

    config_class = TCLVisionConfig
    base_model_prefix = "vision_model"
    input_modalities = ("image",)
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
        elif isinstance(module, nn.Conv2d):  # PyTorch's own values
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            bound = 1 / math.sqrt(module.weight[0].numel())
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Module:
        """The convolution that embeds patches."""
        return self.embeddings.patch_embedding

    def fit_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the entries of a checkpoint, of a vision encoder or a whole model, as this model needs them."""
        return super().fit_state_dict(part_of(state_dict, self.base_model_prefix))

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
            pixel_values: images (B, 3, height, width), as the image processor makes them.
            interpolate_pos_encoding: resize the positions to images of another size.
            output_attentions: return the attention weights of every layer (B, H, 1 + P, 1 + P).
            output_hidden_states: return the states before the first and after every layer.
            patch_dropout: leave out a random share of each image's patches, below 1; P counts those that are kept.

        Returns:
            `last_hidden_state` (B, 1 + P, D) and `pooler_output`, its class token (B, D).

        Raises:
            ValueError: if the images' size does not fit the model.
        """
        output_attentions, output_hidden_states = _what_to_output(self.config, output_attentions, output_hidden_states)
        hidden_states = self.embeddings(pixel_values, interpolate_pos_encoding)
        if patch_dropout:
            hidden_states = drop_patches(hidden_states, patch_dropout)
        collected = _Collected(hidden_states, output_attentions, output_hidden_states)
        for layer in self.layers:
            hidden_states, weights = layer(hidden_states, output_attentions)
            collected.add(hidden_states, weights)
        hidden_states = self.layer_norm(hidden_states)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states,
            pooler_output=hidden_states[:, 0],
            hidden_states=collected.hidden_states,
            attentions=collected.attentions,
        )


class TCLTextEmbeddings(nn.Module):
    """Word, position and token type, normalised."""

    def __init__(self, config: TCLTextConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = TCLDropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, num_past: int = 0) -> Tensor:
        """Embed token ids (N, L), or words already embedded (N, L, D); the token type is always 0.

        `num_past` tokens stand before them.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("A text is given as input_ids or as inputs_embeds: pass exactly one of them.")
        words = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        length, limit = num_past + words.shape[1], self.position_embeddings.num_embeddings
        if length > limit:
            raise ValueError(f"The text has {length} tokens and the model {limit} positions: truncate the text.")
        # Looked up and not sliced from the weights, which may be elsewhere until a layer is called (`device_map`).
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
        self.dropout = TCLDropout(config.hidden_dropout_prob)

    def project_image(self, image_states: Tensor) -> KeyValue:
        """Project image states (B, P, D) to the keys and values of this layer; its own method, see `sharding`."""
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
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the new states (N, L, D), the self-attention weights and the cross-attention weights.

        `key` and `value` are those of images. They are two arguments and not a pair because re-entrant
        gradient checkpointing sees tensors only. With `positions` (N, M) the new states are those of these tokens,
        (N, M, D), and the mask is theirs.
        """
        own = self.self_attn.key_value(hidden_states)
        if cache is not None:
            own = cache.update(*own, self.number)
        if positions is not None:
            hidden_states = select_tokens(hidden_states, positions)
        attended, weights = self.self_attn(hidden_states, attention_mask, own, output_attentions)
        hidden_states = self.self_attn_layer_norm(hidden_states + self.dropout(attended))
        cross_weights = None
        if key is not None:
            attended, cross_weights = self.cross_attn(
                hidden_states, image_mask, (key, value), output_attentions, image_index
            )
            hidden_states = self.cross_attn_layer_norm(hidden_states + self.dropout(attended))
        fed = self.fc2(self.activation(self.fc1(hidden_states)))
        return self.final_layer_norm(hidden_states + self.dropout(fed)), weights, cross_weights


class TCLTextPreTrainedModel(TCLPreTrainedModel):
    """Starting values of everything that belongs to the text: the text model and the language-model head."""

    config_class = TCLTextConfig
    base_model_prefix = "text_model"

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear):
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)


class TCLTextModel(TCLTextPreTrainedModel):
    """Text encoder (`encode`, the first layers) and fusion encoder (`fuse`, the others) in one stack."""

    main_input_name = "input_ids"
    input_modalities = ("text",)
    _keys_to_ignore_on_load_unexpected = [r"^(tcl\.)?(vision_model|visual_projection|text_projection|temperature)"]

    def __init__(self, config: TCLTextConfig):
        super().__init__(config)
        self.embeddings = TCLTextEmbeddings(config)
        self.layers = nn.ModuleList(
            TCLTextLayer(config, number) for number in range(config.fusion_layer + config.num_fusion_layers)
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The word embeddings."""
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embeddings."""
        self.embeddings.word_embeddings = value

    @property
    def fusion_layers(self) -> nn.ModuleList:
        """The layers that attend to images."""
        return self.layers[self.config.fusion_layer :]

    def fit_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the entries of a checkpoint, of a text model or a whole one, as this model needs them."""
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
        """Run the first layers on token ids (N, L) with their mask (N, L): states of the text alone (N, L, D)."""
        num_past = cache.get_seq_length() if cache is not None else 0
        hidden_states = self.embeddings(input_ids, inputs_embeds, num_past)
        mask = self._mask(hidden_states, attention_mask, cache)
        collected = _Collected(hidden_states, output_attentions, output_hidden_states)
        for layer in self.layers[: self.config.fusion_layer]:
            hidden_states, weights, _ = layer(hidden_states, mask, output_attentions=output_attentions, cache=cache)
            collected.add(hidden_states, weights)
        return _text_output(hidden_states, collected)

    def project_images(self, images: Tensor | tuple[Tensor, ...]) -> list[KeyValue]:
        """Project image states (B, P, D), once, to the keys and values of every fusion layer.

        Of several images, fusion layer i reads `images[i % len(images)]`; copies of a layer share the projection.
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
        positions: Tensor | None = None,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """Run the fusion layers on states of texts (N, L, D), each attending to one of B images.

        Args:
            images: keys and values for each fusion layer, from `project_images`.
            image_index: the image of each text (N,), or of each of the last R texts (R,). Without it, and before these,
                every image serves as many neighbouring texts as any other; then nothing is copied.
            image_mask: which of the images' states count (B, P); all if None. (A decoder of answers reads a question
                as its "image", and questions are padded.)
            cache: keys and values of the tokens before, which these are added to.
            positions: tokens whose last states are wanted (N, M). The last layer computes no others, where the
                attention implementation lets it; its states and weights, if asked for, are then of these alone.
        """
        mask = self._mask(text_states, attention_mask, cache)
        if image_mask is not None:
            image_mask = self._image_mask(text_states, image_mask, image_index)
        # A causal mask, and the flash backend's of padding, are for queries that end where the keys end.
        needs_all = self.config.causal or "flash" in (self.config._attn_implementation or "")
        at_last = None if needs_all or not self.fusion_layers else positions
        collected = _Collected(text_states, output_attentions, output_hidden_states)
        for layer, (key, value) in zip(self.fusion_layers, images, strict=True):
            chosen = at_last if layer is self.layers[-1] else None
            if chosen is not None and mask is not None:
                mask = self._mask(text_states, attention_mask, cache, chosen)
            text_states, weights, cross_weights = layer(
                text_states, mask, key, value, image_index, output_attentions, image_mask, cache, chosen
            )
            collected.add(text_states, weights, cross_weights)
        if positions is not None and at_last is None:
            text_states = select_tokens(text_states, positions)
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
            encoder_hidden_states: states of the images (B, P, D); several per text as a tuple.
            image_index: the image of each text (N,). Without it every image serves N / B neighbouring texts.
            output_attentions: return the weights of every layer that ran, (N, H, L, L) and (N, H, L, P).
            output_hidden_states: return the states before the first and after every layer that ran.

        Returns:
            `last_hidden_state` (N, L, D) and `pooler_output`, its first token (N, D).
        """
        what = _what_to_output(self.config, output_attentions, output_hidden_states)
        text = self.encode(input_ids, attention_mask, inputs_embeds, *what)
        if encoder_hidden_states is None:
            return text
        images = self.project_images(encoder_hidden_states)
        fused = self.fuse(text.last_hidden_state, attention_mask, images, image_index, *what)
        if text.hidden_states is not None:
            fused.hidden_states = text.hidden_states + fused.hidden_states[1:]
        if text.attentions is not None:
            fused.attentions = text.attentions + fused.attentions
        return fused

    def _mask(
        self,
        states: Tensor,
        attention_mask: Tensor | None,
        cache: Cache | None,
        positions: Tensor | None = None,
    ) -> Tensor | None:
        """Which tokens each token of states (N, L, D), or each at the positions (N, M), sees.

        It is as the attention implementation wants it.
        """
        if self.config.causal:
            return create_causal_mask(self.config, states, attention_mask, cache)
        if attention_mask is None:
            return None
        queries = states if positions is None else states.new_empty(*positions.shape, 0)
        # Skipping a mask of ones would mean reading it back from the device.
        return create_bidirectional_mask(
            self.config, queries, attention_mask, states, allow_is_bidirectional_skip=False
        )

    def _image_mask(self, states: Tensor, image_mask: Tensor, image_index: Tensor | None) -> Tensor:
        """Which image states (B, P) the texts see: neighbours that share an image are one row of queries."""
        if image_index is not None:
            if image_index.shape[0] != states.shape[0]:
                raise ValueError(
                    f"image_mask needs the image of every text, but image_index has {image_index.shape[0]} of "
                    f"{states.shape[0]}: pass it for all texts, or leave it out."
                )
            image_mask = image_mask.index_select(0, image_index)
        queries = states.reshape(image_mask.shape[0], -1, states.shape[-1])
        keys = states.new_empty(*image_mask.shape, 0)
        return create_bidirectional_mask(self.config, queries, image_mask, keys, allow_is_bidirectional_skip=False)


class TCLLMHead(TCLTextPreTrainedModel):
    """From states (..., D) to logits over the vocabulary (..., V)."""

    def __init__(self, config: TCLTextConfig):
        super().__init__(config)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.decoder(self.layer_norm(self.activation(self.dense(hidden_states))))


class _Collected:
    """What a stack of layers was asked to return besides its last states."""

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


def _what_to_output(
    config: Any, output_attentions: bool | None, output_hidden_states: bool | None
) -> tuple[bool, bool]:
    """What the caller asked for, or else the config."""
    attentions = getattr(config, "output_attentions", False) if output_attentions is None else output_attentions
    hidden = config.output_hidden_states if output_hidden_states is None else output_hidden_states
    return bool(attentions), bool(hidden)
