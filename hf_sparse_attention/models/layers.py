"""The attention layer of a sparse model: hidden states and mask enter, alpha, query factor and slopes are added, and
the family's own forward is called."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..attention import is_own_matrix, is_range, visible_entries
from ..cache import check_layer, page_bounds
from ..config import ALIBI, SparseAttentionConfig
from ..heads import merge_heads, other_heads
from ..maps import MAPS, AdaptiveAlpha, alibi_slopes, scaled_heads
from .configuration import layer_window, sparse_heads

# Shapes: B batch, N queries.


class SparseAttention:
    """Mixin before a family's attention: computes alpha, query factor and slopes, then calls the family's forward."""

    def become_sparse(self, config: PreTrainedConfig, rotates: bool, is_sparse: bool) -> None:
        """Gives an attention layer its map's parameters. A layer that stays dense computes softmax, as before."""
        settings = SparseAttentionConfig.from_model_config(config)
        row = MAPS[settings.map]
        heads = config.num_attention_heads
        self.is_sparse = is_sparse
        self.rotates = rotates and not (is_sparse and settings.position != "rope")
        self.alpha = settings.alpha if is_sparse else 1.0
        self.sparse_scale = self.sparse_alpha = self.sparse_heads = None
        # A layer that its family runs without positions keeps that.
        self.has_alibi = is_sparse and rotates and settings.position in ALIBI
        if not is_sparse:
            return
        if settings.position in ALIBI and heads < 2:
            raise ValueError(f"position {settings.position!r} needs at least 2 heads, the model has {heads}")
        if settings.position == "nape_scaled" and row.scale is None:
            raise ValueError(f"position is 'nape_scaled', but map {settings.map!r} has no factor: choose 'nape'")
        chosen = sparse_heads(config, self.layer_idx)
        self.sparse_heads = chosen if len(chosen) < heads else None
        self.scaled_heads = chosen[: scaled_heads(settings.position if rotates else "nope", len(chosen))]
        if row.scale is not None:
            window = layer_window(config, self.layer_idx)
            length = min(settings.train_length or 2048, window or 2**62)
            self.sparse_scale = row.scale(len(self.scaled_heads), config.hidden_size, length)
        if row.learned_alpha:
            self.sparse_alpha = AdaptiveAlpha(len(chosen))

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ):
        attention_mask = _own_documents(attention_mask, kwargs)
        if not self.rotates and position_embeddings is not None:
            cosine, sine = position_embeddings
            position_embeddings = torch.ones_like(cosine), torch.zeros_like(sine)
        # One family calls it otherwise. Asked for its bounds only by the attention, which the update comes before.
        cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
        check_layer(cache, self, hidden_states)
        return super().forward(
            hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            alpha=self._alpha(),
            query_scale=self._query_scale(hidden_states, attention_mask),
            sparse_heads=self.sparse_heads,
            page_bounds=page_bounds(cache, self.layer_idx),
            slopes=alibi_slopes(self.config.num_attention_heads, hidden_states.device) if self.has_alibi else None,
            **kwargs,
        )

    def dense_forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the dense model's layer gives: softmax of its own positions, without factor or slopes."""
        attention_mask = _own_documents(attention_mask, kwargs)
        return super().forward(hidden_states, attention_mask=attention_mask, alpha=1.0, **kwargs)

    def _alpha(self) -> float | torch.Tensor:
        """Alpha of the layer, or of its sparse heads (H,)."""
        if self.sparse_alpha is None or (isinstance(self.alpha, float) and self.alpha == 1.0):
            return self.alpha
        return self.sparse_alpha(self.alpha)

    def _query_scale(self, hidden_states, attention_mask):
        if self.sparse_scale is None:
            return None
        scale = self.sparse_scale(hidden_states, visible_lengths(attention_mask, hidden_states))
        unscaled = other_heads(self.scaled_heads, self.config.num_attention_heads)
        if unscaled:
            ones = scale.new_ones(scale.shape[0], len(unscaled), *scale.shape[2:])
            scale = merge_heads(scale, ones, self.scaled_heads)
        return scale


