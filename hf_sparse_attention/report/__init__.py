"""What the attention of a sparse model does: `report_model` for a folder, `look_at` for a model in a notebook."""

from .arguments import ReportArguments
from .command import report_model
from .look import AttentionLook, look_at
from .measures import Measures, measure_attention
from .prompt import LayerWeights, PromptAttention, look_at_prompt

__all__ = [
    "AttentionLook",
    "LayerWeights",
    "Measures",
    "PromptAttention",
    "ReportArguments",
    "look_at",
    "look_at_prompt",
    "measure_attention",
    "report_model",
]
