"""Token lists of documents enter, batches of fixed blocks leave in which every document counts its positions from 0
and no label crosses from one document to the next. The way through the data is a state that can be saved. A leaf."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

# Rows of a batch are blocks; a document that goes on in the next block starts there again at position 0.
IGNORED_LABEL = -100


class Blocks:
    """Tokens in memory or mapped from disk, seen as blocks of equal length.

    Args:
        tokens: (tokens,) of all documents one after the other; what does not fill a block is left out.
        starts: (documents,) index of each document's first token, ascending from 0.
        block_size: tokens in a block.
    """

    def __init__(self, tokens: np.ndarray, starts: np.ndarray, block_size: int):
        self.tokens, self.starts, self.block_size = tokens, starts, block_size
        self.count = len(tokens) // block_size
        inside = starts[(starts % block_size != 0) & (starts < self.count * block_size)] // block_size
        # The first token of a block, and of each document inside, is predicted from nothing.
        self.labels = block_size - 1 - np.bincount(inside, minlength=self.count)

    def __len__(self) -> int:
        return self.count

    def rows(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Block numbers (rows,) -> tokens and positions, int64 (rows, block_size)."""
        first = np.asarray(blocks, dtype=np.int64)[:, None] * self.block_size
        index = first + np.arange(self.block_size)
        document = self.starts[np.searchsorted(self.starts, index, side="right") - 1]
        return self.tokens[index].astype(np.int64), index - np.maximum(document, first)

    def documents(self, block: int) -> range:
        """Numbers of the documents that have tokens in a block."""
        first, last = block * self.block_size, (block + 1) * self.block_size - 1
        found = np.searchsorted(self.starts, [first, last], side="right") - 1
        return range(int(found[0]), int(found[1]) + 1)