def _own_documents(attention_mask: torch.Tensor | None, kwargs: dict) -> torch.Tensor | None:
    """The mask within documents; takes what the model counted once for all layers out of `kwargs`."""
    # The decoder layers of some families drop what the model hands on.
    known = "document_starts" in kwargs
    starts = kwargs.pop("document_starts") if known else document_starts(kwargs.get("position_ids"))
    return attention_mask if starts is None else within_documents(attention_mask, starts)


def visible_lengths(attention_mask: torch.Tensor | None, hidden_states: torch.Tensor) -> torch.Tensor:
    """n_i of the scales: one more than the keys query i sees, at least 2. Shape (B or 1, N).

    It follows from the mask alone, so prefill and token-by-token decoding give the same number.
    """
    if attention_mask is None:
        return torch.arange(2, hidden_states.shape[1] + 2, device=hidden_states.device)[None]
    if is_range(attention_mask):
        start_BN, end_BN = attention_mask[:, 0].unbind(-1)
        return (end_BN - start_BN + 1).clamp(min=2)
    if attention_mask.shape[1] != 1:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: a mask that differs between heads leaves the "
            "context length of a query undefined"
        )
    return (visible_entries(attention_mask)[:, 0].sum(-1) + 1).clamp(min=2)


def document_starts(position_ids: torch.Tensor | None, *, every_jump: bool = False) -> torch.Tensor | None:
    """Where the document of each token starts, (B or 1, N), as an index into these tokens; None for one document.

    A document starts wherever a position is not above the previous one; with `every_jump`, as in Transformers' own
    packed training, wherever it is not the previous one plus 1. 0 also stands for a document that started before
    these tokens.
    """
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[-1] == 1:
        return None
    steps_BN = torch.diff(position_ids, dim=-1)
    restarts_BN = steps_BN != 1 if every_jump else steps_BN < 1
    if not torch.compiler.is_compiling() and not bool(restarts_BN.any()):
        return None
    index_N = torch.arange(1, position_ids.shape[-1], device=position_ids.device)
    starts_BN = torch.where(restarts_BN, index_N, 0).cummax(dim=-1).values
    return nn.functional.pad(starts_BN, (1, 0))


def within_documents(attention_mask: torch.Tensor | None, starts_BN: torch.Tensor) -> torch.Tensor:
    """Keeps every query inside its document. A matrix given by the caller is taken as it is, as in Transformers."""
    if is_own_matrix(attention_mask):
        seen = attention_mask.bool()
        end_BN = torch.where(seen[:, 0].any(-1), seen.shape[-1] - seen[:, 0].flip(-1).int().argmax(-1), 0)
        starts_BN, offset_B1 = _of_tokens(starts_BN, end_BN)
        start_BN = torch.where(starts_BN > 0, starts_BN + offset_B1, 0)
        key_K = torch.arange(seen.shape[-1], device=seen.device)
        return (seen & (key_K >= start_BN[:, None, :, None])).to(torch.uint8)
    if attention_mask is None:
        own_N = torch.arange(starts_BN.shape[-1], device=starts_BN.device)
        first_BN, end_BN = torch.zeros_like(starts_BN), (own_N + 1).expand_as(starts_BN)
        offset_B1 = 0
    elif is_range(attention_mask):
        first_BN, end_BN = attention_mask[:, 0].unbind(-1)
        starts_BN, offset_B1 = _of_tokens(starts_BN, end_BN)
    else:
        return attention_mask
    start_BN = torch.where(starts_BN > 0, torch.maximum(first_BN, starts_BN + offset_B1), first_BN)
    return torch.stack(torch.broadcast_tensors(start_BN, end_BN), dim=-1).to(torch.int32)[:, None]


def _of_tokens(starts_BN: torch.Tensor, end_BN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Starts without those at padding, to which `generate` gives position 0; and the key at which the first of these
    queries stands, (B, 1).

    A query sees its own key last, unless that is padding: that of the first is at the largest of these differences.
    """
    query_N = torch.arange(starts_BN.shape[-1], device=starts_BN.device)
    offset_B1 = (end_BN - 1 - query_N).amax(-1, keepdim=True)
    is_token_BN = end_BN == offset_B1 + query_N + 1
    return torch.where((starts_BN == query_N) & is_token_BN, query_N, 0).cummax(dim=-1).values, offset_B1
