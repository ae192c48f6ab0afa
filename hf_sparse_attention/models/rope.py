"""Rotary positions for longer contexts: a config and a new base or YaRN factor enter, the changed config leaves."""

from __future__ import annotations

import copy
from math import isfinite

from transformers import PreTrainedConfig


def with_rope(
    config: PreTrainedConfig,
    *,
    theta: float | None = None,
    yarn: float | None = None,
    max_positions: int | None = None,
) -> PreTrainedConfig:
    """A copy of a config, dense or sparse, with other rotary positions; the config itself if nothing is asked.

    Args:
        theta: base of the frequencies theta^(-2i/d).
        yarn: YaRN's factor (arXiv 2309.00071); positions reach so many times further.
        max_positions: the new max_position_embeddings (default: yarn times the old one).

    Raises:
        ValueError: for numbers out of range, a model without rotary positions or with several kinds of them.
    """
    if theta is None and yarn is None:
        if max_positions is not None:
            raise ValueError(
                f"max_positions is {max_positions}, but rotary positions beyond those of the training mean nothing "
                "without rope_theta or rope_yarn"
            )
        return config
    for name, value, least in (("rope_theta", theta, 1.0), ("rope_yarn", yarn, 1.0)):
        if value is not None and not (isfinite(value) and value > least):
            raise ValueError(f"{name} is {value}; it must be above {least:g}")
    old = getattr(config, "rope_parameters", None)
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(old, dict) or "rope_theta" not in old or limit is None:
        raise ValueError(
            f"{config.model_type} has no rotary positions with one base for all layers, which rope_theta and "
            "rope_yarn change: leave them out"
        )
    changed = copy.deepcopy(config)
    new = {**old} if theta is None else {**old, "rope_theta": float(theta)}
    reached = limit
    if yarn is not None:
        if old.get("rope_type", "default") != "default":
            raise ValueError(f"rope_yarn is {yarn}, but the model already has {old['rope_type']} positions")
        new |= {"rope_type": "yarn", "factor": float(yarn), "original_max_position_embeddings": limit}
        reached = round(limit * yarn)
    if max_positions is not None and (max_positions < limit or (yarn is not None and max_positions > reached)):
        raise ValueError(f"max_positions is {max_positions}; it must be from {limit} on, with YaRN to {reached}")
    changed.rope_parameters = new
    changed.max_position_embeddings = max_positions or reached
    return changed
