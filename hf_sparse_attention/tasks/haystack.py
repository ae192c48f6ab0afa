"""Sentences and a tokenizer -> haystacks of an exact number of tokens, the same for the same random bits. A sentence
is tokenized for itself, and none but the first is ever cut: what is hidden stands between two whole ones."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .random_bits import RandomBits
from .windows import added_tokens

# What haystacks are made of without text of the user's own.
SENTENCES = (
    "The river runs past the old mill.", "A grey cat sleeps on the warm wall.", "Rain fell on the hills all night.",
    "The baker opens his shop before dawn.", "Two boats lie on the sand.", "Snow covers the road to the pass.",
    "The children play behind the school.", "A cart with hay stands at the gate.", "The wind turned to the north.",
    "Her brother mends the broken fence.", "The clock on the tower is slow.", "Apples ripen late in this valley.",
    "The teacher draws a map of the coast.", "A dog barks somewhere in the dark.", "The train was on time again.",
    "They carry water from the well.", "The market closes at noon.", "Bees gather in the lime trees.",
    "The lamp in the hall is never lit.", "Someone has swept the stairs.", "The ferry crosses twice a day.",
    "An owl lives in the empty barn.", "The letters lie unopened on the desk.", "Smoke rises from the chimney.",
)  # fmt: skip
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\u201d\u2019]*\s+")


@dataclass(frozen=True)
class Haystack:
    """Sentences as tokens.

    Args:
        pieces: int64 (tokens,) per sentence, none empty.
        prefix: what the tokenizer puts before a text.
        ordered: whether sentences follow each other as in the text, from a random one on; else each is drawn.
        sha256: of the sentences and the order.
    """

    pieces: list[np.ndarray]
    prefix: list[int]
    ordered: bool
    sha256: str

    @classmethod
    def of(cls, documents: Iterable[str] | None, tokenizer) -> Haystack:
        """Of the sentences of documents, in their order; of `SENTENCES` without documents.

        Raises:
            ValueError: if there is no sentence.
        """
        ordered = documents is not None
        sentences = list(SENTENCES) if documents is None else sentences_of(documents)
        if not sentences:
            raise ValueError("the haystack has no sentence: the text is empty")
        digest = hashlib.sha256(("\n".join(sentences) + str(ordered)).encode("utf-8", "surrogatepass")).hexdigest()
        pieces = [ids for ids in continuing(tokenizer, [f" {sentence}" for sentence in sentences]) if len(ids)]
        return cls(pieces, added_tokens(tokenizer)[0], ordered, digest)

    def fill(self, bits: RandomBits, count: int) -> list[np.ndarray]:
        """Pieces with `count` tokens in all; the first may be but the end of a sentence."""
        chosen, total = [], 0
        place = int(bits.below(len(self.pieces), (1,))[0])
        while total < count:
            if self.ordered:
                numbers = (place + np.arange(1024)) % len(self.pieces)
                place += 1024
            else:
                numbers = bits.below(len(self.pieces), (1024,))
            for number in numbers:
                chosen.append(self.pieces[number])
                total += len(chosen[-1])
                if total >= count:
                    break
        # What is too much comes off the front; the first sentences may be shorter than the last one.
        cut, pieces = total - count, []
        for piece in chosen:
            if cut < len(piece):
                pieces.append(piece[cut:])
            cut = max(0, cut - len(piece))
        return pieces


def continuing(tokenizer, texts: list[str]) -> list[np.ndarray]:
    """Texts -> their tokens as they are behind a sentence: some tokenizers put a space of their own before a text."""
    anchor = SENTENCES[0]
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    before = tokenizer(anchor, **options)["input_ids"]
    found = []
    for alone, behind in zip(
        tokenizer(texts, **options)["input_ids"],
        tokenizer([anchor + text for text in texts], **options)["input_ids"],
        strict=True,
    ):
        # Where text and sentence share a token, the text stands for itself.
        ids = behind[len(before) :] if behind[: len(before)] == before else alone
        found.append(np.asarray(ids, dtype=np.int64))
    return found


def sentences_of(documents: Iterable[str]) -> list[str]:
    """Sentences, as far as ., ! and ? before white space end one; white space within is one space."""
    return [
        " ".join(sentence.split())
        for document in documents
        for sentence in _SENTENCE_END.split(document)
        if sentence.strip()
    ]
