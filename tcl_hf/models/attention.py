"""Multi-head attention of the encoders: to hidden states themselves, or to images that several texts share.

Shapes: N rows of queries, B rows of keys and values, L queries of a row, P keys of a row, D width, H heads.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_tcl import TCLTextConfig, TCLVisionConfig

KeyValue = tuple[Tensor, Tensor]


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
    """Textbook attention that also returns its weights (N, H, L, P), with the interface of transformers.

    Args:
        module: the layer; dropout is applied while it is in training mode.
        query: (N, H, L, D).
        key, value: (N, H, P, D).
        attention_mask: added to the scores, (N or 1, 1, L or 1, P); None for none.
        scaling: factor of the scores.
        dropout: share of the weights that are dropped.
        is_causal: whether a query sees only keys up to its own position.
    """
    scores = (query * scaling) @ key.mT  # a query has fewer numbers than it has scores
    if (
        attention_mask is None and is_causal and query.shape[2] > 1
    ):  # transformers leaves out masks that are causal only
        attention_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    output = F.dropout(weights, dropout, module.training) @ value
    return output.transpose(1, 2).contiguous(), weights


class TCLAttention(nn.Module):
    """Multi-head attention of hidden states to themselves, or to given keys and values.

    Args:
        key_value_size: width of the states from which keys and values are projected, the config's `hidden_size` if
            None; 0 for an attention without these projections, which is always given keys and values.
        is_causal: a query attends to the keys up to its own position.
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
        self.avoids_slow_kernels = True  # False where a step on CPU tensors stands for one on a GPU
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
            key_value: keys and values of B rows; those of the hidden states themselves if None. Each of the B rows
                serves N / B neighbouring rows of queries, which are laid out as one longer row, so that nothing is
                copied.
            index: the row of keys and values for each row of queries (N,).
        """
        key, value = key_value if key_value is not None else self.key_value(hidden_states)  # (B, H, P, D / H)
        if index is not None:
            key, value = key.index_select(0, index), value.index_select(0, index)
        num_rows, length, _ = hidden_states.shape
        implementation = self.config._attn_implementation
        if output_attentions:
            implementation = _implementation_with_weights(implementation)
        # Shapes and not `len`, which would fix the number for torch.export.
        query = self.q_proj(hidden_states).view(key.shape[0], -1, key.shape[1], self.head_dim)
        if implementation == "sdpa" and query.device.type == "cpu" and self.avoids_slow_kernels:
            # On CPUs PyTorch has no fused kernel with dropout, and its plain one scales keys as well as queries. Its
            # fused kernel in bfloat16 is slower than the textbook's products (up to 13 times, for short texts).
            has_dropout = self.training and self.dropout
            is_half = query.dtype in (torch.bfloat16, torch.float16)
            implementation = "eager" if has_dropout or is_half else implementation
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output, weights = attend(
            self,
            query.transpose(1, 2),  # (B, H, N / B * L, D / H)
            key,
            value,
            attention_mask,
            dropout=self.dropout if self.training else 0.0,
            scaling=self.scaling,
            is_causal=self.is_causal,
        )
        output = self.out_proj(output.reshape(num_rows, length, -1))
        if not output_attentions:
            return output, None
        if key.shape[0] != num_rows:  # (B, H, N / B * L, P) -> (N, H, L, P)
            weights = weights.unflatten(2, (-1, length)).transpose(1, 2).flatten(0, 1)
        return output, weights


def _implementation_with_weights(implementation: str | None) -> str:
    if implementation in (None, "eager", "sdpa"):
        return "eager"
    raise ValueError(
        f"attn_implementation='{implementation}' has no attention weights to return: "
        "load the model with attn_implementation='sdpa' or 'eager' for output_attentions=True."
    )
