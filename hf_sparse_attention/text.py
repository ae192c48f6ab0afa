"""Names of texts enter (local files, compressed or not, or datasets on the Hub), documents and their tokens leave;
and the tokenizer of a model, checked against its vocabulary. A leaf."""

from __future__ import annotations

import glob
import gzip
import io
import json
import logging
import lzma
import os
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

logger = logging.getLogger(__name__)

SEPARATOR = "<|endoftext|>"
SUFFIXES = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
COMPRESSED = (".xz", ".gz", ".zst")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


def read_documents(
    paths: list[str],
    *,
    text_column: str = "text",
    split: str = "train",
    streaming: bool = False,
    blank_lines: bool = False,
) -> Iterator[str]:
    """The documents of every named text, in order; empty ones are left out.

    Args:
        paths: files (.txt, .md, .jsonl, .json with one object a line, .parquet; each also .xz, .gz or .zst), patterns
            such as `books/*.jsonl.xz`, or dataset names on the Hub as `owner/name` or `owner/name:subset`.
        text_column: the column of a JSON line, parquet file or dataset that holds the text.
        split: the split of a dataset on the Hub; files have none.
        streaming: whether a dataset on the Hub is read without storing it first; files are always read as they come.
        blank_lines: whether a plain text without a separator line is split at blank lines.

    A plain text is split at the lines that are `<|endoftext|>`; without one it is one document.

    Raises:
        FileNotFoundError: for a name that is neither a file nor a possible dataset on the Hub.
        ValueError: for a file of an unknown kind, broken JSON or a missing column, with file and line.
        OSError: for a file that cannot be decompressed, or a dataset that cannot be fetched.
    """
    for kind, name in find_texts(paths):
        if kind == "hub":
            texts = _read_hub(name, text_column, split, streaming)
        elif kind == "parquet":
            texts = _read_parquet(name, text_column)
        elif kind == "jsonl":
            texts = _read_jsonl(name, text_column)
        else:
            texts = _read_text(name, blank_lines)
        for text in texts:
            if text.strip():
                yield text


def find_texts(paths: list[str]) -> list[tuple[str, str]]:
    """(kind, name) of every file or dataset that `paths` stands for; kind is text, jsonl, parquet or hub.

    Reads nothing, so that a wrong name is found before any work. Raises as `read_documents`.
    """
    found = []
    for path in paths:
        if os.path.isfile(path):
            found.append((_kind(path), path))
        elif matches := sorted(name for name in glob.glob(path, recursive=True) if os.path.isfile(name)):
            found += [(_kind(name), name) for name in matches]
        elif _HUB_NAME.fullmatch(path) and _suffix(path) not in SUFFIXES and not os.path.exists(path):
            found.append(("hub", path))
        else:
            hint = f" (it is a folder: write {path.rstrip('/')}/*.jsonl, say)" if os.path.isdir(path) else ""
            raise FileNotFoundError(
                f"no text {path!r}: it is neither a file, a pattern that matches files, nor owner/name{hint}"
            )
    if not found:
        raise ValueError("no text was named")
    return found


def load_tokenizer(folder: str | Path, vocab_size: int):
    """The tokenizer of a model folder.

    Raises:
        ValueError: if it has a token whose number the model's vocabulary does not reach.
        OSError: if the folder has no tokenizer or a broken one.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OSError(f"the tokenizer in {folder} cannot be loaded: {error}") from error
    check_tokenizer(tokenizer, vocab_size)
    return tokenizer


def check_tokenizer(tokenizer, vocab_size: int) -> None:
    """Raises ValueError if a token's number is beyond the model's vocabulary.

    Only a warning for marks that were added to the tokenizer and that plain text does not hold, as those of the images
    of a family's larger models; the model's embedding refuses their numbers should they occur.
    """
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= vocab_size}
    if not beyond:
        return
    used = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    unfit = {token: n for token, n in beyond.items() if n in used or n not in added or not added[n].special}
    token, number = max((unfit or beyond).items(), key=lambda item: item[1])
    if unfit:
        raise ValueError(
            f"the tokenizer does not fit the model: its token {token!r} is number {number}, the model's vocabulary "
            f"has {vocab_size} (tokenizer length {len(tokenizer)})"
        )
    logger.warning("the model's vocabulary has %d tokens and does not know the tokenizer's %s", vocab_size, token)


def encode_documents(tokenizer, documents: Iterable[str], *, batch: int = 256) -> Iterator[list[int]]:
    """Token numbers of each document, with the tokenizer's first token (bos) before and its last (eos) after it."""
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    last = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    documents = iter(documents)
    while texts := list(islice(documents, batch)):
        for tokens in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            if tokens:
                yield [*first, *tokens, *last]


