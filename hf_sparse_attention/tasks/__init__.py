"""What a model is tested on: `TASKS` by name; text, haystacks and seeds give inputs, a task scores a model on them."""

from dataclasses import dataclass

from .needles import NEEDLES
from .synthetic import SYNTHETIC
from .windows import TokenizedText, Windows

TEXT, NEEDLE, TASK = "text", "needle", "synthetic"


@dataclass(frozen=True)
class Task:
    """One row of `TASKS`.

    Args:
        name: what the command line calls it.
        description: one line.
        version: raised whenever the same model and samples would get other numbers.
        kind: `TEXT` (windows of the user's text), `NEEDLE` (haystacks) or `TASK` (synthetic, for its own models).
        by_depth: whether it is measured at several depths of the context.
    """

    name: str
    description: str
    version: int
    kind: str
    by_depth: bool = False


TASKS = {
    row.name: row
    for row in (
        Task("perplexity", "loss per token by length and by position", 1, TEXT),
        Task("sliding_perplexity", "loss per token with half a window of context or more", 1, TEXT),
        *(Task(row.name, row.description, row.version, NEEDLE, row.by_depth) for row in NEEDLES.values()),
        *(
            Task(row.name, f"exact match of {row.name}, for models of train-task", row.version, TASK)
            for row in SYNTHETIC.values()
        ),
    )
}

__all__ = ["NEEDLE", "TASK", "TASKS", "TEXT", "Task", "TokenizedText", "Windows"]
