"""The loss of a language model from its last hidden states, some tokens at a time: the logits of a long batch, which
are larger than everything else, never exist at once. On the way the dense model's logits can be learned from too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from .packing import IGNORED_LABEL

# Shapes: B batch, N tokens, T = B N or a chunk of them, V vocabulary, E hidden size.


@dataclass(frozen=True)
class Distillation:
    """What a frozen dense model adds to the loss: (1 - weight) cross entropy + weight temperature^2 KL(dense | model),
    both softmaxes taken of logits / temperature (Hinton et al. 2015, arXiv 1503.02531)."""

    teacher: nn.Module
    weight: float
    temperature: float

    def hidden_states(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return self.teacher.base_model(**inputs).last_hidden_state


class ChunkedHead:
    """Mixin before the output layer: it can do all that needs its weights within one call.

    FSDP2 and ZeRO-3 gather a module's weights when it is called and, on the way back, let go of them when its input
    has its gradient. Called for each chunk, it found them gone at the second one (FSDP2 of torch below 2.13).
    """

    def forward(self, hidden_TE: torch.Tensor, within: Callable[[torch.Tensor], torch.Tensor] | None = None):
        """The logits, or what `within` makes of the hidden states, which takes its logits from `forward` itself."""
        return super().forward(hidden_TE) if within is None else within(hidden_TE)


class ChunkedLoss:
    """Mixin before a causal LM: with labels its forward gives the loss and no logits.

    The loss is that of Transformers: sum over the labels / num_items_in_batch, or their mean. While training with a
    `distillation` it is what that says.
    """

    loss_chunk = 0
    distillation: Distillation | None = None

    def forward(self, input_ids=None, *, labels=None, num_items_in_batch=None, **kwargs):
        if labels is None:
            return super().forward(input_ids, **kwargs)
        # PEFT asks for these by name; a loss without logits has neither.
        for name in ("output_attentions", "output_hidden_states", "return_dict", "task_ids"):
            kwargs.pop(name, None)
        hidden_BNE = self.base_model(input_ids=input_ids, **kwargs).last_hidden_state
        distillation = self.distillation if self.training else None
        others_BNE = None
        if distillation is not None:
            others_BNE = distillation.hidden_states({"input_ids": input_ids, **kwargs})
        # The state before a token predicts it. No token is picked out: what a number of labels decides would wait for
        # the device and be compiled anew.
        targets_T = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL).flatten()
        others_TE = None if others_BNE is None else others_BNE.flatten(0, 1)
        loss = self.lm_head(hidden_BNE.flatten(0, 1), within=partial(self._sum, targets_T, others_TE))
        count = (targets_T != IGNORED_LABEL).sum() if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutputWithPast(loss=loss / count)

    def _sum(self, targets_T: torch.Tensor, others_TE: torch.Tensor | None, hidden_TE: torch.Tensor) -> torch.Tensor:
        """Sum of the loss over all labelled tokens, chunk by chunk."""
        loss = hidden_TE.new_zeros((), dtype=torch.float32)
        size = self.loss_chunk or len(targets_T)
        for first in range(0, len(targets_T), size):
            rows = slice(first, first + size)
            others = None if others_TE is None else others_TE[rows]
            arguments = (hidden_TE[rows], targets_T[rows], others)
            # Not torch's own linear_cross_entropy: its loss of bf16 states is off by 0.2 %.
            loss = loss + checkpoint(self._chunk_loss, *arguments, use_reentrant=False)
        return loss

    def _chunk_loss(self, hidden_TE: torch.Tensor, targets_T: torch.Tensor, others_TE: torch.Tensor | None):
        """Sum over the labelled tokens."""
        logits_TV = self.lm_head.forward(hidden_TE).float()
        if others_TE is None:
            return F.cross_entropy(logits_TV, targets_T, ignore_index=IGNORED_LABEL, reduction="sum")
        distillation = self.distillation
        with torch.no_grad():
            dense_TV = F.log_softmax(distillation.teacher.lm_head(others_TE).float() / distillation.temperature, -1)
        own_TV = F.log_softmax(logits_TV / distillation.temperature, -1)
        divergence_T = F.kl_div(own_TV, dense_TV, reduction="none", log_target=True).sum(-1)
        divergence = torch.where(targets_T != IGNORED_LABEL, divergence_T, 0.0).sum() * distillation.temperature**2
        if distillation.weight == 1:
            return divergence
        entropy = F.cross_entropy(logits_TV, targets_T, ignore_index=IGNORED_LABEL, reduction="sum")
        return (1 - distillation.weight) * entropy + distillation.weight * divergence


def scales_logits(config: PreTrainedConfig) -> bool:
    """Whether a model's logits are more than one linear layer of its hidden states, by its config alone."""
    neutral = {"logits_scaling": 1, "logit_scale": 1, "final_logit_softcapping": None}
    return any(getattr(config, name, value) not in (value, None) for name, value in neutral.items())


def chunk_loss(model: nn.Module, size: int, distillation: Distillation | None = None) -> None:
    """Makes a causal LM compute its loss `size` labels at a time (0: all of them at once).

    Raises:
        ValueError: if the model does more to its hidden states than one linear layer, which is not computed here.
    """
    for each in [model, *([distillation.teacher] if distillation is not None else [])]:
        _check_head(each)
    for module, mixin in ((model, ChunkedLoss), (model.lm_head, ChunkedHead)):
        own = type(module)
        module.__class__ = type(own.__name__, (mixin, own), {"__module__": own.__module__})
    model.loss_chunk, model.distillation = size, distillation


@torch.no_grad()
def _check_head(model: nn.Module) -> None:
    """Compares the model's own logits of a few tokens with what the chunks compute."""
    training = model.training
    model.eval()
    tokens = torch.arange(2, device=model.device)[None]
    own = model(input_ids=tokens, use_cache=False).logits
    hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    same = hasattr(model, "lm_head") and torch.equal(model.lm_head(hidden), own)
    model.train(training)
    if not same:
        raise ValueError(
            f"{type(model).__name__} scales or bounds its logits, which loss_chunk and distill do not compute: "
            "leave them out"
        )
