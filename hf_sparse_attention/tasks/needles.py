"""Needles in a haystack: sentences with a number are hidden among others, and asked for at the end. Passkey of
Mohtashami & Jaggi 2023 (arXiv 2305.16300), the others in the manner of RULER (Hsieh et al. 2024, arXiv 2404.06654),
with words of our own. A prompt and its answer have exactly the asked number of tokens, whatever the tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from .haystack import Haystack, continuing
from .random_bits import RandomBits
from .samples import NO_TARGET, Samples

# Names of what is hidden; every sample draws from them without repetition.
NAMES = (
    "anchor", "basket", "candle", "dagger", "engine", "falcon", "garden", "hammer", "island", "jacket", "kettle",
    "ladder", "mirror", "needle", "orchid", "pillow", "quarry", "ribbon", "saddle", "temple", "urchin", "violin",
    "window", "yogurt",
)  # fmt: skip
# Needles of a task that hides several.
SEVERAL = 4
# Tokens of the samples that are made at a time.
_TOKENS = 2**22


class TooShort(ValueError):
    """A length in which the needles and the question alone do not fit."""


@dataclass(frozen=True)
class Question:
    """What is hidden and asked.

    Args:
        needles: sentences in the order of the text; the first `asked` of them matter to the answer.
        asked: the sentence that stands at the depth, as its index, or None where there is no depth.
        question: text that ends right before the answer.
        answer: begins with its space.
    """

    needles: list[str]
    asked: int | None
    question: str
    answer: str


@dataclass(frozen=True)
class NeedleTask:
    """One row of `NEEDLES`.

    Args:
        name: what the command line calls it.
        description: one line.
        draw: random bits -> the question of a sample.
        by_depth: whether one needle is asked for, which can stand at a chosen depth.
        version: raised whenever the same seed would give another sample.
    """

    name: str
    description: str
    draw: Callable[[RandomBits], Question]
    by_depth: bool
    version: int = 1


def _numbers(bits: RandomBits, count: int) -> list[str]:
    """Different numbers of five digits."""
    found: list[str] = []
    while len(found) < count:
        number = str(10_000 + int(bits.below(90_000, (1,))[0]))
        if number not in found:
            found.append(number)
    return found


def _names(bits: RandomBits, count: int) -> list[str]:
    order = np.argsort(bits.words((len(NAMES),)), kind="stable")
    return [NAMES[number] for number in order[:count]]


def _passkey(bits: RandomBits) -> Question:
    (key,) = _numbers(bits, 1)
    return Question([f"The pass key is {key}. Remember it: {key} is the pass key."], 0, "\nThe pass key is", f" {key}")


def _fact(name: str, number: str) -> str:
    return f"The number of the {name} is {number}."


def _needle(bits: RandomBits) -> Question:
    (name,), (number,) = _names(bits, 1), _numbers(bits, 1)
    return Question([_fact(name, number)], 0, f"\nThe number of the {name} is", f" {number}")


def _multi_needle(bits: RandomBits) -> Question:
    names, numbers = _names(bits, SEVERAL), _numbers(bits, SEVERAL)
    return Question(list(map(_fact, names, numbers)), 0, f"\nThe number of the {names[0]} is", f" {numbers[0]}")


def _multi_query(bits: RandomBits) -> Question:
    names, numbers = _names(bits, SEVERAL), _numbers(bits, SEVERAL)
    order = np.argsort(bits.words((SEVERAL,)), kind="stable")
    asked = ", ".join(names[number] for number in order)
    said = ",".join(f" {numbers[number]}" for number in order)
    return Question(list(map(_fact, names, numbers)), None, f"\nThe numbers of the {asked}, in this order, are", said)


def _variable_tracking(bits: RandomBits) -> Question:
    """A chain of four names of which the first has a number and each other that of the one before; and a second chain
    that is not asked for. Its sentences stand in the order of the chain."""
    names, numbers = _names(bits, 2 * SEVERAL), _numbers(bits, 2)
    chains = [names[:SEVERAL], names[SEVERAL:]]
    steps = [
        [f"Let {chain[0]} be {number}.", *(f"Let {after} be {before}." for before, after in zip(chain, chain[1:]))]  # noqa: B905
        for chain, number in zip(chains, numbers, strict=True)
    ]
    # The two chains mixed, each in its own order.
    turn = np.argsort(np.argsort(bits.words((2 * SEVERAL,)), kind="stable"), kind="stable") < SEVERAL
    left = [iter(chain) for chain in steps]
    needles = [next(left[0 if first else 1]) for first in turn]
    return Question(needles, None, f"\nThe value of {chains[0][-1]} is", f" {numbers[0]}")


NEEDLES = {
    row.name: row
    for row in (
        NeedleTask("passkey", "a pass key, said twice in one place", _passkey, by_depth=True),
        NeedleTask("needle", "one number of one thing", _needle, by_depth=True),
        NeedleTask("multi_needle", "one of four numbers of four things", _multi_needle, by_depth=True),
        NeedleTask("multi_query", "four numbers of four things, in a given order", _multi_query, by_depth=False),
        NeedleTask("variable_tracking", "a value handed on through four names", _variable_tracking, by_depth=False),
    )
}


def check_tokenizer(name: str, tokenizer) -> None:
    """Raises ValueError for the tokenizer of model `name` if what is hidden cannot be told apart in its tokens."""
    texts = [f" {digit * 5}" for digit in "0123456789"] + [f" {word}" for word in NAMES]
    found = continuing(tokenizer, texts)
    unknown = tokenizer.unk_token_id
    if any(unknown in ids for ids in found) or len({ids.tobytes() for ids in found}) < len(texts):
        raise ValueError(
            f"{name}: its tokenizer has no tokens of their own for the numbers and names that needles hide: right and "
            "wrong answers would be the same"
        )


@dataclass(frozen=True)
class Prompt:
    """A sample as tokens: prompt (tokens,) and answer (tokens,), and the answer's text."""

    prompt: np.ndarray
    answer: np.ndarray
    text: str