def pack(documents: Iterator[list[int]], vocab_size: int, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Token lists -> all tokens one after the other, and where each document starts.

    Args:
        limit: no further document is read once there are so many tokens.
    """
    dtype = np.uint16 if vocab_size <= 2**16 else np.int32
    pieces, total = [], 0
    for tokens in documents:
        pieces.append(np.asarray(tokens, dtype=dtype))
        total += len(tokens)
        if limit is not None and total >= limit:
            break
    lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
    tokens = np.concatenate(pieces) if pieces else np.empty(0, dtype=dtype)
    return tokens, np.cumsum(lengths) - lengths


def save_packed(folder: Path, tokens: np.ndarray, starts: np.ndarray) -> None:
    np.save(folder / "tokens.npy", tokens)
    np.save(folder / "starts.npy", starts)


def load_packed(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """What `save_packed` wrote; the tokens stay on disk until they are read."""
    return np.load(folder / "tokens.npy", mmap_mode="r"), np.load(folder / "starts.npy")


def batch_of(tokens: np.ndarray, positions: np.ndarray) -> dict[str, np.ndarray]:
    """What a model takes: the labels are the tokens, except where a document or block begins."""
    labels = np.where(positions == 0, IGNORED_LABEL, tokens)
    return {"input_ids": tokens, "position_ids": positions, "labels": labels}


class ShuffledBlocks:
    """An endless walk over blocks, in a new order each epoch that follows from the seed alone.

    Args:
        blocks: what is walked over.
        seed: of the order; None walks in the order of the data.
    """

    def __init__(self, blocks: Blocks, seed: int | list[int] | None):
        self.blocks, self.seed = blocks, seed
        self.consumed = 0
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def take(
        self, count: int, mine: Callable[[int], slice | np.ndarray]
    ) -> tuple[dict[str, np.ndarray], int, list[int]]:
        """The next `count` blocks.

        Args:
            mine: which of `count` rows this process computes.

        Returns:
            the batch of this process, the number of labels in all `count` blocks, and the block numbers of the batch.
        """
        numbers = np.array([self._number(self.consumed + index) for index in range(count)])
        self.consumed += count
        chosen = numbers[mine(count)]
        return batch_of(*self.blocks.rows(chosen)), int(self.blocks.labels[numbers].sum()), chosen.tolist()

    @property
    def epochs(self) -> float:
        return self.consumed / len(self.blocks)

    def documents(self, block: int) -> range:
        return self.blocks.documents(block)

    def _number(self, index: int) -> int:
        epoch, place = divmod(index, len(self.blocks))
        if self.seed is None:
            return place
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([*np.atleast_1d(self.seed), epoch]).permutation(len(self.blocks))
        return int(self._order[place])

    def skip(self, count: int) -> None:
        """Goes past blocks without looking at them."""
        self.consumed += count

    def state_dict(self) -> dict:
        return {"consumed": self.consumed}

    def load_state_dict(self, state: dict) -> None:
        self.consumed = state["consumed"]


class StreamedBlocks:
    """The same walk over documents that are read and packed as they come, shuffled within a buffer of blocks.

    The state holds the buffer, so going on after a stop reads past the documents already seen but does not encode
    them again.

    Args:
        texts: makes the stream of documents from its beginning.
        encode: texts -> token lists, one for every text that has tokens.
        block_size: tokens in a block.
        seed: of the order; None keeps the order of the data.
        buffer: number of blocks that are shuffled among each other.
    """

    def __init__(
        self,
        texts: Callable[[], Iterator[str]],
        encode: Callable[[Iterator[str]], Iterator[list[int]]],
        block_size: int,
        seed: int | None,
        buffer: int = 1024,
    ):
        self.texts, self.encode, self.block_size, self.seed = texts, encode, block_size, seed
        self.buffer = buffer if seed is not None else 1
        self.consumed = self.epoch = self.documents_read = self.epoch_blocks = 0
        # Of each token not yet in a block: itself, its position, the number of its document.
        self.rest = np.empty((3, 0), np.int64)
        # Blocks in the buffer, three rows each as above.
        self.waiting: list[np.ndarray] = []
        self._taken: dict[int, range] = {}
        self.generator = np.random.default_rng(0 if seed is None else seed)
        self._stream: Iterator[str] | None = None

    def take(
        self, count: int, mine: Callable[[int], slice | np.ndarray]
    ) -> tuple[dict[str, np.ndarray], int, list[int]]:
        """As `ShuffledBlocks.take`; a block is numbered by when it was taken."""
        rows = np.stack([self._next() for _ in range(count)])
        numbers = np.arange(self.consumed, self.consumed + count)
        self.consumed += count
        chosen = mine(count)
        tokens, positions, documents = rows[chosen].swapaxes(0, 1)
        chosen = numbers[chosen].tolist()
        self._taken = {
            number: range(int(row[0]), int(row[-1]) + 1) for number, row in zip(chosen, documents, strict=True)
        }
        return batch_of(tokens, positions), int((rows[:, 1] != 0).sum()), chosen

    @property
    def epochs(self) -> float:
        """Passes over the data that were begun before the present one; how long that is, a stream does not know."""
        return float(self.epoch)

    def documents(self, block: int) -> range:
        """Numbers, in the order of the data, of the documents that have tokens in a block of the last batch."""
        return self._taken[block]

    def skip(self, count: int) -> None:
        """Goes past blocks; they are read and encoded, the buffer shuffles them like the others."""
        for _ in range(count):
            self._next()
        self.consumed += count

    def _next(self) -> np.ndarray:
        while len(self.waiting) < self.buffer and self._fill():
            pass
        place = int(self.generator.integers(len(self.waiting))) if self.seed is not None else 0
        self.waiting[place], self.waiting[-1] = self.waiting[-1], self.waiting[place]
        return self.waiting.pop()

    def _fill(self) -> bool:
        """Moves one block into the buffer; False at the end of the data while the buffer still holds blocks."""
        while self.rest.shape[1] < self.block_size:
            if self._stream is None:
                self._stream = islice(self.texts(), self.documents_read, None)
            text = next(self._stream, None)
            if text is None:
                if self.waiting:
                    return False
                if not self.epoch_blocks:
                    raise ValueError(
                        f"the data has {self.documents_read} documents with {self.rest.shape[1]} tokens, less than "
                        f"one block of {self.block_size}"
                    )
                self._stream, self.documents_read, self.epoch_blocks = None, 0, 0
                self.rest = self.rest[:, :0]
                self.epoch += 1
                continue
            for tokens in self.encode(iter([text])):
                numbers = np.full(len(tokens), self.documents_read)
                self.rest = np.concatenate([self.rest, [tokens, np.arange(len(tokens)), numbers]], axis=1)
            self.documents_read += 1
        block = self.rest[:, : self.block_size].copy()
        block[1] = self._restarted(block[1])
        self.waiting.append(block)
        self.rest = self.rest[:, self.block_size :]
        self.epoch_blocks += 1
        return True

    @staticmethod
    def _restarted(positions: np.ndarray) -> np.ndarray:
        """The part of a document that a block begins with counts from 0."""
        later = np.flatnonzero(positions == 0)
        ending = later[0] if len(later) else len(positions)
        return np.concatenate([np.arange(ending), positions[ending:]])

    def state_dict(self) -> dict:
        waiting = np.array(self.waiting, dtype=np.int64)
        return {
            "consumed": self.consumed,
            "epoch": self.epoch,
            "epoch_blocks": self.epoch_blocks,
            "documents_read": self.documents_read,
            "rest": self.rest,
            "waiting": waiting.reshape(-1, 3, self.block_size),
            "generator": self.generator.bit_generator.state,
        }

    def load_state_dict(self, state: dict) -> None:
        self.consumed, self.epoch = state["consumed"], state["epoch"]
        self.epoch_blocks, self.documents_read = state["epoch_blocks"], state["documents_read"]
        self.rest, self.waiting = state["rest"], list(state["waiting"])
        self.generator.bit_generator.state = state["generator"]
        self._stream = None
