"""Output matching: every sparse attention layer gets the dense model's hidden states and learns to give the dense
layer's output. The hidden states stay the dense model's from layer to layer, so errors do not add up (as in LoLCATs,
arXiv 2410.10254)."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..models import attention_layers


class MatchedAttention:
    """Mixin before a sparse attention layer: passes on the dense layer's output and keeps how far its own is from it.

    `error` is sum_t |sparse_t - dense_t|^2 over the tokens of a call, divided by `scale`. It has the graph; what is
    passed on has none, so a layer's backward pass ends in the layer.
    """

    matching = True
    recompute = False
    scale = 1.0
    error: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor, **kwargs):
        if not self.matching:
            return super().forward(hidden_states, **kwargs)
        hidden_states = hidden_states.detach()
        with torch.no_grad():
            dense, _ = (self.dense_twin or self).dense_forward(hidden_states, **kwargs)
        if self.recompute:
            output, _ = checkpoint(super().forward, hidden_states, use_reentrant=False, **kwargs)
        else:
            output, _ = super().forward(hidden_states, **kwargs)
        self.error = (output.float() - dense.float()).square().sum() / self.scale
        # In the place of the attention weights: FSDP2 finds the graph among a module's outputs.
        return dense, self.error


def matched(model: nn.Module) -> list[tuple[int, nn.Module]]:
    """(layer number, attention) of the layers that learn to match."""
    return [(module.layer_idx, module) for module in model.modules() if isinstance(module, MatchedAttention)]


def begin_matching(model: nn.Module, *, same_projections: bool, recompute: bool = False) -> None:
    """Makes every sparse layer of a model whose projections are still the dense ones a `MatchedAttention`.

    Args:
        same_projections: whether no projection will change, so that the layer is its own dense twin; otherwise it
            gets a frozen copy of its projections (of the attention alone: a sixth of a Llama).
        recompute: whether the attention is computed again backward. There is nothing else on the way back, so this
            takes the place of checkpointing whole layers.
    """
    # One class for all layers of a kind: FSDP2 finds them by it.
    classes: dict[type, type] = {}
    for _, module in attention_layers(model):
        kind = type(module)
        if kind not in classes:
            body = {"__module__": kind.__module__}
            classes[kind] = type(f"Matched{kind.__name__}", (MatchedAttention, kind), body)
        twin = None if same_projections else copy.deepcopy(module).requires_grad_(False)
        if twin is not None:
            twin.is_sparse = False
        module.__class__ = classes[kind]
        module.dense_twin, module.recompute = twin, recompute


def end_matching(model: nn.Module) -> None:
    """Makes the layers what they were before `begin_matching`."""
    for _, module in matched(model):
        del module.dense_twin
        module.__class__ = type(module).__mro__[2]
        for name in ("error", "scale", "matching", "recompute"):
            module.__dict__.pop(name, None)


def set_matching(model: nn.Module, on: bool) -> None:
    """Off, the model computes its own sparse attention from layer to layer, as it will when it is used."""
    for _, module in matched(model):
        module.matching = on
        module.error = None


def leave_out_dropout(model: nn.Module) -> None:
    """Puts a model in evaluation mode but for the dropout of its adapters.

    Some families drop a part of an attention layer's output. Two draws of it are no closer for equal layers, and what
    comes nearest to all of them is an output that is too small.
    """
    model.eval()
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            module.train()


def match_errors(wrapped: nn.Module, layers: list[nn.Module], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """One forward pass; (layers,) sum over the tokens of each layer's squared error, in units of its `scale`."""
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    wrapped(**inputs, use_cache=False, logits_to_keep=1)
    errors = torch.stack([layer.error for layer in layers])
    for layer in layers:
        layer.error = None
    return errors


def measure_scales(wrapped: nn.Module, layers: list[nn.Module], inputs: dict[str, torch.Tensor]) -> list[float]:
    """Sets each layer's `scale` to the mean of |dense_t|^2 over the tokens of `inputs`; returns the scales.

    A number of the dense model and the text alone: every process finds the same one, before the first step and after
    a stop, and the loss stays a plain mean over tokens however they are shared out.
    """
    dense_norms = []

    def keep_norm(module, arguments, output):
        dense_norms.append(output[0].float().square().sum(-1).mean())

    handles = [layer.register_forward_hook(keep_norm) for layer in layers]
    try:
        # Compiled, the layers would be compiled with the hooks and then without.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            match_errors(wrapped, layers, inputs)
    finally:
        for handle in handles:
            handle.remove()
    scales = [max(norm.item(), 1e-12) for norm in dense_norms]
    for layer, scale in zip(layers, scales, strict=True):
        layer.scale = scale
    return scales
