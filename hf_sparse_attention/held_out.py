"""The summary of a training run -> its held-out losses at the beginning and at the end, in words. Losses over blocks
of other sizes, or over another number of them, are told apart: a token of a longer block sees more of its text."""

from __future__ import annotations

from collections.abc import Callable

# Step of the whole run, loss in nats a token (None if it was not finite), alpha or None.
Loss = tuple[int, float | None, float | None]


def losses_by_blocks(summary: dict) -> dict[tuple[int | None, int | None], list[Loss]]:
    """Losses in order, by (tokens in a block, number of blocks).

    Args:
        summary: what `train` writes, of one stage or of several; empty where a stage lacks its steps.
    """
    found: dict[tuple, list[tuple]] = {}
    stages, done = summary.get("stages") or [summary], 0
    for number, stage in enumerate(stages, start=1):
        losses = stage.get("eval_loss") or []
        alphas = (stage.get("eval_alpha") if losses else None) or [None] * len(losses)
        blocks = stage.get("block_size"), (stage.get("options") or {}).get("eval_blocks")
        for (step, loss), alpha in zip(losses, alphas, strict=True):
            found.setdefault(blocks, []).append((done + step, loss, alpha))
        if number < len(stages):
            if stage.get("steps") is None:
                return {}
            done += stage["steps"]
    return found


def held_out_in_words(summary: dict, number: Callable[[float], str] = "{:.4f}".format) -> str:
    """The first and the last loss, for each kind of blocks where there are several; empty without any.

    Args:
        number: writes a loss.
    """
    found = losses_by_blocks(summary)
    counted = len({count for _, count in found}) > 1
    parts = []
    for (size, count), losses in found.items():
        ends = [
            f"{'not finite' if loss is None else number(loss)} at step {step:,}"
            + ("" if alpha is None else f" (alpha {alpha:g})")
            for step, loss, alpha in (losses if len(losses) == 1 else (losses[0], losses[-1]))
        ]
        kind = f"{count:,} blocks" if counted and count else "blocks"
        kind += " of unknown size" if size is None else f" of {size:,}"
        parts.append(", ".join(ends) + (f" in {kind}" if len(found) > 1 else ""))
    return "; ".join(parts)
