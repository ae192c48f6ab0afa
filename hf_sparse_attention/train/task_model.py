"""Options enter, a small untrained model leaves: a Llama of the sizes, map and positions that were asked for."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from ..config import SparseAttentionConfig
from ..models import sparse_config
from ..tasks.samples import BOS, EOS, PAD, SyntheticTask
from .recipe import start_factors
from .task_arguments import TrainTaskArguments


def new_model(arguments: TrainTaskArguments, task: SyntheticTask, seed: int) -> PreTrainedModel:
    """The untrained model of a seed, in float32 on the CPU.

    `softmax` with rotary positions is the dense Llama; with others it is entmax at alpha 1, which is softmax.

    Raises:
        ValueError: for sizes or an alpha that the model cannot have.
    """
    dense = LlamaConfig(
        vocab_size=task.vocabulary,
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.ffn_size,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.heads,
        max_position_embeddings=task.width(arguments.training_lengths()[1]),
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if arguments.map == "softmax" and arguments.position == "rope":
            return AutoModelForCausalLM.from_config(dense, dtype=torch.float32)
        is_softmax = arguments.map == "softmax"
        settings = SparseAttentionConfig(
            map="entmax" if is_softmax else arguments.map,
            alpha=1.0 if is_softmax else arguments.alpha,
            position=arguments.position,
        )
        model = AutoModelForCausalLM.from_config(sparse_config(dense, settings), dtype=torch.float32)
        start_factors(model, arguments.scale_start)
    return model


def answer_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean of -log p(target) in nats over the positions that are asked; logits (samples, width, vocabulary)."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
