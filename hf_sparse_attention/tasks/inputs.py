"""A task, a model and a length -> inputs: how many there are, what tells them from others, and how a model is scored
on them. Models with the same tokenizer get the same tokens."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tqdm import tqdm

from ..checkpoint import Checkpoint
from . import NEEDLE, TEXT, Task, perplexity
from .exact_match import generated, score, teacher_forced
from .haystack import Haystack
from .needles import NEEDLES, TooShort, check_tokenizer, needle_samples
from .samples import SyntheticTask
from .synthetic import make_task
from .windows import TokenizedText, Windows

ANSWERS = ("forced", "generated")
HAYSTACKS = ("sentences", "data")
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
# Samples of a cell where no limit is given.
NEEDLE_SAMPLES, SYNTHETIC_SAMPLES = 20, 1000


@dataclass(frozen=True)
class Inputs:
    """What a model is scored on in one cell.

    Args:
        count: how many there are; 0 with a reason in `missing`.
        sha256: of everything they follow from.
        tokens: tokens of one of them.
        place: what is told of them in results.json.
        score: (model, *, batch_tokens, progress) -> a dict of numbers, or {"missing": reason}.
        depth: share of the context before what is asked, or None.
        missing: why there are none.
        measure: what else the numbers follow from: models that differ in it alone saw the same tokens.
    """

    count: int
    sha256: str
    tokens: int
    place: dict
    score: Callable[..., dict]
    depth: float | None = None
    missing: str | None = None
    measure: str = ""


@dataclass
class Sources:
    """Where inputs come from.

    Args:
        documents: texts of the user, may be none.
        concatenate: whether they are joined before windows are cut.
        limit: at most so many inputs a cell; of text, windows of the longest length, which all are cut from.
        lengths: all that are asked for.
        seed: of the draw under a limit, and of needles.
        depths: of needles.
        haystack: one of `HAYSTACKS`.
        answers: one of `ANSWERS`: how an answer is taken from a model.
    """

    documents: list[str]
    concatenate: bool = False
    limit: int | None = None
    lengths: tuple[int, ...] = ()
    seed: int = 0
    depths: tuple[float, ...] = DEPTHS
    haystack: str = "sentences"
    answers: str = "forced"
    _texts: dict = field(default_factory=dict)
    _drawn: dict = field(default_factory=dict)
    _windows: dict = field(default_factory=dict)
    _haystacks: dict = field(default_factory=dict)

    def of(self, task: Task, length: int, *, folder: Path, name: str, vocabulary: int, tokenizer) -> list[Inputs]:
        """The inputs of a cell, or of one per depth.

        Args:
            folder, name: of the model.
            vocabulary: number of tokens the model knows.
            tokenizer: the model's, or None for a synthetic task.

        Raises:
            ValueError: for a tokenizer that does not belong to the model, or a model of another task.
        """
        if task.kind == TEXT:
            return [self._text_inputs(task, length, name, vocabulary, tokenizer)]
        if task.kind == NEEDLE:
            depths = self.depths if task.by_depth else (None,)
            return [self._needle_inputs(task, length, depth, name, vocabulary, tokenizer) for depth in depths]
        return [self._synthetic_inputs(task, length, folder, name, vocabulary)]

    def longest(self) -> int:
        """Tokens of the longest window that any tokenizer's text allows."""
        return max((text.longest for text in self._texts.values()), default=0)

    def _text_inputs(self, task: Task, length: int, name: str, vocabulary: int, tokenizer) -> Inputs:
        same = tokenizer_identity(tokenizer)
        if same not in self._texts:
            bar = tqdm(self.documents, desc="tokenizing", unit="document", **pace())
            text = TokenizedText.of(bar, tokenizer)
            self._texts[same] = text.joined() if self.concatenate else text
        text = self._texts[same]
        highest = max((int(document.max()) for document in text.documents), default=0)
        _check_vocabulary(name, highest, vocabulary)
        slides = task.name == "sliding_perplexity"
        if self.limit is not None and same not in self._drawn:
            self._drawn[same] = text.drawn(self.lengths or (length,), self.limit, self.seed)
        longest, spans = self._drawn.get(same, (0, None))
        if (same, length, slides) not in self._windows:
            cut = text.sliding_windows if slides else text.windows
            self._windows[same, length, slides] = cut(length, spans=spans)
        windows: Windows = self._windows[same, length, slides]
        drawn = {} if spans is None else {"drawn": {"windows": len(spans), "length": longest}}
        reason = "the joined documents have fewer than" if self.concatenate else "no document has"
        return Inputs(
            count=len(windows),
            sha256=windows.sha256,
            tokens=length,
            place={"windows": len(windows), "tokens": windows.scored, "documents": windows.documents, **drawn},
            score=partial(_score_windows, windows),
            missing=None if len(windows) else f"{reason} {length:,} tokens",
            # Tokenizers that drop accents or know few words give different texts the same tokens.
            measure="" if windows.bytes is None else _sha256(windows.bytes.tolist()),
        )

    def _needle_inputs(
        self, task: Task, length: int, depth: float | None, name: str, vocabulary: int, tokenizer
    ) -> Inputs:
        same = tokenizer_identity(tokenizer)
        if same not in self._haystacks:
            check_tokenizer(name, tokenizer)
            documents = self.documents if self.haystack == "data" else None
            self._haystacks[same] = Haystack.of(documents, tokenizer)
        haystack = self._haystacks[same]
        _check_vocabulary(name, max(int(piece.max()) for piece in haystack.pieces), vocabulary)
        count = NEEDLE_SAMPLES if self.limit is None else self.limit
        samples = partial(
            needle_samples, NEEDLES[task.name], haystack, tokenizer, length=length, depth=depth, count=count,
            seed=self.seed,
        )  # fmt: skip
        return Inputs(
            count=count,
            sha256=_sha256(
                task.name, task.version, same, haystack.sha256, length, depth, count, self.seed, self.answers
            ),
            tokens=length,
            place={"samples": count, "answers": self.answers},
            score=partial(_score_answers, samples, self.answers, False),
            depth=depth,
        )

    def _synthetic_inputs(self, task: Task, length: int, folder: Path, name: str, vocabulary: int) -> Inputs:
        made = trained_task(folder, name)
        if made.name != task.name:
            raise ValueError(f"{name} was trained on {made.name} (its task.json says so), not on {task.name}")
        if made.vocabulary > vocabulary:
            raise ValueError(f"{name} has {vocabulary} tokens, but its task.json needs {made.vocabulary}")
        made.check_lengths((length, length))
        count = SYNTHETIC_SAMPLES if self.limit is None else self.limit
        return Inputs(
            count=count,
            sha256=_sha256(made.identity, length, count, self.answers),
            tokens=made.width(length),
            place={"samples": count, "answers": self.answers},
            score=partial(_score_answers, partial(made.fixed_blocks, length, count), self.answers, made.tags),
        )


