"""Documents and a tokenizer -> windows of a length: runs of tokens that do not overlap, each shown to a model alone.

A window starts with what the tokenizer itself puts before a text (often nothing, or <s>), as any prompt would.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

# A stretch of text: number of the document, its first token, and the one after its last.
Span = tuple[int, int, int]


@dataclass(frozen=True)
class Windows:
    """Windows of one length.

    Args:
        tokens: int64 (windows, length).
        bytes: UTF-8 bytes of the text that the predicted tokens stand for, (windows,); None if the tokenizer
            does not say which text its tokens stand for.
        documents: how many documents they come from; one if the documents were joined.
        first: of windows that overlap, the first token of each that is scored, (windows,), at least 1; None where all
            tokens after the given ones are.
        given: tokens at the beginning of each that are given, not predicted: what the tokenizer puts before a text,
            and at least one.
    """

    tokens: torch.Tensor
    bytes: torch.Tensor | None
    documents: int
    first: torch.Tensor | None = None
    given: int = 1

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def sha256(self) -> str:
        """Of the shape and the tokens: two models with the same one saw the same tokens."""
        shape = ",".join(map(str, self.tokens.shape)) + (f"|{self.given}" if self.given > 1 else "")
        first = b"" if self.first is None else self.first.to(torch.int64).numpy().tobytes()
        return hashlib.sha256(shape.encode() + self.tokens.to(torch.int64).numpy().tobytes() + first).hexdigest()

    @property
    def scored(self) -> int:
        """Number of tokens that are predicted."""
        count, length = self.tokens.shape
        return count * (length - self.given) if self.first is None else count * length - int(self.first.sum())


@dataclass(frozen=True)
class TokenizedText:
    """Documents as tokens, cut to windows of any length by `windows`.

    Args:
        documents: int32 (tokens,) per document, without special tokens.
        ends: per document, the byte at which each token's text ends; None if the tokenizer does not say.
        prefix: what the tokenizer puts before a text.
        separator: what stands between joined documents: what the tokenizer puts after one and before the next, or,
            if that is nothing, its end-of-text token.
    """

    documents: list[np.ndarray]
    ends: list[np.ndarray] | None
    prefix: list[int]
    separator: list[int]

    @classmethod
    def of(cls, documents: Iterable[str], tokenizer) -> TokenizedText:
        """Tokenizes; documents without a token are left out."""
        prefix, suffix = added_tokens(tokenizer)
        end_of_text = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ids, ends = [], []
        with_offsets = bool(tokenizer.is_fast)
        for text in documents:
            encoded = tokenizer(
                text, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=with_offsets,
                verbose=False,
            )  # fmt: skip
            if not encoded["input_ids"]:
                continue
            ids.append(np.asarray(encoded["input_ids"], dtype=np.int32))
            if with_offsets:
                ends.append(_byte_ends(text, np.asarray(encoded["offset_mapping"], dtype=np.int64)[:, 1]))
        return cls(ids, ends if with_offsets else None, prefix, suffix + prefix or end_of_text)

    @property
    def longest(self) -> int:
        """Length of the longest window the documents allow, unjoined; 0 without documents."""
        return max((len(document) for document in self.documents), default=-len(self.prefix)) + len(self.prefix)

    @property
    def total(self) -> int:
        """Number of tokens, without special ones."""
        return sum(map(len, self.documents))

    def joined(self) -> TokenizedText:
        """All documents as one, in their order."""
        pieces, bounds, offset = [], [], 0
        for index, document in enumerate(self.documents):
            if index:
                pieces.append(np.asarray(self.separator, dtype=np.int32))
                bounds.append(np.full(len(self.separator), offset, dtype=np.int64))
            pieces.append(document)
            if self.ends is not None:
                bounds.append(self.ends[index] + offset)
                offset += int(self.ends[index][-1])
        if not pieces:
            return self
        ends = None if self.ends is None else [np.concatenate(bounds)]
        return TokenizedText([np.concatenate(pieces)], ends, self.prefix, self.separator)

    def drawn(self, lengths: Sequence[int], limit: int, seed: int = 0) -> tuple[int, list[Span]]:
        """The text of `limit` windows of the longest length of which there are any: a sample that all lengths are cut
        from, so that what differs between them is not the text.

        Returns:
            that length (0 if there is none), and the stretches of text.
        """
        for length in sorted(set(lengths), reverse=True):
            size = self._text_length(length)
            if places := _drawn(self._places(size, self._whole()), limit, seed):
                return length, [(index, start, start + size) for index, start in places]
        return 0, []

    def windows(
        self, length: int, *, limit: int | None = None, seed: int = 0, spans: Sequence[Span] | None = None
    ) -> Windows:
        """All windows of `length` tokens, prefix included, in the order of the text; or `limit` of them.

        A limit takes the first ones of an order drawn with the seed, so that a smaller limit gives a part of a larger
        one's windows. There may be none: no document is long enough. `spans` are what is cut, instead of all text.

        Raises:
            ValueError: for a length that leaves no token to predict.
        """
        text_length = self._text_length(length)
        places = _drawn(self._places(text_length, self._whole() if spans is None else spans), limit, seed)
        tokens = np.empty((len(places), length), dtype=np.int64)
        tokens[:, : len(self.prefix)] = self.prefix
        counts = None if self.ends is None else np.empty(len(places), dtype=np.int64)
        for row, (index, start) in enumerate(places):
            tokens[row, len(self.prefix) :] = self.documents[index][start : start + text_length]
            if counts is not None:
                ends = self.ends[index]
                # The first token of a window is given, the others are predicted.
                given = start if not self.prefix else start - 1
                counts[row] = ends[start + text_length - 1] - (ends[given] if given >= 0 else 0)
        return Windows(
            torch.from_numpy(tokens),
            None if counts is None else torch.from_numpy(counts),
            len({index for index, _ in places}),
            given=max(1, len(self.prefix)),
        )

    def sliding_windows(self, length: int, *, spans: Sequence[Span] | None = None) -> Windows:
        """Windows of `length` tokens, each half a window further, in which every token of a document is scored once,
        with the most context that is in the window: at least half of it, but for the first ones of a document.

        The last window of a document ends with it. Documents shorter than a window are left out. Of `spans` every
        token is scored, instead of all text; what stands before one in its document is context.
        """
        text_length = self._text_length(length)
        step = max(1, text_length // 2)
        places = []
        for index, begin, end in self._whole() if spans is None else spans:
            if end - begin < text_length:
                continue
            # Without a prefix the first token of a document is given.
            scored = begin if begin or self.prefix else 1
            while scored < end:
                stop = min(max(scored + step, text_length), end)
                start = stop - text_length
                places.append((index, start, scored - start + len(self.prefix)))
                scored = stop
        tokens = np.empty((len(places), length), dtype=np.int64)
        tokens[:, : len(self.prefix)] = self.prefix
        for row, (index, start, _) in enumerate(places):
            tokens[row, len(self.prefix) :] = self.documents[index][start : start + text_length]
        return Windows(
            torch.from_numpy(tokens),
            None,
            len({index for index, _, _ in places}),
            torch.tensor([first for _, _, first in places], dtype=torch.int64),
        )

    def _whole(self) -> list[Span]:
        return [(index, 0, len(document)) for index, document in enumerate(self.documents)]

    def _places(self, size: int, spans: Sequence[Span]) -> list[tuple[int, int]]:
        """(document, first token) of the pieces of so many tokens that lie one behind the other in the spans."""
        return [(index, start) for index, begin, end in spans for start in range(begin, end - size + 1, size)]

    def _text_length(self, length: int) -> int:
        text_length = length - len(self.prefix)
        if length < 2 or text_length < 1:
            raise ValueError(
                f"length is {length}; a window holds at least 2 tokens and the tokenizer's own {len(self.prefix)}"
            )
        return text_length


def _drawn(places: list, limit: int | None, seed: int) -> list:
    """All places, or the first `limit` of an order drawn with the seed, in the order of the text."""
    if limit is None or limit >= len(places):
        return places
    order = list(range(len(places)))
    random.Random(seed).shuffle(order)
    return [places[index] for index in sorted(order[:limit])]


def added_tokens(tokenizer) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []


def _byte_ends(text: str, ends: np.ndarray) -> np.ndarray:
    """Ends in characters -> ends in UTF-8 bytes, never falling (special tokens stand for an empty piece at 0)."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    sizes = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
    total = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    return np.maximum.accumulate(total[ends])
