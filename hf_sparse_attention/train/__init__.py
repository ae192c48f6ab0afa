"""Continued pretraining with a sparse attention map, on one device or on several:

hf-sparse-attention train --model path/or/hub-id --map asentmax --train_data "books/*.jsonl.xz" --output run
accelerate launch --num_processes 8 -m hf_sparse_attention.train --config recipe.yaml
"""

from .arguments import TrainArguments
from .stages import train_model

__all__ = ["TrainArguments", "train_model"]