def trained_task(folder: Path, name: str) -> SyntheticTask:
    """The synthetic task of a model that `train-task` made.

    Raises:
        ValueError: if the folder does not say.
    """
    file = folder / "task.json"
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        return make_task(saved["task"], saved["settings"])
    except FileNotFoundError:
        raise ValueError(f"{name} was not trained on a synthetic task: it has no task.json of train-task") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a task.json of train-task: {error}") from error


def _trained_length(folder: Path, name: str) -> tuple[int, int] | None:
    """Longest length that a model of `train-task` was trained at, and that in tokens; None where no file says it.

    Raises:
        ValueError: for a task.json that is none.
    """
    if not (folder / "task.json").is_file():
        return None
    lengths = json.loads((folder / "task.json").read_text(encoding="utf-8")).get("lengths")
    return None if lengths is None else (lengths[1], trained_task(folder, name).width(lengths[1]))


def reach(checkpoint: Checkpoint) -> dict | None:
    """The length beyond which the model's numbers are marked, also in tokens, and what it is: that of its training
    where a file says it; max_position_embeddings, which schemes without rotary positions do not know, for the others.
    """
    sparse = checkpoint.sparse
    if trained := _trained_length(checkpoint.source.folder, checkpoint.path):
        return {"what": "training length", "length": trained[0], "tokens": trained[1]}
    if sparse is not None and sparse.position != "rope":
        # That of the config is what its factors were started for, which blocks that grow leave behind.
        length = _trained_blocks(checkpoint) or sparse.train_length
        if length is not None:
            return {"what": "training length", "length": length, "tokens": length}
    if checkpoint.positions is None:
        return None
    return {"what": "max_position_embeddings", "length": checkpoint.positions, "tokens": checkpoint.positions}


def _trained_blocks(checkpoint: Checkpoint) -> int | None:
    """The longest blocks of the run of `train` that made the model; None where no file says it of these weights."""
    try:
        summary = json.loads((checkpoint.source.folder / "summary.json").read_text(encoding="utf-8"))
        if summary["fingerprint"] != checkpoint.fingerprint:
            return None
        return max(int(stage["block_size"]) for stage in summary.get("stages") or [summary])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def tokenizer_identity(tokenizer) -> str:
    """Equal for tokenizers that give the same tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else f"{tokenizer.name_or_path} {len(tokenizer)}"
    return hashlib.sha256(f"{content} {tokenizer.eos_token_id}".encode()).hexdigest()


def pace() -> dict:
    """A bar that moves on a terminal, and a line now and then in a log."""
    return {"mininterval": 0.2 if sys.stderr.isatty() else 30, "dynamic_ncols": True}


def _check_vocabulary(name: str, highest: int, vocabulary: int) -> None:
    if highest >= vocabulary:
        raise ValueError(
            f"{name}: its tokenizer gives token {highest}, the model has {vocabulary}: they do not belong together"
        )


def _sha256(*parts) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _score_windows(windows: Windows, model, **options) -> dict:
    scored = perplexity.score if windows.first is None else perplexity.score_sliding
    return scored(model, windows, **options)


def _score_answers(samples: Callable, answers: str, tags: bool, model, **options) -> dict:
    answer = teacher_forced if answers == "forced" else partial(generated, tags=tags)
    try:
        return score(model, samples(), answer=answer, **options)
    except TooShort as error:
        return {"missing": str(error)}
