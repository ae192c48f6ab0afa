"""A causal language model and samples of a synthetic task -> which samples it answers without a mistake.

Greedy decoding answers a sample exactly if and only if, reading the right answer, the largest logit is right at every
token of it: `teacher_forced` does it in one pass, `generated` by `model.generate` with its cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from .samples import NO_TARGET, PAD, Samples


@dataclass(frozen=True)
class Answers:
    """How samples were answered, each (samples,).

    Args:
        exact: bool, whether every asked token is right.
        right: asked tokens that are right.
        asked: asked tokens.
        loss: sum of -log p over the asked tokens, or None where only the decoded tokens are known.
        sound: bool, whether all numbers on the way were finite.
    """

    exact: np.ndarray
    right: np.ndarray
    asked: np.ndarray
    loss: np.ndarray | None
    sound: np.ndarray


@torch.inference_mode()
def teacher_forced(model: nn.Module, samples: Samples) -> Answers:
    """Answers read off a single forward pass over the samples and their answers."""
    device = next(model.parameters()).device
    first = int((samples.targets != NO_TARGET).any(0).argmax())
    tokens = torch.from_numpy(samples.tokens).to(device)
    targets = torch.from_numpy(samples.targets[:, first:]).to(device)
    logits = model(input_ids=tokens, use_cache=False, logits_to_keep=tokens.shape[1] - first).logits.float()
    asked = targets != NO_TARGET
    right = (logits.argmax(-1) == targets) & asked
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=NO_TARGET, reduction="none")
    counts = [value.sum(1).cpu().numpy() for value in (right, asked, loss.view_as(targets).double())]
    return Answers(counts[0] == counts[1], *counts, np.isfinite(counts[2]))


def generated(model: nn.Module, samples: Samples, *, tags: bool) -> Answers:
    """Answers decoded token by token by `model.generate`, greedily.

    Args:
        tags: whether the input is given whole and answered at its tokens (`SyntheticTask.tags`); the answers are then
            what the model would have said, and the input goes on as it is.

    Raises:
        ValueError: for an answer with a gap.
    """
    if tags:
        return _generated_tags(model, samples)
    asked = samples.targets != NO_TARGET
    first, count = asked.argmax(1), asked.sum(1)
    right, sound = np.zeros(len(samples), dtype=np.int64), np.zeros(len(samples), dtype=bool)
    # Those whose answers begin and end at the same tokens go together.
    for begin, size in sorted(set(zip(first.tolist(), count.tolist(), strict=True))):
        rows = np.flatnonzero((first == begin) & (count == size))
        if not asked[rows, begin : begin + size].all():
            raise ValueError("an answer that is asked in pieces cannot be generated")
        answer = samples.targets[rows, begin : begin + size]
        # What comes after a token that ends the answer is not part of it.
        output, sound[rows] = _generate(model, samples.tokens[rows, : begin + 1], size)
        right[rows] = (output[:, begin + 1 :] == answer).sum(1)
    return Answers(right == count, right, count, None, sound)


class _Soundness(LogitsProcessor):
    """Notes whose logits were all finite: the largest of logits with a NaN among them is a token like any other."""

    def __init__(self, sequences: int, device: torch.device):
        self.sound = torch.ones(sequences, dtype=torch.bool, device=device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.sound &= scores.isfinite().all(-1)
        return scores


class _GivenInput(LogitsProcessor):
    """Notes what the model would say at each token and goes on with the token that is given."""

    def __init__(self, tokens: torch.Tensor):
        self.tokens, self.said = tokens, []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.said.append(scores.argmax(-1))
        place = input_ids.shape[1]
        forced = torch.full_like(scores, float("-inf"))
        # After the last token anything may follow: its own answer is already noted.
        following = self.tokens[:, place] if place < self.tokens.shape[1] else torch.full_like(self.said[0], PAD)
        return forced.scatter(1, following[:, None], 0.0)


def _generated_tags(model: nn.Module, samples: Samples) -> Answers:
    asked = samples.targets != NO_TARGET
    inputs = _GivenInput(torch.from_numpy(samples.tokens).to(next(model.parameters()).device))
    width = samples.tokens.shape[1]
    _, sound = _generate(model, samples.tokens[:, :1], width, inputs)
    said = torch.stack(inputs.said, dim=1).cpu().numpy()
    right = ((said == samples.targets) & asked).sum(1)
    return Answers(right == asked.sum(1), right, asked.sum(1), None, sound)


@torch.inference_mode()
def _generate(
    model: nn.Module, prompt: np.ndarray, new_tokens: int, *processors: LogitsProcessor
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts and what follows them, (samples, tokens), and for which samples all logits were finite."""
    tokens = torch.from_numpy(prompt).to(next(model.parameters()).device)
    # Exactly so many tokens: no token ends it, neither one of the model's own.
    settings = GenerationConfig(
        max_new_tokens=new_tokens, min_new_tokens=0, do_sample=False, num_beams=1, eos_token_id=[], pad_token_id=PAD
    )
    with _own_settings(model, settings):
        soundness = _Soundness(len(tokens), tokens.device)
        output = model.generate(
            input_ids=tokens, attention_mask=torch.ones_like(tokens),
            logits_processor=LogitsProcessorList([soundness, *processors]),
        )  # fmt: skip
    return output.cpu().numpy(), soundness.sound.cpu().numpy()


@contextmanager
def _own_settings(model: nn.Module, settings: GenerationConfig) -> Iterator[None]:
    """The model generates with these settings and none of its own, which a call would fall back on."""
    before = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = before


def score(
    model: nn.Module,
    blocks: Iterable[Samples],
    *,
    batch_tokens: int,
    answer: Callable[[nn.Module, Samples], Answers] = teacher_forced,
    progress: Callable[[int], object] = lambda count: None,
) -> dict:
    """Share of samples answered exactly, and of asked tokens that are right, with the loss per asked token.

    Returns:
        exact_match, standard_error (of a share over samples), token_accuracy, loss, samples; or {"missing": reason}
        if a loss, or what was decoded from, is not finite.

    Raises:
        torch.OutOfMemoryError: if a single sample does not fit; batches are halved before.
    """
    found, most = [], None
    for block in blocks:
        batch = max(1, min(len(block), batch_tokens // block.tokens.shape[1]))
        most = batch if most is None else min(most, batch)
        first = 0
        while first < len(block):
            part = block[first : first + most]
            try:
                found.append(answer(model, part))
            except torch.OutOfMemoryError:
                if most == 1:
                    raise
                most //= 2
                continue
            first += len(part)
            progress(len(part))
    exact, right, asked = (
        np.concatenate([getattr(item, name) for item in found]) for name in ("exact", "right", "asked")
    )
    result = {
        "exact_match": float(exact.mean()),
        "standard_error": float(np.sqrt(exact.mean() * (1 - exact.mean()) / len(exact))),
        "token_accuracy": float(right.sum() / asked.sum()),
        "samples": len(exact),
    }
    decoded = found[0].loss is None
    if bad := int(sum((~item.sound).sum() for item in found)):
        what = "logits are" if decoded else "loss is"
        return {"missing": f"the {what} not finite (NaN or infinity) in {bad} of {len(exact)} samples"}
    if decoded:
        return result
    loss = np.concatenate([item.loss for item in found])
    return {**result, "loss": float(loss.sum() / asked.sum())}
