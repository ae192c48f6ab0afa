"""Texts and a tokenizer -> the blocks of a run: what is trained on, what is held out, which rows are a process's."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..files import whole_folder
from ..text import encode_documents, find_texts, read_documents
from .arguments import TrainArguments
from .packing import IGNORED_LABEL, Blocks, StreamedBlocks, batch_of, load_packed, pack, save_packed


def check_texts(arguments: TrainArguments) -> None:
    """Looks for the texts of a run.

    Raises:
        FileNotFoundError: for one that is not there.
        ValueError: for one that is trained on and evaluated on.
    """
    trained = _places(arguments.train_data, arguments.train_split)
    both = [name for place, name in _places(arguments.eval_data, arguments.eval_split).items() if place in trained]
    if both:
        raise ValueError(
            f"eval_data has {both[0]}, which train_data has too: its loss would not be that of held-out text. Name "
            "another, or a pattern for train_data that leaves it out"
        )


def _places(names: list[str], split: str | None) -> dict[tuple, str]:
    """The names of texts by what tells them apart."""
    found = find_texts(names) if names else []
    return {(name, split) if kind == "hub" else (os.path.realpath(name),): name for kind, name in found}


def _documents(arguments: TrainArguments, names: list[str], split: str) -> Iterator[str]:
    return read_documents(
        names, text_column=arguments.text_column, split=split, streaming=arguments.streaming,
        blank_lines=arguments.blank_lines,
    )  # fmt: skip


def streamed_blocks(arguments: TrainArguments, tokenizer, block_size: int, seed: int | None) -> StreamedBlocks:
    """Training text read and packed as it comes; without a seed in its own order."""
    texts = partial(_documents, arguments, arguments.train_data, arguments.train_split)
    encode = partial(encode_documents, tokenizer)
    return StreamedBlocks(texts, encode, block_size, seed, arguments.shuffle_buffer)


def packed_tokens(
    place: Path, arguments: TrainArguments, tokenizer, block_size: int, accelerator
) -> tuple[np.ndarray, np.ndarray]:
    """All training tokens and where documents start, encoded once and kept in a folder of `place`; at least one block
    of them. The first process does it and, where they do not find its folder, the first one of each other machine."""
    names = find_texts(arguments.train_data)
    stamps = [
        [name, *((os.stat(name).st_size, os.stat(name).st_mtime_ns) if kind != "hub" else ())] for kind, name in names
    ]
    options = [arguments.text_column, arguments.train_split, arguments.blank_lines]
    digest = hashlib.sha256(json.dumps([stamps, options, _rules_of(tokenizer)]).encode()).hexdigest()
    folder = place / digest[:16]
    with accelerator.main_process_first(), accelerator.local_main_process_first():
        if accelerator.is_local_main_process and not folder.is_dir():
            documents = _documents(arguments, arguments.train_data, arguments.train_split)
            counted = tqdm(
                documents,
                desc="encode",
                unit=" documents",
                mininterval=0.5 if sys.stderr.isatty() else 10,
                leave=False,
            )
            tokens, starts = pack(encode_documents(tokenizer, counted), len(tokenizer))
            # Before anything is written.
            _check_tokens("train_data", arguments.train_data, len(starts), len(tokens), block_size)
            with whole_folder(folder) as partial_folder:
                save_packed(partial_folder, tokens, starts)
    tokens, starts = load_packed(folder)
    _check_tokens("train_data", arguments.train_data, len(starts), len(tokens), block_size)
    return tokens, starts


def _rules_of(tokenizer) -> list:
    """What a text's tokens follow from. Of a tokenizer in Rust all of it, wherever it lies: the model that a stage
    goes on from has a copy. Another is known by its folder."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    rules = tokenizer.name_or_path if fast is None else fast.to_str()
    return [rules, sorted(tokenizer.get_vocab().items()), tokenizer.bos_token_id, tokenizer.eos_token_id]


def held_out_blocks(arguments: TrainArguments, tokenizer, block_size: int) -> dict[str, np.ndarray] | None:
    """The first `eval_blocks` blocks of the evaluation text."""
    if not arguments.eval_data:
        return None
    documents = _documents(arguments, arguments.eval_data, arguments.eval_split)
    tokens, starts = pack(
        encode_documents(tokenizer, documents, batch=16), len(tokenizer), arguments.eval_blocks * block_size
    )
    _check_tokens("eval_data", arguments.eval_data, len(starts), len(tokens), block_size)
    blocks = Blocks(tokens, starts, block_size)
    batch = batch_of(*blocks.rows(np.arange(min(len(blocks), arguments.eval_blocks))))
    if not (batch["labels"] != IGNORED_LABEL).any():
        raise ValueError(
            f"eval_data {', '.join(arguments.eval_data)} has nothing to predict in {len(batch['labels'])} blocks of "
            f"{block_size}: every token begins a document or a block. Use longer documents or a larger --block_size"
        )
    return batch


def _check_tokens(option: str, names: list[str], documents: int, tokens: int, block_size: int) -> None:
    if not tokens:
        raise ValueError(f"{option} {', '.join(names)} is empty: no document with a token")
    if tokens < block_size:
        raise ValueError(
            f"{option} {', '.join(names)} has {documents} documents with {tokens} tokens, less than one block of "
            f"{block_size}: use more text or a smaller --block_size"
        )


def rows_of_process(passes: int, batch_size: int, accelerator, count: int) -> np.ndarray:
    """Which of a step's blocks this process computes: of each forward pass, its own run of them."""
    shape = (passes, accelerator.num_processes, batch_size)
    return np.arange(count).reshape(shape)[:, accelerator.process_index].ravel()


def tensors_of(batch: dict[str, np.ndarray], rows: slice, device: torch.device) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(values[rows]).to(device, non_blocking=True) for name, values in batch.items()}


def held_out_batches(blocks: dict[str, np.ndarray], batch_size: int, accelerator) -> Iterator[dict[str, torch.Tensor]]:
    """This process's batches of the held-out blocks; all processes get equally many, the last ones without labels."""
    size, processes = batch_size, accelerator.num_processes
    count = len(blocks["labels"])
    for first in range(0, count, size * processes):
        index = np.arange(first + accelerator.process_index * size, first + (accelerator.process_index + 1) * size)
        if processes == 1:
            index = index[index < count]
        rows = {name: values[index % count] for name, values in blocks.items()}
        rows["labels"] = np.where((index < count)[:, None], rows["labels"], IGNORED_LABEL)
        yield tensors_of(rows, slice(None), accelerator.device)
