"""Identities of train-task's runs -> which options name a row of a table, and which value is the usual one: an option
that a map does not have names none of its rows."""

from __future__ import annotations

import json
from collections import Counter

from ..config import SPECIFICATIONS
from .task_arguments import LEARNED, RISING

# Value of an option that a run's record does not have.
UNKNOWN = "unknown"
# Options that some maps do not have: which do, and what stands for nothing special.
_ALPHAS = tuple(name for name, row in SPECIFICATIONS.items() if row.lowest < row.highest)
_OF_MAPS = {
    "scale_start": (("asentmax",), "neutral"), "alpha": (_ALPHAS, None), "softmax_share": (RISING, 0.0),
    "new_learning_rate_share": (LEARNED, 1.0), "factor_while_softmax": (("asentmax",), "held"),
}  # fmt: skip


def is_of_every_map(key: str) -> bool:
    """Whether every map has that option."""
    return key not in _OF_MAPS


def has_option(identity: dict, key: str) -> bool:
    """Whether its map has that option."""
    return is_of_every_map(key) or identity["map"] in _OF_MAPS[key][0]


def values_of(identities: list[dict], key: str) -> list:
    """An option's value in each of those that have it."""
    return [identity.get(key, UNKNOWN) for identity in identities if has_option(identity, key)]


def usual_value(identities: list[dict], key: str):
    """The value that names no row: the most frequent, of several the first. Of an option of some maps it is their
    common value only if all have it: beside a row without it the value must be read in the name."""
    values = values_of(identities, key)
    counted = Counter(map(json.dumps, values)).most_common()
    if key in _OF_MAPS and (len(values) < len(identities) or len(counted) > 1):
        return _OF_MAPS[key][1]
    return json.loads(counted[0][0])
