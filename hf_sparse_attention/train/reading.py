"""The text of a stage: the blocks that are held out, those that are watched, and the way through what is trained on,
phase by phase. Every process knows all of a step's blocks and computes its share of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch

from .data import held_out_batches, held_out_blocks, packed_tokens, rows_of_process, streamed_blocks, tensors_of
from .job import Job
from .lengths import phase_at
from .packing import Blocks, ShuffledBlocks, batch_of


class Reading:
    """Where a stage is in its text; `data` is the way through it in the present phase.

    Args:
        first_token: how many tokens of the data an earlier stage has seen.
        packed: folder of encoded text that several stages share (default: `output/packed`).

    Raises:
        ValueError: for text in which there is nothing to train on, or nothing to be held out.
        OSError: if it is missing or corrupt, or the disk is full.
    """

    def __init__(self, job: Job, *, first_token: int, packed: Path | None):
        self.job, self.first_token = job, first_token
        arguments, count = job.arguments, max(1, job.arguments.statistics_blocks)
        self.held_out = held_out_blocks(arguments, job.tokenizer, job.block_size)
        if arguments.streaming:
            # In the order of the data and from its beginning; raises if there is not one block.
            self._watched, _, _ = streamed_blocks(arguments, job.tokenizer, job.block_size, None).take(count, slice)
        else:
            self.tokens, self.starts = packed_tokens(
                packed or job.output / "packed", arguments, job.tokenizer, job.block_size, job.accelerator
            )
            blocks = Blocks(self.tokens, self.starts, job.block_size)
            self.block_count = len(blocks)
            self._watched = batch_of(*blocks.rows(np.arange(min(count, len(blocks)))))
        if self.held_out is not None:
            self._watched = {name: rows[:count] for name, rows in self.held_out.items()}

    def watched(self) -> dict[str, torch.Tensor]:
        """The blocks whose attention is looked at, on the device."""
        return tensors_of(self._watched, slice(None), self.job.accelerator.device)

    def held_out_batches(self):
        """This process's batches of the held-out blocks."""
        return held_out_batches(self.held_out, self.job.phases[-1].batch_size, self.job.accelerator)

    def begin(self, step: int) -> None:
        """To be called once, with the steps that are done; the place in the data itself is a checkpoint's."""
        self.phase = phase_at(self.job.phases, max(0, step - 1))
        self.data = self._walk()
        # Of a stream, which counts from its beginning, those of earlier stages.
        self.passed = self.data.epochs if self.job.arguments.streaming else 0.0

    def reach(self, step: int) -> None:
        """Goes over to the phase of a step."""
        if self.phase != phase_at(self.job.phases, step):
            self.phase = phase_at(self.job.phases, step)
            self.data = self._walk()

    def _walk(self):
        """The way through the data in the present phase, from its beginning."""
        job, arguments, size = self.job, self.job.arguments, self.job.phases[self.phase].block_size
        if arguments.streaming:
            data = streamed_blocks(arguments, job.tokenizer, size, arguments.seed)
        else:
            # Each block size in an order of its own.
            order = arguments.seed if self.phase == 0 else [arguments.seed, self.phase]
            data = ShuffledBlocks(Blocks(self.tokens, self.starts, size), order)
        data.skip((self.first_token + job.phases[self.phase].first * job.step_tokens) // size)
        return data

    def take(self) -> tuple[dict[str, np.ndarray], list[slice], torch.Tensor, np.ndarray]:
        """The next step's blocks: this process's rows, which of them each pass has, labels of all processes, numbers
        of the blocks."""
        job, size = self.job, self.job.phases[self.phase].batch_size
        passes = job.arguments.gradient_accumulation
        mine = partial(rows_of_process, passes, size, job.accelerator)
        batch, labels, numbers = self.data.take(size * passes * job.processes, mine)
        parts = [slice(part * size, (part + 1) * size) for part in range(passes)]
        return batch, parts, torch.tensor(labels, device=job.accelerator.device), numbers

    def epochs(self, tokens: int) -> float:
        """How often the text was read in this stage, of which so many tokens were."""
        if self.job.arguments.streaming:
            return self.data.epochs - self.passed
        return tokens / (self.block_count * self.job.block_size)