def _suffix(path: str) -> str:
    stem, suffix = os.path.splitext(path.lower())
    return os.path.splitext(stem)[1] if suffix in COMPRESSED else suffix


def _kind(path: str) -> str:
    suffix = _suffix(path)
    if suffix not in SUFFIXES:
        raise ValueError(
            f"{path} ends in {suffix or 'nothing'}; readable are {', '.join(SUFFIXES)}, also followed by "
            f"{', '.join(COMPRESSED)}"
        )
    return SUFFIXES[suffix]


def _open(path: str) -> io.BufferedIOBase:
    lowered = path.lower()
    if lowered.endswith(".xz"):
        return lzma.open(path, "rb")
    if lowered.endswith(".gz"):
        return gzip.open(path, "rb")
    if lowered.endswith(".zst"):
        try:
            import zstandard
        except ImportError as error:
            raise ImportError(f'{path} needs zstandard: pip install "hf-sparse-attention[train]"') from error
        return zstandard.open(path, "rb")
    return open(path, "rb")


def _lines(path: str) -> Iterator[tuple[int, str]]:
    try:
        with _open(path) as raw, io.TextIOWrapper(raw, encoding="utf-8") as file:
            yield from enumerate(file, start=1)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise OSError(f"{path} cannot be decompressed, it may be cut off: {error}") from error
    except Exception as error:
        # zstandard is optional, so its error has no name here.
        if type(error).__name__ != "ZstdError":
            raise
        raise OSError(f"{path} cannot be decompressed, it may be cut off: {error}") from error


def _read_text(path: str, blank_lines: bool) -> Iterator[str]:
    document, separated = [], False
    for _, line in _lines(path):
        if line.strip() == SEPARATOR:
            separated = True
            yield "".join(document).strip("\n")
            document = []
        else:
            document.append(line)
    rest = "".join(document).strip("\n")
    if blank_lines and not separated:
        yield from re.split(r"\n[ \t]*\n\s*", rest)
    else:
        yield rest


def _read_jsonl(path: str, text_column: str) -> Iterator[str]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(
                f"{path} line {number} is a JSON {type(row).__name__}, not an object with {text_column!r}"
            )
        yield _text_of(row, text_column, f"{path} line {number}")


def _read_parquet(path: str, text_column: str) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f'{path} needs pyarrow: pip install "hf-sparse-attention[train]"') from error
    try:
        with _open(path) as raw:
            source = io.BytesIO(raw.read()) if path.lower().endswith(COMPRESSED) else path
        file = pyarrow.parquet.ParquetFile(source)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not a parquet file: {error}") from error
    if text_column not in file.schema_arrow.names:
        raise ValueError(f"{path} has no column {text_column!r}; it has {', '.join(file.schema_arrow.names)}")
    with file:
        for rows in file.iter_batches(batch_size=1024, columns=[text_column]):
            for text in rows.column(0).to_pylist():
                yield _text_of({text_column: text}, text_column, path)


def _read_hub(name: str, text_column: str, split: str, streaming: bool) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f'dataset {name} needs datasets: pip install "hf-sparse-attention[train]"') from error
    repository, _, subset = name.partition(":")
    try:
        rows = datasets.load_dataset(repository, subset or None, split=split, streaming=streaming)
    except ValueError as error:
        raise ValueError(f"dataset {name}, split {split!r}: {error}") from error
    except Exception as error:
        raise OSError(f"dataset {name}, split {split!r}, cannot be fetched: {error}") from error
    for number, row in enumerate(rows):
        yield _text_of(row, text_column, f"dataset {name} row {number}")


def _text_of(row: dict, text_column: str, where: str) -> str:
    if text_column not in row:
        raise ValueError(f"{where} has no {text_column!r}; it has {', '.join(map(str, row))}")
    text = row[text_column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"{where}: {text_column!r} is {type(text).__name__}, not text")
    return text