def make_prompt(
    task: NeedleTask, haystack: Haystack, tokenizer, *, length: int, depth: float | None, sample: int, seed: int
) -> Prompt:
    """Sample number `sample`: the tokenizer's prefix, the haystack with the needles, the question; and the answer.

    Args:
        length: tokens of prompt and answer together.
        depth: share of the haystack that stands before the needle that is asked for, from 0 to 1, up to the nearest
            end of a sentence; None for a task without, or for a random one.

    Raises:
        TooShort: if needles, question and answer have more tokens than that.
    """
    bits = RandomBits(f"{task.name}|{task.version}|{haystack.sha256}|{seed}|{length}|{depth}", sample)
    drawn = task.draw(bits)
    needles = continuing(tokenizer, [f" {needle}" for needle in drawn.needles])
    question, answer = _question_and_answer(tokenizer, drawn.question, drawn.answer)
    fixed = len(haystack.prefix) + sum(map(len, needles)) + len(question) + len(answer)
    if fixed > length:
        raise TooShort(f"needles, question and answer have {fixed} tokens")
    pieces = haystack.fill(bits, length - fixed)
    ends = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces], dtype=np.int64)])
    wanted = bits.below(2**31, (len(needles),)) / 2**31
    if drawn.asked is None or depth is None:
        wanted = np.sort(wanted) if drawn.asked is None else wanted
    else:
        wanted[drawn.asked] = depth
    # After how many pieces each needle stands; those in the same place keep their order.
    places = np.abs(ends[None, :] - (wanted * ends[-1])[:, None]).argmin(axis=1)
    parts = [np.asarray(haystack.prefix, dtype=np.int64)]
    for number in range(len(pieces) + 1):
        parts += [needles[index] for index in np.flatnonzero(places == number)]
        if number < len(pieces):
            parts.append(pieces[number])
    return Prompt(np.concatenate([*parts, question]), answer, drawn.answer.strip())


def _question_and_answer(tokenizer, question: str, answer: str) -> tuple[np.ndarray, np.ndarray]:
    """Both as they are tokenized in one: what they do not share with the question alone belongs to the answer."""
    alone, both = continuing(tokenizer, [question, question + answer])
    shared = 0
    while shared < min(len(alone), len(both)) and alone[shared] == both[shared]:
        shared += 1
    return both[:shared], both[shared:]


def needle_samples(
    task: NeedleTask, haystack: Haystack, tokenizer, *, length: int, depth: float | None, count: int, seed: int = 0
) -> Iterator[Samples]:
    """The first `count` samples of a length and depth, few at a time; the answer alone is asked.

    Raises:
        TooShort: see `make_prompt`.
    """
    rows = max(1, _TOKENS // length)
    for first in range(0, count, rows):
        numbers = range(first, min(count, first + rows))
        tokens = np.empty((len(numbers), length), dtype=np.int64)
        targets = np.full_like(tokens, NO_TARGET)
        for row, sample in enumerate(numbers):
            made = make_prompt(task, haystack, tokenizer, length=length, depth=depth, sample=sample, seed=seed)
            tokens[row] = np.concatenate([made.prompt, made.answer])
            begin = length - len(made.answer)
            targets[row, begin - 1 : length - 1] = made.answer
        yield Samples(tokens, targets, np.full(len(numbers), length))
