"""What a model is tested on: text and a tokenizer give windows of a length, a task scores a model on them."""

from collections.abc import Callable
from dataclasses import dataclass

from . import perplexity
from .windows import TokenizedText, Windows


@dataclass(frozen=True)
class Task:
    """One row of `TASKS`.

    Args:
        name: what the command line calls it.
        description: one line.
        version: raised whenever the same model and samples would get other numbers.
        score: (model, windows, *, batch_tokens, progress) -> a dict of numbers, or {"missing": reason}.
    """

    name: str
    description: str
    version: int
    score: Callable[..., dict]


TASKS = {
    row.name: row for row in (Task("perplexity", "loss per token by length and by position", 1, perplexity.score),)
}

__all__ = ["TASKS", "Task", "TokenizedText", "Windows"]
