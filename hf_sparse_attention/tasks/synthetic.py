"""The synthetic tasks by name."""

from __future__ import annotations

from dataclasses import fields

from .recall import MultiQueryRecall
from .samples import SyntheticTask
from .sequences import Copy, Reverse, Sort
from .tagging import FlipFlop, LocalCount, TwoBack

SYNTHETIC = {row.name: row for row in (MultiQueryRecall, Reverse, Copy, Sort, LocalCount, TwoBack, FlipFlop)}


def make_task(name: str, settings: dict | None = None) -> SyntheticTask:
    """A task by name and the fields that differ from its own.

    Raises:
        ValueError: for an unknown name or field, or a value the task does not take.
    """
    if name not in SYNTHETIC:
        raise ValueError(f"task is {name!r}; choose one of {', '.join(SYNTHETIC)}")
    kind, settings = SYNTHETIC[name], dict(settings or {})
    known = [item.name for item in fields(kind)]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(f"{name} has no {', '.join(unknown)}; it has {', '.join(known) or 'nothing to set'}")
    for item in fields(kind):
        # Annotations are texts (from __future__ import annotations).
        if item.type == "int" and not isinstance(settings.get(item.name, 0), int):
            raise ValueError(f"{item.name} of {name} is {settings[item.name]}; it must be a whole number")
    return kind(**settings)
