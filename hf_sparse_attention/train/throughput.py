"""How much of a card's arithmetic a training run uses: floating point operations of a step over time and the card's
peak."""

from __future__ import annotations

import torch
from torch import nn

from ..loading import count_parameters

# Dense peak of the matrix units in FLOP/s with bf16 inputs, from the makers' data sheets; the first name that occurs
# in the device's wins, so longer ones stand first.
PEAKS = {
    "B200": 2250e12, "GH200": 989e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
    "A100": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "A40": 150e12, "A10G": 70e12, "A10": 125e12,
    "RTX 5090": 210e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "MI300X": 1307e12,
}  # fmt: skip


def flops_per_token(model: nn.Module, block_size: int) -> float | None:
    """Model FLOPs of one training token: 4 N + 2 T + 6 L A n.

    N are the parameters a token meets in a matrix product (all but the embedding's, with the output layer even if it
    is tied to it), T those of them that are trained, L layers, A = heads x head size, n the block size. Forward 2 N;
    backward 2 N for activations and 2 T for parameters; causal attention 2 A n forward, twice that backward, counted
    as if every visible key had a weight and every block were one document. Recomputation is not counted.

    Returns:
        None for a mixture of experts, where N differs from token to token.
    """
    config = model.config
    if getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None):
        return None
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    table = inner.get_input_embeddings().weight
    output = inner.get_output_embeddings()
    tied = output is not None and output.weight is table
    every, trained = count_parameters(model), count_parameters(model, trainable=True)
    if not tied:
        every -= table.numel()
        trained -= table.numel() if table.requires_grad else 0
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 6 * config.num_hidden_layers * config.num_attention_heads * size * block_size
    return 4.0 * every + 2.0 * trained + attention


def peak_flops(device: torch.device) -> float | None:
    """The card's peak, or None for one that the table does not have."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAKS.items() if key in name), None)
