"""Continued pretraining with a sparse attention map, on one device or on several, and small models from scratch:

hf-sparse-attention train --model path/or/hub-id --map asentmax --train_data "books/*.jsonl.xz" --output run
accelerate launch --num_processes 8 -m hf_sparse_attention.train --config recipe.yaml
hf-sparse-attention train-task --task copy --map asentmax --output run"""

from .arguments import TrainArguments
from .stages import train_model
from .task_arguments import TrainTaskArguments
from .task_loop import train_task
from .task_table import TableArguments, table_of_runs

__all__ = ["TableArguments", "TrainArguments", "TrainTaskArguments", "table_of_runs", "train_model", "train_task"]
