"""A sparse model folder and the files of its training, evaluation and report -> the folder that others can load, with
a model card, on this machine or in one commit on the Hub.

    hf-sparse-attention push --model run/model --repo_id you/name
"""

from .push import PushArguments, push_model

__all__ = ["PushArguments", "push_model"]
